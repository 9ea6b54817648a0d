//! The lab: a cluster of network namespaces with an API server, and what the suites share.

pub mod api;
