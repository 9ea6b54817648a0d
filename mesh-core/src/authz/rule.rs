//! What one rule of a policy matches (`istio.security.Authorization`, as Istio's ztunnel evaluates it).
//!
//! A client that did not prove who it is has no principal, namespace or service account: what asks for one does not
//! match it, what excludes some does.

use std::cell::OnceCell;
use std::collections::BTreeSet;
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

    /// The attributes that would have to be others for it to match, as few as can be; none if nothing could.
    pub(super) fn misses(&self, asked: &Asked<'_>) -> Option<BTreeSet<Attribute>> {
        let mut all = BTreeSet::new();
        for clause in &self.0 {
            all.extend(clause.0.iter().map(|one| one.misses(asked)).min_by_key(Vec::len)?);
        }
        Some(all)
    }
}

/// What a match is about, named as in the specification of AuthorizationPolicy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are those of the specification")]
pub enum Attribute {
    Ports,
    IpBlocks,
    DestinationIp,
    Namespaces,
    ServiceAccounts,
    Principals,
}

impl Attribute {
    /// The cheap ones first.
    const ALL: [Self; 6] = [
        Self::Ports,
        Self::IpBlocks,
        Self::DestinationIp,
        Self::Namespaces,
        Self::ServiceAccounts,
        Self::Principals,
    ];

    /// As in the specification.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ports => "ports",
            Self::IpBlocks => "ipBlocks",
            Self::DestinationIp => "destination.ip",
            Self::Namespaces => "namespaces",
            Self::ServiceAccounts => "serviceAccounts",
            Self::Principals => "principals",
        }
    }
}

impl Match {
    /// Whether it says nothing at all; such a match is left out.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn matches(&self, asked: &Asked<'_>) -> bool {
        Attribute::ALL.into_iter().all(|attribute| self.holds(attribute, asked))
    }

    fn misses(&self, asked: &Asked<'_>) -> Vec<Attribute> {
        Attribute::ALL.into_iter().filter(|attribute| !self.holds(*attribute, asked)).collect()
    }

    fn holds(&self, attribute: Attribute, asked: &Asked<'_>) -> bool {
        let peer = asked.peer;
        match attribute {
            Attribute::Ports => self.destination_ports.hold(|port| *port == asked.port),
            Attribute::IpBlocks => self.source_ips.hold(|prefix| prefix.contains(&asked.source)),
            Attribute::DestinationIp => {
                self.destination_ips.hold(|prefix| prefix.contains(&asked.destination))
            }
            Attribute::Namespaces => self.namespaces.hold(|text| text.matches(peer.map(Identity::namespace))),
            Attribute::ServiceAccounts => {
                self.service_accounts.hold(|account| peer.is_some_and(|peer| account.is(peer)))
            }
            Attribute::Principals => self.principals.hold(|text| text.matches(asked.principal())),
        }
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
