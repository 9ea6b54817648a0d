//! The model as a whole; each kind has a file below.

mod authorization_policy;
mod entry;
mod families;
mod membership;
mod network;
mod order;
mod peer_authentication;
mod pod;
mod service;
mod verdicts;

use std::collections::BTreeSet;

use mesh_core::proto::workload as proto;
use serde_json::{Value, json};

use super::event::{Event, Kind, Object, ObjectName};
use super::{Changes, Config, Index, Key};

/// For the tests of other modules, too.
pub(crate) fn config() -> Config {
    Config {
        cluster_id: "Kubernetes".into(),
        trust_domain: "cluster.local".into(),
        cluster_domain: "cluster.local".into(),
        node_name: "node-1".into(),
        system_namespace: "ambit-system".into(),
        root_namespace: "istio-system".into(),
        dns_capture: true,
        excluded_namespaces: ["kube-system".to_owned()].into(),
    }
}

fn index() -> Index {
    Index::new(config())
}

fn decode<T: serde::de::DeserializeOwned>(value: Value) -> Box<T> {
    Box::new(serde_json::from_value(value).unwrap())
}

fn object(kind: Kind, value: Value) -> Object {
    match kind {
        Kind::Namespace => Object::Namespace(decode(value)),
        Kind::Node => Object::Node(decode(value)),
        Kind::Pod => Object::Pod(decode(value)),
        Kind::Service => Object::Service(decode(value)),
        Kind::EndpointSlice => Object::EndpointSlice(decode(value)),
        Kind::NetworkPolicy => Object::NetworkPolicy(decode(value)),
        Kind::PeerAuthentication => Object::PeerAuthentication(decode(value)),
        Kind::AuthorizationPolicy => Object::AuthorizationPolicy(decode(value)),
        Kind::ServiceEntry => Object::ServiceEntry(decode(value)),
        Kind::WorkloadEntry => Object::WorkloadEntry(decode(value)),
    }
}

fn apply(index: &mut Index, kind: Kind, value: Value) -> Changes {
    index.handle(Event::Applied(object(kind, value)))
}

/// All policies have been told of.
fn policies_listed(index: &mut Index) {
    for kind in [Kind::PeerAuthentication, Kind::AuthorizationPolicy] {
        index.handle(Event::Listed(kind));
    }
}

/// A running, ready pod on node-1.
fn pod(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}"), "labels": {}, "annotations": {}},
        "spec": {"nodeName": "node-1", "serviceAccountName": "cart", "containers": [{"name": "app"}]},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                   "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn service(name: &str, vip: &str) -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": name},
        "spec": {"clusterIP": vip, "clusterIPs": [vip], "ipFamilies": ["IPv4"],
                 "ports": [{"name": "http", "port": 80, "targetPort": 8080},
                           {"name": "admin", "port": 81, "targetPort": "admin"},
                           {"name": "dns", "port": 53, "protocol": "UDP"}]},
    })
}

fn slice(name: &str, service: &str, endpoints: Value) -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "admin", "port": 9000},
                  {"name": "dns", "port": 53, "protocol": "UDP"}],
        "endpoints": endpoints,
    })
}

fn endpoint(pod: &str, ready: bool) -> Value {
    json!({"addresses": ["10.0.0.9"], "conditions": {"ready": ready},
           "targetRef": {"kind": "Pod", "name": pod, "namespace": "shop", "uid": format!("uid-{pod}")}})
}

fn pod_key(name: &str) -> Key {
    Key::Pod(ObjectName::new("shop", name))
}

fn service_key(name: &str) -> Key {
    Key::Service(ObjectName::new("shop", name))
}

fn workload(index: &Index, name: &str) -> Option<proto::Workload> {
    match index.resource(&pod_key(name))?.r#type? {
        proto::address::Type::Workload(workload) => Some(workload),
        proto::address::Type::Service(service) => panic!("{service:?} is no workload"),
    }
}

fn ports(list: &[(u32, u32)]) -> proto::PortList {
    let port = |(service_port, target_port): &(u32, u32)| proto::Port {
        service_port: *service_port,
        target_port: *target_port,
        app_protocol: 0,
    };
    proto::PortList { ports: list.iter().map(port).collect() }
}

