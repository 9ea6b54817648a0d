//! Bytes: unchanged, in both directions, whatever their size and whoever is slow.

use super::*;
use crate::hbone::window::{LARGEST, SMALLEST, Window};

/// Each stream of the server has this.
fn with_window(bytes: u32) -> server::Config {
    let (_, window) = tokio::sync::watch::channel(bytes);
    server::Config { window: Window::following(window), ..server::Config::default() }
}

#[tokio::test]
async fn each_direction_ends_on_its_own() {
    let ca = Arc::new(TestCa::new());
    let handler = |incoming: Incoming| async move {
        let mut stream = incoming.accept(&Baggage::default()).unwrap();
        if stream.read_u8().await.unwrap() == b'c' {
            // The client ends first: what it said is answered after its end.
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            stream.write_all(text.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
        } else {
            // The server ends first: it still hears the client.
            stream.write_all(b"no more").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "but I have");
        }
    };
    let server = Server::start(&ca, server::Config::default(), handler).await;
    let pool = pool(&ca);
    let key = key(server.address);

    let mut stream = pool.connect(&key, &request()).await.unwrap().stream;
    stream.write_all(b"client first").await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(stream.write_all(b"x").await.is_err(), "written after the end");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "lient first");

    let mut stream = pool.connect(&key, &request()).await.unwrap().stream;
    stream.write_all(b"server first").await.unwrap();
    stream.flush().await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "no more");
    stream.write_all(b"but I have").await.unwrap();
    stream.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_dropped_stream_reads_as_a_reset_and_cannot_be_written() {
    let ca = Arc::new(TestCa::new());
    let (sender, mut results) = mpsc::unbounded_channel();
    let handler = move |incoming: Incoming| {
        let sender = sender.clone();
        async move {
            let mut stream = incoming.accept(&Baggage::default()).unwrap();
            let byte = stream.read_u8().await.unwrap();
            stream.write_u8(byte).await.unwrap();
            stream.flush().await.unwrap();
            let read = stream.read(&mut [0; 1]).await.map_err(|error| error.kind());
            let _ = stream.write_all(b"x").await;
            let written = stream.flush().await.map_err(|error| error.kind());
            sender.send((read, written)).unwrap();
        }
    };
    let server = Server::start(&ca, server::Config::default(), handler).await;
    let pool = pool(&ca);
    let mut stream = pool.connect(&key(server.address), &request()).await.unwrap().stream;
    assert_eq!(ask(&mut stream, b"?").await.unwrap(), b"?");
    drop(stream);
    let kinds = (Err(std::io::ErrorKind::ConnectionReset), Err(std::io::ErrorKind::BrokenPipe));
    assert_eq!(results.recv().await.unwrap(), kinds);
    // Also when one direction has ended properly.
    let mut stream = pool.connect(&key(server.address), &request()).await.unwrap().stream;
    assert_eq!(ask(&mut stream, b"?").await.unwrap(), b"?");
    stream.abort();
    assert_eq!(results.recv().await.unwrap(), kinds);
    // Policy's reset reads as such from either side.
    let mut stream = pool.connect(&key(server.address), &request()).await.unwrap().stream;
    assert_eq!(ask(&mut stream, b"?").await.unwrap(), b"?");
    stream.deny();
    let denied = std::io::ErrorKind::PermissionDenied;
    assert_eq!(results.recv().await.unwrap(), (Err(denied), Err(denied)));
}

/// Sends `size` bytes in pieces of `piece`, flushing each, and compares what comes back.
async fn round_trip(stream: HboneStream, size: usize, piece: usize) {
    let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sending = async {
        for piece in sent.chunks(piece) {
            writer.write_all(piece).await.unwrap();
            writer.flush().await.unwrap();
        }
        writer.shutdown().await.unwrap();
    };
    let receiving = async {
        let mut received = Vec::with_capacity(size);
        reader.read_to_end(&mut received).await.unwrap();
        received
    };
    let ((), received) = tokio::join!(sending, receiving);
    assert_eq!(received.len(), size);
    assert!(received == sent, "bytes changed on the way");
}

#[tokio::test]
async fn bulk_is_unchanged() {
    let ca = Arc::new(TestCa::new());
    let server = Server::echo(&ca).await;
    let pool = pool(&ca);
    let key = key(server.address);
    let mut transfers = JoinSet::new();
    for piece in [1 << 20, 65_537, 10_000] {
        let stream = pool.connect(&key, &request()).await.unwrap().stream;
        transfers.spawn(round_trip(stream, 16 << 20, piece));
    }
    while let Some(done) = transfers.join_next().await {
        done.unwrap();
    }
    assert_eq!(server.tunnels(), 1);
}

