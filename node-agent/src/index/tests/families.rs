//! Pods, services and slices of both IP families.

use super::*;

fn v6(text: &str) -> Vec<u8> {
    text.parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec()
}

fn dual_pod(name: &str) -> Value {
    with(pod(name, "10.0.0.9"), "/status/podIPs", json!([{"ip": "10.0.0.9"}, {"ip": "fd00::9"}]))
}

fn dual_service(name: &str) -> Value {
    let mut value = service(name, "10.96.0.7");
    value["spec"]["clusterIPs"] = json!(["10.96.0.7", "fd00:96::7"]);
    value["spec"]["ipFamilies"] = json!(["IPv4", "IPv6"]);
    value
}

/// The same endpoints as the IPv6 half of the service.
fn v6_slice(name: &str, service: &str, endpoints: Value) -> Value {
    let mut value = slice(name, service, endpoints);
    value["addressType"] = json!("IPv6");
    for endpoint in value["endpoints"].as_array_mut().unwrap() {
        endpoint["addresses"] = json!(["fd00::9"]);
    }
    value
}

fn services_of(index: &Index, name: &str) -> Vec<(String, proto::PortList)> {
    workload(index, name).unwrap().services.into_iter().collect()
}

#[test]
fn a_pod_has_all_its_addresses_and_joins_a_service_once() {
    let mut index = index();
    apply(&mut index, Kind::Service, dual_service("cart"));
    apply(&mut index, Kind::Pod, dual_pod("p"));
    assert_eq!(workload(&index, "p").unwrap().addresses, [vec![10, 0, 0, 9], v6("fd00::9")]);
    apply(&mut index, Kind::EndpointSlice, slice("cart-4", "cart", json!([endpoint("p", true)])));
    let joined = services_of(&index, "p");
    let changes =
        apply(&mut index, Kind::EndpointSlice, v6_slice("cart-6", "cart", json!([endpoint("p", true)])));
    assert_eq!(changes.keys, BTreeSet::from([pod_key("p")]), "the workload of the pod, no other");
    let expect = vec![("shop/cart.shop.svc.cluster.local".to_owned(), ports(&[(80, 8080), (81, 9000)]))];
    assert_eq!(joined, expect);
    assert_eq!(services_of(&index, "p"), expect, "the second slice adds nothing");
    index.handle(Event::Deleted(Kind::EndpointSlice, ObjectName::new("shop", "cart-4")));
    assert_eq!(services_of(&index, "p"), expect, "one slice is enough");
    index.handle(Event::Deleted(Kind::EndpointSlice, ObjectName::new("shop", "cart-6")));
    assert_eq!(services_of(&index, "p"), []);
}

#[test]
fn slices_that_disagree_for_a_moment() {
    // The controller writes one slice after the other.
    for (first, second, expect) in [(true, true, 1), (true, false, 1), (false, true, 1), (false, false, 0)] {
        let mut index = index();
        apply(&mut index, Kind::Service, dual_service("cart"));
        apply(&mut index, Kind::Pod, dual_pod("p"));
        apply(&mut index, Kind::EndpointSlice, slice("cart-4", "cart", json!([endpoint("p", first)])));
        apply(&mut index, Kind::EndpointSlice, v6_slice("cart-6", "cart", json!([endpoint("p", second)])));
        assert_eq!(services_of(&index, "p").len(), expect, "{first} and {second}");
    }
}

#[test]
fn a_service_has_all_its_addresses_and_says_its_families() {
    use proto::IpFamilies::{Automatic, Dual, Ipv4Only, Ipv6Only};
    for (families, ips, expect, addresses) in [
        (
            json!(["IPv4", "IPv6"]),
            json!(["10.96.0.7", "fd00:96::7"]),
            Dual,
            vec![vec![10, 96, 0, 7], v6("fd00:96::7")],
        ),
        (
            json!(["IPv6", "IPv4"]),
            json!(["fd00:96::7", "10.96.0.7"]),
            Dual,
            vec![v6("fd00:96::7"), vec![10, 96, 0, 7]],
        ),
        (json!(["IPv4"]), json!(["10.96.0.7"]), Ipv4Only, vec![vec![10, 96, 0, 7]]),
        (json!(["IPv6"]), json!(["fd00:96::7"]), Ipv6Only, vec![v6("fd00:96::7")]),
        (json!(null), json!(["10.96.0.7"]), Automatic, vec![vec![10, 96, 0, 7]]),
        (json!(["IPv4", "IPv6"]), json!(["None"]), Dual, vec![]),
    ] {
        let mut index = index();
        let mut value = service("cart", "10.96.0.7");
        value["spec"]["clusterIP"] = ips[0].clone();
        (value["spec"]["clusterIPs"], value["spec"]["ipFamilies"]) = (ips, families.clone());
        apply(&mut index, Kind::Service, value);
        let Some(proto::address::Type::Service(service)) =
            index.resource(&service_key("cart")).unwrap().r#type
        else {
            panic!("no service")
        };
        assert_eq!(service.ip_families(), expect, "{families}");
        let found: Vec<_> = service.addresses.into_iter().map(|address| address.address).collect();
        assert_eq!(found, addresses, "{families}");
    }
}

#[test]
fn an_endpoint_that_is_no_pod_is_one_workload_for_each_address() {
    let mut index = index();
    apply(&mut index, Kind::Service, dual_service("db"));
    let outside = json!([{"addresses": ["10.9.9.9"], "conditions": {"ready": true}}]);
    apply(&mut index, Kind::EndpointSlice, slice("db-4", "db", outside.clone()));
    let changes = apply(&mut index, Kind::EndpointSlice, v6_slice("db-6", "db", outside));
    let key = Key::Endpoint(ObjectName::new("shop", "db-6"), "fd00::9".parse().unwrap());
    assert_eq!(changes.keys, BTreeSet::from([key.clone()]));
    let Some(proto::address::Type::Workload(workload)) = index.resource(&key).unwrap().r#type else {
        panic!("no workload")
    };
    assert_eq!(workload.addresses, [v6("fd00::9")]);
    assert!(workload.services.contains_key("shop/db.shop.svc.cluster.local"));
}
