//! Generated protocol types, one module a package; `proto/*.proto` says what each field means.

#![allow(
    missing_docs,
    clippy::all,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    reason = "generated code"
)]

/// The pod protocol between a node's agent and its ztunnel.
pub mod pods {
    tonic::include_proto!("ambit.pods.v1");
}
/// WDS: workloads and services.
pub mod workload {
    tonic::include_proto!("istio.workload");
}
/// L4 authorization policies.
pub mod security {
    tonic::include_proto!("istio.security");
}
/// Delta xDS transport.
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}
/// The certificate service.
pub mod ca {
    tonic::include_proto!("istio.v1.auth");
}

/// Type URL of [`workload::Address`] resources.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of [`security::Authorization`] resources.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
