//! Which endpoint a client of a service gets.

use super::*;
use crate::addr::OrigDst;
use crate::service::{Families, Mode, Scope};

/// What a client of the service dials.
fn vip(port: u16) -> OrigDst {
    OrigDst::from(std::net::SocketAddr::from(([10, 96, 0, 1], port)))
}

fn vip6(port: u16) -> OrigDst {
    OrigDst::from(format!("[fd00:96::1]:{port}").parse::<std::net::SocketAddr>().unwrap())
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

/// What does not fit leaves its share to all that do, in proportion, not to its neighbour in the list.
#[test]
fn capacity_is_the_share_among_those_that_fit() {
    let other_family = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|ip| (ip, 1, &[][..]));
    let no_such_port = ["fd00::1", "fd00::2", "fd00::3"].map(|ip| (ip, 1, &[][..]));
    let named = [(81, 9091)];
    for (what, port, unfit) in [("another family", 80, other_family), ("no such port", 81, no_such_port)] {
        for (one, three, share) in [(1, 3, 0.75), (1, 1, 0.5)] {
            let (mut writer, reader) = new();
            let fit = [("fd00::a1", one, &named[..]), ("fd00::a3", three, &named[..])];
            for (ip, capacity, ports) in unfit.into_iter().chain(fit) {
                writer.put_workload(Workload { capacity, ..member(pod(ip, ip), "web", ports) });
            }
            let ports = [(80, Some(8080)), (81, None)].map(|(port, target)| ServicePort { port, target });
            writer.put_service(Service { ports: ports.into(), ..service("shop", "web", "fd00:96::1") });
            writer.commit();
            let entry = reader.service("shop", "web").unwrap();
            let client = pod("client", "fd00::9");
            let picked = (0..8000_usize).filter(|i| {
                let random = i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let name = entry.pick(&client, vip6(port), random).unwrap().0.workload.name.clone();
                assert!(name.starts_with("fd00::a"), "{what}: {name} does not fit");
                &*name == "fd00::a3"
            });
            let seen = picked.count() as f64 / 8000.0;
            assert!((seen - share).abs() < 0.03, "{what}: {seen} instead of {share}");
        }
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
fn an_endpoint_is_dialled_where_it_was_meant() {
    let workload = Arc::new(dual("a", &["10.0.0.1", "10.0.0.2", "fd00::1"]));
    let endpoint = Endpoint { workload, ports: [].into() };
    for (dialled, expected) in [
        ("10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "10.0.0.1"),
        ("10.96.0.1", "10.0.0.1"),
        ("fd00:96::1", "fd00::1"),
    ] {
        let found = endpoint.address(dialled.parse().unwrap(), Families::default());
        assert_eq!(found, Some(expected.parse().unwrap()), "{dialled}");
    }
}
