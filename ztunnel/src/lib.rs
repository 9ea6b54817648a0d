//! The node's L4 proxy: takes the connections that capture steers to it, and carries them over HBONE.

pub mod config;
pub mod inbound;
pub mod outbound;
