//! The lab's API server against real clients: the `kubectl` of this machine and kube-rs. Needs no root.

mod answers;
mod apply;
mod cluster;
mod definitions;
mod families;
mod kubectl;
mod typed;
mod usage;
mod watcher;
