//! A real ztunnel on the real datapath: captured pod to captured pod, and a client outside the mesh.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};

use anyhow::{Context as _, Result, ensure};
use mesh_core::proto::security;

use crate::family::over_both;
use crate::proxy::Proxy;
use crate::proxy::agent::authorization;
use crate::world::{PATIENCE, PORT, World, converse};

/// One connection of the application: who it sees, and a word each way.
fn answers(listener: &std::net::TcpListener, mut client: TcpStream) -> Result<IpAddr> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.write_all(b"word")?;
    let (mut server, peer) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    let mut word = [0; 4];
    server.read_exact(&mut word).context("the application gets nothing")?;
    server.write_all(&word)?;
    client.read_exact(&mut word).context("the client gets no answer")?;
    ensure!((10_000..32_768).contains(&peer.port()), "the application's peer has port {}", peer.port());
    Ok(peer.ip())
}

/// The client's address reaches the application over HBONE and in the clear, and a closed port is refused.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn ztunnel_carries_connections_with_the_clients_address() -> Result<()> {
    over_both(clients_addresses)
}

fn clients_addresses(world: &World) -> Result<()> {
    let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    let _proxy = Proxy::start(world, &datapath, &listeners)?;
    let app = world.b.serve()?;
    for _ in 0..10 {
        let seen = answers(&app, world.a.dial(world.b.at(PORT), PATIENCE)?)?;
        ensure!(seen == world.a.address, "over HBONE the application sees {seen}");
    }
    let outside = world.router.run(|| Ok(TcpStream::connect_timeout(&world.b.at(PORT), PATIENCE)?))?;
    let own = outside.local_addr()?.ip();
    let seen = answers(&app, outside)?;
    ensure!(seen == own, "in the clear the application sees {seen} instead of {own}");
    // The reset may be there before connect() returns.
    let closed = world.a.dial(world.b.at(PORT + 1), PATIENCE).and_then(|mut reset| {
        reset.set_read_timeout(Some(PATIENCE))?;
        Ok(reset.read(&mut [0; 1])?)
    });
    let error = closed.expect_err("nobody listens");
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    ensure!(kind == Some(std::io::ErrorKind::ConnectionReset), "over HBONE: {error:#}");
    let refused = world.router.run(|| Ok(TcpStream::connect_timeout(&world.b.at(PORT + 1), PATIENCE)?));
    let error = refused.expect_err("nobody listens");
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    ensure!(kind == Some(std::io::ErrorKind::ConnectionRefused), "in the clear: {error:#}");
    Ok(())
}

/// Nobody may come but by mutual TLS: what comes in the clear is reset, a connection that is open already, too.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn plaintext_is_reset_once_policy_denies_it() -> Result<()> {
    over_both(plaintext_denied)
}

fn plaintext_denied(world: &World) -> Result<()> {
    let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    let proxy = Proxy::start(world, &datapath, &listeners)?;
    let app = world.b.serve()?;
    let outside = || world.router.run(|| Ok(TcpStream::connect_timeout(&world.b.at(PORT), PATIENCE)?));
    let plain = (outside()?, app.accept()?.0);
    let tunnelled = (world.a.dial(world.b.at(PORT), PATIENCE)?, app.accept()?.0);
    for (client, server) in [&plain, &tunnelled] {
        converse(client, server)?;
    }
    let anyone = security::string_match::MatchType::Presence(security::Presence {});
    let plaintext = security::Match {
        not_principals: vec![security::StringMatch { match_type: Some(anyone) }],
        ..Default::default()
    };
    proxy.xds.put([authorization(&security::Authorization {
        name: "strict".to_owned(),
        namespace: "shop".to_owned(),
        scope: security::Scope::Namespace.into(),
        action: security::Action::Deny.into(),
        rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![plaintext] }] }],
        ..Default::default()
    })]);
    let reset = |mut stream: &TcpStream| -> Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let error = stream.read(&mut [0; 1]).err().context("it goes on")?;
        ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "not reset: {error}");
        Ok(())
    };
    reset(&plain.0)?;
    reset(&plain.1)?;
    // It may come as soon as the handshake is done, before connect() has looked.
    match outside() {
        Ok(stream) => reset(&stream)?,
        Err(error) => {
            let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            ensure!(kind == Some(std::io::ErrorKind::ConnectionReset), "not reset: {error}");
        }
    }
    converse(&tunnelled.0, &tunnelled.1)?;
    answers(&app, world.a.dial(world.b.at(PORT), PATIENCE)?).map(drop)
}
