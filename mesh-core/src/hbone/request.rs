//! What a CONNECT request says, and how that is written in its headers. Pure.
//!
//! The authority decides where the connection goes and is strict. The other headers are hints: one that cannot be
//! understood is left out, as if it had not been sent.
//!
//! **Invariant:** nothing here is verified; who the client is, only its certificate says.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use http::header::{FORWARDED, HeaderName};
use http::{HeaderMap, HeaderValue, Method, Request, Uri};

mod baggage;
mod trace;

pub use self::baggage::Baggage;
pub use self::trace::TraceParent;

/// Uid of the workload that the client means to reach (as in WDS), our own header. A pod whose address the client
/// knows from an older pod refuses the connection by it.
pub const WORKLOAD_UID: HeaderName = HeaderName::from_static("ambit-workload-uid");
/// Why a connection was refused, for people; our own header.
pub const REASON: HeaderName = HeaderName::from_static("ambit-reason");
/// The policy, `<namespace>/<name>`, for which a connection was refused; our own header.
pub const POLICY: HeaderName = HeaderName::from_static("ambit-policy");
/// Two names of Kubernetes and what is between them.
pub(super) const MAX_POLICY: usize = 2 * 253 + 1;
/// The same of a reason, which may name a policy and has words around it.
pub(super) const MAX_REASON: usize = MAX_POLICY + 256;
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Longest value taken over from a peer into logs and labels, in bytes; twice that of a Kubernetes name.
const MAX_VALUE: usize = 512;

/// One connection that a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectRequest {
    /// Where it is to go.
    pub authority: Authority,
    /// What the client says of the workload that connects.
    pub baggage: Baggage,
    /// Where the connection comes from, and which service it was dialled for.
    pub forwarded: Option<Forwarded>,
    /// Trace that it belongs to.
    pub traceparent: Option<TraceParent>,
    /// Uid of the workload that the client means; Istio's clients do not say.
    pub workload_uid: Option<String>,
}

/// `host:port`; the port is mandatory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Authority {
    /// An address, or a name that the server resolves.
    pub host: Host,
    /// Never 0.
    pub port: u16,
}

/// See [`Authority`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// IPv6 in brackets on the wire.
    Address(IpAddr),
    /// In lower case.
    Name(String),
}

/// The `forwarded` header (RFC 7239).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarded {
    /// Client's address as its proxy saw it.
    pub client: Option<SocketAddr>,
    /// Host name of the service that was dialled.
    pub host: Option<String>,
}

/// Why a request is answered with 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRequest {
    /// Only CONNECT is served.
    #[error("the method is {0}, only CONNECT is served")]
    Method(String),
    /// Not `host:port`.
    #[error("the authority {0:?} is not an address or a host name with a port")]
    Authority(String),
}

impl ConnectRequest {
    /// Only with what the connection needs.
    pub fn new(authority: Authority) -> Self {
        Self {
            authority,
            baggage: Baggage::default(),
            forwarded: None,
            traceparent: None,
            workload_uid: None,
        }
    }

    /// Reads a request.
    ///
    /// # Errors
    /// When it is no CONNECT to a `host:port`.
    pub fn parse<B>(request: &Request<B>) -> Result<Self, InvalidRequest> {
        if request.method() != Method::CONNECT {
            return Err(InvalidRequest::Method(request.method().to_string()));
        }
        let headers = request.headers();
        Ok(Self {
            authority: request.uri().authority().map_or("", |authority| authority.as_str()).parse()?,
            baggage: Baggage::parse(headers),
            forwarded: text(headers, &FORWARDED).and_then(Forwarded::parse),
            traceparent: text(headers, &TRACEPARENT).and_then(TraceParent::parse),
            workload_uid: text(headers, &WORKLOAD_UID).map(str::to_owned),
        })
    }

    /// Writes the request; values that no header may have are left out.
    ///
    /// # Errors
    /// When the authority's host name is none.
    pub fn to_http(&self) -> Result<Request<()>, InvalidRequest> {
        let invalid = || InvalidRequest::Authority(self.authority.to_string());
        let authority = self.authority.to_string().parse::<http::uri::Authority>().map_err(|_| invalid())?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = Uri::from(authority);
        let headers = request.headers_mut();
        self.baggage.write(headers);
        insert(headers, FORWARDED, self.forwarded.as_ref());
        insert(headers, TRACEPARENT, self.traceparent.as_ref());
        insert(headers, WORKLOAD_UID, self.workload_uid.as_ref());
        Ok(request)
    }
}

/// The value of a header that occurs, if it is short printable ASCII.
pub(super) fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    text_of(headers, name, MAX_VALUE)
}

/// The same, where so many bytes are short.
pub(super) fn text_of<'a>(headers: &'a HeaderMap, name: &HeaderName, most: usize) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().filter(|value| !value.is_empty() && value.len() <= most)
}

pub(super) fn insert(headers: &mut HeaderMap, name: HeaderName, value: Option<&impl fmt::Display>) {
    if let Some(value) = value.and_then(|value| HeaderValue::from_str(&value.to_string()).ok()) {
        headers.insert(name, value);
    }
}

impl FromStr for Authority {
    type Err = InvalidRequest;

    fn from_str(authority: &str) -> Result<Self, Self::Err> {
        parse_authority(authority).ok_or_else(|| InvalidRequest::Authority(authority.to_owned()))
    }
}

fn parse_authority(authority: &str) -> Option<Authority> {
    let (host, port) = authority.rsplit_once(':')?;
    // Rust's own parser takes a sign.
    let port = Some(port).filter(|port| port.bytes().all(|c| c.is_ascii_digit()))?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let host = match host.strip_prefix('[') {
        Some(rest) => Host::Address(IpAddr::V6(rest.strip_suffix(']')?.parse::<Ipv6Addr>().ok()?)),
        None => match host.parse() {
            Ok(address) => Host::Address(IpAddr::V4(address)),
            Err(_) => Host::Name(host_name(host)?),
        },
    };
    Some(Authority { host, port })
}

fn host_name(name: &str) -> Option<String> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
    let label = |label: &str| !label.is_empty() && label.len() <= 63 && label.bytes().all(allowed);
    // A last label of digits only would be an IPv4 address that is written wrongly (RFC 1123 2.1).
    let last = name.rsplit('.').next()?;
    let name_like =
        name.len() <= 253 && name.split('.').all(label) && !last.bytes().all(|c| c.is_ascii_digit());
    name_like.then(|| name.to_ascii_lowercase())
}

impl From<SocketAddr> for Authority {
    fn from(address: SocketAddr) -> Self {
        Self { host: Host::Address(address.ip()), port: address.port() }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Address(address) => SocketAddr::new(*address, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

impl Forwarded {
    fn parse(header: &str) -> Option<Self> {
        let mut forwarded = Self { client: None, host: None };
        // Only the first element: later ones are of proxies behind.
        for pair in header.split(',').next()?.split(';') {
            let (key, value) = pair.split_once('=')?;
            let value = value.trim().trim_matches('"');
            match key.trim().to_ascii_lowercase().as_str() {
                "for" => forwarded.client = value.parse().ok(),
                "host" => forwarded.host = Some(value.to_owned()),
                _ => {}
            }
        }
        (forwarded.client.is_some() || forwarded.host.is_some()).then_some(forwarded)
    }
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(client) = self.client {
            write!(f, "for=\"{client}\"")?;
        }
        match &self.host {
            Some(host) if self.client.is_some() => write!(f, ";host={host}"),
            Some(host) => write!(f, "host={host}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
