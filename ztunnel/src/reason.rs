//! Why a connection failed: one error type for the path, one short reason for metrics, logs and replies.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::IpAddr;

use http::StatusCode;
use mesh_core::authz::Denial;
use mesh_core::certs::CertError;
use mesh_core::hbone::server::{HandshakeError, TunnelError};
use mesh_core::hbone::{ConnectError, DeniedByPeer, DialError, InvalidRequest};
use mesh_core::tls::TlsError;

use crate::budget::Exhausted;
use crate::inbound::authority::Refusal;
use crate::outbound::plan::PlanError;

/// What a connection failed of; the `response_flags` label of `istio_tcp_connections_failed_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Policy does not allow it.
    Denied,
    /// It needs a feature that this version does not have.
    NotSupported,
    /// What it was to reach is known in an invalid form only.
    InvalidResource,
    /// The service has no endpoint for it.
    NoEndpoint,
    /// The far side cannot be reached or says no.
    Connect,
    /// The tunnel's port does not answer at all, as behind a NetworkPolicy.
    NetworkPolicy,
    /// The two sides do not believe each other, or one does not speak TLS.
    Tls,
    /// A certificate of either side is revoked.
    Revoked,
    /// TLS works, HTTP/2 does not.
    Http2,
    /// The pod has no certificate.
    Identity,
    /// The request makes no sense.
    BadRequest,
    /// It came to another workload than it was meant for.
    WrongWorkload,
    /// The pod has as many connections as it may.
    PodLimit,
    /// The client floods the proxy with what serves nothing.
    Abuse,
    /// It broke while bytes were carried.
    Broken,
    /// The pod was removed, the proxy is shutting down, or the connection has to be made anew over a tunnel.
    Cut,
    /// The node: descriptors, namespaces, ports.
    Local,
}

impl Reason {
    /// Istio's flag where it has one for the case, else one of our own.
    pub fn flag(self) -> &'static str {
        match self {
            Self::Denied => "DENY",
            Self::NotSupported => "NOT_SUPPORTED",
            Self::InvalidResource => "INVALID_RESOURCE",
            Self::NoEndpoint => "NO_ENDPOINT",
            Self::Connect => "CONNECT",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::Tls => "TLS_FAILURE",
            Self::Revoked => "CERT_REVOKED",
            Self::Http2 => "H2_HANDSHAKE_FAILURE",
            Self::Identity => "IDENTITY_ERROR",
            Self::BadRequest => "BAD_REQUEST",
            Self::WrongWorkload => "WRONG_WORKLOAD",
            Self::PodLimit => "POD_LIMIT",
            Self::Abuse => "ABUSE",
            Self::Broken => "BROKEN",
            Self::Cut => "CUT",
            Self::Local => "LOCAL",
        }
    }
}

/// How far a connection had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Phase {
    Accept,
    Plan,
    Handshake,
    Request,
    Authorize,
    Connect,
    Copy,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accept => "accept",
            Self::Plan => "plan",
            Self::Handshake => "handshake",
            Self::Request => "request",
            Self::Authorize => "authorize",
            Self::Connect => "connect",
            Self::Copy => "copy",
        })
    }
}

/// Whose fault it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one who connected.
    Downstream,
    /// The one it was to reach.
    Upstream,
    /// This node.
    Local,
}

/// A connection's failure.
#[derive(Debug, thiserror::Error)]
#[error("{phase}: {cause}")]
pub struct ProxyError {
    /// When.
    pub phase: Phase,
    /// Where.
    pub side: Side,
    /// What.
    pub cause: Box<Cause>,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the errors inside say it")]
pub enum Cause {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Refusal(#[from] Refusal),
    #[error("{0}")]
    Denied(Denial),
    /// What had been allowed.
    #[error("policy has changed: {0}")]
    Revoked(Denial),
    #[error(transparent)]
    Certificate(#[from] CertError),
    #[error(transparent)]
    Tunnel(#[from] ConnectError),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Served(#[from] TunnelError),
    #[error(transparent)]
    Malformed(#[from] InvalidRequest),
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    #[error(
        "more recent handshakes took its place: too many with this pod are unfinished (--max-pod-handshakes)"
    )]
    GaveWay,
    #[error("the client has begun more handshakes with this node's pods than are done in so little time")]
    TooFast,
    /// Connecting, or carrying bytes.
    #[error("{what}: {error}")]
    Io { what: &'static str, error: io::Error },
    #[error("no free source port: too many connections between these two addresses")]
    NoPort,
    #[error("{0} cannot be reached: this pod has no address of its IP family")]
    NoAddress(IpAddr),
    #[error("the client gave up before it was answered")]
    Abandoned,
    #[error("cut, because the pod was removed or the proxy is shutting down")]
    Cut,
    #[error(
        "cut, because certificate revocation lists are in force now, which only the handshake of a tunnel asks: a new \
         connection has one"
    )]
    NeedsTunnel,
}

impl ProxyError {
    /// For metrics.
    pub fn reason(&self) -> Reason {
        match &*self.cause {
            Cause::Plan(
                PlanError::NoEndpoint { .. } | PlanError::NoAddress { .. } | PlanError::Unresolved(_),
            ) => Reason::NoEndpoint,
            Cause::Plan(PlanError::Recursive(_)) => Reason::BadRequest,
            Cause::Plan(PlanError::InvalidResource { .. }) => Reason::InvalidResource,
            Cause::Plan(PlanError::Waypoint { .. } | PlanError::OtherNetwork { .. })
            | Cause::Refusal(Refusal::ApplicationTunnel) => Reason::NotSupported,
            Cause::Refusal(Refusal::OtherWorkload { .. }) => Reason::WrongWorkload,
            Cause::Refusal(_) | Cause::Malformed(_) => Reason::BadRequest,
            Cause::Denied(_) | Cause::Revoked(_) => Reason::Denied,
            Cause::Exhausted(_) | Cause::GaveWay => Reason::PodLimit,
            Cause::Served(TunnelError::Abuse(_)) | Cause::TooFast => Reason::Abuse,
            Cause::Certificate(_) => Reason::Identity,
            Cause::Tunnel(error) => tunnel_reason(error),
            Cause::Handshake(HandshakeError::Http2(_)) => Reason::Http2,
            Cause::Handshake(HandshakeError::Tls(error)) => tls_reason(error),
            Cause::Handshake(HandshakeError::Timeout(_)) => Reason::Tls,
            Cause::Served(_) | Cause::Abandoned => Reason::Broken,
            Cause::NoPort => Reason::Local,
            Cause::NoAddress(_) => Reason::Connect,
            Cause::Cut | Cause::NeedsTunnel => Reason::Cut,
            Cause::Io { error, .. } if is_revoked(error) => Reason::Revoked,
            Cause::Io { error, .. } if inner::<DeniedByPeer>(error).is_some() => Reason::Denied,
            Cause::Io { .. } => match (self.phase, self.side) {
                (Phase::Copy, _) => Reason::Broken,
                (_, Side::Local) => Reason::Local,
                _ => Reason::Connect,
            },
        }
    }

