//! The dialling end of a tunnel: one connection to a peer that has proved who it is, and streams on it.
//!
//! **Invariant:** a [`Tunnel`] exists only after the peer's identity was verified, so whatever is sent on it goes to
//! one of the identities that the caller expects.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite};

use super::conduct::{Conduct, Watched};
use super::frames::Frames;
use super::request::{Baggage, ConnectRequest, MAX_POLICY, MAX_REASON, POLICY, REASON, text_of};
use super::settings::{self, Dead, HANDSHAKE_TIMEOUT, KeepAlive};
use super::stream::HboneStream;
use super::window::{Resizing, Window};
use crate::allowance::Allowance;
use crate::certs::{CertError, WorkloadCert};
use crate::identity::Identity;
use crate::tls::revocation::{self, Presented};
use crate::tls::{self, TlsError};

/// Time for the server's answer to CONNECT. It has 10 s to connect to the app, and Istio's waits 5 s for the workload.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Why there is no tunnel to the peer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DialError {
    /// We have nothing to present.
    #[error(transparent)]
    Certificate(#[from] CertError),
    /// No TCP connection.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// No TCP connection in time; a NetworkPolicy that does not allow the tunnel's port looks like this.
    #[error("no TCP connection within {0:?} (does a NetworkPolicy allow port 15008?)")]
    ConnectTimeout(Duration),
    /// One side does not believe the other, or does not speak TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// TLS works, HTTP/2 does not.
    #[error("the peer does not speak HTTP/2: {0}")]
    Http2(String),
}

/// Why a connection was not tunnelled.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no tunnel.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The peer answers with another status than 200.
    #[error("the peer answers {status}{}", because(reason.as_deref()))]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// What the peer says about it.
        reason: Option<String>,
        /// The policy for which it refuses, `<namespace>/<name>`, as it says.
        policy: Option<String>,
    },
    /// The request cannot be sent.
    #[error("the request cannot be written: {0}")]
    Request(String),
    /// The peer goes away or is full; it has not looked at the request.
    #[error("the peer takes no new connections on this tunnel: {0}")]
    NotTaken(String),
    /// The tunnel broke before the answer.
    #[error("the tunnel broke: {0}")]
    Broken(String),
    /// The peer refused our certificate after our own handshake was done, or TLS broke otherwise.
    #[error("the tunnel broke: {0}")]
    Tls(TlsError),
    /// No answer in time.
    #[error("the peer does not answer the request within {ANSWER_TIMEOUT:?}")]
    Timeout,
}

fn because(reason: Option<&str>) -> String {
    reason.map(|reason| format!(": {reason}")).unwrap_or_default()
}

/// A tunnelled connection that the peer has accepted.
#[derive(Debug)]
pub struct Connected {
    /// Its bytes.
    pub stream: HboneStream,
    /// Who the peer proved to be.
    pub peer: Identity,
    /// What the peer says of the destination workload.
    pub baggage: Baggage,
}

/// Makes the tunnel over `io`: TLS as `certificate`'s identity to one of `expected`, then HTTP/2. The tunnel lives for
/// as long as the returned future is polled.
///
/// # Errors
/// When either side does not believe the other, or nothing happens for [`HANDSHAKE_TIMEOUT`].
pub async fn handshake<IO: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    io: IO,
    certificate: &WorkloadCert,
    expected: &[Identity],
    keep_alive: KeepAlive,
    window: Window,
) -> Result<(Arc<Tunnel>, impl Future<Output = ()> + Send + use<IO>), DialError> {
    let handshake = async {
        let (io, peer) = tls::client::connect(io, certificate, expected).await?;
        let (broken, presented) = (io.broken(), io.presented());
        // A server's answers waste nothing: we asked.
        let conduct = Conduct::new(Allowance::new(0, 1));
        let io = Watched::new(io, Frames::of_server(), conduct.clone(), None);
        let (requests, connection) = settings::client(&window)
            .handshake::<_, Bytes>(io)
            .await
            .map_err(|e| DialError::Http2(e.to_string()))?;
        let resizing = Resizing::new(window.clone(), window.now());
        Ok::<_, DialError>((requests, connection, resizing, peer, (broken, presented, conduct)))
    };
    let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await;
    let (requests, connection, resizing, peer, (broken, presented, conduct)) =
        handshake.map_err(|_| TlsError::Timeout)??;
    let tunnel = Arc::new(Tunnel {
        requests,
        peer,
        load: Arc::new(Load { streams: AtomicUsize::new(0), idle_since: Mutex::new(Instant::now()) }),
        end: Arc::new(OnceLock::new()),
        broken: broken.clone(),
        window,
    });
    let ended = Ended { end: tunnel.end.clone(), broken };
    let driver = drive(connection, resizing, ended, presented, keep_alive, conduct);
    Ok((tunnel, driver))
}

/// Where it is said why a tunnel ended.
struct Ended {
    end: Arc<OnceLock<String>>,
    broken: tls::Broken,
}

