//! What one rule of a policy matches (`istio.security.Authorization`, as Istio's ztunnel evaluates it).
//!
//! A client that did not prove who it is has no principal, namespace or service account: what asks for one does not
//! match it, what excludes some does.

use std::cell::OnceCell;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::Connection;
use crate::identity::Identity;

/// All clauses have to match; without any, everything does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule(pub Box<[Clause]>);

/// One of the matches is enough; without any, nothing matches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause(pub Box<[Match]>);

/// Every attribute has to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the protocol")]
pub struct Match {
    /// Of the client's identity.
    pub namespaces: Values<Text>,
    /// The client's identity without `spiffe://`.
    pub principals: Values<Text>,
    pub service_accounts: Values<ServiceAccount>,
    /// Of the TCP connection.
    pub source_ips: Values<IpNet>,
    pub destination_ips: Values<IpNet>,
    /// The application's.
    pub destination_ports: Values<u16>,
}

/// What an attribute may be and what it may not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Values<T> {
    /// One of these; empty: anything.
    pub any: Box<[T]>,
    /// None of these.
    pub none: Box<[T]>,
}

/// A pattern of text.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Text {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    /// Anything but nothing.
    Present,
}

/// A service account of any trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// A connection in the words of rules.
pub(super) struct Asked<'a> {
    peer: Option<&'a Identity>,
    /// Written out when a rule first asks for it.
    principal: OnceCell<String>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
}

impl<'a> Asked<'a> {
    pub(super) fn new(connection: &'a Connection) -> Self {
        Self {
            peer: connection.peer.as_ref(),
            principal: OnceCell::new(),
            source: connection.client.ip(),
            destination: connection.target.ip(),
            port: connection.target.port(),
        }
    }

    fn principal(&self) -> Option<&str> {
        let peer = self.peer?;
        let text = self.principal.get_or_init(|| peer.to_string());
        text.strip_prefix("spiffe://")
    }
}

impl Rule {
    pub(super) fn matches(&self, asked: &Asked<'_>) -> bool {
        self.0.iter().all(|clause| clause.0.iter().any(|one| one.matches(asked)))
    }
}

impl Match {
    /// Whether it says nothing at all; such a match is left out.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn matches(&self, asked: &Asked<'_>) -> bool {
        let peer = asked.peer;
        self.destination_ports.hold(|port| *port == asked.port)
            && self.source_ips.hold(|prefix| prefix.contains(&asked.source))
            && self.destination_ips.hold(|prefix| prefix.contains(&asked.destination))
            && self.namespaces.hold(|text| text.matches(peer.map(Identity::namespace)))
            && self.service_accounts.hold(|account| peer.is_some_and(|peer| account.is(peer)))
            && self.principals.hold(|text| text.matches(asked.principal()))
    }
}

impl<T> Values<T> {
    fn hold(&self, is: impl Fn(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&is)) && !self.none.iter().any(&is)
    }
}

impl<T> Default for Values<T> {
    fn default() -> Self {
        Self { any: Box::default(), none: Box::default() }
    }
}

impl Text {
    fn matches(&self, text: Option<&str>) -> bool {
        let Some(text) = text.filter(|text| !text.is_empty()) else { return false };
        match self {
            Self::Exact(wanted) => *text == **wanted,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Present => true,
        }
    }
}

impl ServiceAccount {
    fn is(&self, peer: &Identity) -> bool {
        *self.namespace == *peer.namespace() && *self.name == *peer.service_account()
    }
}
