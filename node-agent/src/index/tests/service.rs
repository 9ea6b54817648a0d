//! Services, and the endpoints that join pods to them.

use super::*;

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
            port_names: [("http".to_owned(), 80), ("admin".to_owned(), 81)].into(),
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
fn a_client_keeps_its_endpoint_for_as_long_as_the_service_says() {
    for (affinity, config, expect) in [
        (json!(null), json!(null), 0),
        (json!("None"), json!({"clientIP": {"timeoutSeconds": 60}}), 0),
        (json!("ClientIP"), json!(null), 10_800),
        (json!("ClientIP"), json!({"clientIP": {"timeoutSeconds": 60}}), 60),
    ] {
        let mut index = index();
        let object = with(service("cart", "10.96.0.7"), "/spec/sessionAffinity", affinity.clone());
        apply(&mut index, Kind::Service, with(object, "/spec/sessionAffinityConfig", config));
        match index.resource(&service_key("cart")).unwrap().r#type {
            Some(proto::address::Type::Service(service)) => {
                assert_eq!(service.session_affinity_seconds, expect, "{affinity}");
            }
            other => panic!("{other:?}"),
        }
    }
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

/// Whoever may write slices in one namespace makes no pod of another a part of anything: only its address, as a workload
/// of the slice's own namespace.
#[test]
fn a_slice_has_no_pods_of_other_namespaces() {
    let mut index = index();
    apply(&mut index, Kind::Pod, pod("p", "10.0.0.9"));
    let foreign = |object: Value| with(object, "/metadata/namespace", json!("evil"));
    apply(&mut index, Kind::Service, foreign(service("cart", "10.96.0.7")));
    let claims = foreign(slice("cart-1", "cart", json!([endpoint("p", true)])));
    let changes = apply(&mut index, Kind::EndpointSlice, claims);
    let address = Key::Endpoint(ObjectName::new("evil", "cart-1"), "10.0.0.9".parse().unwrap());
    assert!(!changes.keys.contains(&pod_key("p")) && changes.keys.contains(&address), "{changes:?}");
    assert!(workload(&index, "p").unwrap().services.is_empty());
    let Some(proto::address::Type::Workload(endpoint)) = index.resource(&address).unwrap().r#type else {
        panic!()
    };
    assert_eq!((&*endpoint.namespace, endpoint.network_mode()), ("evil", proto::NetworkMode::HostNetwork));
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
fn what_is_being_ended_says_whether_it_serves() {
    use proto::WorkloadStatus::{Healthy, Unhealthy};
    for (ready, terminating, expect) in [
        (true, false, (Healthy, false)),
        (true, true, (Unhealthy, true)),
        (false, true, (Unhealthy, false)),
        (false, false, (Unhealthy, false)),
    ] {
        let mut index = index();
        let condition = json!([{"type": "Ready", "status": if ready { "True" } else { "False" }}]);
        let mut object = with(pod("p", "10.0.0.9"), "/status/conditions", condition);
        if terminating {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        apply(&mut index, Kind::Pod, object);
        apply(&mut index, Kind::Service, service("cart", "10.96.0.7"));
        let conditions =
            json!({"ready": ready && !terminating, "serving": ready, "terminating": terminating});
        let endpoint = with(endpoint("p", true), "/conditions", conditions);
        apply(&mut index, Kind::EndpointSlice, slice("cart-1", "cart", json!([endpoint])));
        let workload = workload(&index, "p").unwrap();
        assert_eq!(
            (workload.status(), workload.draining),
            expect,
            "ready {ready}, terminating {terminating}"
        );
        assert_eq!(workload.services.len(), 1);
    }
}

fn outside(index: &Index, slice: &str, ip: &str) -> proto::Workload {
    let key = Key::Endpoint(ObjectName::new("shop", slice), ip.parse().unwrap());
    match index.resource(&key).unwrap().r#type {
        Some(proto::address::Type::Workload(workload)) => workload,
        other => panic!("{other:?}"),
    }
}

#[test]
fn conditions_of_an_endpoint_that_is_no_pod() {
    use proto::WorkloadStatus::{Healthy, Unhealthy};
    for (conditions, expect) in [
        (json!(null), (Healthy, false)),
        (json!({"ready": false}), (Unhealthy, false)),
        (json!({"ready": false, "terminating": true}), (Unhealthy, false)),
        (json!({"ready": false, "serving": true, "terminating": true}), (Unhealthy, true)),
        (json!({"ready": false, "serving": true}), (Unhealthy, false)),
        (json!({"ready": true, "serving": true, "terminating": true}), (Healthy, false)),
    ] {
        let mut index = index();
        apply(&mut index, Kind::Service, service("db", "10.96.0.1"));
        let endpoints = json!([{"addresses": ["172.30.0.1"], "conditions": conditions}]);
        apply(&mut index, Kind::EndpointSlice, slice("db", "db", endpoints));
        let workload = outside(&index, "db", "172.30.0.1");
        assert_eq!((workload.status(), workload.draining), expect, "{conditions}");
    }
}

#[test]
fn an_endpoint_that_is_no_pod_is_where_its_node_is() {
    let mut index = index();
    apply(&mut index, Kind::Service, service("db", "10.96.0.1"));
    let endpoints = json!([{"addresses": ["172.30.0.1"], "nodeName": "node-9"},
                           {"addresses": ["172.30.0.2"]}]);
    apply(&mut index, Kind::EndpointSlice, slice("db", "db", endpoints));
    let zone = |index: &Index, ip| outside(index, "db", ip).locality.map(|locality| locality.zone);
    assert_eq!(zone(&index, "172.30.0.1"), None);
    let node =
        |zone: &str| json!({"metadata": {"name": "node-9", "labels": {"topology.kubernetes.io/zone": zone}}});
    let key = Key::Endpoint(ObjectName::new("shop", "db"), "172.30.0.1".parse().unwrap());
    for (name, keys) in
        [("z1", BTreeSet::from([key.clone()])), ("z1", BTreeSet::new()), ("z2", BTreeSet::from([key]))]
    {
        assert_eq!(apply(&mut index, Kind::Node, node(name)).keys, keys);
        assert_eq!(zone(&index, "172.30.0.1").as_deref(), Some(name));
    }
    assert_eq!(zone(&index, "172.30.0.2"), None);
    index.handle(Event::Deleted(Kind::EndpointSlice, ObjectName::new("shop", "db")));
    assert_eq!(apply(&mut index, Kind::Node, node("z3")).keys, BTreeSet::new());
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
