//! Updates in, what a reader then finds.

use super::*;
use crate::addr::{Network, NetworkAddress};
use crate::store;

fn update(name: &str, message: &workload::Address) -> Update {
    let body = prost_types::Any { type_url: ADDRESS_TYPE.into(), value: message.encode_to_vec() };
    Update { name: name.into(), body: Some(body) }
}

fn pod(uid: &str, last: u8) -> workload::Address {
    workload::Address {
        r#type: Some(Type::Workload(workload::Workload {
            uid: uid.into(),
            namespace: "shop".into(),
            addresses: vec![vec![10, 0, 0, last]],
            ..Default::default()
        })),
    }
}

fn service(hostname: &str) -> workload::Address {
    workload::Address {
        r#type: Some(Type::Service(workload::Service {
            namespace: "shop".into(),
            hostname: hostname.into(),
            ..Default::default()
        })),
    }
}

#[test]
fn bad_resources_are_named_and_the_others_applied() {
    let (writer, reader) = store::new();
    let mut mesh = Mesh::new(writer, "istio-system", |_| {});
    let garbage = prost_types::Any { type_url: ADDRESS_TYPE.into(), value: vec![0xff; 4] };
    let updates = vec![
        update("c//Pod/shop/a", &pod("c//Pod/shop/a", 1)),
        update("c//Pod/shop/b", &pod("c//Pod/shop/other", 2)),
        Update { name: "garbage".into(), body: Some(garbage) },
        Update { name: "empty".into(), body: None },
        update("neither", &workload::Address::default()),
        update("shop/web", &service("web")),
    ];
    let rejected = mesh.apply(ADDRESS_TYPE, updates, &[]);
    let names: Vec<&str> = rejected.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["c//Pod/shop/b", "garbage", "empty", "neither"]);
    let size = reader.size();
    assert_eq!((size.workloads, size.services), (1, 1));
    let address = NetworkAddress::new(Network::default(), "10.0.0.1".parse().unwrap());
    assert!(reader.workload_at(&address).is_some());
}

#[test]
fn removal_by_uid_or_service_key() {
    let (writer, reader) = store::new();
    let mut mesh = Mesh::new(writer, "istio-system", |_| {});
    let updates =
        vec![update("c//Pod/shop/a", &pod("c//Pod/shop/a", 1)), update("shop/web", &service("web"))];
    assert!(mesh.apply(ADDRESS_TYPE, updates, &[]).is_empty());
    mesh.apply(ADDRESS_TYPE, vec![], &["c//Pod/shop/a".into(), "shop/web".into(), "unknown".into()]);
    assert_eq!(reader.size(), store::Size::default());
}

#[test]
fn policies_are_kept_by_name() {
    let (writer, reader) = store::new();
    let mut mesh = Mesh::new(writer, "istio-system", |_| {});
    let policy = security::Authorization { name: "p".into(), namespace: "shop".into(), ..Default::default() };
    let body = prost_types::Any { type_url: AUTHORIZATION_TYPE.into(), value: policy.encode_to_vec() };
    let updates = vec![Update { name: "shop/p".into(), body: Some(body) }];
    assert!(mesh.apply(AUTHORIZATION_TYPE, updates, &[]).is_empty());
    assert_eq!(&*reader.authorizations()[0].key, "shop/p");
    mesh.apply(AUTHORIZATION_TYPE, vec![], &["shop/p".into()]);
    assert_eq!(reader.size().authorizations, 0);
}

