//! ServiceEntry and WorkloadEntry, and what they join to.

mod addresses;
mod budget;

use super::verdicts::verdicts;
use super::*;

fn service_entry(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"namespace": "shop", "name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": spec,
    })
}

fn workload_entry(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1beta1", "kind": "WorkloadEntry",
        "metadata": {"namespace": "shop", "name": name}, "spec": spec,
    })
}

/// Of one host and one port.
fn spec(resolution: &str, more: Value) -> Value {
    let mut spec = json!({
        "hosts": ["db.example"], "addresses": ["240.0.0.1"], "resolution": resolution,
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080}],
    });
    for (field, value) in more.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    spec
}

fn host(host: &str) -> Key {
    Key::Host(ObjectName::new("shop", host))
}

fn listed(entry: &str, place: &str) -> Key {
    Key::Listed(ObjectName::new("shop", entry), place.into())
}

fn entry_key(name: &str) -> Key {
    Key::WorkloadEntry(ObjectName::new("shop", name))
}

fn service_of(index: &Index, key: &Key) -> proto::Service {
    match index.resource(key).unwrap().r#type {
        Some(proto::address::Type::Service(service)) => service,
        other => panic!("{other:?}"),
    }
}

fn workload_of(index: &Index, key: &Key) -> proto::Workload {
    match index.resource(key).unwrap().r#type {
        Some(proto::address::Type::Workload(workload)) => workload,
        other => panic!("{other:?}"),
    }
}

/// Its services and where it has their ports.
fn joined(workload: &proto::Workload) -> Vec<(&str, Vec<(u32, u32)>)> {
    let ports = |list: &proto::PortList| list.ports.iter().map(|p| (p.service_port, p.target_port)).collect();
    workload.services.iter().map(|(service, list)| (service.as_str(), ports(list))).collect()
}

#[test]
fn hosts_are_services_and_listed_endpoints_are_workloads() {
    let mut index = index();
    let endpoints = json!({
        "hosts": ["db.example", "DB2.example"], "addresses": ["240.0.0.1", "240.1.0.0/16", "2001:db8::1/128"],
        "subjectAltNames": ["spiffe://cluster.local/ns/shop/sa/db"],
        "endpoints": [
            {"address": "192.0.2.1", "ports": {"http": 9090}, "weight": 3, "locality": "eu/a",
             "serviceAccount": "db", "labels": {"app": "db", "version": "v2"}},
            {"address": "2001:db8::2", "network": "far"},
        ],
    });
    let changes = apply(&mut index, Kind::ServiceEntry, service_entry("db", spec("STATIC", endpoints)));
    let keys =
        [host("db.example"), host("db2.example"), listed("db", "192.0.2.1"), listed("db", "2001:db8::2")];
    assert_eq!(changes.keys, BTreeSet::from(keys));

    let service = service_of(&index, &host("db2.example"));
    let address = |bytes: &[u8], length| proto::NetworkAddress {
        address: bytes.to_vec(),
        length,
        ..Default::default()
    };
    let v6: std::net::Ipv6Addr = "2001:db8::1".parse().unwrap();
    let expect = proto::Service {
        name: "db".into(),
        namespace: "shop".into(),
        hostname: "db2.example".into(),
        addresses: vec![
            address(&[240, 0, 0, 1], None),
            address(&[240, 1, 0, 0], Some(16)),
            address(&v6.octets(), None),
        ],
        ports: vec![proto::Port { service_port: 80, target_port: 8080, app_protocol: 1 }],
        subject_alt_names: vec!["spiffe://cluster.local/ns/shop/sa/db".into()],
        created: 1_767_225_600,
        ..Default::default()
    };
    assert_eq!(service, expect);
    assert_eq!(index.resource_name(&host("db2.example")), "shop/db2.example");

    let first = workload_of(&index, &listed("db", "192.0.2.1"));
    assert_eq!(first.uid, "Kubernetes/networking.istio.io/ServiceEntry/shop/db/192.0.2.1");
    assert_eq!(index.resource_name(&listed("db", "192.0.2.1")), first.uid);
    assert_eq!((first.addresses.clone(), first.capacity), (vec![vec![192, 0, 2, 1]], Some(3)));
    assert_eq!((&*first.service_account, &*first.canonical_revision), ("db", "v2"));
    let locality = first.locality.clone().unwrap();
    assert_eq!((&*locality.region, &*locality.zone, &*locality.subzone), ("eu", "a", ""));
    assert_eq!(
        (first.status(), first.tunnel_protocol(), first.network_mode()),
        (proto::WorkloadStatus::Healthy, proto::TunnelProtocol::None, proto::NetworkMode::Standard)
    );
    assert_eq!(
        joined(&first),
        [("shop/db.example", vec![(80, 9090)]), ("shop/db2.example", vec![(80, 9090)])]
    );
    let second = workload_of(&index, &listed("db", "2001:db8::2"));
    assert_eq!((&*second.network, second.capacity, &*second.canonical_name), ("far", None, "db"));
    assert_eq!(joined(&second)[0], ("shop/db.example", vec![(80, 8080)]));

    let moved = spec("STATIC", json!({"endpoints": [{"address": "192.0.2.1"}]}));
    let changes = apply(&mut index, Kind::ServiceEntry, service_entry("db", moved));
    assert!(
        changes.keys.contains(&listed("db", "2001:db8::2")) && changes.keys.contains(&host("db2.example"))
    );
    assert_eq!(index.resource(&listed("db", "2001:db8::2")), None);
    assert_eq!(index.resource(&host("db2.example")), None);
    let gone = index.handle(Event::Deleted(Kind::ServiceEntry, ObjectName::new("shop", "db")));
    assert_eq!(gone.keys, BTreeSet::from([host("db.example"), listed("db", "192.0.2.1")]));
    assert_eq!(index.resource(&host("db.example")), None);
}

