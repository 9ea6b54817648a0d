//! Two pods of one node: connected in this process, without a tunnel, and with all that a tunnel's end would check.

use std::net::IpAddr;

use mesh_core::proto::workload::{Workload, address::Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::account;
use crate::agent::address;
use crate::policy;
use crate::world::{CLIENT, SERVER, TestPod, World, eventually, line};

/// A pod as the mesh tells of it on its own node; `shortcut` where no network policy has a say.
fn on_node(world: &World, pod: TestPod, node: &str, shortcut: bool) -> mesh_core::proto::discovery::Resource {
    let Type::Workload(workload) = world.workload(pod) else { unreachable!() };
    address(Type::Workload(Workload { node: node.into(), shortcut, ..workload }))
}

pub(crate) async fn near_with(arguments: &[&str]) -> World {
    let world = World::with(arguments).await;
    tell(&world, [("node-1", true), ("node-1", true)]).await;
    world
}

/// Tells where client and server are, and waits until it is known.
pub(crate) async fn tell(world: &World, places: [(&str, bool); 2]) {
    for (pod, (node, shortcut)) in [CLIENT, SERVER].into_iter().zip(places) {
        world.xds.put([on_node(world, pod, node, shortcut)]);
    }
    eventually("ztunnel knows of it", async || {
        let dump = world.dump().await;
        let known = |pod: TestPod, (node, shortcut): (&str, bool)| {
            let workloads = dump["workloads"].as_array().unwrap().iter();
            workloads.into_iter().any(|workload| {
                workload["name"] == pod.name && workload["node"] == node && workload["shortcut"] == shortcut
            })
        };
        known(CLIENT, places[0]) && known(SERVER, places[1])
    })
    .await;
}

/// Connections that were opened, by what secures them.
async fn opened(world: &World, security: &str) -> u64 {
    let label = format!("connection_security_policy=\"{security}\"");
    world.metric("istio_tcp_connections_opened_total", &[&label]).await
}

async fn echoes(stream: &mut TcpStream) -> bool {
    stream.write_all(b"?").await.is_ok() && stream.read_u8().await.is_ok_and(|byte| byte == b'?')
}

#[tokio::test]
async fn no_tunnel_and_all_that_is_told_of_one() {
    let world = near_with(&[]).await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert_eq!(line(&mut stream).await, world.pod_ip(CLIENT).to_string(), "the client's address is kept");
    assert_eq!(world.dump().await["connections"].as_array().unwrap().len(), 2, "both sides have theirs");
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut echo = Vec::new();
    stream.read_to_end(&mut echo).await.unwrap();
    assert_eq!(echo, b"hello", "half-closed, the application answers");
    account::of_one(&world, "none", 5, "dst.addr").await;
    assert_eq!(opened(&world, "mutual_tls").await, 0);
}

#[tokio::test]
async fn a_tunnel_where_a_network_policy_may_have_a_say() {
    let world = near_with(&[]).await;
    let _application = world.application(SERVER).await;
    for (places, expected) in [
        ([("node-1", false), ("node-1", true)], 2),
        ([("node-1", true), ("node-1", false)], 4),
        ([("node-1", true), ("node-2", true)], 6),
    ] {
        tell(&world, places).await;
        let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        line(&mut stream).await;
        assert_eq!((opened(&world, "mutual_tls").await, opened(&world, "none").await), (expected, 0));
    }
}

#[tokio::test]
async fn a_tunnel_where_the_settings_want_one() {
    let world = near_with(&["--same-node-mtls"]).await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    assert_eq!((opened(&world, "mutual_tls").await, opened(&world, "none").await), (2, 0));
}

#[tokio::test]
async fn a_pod_that_another_process_serves_is_no_neighbour() {
    let world = World::without_mesh().await;
    let told = [CLIENT, SERVER].map(|pod| on_node(&world, pod, "node-1", true));
    world.xds.put(told.into_iter().chain([address(world.service(SERVER))]));
    let world = world.with_pods(&[CLIENT]).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    stream.read(&mut [0; 1]).await.unwrap_err();
    world.logged(&["connection failed", &format!("dst.addr={}", world.tunnel_address(SERVER))]).await;
}

/// What the mesh says of the server is not what this process serves: a tunnel would end at somebody else.
#[tokio::test]
async fn a_pod_that_is_not_as_the_mesh_knows_it_is_no_neighbour() {
    for (service_account, last) in [("other", SERVER.last), (SERVER.name, SERVER.last + 1)] {
        let world = World::without_mesh().await;
        let Type::Workload(server) = world.workload(SERVER) else { unreachable!() };
        let IpAddr::V4(ip) = world.ip(last) else { unreachable!() };
        let server = Workload {
            service_account: service_account.into(),
            addresses: vec![ip.octets().to_vec()],
            node: "node-1".into(),
            shortcut: true,
            ..server
        };
        let told = [on_node(&world, CLIENT, "node-1", true), address(Type::Workload(server))];
        world.xds.put(told.into_iter().chain([address(world.service(SERVER))]));
        let world = world.with_pods(&[CLIENT, SERVER]).await;
        let _application = world.application(SERVER).await;
        let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        stream.read(&mut [0; 1]).await.unwrap_err();
        let meant = format!("dst.addr={ip}:15008");
        world.logged(&["connection failed", "direction=\"outbound\"", &meant]).await;
        assert_eq!(opened(&world, "none").await, 0);
    }
}

#[tokio::test]
async fn a_removed_pod_ends_its_neighbours_connections() {
    for gone in [SERVER, CLIENT] {
        let mut world = near_with(&[]).await;
        let _application = world.application(SERVER).await;
        let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        line(&mut stream).await;
        let mut talk = world.talk.take().unwrap();
        assert_eq!(talk.remove(&gone.uid()).await, "");
        assert!(!echoes(&mut stream).await, "{} is gone", gone.name);
        let cut = ["response_flags=\"CUT\"", "connection_security_policy=\"none\""];
        eventually("both sides tell of it", async || {
            world.metric("istio_tcp_connections_failed_total", &cut).await == 2
        })
        .await;
    }
}

#[tokio::test]
async fn a_connection_goes_on_while_ztunnel_drains() {
    let mut world = near_with(&[]).await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    let mut talk = world.talk.take().unwrap();
    world.shutdown.take().unwrap().send("SIGTERM").unwrap();
    talk.draining().await;
    assert!(echoes(&mut stream).await);
    drop(stream);
    let ended = tokio::time::timeout(std::time::Duration::from_secs(10), &mut world.ztunnel).await;
    ended.expect("waits although nothing is open").unwrap().unwrap();
}

#[tokio::test]
async fn policy_and_limits_are_asked() {
    let world = near_with(&["--max-pod-connections=2"]).await;
    let _application = world.application(SERVER).await;
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        line(&mut stream).await;
        open.push(stream);
    }
    let mut third = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    third.read(&mut [0; 1]).await.unwrap_err();
    world.logged(&["direction=\"outbound\"", "POD_LIMIT"]).await;

    // A policy that denies the client ends what is open and refuses what comes.
    let Type::Workload(server) = world.workload(SERVER) else { unreachable!() };
    let authorization_policies = vec!["shop/no-client".to_owned()];
    let server = Workload { node: "node-1".into(), shortcut: true, authorization_policies, ..server };
    world.xds.put([policy::no_client("shop/no-client"), address(Type::Workload(server))]);
    for stream in &mut open {
        let closed = tokio::time::timeout(std::time::Duration::from_secs(10), stream.read(&mut [0; 1])).await;
        closed.expect("still open").unwrap_err();
    }
    let denied = async |reporter: &str| {
        world.metric("istio_tcp_connections_failed_total", &[reporter, "response_flags=\"DENY\""]).await
    };
    eventually("both sides tell of it", async || {
        denied("reporter=\"source\"").await == 2 && denied("reporter=\"destination\"").await == 2
    })
    .await;
    let mut refused = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    refused.read(&mut [0; 1]).await.unwrap_err();
    eventually("both sides tell of it", async || {
        denied("reporter=\"source\"").await == 3 && denied("reporter=\"destination\"").await == 3
    })
    .await;
    world.logged(&["direction=\"inbound\"", "shop/no-client", "DENY"]).await;
}
