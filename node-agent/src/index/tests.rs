//! The model, kind by kind, and as a whole under events in any order.

mod authorization_policy;
mod families;
mod membership;
mod network;
mod order;
mod peer_authentication;
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
    }
}

fn apply(index: &mut Index, kind: Kind, value: Value) -> Changes {
    index.handle(Event::Applied(object(kind, value)))
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

#[test]
fn a_pod_is_a_workload() {
    let mut index = index();
    let mut value = pod("cart-6b7f-xyz", "10.0.0.9");
    value["metadata"]["labels"] = json!({"app": "cart", "version": "v2"});
    value["metadata"]["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "cart", "uid": "1", "controller": true}]);
    let changes = apply(&mut index, Kind::Pod, value);
    assert_eq!(changes.keys, BTreeSet::from([pod_key("cart-6b7f-xyz")]));
    assert!(changes.local);
    let expect = proto::Workload {
        uid: "Kubernetes//Pod/shop/cart-6b7f-xyz".into(),
        name: "cart-6b7f-xyz".into(),
        namespace: "shop".into(),
        addresses: vec![vec![10, 0, 0, 9]],
        trust_domain: "cluster.local".into(),
        cluster_id: "Kubernetes".into(),
        service_account: "cart".into(),
        node: "node-1".into(),
        canonical_name: "cart".into(),
        canonical_revision: "v2".into(),
        workload_type: proto::WorkloadType::Pod.into(),
        workload_name: "cart".into(),
        ..Default::default()
    };
    assert_eq!(workload(&index, "cart-6b7f-xyz"), Some(expect));
    assert_eq!(index.resource_name(&pod_key("cart-6b7f-xyz")), "Kubernetes//Pod/shop/cart-6b7f-xyz");
}

/// One change to the pod above, and what it does to its workload.
#[test]
fn what_decides_a_workload() {
    type Field = fn(&proto::Workload) -> String;
    let tunnel: Field = |w| format!("{:?}", w.tunnel_protocol());
    let status: Field = |w| format!("{:?}", w.status());
    let name: Field = |w| format!("{} {}", w.canonical_name, w.canonical_revision);
    let mode: Field = |w| format!("{:?}", w.network_mode());
    let account: Field = |w| w.service_account.clone();
    let addresses: Field = |w| format!("{:?}", w.addresses);
    for (pointer, value, field, expect) in [
        ("/metadata/annotations/ambient.istio.io~1redirection", json!("enabled"), tunnel, "Hbone"),
        ("/metadata/annotations/ambient.istio.io~1redirection", json!("disabled"), tunnel, "None"),
        ("/metadata/labels/ambient.istio.io~1redirection", json!("enabled"), tunnel, "None"),
        ("/metadata/labels/istio.io~1dataplane-mode", json!("ambient"), tunnel, "None"),
        ("/status/conditions", json!([{"type": "Ready", "status": "False"}]), status, "Unhealthy"),
        ("/status/conditions", json!([]), status, "Unhealthy"),
        ("/status/conditions", json!([{"type": "Ready", "status": "True"}]), status, "Healthy"),
        ("/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z"), status, "Unhealthy"),
        ("/metadata/labels/app", json!("a"), name, "a latest"),
        ("/metadata/labels", json!({"app": "a", "app.kubernetes.io/name": "b", "version": "1"}), name, "b 1"),
        (
            "/metadata/labels",
            json!({"app.kubernetes.io/name": "b", "service.istio.io/canonical-name": "c",
                   "app.kubernetes.io/version": "2", "version": "1"}),
            name,
            "c 2",
        ),
        (
            "/metadata/labels",
            json!({"service.istio.io/canonical-revision": "3", "app.kubernetes.io/version": "2"}),
            name,
            "p 3",
        ),
        ("/metadata/labels/app", json!(""), name, "p latest"),
        ("/spec/hostNetwork", json!(true), mode, "HostNetwork"),
        ("/spec/hostNetwork", json!(false), mode, "Standard"),
        ("/spec/serviceAccountName", json!(""), account, "default"),
        (
            "/status/podIPs",
            json!([{"ip": "10.0.0.9"}, {"ip": "::1"}]),
            addresses,
            "[[10, 0, 0, 9], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]]",
        ),
        ("/status/podIPs", json!(null), addresses, "[[10, 0, 0, 9]]"),
    ] {
        let mut index = index();
        apply(&mut index, Kind::Pod, with(pod("p", "10.0.0.9"), pointer, value.clone()));
        let workload = workload(&index, "p").unwrap();
        assert_eq!(field(&workload), expect, "{pointer} = {value}");
    }
}

/// Sets a value, also a new one.
fn with(mut object: Value, pointer: &str, value: Value) -> Value {
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    object.pointer_mut(parent).unwrap()[field.replace("~1", "/")] = value;
    object
}

#[test]
fn owners_as_istio_names_them() {
    let mut index = index();
    for (kind, name, hash, expect_type, expect_name) in [
        ("ReplicaSet", "cart-6b7f4d9c88", Some("6b7f4d9c88"), proto::WorkloadType::Deployment, "cart"),
        ("ReplicaSet", "cart-v2-7c9bd", None, proto::WorkloadType::Deployment, "cart-v2"),
        ("ReplicaSet", "cart-handmade", None, proto::WorkloadType::Pod, "cart-handmade"),
        ("ReplicaSet", "cart", None, proto::WorkloadType::Pod, "cart"),
        ("Job", "report-28912345", None, proto::WorkloadType::Cronjob, "report"),
        ("Job", "report-289", None, proto::WorkloadType::Job, "report-289"),
        ("Job", "-28912345", None, proto::WorkloadType::Job, "-28912345"),
        ("DaemonSet", "agent", None, proto::WorkloadType::Pod, "agent"),
    ] {
        let mut value = pod("p", "10.0.0.9");
        value["metadata"]["ownerReferences"] = json!([
            {"apiVersion": "v1", "kind": "Deployment", "name": "not-the-controller", "uid": "0"},
            {"apiVersion": "v1", "kind": kind, "name": name, "uid": "1", "controller": true},
        ]);
        if let Some(hash) = hash {
            value["metadata"]["labels"] = json!({"pod-template-hash": hash});
        }
        apply(&mut index, Kind::Pod, value);
        let workload = workload(&index, "p").unwrap();
        assert_eq!(
            (workload.workload_type(), &*workload.workload_name),
            (expect_type, expect_name),
            "{kind} {name}"
        );
    }
}

#[test]
fn a_finished_pod_leaves_at_once() {
    for phase in ["Succeeded", "Failed"] {
        let mut index = index();
        apply(&mut index, Kind::Pod, pod("job", "10.0.0.9"));
        assert!(workload(&index, "job").is_some());
        let changes =
            apply(&mut index, Kind::Pod, with(pod("job", "10.0.0.9"), "/status/phase", json!(phase)));
        assert_eq!(changes.keys, BTreeSet::from([pod_key("job")]), "{phase}");
        assert_eq!(workload(&index, "job"), None, "{phase}");
    }
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
fn a_service_with_its_ways_to_choose() {
    let balance = |mode: proto::load_balancing::Mode, scopes: &[i32], health: i32| {
        Some(proto::LoadBalancing {
            routing_preference: scopes.to_vec(),
            mode: mode.into(),
            health_policy: health,
        })
    };
    use proto::load_balancing::Mode;
    for (field, value, expect) in [
        ("sessionAffinity", json!("None"), None),
        ("internalTrafficPolicy", json!("Cluster"), None),
        ("internalTrafficPolicy", json!("Local"), balance(Mode::Strict, &[4], 0)),
        ("trafficDistribution", json!("PreferClose"), balance(Mode::Failover, &[6, 1, 2], 0)),
        ("trafficDistribution", json!("PreferSameZone"), balance(Mode::Failover, &[6, 1, 2], 0)),
        ("trafficDistribution", json!("PreferSameNode"), balance(Mode::Failover, &[6, 1, 2, 3, 4], 0)),
        ("publishNotReadyAddresses", json!(true), balance(Mode::UnspecifiedMode, &[], 1)),
    ] {
        let mut index = index();
        let pointer = format!("/spec/{field}");
        let changes =
            apply(&mut index, Kind::Service, with(service("cart", "10.96.0.7"), &pointer, value.clone()));
        assert_eq!(changes.keys, BTreeSet::from([service_key("cart")]));
        let expect = proto::Service {
            name: "cart".into(),
            namespace: "shop".into(),
            hostname: "cart.shop.svc.cluster.local".into(),
            addresses: vec![proto::NetworkAddress { address: vec![10, 96, 0, 7], ..Default::default() }],
            ports: ports(&[(80, 8080), (81, 0)]).ports,
            ip_families: proto::IpFamilies::Ipv4Only.into(),
            canonical: true,
            load_balancing: expect,
            ..Default::default()
        };
        let resource = proto::Address { r#type: Some(proto::address::Type::Service(expect)) };
        assert_eq!(index.resource(&service_key("cart")), Some(resource), "{field} = {value}");
    }
    assert_eq!(index().resource_name(&service_key("cart")), "shop/cart.shop.svc.cluster.local");
}

#[test]
fn services_without_an_address_and_aliases() {
    let mut index = index();
    apply(&mut index, Kind::Service, service("headless", "None"));
    match index.resource(&service_key("headless")).unwrap().r#type {
        Some(proto::address::Type::Service(service)) => assert!(service.addresses.is_empty()),
        other => panic!("{other:?}"),
    }
    apply(&mut index, Kind::Service, service("alias", "10.96.0.8"));
    let alias = with(service("alias", "10.96.0.8"), "/spec/type", json!("ExternalName"));
    let changes = apply(&mut index, Kind::Service, alias);
    assert_eq!(changes.keys, BTreeSet::from([service_key("alias")]));
    assert_eq!(index.resource(&service_key("alias")), None);
    let mut balanced = service("lb", "10.96.0.9");
    balanced["status"] = json!({"loadBalancer": {"ingress": [
        {"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "Proxy"}, {"hostname": "lb.example"}]}});
    apply(&mut index, Kind::Service, balanced);
    match index.resource(&service_key("lb")).unwrap().r#type {
        Some(proto::address::Type::Service(service)) => {
            let addresses: Vec<_> = service.addresses.iter().map(|a| a.address.clone()).collect();
            assert_eq!(addresses, [vec![10, 96, 0, 9], vec![203, 0, 113, 1]]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn endpoints_join_pods_and_services() {
    let mut index = index();
    apply(&mut index, Kind::Pod, pod("p", "10.0.0.9"));
    let changes =
        apply(&mut index, Kind::EndpointSlice, slice("cart-1", "cart", json!([endpoint("p", true)])));
    assert_eq!(changes.keys, BTreeSet::from([pod_key("p")]));
    assert!(workload(&index, "p").unwrap().services.is_empty(), "no such service yet");

    let changes = apply(&mut index, Kind::Service, service("cart", "10.96.0.7"));
    assert_eq!(changes.keys, BTreeSet::from([pod_key("p"), service_key("cart")]));
    let services = workload(&index, "p").unwrap().services;
    let expect = [("shop/cart.shop.svc.cluster.local".to_owned(), ports(&[(80, 8080), (81, 9000)]))];
    assert_eq!(services, expect.into());

    let other = with(endpoint("p", true), "/targetRef/uid", json!("uid-of-an-earlier-p"));
    apply(&mut index, Kind::EndpointSlice, slice("cart-1", "cart", json!([other])));
    assert!(workload(&index, "p").unwrap().services.is_empty(), "another pod of that name");
}

#[test]
fn readiness_of_pod_and_slice() {
    for (pod_ready, slice_ready, healthy, member) in [
        (true, true, true, true),
        (true, false, true, false),
        (false, true, false, true),
        (false, false, false, true),
    ] {
        let mut index = index();
        let ready = json!([{"type": "Ready", "status": if pod_ready { "True" } else { "False" }}]);
        apply(&mut index, Kind::Pod, with(pod("p", "10.0.0.9"), "/status/conditions", ready));
        apply(&mut index, Kind::Service, service("cart", "10.96.0.7"));
        apply(&mut index, Kind::EndpointSlice, slice("cart-1", "cart", json!([endpoint("p", slice_ready)])));
        let workload = workload(&index, "p").unwrap();
        let is_healthy = workload.status() == proto::WorkloadStatus::Healthy;
        assert_eq!(
            (is_healthy, !workload.services.is_empty()),
            (healthy, member),
            "{pod_ready} {slice_ready}"
        );
    }
}

#[test]
fn a_change_in_a_slice_touches_the_endpoint_that_changed() {
    let mut index = index();
    apply(
        &mut index,
        Kind::EndpointSlice,
        slice("s", "cart", json!([endpoint("a", true), endpoint("b", true)])),
    );
    let changes = apply(
        &mut index,
        Kind::EndpointSlice,
        slice("s", "cart", json!([endpoint("a", true), endpoint("b", false), endpoint("c", true)])),
    );
    assert_eq!(changes.keys, BTreeSet::from([pod_key("b"), pod_key("c")]));
    let changes = apply(&mut index, Kind::EndpointSlice, slice("s", "cart", json!([endpoint("b", false)])));
    assert_eq!(changes.keys, BTreeSet::from([pod_key("a"), pod_key("c")]));
    let moved = slice("s", "other", json!([endpoint("b", false)]));
    assert_eq!(apply(&mut index, Kind::EndpointSlice, moved).keys, BTreeSet::from([pod_key("b")]));
    let gone = index.handle(Event::Deleted(Kind::EndpointSlice, ObjectName::new("shop", "s")));
    assert_eq!(gone.keys, BTreeSet::from([pod_key("b")]));
}

#[test]
fn an_endpoint_that_is_no_pod_is_a_workload_of_its_own() {
    let mut index = index();
    apply(&mut index, Kind::Service, service("kubernetes", "10.96.0.1"));
    let endpoints = json!([{"addresses": ["172.30.0.1"], "nodeName": "control"}]);
    let changes = apply(&mut index, Kind::EndpointSlice, slice("kubernetes", "kubernetes", endpoints));
    let key = Key::Endpoint(ObjectName::new("shop", "kubernetes"), "172.30.0.1".parse().unwrap());
    assert_eq!(changes.keys, BTreeSet::from([key.clone()]));
    let uid = "Kubernetes/discovery.k8s.io/EndpointSlice/shop/kubernetes/172.30.0.1";
    assert_eq!(index.resource_name(&key), uid);
    match index.resource(&key).unwrap().r#type {
        Some(proto::address::Type::Workload(workload)) => {
            assert_eq!(workload.uid, uid);
            assert_eq!(workload.tunnel_protocol(), proto::TunnelProtocol::None);
            assert_eq!(workload.network_mode(), proto::NetworkMode::HostNetwork);
            assert_eq!(workload.status(), proto::WorkloadStatus::Healthy);
            assert!(workload.services.contains_key("shop/kubernetes.shop.svc.cluster.local"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn locality_comes_from_the_node() {
    let mut index = index();
    apply(&mut index, Kind::Pod, pod("p", "10.0.0.9"));
    let node = json!({"metadata": {"name": "node-1", "labels": {
        "topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": "z", "topology.istio.io/subzone": "s"}}});
    assert_eq!(apply(&mut index, Kind::Node, node.clone()).keys, BTreeSet::from([pod_key("p")]));
    let locality = proto::Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() };
    assert_eq!(workload(&index, "p").unwrap().locality, Some(locality));
    assert_eq!(apply(&mut index, Kind::Node, node), Changes::default());
    index.handle(Event::Deleted(Kind::Node, ObjectName::new("", "node-1")));
    assert_eq!(workload(&index, "p").unwrap().locality, None);
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

#[test]
fn a_static_pod_has_the_uid_that_the_runtime_knows() {
    let hash = "0123456789abcdef0123456789abcdef";
    let read = |uid: &str, annotations: serde_json::Value| {
        let pod = serde_json::json!({
            "metadata": {"namespace": "shop", "name": "a", "uid": uid, "annotations": annotations},
        });
        let pod = serde_json::from_value(pod).unwrap();
        let name = ObjectName::new("shop", "a");
        let pod = super::pod::Pod::read(&name, &pod).unwrap();
        (pod.uid, pod.runtime_uid)
    };
    let (own, others) = ("4f0c1b7e-5b1e-4c53-8f5e-1d2a3b4c5d6e", "aaaaaaaa-5b1e-4c53-8f5e-1d2a3b4c5d6e");
    let (config, mirror) = ("kubernetes.io/config.hash", "kubernetes.io/config.mirror");
    for (annotations, expect) in [
        (serde_json::json!({config: hash, mirror: hash}), hash),
        (serde_json::json!({config: hash}), own),
        (serde_json::json!({config: hash, mirror: "other"}), own),
        // Somebody would like to be another pod.
        (serde_json::json!({config: others, mirror: others}), own),
        (serde_json::json!({}), own),
    ] {
        assert_eq!(read(own, annotations.clone()), (own.to_owned(), expect.to_owned()), "{annotations}");
    }
}
