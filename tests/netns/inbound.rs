//! Connections to a pod, and the proxy's to the app.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use anyhow::{Result, ensure};
use mesh_ebpf_abi::{HBONE_PORT, MARK_UPSTREAM};
use node_agent::datapath::Listeners;
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{PATIENCE, PORT, REFUSAL, World, accept, converse, idle, proxy_socket, upstream};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_port_chooses_the_listener() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let anywhere = world.a.listen("0.0.0.0:7000")?;
    let exactly = world.a.listen("10.98.1.2:7001")?;
    let everywhere = world.a.listen("[::]:7002")?;
    anywhere.set_nonblocking(true)?;
    for (port, listener) in [
        (PORT, &listeners[0].inbound_v4),
        (7001, &listeners[0].inbound_v4),
        (7002, &listeners[0].inbound_v4),
        (7003, &listeners[0].inbound_v4),
        (HBONE_PORT, &listeners[0].hbone_v4),
    ] {
        let client = world.b.dial(world.a.at(port), PATIENCE)?;
        let accepted = accept(listener)?;
        ensure!(accepted.local_addr()? == world.a.at(port));
        ensure!(accepted.peer_addr()? == client.local_addr()?);
        converse(&client, &accepted)?;
    }
    ensure!(anywhere.accept().is_err(), "the app met the client");
    drop((exactly, everywhere));
    Ok(())
}

/// The app sees the client's address, wherever it listens, and the connection does not come back to the proxy.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_proxy_reaches_the_app_with_the_clients_address() -> Result<()> {
    let world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a])?;
    for (source, app) in [(20_000, "0.0.0.0:7000"), (20_001, "10.98.1.2:7000"), (20_002, "[::]:7000")] {
        let app = world.a.listen(app)?;
        for client in [world.b.at(source), SocketAddr::from(([203, 0, 113, 10], source))] {
            let relayed = world.a.run(|| upstream(&datapath, client, world.a.at(PORT)))?;
            let (served, peer) = app.accept()?;
            ensure!((peer.ip().to_canonical(), peer.port()) == (client.ip(), client.port()));
            converse(&relayed, &served)?;
        }
        ensure!(idle(&listeners[0].inbound_v4)?, "looped");
    }
    Ok(())
}

/// Why the upstream socket is bound to lo: for a packet to the pod's own address over lo the kernel names the
/// interface that has the address, and the proxy would meet itself.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_lo_the_proxy_would_meet_itself() -> Result<()> {
    let world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a])?;
    let _app = world.a.listen("0.0.0.0:7000")?;
    let looping = world.a.run(|| {
        let socket = proxy_socket(&datapath)?;
        socket.set_ip_transparent_v4(true)?;
        socket.set_mark(MARK_UPSTREAM)?;
        socket.bind(&world.b.at(20_000).into())?;
        socket.set_nonblocking(true)?;
        // In progress.
        let _ = socket.connect(&world.a.at(PORT).into());
        Ok(socket)
    })?;
    let met = accept(&listeners[0].inbound_v4)?;
    ensure!(met.peer_addr()? == world.b.at(20_000));
    drop(looping);
    Ok(())
}

/// Without `fwmark_reflect` the reset would leave by eth0, towards the client that never asked.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_closed_port_is_refused_at_once() -> Result<()> {
    let world = World::new()?;
    let (datapath, _listeners) = world.enrolled(&[&world.a])?;
    let dial = |port| world.a.run(|| Ok(upstream(&datapath, world.b.at(port), world.a.at(PORT)).err()));
    let kind = |error: Option<anyhow::Error>| {
        error.and_then(|error| Some(error.downcast_ref::<std::io::Error>()?.kind()))
    };
    ensure!(kind(dial(20_000)?) == Some(std::io::ErrorKind::ConnectionRefused));
    world.a.netns.sysctl("ipv4/fwmark_reflect", "0")?;
    ensure!(kind(dial(20_001)?) == Some(std::io::ErrorKind::TimedOut), "the setting makes no difference");
    Ok(())
}

