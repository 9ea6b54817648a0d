//! Tunnels: shared, limited, replaced, closed.

use super::*;
use crate::hbone::window::Window;

#[tokio::test]
async fn connections_share_a_tunnel() {
    let ca = Arc::new(TestCa::new());
    let server = Server::echo(&ca).await;
    let pool = pool(&ca);
    let key = key(server.address);
    let (request, other) = (request(), ConnectRequest::new("reviews:9080".parse().unwrap()));
    // The first ones at once: they wait for one dial.
    let first = (0..20).map(|_| pool.connect(&key, &request));
    let mut connected: Vec<_> =
        futures_util::future::join_all(first).await.into_iter().map(|connected| connected.unwrap()).collect();
    connected.push(pool.connect(&key, &other).await.unwrap());
    assert_eq!((server.tunnels(), pool.len()), (1, 1));
    for (i, connected) in connected.iter_mut().enumerate() {
        assert_eq!(connected.peer, key.expected[0]);
        let text = format!("connection {i}");
        assert_eq!(ask(&mut connected.stream, text.as_bytes()).await.unwrap(), text.as_bytes());
    }
}

#[tokio::test]
async fn every_part_of_the_key_separates() {
    let ca = Arc::new(TestCa::new());
    let server = Server::echo(&ca).await;
    let pool = pool(&ca);
    let base = key(server.address);
    let other = CLIENT.parse::<crate::identity::Identity>().unwrap();
    let keys = [
        base.clone(),
        Key { source: SERVER.parse().unwrap(), ..base.clone() },
        Key { source_address: "127.0.0.2".parse().unwrap(), ..base.clone() },
        Key { expected: vec![base.expected[0].clone(), other.clone()], ..base.clone() },
        Key { expected: vec![other, base.expected[0].clone()], ..base.clone() },
        Key { workload_uid: Some("Kubernetes//Pod/a/b".into()), ..base.clone() },
    ];
    for (i, key) in keys.iter().enumerate() {
        for _ in 0..2 {
            pool.connect(key, &request()).await.unwrap();
            assert_eq!(server.tunnels(), i + 1, "{key:?}");
        }
    }
}

#[tokio::test]
async fn dials_another_tunnel_when_one_is_full() {
    let ca = Arc::new(TestCa::new());
    let server = Server::echo(&ca).await;
    let pool = pool_with(&ca, Config { max_streams: 3, ..Config::default() });
    let (key, request) = (key(server.address), request());
    let mut open = Vec::new();
    for (count, tunnels) in [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3)] {
        while open.len() < count {
            open.push(pool.connect(&key, &request).await.unwrap());
        }
        assert_eq!(server.tunnels(), tunnels, "{count} connections");
    }
    // Freed places are taken again.
    open.clear();
    for _ in 0..9 {
        open.push(pool.connect(&key, &request).await.unwrap());
    }
    assert_eq!(server.tunnels(), 3);
}

#[tokio::test]
async fn obeys_the_stream_limit_of_the_peer() {
    let ca = Arc::new(TestCa::new());
    let config = server::Config { max_streams: 2, ..server::Config::default() };
    let server = Server::start(&ca, config, echo).await;
    let pool = pool(&ca);
    let (key, request) = (key(server.address), request());
    let mut open = Vec::new();
    for _ in 0..5 {
        let mut connected = pool.connect(&key, &request).await.unwrap();
        // Also lets the peer's settings arrive.
        ask(&mut connected.stream, b"x").await.unwrap();
        open.push(connected);
    }
    assert_eq!(server.tunnels(), 3);
}

#[tokio::test]
async fn a_draining_peer_is_left_and_open_connections_go_on() {
    let ca = Arc::new(TestCa::new());
    let mut old = Server::echo(&ca).await;
    let pool = pool(&ca);
    let (key, request) = (key(old.address), request());
    let mut open = pool.connect(&key, &request).await.unwrap();
    assert_eq!(ask(&mut open.stream, b"before").await.unwrap(), b"before");
    old.drain.start();
    // The listener still accepts here, so that the pool's next tunnel can be told from the first one.
    while old.tunnels() < 2 {
        let _ = pool.connect(&key, &request).await;
    }
    assert_eq!(ask(&mut open.stream, b"after").await.unwrap(), b"after");
    open.stream.shutdown().await.unwrap();
    assert_eq!(open.stream.read(&mut [0; 1]).await.unwrap(), 0);
    drop(open);
    assert_eq!(old.ends.recv().await.unwrap(), Ok(Ok(())));
}

#[tokio::test]
async fn closing_cuts_what_does_not_end() {
    let ca = Arc::new(TestCa::new());
    let mut server = Server::echo(&ca).await;
    let pool = pool(&ca);
    let mut open = pool.connect(&key(server.address), &request()).await.unwrap();
    let (drain, _) = drain::new();
    let drain = std::mem::replace(&mut server.drain, drain);
    drain.finish(Duration::ZERO).await;
    assert_eq!(server.ends.recv().await.unwrap(), Ok(Ok(())));
    assert!(ask(&mut open.stream, b"x").await.is_err());
}

