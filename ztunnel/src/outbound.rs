//! Connections that pods open: identify, plan, connect, copy.

pub mod plan;
