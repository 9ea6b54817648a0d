//! The accepting end of a tunnel: every CONNECT on it is handed to a [`Handler`], which answers it once.
//!
//! Accepting is two steps: [`handshake`] proves who the client is within a deadline, [`Tunnel::serve`] runs its
//! streams until the client leaves or the drain says so.

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderValue, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;

use super::conduct::{self, Conduct, Pacer, Watched};
use super::frames::Frames;
use super::request::{Baggage, ConnectRequest, InvalidRequest, MAX_POLICY, MAX_REASON, POLICY, REASON};
use super::settings::{self, Dead, HANDSHAKE_TIMEOUT, KeepAlive, MAX_STREAMS};
use super::stream::HboneStream;
use super::window::{Resizing, Window};
use crate::allowance::Allowance;
use crate::certs::WorkloadCert;
use crate::drain::Watch;
use crate::identity::Identity;
use crate::tls::revocation::{self, Presented};
use crate::tls::{self, CertificateFault, TlsError};

/// Handlers are told to close through their own watch; those that do not are ended after this.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Limits of one tunnel.
#[derive(Clone, Debug)]
pub struct Config {
    /// Streams at once, at most [`MAX_STREAMS`].
    pub max_streams: u32,
    /// For TLS and the HTTP/2 preface together.
    pub handshake_timeout: Duration,
    /// How a dead client is found.
    pub keep_alive: KeepAlive,
    /// What one stream may hold.
    pub window: Window,
    /// Requests that the client may give up before anybody has looked at them, or that make no sense; more end the tunnel.
    pub wasted: Allowance,
    /// Requests that it may give up later, before they are answered, as clients do whose application is too slow; while
    /// this is used up, no others are looked at.
    pub given_up: Allowance,
    /// How fast frames of the client are read, if not as fast as it sends them.
    pub frames: Option<Arc<dyn Pacer>>,
    /// A tunnel without a connection for so long is closed. Istio's clients keep one for five minutes.
    pub idle: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_streams: MAX_STREAMS,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            keep_alive: KeepAlive::default(),
            window: Window::default(),
            wasted: Allowance::new(1000, 100),
            given_up: Allowance::new(1000, 500),
            frames: None,
            idle: Duration::from_secs(900),
        }
    }
}

/// Why a client got no tunnel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// It is not believed, does not believe us, or does not speak TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// TLS works, HTTP/2 does not.
    #[error("the client does not speak HTTP/2: {0}")]
    Http2(String),
    /// It did nothing for too long.
    #[error("the client did not finish the TLS and HTTP/2 handshake within {0:?}")]
    Timeout(Duration),
}

/// Why a tunnel ended, when neither side wanted it to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunnelError {
    /// The client does not answer pings.
    #[error("the client does not answer a ping within {0:?}")]
    Dead(Duration),
    /// The client was believed, and is not any more.
    #[error("the client's certificate is refused now: {0}")]
    Revoked(CertificateFault),
    /// The client does what serves nobody, far more often than one that means well has to.
    #[error("the client sends {0}")]
    Abuse(&'static str),
    /// The connection failed or the client broke the protocol.
    #[error("the tunnel broke: {0}")]
    Broken(String),
}

impl From<&h2::Error> for TunnelError {
    fn from(error: &h2::Error) -> Self {
        // h2 has limits of its own, and says with this code that the peer has passed one.
        let sent_away = error.is_library() && error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM);
        if sent_away { Self::Abuse(conduct::TOO_MUCH_FOR_HTTP2) } else { Self::Broken(error.to_string()) }
    }
}

/// What to do with each connection in a tunnel.
pub trait Handler: Clone + Send + Sync + 'static {
    /// Answers one request and carries its connection until it is over.
    fn connect(self, incoming: Incoming) -> impl Future<Output = ()> + Send;

    /// A request was answered with 400 already.
    fn malformed(&self, error: &InvalidRequest) {
        tracing::debug!(%error, "malformed request refused");
    }
}

impl<F, Served> Handler for F
where
    F: FnOnce(Incoming) -> Served + Clone + Send + Sync + 'static,
    Served: Future<Output = ()> + Send,
{
    fn connect(self, incoming: Incoming) -> impl Future<Output = ()> + Send {
        self(incoming)
    }
}

/// A client that has proved who it is.
pub struct Tunnel<IO> {
    connection: h2::server::Connection<Watched<tls::Stream<IO>>, Bytes>,
    client: Identity,
    config: Config,
    resizing: Resizing,
    broken: tls::Broken,
    presented: Option<Presented>,
    /// What is left of the client's certificate's time.
    proved_for: Duration,
    conduct: Conduct,
}

