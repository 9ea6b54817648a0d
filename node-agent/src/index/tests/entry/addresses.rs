//! Addresses that are made up for hosts, which the status of their entry says.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::*;
use crate::index::verdict::Verdict;

/// One as its users write it.
fn entry(name: &str, hosts: &[&str]) -> Value {
    let spec = json!({
        "hosts": hosts, "resolution": "DNS", "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}],
    });
    service_entry(name, spec)
}

/// The API server: what was applied last.
struct Cluster {
    index: Index,
    entries: BTreeMap<String, Value>,
}

impl Cluster {
    fn new() -> Self {
        Self { index: index(), entries: BTreeMap::new() }
    }

    /// The status stays as it is unless the object has one.
    fn apply(&mut self, mut entry: Value) -> Changes {
        let name = entry["metadata"]["name"].as_str().unwrap().to_owned();
        if let (Some(old), true) = (self.entries.get(&name), entry["status"].is_null()) {
            entry["status"] = old["status"].clone();
        }
        self.entries.insert(name, entry.clone());
        apply(&mut self.index, Kind::ServiceEntry, entry)
    }

    fn delete(&mut self, name: &str) -> Changes {
        self.entries.remove(name);
        self.index.handle(Event::Deleted(Kind::ServiceEntry, ObjectName::new("shop", name)))
    }

    fn change(&mut self, name: &str, path: &str, value: Value) -> Changes {
        let entry = with(self.entries[name].clone(), path, value);
        self.apply(entry)
    }

    /// What is to be written into the status of an entry.
    fn due(&self, name: &str) -> Option<Verdict> {
        self.index.verdict(&(Kind::ServiceEntry, ObjectName::new("shop", name)))
    }

    /// Some agent writes what there is to be written; how many statuses that were.
    fn write(&mut self) -> usize {
        let all = verdicts(&self.index);
        for verdict in &all {
            let mut entry = self.entries[&*verdict.name.name].clone();
            entry["status"]["conditions"] = verdict.conditions.clone().into();
            if let Some(addresses) = &verdict.addresses {
                entry["status"]["addresses"] = addresses.clone().into();
            }
            self.apply(entry);
        }
        all.len()
    }

    /// `host value` of what the status of an entry says.
    fn said(&self, name: &str) -> Vec<String> {
        let all = self.entries[name]["status"]["addresses"].as_array().cloned().unwrap_or_default();
        let text = |one: &Value, field: &str| one[field].as_str().unwrap().to_owned();
        all.iter().map(|one| format!("{} {}", text(one, "host"), text(one, "value"))).collect()
    }

    /// The addresses that a host has.
    fn addresses(&self, name: &str) -> Vec<IpAddr> {
        let Some(resource) = self.index.resource(&host(name)) else { return Vec::new() };
        let Some(proto::address::Type::Service(service)) = resource.r#type else { panic!("no service") };
        let ip = |bytes: &[u8]| match <[u8; 4]>::try_from(bytes) {
            Ok(v4) => IpAddr::from(v4),
            Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap()),
        };
        service.addresses.iter().map(|address| ip(&address.address)).collect()
    }
}

#[test]
fn each_host_has_what_the_status_says() {
    let mut cluster = Cluster::new();
    let changes = cluster.apply(entry("db", &["DB.example", "*.example", "web.svc", "api.example"]));
    assert!(changes.verdicts);
    assert_eq!(cluster.addresses("db.example"), Vec::<IpAddr>::new(), "nobody has written it yet");
    assert_eq!(cluster.write(), 1);
    let said = cluster.said("db");
    assert_eq!(said.len(), 4, "{said:?}");
    for host in ["db.example", "api.example"] {
        let addresses = cluster.addresses(host);
        assert!(addresses.len() == 2 && addresses[0].is_ipv4() && addresses[1].is_ipv6(), "{addresses:?}");
        assert!(addresses.iter().all(|ip| said.contains(&format!("{host} {ip}"))), "{said:?}");
    }
    assert_eq!(cluster.addresses("*.example"), Vec::<IpAddr>::new());
    assert_eq!(cluster.write(), 0);
    // All agents come to the same, and one that starts later finds it.
    let mut other = Cluster::new();
    other.apply(cluster.entries["db"].clone());
    assert_eq!((other.write(), other.said("db")), (0, said));
}

