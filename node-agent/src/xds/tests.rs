//! Sessions step by step, and the server with a real client over a unix socket.

mod server;

use std::collections::BTreeSet;

use mesh_core::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, ErrorDetail};
use mesh_core::proto::workload::{Address, Workload, address};
use mesh_core::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

use super::session::{BadRequest, Received, Session};
use super::snapshot::{Name, Snapshot, Type};

fn workload(uid: &str, name: &str) -> Address {
    let workload = Workload { uid: uid.to_owned(), name: name.to_owned(), ..Default::default() };
    Address { r#type: Some(address::Type::Workload(workload)) }
}

/// Puts resources (uid, content); an empty content removes. Returns the names that changed.
fn put(snapshot: &mut Snapshot, resources: &[(&str, &str)]) -> Vec<Name> {
    let put = |(uid, name): &(&str, &str)| {
        let resource = (!name.is_empty()).then(|| workload(uid, name));
        snapshot.put(Type::Address, uid, resource.as_ref())
    };
    resources.iter().filter_map(put).collect()
}

fn subscribe(type_url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: type_url.to_owned(), ..Default::default() }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { response_nonce: response.nonce.clone(), ..subscribe(&response.type_url) }
}

fn sent(response: &DeltaDiscoveryResponse) -> BTreeSet<&str> {
    response.resources.iter().map(|resource| resource.name.as_str()).collect()
}