#[test]
fn how_endpoints_are_found() {
    use proto::load_balancing::Mode::{Failover, Passthrough};
    let endpoints = || json!([{"address": "a.example"}, {"address": "192.0.2.1"}]);
    for (what, spec, annotation, mode, places) in [
        ("nothing said", spec("NONE", json!({})), None, Some(Passthrough), ""),
        ("not found at all", spec("NONE", json!({"endpoints": endpoints()})), None, Some(Passthrough), ""),
        ("by address", spec("STATIC", json!({"endpoints": endpoints()})), None, None, "192.0.2.1"),
        ("by DNS", spec("DNS", json!({"endpoints": endpoints()})), None, None, "a.example 192.0.2.1"),
        ("by DNS, itself", spec("DNS", json!({})), None, None, "db.example"),
        ("round robin", spec("DNS_ROUND_ROBIN", json!({})), None, None, "db.example"),
        ("any of them", spec("DNS", json!({"hosts": ["*.example"]})), None, None, ""),
        ("the nearest", spec("DNS", json!({})), Some("PreferClose"), Some(Failover), "db.example"),
    ] {
        let mut index = index();
        let mut object = service_entry("db", spec);
        if let Some(annotation) = annotation {
            object["metadata"]["annotations"] =
                json!({"networking.istio.io/traffic-distribution": annotation});
        }
        let changes = apply(&mut index, Kind::ServiceEntry, object);
        let mut found = Vec::new();
        for key in &changes.keys {
            match index.resource(key).unwrap().r#type.unwrap() {
                proto::address::Type::Service(service) => {
                    assert_eq!(service.load_balancing.map(|balancing| balancing.mode()), mode, "{what}");
                }
                proto::address::Type::Workload(workload) => {
                    assert_eq!(workload.hostname.is_empty(), !workload.addresses.is_empty(), "{what}");
                    assert_eq!(joined(&workload), [("shop/db.example", vec![(80, 8080)])], "{what}");
                    found.push(workload.uid.rsplit('/').next().unwrap().to_owned());
                }
            }
        }
        found.sort();
        let mut expect: Vec<&str> = places.split_whitespace().collect();
        expect.sort_unstable();
        assert_eq!(found, expect, "{what}");
    }
}

#[test]
fn pods_and_workload_entries_are_selected() {
    let mut index = index();
    let labelled = |name: &str| with(pod(name, "10.0.0.9"), "/metadata/labels", json!({"app": "db"}));
    apply(&mut index, Kind::Pod, labelled("p"));
    apply(&mut index, Kind::Pod, pod("other", "10.0.0.8"));
    let vm = json!({"address": "192.0.2.1", "labels": {"app": "db"}, "ports": {"http": 9090}, "weight": 5});
    let changes = apply(&mut index, Kind::WorkloadEntry, workload_entry("vm", vm.clone()));
    assert_eq!(changes.keys, BTreeSet::from([entry_key("vm")]));
    assert_eq!(joined(&workload_of(&index, &entry_key("vm"))), []);

    let selecting = spec("STATIC", json!({"workloadSelector": {"labels": {"app": "db"}}}));
    let changes = apply(&mut index, Kind::ServiceEntry, service_entry("db", selecting.clone()));
    assert_eq!(changes.keys, BTreeSet::from([host("db.example"), pod_key("p"), entry_key("vm")]));
    let joined_p = workload(&index, "p").unwrap();
    assert_eq!(joined(&joined_p), [("shop/db.example", vec![(80, 8080)])]);
    assert_eq!(joined(&workload(&index, "other").unwrap()), []);
    let entry = workload_of(&index, &entry_key("vm"));
    assert_eq!(entry.uid, "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm");
    assert_eq!(index.resource_name(&entry_key("vm")), entry.uid);
    assert_eq!((joined(&entry), entry.capacity), (vec![("shop/db.example", vec![(80, 9090)])], Some(5)));

    // Those that come later, too, and those of another namespace never.
    apply(&mut index, Kind::Pod, labelled("late"));
    assert_eq!(joined(&workload(&index, "late").unwrap()).len(), 1);
    let elsewhere = with(service_entry("db", selecting), "/metadata/namespace", json!("other"));
    let changes = apply(&mut index, Kind::ServiceEntry, elsewhere);
    assert_eq!(changes.keys, BTreeSet::from([Key::Host(ObjectName::new("other", "db.example"))]));

    let nobody = spec("STATIC", json!({"workloadSelector": {"labels": {}}}));
    let changes = apply(&mut index, Kind::ServiceEntry, service_entry("db", nobody));
    assert!(changes.keys.contains(&pod_key("p")) && changes.keys.contains(&entry_key("vm")));
    assert_eq!(joined(&workload(&index, "p").unwrap()), []);
    let gone = index.handle(Event::Deleted(Kind::WorkloadEntry, ObjectName::new("shop", "vm")));
    assert_eq!(gone.keys, BTreeSet::from([entry_key("vm")]));
    assert_eq!(index.resource(&entry_key("vm")), None);
}

