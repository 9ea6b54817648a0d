//! A real ztunnel on the real datapath: captured pod to captured pod, and a client outside the mesh.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use clap::Parser as _;
use mesh_core::pod_link::Listener;
use mesh_core::proto::pods::{self as wire, Fd};
use mesh_core::proto::security;
use mesh_core::proto::workload::{self, address::Type};
use mesh_core::telemetry::Levels;
use mesh_core::test_ca::TestCa;
use node_agent::datapath::{Datapath, Listeners};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use ztunnel::app::{self, Surroundings};
use ztunnel::config::Config;

use crate::family::over_both;
use crate::world::{PATIENCE, PORT, Pod, World, converse};

#[path = "../../ztunnel/tests/inproc/agent.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod agent;

use agent::{Talk, Xds, address, authorization};

/// A ztunnel that serves both pods.
struct Proxy {
    runtime: Runtime,
    serving: JoinHandle<Result<()>>,
    run_dir: PathBuf,
    xds: Xds,
    _talk: Talk,
}

impl Proxy {
    fn start(world: &World, datapath: &Datapath, listeners: &[Listeners]) -> Result<Self> {
        let run_dir = std::env::temp_dir().join(format!("ambit-proxy-{}", std::process::id()));
        std::fs::create_dir_all(&run_dir)?;
        let status = "127.0.0.1:0";
        let config = Config::try_parse_from([
            "ztunnel".to_owned(),
            "--node-name=node".to_owned(),
            format!("--run-dir={}", run_dir.display()),
            format!("--admin-address={status}"),
            format!("--metrics-address={status}"),
            format!("--readiness-address={status}"),
        ])?;
        let runtime = Runtime::new()?;
        let _inside = runtime.enter();
        let agent = Listener::bind(&run_dir.join("pods.sock"))?;
        let xds = Xds::new();
        xds.put([&world.a, &world.b].map(|pod| address(resource(pod))));
        xds.serve(&run_dir.join("xds.sock"));
        let mut surroundings = Surroundings::real(&config, Levels::fixed("info"))?;
        surroundings.authority = Arc::new(TestCa::new());
        let serving = runtime.spawn(app::run(config, surroundings, std::future::pending()));
        let talk = runtime.block_on(async {
            let (mut talk, _) = Talk::accept(&agent).await;
            talk.welcome_with(Some(datapath.skproxy_map().try_clone_to_owned()?)).await;
            for (pod, listeners) in [&world.a, &world.b].into_iter().zip(listeners) {
                let error = talk.add(describe(pod), descriptors(pod, listeners)?).await;
                ensure!(error.is_empty(), "{error}");
            }
            talk.snapshot_end().await;
            Ok(talk)
        })?;
        Ok(Self { runtime, serving, run_dir, xds, _talk: talk })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.serving.abort();
        // Ends when the last descriptor inside the pods is closed.
        let _ = self.runtime.block_on(&mut self.serving);
        let _ = std::fs::remove_dir_all(&self.run_dir);
    }
}

fn descriptors(pod: &Pod, listeners: &Listeners) -> Result<Vec<(Fd, OwnedFd)>> {
    let sockets = [
        (Fd::OutboundV4, Some(&listeners.outbound_v4)),
        (Fd::InboundV4, Some(&listeners.inbound_v4)),
        (Fd::HboneV4, Some(&listeners.hbone_v4)),
        (Fd::OutboundV6, listeners.outbound_v6.as_ref()),
        (Fd::InboundV6, listeners.inbound_v6.as_ref()),
        (Fd::HboneV6, listeners.hbone_v6.as_ref()),
    ];
    let mut all = vec![(Fd::Netns, pod.netns.descriptor()?)];
    for (name, socket) in sockets {
        if let Some(socket) = socket {
            all.push((name, socket.as_fd().try_clone_to_owned()?));
        }
    }
    Ok(all)
}

fn addresses(pod: &Pod) -> Vec<Vec<u8>> {
    vec![pod.v4.octets().to_vec(), pod.v6.octets().to_vec()]
}

fn describe(pod: &Pod) -> wire::Pod {
    wire::Pod {
        uid: pod.uid.clone(),
        namespace: "shop".to_owned(),
        name: pod.uid.clone(),
        addresses: addresses(pod),
        workload_uid: format!("Kubernetes//Pod/shop/{}", pod.uid),
        trust_domain: "cluster.local".to_owned(),
        ..Default::default()
    }
}

fn resource(pod: &Pod) -> Type {
    Type::Workload(workload::Workload {
        uid: format!("Kubernetes//Pod/shop/{}", pod.uid),
        name: pod.uid.clone(),
        namespace: "shop".to_owned(),
        addresses: addresses(pod),
        tunnel_protocol: workload::TunnelProtocol::Hbone as i32,
        ..Default::default()
    })
}

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
    let mut reset = world.a.dial(world.b.at(PORT + 1), PATIENCE)?;
    reset.set_read_timeout(Some(PATIENCE))?;
    let error = reset.read(&mut [0; 1]).expect_err("nobody listens");
    ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "over HBONE: {error}");
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
