//! What one stream may hold follows what its owner says.

use futures_util::future::poll_fn;
use tokio::sync::watch;

use super::*;
use crate::hbone::window::Window;

/// A server whose streams are accepted and never read, and a client's end in bare HTTP/2.
struct Stalled {
    bytes: watch::Sender<u32>,
    requests: h2::client::SendRequest<bytes::Bytes>,
    _server: Server,
    _driver: JoinHandle<()>,
}

impl Stalled {
    async fn new(bytes: u32) -> Self {
        let ca = TestCa::new();
        let (bytes, window) = watch::channel(bytes);
        let config = server::Config { window: Window::following(window), ..server::Config::default() };
        let handler = |incoming: Incoming| async move {
            let _open = incoming.accept(&Baggage::default());
            std::future::pending().await
        };
        let server = Server::start(&ca, config, handler).await;
        let stream = tls_to(&server, &ca.issue(CLIENT)).await;
        let (requests, connection) = h2::client::handshake(stream).await.unwrap();
        let driver = tokio::spawn(async move {
            let _ = connection.await;
        });
        Self { bytes, requests, _server: server, _driver: driver }
    }

    /// A stream that would send more than any window.
    async fn stream(&mut self) -> h2::SendStream<bytes::Bytes> {
        let request = http::Request::connect("10.2.0.9:8080").body(()).unwrap();
        let mut requests = self.requests.clone().ready().await.unwrap();
        let (answer, mut send) = requests.send_request(request, false).unwrap();
        assert_eq!(answer.await.unwrap().status(), StatusCode::OK);
        send.reserve_capacity(4 << 20);
        send
    }
}

/// Waits until the stream may send exactly this much.
async fn may_send(stream: &mut h2::SendStream<bytes::Bytes>, bytes: usize) {
    let reached = async {
        while stream.capacity() != bytes {
            poll_fn(|cx| stream.poll_capacity(cx)).await.unwrap().unwrap();
        }
    };
    let reached = tokio::time::timeout(Duration::from_secs(10), reached).await.is_ok();
    assert!(reached, "may send {} instead of {bytes}", stream.capacity());
}

#[tokio::test]
async fn a_stream_that_nobody_reads_holds_no_more_than_its_window() {
    let mut stalled = Stalled::new(64 << 10).await;
    let mut stream = stalled.stream().await;
    may_send(&mut stream, 64 << 10).await;
    stalled.bytes.send_replace(256 << 10);
    may_send(&mut stream, 256 << 10).await;
    stalled.bytes.send_replace(32 << 10);
    // The change is on its way; streams that are opened before it has come still get the old window.
    let small = async {
        loop {
            let mut later = stalled.stream().await;
            poll_fn(|cx| later.poll_capacity(cx)).await.unwrap().unwrap();
            if later.capacity() == 32 << 10 {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), small).await.expect("new streams get the smaller window");
}

#[tokio::test]
async fn a_window_stays_within_its_bounds() {
    let (bytes, window) = watch::channel(0);
    let window = Window::following(window);
    assert_eq!(window.now(), crate::hbone::window::SMALLEST);
    bytes.send_replace(u32::MAX);
    assert_eq!(window.now(), crate::hbone::window::LARGEST);
}
