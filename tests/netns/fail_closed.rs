//! What an enrolled pod sends when something of the datapath is missing: nothing.

use std::io::ErrorKind;

use anyhow::{Result, ensure};
use mesh_ebpf_abi::event::Counter;
use mesh_tests::shell;
use node_agent::datapath::GuardHook;

use crate::family::over_both;
use crate::packets::Sniffer;
use crate::world::{PATIENCE, PORT, Pod, REFUSAL, World, accept, converse};

/// The sniffer does see a connection of a pod that is not enrolled.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn control_without_capture() -> Result<()> {
    over_both(|world| {
        let _app = world.b.serve()?;
        let mut sniffer = Sniffer::new(world)?;
        world.a.dial(world.b.at(PORT), PATIENCE)?;
        ensure!(!sniffer.tcp_from(&world.a, world.b.address)?.is_empty());
        Ok(())
    })
}

/// A socket that is bound to lo finds no route then, which for the kernel means that its peer is on lo; so even now
/// the only one who answers is the proxy.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_rules_are_gone() -> Result<()> {
    over_both(|world| {
        let app = world.b.serve()?;
        app.set_nonblocking(true)?;
        let (_datapath, _listeners) = world.enrolled(&[&world.a])?;
        remove_rules(&world.a)?;
        let mut sniffer = Sniffer::new(world)?;
        let dialled = world.a.dial(world.b.at(PORT), REFUSAL);
        let seen = sniffer.tcp_from(&world.a, world.b.address)?;
        ensure!(seen.is_empty() && app.accept().is_err(), "{seen:?}");
        drop(dialled);
        Ok(())
    })
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_listeners_are_gone() -> Result<()> {
    over_both(|world| {
        let _app = world.b.serve()?;
        let _own = world.a.serve()?;
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        drop(listeners);
        nothing_leaves(world)?;
        ensure!(datapath.count(Counter::SteerNoListener)? >= 1);
        // Inbound the peer is told at once.
        let refused = world.b.dial(world.a.at(PORT), PATIENCE).err();
        let kind = refused.and_then(|error| Some(error.downcast_ref::<std::io::Error>()?.kind()));
        ensure!(kind == Some(ErrorKind::ConnectionRefused), "{kind:?}");
        Ok(())
    })
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn everything_but_the_connect_hook_is_gone() -> Result<()> {
    over_both(|world| {
        let _app = world.b.serve()?;
        let own = world.a.serve()?;
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        drop(listeners);
        remove_rules(&world.a)?;
        // The agent would hold what is pinned, and detach nothing.
        drop(datapath);
        let filters = world.guard_pin(&world.a, GuardHook::Clsact)?.exists();
        std::fs::remove_dir_all(world.pod_pins(&world.a))?;
        if filters {
            // They need no pins.
            shell::run("tc", ["-n", world.a.netns.name(), "qdisc", "del", "dev", "eth0", "clsact"])?;
        }
        // Once neither sk_lookup nor the guard is there any more, the app answers whoever is outside.
        let client = mesh_tests::eventually("the hooks are off", PATIENCE, || {
            world.b.dial(world.a.at(PORT), REFUSAL)
        })?;
        converse(&client, &own.accept()?.0)?;
        nothing_leaves(world)
    })
}

/// A proxy that comes back within TCP's patience is met by the connection that was waiting for it.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_connection_waits_for_the_proxy() -> Result<()> {
    over_both(|world| {
        let (mut datapath, listeners) = world.enrolled(&[&world.a])?;
        drop(listeners);
        std::thread::scope(|scope| {
            let dialling = scope.spawn(|| world.a.dial(world.b.at(PORT), PATIENCE));
            mesh_tests::eventually("a SYN without a listener", PATIENCE, || {
                ensure!(datapath.count(Counter::SteerNoListener)? >= 1);
                Ok(())
            })?;
            let listeners = datapath.prepare(&world.a.spec()?, None)?;
            let client = dialling.join().expect("no panic")?;
            converse(&client, &accept(world.family.outbound(&listeners))?)
        })
    })
}

fn nothing_leaves(world: &World) -> Result<()> {
    let mut sniffer = Sniffer::new(world)?;
    ensure!(world.a.dial(world.b.at(PORT), REFUSAL).is_err());
    let seen = sniffer.tcp_from(&world.a, world.b.address)?;
    ensure!(seen.is_empty(), "{seen:?}");
    Ok(())
}

/// Of both families.
fn remove_rules(pod: &Pod) -> Result<()> {
    for family in ["-4", "-6"] {
        for priority in ["100", "101"] {
            shell::run("ip", ["-n", pod.netns.name(), family, "rule", "del", "pref", priority])?;
        }
    }
    Ok(())
}