#[test]
fn services_select_workload_entries() {
    let mut index = index();
    let vm = json!({"address": "vm.example", "labels": {"app": "cart"}, "ports": {"admin": 9000}});
    apply(&mut index, Kind::WorkloadEntry, workload_entry("vm", vm));
    let cart = |selector: Value| with(service("cart", "10.96.0.7"), "/spec/selector", selector);
    let changes = apply(&mut index, Kind::Service, cart(json!({"app": "cart"})));
    assert_eq!(changes.keys, BTreeSet::from([service_key("cart"), entry_key("vm")]));
    let key = "shop/cart.shop.svc.cluster.local";
    let entry = workload_of(&index, &entry_key("vm"));
    assert_eq!(entry.hostname, "vm.example");
    assert_eq!(joined(&entry), [(key, vec![(80, 8080), (81, 9000)])]);
    for (selector, touched, expect) in
        [(json!({"app": "cart"}), false, 1), (json!({"app": "other"}), true, 0), (json!({}), false, 0)]
    {
        let changes = apply(&mut index, Kind::Service, cart(selector.clone()));
        assert_eq!(changes.keys.contains(&entry_key("vm")), touched, "{selector}");
        assert_eq!(joined(&workload_of(&index, &entry_key("vm"))).len(), expect, "{selector}");
    }
    apply(&mut index, Kind::Service, cart(json!({"app": "cart"})));
    let gone = index.handle(Event::Deleted(Kind::Service, ObjectName::new("shop", "cart")));
    assert!(gone.keys.contains(&entry_key("vm")));
    assert_eq!(joined(&workload_of(&index, &entry_key("vm"))), []);
}

#[test]
fn health_and_protocol_of_a_workload_entry() {
    let mut index = index();
    let plain = workload_entry("vm", json!({"address": "192.0.2.1"}));
    let captured =
        with(plain.clone(), "/metadata/annotations", json!({"ambient.istio.io/redirection": "enabled"}));
    let sick =
        with(plain.clone(), "/status", json!({"conditions": [{"type": "Healthy", "status": "False"}]}));
    for (object, tunnel, health) in [
        (plain, proto::TunnelProtocol::None, proto::WorkloadStatus::Healthy),
        (captured, proto::TunnelProtocol::Hbone, proto::WorkloadStatus::Healthy),
        (sick, proto::TunnelProtocol::None, proto::WorkloadStatus::Unhealthy),
    ] {
        apply(&mut index, Kind::WorkloadEntry, object);
        let workload = workload_of(&index, &entry_key("vm"));
        assert_eq!((workload.tunnel_protocol(), workload.status()), (tunnel, health));
    }
}

#[test]
fn of_several_with_one_host_the_oldest_says_what_it_is() {
    let mut index = index();
    let at = |name: &str, vip: &str, created: &str| {
        let object = service_entry(name, spec("STATIC", json!({"addresses": [vip]})));
        with(object, "/metadata/creationTimestamp", json!(created))
    };
    let vip = |index: &Index| service_of(index, &host("db.example")).addresses[0].address.clone();
    apply(&mut index, Kind::ServiceEntry, at("young", "240.0.0.2", "2026-02-02T00:00:00Z"));
    apply(&mut index, Kind::ServiceEntry, at("old", "240.0.0.1", "2026-01-01T00:00:00Z"));
    apply(&mut index, Kind::ServiceEntry, at("twin", "240.0.0.3", "2026-01-01T00:00:00Z"));
    assert_eq!(vip(&index), [240, 0, 0, 1]);
    index.handle(Event::Deleted(Kind::ServiceEntry, ObjectName::new("shop", "old")));
    assert_eq!(vip(&index), [240, 0, 0, 3]);
    index.handle(Event::Deleted(Kind::ServiceEntry, ObjectName::new("shop", "twin")));
    assert_eq!(vip(&index), [240, 0, 0, 2]);
}

