//! A port that nobody listens on is refused by the kernel, as without the mesh; one that somebody listens on never is.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use mesh_ebpf_abi::HBONE_PORT;
use mesh_ebpf_abi::event::Counter;
use node_agent::datapath::Listeners;
use socket2::{Domain, Protocol, Socket, Type};

use crate::family::over_both;
use crate::packets::{RST, Sniffer};
use crate::world::{PATIENCE, PORT, World, accept, converse, idle};

/// The client is refused by the pod's kernel.
fn refused(world: &World, port: u16) -> Result<()> {
    let error = world.b.dial(world.a.at(port), PATIENCE).err().context("connected")?;
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    ensure!(kind == Some(ErrorKind::ConnectionRefused), "{error:#}");
    Ok(())
}

/// The client meets the proxy.
fn served(world: &World, listeners: &Listeners, port: u16) -> Result<()> {
    let client = world.b.dial(world.a.at(port), PATIENCE)?;
    converse(&client, &accept(world.family.inbound(listeners))?)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nobody_listens() -> Result<()> {
    over_both(|world| {
        // So it is without the mesh. Besides, the nodes find each other now: until then IPv6 loses the first answer.
        refused(world, PORT)?;
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        let mut sniffer = Sniffer::new(world)?;
        refused(world, PORT)?;
        ensure!(idle(world.family.inbound(&listeners[0]))?, "the proxy met the client");
        sniffer.wait("the pod's reset", |seen| seen.from == world.a.at(PORT) && seen.flags & RST != 0)?;
        ensure!(datapath.count(Counter::Refused)? == 1);
        ensure!(datapath.count(Counter::SteerForeign)? == 0 && datapath.count(Counter::GuardNoSocket)? == 0);
        Ok(())
    })
}

/// Where it can be reached from, not only on which port.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_address_that_somebody_listens_on_counts() -> Result<()> {
    over_both(|world| {
        let (_datapath, listeners) = world.enrolled(&[&world.a])?;
        let own = world.a.at(7002).to_string();
        let anywhere = world.family.anywhere(7001).to_string();
        let _apps = [anywhere.as_str(), own.as_str(), "[::]:7003"]
            .into_iter()
            .map(|at| world.a.listen(at))
            .collect::<Result<Vec<_>>>()?;
        let _inside = [
            world.a.listen(world.family.pick("127.0.0.1:7004", "[::1]:7004"))?,
            world.a.listen(world.family.pick("[::1]:7005", "127.0.0.1:7005"))?,
        ];
        for port in [7001, 7002, 7003, HBONE_PORT] {
            let client = world.b.dial(world.a.at(port), PATIENCE).with_context(|| format!("port {port}"))?;
            let hbone = world.family.hbone(&listeners[0]);
            let met = if port == HBONE_PORT { hbone } else { world.family.inbound(&listeners[0]) };
            converse(&client, &accept(met)?)?;
        }
        for port in [7004, 7005] {
            refused(world, port).with_context(|| format!("port {port}, on loopback only"))?;
        }
        Ok(())
    })
}

/// There is no moment at which a listener that came or went is not known.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn listeners_come_and_go() -> Result<()> {
    let world = World::new()?;
    let before = world.a.listen("0.0.0.0:7001")?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    served(&world, &listeners[0], 7001)?;
    drop(before);
    refused(&world, 7001)?;
    for _ in 0..20 {
        refused(&world, PORT)?;
        let app = world.a.serve()?;
        served(&world, &listeners[0], PORT)?;
        drop(app);
    }
    refused(&world, PORT)
}

/// Its owner is in no cgroup of a pod: a count kept by cgroup would not have it.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_listener_of_a_process_outside_is_one_too() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let _app = world.outside(|| world.a.serve())?;
    served(&world, &listeners[0], PORT)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_last_of_a_reuseport_group_counts() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let grouped = || {
        world.a.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_port(true)?;
            socket.bind(&SocketAddr::from(([0, 0, 0, 0], PORT)).into())?;
            socket.listen(16)?;
            Ok(socket)
        })
    };
    let (first, second) = (grouped()?, grouped()?);
    drop(first);
    served(&world, &listeners[0], PORT)?;
    drop(second);
    refused(&world, PORT)
}

/// A process that has this listener from its parent, and does nothing with it.
fn heir(listener: &TcpListener) -> Result<Child> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    let inherited = listener.try_clone()?;
    fcntl(&inherited, FcntlArg::F_SETFD(FdFlag::empty())).context("let it be inherited")?;
    Ok(Command::new("sleep").arg("60").stdin(Stdio::null()).spawn()?)
}

/// Workers inherit the listener and are killed: it lives as long as the last of them.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_listener_lives_as_long_as_its_last_process() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let app = world.a.serve()?;
    let mut worker = heir(&app)?;
    drop(app);
    let result = served(&world, &listeners[0], PORT);
    worker.kill()?;
    worker.wait()?;
    result.context("while the worker lives")?;
    refused(&world, PORT)
}

/// Many at once: the questions about them do not mix.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn open_and_closed_ports_at_the_same_time() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let _app = world.a.serve()?;
    std::thread::scope(|scope| {
        let dialling: Vec<_> = (0..200)
            .map(|number| {
                let world = &world;
                scope.spawn(move || match number % 2 {
                    0 => world.b.dial(world.a.at(PORT), PATIENCE).map(drop).context("the open port"),
                    _ => refused(world, PORT + 1),
                })
            })
            .collect();
        dialling.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    ensure!(!idle(world.family.inbound(&listeners[0]))?);
    Ok(())
}
