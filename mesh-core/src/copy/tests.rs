use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;

type Copying = JoinHandle<Outcome<&'static str>>;

/// An app on either side of a copy.
struct Path {
    client: DuplexStream,
    server: DuplexStream,
    traffic: Arc<Traffic>,
    cancel: oneshot::Sender<&'static str>,
    copying: Copying,
}

fn path(buffer: usize) -> Path {
    let (client, downstream) = duplex(buffer);
    let (upstream, server) = duplex(buffer);
    let traffic = Arc::new(Traffic::default());
    let (cancel, cancelled) = oneshot::channel();
    let copying = tokio::spawn({
        let traffic = traffic.clone();
        async move { both(downstream, upstream, &*traffic, async { cancelled.await.unwrap() }).await }
    });
    Path { client, server, traffic, cancel, copying }
}

#[tokio::test]
async fn each_direction_ends_on_its_own() {
    let Path { mut client, mut server, traffic, cancel, copying } = path(1024);
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    server.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "question");
    assert!(!copying.is_finished());
    server.write_all(b"answer!").await.unwrap();
    server.shutdown().await.unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "answer!");
    assert!(matches!(copying.await.unwrap(), Outcome::Finished { first: Side::Downstream }));
    assert_eq!((traffic.from(Side::Downstream), traffic.from(Side::Upstream)), (8, 7));
    drop(cancel);
}

#[tokio::test]
async fn says_who_ended_first() {
    let Path { mut client, mut server, copying, cancel, .. } = path(1024);
    server.write_all(b"bye").await.unwrap();
    drop(server);
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "bye");
    drop(client);
    assert!(matches!(copying.await.unwrap(), Outcome::Finished { first: Side::Upstream }));
    drop(cancel);
}

#[tokio::test]
async fn what_the_server_said_before_it_left_arrives() {
    let Path { mut client, mut server, copying, cancel, .. } = path(64);
    // More than all buffers hold: the server leaves without having read it.
    let sending = async {
        while client.write_all(&[0; 1024]).await.is_ok() {}
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        text
    };
    let answering = async {
        server.read_exact(&mut [0; 64]).await.unwrap();
        server.write_all(b"too long").await.unwrap();
        drop(server);
    };
    let (text, ()) = tokio::join!(sending, answering);
    assert_eq!(text, "too long");
    drop(client);
    assert!(matches!(copying.await.unwrap(), Outcome::Finished { first: Side::Upstream }));
    drop(cancel);
}

#[tokio::test]
async fn is_cancelled_with_a_reason_while_idle_or_blocked() {
    for write in [0, 4096] {
        let Path { mut client, server, cancel, copying, .. } = path(64);
        if write > 0 {
            let writing = tokio::spawn(async move { client.write_all(&vec![0; write]).await });
            cancel.send("pod removed").unwrap();
            assert!(matches!(copying.await.unwrap(), Outcome::Cancelled("pod removed")));
            assert!(writing.await.unwrap().is_err());
        } else {
            cancel.send("pod removed").unwrap();
            assert!(matches!(copying.await.unwrap(), Outcome::Cancelled("pod removed")));
        }
        drop(server);
    }
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

#[tokio::test]
async fn a_reset_ends_it_after_what_was_sent_before() {
    let (mut client, downstream) = tcp_pair().await;
    let (upstream, mut server) = tcp_pair().await;
    let traffic = Traffic::default();
    let copying = both(downstream, upstream, &traffic, std::future::pending::<()>());
    let apps = async {
        client.write_all(b"last words").await.unwrap();
        let mut words = [0; 10];
        server.read_exact(&mut words).await.unwrap();
        assert_eq!(&words, b"last words");
        client.set_zero_linger().unwrap();
        drop(client);
        // The server would wait for ever: it has nothing to say, and must not need to.
        assert_eq!(server.read(&mut words).await.unwrap_or(0), 0);
    };
    let (outcome, ()) = tokio::join!(copying, apps);
    assert!(matches!(outcome, Outcome::Broken { side: Side::Downstream, .. }), "{outcome:?}");
}

#[tokio::test]
async fn carries_bulk_unchanged() {
    const SIZE: usize = 24 << 20;
    let (mut client, downstream) = tcp_pair().await;
    let (upstream, server) = tcp_pair().await;
    let traffic = Arc::new(Traffic::default());
    let copying = tokio::spawn({
        let traffic = traffic.clone();
        async move { both(downstream, upstream, &*traffic, std::future::pending::<()>()).await }
    });
    let (mut reading, mut writing) = server.into_split();
    let echo = tokio::spawn(async move { tokio::io::copy(&mut reading, &mut writing).await });
    let sent: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
    let (mut reading, mut writing) = client.split();
    let receive = async {
        let mut received = Vec::with_capacity(SIZE);
        reading.read_to_end(&mut received).await.unwrap();
        received
    };
    let send = async {
        writing.write_all(&sent).await.unwrap();
        writing.shutdown().await.unwrap();
    };
    let (received, ()) = tokio::join!(receive, send);
    assert!(received == sent, "bytes changed on the way");
    assert_eq!(echo.await.unwrap().unwrap(), SIZE as u64);
    assert!(matches!(copying.await.unwrap(), Outcome::Finished { first: Side::Downstream }));
    assert_eq!(traffic.from(Side::Upstream), SIZE as u64);
}

#[tokio::test]
async fn a_reset_that_a_write_finds_is_no_end() {
    let (client, downstream) = tcp_pair().await;
    let (mut client, far) = (client, OnceReset::default());
    client.write_all(b"question").await.unwrap();
    let outcome = both(downstream, far, &Traffic::default(), std::future::pending::<()>()).await;
    assert!(matches!(outcome, Outcome::Broken { side: Side::Upstream, .. }), "{outcome:?}");
}

/// A connection that was reset while nobody looked: the first who writes is told, a reader later sees an end.
#[derive(Default)]
struct OnceReset {
    told: bool,
    reader: Option<std::task::Waker>,
}

impl Carried for OnceReset {}

impl AsyncRead for OnceReset {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.told {
            return Poll::Ready(Ok(()));
        }
        self.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for OnceReset {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        self.told = true;
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
