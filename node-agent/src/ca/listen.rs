//! TLS for servers of strangers, the CA's for one: the certificate of the moment, and bounds on what they can hold.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::ca::keeper::CurrentWatch;
use crate::ca::lifetime::{Bounds, Lifetime, Requests};

/// Connections at once: the ztunnels of a large cluster, shared by the replicas; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 4096;
/// Of these from one address: a node's ztunnel has one or two.
pub(super) const MAX_CONNECTIONS_OF_PEER: usize = 64;
/// For a whole handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Out of file descriptors: wait for some to come back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// TLS 1.3 with the certificate of the moment, asked for at each handshake.
///
/// # Errors
/// When the TLS library refuses the settings.
pub fn tls_config(certificate: Arc<dyn ResolvesServerCert>) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Connections whose handshake is done, which end by themselves within `bounds`; ends when dropped.
pub fn accept(
    listener: TcpListener,
    config: ServerConfig,
    bounds: Bounds,
) -> impl Stream<Item = io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(1);
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        let closed = sender.clone();
        tokio::select! {
            () = closed.closed() => {}
            () = accept_all(listener, acceptor, bounds, sender) => {}
        }
    });
    ReceiverStream::new(receiver)
}

async fn accept_all(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    bounds: Bounds,
    sender: mpsc::Sender<io::Result<Connection>>,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let peers = Peers::default();
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let Some(place) = peers.seat(peer.ip(), place) else {
                    debug!(%peer, "closed: it has {MAX_CONNECTIONS_OF_PEER} connections already");
                    continue;
                };
                let (acceptor, sender) = (acceptor.clone(), sender.clone());
                handshakes.spawn(async move {
                    match tokio::time::timeout(HANDSHAKE_DEADLINE, acceptor.accept(stream)).await {
                        Ok(Ok(tls)) => {
                            let lifetime = Lifetime::new(bounds);
                            let connection = Connection { tls, peer, lifetime, _place: place };
                            drop(sender.send(Ok(connection)).await);
                        }
                        Ok(Err(error)) => debug!(%peer, %error, "no TLS handshake"),
                        Err(_) => debug!(%peer, "no TLS handshake within the deadline"),
                    }
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The CA's own certificate; no handshake succeeds before there is one.
#[derive(Debug)]
pub struct Own(pub CurrentWatch);

impl std::fmt::Debug for crate::ca::keeper::Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Current").field("authority", &self.authority).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Own {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.borrow().as_ref().map(|current| Arc::clone(&current.serving))
    }
}

/// A TLS connection, with its place among the bounded number of them and its time.
pub struct Connection {
    tls: TlsStream<TcpStream>,
    peer: SocketAddr,
    lifetime: Lifetime,
    _place: Place,
}

/// What each request's extensions say of the connection that it came by.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The client's address.
    pub peer: SocketAddr,
    /// The connection's requests, of which this one is to be.
    pub requests: Requests,
}

/// How many connections each address has.
#[derive(Clone, Default)]
struct Peers(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// A connection's place among all, and among those of its peer.
struct Place {
    peers: Peers,
    peer: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl Peers {
    fn seat(&self, peer: IpAddr, permit: OwnedSemaphorePermit) -> Option<Place> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(peer).or_default();
        if *count >= MAX_CONNECTIONS_OF_PEER {
            return None;
        }
        *count += 1;
        Some(Place { peers: self.clone(), peer, _permit: permit })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.peers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.peer);
            }
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Origin;

    fn connect_info(&self) -> Self::ConnectInfo {
        Origin { peer: self.peer, requests: self.lifetime.requests().clone() }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // HTTP/2 always has a read waiting. The end of the stream is an end that it takes well.
        if self.lifetime.poll_over(context).is_ready() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.tls).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }
}
