//! What entries may cost the proxies, and which are in force.

use super::*;
use crate::index::Problem;
use crate::index::pod::{Labels, canonical};

/// What the agent tells proxies of these, in bytes.
fn told(index: &Index, keys: &BTreeSet<Key>) -> usize {
    let resources = keys.iter().filter_map(|key| index.resource(key));
    resources.map(|resource| prost::Message::encoded_len(&resource)).sum()
}

/// The schema allows each of the lists to be long; what all proxies keep is their product.
#[test]
fn one_object_costs_no_more_than_so_much() {
    let ports: Vec<Value> =
        (1..=256).map(|number| json!({"number": number, "name": format!("p{number}")})).collect();
    let hosts: Vec<String> = (0..256).map(|number| format!("h{number}.example")).collect();
    let endpoints: Vec<Value> = (0..4096)
        .map(|number| json!({"address": format!("10.9.{}.{}", number / 256, number % 256)}))
        .collect();
    let addresses: Vec<String> = (0..4096).map(|n| format!("240.0.{}.{}", n / 256, n % 256)).collect();
    let names = vec!["spiffe://cluster.local/ns/shop/sa/db".to_owned(); 20_000];
    for (what, resolution, lists, cut) in [
        (
            "ports of hosts of endpoints",
            "STATIC",
            json!({"hosts": hosts, "ports": ports, "endpoints": endpoints}),
            &["256 spec.hosts", "4096 spec.endpoints"][..],
        ),
        (
            "hosts of endpoints",
            "STATIC",
            json!({"hosts": hosts, "endpoints": endpoints}),
            &["4096 spec.endpoints"],
        ),
        ("addresses of hosts", "NONE", json!({"hosts": hosts, "addresses": addresses}), &["256 spec.hosts"]),
        (
            "names of hosts",
            "NONE",
            json!({"hosts": hosts, "subjectAltNames": names}),
            &["20000 spec.subjectAltNames", "256 spec.hosts"],
        ),
        (
            "a long name",
            "NONE",
            json!({"subjectAltNames": ["n".repeat(1 << 20)]}),
            &["1 spec.subjectAltNames"],
        ),
        ("hosts that are looked up", "DNS", json!({"hosts": hosts, "ports": ports}), &["256 spec.hosts"]),
        (
            "hosts of what is selected",
            "STATIC",
            json!({"hosts": hosts, "ports": ports, "workloadSelector": {"labels": {"app": "db"}}}),
            &["256 spec.hosts"],
        ),
        ("much, and not too much", "STATIC", json!({"endpoints": &endpoints[..512]}), &[]),
    ] {
        let mut index = index();
        apply(&mut index, Kind::Pod, with(pod("web", "10.0.0.9"), "/metadata/labels", json!({"app": "db"})));
        let changes = apply(&mut index, Kind::ServiceEntry, service_entry("db", spec(resolution, lists)));
        let bytes = told(&index, &changes.keys);
        assert!(bytes < 1 << 20, "{what}: {bytes}");
        let said: Vec<&str> = changes.problems.iter().map(|problem| &*problem.reason).collect();
        assert_eq!(said.len(), cut.len(), "{what}: {said:?}");
        for (said, expect) in said.iter().zip(cut) {
            assert!(said.contains(expect), "{what}: {said}");
        }
        // So that much of what may be is.
        assert!(cut.is_empty() || what == "a long name" || bytes > 1 << 13, "{what}: {bytes}");
    }
}

fn vm(number: u32) -> Value {
    workload_entry(&format!("vm-{number:04}"), json!({"address": "192.0.2.1", "labels": {"app": "db"}}))
}

