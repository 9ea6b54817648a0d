//! Configuration from the node agent: a delta xDS client.
//!
//! [`stream`] is the protocol without any I/O, [`client`] its gRPC shell, [`mesh`] puts resources into the store.
//! **Invariant:** a bad resource is reported (NACK) and skipped; what was good before stays, and the rest of the
//! response is applied.

pub mod client;
pub mod mesh;
pub mod stream;

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
}