/// TLS as `certificate`'s identity, then HTTP/2, over an accepted connection.
///
/// # Errors
/// When the client is not believed or does not speak both in time; it has been told why as far as TLS can.
pub async fn handshake<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    certificate: &WorkloadCert,
    config: Config,
) -> Result<Tunnel<IO>, HandshakeError> {
    let timeout = config.handshake_timeout;
    let handshake = async {
        let (io, client) = tls::server::accept(io, certificate).await?;
        let (broken, presented, proved_for) = (io.broken(), io.presented(), io.proved_for());
        let resizing = Resizing::new(config.window.clone(), config.window.now());
        let conduct = Conduct::new(config.wasted.clone());
        let io = Watched::new(io, Frames::of_client(), conduct.clone(), config.frames.clone());
        let connection =
            settings::server(config.max_streams, &config.window).handshake(io).await.map_err(|error| {
                match broken.reason() {
                    Some(reason) => HandshakeError::Tls(reason.clone()),
                    None => HandshakeError::Http2(error.to_string()),
                }
            })?;
        Ok(Tunnel { connection, client, config, resizing, broken, presented, proved_for, conduct })
    };
    tokio::time::timeout(timeout, handshake).await.unwrap_or(Err(HandshakeError::Timeout(timeout)))
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Tunnel<IO> {
    /// Who is at the other end; the same for all its connections.
    pub fn client(&self) -> &Identity {
        &self.client
    }

    /// Takes no connection at all, and tells the client why it may come again later: GOAWAY with ENHANCE_YOUR_CALM
    /// (RFC 9113 7).
    pub async fn refuse(mut self) {
        self.send_away().await;
    }

    async fn send_away(&mut self) {
        self.connection.abrupt_shutdown(h2::Reason::ENHANCE_YOUR_CALM);
        let told = async { while let Some(Ok(_)) = self.connection.accept().await {} };
        let _ = tokio::time::timeout(CLOSE_GRACE, told).await;
    }

    /// Runs the tunnel until it is over. When `drain` starts, or the time of the client's certificate is over, the client
    /// is asked to open no more streams (GOAWAY), and those that are open go on until they end or `drain` says to close.
    ///
    /// # Errors
    /// When it ends otherwise than by the client closing or by the drain.
    pub async fn serve(mut self, handler: impl Handler, drain: Watch) -> Result<(), TunnelError> {
        let keep_alive = self.config.keep_alive;
        // Asked once for the tunnel's life: the loop turns twice for each connection in it.
        let conduct = self.conduct.clone();
        let dead = settings::until_dead(self.connection.ping_pong(), keep_alive, &conduct);
        let (asked_to_drain, asked_to_close) = (drain.draining(), drain.closing());
        let expired = tokio::time::sleep(self.proved_for);
        let revoked = revocation::revoked(self.presented.take());
        let idle = tokio::time::sleep(self.config.idle);
        tokio::pin!(dead, asked_to_drain, asked_to_close, expired, revoked, idle);
        let mut streams = JoinSet::new();
        let mut draining = false;
        let result = loop {
            tokio::select! {
                // While this is polled all streams of the tunnel make progress.
                accepted = next(&mut self.connection, &self.config.given_up) => match accepted {
                    Some(Ok((request, respond))) => {
                        self.answer(request, respond, &handler, &mut streams);
                    }
                    // A client that leaves when it was asked to, or when nothing is under way, breaks nothing.
                    Some(Err(error)) if error.is_io() && (draining || reaped(&mut streams).is_empty()) => {
                        break Ok(());
                    }
                    Some(Err(error)) => break Err(TunnelError::from(&error)),
                    None => break Ok(()),
                },
                () = &mut asked_to_drain, if !draining => {
                    draining = true;
                    self.connection.graceful_shutdown();
                }
                // The client comes again with what it has by now.
                () = &mut expired, if !draining => {
                    draining = true;
                    self.connection.graceful_shutdown();
                }
                () = &mut asked_to_close => break Ok(()),
                wanted = self.resizing.due() => {
                    let asked = self.connection.set_initial_window_size(wanted);
                    if self.resizing.asked(wanted, asked).is_err() {
                        break Err(TunnelError::Broken("it does not acknowledge settings".to_owned()));
                    }
                }
                fault = &mut revoked => {
                    // Its streams read why.
                    self.broken.because(TlsError::Peer(fault.clone()));
                    break Err(TunnelError::Revoked(fault));
                }
                dead = &mut dead => break Err(match dead {
                    Dead::Silent => TunnelError::Dead(keep_alive.timeout),
                    Dead::Unsettled => TunnelError::Broken("it does not acknowledge settings".to_owned()),
                }),
                abuse = conduct.abused() => {
                    self.send_away().await;
                    break Err(TunnelError::Abuse(abuse));
                }
                () = &mut idle, if !draining && streams.is_empty() => {
                    draining = true;
                    self.connection.graceful_shutdown();
                }
                Some(ended) = streams.join_next() => {
                    log_panic(ended);
                    if streams.is_empty() {
                        idle.as_mut().reset(tokio::time::Instant::now() + self.config.idle);
                    }
                }
            }
        };
        // Ends what the streams wait for.
        drop(self.connection);
        let rest = async { while streams.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(CLOSE_GRACE, rest).await;
        streams.shutdown().await;
        result
    }

    fn answer(
        &self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        handler: &impl Handler,
        streams: &mut JoinSet<()>,
    ) {
        // What was given up before anybody has looked costs nothing more.
        if respond.poll_reset(&mut Context::from_waker(Waker::noop())).is_ready() {
            return self.conduct.wasted();
        }
        match ConnectRequest::parse(&request) {
            Ok(parsed) => {
                let incoming = Incoming {
                    request: parsed,
                    respond,
                    receive: request.into_body(),
                    window: self.config.window.clone(),
                    broken: self.broken.clone(),
                    conduct: self.conduct.clone(),
                    given_up: self.config.given_up.clone(),
                };
                streams.spawn(handler.clone().connect(incoming));
            }
            Err(error) => {
                refuse(respond, StatusCode::BAD_REQUEST, &error.to_string(), None);
                handler.malformed(&error);
                self.conduct.wasted();
            }
        }
    }
}

/// The connection's next request, when the client has not given up more than it may. May be dropped while waiting.
async fn next<IO: AsyncRead + AsyncWrite + Unpin>(
    connection: &mut h2::server::Connection<Watched<tls::Stream<IO>>, Bytes>,
    given_up: &Allowance,
) -> Option<Result<(Request<RecvStream>, SendResponse<Bytes>), h2::Error>> {
    while let Some(wait) = given_up.due() {
        // Its streams make progress meanwhile.
        let over = poll_fn(|cx| connection.poll_closed(cx));
        match tokio::time::timeout(wait, over).await {
            Ok(Ok(())) => return None,
            Ok(Err(error)) => return Some(Err(error)),
            Err(_) => {}
        }
    }
    connection.accept().await
}

/// Without the streams that are over already.
fn reaped(streams: &mut JoinSet<()>) -> &JoinSet<()> {
    while let Some(ended) = streams.try_join_next() {
        log_panic(ended);
    }
    streams
}

fn refuse(mut respond: SendResponse<Bytes>, status: StatusCode, reason: &str, policy: Option<&str>) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    for (name, text, most) in [(REASON, Some(reason), MAX_REASON), (POLICY, policy, MAX_POLICY)] {
        let text = text.unwrap_or_default().chars();
        let short: String = text.filter(|c| c.is_ascii_graphic() || *c == ' ').take(most).collect();
        if let Ok(value) = HeaderValue::from_str(&short)
            && !short.is_empty()
        {
            response.headers_mut().insert(name, value);
        }
    }
    // The client may have gone; then there is nobody to tell.
    let _ = respond.send_response(response, true);
}

fn log_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a stream's task failed; please report this with the lines before it");
    }
}

