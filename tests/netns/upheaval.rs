//! What happens to a node under an agent: a reboot without drain, a bpffs that is unmounted, programs and layouts of
//! another version.

use std::fs;
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context as _, Result, ensure};
use mesh_ebpf_abi::{HBONE_PORT, SOCKET_TUNNEL};
use mesh_tests::raw_bpf::{self, Kind};
use node_agent::datapath::{Config, Datapath, GuardHook, PodSpec};
use socket2::SockRef;

use crate::foreign::load_balancer;
use crate::lifecycle::{Traces, nothing_pinned};
use crate::older::{disconnect, flag_of};
use crate::packets::{SYN, Sniffer, segment, send_raw};
use crate::world::{PATIENCE, PORT, World, accept, converse, enrol};

/// The next boot finds neither pins nor network namespaces, and the pod in a new one under its old UID.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_node_rebooted_without_drain_starts_from_nothing() -> Result<()> {
    let mut world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    drop((datapath, listeners));
    world.reboot()?;
    let before = Traces::of(&world.a)?;
    let mut datapath = world.open()?;
    ensure!(datapath.surviving().is_empty());
    let listeners = enrol(&mut datapath, &world.a)?;
    let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
    converse(&client, &accept(&listeners.outbound_v4)?)?;
    drop((client, listeners));
    datapath.leave(&world.a.uid)?;
    ensure!(Traces::of(&world.a)? == before);
    nothing_pinned(&world)
}

/// The hooks stay while the agent runs, the pins are put back, and the next agent finds the pod captured.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_unmounted_bpffs_detaches_nothing_and_is_filled_again() -> Result<()> {
    let world = World::new()?;
    let before = Traces::of(&world.a)?;
    let (mut datapath, mut listeners) = world.enrolled(&[&world.a, &world.b])?;
    let kept = listeners.remove(0);
    let captured = || -> Result<()> {
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&client, &accept(&kept.outbound_v4)?)
    };
    ensure!(datapath.keep_pins()? == 0, "nothing is missing");
    world.unmount_bpffs()?;
    captured().context("without bpffs")?;
    let error = datapath.keep_pins().expect_err("there is no bpffs");
    ensure!(error.to_string().contains("bpf"), "{error}");
    // One pod leaves meanwhile: its hooks have no pins to be found by.
    drop(listeners);
    let _ = datapath.leave(&world.b.uid);
    let app = world.b.serve()?;
    let plain =
        world.router.run(|| Ok(std::net::TcpStream::connect_timeout(&world.b.at(PORT), PATIENCE)?))?;
    converse(&plain, &app.accept()?.0).context("the pod that left")?;
    drop((plain, app));

    world.mount_bpffs()?;
    ensure!(datapath.keep_pins()? > 10, "nothing was put back");
    ensure!(datapath.keep_pins()? == 0, "it was not put back for good");
    ensure!(!world.pod_pins(&world.b).exists(), "the pod that left is pinned again");
    drop(datapath);
    captured().context("after the agent")?;
    let mut datapath = world.open()?;
    ensure!(datapath.surviving().len() == 1, "{:?}", datapath.surviving());
    let listeners = datapath.prepare(&world.a.spec()?, Some(kept))?;
    datapath.capture(&world.a.uid)?;
    drop(listeners);
    datapath.leave(&world.a.uid)?;
    ensure!(Traces::of(&world.a)? == before);
    nothing_pinned(&world)
}