/// Sets a value, also a new one.
fn with(mut object: Value, pointer: &str, value: Value) -> Value {
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    object.pointer_mut(parent).unwrap()[field.replace("~1", "/")] = value;
    object
}

#[test]
fn an_update_without_meaning_touches_nothing() {
    let mut index = index();
    apply(&mut index, Kind::Pod, pod("p", "10.0.0.9"));
    apply(&mut index, Kind::Service, service("cart", "10.96.0.7"));
    apply(&mut index, Kind::EndpointSlice, slice("cart-1", "cart", json!([endpoint("p", true)])));
    let heartbeat = with(pod("p", "10.0.0.9"), "/metadata/resourceVersion", json!("77"));
    assert_eq!(apply(&mut index, Kind::Pod, heartbeat), Changes::default());
    assert_eq!(apply(&mut index, Kind::Service, service("cart", "10.96.0.7")), Changes::default());
    let same = slice("cart-1", "cart", json!([endpoint("p", true)]));
    assert_eq!(apply(&mut index, Kind::EndpointSlice, same), Changes::default());
}

#[test]
fn a_bad_object_is_reported_and_what_worked_stays() {
    let mut index = index();
    apply(&mut index, Kind::Pod, pod("p", "10.0.0.9"));
    apply(&mut index, Kind::Service, service("cart", "10.96.0.7"));
    for (kind, bad, reason) in [
        (Kind::Pod, with(pod("p", "x"), "/status/podIPs", json!([{"ip": "10.0.0.900"}])), "10.0.0.900"),
        (Kind::Service, service("cart", "ten"), "ten"),
        (Kind::Service, with(service("cart", "10.96.0.7"), "/spec/ports/0/port", json!(65536)), "65536"),
        (Kind::EndpointSlice, slice("s", "cart", json!([{"addresses": ["nowhere"]}])), "nowhere"),
    ] {
        let changes = apply(&mut index, kind, bad);
        assert!(changes.keys.is_empty());
        assert!(changes.problems[0].reason.contains(reason), "{:?}", changes.problems);
    }
    let unreadable =
        Event::Unreadable { kind: Kind::Pod, name: ObjectName::new("shop", "p"), reason: "odd".into() };
    assert_eq!(index.handle(unreadable).problems.len(), 1);
    assert!(workload(&index, "p").is_some());
    assert!(index.resource(&service_key("cart")).is_some());
}

#[test]
fn a_list_removes_what_is_not_in_it() {
    let mut index = index();
    for name in ["stays", "goes", "bad"] {
        apply(&mut index, Kind::Pod, pod(name, "10.0.0.9"));
    }
    apply(&mut index, Kind::Service, service("cart", "10.96.0.7"));
    index.handle(Event::Restarted(Kind::Pod));
    apply(&mut index, Kind::Pod, pod("stays", "10.0.0.9"));
    // A list that broke off says nothing; the next one counts from its start.
    index.handle(Event::Restarted(Kind::Pod));
    apply(&mut index, Kind::Pod, pod("stays", "10.0.0.9"));
    let name = ObjectName::new("shop", "bad");
    index.handle(Event::Unreadable { kind: Kind::Pod, name, reason: "odd".into() });
    let changes = index.handle(Event::Listed(Kind::Pod));
    assert_eq!(changes.keys, BTreeSet::from([pod_key("goes")]));
    assert!(workload(&index, "stays").is_some() && workload(&index, "bad").is_some());
    assert!(index.resource(&service_key("cart")).is_some(), "another kind");
}

#[test]
fn is_synced_when_every_kind_was_listed() {
    let mut index = index();
    for kind in Kind::ALL {
        assert!(!index.is_synced());
        index.handle(Event::Restarted(kind));
        index.handle(Event::Listed(kind));
    }
    assert!(index.is_synced());
    index.handle(Event::Restarted(Kind::Pod));
    assert!(index.is_synced(), "what is known stays in use during a relist");
}
