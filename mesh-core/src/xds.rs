//! Configuration from the node agent: a delta xDS client.
//!
//! [`stream`] is the protocol without any I/O, [`client`] its gRPC shell, [`mesh`] puts resources into the store.
//! **Invariant:** a bad resource is reported (NACK) and skipped; what was good before stays, and the rest of the
//! response is applied. Where nothing was before, the resource is not as if it did not exist: what it names is refused.

pub mod client;
pub mod mesh;
pub mod metrics;
pub mod stream;

/// What a client says of itself that takes a response in parts (`DeltaDiscoveryResponse.continues`).
pub const IN_PARTS: &str = "ambit.io/parts";

/// What takes resources in; a call is one response of the server.
pub trait Handler {
    /// Applies updates and removals of one type, returns what it had to skip.
    fn apply(&mut self, type_url: &str, updates: Vec<Update>, removed: &[String]) -> Vec<Rejected>;
}

/// A resource that is new or has changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    /// Resource name, unique in its type.
    pub name: String,
    /// Type URL and bytes; None when the server sent no body.
    pub body: Option<prost_types::Any>,
}

/// A resource that was not taken over, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Its name.
    pub name: String,
    /// For people.
    pub reason: String,
    /// What becomes of the connections that it is about.
    pub effect: Effect,
}

/// What a refused resource leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Its last good version.
    LastGood,
    /// Refusals of connections to its addresses, so many of them.
    AddressesRefused(usize),
    /// Nothing that could be refused: what it is about is treated as if it did not exist.
    Unreadable,
    /// Denials of what the policy may have selected.
    Denied,
    /// Nothing, and nothing is lost.
    Nothing,
}

impl std::fmt::Display for Effect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::LastGood => f.write_str("its last good version stays in force"),
            Self::AddressesRefused(count) => write!(f, "connections to its addresses ({count}) are refused"),
            Self::Unreadable => f.write_str(
                "it has addresses that cannot be read: connections to them are taken for connections to the outside",
            ),
            Self::Denied => f.write_str("connections to everything that it may select are denied"),
            Self::Nothing => f.write_str("it is as if it did not exist"),
        }
    }
}