/// A session whose first responses were acked.
fn subscribed(snapshot: &Snapshot) -> Session {
    let mut session = Session::default();
    for r#type in Type::ALL {
        assert_eq!(session.receive(subscribe(r#type.url()), snapshot), Ok(Received::Subscribed(r#type)));
    }
    while let Some(response) = session.next(snapshot) {
        session.receive(ack(&response), snapshot).unwrap();
    }
    session
}

#[test]
fn every_type_is_answered_even_when_empty() {
    let (mut session, snapshot) = (Session::default(), Snapshot::default());
    assert_eq!(session.next(&snapshot), None, "nobody asked");
    session.receive(subscribe(ADDRESS_TYPE), &snapshot).unwrap();
    let first = session.next(&snapshot).unwrap();
    assert_eq!((first.type_url.as_str(), first.resources.len()), (ADDRESS_TYPE, 0));
    assert_eq!(session.next(&snapshot), None, "not acked");
    session.receive(subscribe(AUTHORIZATION_TYPE), &snapshot).unwrap();
    let second = session.next(&snapshot).unwrap();
    assert_eq!(second.type_url, AUTHORIZATION_TYPE);
    assert_ne!(first.nonce, second.nonce);
    assert_eq!(session.receive(ack(&first), &snapshot), Ok(Received::Acked(Type::Address)));
    assert_eq!(session.next(&snapshot), None, "nothing new");
}

#[test]
fn changes_are_sent_once_and_removals_by_name() {
    let mut snapshot = Snapshot::default();
    put(&mut snapshot, &[("a", "1"), ("b", "1")]);
    let mut session = subscribed(&snapshot);
    let changed = put(&mut snapshot, &[("a", "2"), ("b", ""), ("c", "1")]);
    session.changed(Type::Address, changed, &snapshot);
    let response = session.next(&snapshot).unwrap();
    assert_eq!(sent(&response), BTreeSet::from(["a", "c"]));
    assert_eq!(response.removed_resources, ["b"]);
    session.receive(ack(&response), &snapshot).unwrap();
    assert_eq!(session.next(&snapshot), None);
    assert!(put(&mut snapshot, &[("a", "2")]).is_empty(), "the same again is no change");
}

#[test]
fn a_slow_client_is_brought_up_to_date_by_one_response() {
    let mut snapshot = Snapshot::default();
    put(&mut snapshot, &[("a", "0")]);
    let mut session = subscribed(&snapshot);
    let change = |session: &mut Session, snapshot: &mut Snapshot, resources: &[(&str, &str)]| {
        let changed = put(snapshot, resources);
        session.changed(Type::Address, changed, snapshot);
    };
    change(&mut session, &mut snapshot, &[("a", "1")]);
    let outstanding = session.next(&snapshot).unwrap();
    for round in 0..1000 {
        // Comes and goes under ever new names, as pods do.
        change(&mut session, &mut snapshot, &[("a", &format!("r{round}")), (&format!("pod-{round}"), "x")]);
        change(&mut session, &mut snapshot, &[(&format!("pod-{round}"), "")]);
        assert_eq!(session.next(&snapshot), None, "one response without an answer");
    }
    change(&mut session, &mut snapshot, &[("b", "1")]);
    session.receive(ack(&outstanding), &snapshot).unwrap();
    let response = session.next(&snapshot).unwrap();
    assert_eq!(sent(&response), BTreeSet::from(["a", "b"]));
    assert!(response.removed_resources.is_empty(), "it never had them");
    session.receive(ack(&response), &snapshot).unwrap();
    assert_eq!(session.next(&snapshot), None);
}

#[test]
fn a_client_that_was_here_before_is_sent_the_difference() {
    let mut snapshot = Snapshot::default();
    put(&mut snapshot, &[("same", "1"), ("changed", "1")]);
    let version = |name: &str| snapshot.find(Type::Address, name).unwrap().version.text();
    let held = [
        ("same", version("same")),
        ("changed", version("changed")),
        ("gone", "0000000000000001".into()),
        ("foreign", "not a version".into()),
    ];
    put(&mut snapshot, &[("changed", "2"), ("new", "1"), ("foreign", "1")]);
    let mut session = Session::default();
    let request = DeltaDiscoveryRequest {
        initial_resource_versions: held.map(|(name, version)| (name.to_owned(), version)).into(),
        ..subscribe(ADDRESS_TYPE)
    };
    session.receive(request, &snapshot).unwrap();
    let response = session.next(&snapshot).unwrap();
    assert_eq!(sent(&response), BTreeSet::from(["changed", "foreign", "new"]));
    assert_eq!(response.removed_resources, ["gone"]);
}

#[test]
fn a_refused_response_is_not_repeated_until_something_changes() {
    let mut snapshot = Snapshot::default();
    let mut session = subscribed(&snapshot);
    let changed = put(&mut snapshot, &[("bad", "1")]);
    session.changed(Type::Address, changed, &snapshot);
    let response = session.next(&snapshot).unwrap();
    let detail = ErrorDetail { code: 3, message: "bad: no addresses".to_owned() };
    let nack = DeltaDiscoveryRequest { error_detail: Some(detail), ..ack(&response) };
    let expect = Received::Nacked {
        r#type: Type::Address,
        names: vec!["bad".into()],
        message: "bad: no addresses".to_owned(),
    };
    assert_eq!(session.receive(nack.clone(), &snapshot), Ok(expect));
    assert_eq!(session.next(&snapshot), None);
    assert_eq!(session.receive(nack, &snapshot), Ok(Received::Ignored), "answered already");
    let changed = put(&mut snapshot, &[("bad", "2")]);
    session.changed(Type::Address, changed, &snapshot);
    assert_eq!(sent(&session.next(&snapshot).unwrap()), BTreeSet::from(["bad"]));
}

#[test]
fn odd_requests() {
    let snapshot = Snapshot::default();
    let mut session = Session::default();
    assert_eq!(
        session.receive(subscribe("type.googleapis.com/envoy.Cluster"), &snapshot),
        Ok(Received::Ignored)
    );
    let named = |names: &[&str]| DeltaDiscoveryRequest {
        resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
        ..subscribe(ADDRESS_TYPE)
    };
    assert_eq!(
        session.receive(named(&["/10.0.0.1", "a"]), &snapshot),
        Err(BadRequest::Names("/10.0.0.1".into()))
    );
    assert_eq!(session.receive(named(&["*"]), &snapshot), Ok(Received::Subscribed(Type::Address)));
    let first = session.next(&snapshot).unwrap();
    let stale = DeltaDiscoveryRequest { response_nonce: "77".into(), ..ack(&first) };
    assert_eq!(session.receive(stale, &snapshot), Ok(Received::Ignored));
    assert_eq!(session.receive(ack(&first), &snapshot), Ok(Received::Acked(Type::Address)));
}

#[test]
fn a_version_survives_a_restart() {
    let (mut one, mut other) = (Snapshot::default(), Snapshot::default());
    put(&mut one, &[("a", "1")]);
    put(&mut other, &[("a", "0"), ("a", "1")]);
    let version = |snapshot: &Snapshot| snapshot.find(Type::Address, "a").unwrap().version;
    assert_eq!(version(&one), version(&other));
}

#[test]
fn a_workload_never_names_a_policy_that_is_not_there() {
    let mut snapshot = Snapshot::default();
    put(&mut snapshot, &[("a", "0")]);
    let policy = mesh_core::proto::security::Authorization::default();
    let mut session = subscribed(&snapshot);
    let policies = |session: &mut Session, snapshot: &mut Snapshot, name: &str, exists: bool| {
        let changed = snapshot.put(Type::Authorization, name, exists.then_some(&policy));
        session.changed(Type::Authorization, changed, snapshot);
    };
    let workloads = |session: &mut Session, snapshot: &mut Snapshot, resources: &[(&str, &str)]| {
        let changed = put(snapshot, resources);
        session.changed(Type::Address, changed, snapshot);
    };
    // A new policy first, also when it has to wait for an answer to an earlier one.
    policies(&mut session, &mut snapshot, "p1", true);
    let first = session.next(&snapshot).unwrap();
    policies(&mut session, &mut snapshot, "p2", true);
    workloads(&mut session, &mut snapshot, &[("a", "names p2")]);
    assert_eq!(session.next(&snapshot), None);
    session.receive(ack(&first), &snapshot).unwrap();
    let second = session.next(&snapshot).unwrap();
    assert_eq!(sent(&second), BTreeSet::from(["p2"]));
    let third = session.next(&snapshot).unwrap();
    assert_eq!(sent(&third), BTreeSet::from(["a"]), "what was sent is there, with or without an answer");
    // One that is gone last, also when the workloads have to wait.
    session.receive(ack(&second), &snapshot).unwrap();
    workloads(&mut session, &mut snapshot, &[("a", "names none")]);
    policies(&mut session, &mut snapshot, "p2", false);
    policies(&mut session, &mut snapshot, "p3", true);
    let new = session.next(&snapshot).unwrap();
    assert_eq!(
        (sent(&new), new.removed_resources.len()),
        (BTreeSet::from(["p3"]), 0),
        "what is new does not wait"
    );
    session.receive(ack(&new), &snapshot).unwrap();
    assert_eq!(session.next(&snapshot), None);
    session.receive(ack(&third), &snapshot).unwrap();
    assert_eq!(sent(&session.next(&snapshot).unwrap()), BTreeSet::from(["a"]));
    assert_eq!(session.next(&snapshot).unwrap().removed_resources, ["p2"]);
    assert_eq!(session.next(&snapshot), None);
}

#[test]
fn a_policy_is_never_about_nobody() {
    use mesh_core::proto::security::{Authorization, Scope};
    let mut snapshot = Snapshot::default();
    put(&mut snapshot, &[("a", "0")]);
    let policy = |scope: Scope| Authorization { scope: scope.into(), ..Default::default() };
    snapshot.put(Type::Authorization, "p", Some(&policy(Scope::Namespace)));
    let mut session = subscribed(&snapshot);
    let mut change = |session: &mut Session, scope, workload: &str| {
        let changed = snapshot.put(Type::Authorization, "p", Some(&policy(scope)));
        session.changed(Type::Authorization, changed, &snapshot);
        let changed = put(&mut snapshot, &[("a", workload)]);
        session.changed(Type::Address, changed, &snapshot);
        std::iter::from_fn(|| {
            let response = session.next(&snapshot)?;
            session.receive(ack(&response), &snapshot).unwrap();
            Some(response.resources[0].name.clone())
        })
        .collect::<Vec<_>>()
    };
    assert_eq!(change(&mut session, Scope::WorkloadSelector, "names p"), ["a", "p"], "first who names it");
    assert_eq!(
        change(&mut session, Scope::Namespace, "names none"),
        ["p", "a"],
        "first whom it is about then"
    );
    assert_eq!(change(&mut session, Scope::Global, "1"), ["p", "a"]);
    assert_eq!(change(&mut session, Scope::WorkloadSelector, "names p again"), ["a", "p"]);
    // A client from before, of which only the names are known: it may have p at large, and has one that is gone. It asks
    // for policies first and is answered at once.
    let before = || DeltaDiscoveryRequest {
        initial_resource_versions: [("p".to_owned(), "0".to_owned()), ("gone".to_owned(), "0".to_owned())]
            .into(),
        ..subscribe(AUTHORIZATION_TYPE)
    };
    let told = |response: DeltaDiscoveryResponse| {
        let names = response.resources.into_iter().map(|resource| resource.name);
        names.chain(response.removed_resources.into_iter().map(|name| format!("-{name}"))).collect::<Vec<_>>()
    };
    let mut session = Session::default();
    session.receive(before(), &snapshot).unwrap();
    let first = session.next(&snapshot).unwrap();
    assert_eq!(told(first.clone()), Vec::<String>::new(), "the workloads have to come first");
    session.receive(subscribe(ADDRESS_TYPE), &snapshot).unwrap();
    assert_eq!(told(session.next(&snapshot).unwrap()), ["a"]);
    session.receive(ack(&first), &snapshot).unwrap();
    assert_eq!(told(session.next(&snapshot).unwrap()), ["p", "-gone"]);
    // One that wants no workloads does not wait for them.
    let mut session = Session::default();
    session.receive(before(), &snapshot).unwrap();
    let first = session.next(&snapshot).unwrap();
    assert_eq!(session.next(&snapshot), None);
    session.receive(ack(&first), &snapshot).unwrap();
    assert_eq!(told(session.next(&snapshot).unwrap()), ["p", "-gone"]);
}