fn claimed(bytes: &[&[u8]]) -> workload::Address {
    let addresses = bytes.iter().map(|bytes| bytes.to_vec()).collect();
    let broken = workload::Workload {
        uid: "c//Pod/shop/bad".into(),
        namespace: "shop".into(),
        addresses,
        status: 9,
        ..Default::default()
    };
    workload::Address { r#type: Some(Type::Workload(broken)) }
}

/// What a client finds at 10.0.0.*last*.
fn found(reader: &store::Reader, last: u8) -> String {
    let address = NetworkAddress::new(Network::default(), [10, 0, 0, last].into());
    match reader.find(&address, "shop") {
        Some(store::Found::Workload(workload)) => workload.uid.to_string(),
        Some(store::Found::Service(entry)) => entry.service.key.to_string(),
        Some(store::Found::Refused(refused)) => format!("refused {}", refused.name),
        None => "nothing".to_owned(),
    }
}

#[test]
fn a_refused_resource_closes_its_addresses() {
    let bad = "c//Pod/shop/bad";
    let mut service = service("web");
    if let Some(Type::Service(service)) = &mut service.r#type {
        service.addresses = vec![
            workload::NetworkAddress { address: vec![10, 0, 0, 2], ..Default::default() },
            workload::NetworkAddress { address: vec![10, 0, 0, 64], length: Some(26), ..Default::default() },
        ];
        service.ip_families = 9;
    }
    let mut host = claimed(&[&[10, 0, 0, 2]]);
    if let Some(Type::Workload(host)) = &mut host.r#type {
        host.network_mode = 1;
    }
    let refused = format!("refused {bad}");
    for (what, update, effect, at_2, at_70) in [
        (
            "a pod",
            update(bad, &claimed(&[&[10, 0, 0, 2]])),
            Effect::AddressesRefused(1),
            &*refused,
            "nothing",
        ),
        (
            "what can be read",
            update(bad, &claimed(&[&[10, 0, 0, 2], &[1]])),
            Effect::Unreadable,
            &refused,
            "nothing",
        ),
        (
            "another's name",
            update(bad, &pod("c//Pod/shop/other", 2)),
            Effect::AddressesRefused(1),
            &refused,
            "nothing",
        ),
        ("no address", update(bad, &claimed(&[])), Effect::Nothing, "nothing", "nothing"),
        ("a node's address", update(bad, &host), Effect::Nothing, "nothing", "nothing"),
        (
            "a service, with all of its prefix",
            update("shop/web", &service),
            Effect::AddressesRefused(2),
            "refused shop/web",
            "refused shop/web",
        ),
        ("nothing at all", Update { name: bad.into(), body: None }, Effect::Unreadable, "nothing", "nothing"),
    ] {
        let (writer, reader) = store::new();
        let mut mesh = Mesh::new(writer, "istio-system", |_| {});
        let name = update.name.clone();
        let effects: Vec<_> =
            mesh.apply(ADDRESS_TYPE, vec![update], &[]).into_iter().map(|r| r.effect).collect();
        assert_eq!(effects, [effect], "{what}");
        assert_eq!((found(&reader, 2).as_str(), found(&reader, 70).as_str()), (at_2, at_70), "{what}");
        let unreadable = usize::from(effect == Effect::Unreadable);
        assert_eq!((reader.size().refused, reader.size().unreadable), (1, unreadable), "{what}");
        mesh.apply(ADDRESS_TYPE, vec![], &[name]);
        assert_eq!(
            (found(&reader, 2).as_str(), reader.size()),
            ("nothing", store::Size::default()),
            "{what}"
        );
    }
}