#[tokio::test]
async fn a_tunnel_that_died_is_replaced() {
    let ca = Arc::new(TestCa::new());
    let first = Server::echo(&ca).await;
    let address = first.address;
    let pool = pool(&ca);
    let mut open = pool.connect(&key(address), &request()).await.unwrap();
    ask(&mut open.stream, b"x").await.unwrap();
    first.task.abort();
    // As a killed proxy: its sockets are closed.
    let error = loop {
        match ask(&mut open.stream, b"x").await {
            Ok(_) => tokio::task::yield_now().await,
            Err(error) => break error,
        }
    };
    assert_ne!(error.kind(), std::io::ErrorKind::TimedOut);
    let pooled = pool.connect(&key(address), &request()).await;
    assert!(matches!(pooled, Err(ConnectError::Dial(DialError::Connect(_)))), "{pooled:?}");
    let second = Server::echo(&ca).await;
    let mut open = pool.connect(&key(second.address), &request()).await.unwrap();
    assert_eq!(ask(&mut open.stream, b"again").await.unwrap(), b"again");
}

#[tokio::test]
async fn a_silent_peer_is_found_dead() {
    let ca = Arc::new(TestCa::new());
    let server = Server::echo(&ca).await;
    let keep_alive = KeepAlive { interval: Duration::from_millis(20), timeout: Duration::from_millis(100) };
    let pool = pool_with(&ca, Config { keep_alive, ..Config::default() });
    // A wire that can be stopped without closing it.
    let wire = Wire::to(server.address).await;
    let mut open = pool.connect(&key(wire.address), &request()).await.unwrap();
    ask(&mut open.stream, b"x").await.unwrap();
    wire.stop();
    assert!(open.stream.read_u8().await.is_err(), "the peer is silent and taken for alive");
}

#[tokio::test]
async fn a_silent_client_is_found_dead() {
    let ca = Arc::new(TestCa::new());
    let keep_alive = KeepAlive { interval: Duration::from_millis(20), timeout: Duration::from_millis(100) };
    let config = server::Config { keep_alive, ..server::Config::default() };
    let mut server = Server::start(&ca, config, echo).await;
    let wire = Wire::to(server.address).await;
    let pool = pool(&ca);
    let mut open = pool.connect(&key(wire.address), &request()).await.unwrap();
    ask(&mut open.stream, b"x").await.unwrap();
    wire.stop();
    assert_eq!(server.ends.recv().await.unwrap(), Ok(Err(TunnelError::Dead(keep_alive.timeout))));
}

#[tokio::test]
async fn an_idle_tunnel_is_closed_and_a_used_one_is_not() {
    let ca = Arc::new(TestCa::new());
    let mut server = Server::echo(&ca).await;
    let pool = pool_with(&ca, Config { idle: Duration::from_millis(40), ..Config::default() });
    let key = key(server.address);
    let mut open = pool.connect(&key, &request()).await.unwrap();
    let used = tokio::time::timeout(Duration::from_millis(200), server.ends.recv()).await;
    assert!(used.is_err(), "a tunnel with a stream on it was closed: {used:?}");
    assert_eq!(ask(&mut open.stream, b"x").await.unwrap(), b"x");
    drop(open);
    assert_eq!(server.ends.recv().await.unwrap(), Ok(Ok(())));
    assert!(pool.is_empty());
}

#[tokio::test]
async fn dropping_the_pool_cuts_its_tunnels() {
    let ca = Arc::new(TestCa::new());
    let mut server = Server::echo(&ca).await;
    let pool = pool(&ca);
    let mut open = pool.connect(&key(server.address), &request()).await.unwrap();
    ask(&mut open.stream, b"x").await.unwrap();
    drop(pool);
    assert!(ask(&mut open.stream, b"x").await.is_err());
    let _cut = server.ends.recv().await.unwrap().unwrap();
}

/// Carries bytes between a client and `address` until it is told to stop, without closing anything.
struct Wire {
    address: SocketAddr,
    stopped: tokio::sync::watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Wire {
    async fn to(address: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = listener.local_addr().unwrap();
        let (stopped, mut stop) = tokio::sync::watch::channel(false);
        let task = tokio::spawn(async move {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = TcpStream::connect(address).await.unwrap();
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                _ = stop.wait_for(|stop| *stop) => {}
            }
            std::future::pending::<()>().await;
        });
        Self { address: own, stopped, task }
    }

    fn stop(&self) {
        self.stopped.send_replace(true);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn a_tunnel_takes_nothing_new_when_its_client_s_certificate_has_expired() {
    let ca = Arc::new(TestCa::new());
    let mut server = Server::echo(&ca).await;
    let certificate = ca.leaf(CLIENT).valid(-3600, 3).issue();
    let stream = TcpStream::connect(server.address).await.unwrap();
    let expected = [SERVER.parse().unwrap()];
    let (tunnel, driver) =
        client::handshake(stream, &certificate, &expected, KeepAlive::default(), Window::default())
            .await
            .unwrap();
    let driver = tokio::spawn(driver);
    let connect = async || tunnel.connect(&request(), tunnel.lease(10).unwrap()).await;
    let mut open = connect().await.unwrap().stream;
    let refused = async {
        while connect().await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), refused).await.expect("it takes new ones");
    assert!(certificate.not_after() <= std::time::SystemTime::now());
    assert_eq!(ask(&mut open, b"x").await.unwrap(), b"x");
    open.shutdown().await.unwrap();
    drop(open);
    assert_eq!(server.ends.recv().await.unwrap().unwrap(), Ok(()));
    driver.await.unwrap();
}
