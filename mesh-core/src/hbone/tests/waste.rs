//! Clients whose requests come to nothing by their own doing: so many a client, over all its tunnels.

use super::super::conduct::TOO_MUCH_WASTE;
use super::*;
use crate::allowance::Allowance;
use crate::test_http2::{self as http2, ENHANCE_YOUR_CALM, kind};
use crate::tls::Stream;

const AT_ONCE: u32 = 10;

/// Opens a tunnel and sends all of it in one piece, then a ping.
async fn send(ca: &TestCa, server: &Server, frames: &[Vec<u8>]) -> Stream<TcpStream> {
    let mut tunnel = tls_to(server, &ca.issue(CLIENT)).await;
    let settled = http2::frame(kind::SETTINGS, 1, 0, &[]);
    let ping = http2::frame(kind::PING, 0, 0, &[7; 8]);
    tunnel.write_all(&[http2::preface(&[]), settled, frames.concat(), ping].concat()).await.unwrap();
    tunnel.flush().await.unwrap();
    tunnel
}

/// The next frame of that kind and with that flag.
async fn hear(tunnel: &mut Stream<TcpStream>, kind: u8, flag: u8) -> Vec<u8> {
    loop {
        let (heard, flags, _, payload) = http2::next(tunnel).await.unwrap();
        assert!(heard != kind::GOAWAY || kind == kind::GOAWAY, "sent away too early");
        if (heard, flags & flag) == (kind, flag) {
            return payload;
        }
    }
}

async fn is_sent_away(each: impl Fn(u32) -> Vec<u8>) {
    let ca = TestCa::new();
    let config = server::Config { wasted: Allowance::new(AT_ONCE, 1), ..server::Config::default() };
    let mut server = Server::start(&ca, config, echo).await;
    let some: Vec<_> = (0..AT_ONCE / 2).map(|n| each(2 * n + 1)).collect();
    let mut tunnel = send(&ca, &server, &some).await;
    hear(&mut tunnel, kind::PING, 1).await;
    // All of these are looked at before anything that comes later.
    tunnel.write_all(&http2::frame(kind::PING, 0, 0, &[8; 8])).await.unwrap();
    tunnel.flush().await.unwrap();
    hear(&mut tunnel, kind::PING, 1).await;
    drop(tunnel);
    assert_eq!(server.ends.recv().await.unwrap().unwrap(), Ok(()));
    // What is given back in the seconds of a slow machine is less than this.
    let more: Vec<_> = (0..5 * AT_ONCE).map(|n| each(2 * n + 1)).collect();
    let goaway = hear(&mut send(&ca, &server, &more).await, kind::GOAWAY, 0).await;
    assert_eq!(goaway[4..8], ENHANCE_YOUR_CALM.to_be_bytes());
    assert_eq!(server.ends.recv().await.unwrap().unwrap(), Err(TunnelError::Abuse(TOO_MUCH_WASTE)));
}

#[tokio::test]
async fn requests_that_make_no_sense() {
    is_sent_away(|stream| http2::request(stream, "CONNECT", "nowhere", &[])).await;
}

#[tokio::test]
async fn requests_given_up_before_they_are_looked_at() {
    is_sent_away(|stream| {
        let request = http2::request(stream, "CONNECT", "10.0.0.1:80", &[]);
        let reset = http2::frame(kind::RST_STREAM, 0, stream, &8u32.to_be_bytes());
        [request, reset].concat()
    })
    .await;
}

/// A server that answers requests for one port only, tells of those that it has looked at, and waits for what becomes of
/// the others.
async fn slow_application(ca: &TestCa, given_up: &Allowance) -> (Server, mpsc::UnboundedReceiver<()>) {
    let (sender, seen) = mpsc::unbounded_channel();
    let handler = move |mut incoming: Incoming| {
        let sender = sender.clone();
        async move {
            if incoming.request().authority.port == 8080 {
                return echo(incoming).await;
            }
            sender.send(()).unwrap();
            incoming.abandoned().await;
        }
    };
    let wasted = Allowance::new(AT_ONCE, 1);
    let config = server::Config { wasted, given_up: given_up.clone(), ..server::Config::default() };
    (Server::start(ca, config, handler).await, seen)
}

#[tokio::test]
async fn who_gives_up_what_takes_too_long_is_held_up_and_keeps_its_connections() {
    let ca = Arc::new(TestCa::new());
    let (mut server, mut seen) = slow_application(&ca, &Allowance::new(AT_ONCE, 20)).await;
    let (pool, key) = (pool(&ca), key(server.address));
    let mut open = pool.connect(&key, &request()).await.unwrap().stream;
    let slow = ConnectRequest::new(Authority { port: 1, ..request().authority });
    let begun = std::time::Instant::now();
    for _ in 0..3 * AT_ONCE {
        tokio::select! {
            answered = pool.connect(&key, &slow) => panic!("{answered:?}"),
            looked_at = seen.recv() => looked_at.unwrap(),
        }
        assert_eq!(ask(&mut open, b"x").await.unwrap(), b"x");
    }
    assert!(begun.elapsed() >= Duration::from_millis(900), "{:?}", begun.elapsed());
    assert_eq!(server.tunnels(), 1);
    assert!(server.ends.try_recv().is_err(), "the tunnel has ended");
}

#[tokio::test]
async fn requests_whose_tunnel_has_ended_are_not_given_up() {
    let ca = TestCa::new();
    let given_up = Allowance::new(1, 1);
    let (mut server, mut seen) = slow_application(&ca, &given_up).await;
    let some: Vec<_> = (0..5).map(|n| http2::request(2 * n + 1, "CONNECT", "10.0.0.1:1", &[])).collect();
    let tunnel = send(&ca, &server, &some).await;
    for _ in 0..5 {
        seen.recv().await.unwrap();
    }
    drop(tunnel);
    let _broken = server.ends.recv().await.unwrap().unwrap();
    assert!(given_up.is_whole());
}
