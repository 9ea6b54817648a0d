//! Puts new pods into the mesh before their first packet: a thin plugin chained into the node's CNI configuration
//! asks this agent, over a unix socket, to enrol each pod that the container runtime sets up.
//!
//! **Invariant:** `spec`, `plugin`, `protocol` and `conflist` use std and serde_json only: they are all there is in the
//! plugin's binary.

pub mod conflist;
pub mod install;
pub mod plugin;
pub mod protocol;
pub mod server;
pub mod spec;
