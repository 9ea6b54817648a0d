//! Wire resources to domain values: everything is checked here and never again.
//!
//! One function and one `Invalid…` error per message. Names that many objects have in common are shared through
//! [`Names`], which the caller keeps from one resource to the next.

pub mod authz;
pub mod service;
pub mod workload;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::addr::{HBONE_PORT, NetworkAddress};
use crate::identity::{Identity, InvalidIdentity};
use crate::proto::workload as wire;
use crate::service::{Gateway, GatewayDestination, ServiceName};

/// Trust domain, namespace and service account.
type IdentityParts = (Arc<str>, Arc<str>, Arc<str>);

/// Strings and identities seen before, so that equal ones share memory.
#[derive(Debug, Default)]
pub struct Names {
    strings: HashSet<Arc<str>>,
    identities: HashMap<IdentityParts, Identity>,
    /// Size at which unused ones are dropped.
    limit: usize,
}

impl Names {
    /// The shared form of a text.
    pub fn share(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.strings.get(text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        self.strings.insert(new.clone());
        new
    }

    /// The shared form of an identity.
    ///
    /// # Errors
    /// When a part of it is no valid name.
    pub fn identity(
        &mut self,
        td: &str,
        namespace: &str,
        account: &str,
    ) -> Result<Identity, InvalidIdentity> {
        let key = (self.share(td), self.share(namespace), self.share(account));
        if let Some(known) = self.identities.get(&key) {
            return Ok(known.clone());
        }
        let new = Identity::new(td.parse()?, namespace, account)?;
        self.identities.insert(key, new.clone());
        Ok(new)
    }

    /// Forgets what nothing else refers to, when there is more than twice of what was in use last time. To be called
    /// after each batch.
    pub fn prune(&mut self) {
        if self.strings.len() + self.identities.len() <= self.limit.max(4096) {
            return;
        }
        // Identities do not share their parts with anyone, so they are dropped all and come back when needed.
        self.identities.clear();
        self.strings.retain(|text| Arc::strong_count(text) > 1);
        self.limit = 2 * self.strings.len();
    }
}

/// Why a part that several messages have is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPart {
    /// Neither IPv4 nor IPv6.
    #[error("an address of {0} bytes (4 or 16 are possible)")]
    AddressLength(usize),
    /// More than the address has bits.
    #[error("prefix length {length} of {address}")]
    PrefixLength {
        /// The address.
        address: IpAddr,
        /// As sent.
        length: u32,
    },
    /// Not 1 to 65535.
    #[error("{what} {value} is no port")]
    Port {
        /// Which field.
        what: &'static str,
        /// As sent.
        value: u32,
    },
    /// An enum value that this version does not know.
    #[error("{what} has the unknown value {value}")]
    Enum {
        /// Which field.
        what: &'static str,
        /// As sent.
        value: i32,
    },
    /// A gateway without destination.
    #[error("a gateway without destination")]
    NoDestination,
    /// Required text that is missing.
    #[error("{0} is empty")]
    Empty(&'static str),
}

/// 4 or 16 bytes in network order; IPv4-mapped addresses are folded.
///
/// # Errors
/// [`InvalidPart::AddressLength`].
pub fn ip(bytes: &[u8]) -> Result<IpAddr, InvalidPart> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::from(v4));
    }
    let v6 = <[u8; 16]>::try_from(bytes).map_err(|_| InvalidPart::AddressLength(bytes.len()))?;
    Ok(IpAddr::from(v6).to_canonical())
}

fn port(what: &'static str, value: u32) -> Result<u16, InvalidPart> {
    match u16::try_from(value) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(InvalidPart::Port { what, value }),
    }
}

/// 0 stands for "none".
fn optional_port(what: &'static str, value: u32) -> Result<Option<u16>, InvalidPart> {
    if value == 0 { Ok(None) } else { port(what, value).map(Some) }
}

fn known<T: TryFrom<i32>>(what: &'static str, value: i32) -> Result<T, InvalidPart> {
    T::try_from(value).map_err(|_| InvalidPart::Enum { what, value })
}

fn required<'a>(what: &'static str, text: &'a str) -> Result<&'a str, InvalidPart> {
    if text.is_empty() { Err(InvalidPart::Empty(what)) } else { Ok(text) }
}

fn or_default<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn gateway(message: &wire::GatewayAddress, names: &mut Names) -> Result<Gateway, InvalidPart> {
    use wire::gateway_address::Destination;
    let destination = match message.destination.as_ref().ok_or(InvalidPart::NoDestination)? {
        Destination::Hostname(name) => GatewayDestination::Hostname(ServiceName {
            namespace: names.share(&name.namespace),
            hostname: names.share(required("gateway hostname", &name.hostname)?),
        }),
        Destination::Address(address) => GatewayDestination::Address(NetworkAddress::new(
            names.share(&address.network).into(),
            ip(&address.address)?,
        )),
    };
    let hbone_port = optional_port("hbone_mtls_port", message.hbone_mtls_port)?.unwrap_or(HBONE_PORT);
    Ok(Gateway { destination, hbone_port })
}
