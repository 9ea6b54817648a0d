//! HBONE: a TCP connection as an HTTP/2 CONNECT stream inside mutual TLS, many of them on one connection.
//!
//! `request` is what CONNECT says (pure), `client` and `server` are the two ends of a tunnel, `pool` shares a client's
//! tunnels, `stream` is one connection in it as ordinary bytes. `conduct` ends a tunnel whose other end floods it.
//! Wire-compatible with Istio's ambient mesh.

pub mod client;
pub mod pool;
pub mod request;
pub mod server;
pub mod settings;
pub mod stream;
pub mod window;

mod conduct;
mod frames;

pub use self::client::{ConnectError, Connected, DialError};
pub use self::conduct::Pacer;
pub use self::request::{Authority, Baggage, ConnectRequest, Forwarded, Host, InvalidRequest, TraceParent};
pub use self::stream::{DeniedByPeer, HboneStream};

#[cfg(test)]
mod tests;
