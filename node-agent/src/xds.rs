//! Serves the model to the proxies as delta xDS.
//!
//! `snapshot` has the current resources and their versions, `session` decides what one client lacks, `server` is the
//! gRPC around them. `remote` is the same for proxies on the network, `admission` decides who they are, `scope` what they
//! are told. **Invariant:** nothing is answered before the model is complete, since a proxy would take what
//! is not there yet for deleted.

pub mod admission;
pub mod remote;
pub mod scope;
pub mod server;
pub mod session;
pub mod snapshot;

#[cfg(test)]
mod tests;
