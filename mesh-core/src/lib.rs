//! What two of the daemons share; a thing that only one of them uses does not belong here.
//!
//! **Invariant:** knows neither Kubernetes nor eBPF.

pub mod addr;
pub mod allowance;
pub mod authz;
pub mod backoff;
pub mod certs;
pub mod convert;
pub mod copy;
pub mod drain;
pub mod followed;
pub mod hbone;
pub mod identity;
pub mod limits;
pub mod listener;
pub mod metrics;
pub mod pod_link;
pub mod pod_protocol;
pub mod proto;
pub mod readiness;
pub mod service;
pub mod status;
pub mod store;
pub mod tcp;
pub mod telemetry;
pub mod tls;
pub mod workload;
pub mod xds;

#[cfg(any(test, feature = "test-util"))]
pub mod test_ca;
#[cfg(any(test, feature = "test-util"))]
pub mod test_http2;
