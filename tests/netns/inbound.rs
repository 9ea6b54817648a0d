//! Connections to a pod, and the proxy's to the app.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use anyhow::{Result, ensure};
use mesh_ebpf_abi::{HBONE_PORT, MARK_UPSTREAM};
use node_agent::datapath::Listeners;
use socket2::{Domain, Protocol, Socket, Type};

use crate::family::{Family, over_both, transparent};
use crate::world::{PATIENCE, PORT, REFUSAL, accept, converse, idle, proxy_socket, upstream};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_port_chooses_the_listener() -> Result<()> {
    over_both(|world| {
        let (_datapath, listeners) = world.enrolled(&[&world.a])?;
        let anywhere = world.a.serve()?;
        let exactly = world.a.listen(&world.a.at(7001).to_string())?;
        let everywhere = world.a.listen("[::]:7002")?;
        anywhere.set_nonblocking(true)?;
        for (port, listener) in [
            (PORT, world.family.inbound(&listeners[0])),
            (7001, world.family.inbound(&listeners[0])),
            (7002, world.family.inbound(&listeners[0])),
            (HBONE_PORT, world.family.hbone(&listeners[0])),
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
    })
}

/// The app sees the client's address, wherever it listens, and the connection does not come back to the proxy.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_proxy_reaches_the_app_with_the_clients_address() -> Result<()> {
    over_both(|world| {
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        let exactly = world.a.at(PORT).to_string();
        let outside = world.family.pick("203.0.113.10", "2001:db8:9::10").parse()?;
        let (all, all_v4) = ("[::]:7000", "0.0.0.0:7000");
        let apps = world.family.pick([all_v4, &exactly, all], [V6_ONLY, &exactly, all]);
        for (source, app) in (20_000..).zip(apps) {
            let app = if app == V6_ONLY { world.a.run(v6_only)? } else { world.a.listen(app)? };
            for client in [world.b.at(source), SocketAddr::new(outside, source)] {
                let relayed = world.a.run(|| upstream(&datapath, client, world.a.at(PORT)))?;
                let (served, peer) = app.accept()?;
                ensure!((peer.ip().to_canonical(), peer.port()) == (client.ip(), client.port()));
                converse(&relayed, &served)?;
            }
            ensure!(idle(world.family.inbound(&listeners[0]))?, "looped");
        }
        Ok(())
    })
}

const V6_ONLY: &str = "IPv6 only";

fn v6_only() -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(true)?;
    socket.set_reuse_address(true)?;
    socket.bind(&Family::V6.anywhere(PORT).into())?;
    socket.listen(16)?;
    Ok(socket.into())
}

/// Why the upstream socket is bound to lo: for a packet to the pod's own address over lo the kernel names the
/// interface that has the address, and the proxy would meet itself.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_lo_the_proxy_would_meet_itself() -> Result<()> {
    over_both(|world| {
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        let _app = world.a.serve()?;
        let looping = world.a.run(|| {
            let socket = proxy_socket(&datapath, world.family.domain())?;
            transparent(&socket, world.family.domain())?;
            socket.set_mark(MARK_UPSTREAM)?;
            socket.bind(&world.b.at(20_000).into())?;
            socket.set_nonblocking(true)?;
            // In progress.
            let _ = socket.connect(&world.a.at(PORT).into());
            Ok(socket)
        })?;
        let met = accept(world.family.inbound(&listeners[0]))?;
        ensure!(met.peer_addr()? == world.b.at(20_000));
        drop(looping);
        Ok(())
    })
}

/// Without `fwmark_reflect` the reset would leave by eth0, towards the client that never asked.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_closed_port_is_refused_at_once() -> Result<()> {
    over_both(|world| {
        let (datapath, _listeners) = world.enrolled(&[&world.a])?;
        let dial = |port| world.a.run(|| Ok(upstream(&datapath, world.b.at(port), world.a.at(PORT)).err()));
        let kind = |error: Option<anyhow::Error>| {
            error.and_then(|error| Some(error.downcast_ref::<std::io::Error>()?.kind()))
        };
        ensure!(kind(dial(20_000)?) == Some(std::io::ErrorKind::ConnectionRefused));
        world.a.netns.sysctl(&world.family.sysctl("fwmark_reflect"), "0")?;
        ensure!(kind(dial(20_001)?) == Some(std::io::ErrorKind::TimedOut), "the setting makes no difference");
        Ok(())
    })
}

