//! What one pod may have: more is refused, counted and told, and takes nothing from others.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::world::{CLIENT, SERVER, World, eventually, line};

async fn refused(world: &World, reporter: &str) -> u64 {
    let labels = [reporter, "response_flags=\"POD_LIMIT\""];
    world.metric("istio_tcp_connections_failed_total", &labels).await
}

async fn is_reset(stream: &mut TcpStream) -> bool {
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await;
    read.is_ok_and(|read| read.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset))
}

#[tokio::test]
async fn a_pod_has_no_more_connections_than_its_limit() {
    let world = World::with(&["--max-pod-connections=4"]).await;
    let (_server, _client) = (world.application(SERVER).await, world.application(CLIENT).await);
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        assert!(!line(&mut stream).await.is_empty());
        open.push(stream);
    }
    // The server has a tunnel and three connections in it.
    let mut fourth = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert!(is_reset(&mut fourth).await);
    world.logged(&["direction=\"inbound\"", "POD_LIMIT", "the pod has 4 connections"]).await;
    world.logged(&["direction=\"outbound\"", "503", "the pod has 4 connections"]).await;
    assert_eq!(refused(&world, "reporter=\"destination\"").await, 1);

    // The client has one left.
    let mut own = world.dial(CLIENT, world.vip(CLIENT)).await.unwrap();
    assert!(!line(&mut own).await.is_empty());
    let mut fifth = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert!(is_reset(&mut fifth).await);
    eventually("it is counted", async || refused(&world, "reporter=\"source\"").await == 1).await;
    world.logged(&["direction=\"outbound\"", "POD_LIMIT", "the pod has 4 connections"]).await;

    drop((open.pop(), own));
    eventually("places are given back", async || {
        let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        !line(&mut stream).await.is_empty()
    })
    .await;
}

/// The inbound listener's own port is an application that passes every connection on to itself.
#[tokio::test]
async fn a_loop_ends_at_the_limit_and_leaves_half() {
    let world = World::with(&["--max-pod-connections=8"]).await;
    let mut stream = world.dial(CLIENT, (world.pod_ip(SERVER), 8999).into()).await.unwrap();
    assert!(is_reset(&mut stream).await);
    world.logged(&["POD_LIMIT", "the client is outside the mesh and has 4 connections"]).await;
    assert_eq!(refused(&world, "reporter=\"destination\"").await, 1);
}

#[tokio::test]
async fn strangers_who_never_finish_displace_each_other() {
    let world = World::with(&["--max-pod-handshakes=2"]).await;
    let _application = world.application(SERVER).await;
    let silent = async || {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((world.ip(30), 0).into()).unwrap();
        socket.connect(world.tunnel_address(SERVER)).await.unwrap()
    };
    let mut strangers = Vec::new();
    for _ in 0..5 {
        strangers.push(silent().await);
    }
    for stranger in &mut strangers[..3] {
        let closed = tokio::time::timeout(Duration::from_secs(5), stranger.read(&mut [0; 1])).await;
        assert!(!matches!(closed.expect("closed long before the handshake's deadline"), Ok(1..)));
    }
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert!(!line(&mut stream).await.is_empty(), "a peer gets in");
    eventually("they are counted", async || refused(&world, "reporter=\"destination\"").await == 4).await;
    world.logged(&["POD_LIMIT", "more recent handshakes took its place"]).await;
}

/// A client that has proved who it is need not be allowed anything: its tunnels alone take neither the places of other
/// clients nor those of the pod's own connections.
#[tokio::test]
async fn the_tunnels_of_one_client_leave_room_for_others() {
    let world = World::with(&["--max-pod-connections=16"]).await;
    let _application = world.application(SERVER).await;
    let certificate = world.ca.issue("spiffe://cluster.local/ns/shop/sa/other");
    let tunnel = async || {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((world.ip(30), 0).into()).unwrap();
        let stream = socket.connect(world.tunnel_address(SERVER)).await.unwrap();
        let expected = [SERVER.identity().parse().unwrap()];
        let (mut stream, _) = mesh_core::tls::client::connect(stream, &certificate, &expected).await.unwrap();
        // The client's preface, and SETTINGS without any (RFC 9113 3.4).
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        stream.flush().await.unwrap();
        stream
    };
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(tunnel().await);
    }
    for _ in 0..2 {
        let mut refused = tunnel().await;
        let told = tokio::time::timeout(Duration::from_secs(5), refused.read_to_end(&mut Vec::new())).await;
        let _ended = told.expect("a fifth tunnel is open");
    }
    world.logged(&["direction=\"inbound\"", "POD_LIMIT", "the client has 4 tunnels to the pod"]).await;
    assert_eq!(refused(&world, "reporter=\"destination\"").await, 2);
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert!(!line(&mut stream).await.is_empty(), "another client gets in");
}