#[test]
fn whose_hosts_get_addresses() {
    let wanted = || entry("db", &["db.example"]);
    let label = |value: &str| {
        with(wanted(), "/metadata/labels", json!({"networking.istio.io/enable-autoallocate-ip": value}))
    };
    let spec = |field: &str, value: Value| with(wanted(), &format!("/spec/{field}"), value);
    // What an agent of another kind may have written stays where an address would do harm.
    for (what, entry, gets, stays) in [
        ("nothing said", wanted(), true, true),
        ("asked for", label("true"), true, true),
        ("not asked for", label("False"), false, false),
        ("its own", spec("addresses", json!(["240.0.0.1"])), false, false),
        ("its own, which are none", spec("addresses", json!(["?"])), false, false),
        ("where the client dialled", spec("resolution", json!("NONE")), false, false),
        ("not said how", spec("resolution", json!("")), false, false),
        ("of addresses", spec("resolution", json!("STATIC")), true, true),
        ("in turn", spec("resolution", json!("DNS_ROUND_ROBIN")), true, true),
        ("not supported", spec("resolution", json!("DYNAMIC_DNS")), false, true),
        ("no TCP", spec("ports", json!([{"number": 53, "name": "dns", "protocol": "UDP"}])), false, true),
        ("any of them", spec("hosts", json!(["*.example"])), false, false),
    ] {
        let mut cluster = Cluster::new();
        cluster.apply(entry.clone());
        cluster.write();
        assert_eq!(!cluster.said("db").is_empty(), gets, "{what}");
        let status = json!({"addresses": [{"host": "db.example", "value": "240.240.9.9"}]});
        cluster.apply(with(entry, "/status", status));
        cluster.write();
        assert_eq!(!cluster.said("db").is_empty(), stays, "{what}");
        let in_force = cluster.addresses("db.example").contains(&"240.240.9.9".parse().unwrap());
        assert_eq!(in_force, gets, "{what}");
    }
}

