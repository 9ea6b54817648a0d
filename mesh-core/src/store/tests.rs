//! Lookups, precedence, staging and removal; each case looks at what a reader sees after a commit.

use std::net::IpAddr;

use super::*;
use crate::addr::OrigDst;
use crate::convert::Names;
use crate::service::{Balancing, Families, Mode, Scope, ServicePort};
use crate::workload::{Health, Membership, WorkloadType};

fn address(ip: &str) -> NetworkAddress {
    NetworkAddress::new(Network::default(), ip.parse::<IpAddr>().unwrap())
}

/// What a client of the service dials.
fn vip(port: u16) -> OrigDst {
    OrigDst::from(std::net::SocketAddr::from(([10, 96, 0, 1], port)))
}

fn vip6(port: u16) -> OrigDst {
    OrigDst::from(format!("[fd00:96::1]:{port}").parse::<std::net::SocketAddr>().unwrap())
}

/// A pod with several addresses.
fn dual(name: &str, ips: &[&str]) -> Workload {
    Workload { addresses: ips.iter().map(|ip| ip.parse().unwrap()).collect(), ..pod(name, "10.0.0.1") }
}

fn key(namespace: &str, hostname: &str) -> ServiceName {
    ServiceName { namespace: namespace.into(), hostname: hostname.into() }
}