/// Nothing is taken off because its pin is not there: neither when hooks of the node change, nor when the pod is captured
/// anew or gets an interface.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_changes_without_bpffs_leaves_pods_captured() -> Result<()> {
    let world = World::new()?;
    let lb = load_balancer(&world, &world.cgroup)?;
    let (mut datapath, mut listeners) = world.enrolled(&[&world.a])?;
    let kept = listeners.remove(0);
    let app = world.a.serve()?;
    app.set_nonblocking(true)?;
    let captured = || -> Result<()> {
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&client, &accept(&kept.outbound_v4)?).context("outbound")?;
        // The other one sends those of its cgroup elsewhere.
        let client = world.outside(|| world.b.dial(world.a.at(PORT), PATIENCE))?;
        converse(&client, &accept(&kept.inbound_v4)?).context("inbound")?;
        let mut sniffer = Sniffer::new(&world)?;
        send_raw(&world.a, &segment(world.a.at(5000), world.b.at(PORT), SYN), 0)?;
        let seen = sniffer.tcp_from(&world.a, world.b.address)?;
        ensure!(!seen.iter().any(|packet| packet.from.port() == 5000), "a raw socket's packet: {seen:?}");
        Ok(())
    };
    captured()?;
    world.unmount_bpffs()?;
    drop(lb);
    ensure!(datapath.foreign()?.is_empty());
    captured().context("the last program of others is gone")?;
    let again = datapath.prepare(&world.a.spec()?, Some(kept.try_clone()?))?;
    let error = datapath.capture(&world.a.uid).expect_err("there is no bpffs");
    ensure!(error.source.to_string().contains("bpf"), "{error:?}");
    captured().context("captured anew")?;
    world.second_network(&world.a, "net1", 1)?;
    datapath.upkeep();
    captured().context("another interface")?;

    world.mount_bpffs()?;
    ensure!(datapath.keep_pins()? > 10, "nothing was put back");
    datapath.upkeep();
    drop((datapath, again));
    captured().context("after the agent")
}

/// Links are moved to this agent's programs where they are: they are never off.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn links_of_another_build_are_moved_to_this_ones_programs() -> Result<()> {
    let world = World::new()?;
    let (datapath, mut listeners) = world.enrolled(&[&world.a])?;
    let kept = listeners.remove(0);
    drop(datapath);
    let pins = world.pod_pins(&world.a);
    let links = pins.parent().context("the links")?;
    let mut all = vec![
        (links.join("capture4"), Kind::Connect4),
        (links.join("capture6"), Kind::Connect6),
        (pins.join("steer"), Kind::SkLookup),
    ];
    let guard = world.guard_pin(&world.a, GuardHook::Tcx)?;
    // A filter is no link; `clsact` has the test of those.
    all.extend(guard.exists().then_some((guard, Kind::Tcx)));
    for pin in fs::read_dir(&pins)? {
        let name = pin?.file_name().to_string_lossy().into_owned();
        all.extend(name.starts_with("guard_node").then(|| (pins.join(name), Kind::Tcx)));
    }
    ensure!(all.len() == 5 || world.guard_hook != GuardHook::Tcx, "no links of the guard");
    let ours = all.iter().map(|(path, _)| raw_bpf::link(path)).collect::<std::io::Result<Vec<_>>>()?;
    for (path, kind) in &all {
        raw_bpf::replace_by_one_that_passes_all(path, *kind)?;
    }
    // They do pass all: the pod is not captured by them. A filter of the guard is still ours.
    if all.iter().any(|(_, kind)| *kind == Kind::Tcx) {
        let app = world.b.serve()?;
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&client, &app.accept()?.0)?;
    }

    let mut datapath = world.open()?;
    for ((path, _), before) in all.iter().zip(&ours) {
        let now = raw_bpf::link(path)?;
        ensure!(now.id == before.id, "{} was attached anew", path.display());
        ensure!(now.tag == before.tag, "{} runs other instructions", path.display());
    }
    let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
    converse(&client, &accept(&kept.outbound_v4)?)?;
    // As the agent does for each pod that it takes over: so it knows where the pod is.
    datapath.prepare(&world.a.spec()?, Some(kept))?;
    datapath.leave(&world.a.uid)?;
    Ok(())
}

