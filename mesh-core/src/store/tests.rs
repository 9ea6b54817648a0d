//! Lookups, precedence, staging and removal; each case looks at what a reader sees after a commit.

mod choice;
mod endpoints;
mod policies;

use std::net::IpAddr;

use super::*;
use crate::convert::Names;
use crate::service::{Balancing, ServicePort};
use crate::workload::{Health, Membership, WorkloadType};

fn address(ip: &str) -> NetworkAddress {
    NetworkAddress::new(Network::default(), ip.parse::<IpAddr>().unwrap())
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
        port_names: [].into(),
        identities: [].into(),
        waypoints: [].into(),
        balancing: Balancing::default(),
        families: Default::default(),
        created: 0,
        canonical: false,
        namespace_only: false,
        affinity: None,
    }
}

fn found_uid(reader: &Reader, ip: &str) -> Option<String> {
    reader.workload_at(&address(ip)).map(|workload| workload.uid.to_string())
}

fn found_service(reader: &Reader, ip: &str, client_namespace: &str) -> Option<String> {
    match reader.find(&address(ip), client_namespace)? {
        Found::Service(entry) => Some(entry.service.key.to_string()),
        Found::Workload(_) | Found::Refused(_) => None,
    }
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
fn who_has_an_address_that_several_claim() {
    let (mut writer, reader) = new();
    let entry =
        Workload { uid: "c/networking.istio.io/WorkloadEntry/shop/vm".into(), ..pod("vm", "192.0.2.1") };
    writer.put_workload(pod("a", "10.0.0.1"));
    writer.put_workload(entry);
    for service in [
        service("evil", "all", "0.0.0.0/0"),
        service("evil", "web", "10.0.0.1"),
        service("own", "web", "10.0.0.1"),
        Service { canonical: true, ..service("shop", "of-cluster", "10.96.0.1") },
        service("evil", "of-cluster", "10.96.0.1"),
    ] {
        writer.put_service(service);
    }
    writer.commit();
    let found = |ip: &str, client| match reader.find(&address(ip), client)? {
        Found::Workload(workload) => Some(workload.uid.to_string()),
        Found::Service(entry) => Some(entry.service.key.to_string()),
        Found::Refused(_) => None,
    };
    for (what, ip, client, expect) in [
        ("a pod, for others than who claims its address", "10.0.0.1", "shop", "c//Pod/shop/a"),
        ("a service, for its own namespace", "10.0.0.1", "own", "own/web"),
        ("a service of the cluster", "10.96.0.1", "shop", "shop/of-cluster"),
        ("a service, before what is no pod", "192.0.2.1", "shop", "evil/all"),
        ("nobody but a prefix", "198.51.100.1", "shop", "evil/all"),
    ] {
        assert_eq!(found(ip, client).as_deref(), Some(expect), "{what}");
    }
    writer.remove_service(&key("evil", "all"));
    writer.commit();
    assert_eq!(found("192.0.2.1", "bank").as_deref(), Some("c/networking.istio.io/WorkloadEntry/shop/vm"));
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
    // A change of one does not put it behind the others.
    writer.put_service(Service { created: 1, namespace_only: true, ..service("old", "db", "10.96.0.9") });
    writer.put_service(Service { created: 1, ..service("old", "db", "10.96.0.9") });
    writer.put_service(Service { created: 2, ..service("new", "db", "10.96.0.9") });
    writer.put_service(Service { created: 1, name: "db2".into(), ..service("old", "db", "10.96.0.9") });
    writer.commit();
    assert_eq!(found_service(&reader, "10.96.0.9", "x").as_deref(), Some("old/db"));
    assert_eq!(reader.service_named("db", "x").unwrap().service.key.to_string(), "old/db");
    for name in ["old", "new"] {
        writer.remove_service(&key(name, "db"));
    }
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
        let Some(Found::Service(entry)) = reader.find(&address(ip), "shop") else {
            panic!("no service at {ip}")
        };
        assert_eq!(entry.endpoints().len(), 1, "one endpoint, however many addresses it has");
    }
    writer.put_service(service("shop", "web", "10.96.0.1"));
    writer.commit();
    assert_eq!(found_service(&reader, "fd00:96::1", "shop"), None);
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
