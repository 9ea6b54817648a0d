//! The one accept loop: every TCP listener of a proxy runs in it. How many connections are too many is the handler's to
//! know, which can say so.
//!
//! **Invariant:** a handler's task never outlives the loop; nothing that a client does ends the loop.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::drain::Watch;

/// After an error that another try at once would only repeat, such as too many open files.
const PAUSE: Duration = Duration::from_millis(50);
/// How often a failure that lasts is told.
const TOLD_EVERY: Duration = Duration::from_secs(30);
/// Handlers are told to close through their own watch; those that do not are ended after this.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// What to do with an accepted connection; it also reports how that went.
pub trait Handler: Clone + Send + Sync + 'static {
    /// Serves one connection until it is over. Dropped half-way only when the drain's deadline has passed.
    fn handle(self, stream: TcpStream, client: SocketAddr) -> impl Future<Output = ()> + Send;
}

impl<F, Served> Handler for F
where
    F: FnOnce(TcpStream, SocketAddr) -> Served + Clone + Send + Sync + 'static,
    Served: Future<Output = ()> + Send,
{
    fn handle(self, stream: TcpStream, client: SocketAddr) -> impl Future<Output = ()> + Send {
        self(stream, client)
    }
}

/// Accepts until `drain` starts, then waits until the connections are over or `drain` says to close.
pub async fn serve(listener: TcpListener, handler: impl Handler, drain: Watch) {
    let mut connections = JoinSet::new();
    let mut told: Option<Instant> = None;
    // Asked once, not for each connection.
    let mut draining = std::pin::pin!(drain.draining());
    loop {
        tokio::select! {
            () = &mut draining => break,
            Some(ended) = connections.join_next() => log_panic(ended),
            accepted = accept(&listener) => match accepted {
                Ok((stream, client)) => {
                    connections.spawn(handler.clone().handle(stream, client));
                }
                Err(error) => {
                    if told.is_none_or(|at| at.elapsed() >= TOLD_EVERY) {
                        tracing::warn!(%error, listener = ?listener.local_addr().ok(), "accept failed");
                        told = Some(Instant::now());
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
    drop(listener);
    let all_over = async {
        while let Some(ended) = connections.join_next().await {
            log_panic(ended);
        }
    };
    let told_to_close = async {
        drain.closing().await;
        tokio::time::sleep(CLOSE_GRACE).await;
    };
    tokio::select! {
        () = all_over => {}
        () = told_to_close => {}
    }
    connections.shutdown().await;
}

async fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    loop {
        match listener.accept().await {
            // The client gave up while it waited in the queue (accept(2)): the next one is waiting.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            accepted => return accepted,
        }
    }
}

fn log_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task failed; please report this with the lines before it");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::drain;

    async fn echo(mut stream: TcpStream, _client: SocketAddr) {
        let (mut reader, mut writer) = stream.split();
        let _ = tokio::io::copy(&mut reader, &mut writer).await;
    }

    async fn listen() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    #[tokio::test]
    async fn finishes_open_connections_and_accepts_no_new_ones_while_draining() {
        let (listener, address) = listen().await;
        let (drain, watch) = drain::new();
        let serving = tokio::spawn(serve(listener, echo, watch));
        let mut open = TcpStream::connect(address).await.unwrap();
        open.write_all(b"a").await.unwrap();
        assert_eq!(open.read_u8().await.unwrap(), b'a');
        drain.start();
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
        open.write_all(b"b").await.unwrap();
        assert_eq!(open.read_u8().await.unwrap(), b'b');
        drop(open);
        assert!(drain.finish(Duration::from_secs(30)).await);
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn ends_handlers_that_do_not_end() {
        let (listener, address) = listen().await;
        let (drain, watch) = drain::new();
        let forever = |_: TcpStream, _: SocketAddr| std::future::pending::<()>();
        let serving = tokio::spawn(serve(listener, forever, watch));
        let mut open = TcpStream::connect(address).await.unwrap();
        drain.finish(Duration::ZERO).await;
        serving.await.unwrap();
        assert_ne!(open.read(&mut [0; 1]).await.unwrap_or(0), 1, "the connection is still open");
    }

    #[tokio::test]
    async fn survives_a_handler_that_panics() {
        let (listener, address) = listen().await;
        let (_drain, watch) = drain::new();
        let calls = Arc::new(AtomicUsize::new(0));
        let handler = {
            let calls = calls.clone();
            move |mut stream: TcpStream, _: SocketAddr| async move {
                assert!(calls.fetch_add(1, Ordering::Relaxed) > 0, "the first one fails on purpose");
                stream.write_all(b"x").await.unwrap();
            }
        };
        let serving = tokio::spawn(serve(listener, handler, watch));
        assert!(TcpStream::connect(address).await.unwrap().read_u8().await.is_err());
        assert_eq!(TcpStream::connect(address).await.unwrap().read_u8().await.unwrap(), b'x');
        serving.abort();
    }
}