#[tokio::test]
async fn a_flood_of_tiny_writes_does_not_end_the_tunnel() {
    let ca = Arc::new(TestCa::new());
    // Many times the frames that h2's budget allows to lie unread.
    for (window, bytes) in [(LARGEST, 300_000), (SMALLEST, 100_000)] {
        let server = Server::start(&ca, with_window(window), echo).await;
        let pool = pool(&ca);
        let key = key(server.address);
        let stream = pool.connect(&key, &request()).await.unwrap().stream;
        round_trip(stream, bytes, 1).await;
        let mut stream = pool.connect(&key, &request()).await.unwrap().stream;
        assert_eq!(ask(&mut stream, b"x").await.unwrap(), b"x");
        assert_eq!(server.tunnels(), 1);
    }
}

/// Nor does a burst before anybody has come to take it.
#[tokio::test]
async fn a_burst_of_tiny_writes_may_wait_for_its_reader() {
    let ca = Arc::new(TestCa::new());
    let reading = Arc::new(tokio::sync::Notify::new());
    let waiting = reading.clone();
    let handler = move |incoming: Incoming| {
        let waiting = waiting.clone();
        async move {
            if incoming.request().authority.port == 1 {
                let mut stream = incoming.accept(&Baggage::default()).unwrap();
                waiting.notified().await;
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(&all).await.unwrap();
                return stream.shutdown().await.unwrap();
            }
            echo(incoming).await;
        }
    };
    let server = Server::start(&ca, with_window(SMALLEST), handler).await;
    let (pool, key) = (pool(&ca), key(server.address));
    let other = ConnectRequest::new("10.2.0.9:1".parse().unwrap());
    let mut burst = pool.connect(&key, &other).await.unwrap().stream;
    let sent = vec![7; 3000];
    for byte in &sent {
        burst.write_all(&[*byte]).await.unwrap();
        burst.flush().await.unwrap();
    }
    burst.shutdown().await.unwrap();
    // All of it has come when this is answered.
    let mut stream = pool.connect(&key, &request()).await.unwrap().stream;
    assert_eq!(ask(&mut stream, b"x").await.unwrap(), b"x");
    reading.notify_one();
    let mut received = Vec::new();
    burst.read_to_end(&mut received).await.unwrap();
    assert!(received == sent);
    assert_eq!(server.tunnels(), 1);
}

/// To an application that reads a byte and then nothing.
async fn carry_nowhere(incoming: Incoming) {
    let stream = incoming.accept(&Baggage::default()).unwrap();
    let (near, _application) = tokio::io::duplex(1);
    let never = std::future::pending::<()>();
    crate::copy::both(stream, near, &crate::copy::Traffic::default(), never).await;
}

#[tokio::test]
async fn tiny_frames_that_nobody_reads_do_not_end_the_tunnel() {
    let ca = Arc::new(TestCa::new());
    let handler = |incoming: Incoming| async move {
        match incoming.request().authority.port {
            8080 => echo(incoming).await,
            _ => carry_nowhere(incoming).await,
        }
    };
    for window in [LARGEST, SMALLEST] {
        let server = Server::start(&ca, with_window(window), handler).await;
        let (pool, key) = (pool(&ca), key(server.address));
        let other = ConnectRequest::new("10.2.0.9:1".parse().unwrap());
        let mut unread = pool.connect(&key, &other).await.unwrap().stream;
        let written = Arc::new(AtomicUsize::new(0));
        let flood = tokio::spawn({
            let written = written.clone();
            async move {
                while unread.write_all(b"x").await.is_ok() && unread.flush().await.is_ok() {
                    written.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        // All that the window of one stream allows.
        while written.load(Ordering::SeqCst) < window as usize {
            assert!(!flood.is_finished(), "the tunnel broke after {written:?} frames");
            tokio::task::yield_now().await;
        }
        let mut stream = pool.connect(&key, &request()).await.unwrap().stream;
        assert_eq!(ask(&mut stream, b"x").await.unwrap(), b"x");
        assert!(!flood.is_finished(), "the tunnel broke after {written:?} frames");
        assert_eq!(server.tunnels(), 1);
        flood.abort();
    }
}

#[tokio::test]
async fn slow_readers_hold_up_nobody_else() {
    let ca = Arc::new(TestCa::new());
    let handler = |incoming: Incoming| async move {
        match incoming.request().authority.port {
            8080 => echo(incoming).await,
            _ => {
                let _unread = incoming.accept(&Baggage::default()).unwrap();
                std::future::pending().await
            }
        }
    };
    let server = Server::start(&ca, server::Config::default(), handler).await;
    let pool = pool(&ca);
    let key = key(server.address);
    let other = ConnectRequest::new("10.2.0.9:1".parse().unwrap());
    let mut blocked = JoinSet::new();
    for _ in 0..20 {
        let mut stream = pool.connect(&key, &other).await.unwrap().stream;
        blocked.spawn(async move { stream.write_all(&vec![7; 8 << 20]).await });
    }
    let stream = pool.connect(&key, &request()).await.unwrap().stream;
    let transfer = tokio::time::timeout(Duration::from_secs(30), round_trip(stream, 8 << 20, 100_000));
    transfer.await.expect("held up by readers of other streams");
    assert_eq!((server.tunnels(), blocked.len()), (1, 20));
    assert!(blocked.try_join_next().is_none(), "a writer was not held back by a reader that does not read");
}
