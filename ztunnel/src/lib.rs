//! The node's L4 proxy: takes the connections that capture steers to it, and carries them over HBONE.
//!
//! Read `outbound` and `inbound` first: one connection each, top to bottom.

pub mod affinity;
pub mod app;
pub mod budget;
pub mod canary;
pub mod config;
pub mod connections;
pub mod denials;
pub mod descriptors;
pub mod dial;
pub mod dns;
pub mod dump;
pub mod expiry;
pub mod eyeballs;
pub mod hosts;
pub mod inbound;
pub mod metrics;
pub mod neighbours;
pub mod outbound;
pub mod pace;
pub mod passthrough;
pub mod pods;
pub mod policy;
pub mod proxy;
pub mod reason;
pub mod report;
pub mod sockets;
pub mod source;
pub mod tuples;