    /// Whether another endpoint of the service may do better: this one did not take the connection, for a reason that is
    /// its own. What policy or the client's own node refuses, others would refuse too, or must not be asked.
    pub fn is_endpoints(&self) -> bool {
        match &*self.cause {
            Cause::Tunnel(error) => is_endpoints(error),
            Cause::Refusal(refusal) => matches!(refusal, Refusal::OtherWorkload { .. }),
            // Where both pods are this process's, the endpoint's own words.
            Cause::Exhausted(_) | Cause::NoPort | Cause::NoAddress(_) | Cause::Cut => true,
            Cause::Io { .. } => self.side == Side::Upstream,
            _ => false,
        }
    }

    /// What policy says against it.
    pub fn denial(&self) -> Option<&Denial> {
        match &*self.cause {
            Cause::Denied(denial) | Cause::Revoked(denial) => Some(denial),
            _ => None,
        }
    }

    /// The answer to a CONNECT that failed so (the ones of Istio's ztunnel).
    pub fn status(&self) -> StatusCode {
        match &*self.cause {
            Cause::Refusal(refusal) => refusal.status(),
            Cause::Malformed(_) => StatusCode::BAD_REQUEST,
            Cause::Denied(_) | Cause::Revoked(_) => StatusCode::UNAUTHORIZED,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// A failure of this node.
    pub fn local(phase: Phase, what: &'static str, error: io::Error) -> Self {
        Self::new(phase, Side::Local, Cause::Io { what, error })
    }

    /// A failure on one side.
    pub fn new(phase: Phase, side: Side, cause: impl Into<Cause>) -> Self {
        Self { phase, side, cause: Box::new(cause.into()) }
    }
}

fn tls_reason(error: &TlsError) -> Reason {
    if error.is_revoked() { Reason::Revoked } else { Reason::Tls }
}

/// Whether a tunnel was cut because a certificate was revoked: its streams' errors say so.
fn is_revoked(error: &io::Error) -> bool {
    inner(error).is_some_and(TlsError::is_revoked)
}

fn inner<T: Error + 'static>(error: &io::Error) -> Option<&T> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

fn is_endpoints(error: &ConnectError) -> bool {
    match error {
        // 421: it is another workload. 503: its application does not answer, or it has too many connections.
        ConnectError::Refused { status, .. } => {
            [StatusCode::MISDIRECTED_REQUEST, StatusCode::SERVICE_UNAVAILABLE].contains(status)
        }
        ConnectError::Dial(DialError::Certificate(_)) | ConnectError::Request(_) => false,
        ConnectError::Dial(_)
        | ConnectError::NotTaken(_)
        | ConnectError::Broken(_)
        | ConnectError::Tls(_)
        | ConnectError::Timeout => true,
    }
}

fn tunnel_reason(error: &ConnectError) -> Reason {
    match error {
        // Policy's answer, also of other proxies.
        ConnectError::Refused { status: StatusCode::UNAUTHORIZED, .. } => Reason::Denied,
        ConnectError::Dial(DialError::Certificate(_)) => Reason::Identity,
        ConnectError::Dial(DialError::ConnectTimeout(_)) => Reason::NetworkPolicy,
        ConnectError::Dial(DialError::Tls(error)) | ConnectError::Tls(error) => tls_reason(error),
        ConnectError::Dial(DialError::Http2(_)) => Reason::Http2,
        _ => Reason::Connect,
    }
}
