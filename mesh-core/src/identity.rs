//! SPIFFE identities as workloads carry them: parse, print, compare.
//!
//! Istio's form only, `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`; parsing refuses all else, so a
//! value of these types never needs to be checked again.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The root of trust that names in it are relative to, e.g. `cluster.local`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The name without scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Who a workload is. One pointer: every connection keeps several.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity(Arc<Parts>);

#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Parts {
    trust_domain: TrustDomain,
    namespace: Box<str>,
    service_account: Box<str>,
}

/// Why a text is no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// Another scheme, or none.
    #[error("{0:?} does not start with spiffe://")]
    Scheme(String),
    /// Not `<trust domain>/ns/<namespace>/sa/<service account>`.
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Path(String),
    /// A character that the part may not have, or an empty or overlong part.
    #[error(
        "{what} {value:?} is empty, longer than 253 characters, or has a character that is not allowed in it"
    )]
    Part {
        /// Which part of the identity.
        what: &'static str,
        /// Its text.
        value: String,
    },
}

impl Identity {
    /// # Errors
    /// When a part is empty, too long, or has characters outside `[A-Za-z0-9._-]`.
    pub fn new(
        trust_domain: TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, InvalidIdentity> {
        Ok(Self(Arc::new(Parts {
            trust_domain,
            namespace: part("namespace", namespace)?.into(),
            service_account: part("service account", service_account)?.into(),
        })))
    }

    /// Trust domain of the name.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    /// Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.0.service_account
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.bytes().any(|c| c.is_ascii_uppercase()) {
            return Err(InvalidIdentity::Part { what: "trust domain", value: text.to_owned() });
        }
        part("trust domain", text).map(|text| Self(text.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.strip_prefix("spiffe://").ok_or_else(|| InvalidIdentity::Scheme(text.to_owned()))?;
        let mut parts = path.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(trust_domain), Some("ns"), Some(namespace), Some("sa"), Some(service_account), None) => {
                Self::new(trust_domain.parse()?, namespace, service_account)
            }
            _ => Err(InvalidIdentity::Path(text.to_owned())),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { trust_domain, namespace, service_account } = &*self.0;
        write!(f, "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
    }
}

/// SPIFFE allows `[A-Za-z0-9._-]` in path segments (SPIFFE-ID 2.2) and its lower-case part in trust domains (2.1);
/// Kubernetes names are a subset.
fn part<'a>(what: &'static str, value: &'a str) -> Result<&'a str, InvalidIdentity> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    let dots_only = value.bytes().all(|c| c == b'.');
    if value.is_empty() || value.len() > 253 || dots_only || !value.bytes().all(allowed) {
        return Err(InvalidIdentity::Part { what, value: value.to_owned() });
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_and_refusals() {
        let good = "spiffe://cluster.local/ns/payments/sa/payment-service";
        assert_eq!(good.parse::<Identity>().unwrap().to_string(), good);
        for bad in [
            "",
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a\0b/sa/b",
            "spiffe://cluster.local/ns/a%2Fb/sa/b",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/NS/a/sa/b",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad:?} parsed");
        }
    }

    #[test]
    fn compares_every_part() {
        let id = |text: &str| text.parse::<Identity>().unwrap();
        assert_ne!(id("spiffe://a/ns/b/sa/c"), id("spiffe://a.b/ns/b/sa/c"));
        assert_ne!(id("spiffe://a/ns/b/sa/c"), id("spiffe://a/ns/b/sa/C"));
        assert_ne!(id("spiffe://a/ns/b/sa/c"), id("spiffe://a/ns/b/sa/d"));
    }
}