/// Whatever is selected names the services, of all entries together, and Kubernetes' own before them.
#[test]
fn what_is_selected_names_no_more_services_than_so_many() {
    let mut index = index();
    apply(&mut index, Kind::Pod, with(pod("web", "10.0.0.9"), "/metadata/labels", json!({"app": "db"})));
    apply(&mut index, Kind::WorkloadEntry, vm(0));
    let mut crowded = Vec::new();
    for number in 0..6 {
        let hosts: Vec<String> = (0..250).map(|host| format!("h{host}.s{number}.example")).collect();
        let all = spec("STATIC", json!({"hosts": hosts, "workloadSelector": {"labels": {"app": "db"}}}));
        let changes = apply(&mut index, Kind::ServiceEntry, service_entry(&format!("s{number}"), all));
        crowded.extend(changes.problems.into_iter().map(|problem| (number, problem.kind, problem.reason)));
    }
    // The machine, which is one of fewer, from the first on, and the pod as well from some of them.
    let first = &crowded[0];
    assert!((first.0, first.1) == (0, Kind::WorkloadEntry) && first.2.ends_with("0 more"), "{crowded:?}");
    let last = crowded.last().unwrap();
    assert!((last.0, last.1) == (5, Kind::Pod) && last.2.ends_with("1 more"), "{crowded:?}");
    let count = workload(&index, "web").unwrap().services.len();
    assert!((250..600).contains(&count), "{count}");
    let count = workload_of(&index, &entry_key("vm-0000")).services.len();
    assert!((20..100).contains(&count), "{count}");
    let cart = with(service("cart", "10.96.0.7"), "/spec/selector", json!({"app": "db"}));
    apply(&mut index, Kind::Service, cart);
    let services = workload_of(&index, &entry_key("vm-0000")).services;
    assert!(
        services.contains_key("shop/cart.shop.svc.cluster.local"),
        "a Service lost an endpoint to entries"
    );
}

/// Whatever their labels and texts are.
#[test]
fn all_machines_of_a_namespace_cost_no_more_than_so_much() {
    let mut index = index();
    let many: serde_json::Map<String, Value> =
        (0..256).map(|number| (format!("label-{number}"), json!("v".repeat(63)))).collect();
    let mut large = vm(0);
    large["spec"]["labels"] = many.into();
    large["spec"]["network"] = json!("n".repeat(2048));
    let created = |number: u32| format!("2026-01-01T00:{:02}:{:02}Z", 59 - number / 60, 59 - number % 60);
    let (mut keys, mut left_out) = (BTreeSet::new(), BTreeSet::new());
    for number in 0..1500 {
        let object = with(large.clone(), "/metadata/name", json!(format!("vm-{number:04}")));
        let changes = apply(
            &mut index,
            Kind::WorkloadEntry,
            with(object, "/metadata/creationTimestamp", json!(created(number))),
        );
        keys.extend(changes.keys);
        let newest = |problem: &&Problem| problem.reason.contains("not in force");
        left_out.extend(changes.problems.iter().filter(newest).map(|problem| problem.name.name.to_string()));
    }
    assert!((100..1400).contains(&left_out.len()), "{}", left_out.len());
    assert_eq!(left_out.first().map(String::as_str), Some("vm-0000"), "the newest");
    assert_eq!(keys.iter().filter(|key| index.resource(key).is_some()).count(), 1500 - left_out.len());
    let said: Vec<Value> =
        verdicts(&index).into_iter().map(|verdict| verdict.conditions[0].clone()).collect();
    let over = said.iter().filter(|condition| condition["reason"] == "OverBudget");
    assert_eq!(over.count(), left_out.len());
    // There are so many of the small ones, too.
    let mut index = super::super::index();
    let all = (0..5000).map(|number| apply(&mut index, Kind::WorkloadEntry, vm(number)).keys);
    let keys: BTreeSet<Key> = all.flatten().collect();
    assert_eq!(keys.iter().filter(|key| index.resource(key).is_some()).count(), 4096);
}

/// A name that metrics have is no longer than a label's value may be.
#[test]
fn what_a_long_label_says_is_not_told() {
    let mut index = index();
    let long = json!({"address": "192.0.2.1", "labels": {"app": "x".repeat(1 << 20), "version": "2"}});
    let changes = apply(&mut index, Kind::WorkloadEntry, workload_entry("vm", long));
    assert!(changes.problems[0].reason.contains("1 labels"), "{:?}", changes.problems);
    let workload = workload_of(&index, &entry_key("vm"));
    assert_eq!((&*workload.canonical_name, &*workload.canonical_revision), ("vm", "2"));
    let labels: Labels = [("app".to_owned(), "é".repeat(1000))].into();
    assert_eq!(canonical(&labels, "web").0, "é".repeat(63));
}

/// A status that says what is wrong with it is not one that says that it is not in force.
#[test]
fn an_entry_with_faults_says_when_it_is_left_out() {
    let mut index = index();
    let mut object = vm(9999);
    object["spec"]["labels"]["long"] = json!("x".repeat(64));
    object["metadata"]["creationTimestamp"] = json!("2026-02-02T00:00:00Z");
    apply(&mut index, Kind::WorkloadEntry, object.clone());
    let said = verdicts(&index)[0].conditions[0].clone();
    assert_eq!((&said["status"], &said["reason"]), (&json!("False"), &json!("UnsupportedValue")));
    object["status"] = json!({"conditions": [said]});
    apply(&mut index, Kind::WorkloadEntry, object);
    assert_eq!(verdicts(&index), []);
    let others: Vec<Value> = (0..4096).map(vm).collect();
    for object in others {
        apply(
            &mut index,
            Kind::WorkloadEntry,
            with(
                object,
                "/status",
                json!({"conditions": [{
                    "type": "ZtunnelAccepted", "status": "True", "reason": "Accepted", "observedGeneration": 0,
                }]}),
            ),
        );
    }
    let verdicts = verdicts(&index);
    assert_eq!(verdicts.len(), 1);
    let said = &verdicts[0].conditions[0];
    assert_eq!((&said["status"], &said["reason"]), (&json!("False"), &json!("OverBudget")));
}