/// One request, to be answered once; dropping it unanswered resets its stream.
pub struct Incoming {
    request: ConnectRequest,
    respond: SendResponse<Bytes>,
    receive: RecvStream,
    window: Window,
    broken: tls::Broken,
    conduct: Conduct,
    given_up: Allowance,
}

impl Incoming {
    /// What the client asks for.
    pub fn request(&self) -> &ConnectRequest {
        &self.request
    }

    /// Answers 200 and turns the request into its connection. `workload` describes the destination to the client.
    ///
    /// # Errors
    /// When the client has given up.
    pub fn accept(mut self, workload: &Baggage) -> std::io::Result<HboneStream> {
        let mut response = Response::new(());
        workload.write(response.headers_mut());
        let send = self.respond.send_response(response, false).map_err(std::io::Error::other)?;
        Ok(HboneStream::new(send, self.receive, self.window, self.broken, None))
    }

    /// Answers with another status, says why in words for the client's log, and which policy it is if one is.
    pub fn refuse(self, status: StatusCode, reason: &str, policy: Option<&str>) {
        refuse(self.respond, status, reason, policy);
    }

    /// Notes that nobody who means well asks for this.
    pub fn makes_no_sense(&self) {
        self.conduct.wasted();
    }

    /// Completes when the client gives up before it is answered, or its tunnel has ended.
    pub async fn abandoned(&mut self) {
        if poll_fn(|cx| self.respond.poll_reset(cx)).await.is_ok() {
            self.given_up.charge(1);
        }
    }
}
