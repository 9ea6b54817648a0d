//! Which pods no network policy can apply to.

use super::*;

fn policy(name: &str, selector: Value) -> Value {
    json!({"metadata": {"namespace": "shop", "name": name}, "spec": {"podSelector": selector}})
}

/// A pod `web` with a label, and one of another node; nothing is known of policies.
fn started() -> Index {
    let mut index = index();
    let mut web = pod("web", "10.0.0.9");
    web["metadata"]["labels"] = json!({"app": "web", "tier": "front"});
    apply(&mut index, Kind::Pod, web);
    let mut far = pod("far", "10.0.1.9");
    far["spec"]["nodeName"] = json!("node-2");
    apply(&mut index, Kind::Pod, far);
    index
}

/// The same, and that there are no policies.
fn known() -> Index {
    let mut index = started();
    index.handle(Event::Listed(Kind::NetworkPolicy));
    index.handle(Event::ApiGroups(vec!["apps".into(), "networking.k8s.io".into()]));
    index
}

fn shortcut(index: &Index, name: &str) -> bool {
    let resource = index.resource(&Key::Pod(ObjectName::new("shop", name))).unwrap();
    let Some(proto::address::Type::Workload(workload)) = resource.r#type else { panic!("no workload") };
    workload.shortcut
}

fn keys(changes: &Changes) -> Vec<String> {
    let name = |key: &Key| match key {
        Key::Pod(name) => name.to_string(),
        other => panic!("{other:?}"),
    };
    changes.keys.iter().map(name).collect()
}

#[test]
fn only_what_is_known_allows_it() {
    let mut index = started();
    assert!(!shortcut(&index, "web"), "nothing is known");
    let changes = index.handle(Event::ApiGroups(vec!["apps".into()]));
    assert!(!shortcut(&index, "web"), "policies are not listed");
    assert_eq!(keys(&changes), ["shop/web"], "pods of other nodes are not ours to say");
    let changes = index.handle(Event::Listed(Kind::NetworkPolicy));
    assert_eq!(keys(&changes), ["shop/web"]);
    assert!(shortcut(&index, "web") && !shortcut(&index, "far"));
    assert!(keys(&index.handle(Event::ApiGroups(vec!["batch".into()]))).is_empty(), "nothing new");
}

#[test]
fn the_agent_serves_without_it() {
    let mut index = index();
    for kind in Kind::ALL {
        index.handle(Event::Listed(kind));
    }
    assert!(index.is_synced(), "an API server that refuses to list them holds up nothing");
}

#[test]
fn a_policy_that_selects_the_pod() {
    for (selector, selects) in [
        (json!({}), true),
        (json!(null), true),
        (json!({"matchLabels": {"app": "web"}}), true),
        (json!({"matchLabels": {"app": "web", "tier": "back"}}), false),
        (json!({"matchLabels": {"app": "other"}}), false),
        (json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["a", "web"]}]}), true),
        (json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["a"]}]}), false),
        (json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["a"]}]}), true),
        (json!({"matchExpressions": [{"key": "none", "operator": "NotIn", "values": ["a"]}]}), true),
        (json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}), false),
        (json!({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}), true),
        (json!({"matchExpressions": [{"key": "none", "operator": "Exists"}]}), false),
        (json!({"matchExpressions": [{"key": "none", "operator": "DoesNotExist"}]}), true),
        (json!({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}), false),
        (json!({"matchExpressions": [{"key": "tier", "operator": "Newer"}]}), true),
        (
            json!({"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "none", "operator": "Exists"}]}),
            false,
        ),
    ] {
        let mut index = known();
        assert!(shortcut(&index, "web"));
        let changes = apply(&mut index, Kind::NetworkPolicy, policy("p", selector.clone()));
        assert_eq!(shortcut(&index, "web"), !selects, "{selector}");
        assert_eq!(keys(&changes), ["shop/web"]);
        index.handle(Event::Deleted(Kind::NetworkPolicy, ObjectName::new("shop", "p")));
        assert!(shortcut(&index, "web"), "{selector} is gone");
    }
}

#[test]
fn policies_of_other_namespaces_are_no_matter() {
    let mut index = known();
    let elsewhere = json!({"metadata": {"namespace": "other", "name": "p"}, "spec": {"podSelector": {}}});
    assert!(keys(&apply(&mut index, Kind::NetworkPolicy, elsewhere)).is_empty());
    assert!(shortcut(&index, "web"));
}

#[test]
fn one_that_cannot_be_read_may_be_about_any_pod() {
    let mut index = known();
    let name = ObjectName::new("shop", "broken");
    let unreadable = Event::Unreadable { kind: Kind::NetworkPolicy, name: name.clone(), reason: "x".into() };
    let changes = index.handle(unreadable);
    assert_eq!((keys(&changes), changes.problems.len()), (vec!["shop/web".to_owned()], 1));
    assert!(!shortcut(&index, "web"));
    // A list without it.
    index.handle(Event::Restarted(Kind::NetworkPolicy));
    index.handle(Event::Listed(Kind::NetworkPolicy));
    assert!(shortcut(&index, "web"));
}

#[test]
fn kinds_of_the_cni_are_not_understood() {
    for group in ["cilium.io", "crd.projectcalico.org", "policy.networking.k8s.io"] {
        let mut index = known();
        assert_eq!(keys(&index.handle(Event::ApiGroups(vec!["apps".into(), group.into()]))), ["shop/web"]);
        assert!(!shortcut(&index, "web"), "{group}");
        index.handle(Event::ApiGroups(vec!["apps".into()]));
        assert!(shortcut(&index, "web"), "{group} is gone");
    }
}

#[test]
fn a_label_that_changes_may_bring_a_pod_under_a_policy() {
    let mut index = known();
    apply(&mut index, Kind::NetworkPolicy, policy("p", json!({"matchLabels": {"app": "db"}})));
    assert!(shortcut(&index, "web"));
    let mut web = pod("web", "10.0.0.9");
    web["metadata"]["labels"] = json!({"app": "db"});
    assert_eq!(keys(&apply(&mut index, Kind::Pod, web)), ["shop/web"]);
    assert!(!shortcut(&index, "web"));
}
