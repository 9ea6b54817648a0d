//! The API server as streams of typed events; the only user of the kube client beside ca.
