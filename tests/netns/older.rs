//! Connections and handshakes that are older than their pod's enrolment.

use std::io::Write as _;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd as _};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Map, MapData, MapError, SkStorage};
use mesh_ebpf_abi::event::Counter;
use mesh_ebpf_abi::{HBONE_PORT, SOCKET_OLDER};
use mesh_tests::shell;
use node_agent::datapath::Datapath;
use socket2::{Protocol, SockRef, Socket, Type};

use crate::family::over_both;
use crate::packets::{ACK, SEQUENCE, SYN, Sniffer, segment, segment_of, send_raw};
use crate::world::{PATIENCE, PORT, World, accept, converse, into_stream};

/// Connections of both directions from before enrolment live on; new ones are captured.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn connections_older_than_enrolment_live_on() -> Result<()> {
    over_both(|world| {
        let (theirs, ours) = (world.b.serve()?, world.a.serve()?);
        let opened = (world.a.dial(world.b.at(PORT), PATIENCE)?, theirs.accept()?.0);
        let accepted = (world.b.dial(world.a.at(PORT), PATIENCE)?, ours.accept()?.0);
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        converse(&opened.0, &opened.1)?;
        converse(&accepted.0, &accepted.1)?;
        ensure!(datapath.count(Counter::OlderFlagged)? >= 2);
        ensure!(datapath.count(Counter::GuardOlder)? >= 2);
        let new = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&new, &accept(world.family.outbound(&listeners[0]))?)
    })
}

/// connect(AF_UNSPEC) ends the older connection, and the flag must end with it: not even a socket that its owner takes
/// off lo again gets anything out.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_older_socket_that_connects_again_is_captured() -> Result<()> {
    over_both(|world| {
        let theirs = world.b.serve()?;
        let old = world.a.dial(world.b.at(PORT), PATIENCE)?;
        drop(theirs.accept()?);
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        ensure!(flag_of(&datapath, &old)? == Some(SOCKET_OLDER));
        disconnect(&old)?;
        let socket = SockRef::from(&old);
        world.a.run(|| Ok(socket.connect(&world.b.at(PORT).into())?))?;
        let accepted = accept(world.family.outbound(&listeners[0]))?;
        ensure!(accepted.local_addr()? == world.b.at(PORT));
        converse(&old, &accepted)?;
        ensure!(flag_of(&datapath, &old)?.is_none());

        let mut sniffer = Sniffer::new(world)?;
        socket.bind_device(None)?;
        (&old).write_all(b"marker")?;
        mesh_tests::eventually("the guard is asked", PATIENCE, || {
            ensure!(datapath.count(Counter::GuardApp)? >= 1);
            Ok(())
        })?;
        let seen = sniffer.tcp_from(&world.a, world.b.address)?;
        ensure!(seen.is_empty(), "{seen:?}");
        Ok(())
    })
}

/// HBONE's port is the app's own before enrolment: it excuses nothing, whether the app connects from it or accepts on it.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_older_socket_on_the_tunnels_port_is_no_tunnel() -> Result<()> {
    over_both(|world| {
        let theirs = world.b.serve()?;
        let old: TcpStream = world.a.run(|| {
            let socket = Socket::new(world.family.domain(), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.bind(&world.a.at(HBONE_PORT).into())?;
            socket.connect_timeout(&world.b.at(PORT).into(), PATIENCE)?;
            Ok(socket.into())
        })?;
        drop(theirs.accept()?);
        let ours = world.a.run(|| Ok(std::net::TcpListener::bind(world.a.at(HBONE_PORT))?))?;
        let _client = world.b.dial(world.a.at(HBONE_PORT), PATIENCE)?;
        let (accepted, _) = ours.accept()?;
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        for socket in [&old, &accepted] {
            ensure!(flag_of(&datapath, socket)? == Some(SOCKET_OLDER));
        }
        ensure!(
            datapath.reset_older(&world.a.uid, &|_, _| true)?.count >= 1,
            "the accepted one is not reset"
        );
        disconnect(&old)?;
        let socket = SockRef::from(&old);
        world.a.run(|| Ok(socket.connect(&world.b.at(PORT).into())?))?;
        converse(&old, &accept(world.family.outbound(&listeners[0]))?)
    })
}