/// sk_lookup leaves the client's address and the pod's on the proxy's accepted socket. An upstream connection with
/// the client's own port has the same four numbers in the same network namespace: it meets the accepted socket.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_clients_port_cannot_be_used_again() -> Result<()> {
    let world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a])?;
    let _app = world.a.listen("0.0.0.0:7000")?;
    let client = world.b.dial(world.a.at(PORT), PATIENCE)?;
    let accepted = accept(&listeners[0].inbound_v4)?;
    let same = client.local_addr()?;
    ensure!(world.a.run(|| Ok(upstream(&datapath, same, world.a.at(PORT)).is_err()))?, "no collision");
    let mut other = same;
    other.set_port(if same.port() == 20_000 { 20_001 } else { 20_000 });
    world.a.run(|| upstream(&datapath, other, world.a.at(PORT)))?;
    converse(&client, &accepted)
}

/// With listeners in a SO_REUSEPORT group the kernel would choose again among the group.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_reuseport_group_does_not_undo_the_choice() -> Result<()> {
    let world = World::new()?;
    let mut datapath = world.open()?;
    let (first, second) = world.a.run(|| Ok((grouped()?, grouped()?)))?;
    second.set_nonblocking(true)?;
    let made = datapath.prepare(&world.a.spec()?, None)?;
    let kept = Listeners { inbound_v4: OwnedFd::from(first), ..made };
    let listeners = datapath.prepare(&world.a.spec()?, Some(kept))?;
    datapath.capture(&world.a.uid)?;
    for _ in 0..64 {
        let client: TcpStream = world.b.dial(world.a.at(PORT), PATIENCE)?;
        converse(&client, &accept(&listeners.inbound_v4)?)?;
    }
    ensure!(second.accept().is_err());
    Ok(())
}

fn grouped() -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_port(true)?;
    socket.set_ip_transparent_v4(true)?;
    socket.bind(&"127.0.0.1:6000".parse::<SocketAddr>()?.into())?;
    socket.listen(16)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Under a SYN flood the kernel answers without a socket; those answers have to pass the guard.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn syn_cookies_work() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    world.a.netns.sysctl("ipv4/tcp_syncookies", "2")?;
    let client = world.b.dial(world.a.at(HBONE_PORT), PATIENCE)?;
    converse(&client, &accept(&listeners[0].hbone_v4)?)
}

/// An address of the pod that is not enrolled is nobody's: not the app's, which would be reached in the clear.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_address_that_is_not_enrolled_reaches_nobody() -> Result<()> {
    let world = World::new()?;
    world.a.netns.ip("addr add 10.98.1.77/24 dev eth0\n")?;
    let app = world.a.listen("0.0.0.0:7000")?;
    let other = SocketAddr::from(([10, 98, 1, 77], PORT));
    converse(&world.b.dial(other, PATIENCE)?, &app.accept()?.0)?;
    let (_datapath, _listeners) = world.enrolled(&[&world.a])?;
    ensure!(world.b.dial(other, REFUSAL).is_err());
    Ok(())
}

/// The listeners' own addresses are no way in: they are steered to, never dialled.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_proxys_listeners_cannot_be_dialled() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let bound = Socket::from(listeners[0].inbound_v4.try_clone()?).local_addr()?;
    let bound = bound.as_socket().ok_or_else(|| anyhow::anyhow!("no address"))?;
    let local = SocketAddr::from(([127, 0, 0, 1], bound.port()));
    ensure!(world.a.dial(local, REFUSAL).is_err());
    // Like any other address it is the network's, so it is captured.
    let client = world.a.dial(bound, PATIENCE)?;
    converse(&client, &accept(&listeners[0].outbound_v4)?)?;
    ensure!(idle(&listeners[0].inbound_v4)?);
    Ok(())
}