/// Endpoints that are left out leave no others in their place.
#[test]
fn an_entry_whose_endpoints_cost_too_much_is_not_looked_up_instead() {
    let mut index = index();
    let labels: serde_json::Map<String, Value> =
        (0..256).map(|number| (format!("{}-{number}", "k".repeat(300)), json!("v".repeat(63)))).collect();
    let hosts: Vec<String> = (0..250).map(|number| format!("h{number}.example")).collect();
    let ports: Vec<Value> = (1..=250).map(|number| json!({"number": number})).collect();
    let all =
        json!({"hosts": hosts, "ports": ports, "endpoints": [{"address": "a.example", "labels": labels}]});
    let changes = apply(&mut index, Kind::ServiceEntry, service_entry("db", spec("DNS", all)));
    let said: Vec<&str> = changes.problems.iter().map(|problem| &*problem.reason).collect();
    assert!(said.iter().any(|said| said.contains("of the 1 spec.endpoints 0 are used")), "{said:?}");
    assert!(!changes.keys.iter().any(|key| matches!(key, Key::Listed(..))), "{:?}", changes.keys.len());
}

/// Of many entries the older ones are in force, whichever came first.
#[test]
fn a_namespace_costs_no_more_than_so_much() {
    let hosts: Vec<String> = (0..250).map(|number| format!("h{number}.example")).collect();
    let names = vec!["spiffe://cluster.local/ns/shop/sa/db".to_owned(); 35];
    let entry = |number: usize| {
        let all = spec("NONE", json!({"hosts": hosts, "subjectAltNames": names}));
        let name = format!("e{number:02}");
        let created = format!("2026-01-01T00:00:{:02}Z", 59 - number);
        (name.clone(), with(service_entry(&name, all), "/metadata/creationTimestamp", json!(created)))
    };
    let mut index = index();
    let entries: Vec<_> = (0..40).map(entry).collect();
    let (mut keys, mut left_out) = (BTreeSet::new(), BTreeSet::new());
    for (name, object) in &entries {
        let changes = apply(&mut index, Kind::ServiceEntry, object.clone());
        // The newest has the smallest number: each that comes is older than all before it, and takes their place.
        assert!(
            changes.problems.iter().all(|problem| &*problem.name.name != name.as_str()),
            "{:?}",
            changes.problems
        );
        left_out.extend(changes.problems.iter().map(|problem| problem.name.name.to_string()));
        keys.extend(changes.keys);
    }
    let count = left_out.len();
    assert!((1..20).contains(&count), "{left_out:?}");
    assert_eq!(left_out.first().map(String::as_str), Some("e00"));
    let statuses = |index: &Index| {
        let verdicts = verdicts(index);
        let refused = verdicts.iter().filter(|verdict| verdict.conditions[0]["status"] == "False");
        refused.map(|verdict| verdict.name.name.to_string()).collect::<BTreeSet<_>>()
    };
    assert_eq!(statuses(&index), left_out);
    // Each has the same hosts: what is in force of those is what the oldest says.
    assert_eq!(service_of(&index, &host("h0.example")).name, "e39");
    // Of the entries of another namespace nothing is left out.
    let elsewhere = with(entries[0].1.clone(), "/metadata/namespace", json!("other"));
    assert_eq!(apply(&mut index, Kind::ServiceEntry, elsewhere).problems, []);
    // One that goes makes room, for the oldest of those that had none.
    index.handle(Event::Deleted(Kind::ServiceEntry, ObjectName::new("shop", "e39")));
    let left = statuses(&index);
    assert_eq!((left.len(), left.is_subset(&left_out)), (count - 1, true));
    assert!(!left.contains(left_out.last().unwrap()), "{left:?}");
    for (name, _) in &entries {
        index.handle(Event::Deleted(Kind::ServiceEntry, ObjectName::new("shop", name)));
    }
    assert!(keys.iter().all(|key| index.resource(key).is_none()));
}
