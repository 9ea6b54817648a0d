//! The plan step by step, and the whole with a scripted kernel, API server and ztunnel.

mod cni;
mod fakes;
mod faults;
mod plan;
mod proof;
mod stuck;
mod whole;
mod world;

use mesh_core::proto::pods as proto;

use crate::index::event::ObjectName;
use crate::index::local::LocalPod;
use crate::index::membership::Membership;

/// A running member.
fn member(name: &str) -> LocalPod {
    LocalPod {
        name: ObjectName::new("shop", name),
        uid: format!("uid-{name}"),
        membership: Membership::Member,
        inherits: true,
        addresses: vec!["10.0.0.9".parse().unwrap()],
        probe_ports: [8080].into(),
        dns: true,
        annotated: false,
        finished: false,
        terminating: false,
        reported: None,
        proved: None,
        description: proto::Pod { uid: format!("uid-{name}"), name: name.to_owned(), ..Default::default() },
    }
}