/// A SYN that is on its way at enrolment, and sent again after it.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_connection_that_is_being_opened_lives_on() -> Result<()> {
    over_both(|world| {
        let theirs = world.b.serve()?;
        let mut sniffer = Sniffer::new(world)?;
        forward(world, false)?;
        let opening = world.a.run(|| {
            let socket = Socket::new(world.family.domain(), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            // In progress.
            let _ = socket.connect(&world.b.at(PORT).into());
            Ok(socket)
        })?;
        sniffer.wait("a SYN", |seen| seen.from.ip() == world.a.address && seen.flags & SYN != 0)?;
        let (_datapath, _listeners) = world.enrolled(&[&world.a])?;
        forward(world, true)?;
        converse(&into_stream(opening), &theirs.accept()?.0)
    })
}

/// A client far away: its last segment of the handshake comes long after enrolment.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_connection_that_is_being_accepted_lives_on() -> Result<()> {
    over_both(|world| {
        let ours = world.a.serve()?;
        let mut sniffer = Sniffer::new(world)?;
        // The client's kernel knows nothing of this connection, so it must not see the answers.
        let answers = |what: &str| {
            let to = world.b.address.to_string();
            let family = world.family.pick("-4", "-6");
            shell::run("ip", ["-n", world.router.name(), family, "route", what, "blackhole", &to]).map(drop)
        };
        answers("add")?;
        let (client, server) = (world.b.at(5000), world.a.at(PORT));
        send_raw(&world.b, &segment(client, server, SYN), 0)?;
        let answer = sniffer.wait("a SYN-ACK", |seen| seen.from == server && seen.flags == SYN | ACK)?;
        let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
        ensure!(datapath.count(Counter::OlderPending)? >= 1);

        let numbers = [SEQUENCE.wrapping_add(1), answer.sequence.wrapping_add(1)];
        send_raw(&world.b, &segment_of(client, server, ACK, numbers), 0)?;
        let (mut served, peer) = ours.accept()?;
        ensure!(peer == client);
        served.write_all(b"word")?;
        datapath.upkeep();
        // Sent again when the guard dropped it the first time.
        sniffer.wait("the application's word", |seen| seen.from == server && seen.data == 4)?;
        ensure!(flag_of(&datapath, &served)? == Some(SOCKET_OLDER));
        ensure!(datapath.upkeep() > std::time::Duration::from_millis(100), "nothing is under way any more");
        answers("del")
    })
}

fn forward(world: &World, on: bool) -> Result<()> {
    world
        .router
        .sysctl(world.family.pick("ipv4/ip_forward", "ipv6/conf/all/forwarding"), if on { "1" } else { "0" })
}

/// The socket's value in SKPROXY.
pub(crate) fn flag_of(datapath: &Datapath, socket: &TcpStream) -> Result<Option<u32>> {
    let map = MapData::from_fd(datapath.skproxy_map().try_clone_to_owned()?)?;
    let map = SkStorage::<_, u32>::try_from(Map::SkStorage(map))?;
    match map.get(&socket.as_fd(), 0) {
        Ok(flag) => Ok(Some(flag)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error).context("read SKPROXY"),
    }
}

/// connect() with AF_UNSPEC.
#[allow(unsafe_code, reason = "socket2 has no address without a family")]
pub(crate) fn disconnect(socket: &TcpStream) -> Result<()> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: an address of the length given, and an open socket.
    let result =
        unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, size_of::<libc::sockaddr>() as u32) };
    ensure!(result == 0, "{}", std::io::Error::last_os_error());
    Ok(())
}
