//! What two of the daemons share; a thing that only one of them uses does not belong here.
//!
//! **Invariant:** knows neither Kubernetes nor eBPF.

pub mod addr;
pub mod authz;
pub mod convert;
pub mod identity;
pub mod proto;
pub mod service;
pub mod store;
pub mod workload;
