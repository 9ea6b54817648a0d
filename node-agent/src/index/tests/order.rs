//! Order does not matter: whatever the interleaving of the watches, the same resources come out in the end, and
//! following the changed keys alone leads there.

use std::collections::BTreeMap;

use mesh_core::proto::workload as proto;
use serde_json::json;

use super::{Event, Index, Kind, ObjectName, endpoint, index, object, pod, service, slice, with};

/// The histories of the objects: each in order, in any order among each other.
fn histories() -> Vec<Vec<Event>> {
    let applied = |kind, value| Event::Applied(object(kind, value));
    let deleted = |kind, name: &str| Event::Deleted(kind, ObjectName::new("shop", name));
    let captured = |name: &str, ip: &str| {
        with(pod(name, ip), "/metadata/annotations/ambient.istio.io~1redirection", json!("enabled"))
    };
    let node =
        |zone: &str| json!({"metadata": {"name": "node-1", "labels": {"topology.kubernetes.io/zone": zone}}});
    vec![
        vec![applied(Kind::Namespace, json!({"metadata": {"name": "shop"}}))],
        vec![applied(Kind::Node, node("a")), applied(Kind::Node, node("b"))],
        vec![
            applied(Kind::Pod, with(pod("a", "10.0.0.1"), "/status/podIPs", json!([]))),
            applied(Kind::Pod, captured("a", "10.0.0.1")),
        ],
        vec![
            applied(Kind::Pod, pod("b", "10.0.0.2")),
            deleted(Kind::Pod, "b"),
            applied(Kind::Pod, pod("b", "10.0.0.3")),
        ],
        vec![
            applied(Kind::Pod, pod("c", "10.0.0.4")),
            applied(Kind::Pod, with(pod("c", "10.0.0.4"), "/status/phase", json!("Failed"))),
        ],
        vec![
            applied(Kind::Service, service("cart", "10.96.0.1")),
            applied(Kind::Service, service("cart", "10.96.0.2")),
        ],
        vec![applied(Kind::Service, service("old", "10.96.0.3")), deleted(Kind::Service, "old")],
        vec![
            applied(
                Kind::EndpointSlice,
                slice("cart-1", "cart", json!([endpoint("a", false), endpoint("b", true)])),
            ),
            applied(
                Kind::EndpointSlice,
                slice("cart-1", "cart", json!([endpoint("a", true), endpoint("c", true)])),
            ),
        ],
        vec![
            applied(Kind::EndpointSlice, slice("old-1", "old", json!([endpoint("a", true)]))),
            applied(Kind::EndpointSlice, slice("old-1", "cart", json!([endpoint("b", true)]))),
        ],
        vec![applied(
            Kind::EndpointSlice,
            slice("own", "cart", json!([{"addresses": ["172.30.0.1", "172.30.0.2"]}])),
        )],
    ]
}

/// Resources as somebody has them who was told of the changed keys only.
fn follow(index: &mut Index, events: impl IntoIterator<Item = Event>) -> BTreeMap<String, proto::Address> {
    let mut known = BTreeMap::new();
    for event in events {
        for key in index.handle(event).keys {
            let name = index.resource_name(&key);
            match index.resource(&key) {
                Some(resource) => known.insert(name, resource),
                None => known.remove(&name),
            };
        }
    }
    known
}

/// xorshift: the same interleavings in every run.
fn random(state: &mut u64, below: usize) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    usize::try_from(*state % below as u64).unwrap()
}

fn interleaved(seed: u64) -> Vec<Event> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut left: Vec<_> = histories().into_iter().map(Vec::into_iter).collect();
    let mut events = Vec::new();
    while !left.is_empty() {
        let which = random(&mut state, left.len());
        match left[which].next() {
            Some(event) => events.push(event),
            None => drop(left.swap_remove(which)),
        }
    }
    events
}

#[test]
fn any_interleaving_leads_to_the_same_resources() {
    let expect = follow(&mut index(), histories().into_iter().flatten());
    let names: Vec<_> = expect.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "Kubernetes//Pod/shop/a",
            "Kubernetes//Pod/shop/b",
            "Kubernetes/discovery.k8s.io/EndpointSlice/shop/own/172.30.0.1",
            "Kubernetes/discovery.k8s.io/EndpointSlice/shop/own/172.30.0.2",
            "shop/cart.shop.svc.cluster.local",
        ]
    );
    for seed in 1..500 {
        let events = interleaved(seed);
        let found = follow(&mut index(), events.iter().cloned());
        assert_eq!(found, expect, "seed {seed}: {events:?}");
    }
}