/// An agent with other layouts takes a pod over from its predecessor's: captured all the while, connections live on,
/// and nothing of the old version is left.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn another_map_layout_takes_over_and_drains_the_old_one() -> Result<()> {
    let mut world = World::new()?;
    let before = Traces::of(&world.a)?;
    let (datapath, mut listeners) = world.enrolled(&[&world.a, &world.b])?;
    let kept = listeners.remove(0);
    let established = world.a.dial(world.b.at(PORT), PATIENCE)?;
    let accepted = accept(&kept.outbound_v4)?;
    let to_tunnel = SocketAddr::from((world.a.v4, HBONE_PORT));
    let tunnel = world.router.run(|| Ok(TcpStream::connect_timeout(&to_tunnel, PATIENCE)?))?;
    let tunnel = (tunnel, accept(&kept.hbone_v4)?);
    drop((datapath, listeners));
    // As if the layouts were another version's.
    let own = world.version();
    let old = own.with_file_name("v0");
    fs::rename(&own, &old)?;
    let mut sniffer = Sniffer::new(&world)?;
    let captured = || -> Result<()> {
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&client, &accept(&kept.outbound_v4)?)?;
        converse(&established, &accepted)
    };
    let mut datapath = world.open()?;
    let uids: Vec<_> = datapath.surviving().into_iter().map(|pod| pod.uid).collect();
    ensure!(uids == [world.a.uid.clone(), world.b.uid.clone()], "{uids:?}");
    captured().context("with both versions")?;
    datapath.prepare(&world.a.spec()?, Some(kept.try_clone()?))?;
    captured().context("prepared")?;
    datapath.capture(&world.a.uid)?;
    captured().context("captured by the new one")?;
    ensure!(sniffer.tcp_from(&world.a, world.b.address)?.is_empty(), "in the clear");
    ensure!(datapath.reset_older(&world.a.uid, &|_, _| true)?.count == 0, "tunnels met the proxy");
    converse(&tunnel.0, &tunnel.1).context("a tunnel")?;
    ensure!(flag_of(&datapath, &tunnel.1)? == Some(SOCKET_TUNNEL));
    // As an app could with a socket that it had on the port before the old version captured it.
    disconnect(&tunnel.1)?;
    let again = SockRef::from(&tunnel.1);
    world.a.run(|| Ok(again.connect(&world.b.at(PORT).into())?))?;
    converse(&tunnel.1, &accept(&kept.outbound_v4)?).context("a tunnel that connects again")?;
    ensure!(!old.join("links").join(&world.a.uid).exists(), "the old version still has the pod");
    ensure!(old.join("links").join(&world.b.uid).exists(), "the old version has lost the other pod");
    datapath.clear(&world.b.uid, Some(world.b.netns.descriptor()?))?;
    ensure!(!old.exists(), "the old version is left");
    captured().context("with the new one alone")?;
    ensure!(datapath.surviving().len() == 1);
    drop((kept, established, accepted, tunnel));
    datapath.leave(&world.a.uid)?;
    ensure!(Traces::of(&world.a)? == before);
    nothing_pinned(&world)?;

    // Pods that died meanwhile need no taking over.
    let (datapath, listeners) = world.enrolled(&[&world.a])?;
    drop((datapath, listeners));
    fs::rename(&own, &old)?;
    world.forget_a()?;
    mesh_tests::eventually("the network namespace is gone", PATIENCE, || {
        let datapath = world.open()?;
        ensure!(datapath.surviving().is_empty() && !old.exists());
        Ok(())
    })
}

/// What fails while a pod is taken over takes nothing from the version that captures it; an agent that dies then leaves a
/// pod that is captured to the next.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_takeover_that_fails_leaves_the_pod_captured_by_the_other_version() -> Result<()> {
    let world = World::new()?;
    let (datapath, mut listeners) = world.enrolled(&[&world.a])?;
    let kept = listeners.remove(0);
    drop(datapath);
    fs::rename(world.version(), world.version().with_file_name("v0"))?;
    let _app = world.a.serve()?;
    let mut sniffer = Sniffer::new(&world)?;
    let mut captured = |when: &'static str| -> Result<()> {
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&client, &accept(&kept.outbound_v4)?).context(when)?;
        let client = world.b.dial(world.a.at(PORT), PATIENCE)?;
        converse(&client, &accept(&kept.inbound_v4)?).context(when)?;
        send_raw(&world.a, &segment(world.a.at(5000), world.b.at(PORT), SYN), 0)?;
        let seen = sniffer.tcp_from(&world.a, world.b.address)?;
        ensure!(!seen.iter().any(|packet| packet.from.port() == 5000), "{when}: in the clear: {seen:?}");
        Ok(())
    };
    let mut nowhere = world
        .router
        .run(|| Ok(Datapath::open(&Config { proc: "/nonexistent".into(), ..world.config() })?))?;
    ensure!(nowhere.prepare(&world.a.spec()?, Some(kept.try_clone()?)).is_err(), "prepared");
    captured("it could not be prepared")?;
    drop(nowhere);
    let mut datapath = world.open()?;
    datapath.prepare(&world.a.spec()?, Some(kept.try_clone()?))?;
    drop(datapath);
    let mut datapath = world.open()?;
    ensure!(datapath.unfinished().is_empty() && datapath.surviving().len() == 1);
    captured("an agent died before it captured it")?;
    // The first interface gets its guard, the second one does not.
    world.second_network(&world.a, "net1", 1)?;
    let obstacle = world.interface_pin(&world.a, "net1", world.guard_hook)?;
    fs::create_dir_all(obstacle.join("in-the-way"))?;
    for _ in 0..2 {
        datapath.prepare(&world.a.spec()?, Some(kept.try_clone()?))?;
        ensure!(datapath.capture(&world.a.uid).is_err(), "captured");
        captured("it could not be captured")?;
    }
    fs::remove_dir(obstacle.join("in-the-way"))?;
    fs::remove_dir(&obstacle)?;
    datapath.prepare(&world.a.spec()?, Some(kept.try_clone()?))?;
    datapath.capture(&world.a.uid)?;
    captured("taken over")?;
    datapath.leave(&world.a.uid)?;
    nothing_pinned(&world)
}