#[test]
fn spec_addresses_come_and_go() {
    let mut cluster = Cluster::new();
    cluster.apply(entry("db", &["db.example"]));
    cluster.write();
    let before = cluster.addresses("db.example");
    cluster.change("db", "/spec/addresses", json!(["192.0.2.1"]));
    assert_eq!(cluster.addresses("db.example"), ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(cluster.due("db").unwrap().addresses, Some(vec![]));
    cluster.write();
    cluster.change("db", "/spec/addresses", json!([]));
    cluster.write();
    assert_eq!(cluster.addresses("db.example"), before);
}

#[test]
fn hosts_come_and_go() {
    let mut cluster = Cluster::new();
    cluster.apply(entry("db", &["a.example", "b.example"]));
    cluster.write();
    let [a, b] = ["a.example", "b.example"].map(|host| cluster.addresses(host));
    cluster.change("db", "/spec/hosts", json!(["b.example", "c.example"]));
    assert_eq!(cluster.write(), 1);
    assert_eq!(cluster.addresses("b.example"), b);
    let said = cluster.said("db");
    assert!(said.len() == 4 && !said.iter().any(|said| said.starts_with("a.example")), "{said:?}");
    cluster.change("db", "/spec/hosts", json!(["a.example"]));
    cluster.write();
    assert_eq!(cluster.addresses("a.example"), a);
}

/// Of others' addresses and conditions nothing is lost.
#[test]
fn what_another_writer_said_stays() {
    let mut cluster = Cluster::new();
    let other = json!({"type": "Other", "status": "True"});
    let status = json!({"conditions": [other], "addresses": [
        {"host": "DB.example", "value": "10.66.0.1"}, {"host": "*.example", "value": "10.66.0.2"},
        {"host": "gone.example", "value": "10.66.0.3"}, {"host": "", "value": "10.66.0.4"},
        {"host": "db.example", "value": "fd00::66"}, {"host": "web.svc", "value": "10.66.0.5"},
    ]});
    let object = entry("db", &["DB.example", "*.example", "web.svc", "new.example"]);
    cluster.apply(with(object, "/status", status));
    let [v4, v6] = ["10.66.0.1", "fd00::66"].map(|ip| ip.parse::<IpAddr>().unwrap());
    assert_eq!(cluster.addresses("db.example"), [v4, v6], "of whichever range");
    let due = cluster.due("db").unwrap();
    assert_eq!(due.conditions[0], other);
    cluster.write();
    let said = cluster.said("db");
    for kept in ["DB.example 10.66.0.1", "*.example 10.66.0.2", "db.example fd00::66", "web.svc 10.66.0.5"] {
        assert!(said.contains(&kept.to_owned()), "{kept}: {said:?}");
    }
    assert_eq!(said.len(), 6, "{said:?}");
    assert_eq!(cluster.addresses("new.example").len(), 2);
}

#[test]
fn of_two_with_one_address_the_older_keeps_it() {
    let mut cluster = Cluster::new();
    cluster.apply(entry("db", &["db.example"]));
    cluster.write();
    let own = cluster.addresses("db.example");
    let claim: Vec<Value> =
        own.iter().map(|ip| json!({"host": "web.example", "value": ip.to_string()})).collect();
    let young =
        with(entry("web", &["web.example"]), "/metadata/creationTimestamp", json!("2026-02-02T00:00:00Z"));
    let changes = cluster.apply(with(young, "/status", json!({"addresses": claim})));
    assert!(changes.verdicts);
    assert_eq!(cluster.addresses("web.example"), Vec::<IpAddr>::new());
    assert_eq!(cluster.write(), 1);
    let others = cluster.addresses("web.example");
    assert!(others.len() == 2 && others.iter().all(|ip| !own.contains(ip)), "{others:?}");
    assert_eq!((cluster.said("web").len(), cluster.addresses("db.example")), (2, own));
}

/// However it is written: the proxies take IPv4-mapped addresses for IPv4.
#[test]
fn what_an_older_entry_says_itself_is_taken_in_any_spelling() {
    let mut cluster = Cluster::new();
    let old =
        with(entry("old", &["vip.example"]), "/metadata/creationTimestamp", json!("2020-01-01T00:00:00Z"));
    cluster.apply(entry("db", &["db.example"]));
    cluster.write();
    let own = cluster.addresses("db.example");
    let IpAddr::V4(v4) = own[0] else { panic!("{own:?}") };
    let mapped = json!([v4.to_ipv6_mapped().to_string(), "::ffff:192.0.2.0/120", "::ffff:192.0.2.0/95"]);
    let changes = cluster.apply(with(old, "/spec/addresses", mapped));
    assert_eq!(cluster.addresses("db.example"), own[1..]);
    let faults: Vec<&str> = changes.problems.iter().map(|problem| &*problem.reason).collect();
    assert!(faults.len() == 1 && faults[0].contains("/95"), "{faults:?}");
    let Some(resource) = cluster.index.resource(&host("vip.example")) else { panic!("no service") };
    let Some(proto::address::Type::Service(service)) = resource.r#type else { panic!("no service") };
    let lengths: Vec<Option<u32>> = service.addresses.iter().map(|address| address.length).collect();
    assert_eq!(lengths, [None, Some(24)]);
    cluster.write();
    assert!(cluster.addresses("db.example").len() == 2 && cluster.addresses("db.example")[0] != own[0]);
}

/// Who may write a status gives no host more than a few.
#[test]
fn a_status_that_says_very_much() {
    let mut cluster = Cluster::new();
    let all: Vec<Value> =
        (1..200).map(|n| json!({"host": "db.example", "value": format!("192.0.2.{n}")})).collect();
    let long = json!({"host": "db.example", "value": "1".repeat(10_000)});
    let all = [vec![long], all].concat();
    let status = json!({ "addresses": all });
    cluster.apply(with(entry("db", &["db.example"]), "/status", status));
    let in_force = cluster.addresses("db.example");
    assert_eq!(in_force.len(), 4);
    cluster.write();
    assert_eq!((cluster.said("db").len(), cluster.due("db")), (5, None), "and one of IPv6");
    assert!(in_force.iter().all(|ip| cluster.addresses("db.example").contains(ip)));
}

/// The oldest says what the host is, and so its status says where. Another one that takes over has the same address.
#[test]
fn one_host_of_two_entries() {
    let mut cluster = Cluster::new();
    cluster.apply(entry("a", &["db.example"]));
    cluster.apply(entry("b", &["db.example", "more.example"]));
    cluster.write();
    let own = cluster.addresses("db.example");
    assert_eq!((own.len(), cluster.said("a").len(), cluster.said("b").len()), (2, 2, 2));
    let changes = cluster.delete("a");
    assert!(changes.keys.contains(&host("db.example")) && changes.verdicts);
    cluster.write();
    assert_eq!((cluster.addresses("db.example"), cluster.said("b").len()), (own.clone(), 4));
    // An older one comes between before anybody has written.
    cluster.change("b", "/status", json!({}));
    let due =
        |cluster: &Cluster, name: &str| cluster.due(name).and_then(|due| due.addresses).map(|all| all.len());
    assert_eq!(due(&cluster, "b"), Some(4));
    cluster.apply(entry("a", &["db.example"]));
    assert_eq!((due(&cluster, "a"), due(&cluster, "b")), (Some(2), Some(2)));
    // What is already said of the other one's host is not disturbed.
    cluster.write();
    cluster.apply(with(
        entry("0", &["db.example"]),
        "/metadata/labels",
        json!({"networking.istio.io/enable-autoallocate-ip": "false"}),
    ));
    assert_eq!((cluster.addresses("db.example"), due(&cluster, "a")), (vec![], None));
    cluster.delete("0");
    assert_eq!(cluster.addresses("db.example"), own);
}

/// What is left out for its cost has no address, and takes none from others.
#[test]
fn entries_that_are_not_in_force() {
    let mut cluster = Cluster::new();
    let hosts: Vec<String> = (0..200).map(|number| format!("h{number}.{}", "x".repeat(200))).collect();
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let at = |name: &str, day: u32| {
        let created = json!(format!("2026-01-{day:02}T00:00:00Z"));
        with(entry(name, &hosts), "/metadata/creationTimestamp", created)
    };
    cluster.apply(at("young", 20));
    cluster.write();
    let own = cluster.said("young");
    for number in 0..64 {
        cluster.apply(at(&format!("old-{number}"), 1));
    }
    cluster.write();
    assert_eq!(cluster.said("young"), own, "it may come back");
    assert_eq!(cluster.due("young"), None);
    let left_out = |entry: &&Value| entry["status"]["conditions"][0]["reason"] == "OverBudget";
    let count = cluster.entries.values().filter(left_out).count();
    assert!(count > 1, "{count}");
    cluster.delete("old-0");
    assert_eq!(cluster.addresses(hosts[0]).len(), 0, "now the next one says what it is");
    cluster.write();
    assert!(cluster.addresses(hosts[0]).iter().all(|ip| own.contains(&format!("{} {ip}", hosts[0]))));
}

/// 240.240.0.0/16 has room for 65534.
#[test]
fn no_address_is_free() {
    let mut cluster = Cluster::new();
    let reserve = |namespace: &str, numbers: std::ops::Range<u32>| {
        numbers
            .step_by(128)
            .map(move |first| {
                let addresses = (first..first + 128).map(|n| format!("240.240.{}.{}", n / 256, n % 256));
                let spec =
                    json!({"hosts": ["x"], "resolution": "NONE", "addresses": addresses.collect::<Vec<_>>()});
                let entry = service_entry(&format!("e{first}"), spec);
                with(entry, "/metadata/namespace", json!(namespace))
            })
            .collect::<Vec<_>>()
    };
    for (namespace, first) in [("a", 0), ("b", 15_000), ("c", 30_000), ("d", 45_000), ("e", 60_000)] {
        let first = first / 128 * 128;
        for entry in reserve(namespace, first..(first + 15_104).min(65_536)) {
            apply(&mut cluster.index, Kind::ServiceEntry, entry);
        }
    }
    let told = cluster.apply(entry("db", &["db.example"])).problems;
    assert!(told.len() == 1 && told[0].reason.contains("no address is free"), "{told:?}");
    assert_eq!(cluster.apply(entry("db2", &["db2.example"])).problems, [], "once");
    let changes = cluster.due("db").unwrap();
    assert_eq!(changes.addresses.unwrap().len(), 1, "of IPv6 there are");
    assert_eq!(
        (&changes.conditions[0]["status"], &changes.conditions[0]["reason"]),
        (&json!("False"), &json!("AddressesExhausted"))
    );
    let freed = cluster.index.handle(Event::Deleted(Kind::ServiceEntry, ObjectName::new("a", "e128")));
    assert!(freed.verdicts);
    let due = cluster.due("db").unwrap();
    assert_eq!((due.addresses.unwrap().len(), &due.conditions[0]["status"]), (2, &json!("True")));
}

/// The ranges are everybody's.
#[test]
fn one_namespace_has_no_more_than_a_part() {
    let mut cluster = Cluster::new();
    for number in 0..70 {
        let hosts: Vec<String> = (0..256).map(|host| format!("h{host}.e{number}")).collect();
        cluster.apply(entry(&format!("e{number:02}"), &hosts.iter().map(String::as_str).collect::<Vec<_>>()));
    }
    let due = |number| cluster.due(&format!("e{number:02}")).and_then(|due| due.addresses);
    let count: usize = (0..70).filter_map(due).map(|all| all.len() / 2).sum();
    assert!((8_000..13_000).contains(&count), "{count}");
    // Nor can it keep others from them.
    for first in (0..65_536_u32).step_by(256) {
        let addresses: Vec<String> = (0..256).map(|n| format!("240.240.{}.{n}", first / 256)).collect();
        let spec = json!({"hosts": ["x"], "resolution": "NONE", "addresses": addresses});
        let object = with(service_entry(&format!("e{first}"), spec), "/metadata/namespace", json!("bank"));
        apply(&mut cluster.index, Kind::ServiceEntry, object);
    }
    let mut other = entry("other", &["other.example"]);
    other["metadata"]["namespace"] = json!("other");
    apply(&mut cluster.index, Kind::ServiceEntry, other);
    let due = cluster.index.verdict(&(Kind::ServiceEntry, ObjectName::new("other", "other"))).unwrap();
    assert_eq!(due.addresses.map(|all| all.len()), Some(2));
}

/// Some give way to older ones, and each of these is looked at; others are not.
#[test]
fn many_hosts_are_no_more_work_than_there_are() {
    let (mut index, mut touched) = (index(), 0);
    for number in 0..160 {
        let hosts: Vec<String> = (0..256).map(|host| format!("h{host}.e{number}.example")).collect();
        let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
        let object = entry(&format!("e{number}"), &hosts);
        let object = with(object, "/metadata/namespace", json!(format!("ns{}", number % 10)));
        touched += apply(&mut index, Kind::ServiceEntry, object).keys.len();
    }
    assert_eq!(index.unsaid().len(), 160);
    assert!(touched < 160 * 2 * 256 * 2, "{touched}");
}