async fn drive<IO: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    mut connection: h2::client::Connection<IO, Bytes>,
    mut resizing: Resizing,
    Ended { end, broken }: Ended,
    presented: Option<Presented>,
    keep_alive: KeepAlive,
    conduct: Conduct,
) {
    let dead = settings::until_dead(connection.ping_pong(), keep_alive, &conduct);
    let revoked = revocation::revoked(presented);
    tokio::pin!(dead, revoked);
    let why = loop {
        tokio::select! {
            result = &mut connection => break match result {
                Ok(()) => "closed".to_owned(),
                Err(error) => error.to_string(),
            },
            wanted = resizing.due() => {
                let asked = connection.set_initial_window_size(wanted);
                if resizing.asked(wanted, asked).is_err() {
                    break "the peer does not acknowledge settings".to_owned();
                }
            }
            fault = &mut revoked => {
                // Its streams read why.
                let error = TlsError::Peer(fault);
                broken.because(error.clone());
                break error.to_string();
            }
            dead = &mut dead => break match dead {
                Dead::Silent => format!("no answer to a ping within {:?}", keep_alive.timeout),
                Dead::Unsettled => "the peer does not acknowledge settings".to_owned(),
            },
            abuse = conduct.abused() => break format!("the peer sends {abuse}"),
        }
    };
    let _ = end.set(why);
}

/// One connection to one peer.
#[derive(Debug)]
pub struct Tunnel {
    requests: SendRequest<Bytes>,
    peer: Identity,
    load: Arc<Load>,
    /// Why it ended, once it has.
    end: Arc<OnceLock<String>>,
    broken: tls::Broken,
    window: Window,
}

#[derive(Debug)]
struct Load {
    streams: AtomicUsize,
    idle_since: Mutex<Instant>,
}

/// A place for one stream on a tunnel, freed on drop.
#[derive(Debug)]
pub struct Lease {
    load: Arc<Load>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.load.streams.fetch_sub(1, Ordering::AcqRel) == 1 {
            *self.load.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
    }
}

impl Tunnel {
    /// Who is at the other end.
    pub fn peer(&self) -> &Identity {
        &self.peer
    }

    /// A place, if fewer than `max_streams` (and than the peer allows) are taken.
    pub(super) fn lease(&self, max_streams: usize) -> Option<Lease> {
        let limit = max_streams.min(self.requests.current_max_send_streams());
        let streams = &self.load.streams;
        let taken = streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |taken| (taken < limit).then_some(taken + 1));
        taken.is_ok().then(|| Lease { load: self.load.clone() })
    }

    /// Whether a new stream may be opened as far as is known here; a GOAWAY is seen only by trying.
    pub(super) fn is_alive(&self) -> bool {
        self.end.get().is_none()
    }

    /// Whether it has had no stream for `limit`.
    pub(super) fn is_idle(&self, limit: Duration) -> bool {
        self.load.streams.load(Ordering::Acquire) == 0
            && self.load.idle_since.lock().unwrap_or_else(PoisonError::into_inner).elapsed() >= limit
    }

    /// Asks the peer to connect.
    ///
    /// # Errors
    /// When it does not answer 200.
    pub(super) async fn connect(
        &self,
        request: &ConnectRequest,
        lease: Lease,
    ) -> Result<Connected, ConnectError> {
        let head = request.to_http().map_err(|error| ConnectError::Request(error.to_string()))?;
        let exchange = async {
            let mut requests = self.requests.clone().ready().await.map_err(|e| self.not_taken(&e))?;
            let (answer, send) = requests.send_request(head, false).map_err(|e| self.not_taken(&e))?;
            self.answered(answer, send, lease).await
        };
        tokio::time::timeout(ANSWER_TIMEOUT, exchange).await.unwrap_or(Err(ConnectError::Timeout))
    }

    async fn answered(
        &self,
        answer: ResponseFuture,
        send: h2::SendStream<Bytes>,
        lease: Lease,
    ) -> Result<Connected, ConnectError> {
        let answer = answer.await.map_err(|error| self.broke(&error))?;
        let status = answer.status();
        let (head, receive) = answer.into_parts();
        if status != StatusCode::OK {
            let told = |header, most| text_of(&head.headers, header, most).map(str::to_owned);
            let (reason, policy) = (told(&REASON, MAX_REASON), told(&POLICY, MAX_POLICY));
            return Err(ConnectError::Refused { status, reason, policy });
        }
        let baggage = Baggage::parse(&head.headers);
        let stream = HboneStream::new(send, receive, self.window.clone(), self.broken.clone(), Some(lease));
        Ok(Connected { stream, peer: self.peer.clone(), baggage })
    }

    /// An error before the request was written.
    fn not_taken(&self, error: &h2::Error) -> ConnectError {
        match self.broken.reason() {
            Some(reason) => ConnectError::Tls(reason.clone()),
            None => ConnectError::NotTaken(self.explain(error)),
        }
    }

    /// An error after it: only GOAWAY and REFUSED_STREAM say that the peer did nothing (RFC 9113 8.7).
    fn broke(&self, error: &h2::Error) -> ConnectError {
        let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        match self.broken.reason() {
            Some(reason) => ConnectError::Tls(reason.clone()),
            None if refused || (error.is_go_away() && error.is_remote()) => {
                ConnectError::NotTaken(self.explain(error))
            }
            None => ConnectError::Broken(self.explain(error)),
        }
    }

    fn explain(&self, error: &h2::Error) -> String {
        match self.end.get() {
            Some(end) => end.clone(),
            None => error.to_string(),
        }
    }
}