/// What an agent left that died while it replaced a pin is removed; a hook that cannot be moved is its pod's trouble.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn pins_that_are_none_of_a_hook_stop_no_agent() -> Result<()> {
    let world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a])?;
    drop((datapath, listeners));
    let (pins, program) = (world.pod_pins(&world.a), world.version().join("progs/guard"));
    let (half_made, no_link) = (pins.join("guard-98_new"), pins.join("guard-99"));
    fs::hard_link(&program, &half_made)?;
    let mut datapath = world.open().context("a pin that is half made")?;
    ensure!(!half_made.exists(), "it is left");
    drop(datapath);
    fs::hard_link(&program, &no_link)?;
    datapath = world.open().context("a pin that is no link")?;
    ensure!(datapath.surviving().len() == 1, "{:?}", datapath.surviving());
    let listeners = enrol(&mut datapath, &world.a)?;
    let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
    converse(&client, &accept(&listeners.outbound_v4)?)?;
    drop((client, listeners));
    datapath.leave(&world.a.uid)?;
    nothing_pinned(&world)
}

/// An interface that cannot be guarded is no reason to leave the next one open.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_interface_that_refuses_the_guard_leaves_no_other_without() -> Result<()> {
    let world = World::new()?;
    let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
    world.second_network(&world.a, "net1", 1)?;
    world.second_network(&world.a, "net2", 2)?;
    let [refuses, next] = ["net1", "net2"].map(|name| world.interface_pin(&world.a, name, world.guard_hook));
    let (refuses, next) = (refuses?, next?);
    let obstacle = refuses.join("in-the-way");
    fs::create_dir_all(&obstacle)?;
    datapath.upkeep();
    ensure!(next.exists(), "the next one has no guard");
    fs::remove_dir(&obstacle)?;
    fs::remove_dir(&refuses)?;
    mesh_tests::eventually("it is tried again", PATIENCE, || {
        datapath.upkeep();
        ensure!(refuses.exists());
        Ok(())
    })
}

/// A process of the pod makes itself a network namespace, and is the only one that is found.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_captured_pod_is_not_looked_for_in_another_network_namespace() -> Result<()> {
    let world = World::new()?;
    let (datapath, mut listeners) = world.enrolled(&[&world.a])?;
    let kept = listeners.remove(0);
    drop(datapath);
    let mut datapath = world.open()?;
    let spec = PodSpec { netns: world.b.netns.descriptor()?, ..world.a.spec()? };
    let error = datapath.prepare(&spec, None).expect_err("it is another one's");
    ensure!(error.step == "find its network namespace", "{error:?}");
    let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
    converse(&client, &accept(&kept.outbound_v4)?)?;
    datapath.prepare(&world.a.spec()?, Some(kept.try_clone()?))?;
    datapath.capture(&world.a.uid)?;
    Ok(())
}
