//! The lab's API server against real clients: the `kubectl` of this machine and kube-rs. Needs no root.

mod apply;
mod cluster;
mod definitions;
mod families;
mod kubectl;
mod watcher;