#[test]
fn who_sees_it() {
    use proto::Visibility::{Namespace, Public};
    for (export_to, expect, faults) in [
        (json!([]), Public, 0),
        (json!(["*"]), Public, 0),
        (json!(["."]), Namespace, 0),
        (json!(["shop"]), Namespace, 0),
        (json!([".", "other"]), Namespace, 1),
    ] {
        let mut index = index();
        let object = service_entry("db", spec("STATIC", json!({"exportTo": export_to})));
        let changes = apply(&mut index, Kind::ServiceEntry, object);
        assert_eq!(changes.problems.len(), faults, "{export_to}");
        assert_eq!(service_of(&index, &host("db.example")).visibility(), expect, "{export_to}");
    }
}

#[test]
fn what_cannot_be_done_is_told_and_the_rest_is() {
    for (what, spec, fault, keys) in [
        (
            "a Service's name",
            spec("STATIC", json!({"hosts": ["a.shop.svc.cluster.local", "b"]})),
            "a.shop",
            1,
        ),
        (
            "a name in another namespace",
            spec("STATIC", json!({"hosts": ["db-0.db.bank.svc.cluster.local", "b"]})),
            "db-0.db.bank",
            1,
        ),
        ("short", spec("STATIC", json!({"hosts": ["web.bank.svc", "b"]})), "web.bank.svc", 1),
        ("all names", spec("STATIC", json!({"hosts": ["*.cluster.local", "b"]})), "*.cluster.local", 1),
        (
            "no address",
            spec("STATIC", json!({"addresses": ["240.0.0.0/33", "240.0.0.1"]})),
            "240.0.0.0/33",
            1,
        ),
        ("no port", spec("STATIC", json!({"ports": [{"number": 0}, {"number": 80}]})), "port 0", 1),
        ("no endpoint", spec("STATIC", json!({"endpoints": [{"address": "unix:///a"}]})), "unix:///a", 1),
        (
            "no account",
            spec("STATIC", json!({"endpoints": [{"address": "192.0.2.1", "serviceAccount": "a=b"}]})),
            "\"a=b\" is no service account",
            1,
        ),
        (
            "no label",
            spec(
                "STATIC",
                json!({"endpoints": [{"address": "192.0.2.1", "labels": {"app": "x".repeat(64)}}]}),
            ),
            "1 labels of the endpoint",
            2,
        ),
        (
            "a port that nothing can name",
            spec("STATIC", json!({"endpoints": [{"address": "192.0.2.1", "ports": {"p".repeat(257): 1}}]})),
            "is left out",
            2,
        ),
        ("a name", spec("STATIC", json!({"endpoints": [{"address": "a.example"}]})), "a.example", 1),
        ("a wildcard", spec("DNS", json!({"hosts": ["*.example"]})), "*.example", 1),
        ("not supported", spec("DYNAMIC_DNS", json!({})), "DYNAMIC_DNS", 1),
        (
            "both",
            spec(
                "STATIC",
                json!({"endpoints": [{"address": "192.0.2.1"}], "workloadSelector": {"labels": {}}}),
            ),
            "spec.endpoints is left out",
            1,
        ),
        ("nonsense", json!({"hosts": 5}), "cannot be read", 0),
    ] {
        let mut index = index();
        let changes = apply(&mut index, Kind::ServiceEntry, service_entry("db", spec));
        assert_eq!(changes.keys.len(), keys, "{what}");
        let verdicts = verdicts(&index);
        let told = verdicts[0].conditions[0]["message"].as_str().unwrap();
        assert!(told.contains(fault), "{what}: {told}");
        assert_eq!(verdicts[0].conditions[0]["status"], "False", "{what}");
        assert!(changes.verdicts && changes.problems[0].reason.contains(fault), "{what}");
    }
    let mut index = index();
    apply(&mut index, Kind::ServiceEntry, service_entry("db", spec("STATIC", json!({}))));
    assert_eq!(verdicts(&index)[0].conditions[0]["status"], "True");
    let changes =
        apply(&mut index, Kind::WorkloadEntry, workload_entry("vm", json!({"address": "unix:///a"})));
    assert!(changes.problems[0].reason.contains("unix:///a"));
    assert_eq!(index.resource(&entry_key("vm")), None);
    let udp = spec("STATIC", json!({"ports": [{"number": 53, "protocol": "UDP"}]}));
    assert_eq!(apply(&mut index, Kind::ServiceEntry, service_entry("dns", udp)).problems, []);
}