#[test]
fn what_is_good_is_found_before_what_was_refused() {
    let (writer, reader) = store::new();
    let mut mesh = Mesh::new(writer, "istio-system", |_| {});
    let bad = || update("c//Pod/shop/bad", &claimed(&[&[10, 0, 0, 1], &[10, 0, 0, 2], &[1]]));
    assert_eq!(mesh.apply(ADDRESS_TYPE, vec![bad()], &[])[0].effect, Effect::Unreadable);
    // Another pod has one of the addresses: it stays reachable, whichever came first.
    let good = update("c//Pod/shop/a", &pod("c//Pod/shop/a", 1));
    assert!(mesh.apply(ADDRESS_TYPE, vec![good], &[]).is_empty());
    assert_eq!(
        (found(&reader, 1), found(&reader, 2)),
        ("c//Pod/shop/a".into(), "refused c//Pod/shop/bad".into())
    );
    // A good form takes the stones away; a later bad one leaves it in force, and closes what only the bad one claims.
    mesh.apply(ADDRESS_TYPE, vec![update("c//Pod/shop/bad", &pod("c//Pod/shop/bad", 3))], &[]);
    assert_eq!((found(&reader, 2), reader.size().refused), ("nothing".into(), 0));
    assert_eq!(mesh.apply(ADDRESS_TYPE, vec![bad()], &[])[0].effect, Effect::LastGood);
    assert_eq!(
        (found(&reader, 3), found(&reader, 2)),
        ("c//Pod/shop/bad".into(), "refused c//Pod/shop/bad".into())
    );
    assert_eq!(reader.size().unreadable, 0);
}

#[test]
fn a_refused_policy_denies_what_it_may_have_selected() {
    use crate::authz::{Connection, Decision, decide};
    use security::Scope::{Global, Namespace, WorkloadSelector};
    let policy = |namespace: &str, scope: i32| security::Authorization {
        name: "p".into(),
        namespace: namespace.into(),
        scope,
        action: 9,
        ..Default::default()
    };
    let body = |policy: &security::Authorization| {
        Some(prost_types::Any { type_url: AUTHORIZATION_TYPE.into(), value: policy.encode_to_vec() })
    };
    let garbage = || Some(prost_types::Any { type_url: AUTHORIZATION_TYPE.into(), value: vec![0xff; 4] });
    let dry_run = security::Authorization { dry_run: true, ..policy("shop", Namespace as i32) };
    // Denied: a pod in shop, one in other, one in other that names shop/p.
    for (what, name, body, denied) in [
        ("all", "istio-system/p", body(&policy("istio-system", Global as i32)), [true, true, true]),
        ("a namespace", "shop/p", body(&policy("shop", Namespace as i32)), [true, false, true]),
        ("selected", "shop/p", body(&policy("shop", WorkloadSelector as i32)), [false, false, true]),
        ("unknown scope", "shop/p", body(&policy("shop", 7)), [true, false, true]),
        ("another namespace's body", "shop/p", body(&policy("x", Namespace as i32)), [true, false, true]),
        ("garbage", "shop/p", garbage(), [true, false, true]),
        ("garbage in the root namespace", "istio-system/p", garbage(), [true, true, true]),
        ("no namespace", "p", garbage(), [true, true, true]),
        ("a dry run", "shop/p", body(&dry_run), [false, false, false]),
    ] {
        let (writer, reader) = store::new();
        let mut mesh = Mesh::new(writer, "istio-system", |_| {});
        let rejected = mesh.apply(AUTHORIZATION_TYPE, vec![Update { name: name.into(), body }], &[]);
        assert_eq!(rejected.len(), 1, "{what}");
        let ask = |namespace: &str, policies: &[&str]| {
            let message = workload::Workload {
                uid: "c//Pod/x/y".into(),
                namespace: namespace.into(),
                authorization_policies: policies.iter().map(|name| (*name).to_owned()).collect(),
                ..Default::default()
            };
            let pod = convert::workload::convert(&message, &mut Names::default()).unwrap();
            let peer = "spiffe://cluster.local/ns/a/sa/b".parse().ok();
            let (client, target) = (([10, 0, 0, 9].into(), 999).into(), ([10, 0, 0, 1].into(), 80).into());
            decide(&reader.policies_of(&pod), &Connection { peer, client, target }) != Decision::Allow
        };
        let asked = [ask("shop", &[]), ask("other", &[]), ask("other", &["shop/p"])];
        assert_eq!(asked, denied, "{what}");
        mesh.apply(AUTHORIZATION_TYPE, vec![], &[name.into()]);
        assert!(!ask("shop", &[]), "{what}: it is gone");
    }
}
