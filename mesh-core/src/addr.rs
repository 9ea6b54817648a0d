//! Address newtypes: every socket address that means something else has a type of its own.
//!
//! **Invariant:** IPv4-mapped IPv6 addresses are folded into IPv4 on entry, so that one address has one form
//! wherever it is compared, hashed or logged.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Port of HBONE on every workload (Istio's).
pub const HBONE_PORT: u16 = 15008;

/// Network id of a mesh: addresses are unique within one. Empty in a mesh of one network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Network(Arc<str>);

impl Network {
    /// The id as configured, e.g. `""` or `network1`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Network {
    fn from(id: &str) -> Self {
        Self(id.into())
    }
}

impl From<Arc<str>> for Network {
    fn from(id: Arc<str>) -> Self {
        Self(id)
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::from("")
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An IP address and the network it is meant in; prints as WDS aliases do, `network/ip`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// Where the address is valid.
    pub network: Network,
    /// Never IPv4-mapped.
    pub address: IpAddr,
}

impl NetworkAddress {
    /// Folds an IPv4-mapped address.
    pub fn new(network: Network, address: IpAddr) -> Self {
        Self { network, address: address.to_canonical() }
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

/// `ip:port` with an IPv4-mapped address folded.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

macro_rules! socket_address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(SocketAddr);

        impl $name {
            /// The plain address.
            pub fn get(self) -> SocketAddr {
                self.0
            }

            /// Its IP address.
            pub fn ip(self) -> IpAddr {
                self.0.ip()
            }

            /// Its port.
            pub fn port(self) -> u16 {
                self.0.port()
            }
        }

        impl From<SocketAddr> for $name {
            fn from(addr: SocketAddr) -> Self {
                Self(canonical(addr))
            }
        }

        impl From<(IpAddr, u16)> for $name {
            fn from((ip, port): (IpAddr, u16)) -> Self {
                Self::from(SocketAddr::new(ip, port))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

socket_address!(
    /// The far end of a connection that was accepted (`getpeername`).
    ClientAddr
);
socket_address!(
    /// Where the caller meant to go (`getsockname` of a socket that capture steered here).
    OrigDst
);
socket_address!(
    /// What a connection finally has to reach: the application's `pod IP:port`, and the CONNECT authority.
    Target
);
socket_address!(
    /// What the proxy itself dials next: the target, or a tunnel's port in front of it.
    NextHop
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_are_folded() {
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(OrigDst::from(mapped).to_string(), "10.0.0.1:80");
        let address = NetworkAddress::new(Network::default(), mapped.ip());
        assert_eq!(address.to_string(), "/10.0.0.1");
        let v6: SocketAddr = "[fd00::1]:80".parse().unwrap();
        assert_eq!(ClientAddr::from(v6).get(), v6);
    }
}
