//! The lab: a cluster in a box. Nodes and pods are network namespaces on a routed fabric, the API server is one of
//! our own that a stock `kubectl` works with, pods are made by real CNI plugins, and the daemons are the real binaries
//! with the capabilities they have in a cluster. The demo, the end-to-end suite and the benchmarks run in it.
//!
//! **Invariant:** nothing of a lab outlives it: what it makes carries the name of its run, and is removed when the lab
//! is dropped, interrupted, or found dead by the next one.

pub mod abuse;
pub mod api;
pub mod bench;
pub mod capture;
pub mod cgroup;
pub mod cluster;
pub mod cni;
pub mod controllers;
pub mod crash;
pub mod crowd;
pub mod demo;
pub mod dns;
pub mod envoy;
pub mod eventually;
pub mod example;
pub mod fabric;
pub mod faulty;
pub mod foreign;
pub mod kernel;
pub mod kube_proxy;
pub mod kubelet;
pub mod lab;
pub mod memory;
pub mod netns;
pub mod node;
pub mod peer;
pub mod picks;
pub mod policies;
pub mod raw_bpf;
pub mod reuse;
pub mod rootfs;
pub mod run;
pub mod sandbox;
pub mod shell;
pub mod stack;
pub mod tools;
pub mod upgrades;
pub mod workload;

pub use eventually::eventually;
pub use lab::Lab;
pub use stack::Stack;
