//! The agent of one node: it watches the API server, keeps the mesh model, serves it to the node's proxies, and
//! enrols the node's pods. Its second role is the certificate authority.
//!
//! **Invariant:** only `watch` and `ca` talk to the API server, only `datapath` to the kernel's BPF; `index` is pure.

pub mod app;
pub mod ca;
pub mod causes;
pub mod cluster;
pub mod cni;
pub mod command_line;
pub mod config;
pub mod datapath;
pub mod drops;
pub mod enrol;
pub mod index;
pub mod metrics;
pub mod model;
pub mod netns_of_pod;
pub mod notices;
pub mod older;
pub mod parts;
pub mod pods;
pub mod upkeep;
pub mod verdicts;
pub mod watch;
pub mod xds;
