//! What a session keeps of what a stranger says, and how much it tells at once.

use mesh_core::proto::ADDRESS_TYPE;
use mesh_core::proto::discovery::Node;
use mesh_core::proto::workload::{Address, Workload, address};

use super::*;

fn put(snapshot: &mut Snapshot, namespace: &str, name: &str, content: usize) -> Option<Name> {
    let workload = Workload {
        uid: name.to_owned(),
        name: "n".repeat(content),
        namespace: namespace.to_owned(),
        ..Default::default()
    };
    snapshot.put(Type::Address, name, Some(&Address { r#type: Some(address::Type::Workload(workload)) }))
}

fn of_shop() -> Scope {
    Scope::Namespace { own: "shop".into(), root: "istio-system".into() }
}

fn request() -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: ADDRESS_TYPE.to_owned(), ..Default::default() }
}

fn holding(names: impl IntoIterator<Item = String>) -> DeltaDiscoveryRequest {
    let versions = names.into_iter().map(|name| (name, "0".to_owned()));
    DeltaDiscoveryRequest { initial_resource_versions: versions.collect(), ..request() }
}

/// Whoever may have a stream says what it likes; the agent has to remember it for as long as the stream lasts.
#[test]
fn of_what_a_stranger_says_only_what_there_is_is_kept() {
    let mut snapshot = Snapshot::default();
    put(&mut snapshot, "shop", "mine", 1);
    put(&mut snapshot, "bank", "theirs", 1);
    let named = || ["mine", "theirs"].map(str::to_owned).into_iter();
    let mut session = Session::new(of_shop());
    session.receive(holding((0..MOST_GONE - 1).map(|n| n.to_string()).chain(named())), &snapshot).unwrap();
    let response = session.next(&snapshot).unwrap();
    let told: Vec<&str> = response.resources.iter().map(|resource| resource.name.as_str()).collect();
    assert_eq!((told, response.removed_resources.len()), (vec!["mine"], MOST_GONE));
    assert!(response.removed_resources.iter().any(|name| name == "theirs"), "as if it did not exist");
    let kept = &session.subscriptions[&Type::Address];
    assert!(
        kept.held.capacity() < 8 && kept.gone.capacity() == 0,
        "{} {}",
        kept.held.capacity(),
        kept.gone.capacity()
    );
    let mut session = Session::new(of_shop());
    let too_many = session.receive(holding((0..=MOST_GONE).map(|n| n.to_string())), &snapshot);
    assert_eq!(too_many, Err(BadRequest::TooMany(MOST_GONE + 1)));
    assert!(session.subscriptions.is_empty());
    // This node's ztunnel holds what it was told, however much of it is gone.
    let mut session = Session::default();
    session.receive(holding((0..=MOST_GONE).map(|n| n.to_string())), &snapshot).unwrap();
    assert_eq!(session.next(&snapshot).unwrap().removed_resources.len(), MOST_GONE + 1);
}

/// A client that waits for a name is answered: what there is it has been told.
#[test]
fn names_beside_everything_are_answered_and_no_more() {
    let mut snapshot = Snapshot::default();
    put(&mut snapshot, "shop", "mine", 1);
    let asking = |nonce: &str, names: &[&str]| DeltaDiscoveryRequest {
        response_nonce: nonce.to_owned(),
        resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
        ..request()
    };
    let mut session = Session::new(of_shop());
    session.receive(asking("", &["*", "/10.0.0.1"]), &snapshot).unwrap();
    let first = session.next(&snapshot).unwrap();
    assert_eq!(
        (first.resources.len(), first.removed_resources.as_slice()),
        (1, &["/10.0.0.1".to_owned()][..])
    );
    session.receive(asking(&first.nonce, &["mine"]), &snapshot).unwrap();
    assert_eq!(session.next(&snapshot), None, "it has that");
    session.receive(asking("", &["/10.0.0.2"]), &snapshot).unwrap();
    let second = session.next(&snapshot).unwrap();
    assert_eq!((second.resources.len(), second.removed_resources), (0, vec!["/10.0.0.2".to_owned()]));
    let many: Vec<String> = (0..=MOST_GONE).map(|n| n.to_string()).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(session.receive(asking("", &many), &snapshot), Err(BadRequest::TooMany(MOST_GONE + 1)));
}

/// All parts of a response, each acknowledged: how many there were, and the names in them.
fn parts(session: &mut Session, snapshot: &Snapshot) -> (usize, Vec<String>) {
    let (mut count, mut names) = (0, Vec::new());
    while let Some(part) = session.next(snapshot) {
        count += 1;
        let bytes: usize = part.resources.iter().map(|one| one.resource.as_ref().unwrap().value.len()).sum();
        assert!(bytes < PART + (2 << 20) || !session.in_parts, "{bytes}");
        names.extend(part.resources.iter().map(|one| one.name.clone()));
        assert_eq!(session.next(snapshot), None, "one without an answer");
        session.receive(DeltaDiscoveryRequest { response_nonce: part.nonce, ..request() }, snapshot).unwrap();
        if !part.continues {
            break;
        }
    }
    names.sort();
    (count, names)
}

#[test]
fn a_large_mesh_is_told_in_parts_to_those_who_understand_it() {
    let mut snapshot = Snapshot::default();
    let all: Vec<String> = (0..10).map(|number| format!("w{number}")).collect();
    all.iter().for_each(|name| drop(put(&mut snapshot, "shop", name, 1 << 20)));
    let features = |features: &[&str]| {
        let client_features = features.iter().map(ToString::to_string).collect();
        DeltaDiscoveryRequest { node: Some(Node { client_features, ..Default::default() }), ..request() }
    };
    let mut session = Session::default();
    session.receive(features(&[]), &snapshot).unwrap();
    assert_eq!(parts(&mut session, &snapshot), (1, all.clone()), "others would take a part for everything");

    let mut session = Session::default();
    session.receive(features(&[IN_PARTS]), &snapshot).unwrap();
    let first = session.next(&snapshot).unwrap();
    assert!(first.continues && first.resources.len() < 10);
    // What changes in between is in a later one, and what goes as well.
    let has = |name: &&String| first.resources.iter().any(|one| one.name == **name);
    let (told, untold) = (all.iter().find(has).unwrap(), all.iter().find(|name| !has(name)).unwrap());
    let changed = [put(&mut snapshot, "shop", told, 1), put(&mut snapshot, "shop", "new", 1)];
    session.changed(Type::Address, changed.into_iter().flatten(), &snapshot);
    let gone = snapshot.put(Type::Address, untold, None::<&Address>);
    session.changed(Type::Address, gone, &snapshot);
    session
        .receive(DeltaDiscoveryRequest { response_nonce: first.nonce.clone(), ..request() }, &snapshot)
        .unwrap();
    let (count, rest) = parts(&mut session, &snapshot);
    assert!(count > 1 && rest.contains(told) && rest.contains(&"new".to_owned()) && !rest.contains(untold));
    assert_eq!(first.resources.len() + rest.len(), 10 - 1 + 2);
    assert_eq!(session.next(&snapshot), None);

    // The last part says that it is the last, even if nothing is left for it.
    let mut session = Session::default();
    session.receive(features(&[IN_PARTS]), &snapshot).unwrap();
    let first = session.next(&snapshot).unwrap();
    let told: HashSet<&str> = first.resources.iter().map(|one| one.name.as_str()).collect();
    let rest: Vec<Name> = snapshot.all(Type::Address).map(|(name, _)| Name::clone(name)).collect();
    for name in rest.iter().filter(|name| !told.contains(&***name)) {
        snapshot.put(Type::Address, name, None::<&Address>);
    }
    session.changed(Type::Address, rest, &snapshot);
    session
        .receive(DeltaDiscoveryRequest { response_nonce: first.nonce.clone(), ..request() }, &snapshot)
        .unwrap();
    let last = session.next(&snapshot).unwrap();
    assert!(!last.continues && last.resources.is_empty() && last.removed_resources.is_empty(), "{last:?}");
}
