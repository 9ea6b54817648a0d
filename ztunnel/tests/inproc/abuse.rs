//! Floods of HTTP/2 frames that serve nothing: the tunnel is ended, its client is told why, and others are served.

use std::time::Duration;

use mesh_core::test_http2::{self as http2, ATTACKS, ENHANCE_YOUR_CALM, End};
use mesh_core::tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::world::{APP, CLIENT, SERVER, World, eventually, line};

/// TLS to the server's tunnel port from an address of its own, as an identity of the mesh.
pub(crate) async fn stranger(world: &World, address: u8) -> tls::Stream<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((world.ip(address), 0).into()).unwrap();
    let stream = socket.connect(world.tunnel_address(SERVER)).await.unwrap();
    let certificate = world.ca.issue("spiffe://cluster.local/ns/shop/sa/stranger");
    let expected = [SERVER.identity().parse().unwrap()];
    tls::client::connect(stream, &certificate, &expected).await.unwrap().0
}

#[tokio::test]
async fn floods_are_ended_and_told_and_others_are_served() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    let authority = format!("{}:{APP}", world.pod_ip(SERVER));
    let mut open = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut open).await;
    for (attack, address) in ATTACKS.iter().zip(30..) {
        // From an address of its own: the last attacker has to wait.
        let flood = http2::flood(stranger(&world, address).await, attack, &authority, 100_000);
        let end = tokio::time::timeout(Duration::from_secs(20), flood).await.expect(attack.name).unwrap();
        if attack.ends {
            assert_eq!(end, End::GoAway(ENHANCE_YOUR_CALM), "{}", attack.name);
        } else {
            assert_eq!(end, End::Enough, "{}", attack.name);
        }
        open.write_all(b"x").await.unwrap();
        assert_eq!(
            open.read_u8().await.unwrap(),
            b'x',
            "a connection of another client, after {}",
            attack.name
        );
    }
    for cause in ["too many frames that carry nothing", "more resets, refused streams"] {
        world.logged(&["direction=\"inbound\"", "ABUSE", cause]).await;
    }
    let labels = ["reporter=\"destination\"", "response_flags=\"ABUSE\""];
    let ended = ATTACKS.iter().filter(|attack| attack.ends).count() as u64;
    eventually("each that was ended is counted", async || {
        world.metric("istio_tcp_connections_failed_total", &labels).await == ended
    })
    .await;
}
