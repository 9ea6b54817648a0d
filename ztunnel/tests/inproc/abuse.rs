//! Floods of HTTP/2 frames that serve nothing: the tunnel is ended, its client is told why, and others are served.

use std::time::{Duration, Instant};

use mesh_core::test_http2::{self as http2, ATTACKS, Attack, DENIED, ENHANCE_YOUR_CALM, End, STALLED};
use mesh_core::tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::policy::{denies, is_subject, subject};
use crate::world::{APP, CLIENT, SERVER, World, eventually, line};

const STRANGER: &str = "spiffe://cluster.local/ns/shop/sa/stranger";

/// TLS to the server's tunnel port from an address of its own, as an identity of the mesh.
pub(crate) async fn stranger(world: &World, address: u8) -> tls::Stream<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((world.ip(address), 0).into()).unwrap();
    let stream = socket.connect(world.tunnel_address(SERVER)).await.unwrap();
    let certificate = world.ca.issue(STRANGER);
    let expected = [SERVER.identity().parse().unwrap()];
    tls::client::connect(stream, &certificate, &expected).await.unwrap().0
}

/// Sends bytes to and fro without end, each within a deadline.
async fn is_served(open: &mut TcpStream, meanwhile: &str) {
    let mut each = tokio::time::interval(Duration::from_millis(5));
    loop {
        each.tick().await;
        let answered = async {
            open.write_all(b"x").await.unwrap();
            open.read_u8().await.unwrap()
        };
        let answered = tokio::time::timeout(Duration::from_secs(2), answered).await;
        assert_eq!(answered.ok(), Some(b'x'), "a connection of another client, during {meanwhile}");
    }
}

#[tokio::test]
async fn floods_are_ended_and_told_and_others_are_served() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    let authority = format!("{}:{APP}", world.pod_ip(SERVER));
    let mut open = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut open).await;
    for (attack, address) in ATTACKS.iter().zip(30..) {
        // Those that are not ended are slowed down, beyond what may be at once.
        let times = match attack {
            Attack { ends: true, .. } => 100_000,
            Attack { patient: true, .. } => 1_500,
            _ => 40_000,
        };
        // From an address of its own: the last attacker has to wait.
        let flood = http2::flood(stranger(&world, address).await, attack, &authority, times);
        let begun = Instant::now();
        let end = tokio::select! {
            end = tokio::time::timeout(Duration::from_secs(20), flood) => end.expect(attack.name).unwrap(),
            () = is_served(&mut open, attack.name) => unreachable!(),
        };
        if attack.ends {
            assert_eq!(end, End::GoAway(ENHANCE_YOUR_CALM), "{}", attack.name);
        } else {
            assert_eq!(end, End::Enough, "{}", attack.name);
        }
        let at_least =
            if attack.patient && !attack.ends { Duration::from_millis(500) } else { Duration::ZERO };
        assert!(begun.elapsed() >= at_least, "{}", attack.name);
    }
    let stalled = http2::flood(stranger(&world, 60).await, &STALLED, &authority, u32::MAX);
    let end = tokio::select! {
        end = stalled => panic!("{end:?}"),
        served = tokio::time::timeout(Duration::from_secs(1), is_served(&mut open, STALLED.name)) => served,
    };
    assert!(end.is_err());
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

/// Each of them waits for its answer; the tunnel goes on, and so does everybody else's.
#[tokio::test]
async fn who_is_denied_much_waits_for_it() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    let policy = "shop/no-stranger";
    world.xds.put([denies(policy, STRANGER), subject(&world, &[policy])]);
    is_subject(&world, policy).await;
    let authority = format!("{}:{APP}", world.pod_ip(SERVER));
    let mut open = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut open).await;
    let denied = async || {
        let labels = ["reporter=\"destination\"", "response_flags=\"DENY\""];
        world.metric("istio_tcp_connections_failed_total", &labels).await
    };
    let begun = Instant::now();
    let flood = http2::flood(stranger(&world, 30).await, &DENIED, &authority, 1_700);
    let end = tokio::select! {
        end = flood => end.unwrap(),
        () = is_served(&mut open, DENIED.name) => unreachable!(),
    };
    assert_eq!(end, End::Enough);
    // 200 of them are not answered yet, and 1,000 are at once.
    assert!(begun.elapsed() >= Duration::from_millis(900), "{:?}", begun.elapsed());
    assert!(denied().await >= 1_500, "each is counted");
}
