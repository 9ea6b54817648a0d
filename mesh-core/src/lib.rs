//! What two of the daemons share; a thing that only one of them uses does not belong here.
//!
//! **Invariant:** knows neither Kubernetes nor eBPF.

pub mod identity;
pub mod proto;