/// sk_lookup leaves the client's address and the pod's on the proxy's accepted socket. An upstream connection with
/// the client's own port has the same four numbers in the same network namespace: it meets the accepted socket.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_clients_port_cannot_be_used_again() -> Result<()> {
    over_both(|world| {
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        let _app = world.a.serve()?;
        let client = world.b.dial(world.a.at(PORT), PATIENCE)?;
        let accepted = accept(world.family.inbound(&listeners[0]))?;
        let same = client.local_addr()?;
        ensure!(world.a.run(|| Ok(upstream(&datapath, same, world.a.at(PORT)).is_err()))?, "no collision");
        let mut other = same;
        other.set_port(if same.port() == 20_000 { 20_001 } else { 20_000 });
        world.a.run(|| upstream(&datapath, other, world.a.at(PORT)))?;
        converse(&client, &accepted)
    })
}

/// With listeners in a SO_REUSEPORT group the kernel would choose again among the group.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_reuseport_group_does_not_undo_the_choice() -> Result<()> {
    over_both(|world| {
        let mut datapath = world.open()?;
        let (first, second) = world.a.run(|| Ok((grouped(world.family)?, grouped(world.family)?)))?;
        second.set_nonblocking(true)?;
        let made = datapath.prepare(&world.a.spec()?, None)?;
        let first = OwnedFd::from(first);
        let kept = match world.family {
            Family::V4 => Listeners { inbound_v4: first, ..made },
            Family::V6 => Listeners { inbound_v6: Some(first), ..made },
        };
        let listeners = datapath.prepare(&world.a.spec()?, Some(kept))?;
        datapath.capture(&world.a.uid)?;
        let _app = world.a.serve()?;
        for _ in 0..64 {
            let client: TcpStream = world.b.dial(world.a.at(PORT), PATIENCE)?;
            converse(&client, &accept(world.family.inbound(&listeners))?)?;
        }
        ensure!(second.accept().is_err());
        Ok(())
    })
}

fn grouped(family: Family) -> Result<TcpListener> {
    let socket = Socket::new(family.domain(), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_port(true)?;
    transparent(&socket, family.domain())?;
    socket.bind(&family.pick("127.0.0.1:6000", "[::1]:6000").parse::<SocketAddr>()?.into())?;
    socket.listen(16)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Under a SYN flood the kernel answers without a socket; those answers have to pass the guard.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn syn_cookies_work() -> Result<()> {
    over_both(|world| {
        let (_datapath, listeners) = world.enrolled(&[&world.a])?;
        world.a.netns.sysctl("ipv4/tcp_syncookies", "2")?;
        let client = world.b.dial(world.a.at(HBONE_PORT), PATIENCE)?;
        converse(&client, &accept(world.family.hbone(&listeners[0]))?)
    })
}

/// An address of the pod that is not enrolled is nobody's: not the app's, which would be reached in the clear.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_address_that_is_not_enrolled_reaches_nobody() -> Result<()> {
    over_both(|world| {
        let other = world.family.pick("10.98.1.77", "fd98:1::77");
        let prefix = world.family.pick(24, 64);
        world.a.netns.ip(&format!("addr add {other}/{prefix} dev eth0\n"))?;
        let app = world.a.serve()?;
        let other = SocketAddr::new(other.parse()?, PORT);
        converse(&world.b.dial(other, PATIENCE)?, &app.accept()?.0)?;
        let (_datapath, _listeners) = world.enrolled(&[&world.a])?;
        ensure!(world.b.dial(other, REFUSAL).is_err());
        Ok(())
    })
}

/// The listeners' own addresses are no way in: they are steered to, never dialled.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_proxys_listeners_cannot_be_dialled() -> Result<()> {
    over_both(|world| {
        let (_datapath, listeners) = world.enrolled(&[&world.a])?;
        let bound = Socket::from(world.family.inbound(&listeners[0]).try_clone()?).local_addr()?;
        let bound = bound.as_socket().ok_or_else(|| anyhow::anyhow!("no address"))?;
        let local = SocketAddr::new(world.family.pick("127.0.0.1", "::1").parse()?, bound.port());
        ensure!(world.a.dial(local, REFUSAL).is_err());
        // Like any other address it is the network's, so it is captured.
        let client = world.a.dial(bound, PATIENCE)?;
        converse(&client, &accept(world.family.outbound(&listeners[0]))?)?;
        ensure!(idle(world.family.inbound(&listeners[0]))?);
        Ok(())
    })
}