fn pod(name: &str, ip: &str) -> Workload {
    let namespace = "shop";
    Workload {
        uid: format!("c//Pod/{namespace}/{name}").as_str().into(),
        name: name.into(),
        namespace: namespace.into(),
        addresses: [ip.parse().unwrap()].into(),
        network: Network::default(),
        tunnel: Tunnel::Hbone,
        identity: Names::default().identity("cluster.local", namespace, "default").unwrap(),
        waypoint: None,
        node: "node-1".into(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        workload_name: name.into(),
        workload_type: WorkloadType::Deployment,
        authorization_policies: [].into(),
        health: Health::Healthy,
        cluster: "Kubernetes".into(),
        network_gateway: None,
        hostname: "".into(),
        services: [].into(),
        application_tunnel: None,
        locality: Default::default(),
        host_network: false,
        capacity: 1,
        shortcut: false,
    }
}

fn member(mut workload: Workload, hostname: &str, ports: &[(u16, u16)]) -> Workload {
    workload.services = [Membership { service: key("shop", hostname), ports: ports.into() }].into();
    workload
}

fn service(namespace: &str, hostname: &str, vip: &str) -> Service {
    Service {
        key: key(namespace, hostname),
        name: hostname.into(),
        vips: [match vip.parse::<IpNet>() {
            Ok(prefix) => Vip::Prefix(Network::default(), prefix),
            Err(_) => Vip::Address(address(vip)),
        }]
        .into(),
        ports: [ServicePort { port: 80, target: Some(8080) }].into(),
        identities: [].into(),
        waypoints: [].into(),
        balancing: Balancing::default(),
        families: Default::default(),
        canonical: false,
        namespace_only: false,
    }
}

fn found_uid(reader: &Reader, ip: &str) -> Option<String> {
    reader.workload_at(&address(ip)).map(|workload| workload.uid.to_string())
}

fn found_service(reader: &Reader, ip: &str, client_namespace: &str) -> Option<String> {
    reader.service_at(&address(ip), client_namespace).map(|entry| entry.service.key.to_string())
}

#[test]
fn nothing_is_visible_before_commit() {
    let (mut writer, reader) = new();
    writer.put_workload(pod("a", "10.0.0.1"));
    writer.put_service(service("shop", "web", "10.96.0.1"));
    assert!(found_uid(&reader, "10.0.0.1").is_none() && reader.size() == Size::default());
    writer.commit();
    assert_eq!(found_uid(&reader, "10.0.0.1").as_deref(), Some("c//Pod/shop/a"));
    assert!(reader.workload("c//Pod/shop/a").is_some());
    assert_eq!(reader.size(), Size { workloads: 1, services: 1, ..Size::default() });
}

#[test]
fn workload_before_service_at_one_address() {
    let (mut writer, reader) = new();
    writer.put_service(service("shop", "web", "10.0.0.1"));
    writer.commit();
    assert!(matches!(reader.find(&address("10.0.0.1"), ""), Some(Found::Service(_))));
    writer.put_workload(pod("a", "10.0.0.1"));
    writer.commit();
    assert!(matches!(reader.find(&address("10.0.0.1"), ""), Some(Found::Workload(_))));
    assert!(reader.find(&address("10.0.0.2"), "").is_none());
    let elsewhere = NetworkAddress::new(Network::from("other"), "10.0.0.1".parse().unwrap());
    assert!(reader.find(&elsewhere, "").is_none());
}

#[test]
fn a_changed_workload_moves() {
    let (mut writer, reader) = new();
    writer.put_service(service("shop", "web", "10.96.0.1"));
    writer.put_workload(member(pod("a", "10.0.0.1"), "web", &[]));
    writer.commit();
    writer.put_workload(pod("a", "10.0.0.2"));
    writer.commit();
    assert_eq!(found_uid(&reader, "10.0.0.1"), None);
    assert_eq!(found_uid(&reader, "10.0.0.2").as_deref(), Some("c//Pod/shop/a"));
    assert!(reader.service("shop", "web").unwrap().endpoints().is_empty());
    assert!(writer.remove_workload("c//Pod/shop/a") && !writer.remove_workload("c//Pod/shop/a"));
    writer.commit();
    assert_eq!(found_uid(&reader, "10.0.0.2"), None);
}

#[test]
fn two_workloads_with_one_address() {
    // Pod before entry, HBONE before plain, later before earlier; whoever is left inherits.
    let entry = |name: &str, tunnel| Workload {
        uid: format!("c/networking.istio.io/WorkloadEntry/shop/{name}").as_str().into(),
        tunnel,
        ..pod(name, "10.0.0.1")
    };
    let (mut writer, reader) = new();
    writer.put_workload(pod("a", "10.0.0.1"));
    writer.put_workload(entry("plain", Tunnel::Plain));
    writer.put_workload(entry("hbone", Tunnel::Hbone));
    writer.commit();
    assert_eq!(found_uid(&reader, "10.0.0.1").as_deref(), Some("c//Pod/shop/a"));
    writer.put_workload(pod("b", "10.0.0.1"));
    writer.commit();
    assert_eq!(found_uid(&reader, "10.0.0.1").as_deref(), Some("c//Pod/shop/b"));
    for (remove, heir) in [
        ("c//Pod/shop/b", Some("c//Pod/shop/a")),
        ("c//Pod/shop/a", Some("c/networking.istio.io/WorkloadEntry/shop/hbone")),
        (
            "c/networking.istio.io/WorkloadEntry/shop/plain",
            Some("c/networking.istio.io/WorkloadEntry/shop/hbone"),
        ),
        ("c/networking.istio.io/WorkloadEntry/shop/hbone", None),
    ] {
        assert!(writer.remove_workload(remove));
        writer.commit();
        assert_eq!(found_uid(&reader, "10.0.0.1").as_deref(), heir, "after {remove}");
    }
    assert!(writer.outranked.is_empty());
}

#[test]
fn host_network_workloads_have_no_address_of_their_own() {
    let (mut writer, reader) = new();
    writer.put_workload(Workload { host_network: true, ..pod("a", "10.0.0.1") });
    writer.commit();
    assert!(found_uid(&reader, "10.0.0.1").is_none() && reader.workload("c//Pod/shop/a").is_some());
}

#[test]
fn services_that_claim_one_address() {
    let (mut writer, reader) = new();
    writer.put_service(service("first", "web", "10.96.0.1"));
    writer.put_service(Service { canonical: true, ..service("canonical", "web", "10.96.0.1") });
    writer.put_service(Service { namespace_only: true, ..service("private", "web", "10.96.0.1") });
    writer.commit();
    for (client, expect) in [
        ("first", "first/web"),
        ("private", "private/web"),
        ("canonical", "canonical/web"),
        ("x", "canonical/web"),
    ] {
        assert_eq!(
            found_service(&reader, "10.96.0.1", client).as_deref(),
            Some(expect),
            "client in {client}"
        );
        assert_eq!(reader.service_named("web", client).unwrap().service.key.to_string(), expect);
    }
    writer.remove_service(&key("canonical", "web"));
    writer.remove_service(&key("first", "web"));
    writer.commit();
    assert_eq!(found_service(&reader, "10.96.0.1", "x"), None);
    assert_eq!(found_service(&reader, "10.96.0.1", "private").as_deref(), Some("private/web"));
}

#[test]
fn prefixes_come_after_addresses_and_long_before_short() {
    let (mut writer, reader) = new();
    writer.put_service(service("shop", "wide", "10.0.0.0/8"));
    writer.put_service(service("shop", "narrow", "10.1.0.0/16"));
    writer.put_service(service("shop", "exact", "10.1.0.9"));
    writer.commit();
    for (ip, expect) in [
        ("10.1.0.9", Some("shop/exact")),
        ("10.1.0.8", Some("shop/narrow")),
        ("10.2.0.8", Some("shop/wide")),
        ("11.0.0.1", None),
        ("fd00::1", None),
    ] {
        assert_eq!(found_service(&reader, ip, "shop").as_deref(), expect, "{ip}");
    }
}

#[test]
fn endpoints_wait_for_their_service_and_survive_it() {
    let (mut writer, reader) = new();
    writer.put_workload(member(pod("a", "10.0.0.1"), "web", &[]));
    writer.commit();
    assert!(reader.service("shop", "web").is_none());
    for _ in 0..2 {
        writer.put_service(service("shop", "web", "10.96.0.1"));
        writer.commit();
        assert_eq!(reader.service("shop", "web").unwrap().endpoints().len(), 1);
        writer.remove_service(&key("shop", "web"));
        writer.commit();
        assert!(reader.service("shop", "web").is_none());
    }
    writer.remove_workload("c//Pod/shop/a");
    writer.commit();
    assert!(writer.members.is_empty());
}

#[test]
fn readiness_follows_policy() {
    let (mut writer, reader) = new();
    let sick = Workload { health: Health::Unhealthy, ..member(pod("a", "10.0.0.1"), "web", &[]) };
    writer.put_workload(sick);
    writer.put_workload(Workload { capacity: 0, ..member(pod("b", "10.0.0.2"), "web", &[]) });
    writer.put_service(service("shop", "web", "10.96.0.1"));
    writer.commit();
    let entry = reader.service("shop", "web").unwrap();
    let client = pod("client", "10.0.0.9");
    assert_eq!(entry.pick(&client, vip(80), 0).unwrap_err(), PickError::NoneReady);
    assert_eq!(entry.pick(&client, vip(81), 0).unwrap_err(), PickError::NoSuchPort(81));
    let balancing = Balancing { allow_unhealthy: true, ..Default::default() };
    writer.put_service(Service { balancing, ..service("shop", "web", "10.96.0.1") });
    writer.commit();
    let (endpoint, port) = reader.service("shop", "web").unwrap().pick(&client, vip(80), 0).unwrap();
    assert_eq!((&*endpoint.workload.name, port), ("a", 8080));
}

#[test]
fn target_ports() {
    let (mut writer, reader) = new();
    let named = ServicePort { port: 81, target: None };
    let ports =
        [ServicePort { port: 80, target: Some(8080) }, named, ServicePort { port: 82, target: None }].into();
    writer.put_service(Service { ports, ..service("shop", "web", "10.96.0.1") });
    writer.put_workload(member(pod("a", "10.0.0.1"), "web", &[(80, 9090), (81, 9091)]));
    writer.put_workload(member(pod("b", "10.0.0.2"), "web", &[]));
    writer.commit();
    let entry = reader.service("shop", "web").unwrap();
    let client = pod("client", "10.0.0.9");
    for random in 0..8 {
        let (endpoint, port) = entry.pick(&client, vip(80), random).unwrap();
        assert_eq!(port, if &*endpoint.workload.name == "a" { 9090 } else { 8080 });
        let (endpoint, port) = entry.pick(&client, vip(81), random).unwrap();
        assert_eq!((&*endpoint.workload.name, port), ("a", 9091), "only a resolves the named port");
    }
    assert_eq!(entry.pick(&client, vip(82), 0).unwrap_err(), PickError::NoTargetPort(82));
}

#[test]
fn every_ready_endpoint_gets_its_share() {
    let (mut writer, reader) = new();
    for i in 0..10 {
        writer.put_workload(member(pod(&format!("p{i}"), &format!("10.0.0.{i}")), "web", &[]));
    }
    writer.put_service(service("shop", "web", "10.96.0.1"));
    writer.commit();
    let entry = reader.service("shop", "web").unwrap();
    let client = pod("client", "10.0.0.99");
    let mut picks = HashMap::<String, usize>::new();
    for random in 0..1000 {
        let (endpoint, _) = entry.pick(&client, vip(80), random).unwrap();
        *picks.entry(endpoint.workload.name.to_string()).or_default() += 1;
    }
    assert!(picks.len() == 10 && picks.values().all(|count| *count == 100), "{picks:?}");
}

#[test]
fn capacity_is_the_share() {
    let capacities = [("one", "10.0.0.1", 1), ("three", "10.0.0.2", 3), ("none", "10.0.0.3", 0)];
    for mode in [Mode::Any, Mode::Failover] {
        let (mut writer, reader) = new();
        for (name, ip, capacity) in capacities {
            writer.put_workload(Workload { capacity, ..member(pod(name, ip), "web", &[]) });
        }
        let balancing = Balancing { mode, scopes: [Scope::Network].into(), allow_unhealthy: false };
        writer.put_service(Service { balancing, ..service("shop", "web", "10.96.0.1") });
        writer.commit();
        let entry = reader.service("shop", "web").unwrap();
        let client = pod("client", "10.0.0.9");
        let threes = (0..8000_usize)
            .map(|random| random.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 8)
            .filter(|random| &*entry.pick(&client, vip(80), *random).unwrap().0.workload.name == "three")
            .count();
        assert!((5900..6100).contains(&threes), "{mode:?}: {threes} of 8000 for three quarters");
    }
}

#[test]
fn locality_preferences() {
    let at = |name: &str, ip: &str, node: &str| Workload {
        node: node.into(),
        ..member(pod(name, ip), "web", &[])
    };
    let near = pod("client", "10.0.0.9");
    let far = Workload { node: "node-9".into(), ..near.clone() };
    for (mode, client, expect) in [
        (Mode::Strict, &near, Some("near")),
        (Mode::Strict, &far, None),
        (Mode::Failover, &near, Some("near")),
        (Mode::Failover, &far, Some("any")),
    ] {
        let (mut writer, reader) = new();
        writer.put_workload(at("near", "10.0.0.1", "node-1"));
        writer.put_workload(at("other", "10.0.0.2", "node-2"));
        let balancing =
            Balancing { mode, scopes: [Scope::Network, Scope::Node].into(), allow_unhealthy: false };
        writer.put_service(Service { balancing, ..service("shop", "web", "10.96.0.1") });
        writer.commit();
        let entry = reader.service("shop", "web").unwrap();
        let mut names: Vec<String> = (0..4)
            .filter_map(|random| entry.pick(client, vip(80), random).ok())
            .map(|(endpoint, _)| endpoint.workload.name.to_string())
            .collect();
        names.sort();
        names.dedup();
        match expect {
            None => assert!(names.is_empty(), "{mode:?}: {names:?}"),
            Some("any") => assert_eq!(names, ["near", "other"], "{mode:?}"),
            Some(name) => assert_eq!(names, [name], "{mode:?}"),
        }
    }
}

#[test]
fn a_workload_is_found_at_each_of_its_addresses() {
    let (mut writer, reader) = new();
    writer.put_workload(dual("a", &["10.0.0.1", "fd00::1"]));
    writer.commit();
    for ip in ["10.0.0.1", "fd00::1", "::ffff:10.0.0.1"] {
        assert_eq!(found_uid(&reader, ip).as_deref(), Some("c//Pod/shop/a"), "{ip}");
    }
    writer.put_workload(dual("a", &["fd00::1", "fd00::2"]));
    writer.commit();
    let found = ["10.0.0.1", "fd00::1", "fd00::2"].map(|ip| found_uid(&reader, ip).is_some());
    assert_eq!(found, [false, true, true]);
    writer.remove_workload("c//Pod/shop/a");
    writer.commit();
    let found = ["10.0.0.1", "fd00::1", "fd00::2"].map(|ip| found_uid(&reader, ip).is_some());
    assert_eq!(found, [false; 3]);
    assert!(writer.outranked.is_empty());
}

#[test]
fn a_service_is_found_at_each_of_its_addresses() {
    let (mut writer, reader) = new();
    let both = ["10.96.0.1", "fd00:96::1"].map(|ip| Vip::Address(address(ip)));
    writer.put_service(Service { vips: both.into(), ..service("shop", "web", "10.96.0.1") });
    writer.put_workload(member(dual("a", &["10.0.0.1", "fd00::1"]), "web", &[]));
    writer.commit();
    for ip in ["10.96.0.1", "fd00:96::1"] {
        assert_eq!(found_service(&reader, ip, "shop").as_deref(), Some("shop/web"), "{ip}");
        let entry = reader.service_at(&address(ip), "shop").unwrap();
        assert_eq!(entry.endpoints().len(), 1, "one endpoint, however many addresses it has");
    }
    writer.put_service(service("shop", "web", "10.96.0.1"));
    writer.commit();
    assert_eq!(found_service(&reader, "fd00:96::1", "shop"), None);
}

/// Which endpoints are chosen for what is dialled, in a service whose endpoints differ in their families.
#[test]
fn endpoints_of_the_dialled_family_come_first() {
    let (v4, v6) = (&["10.0.0.4"][..], &["fd00::6"][..]);
    let both = &["10.0.0.8", "fd00::8"][..];
    let all: &[(&str, &[&str])] = &[("v4", v4), ("v6", v6), ("both", both)];
    let client = || dual("client", &["10.0.0.9", "fd00::9"]);
    let nowhere = Balancing::default();
    let near = |mode| Balancing { mode, scopes: [Scope::Node].into(), allow_unhealthy: false };
    for (what, endpoints, families, dst, client, balancing, expect) in [
        ("v4", all, Families::Any, vip(80), client(), nowhere.clone(), "both v4"),
        ("v6", all, Families::Any, vip6(80), client(), nowhere.clone(), "both v6"),
        ("only the other family", &all[..1], Families::Any, vip6(80), client(), nowhere.clone(), "v4"),
        ("only the other family", &all[1..2], Families::Any, vip(80), client(), nowhere.clone(), "v6"),
        ("a family that is not served", all, Families::V4Only, vip6(80), client(), nowhere, "both v4"),
        ("near, v4", all, Families::Any, vip(80), client(), near(Mode::Failover), "both v4"),
        ("strict, v6", all, Families::Any, vip6(80), client(), near(Mode::Strict), "both v6"),
        (
            "what is near and cannot be reached",
            &all[..2],
            Families::Any,
            vip(80),
            Workload { node: "v6".into(), ..dual("client", &["10.0.0.9"]) },
            near(Mode::Failover),
            "v4",
        ),
        (
            "what is near and can be reached over the other family",
            &all[..2],
            Families::Any,
            vip(80),
            Workload { node: "v6".into(), ..client() },
            near(Mode::Failover),
            "v6",
        ),
    ] {
        let (mut writer, reader) = new();
        for (name, ips) in endpoints {
            // In the last cases each endpoint is on a node of its own.
            let node = if client.node.starts_with("node") { "node-1" } else { *name };
            writer.put_workload(Workload { node: node.into(), ..member(dual(name, ips), "web", &[]) });
        }
        writer.put_service(Service { families, balancing, ..service("shop", "web", "10.96.0.1") });
        writer.commit();
        let entry = reader.service("shop", "web").unwrap();
        let mut names: Vec<String> = (0..12)
            .map(|random| entry.pick(&client, dst, random).unwrap().0.workload.name.to_string())
            .collect();
        names.sort();
        names.dedup();
        assert_eq!(names.join(" "), expect, "{what}");
    }
}

#[test]
fn one_change_copies_little_of_a_large_mesh() {
    let (mut writer, reader) = new();
    for i in 0..20_000_u32 {
        let ip = IpAddr::from((0x0a00_0000 + i).to_be_bytes()).to_string();
        writer.put_workload(pod(&format!("p{i}"), &ip));
    }
    writer.commit();
    let before: Vec<_> = reader.published.by_uid.snapshots();
    writer.put_workload(pod("one-more", "10.200.0.1"));
    writer.commit();
    let after: Vec<_> = reader.published.by_uid.snapshots();
    let copied = before.iter().zip(&after).filter(|(a, b)| a != b).count();
    assert_eq!(copied, 1, "shards replaced by one new workload");
    assert_eq!(reader.size().workloads, 20_001);
}

fn policy(key: &str, scope: crate::authz::Scope) -> crate::authz::Authorization {
    let (namespace, _) = key.split_once('/').unwrap();
    let rules = crate::authz::Rules::Deny([].into());
    crate::authz::Authorization { key: key.into(), namespace: namespace.into(), scope, dry_run: false, rules }
}

#[test]
fn a_workload_is_shown_the_policies_that_are_about_it_and_no_others() {
    use crate::authz::Scope::{Global, Namespace, Selected, Unreadable};
    let (mut writer, reader) = new();
    for (key, scope) in [
        ("root/all", Global),
        ("shop/all", Namespace),
        ("shop/odd", Unreadable),
        ("other/all", Namespace),
        ("other/odd", Unreadable),
        ("shop/named", Selected),
        ("shop/not-named", Selected),
    ] {
        writer.put_authorization(policy(key, scope));
    }
    let named = |names: &[&str]| Workload {
        authorization_policies: names.iter().map(|name| Arc::from(*name)).collect(),
        ..pod("a", "10.0.0.1")
    };
    let shown = |names: &[&str]| {
        let applying = reader.policies_of(&named(names));
        let mut keys: Vec<String> = applying.policies.iter().map(|policy| policy.key.to_string()).collect();
        keys.sort();
        keys.extend(applying.unknown.map(|name| format!("?{name}")));
        keys.join(" ")
    };
    assert_eq!(shown(&[]), "", "nothing is visible before the commit");
    assert!(writer.commit().policies);
    assert_eq!(shown(&[]), "root/all shop/all shop/odd");
    assert_eq!(shown(&["shop/named", "other/odd"]), "other/odd root/all shop/all shop/named shop/odd");
    assert_eq!(shown(&["shop/gone"]), "root/all shop/all shop/odd ?shop/gone");
    // Of another scope now, and in one place only.
    writer.put_authorization(policy("shop/all", Selected));
    assert!(writer.remove_authorization("root/all") && !writer.remove_authorization("root/all"));
    assert!(writer.commit().policies);
    assert_eq!(shown(&[]), "shop/odd");
    assert_eq!(reader.size().authorizations, 6);
}

#[test]
fn a_commit_tells_whose_policies_changed() {
    let (mut writer, _) = new();
    let named = |name: &str, policies: &[&str]| Workload {
        authorization_policies: policies.iter().map(|name| Arc::from(*name)).collect(),
        ..pod(name, "10.0.0.1")
    };
    let mut told = |workloads: Vec<Workload>| -> Vec<String> {
        workloads.into_iter().for_each(|workload| writer.put_workload(workload));
        let changes = writer.commit();
        assert!(!changes.policies);
        changes.workloads.iter().map(|uid| uid.to_string()).collect()
    };
    assert_eq!(told(vec![named("a", &[]), named("b", &["shop/p"])]), ["c//Pod/shop/b"]);
    assert_eq!(told(vec![named("a", &["shop/p"]), named("b", &["shop/p"])]), ["c//Pod/shop/a"]);
    assert_eq!(told(vec![Workload { capacity: 2, ..named("a", &["shop/p"]) }]), [""; 0]);
    assert_eq!(told(vec![named("a", &[])]), ["c//Pod/shop/a"]);
}
