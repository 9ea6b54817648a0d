//! Two ztunnels of one node: the older one drains, the younger one takes what comes.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, SockRef, Socket, Type};

use crate::proxy::Proxy;
use crate::world::{PATIENCE, PORT, World, converse};

/// Connections that the older one has, from ports that the younger one may choose towards the application.
const HELD: u16 = 300;
/// Where the ports begin that a ztunnel chooses from, and how many there are.
const FIRST: u16 = 10_000;
const CHOICE: f64 = 22_768.0;
/// Less than a ztunnel waits for an answer before it tries another port.
const AT_ONCE: Duration = Duration::from_millis(900);

/// The older one's socket swallows the SYN of the younger one's, which has its four numbers: from another port the
/// connection is made, a second later, and what the older one carries is not disturbed.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_port_that_the_older_ztunnel_has_is_given_up_for_another() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    let app = world.b.serve()?;
    // For accept() as well (socket(7)).
    SockRef::from(&app).set_read_timeout(Some(PATIENCE))?;
    let mut old = Proxy::start(&world, &datapath, &listeners)?;
    let router = world.router.run(|| Ok(TcpStream::connect_timeout(&world.b.at(PORT), PATIENCE)?))?;
    let client = router.local_addr()?.ip();
    let (_first, peer) = app.accept()?;
    let mut held = Vec::new();
    // What the older one uses itself towards the application: a SYN from there would meet the application's socket.
    let mut chosen = BTreeSet::from([peer.port()]);
    for port in FIRST..FIRST + HELD {
        if !chosen.contains(&port) {
            let (client, server) = connection(&world, &app, (client, port).into(), PATIENCE)?;
            chosen.insert(server.peer_addr()?.port());
            held.push((client, server));
        }
    }
    old.drain()?;

    let _young = Proxy::start(&world, &datapath, &listeners)?;
    // So many that one run in e^25 meets no port of the older one's.
    let enough = (25.0 * CHOICE / f64::from(HELD)) as usize;
    let mut late = None;
    for _ in 0..enough {
        let began = Instant::now();
        let (client, server) = connection(&world, &app, (client, 0).into(), PATIENCE)?;
        converse(&client, &server)?;
        if began.elapsed() > AT_ONCE {
            late = Some(server.peer_addr()?.port());
            break;
        }
    }
    let late = late.context("no port of the older ztunnel's was chosen")?;
    ensure!(!(FIRST..FIRST + HELD).contains(&late), "port {late} is the older one's");
    for (client, server) in &held {
        converse(client, server)?;
    }
    drop(old);
    for (mut client, _) in held {
        client.set_read_timeout(Some(PATIENCE))?;
        ensure!(!matches!(client.read(&mut [0; 1]), Ok(1..)), "it outlives its ztunnel");
    }
    Ok(())
}

/// From the router, in the clear, to the application, from this address.
fn connection(
    world: &World,
    app: &TcpListener,
    from: SocketAddr,
    patience: Duration,
) -> Result<(TcpStream, TcpStream)> {
    let client = world.router.run(|| {
        let socket = Socket::new(Domain::for_address(from), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        socket.connect_timeout(&world.b.at(PORT).into(), patience)?;
        Ok(TcpStream::from(socket))
    })?;
    let (server, peer) = app.accept().with_context(|| format!("the application gets none from {from}"))?;
    ensure!(peer.ip() == from.ip(), "the application sees {peer}");
    Ok((client, server))
}
