//! Who is subject to which policy: Istio's precedence, and what becomes of ports.

use mesh_core::proto::security as wire;

use super::super::PolicyKey;
use super::*;

const STRICT: &str = "istio-system/istio_converted_static_strict";

/// `namespace/name`, its age in seconds, what its spec says.
fn policy(name: &str, age: u32, spec: Value) -> Value {
    let (namespace, name) = name.split_once('/').unwrap();
    let created = format!("2026-01-01T00:{:02}:{:02}Z", (3599 - age) / 60, (3599 - age) % 60);
    json!({
        "apiVersion": "security.istio.io/v1beta1", "kind": "PeerAuthentication",
        "metadata": {"namespace": namespace, "name": name, "creationTimestamp": created},
        "spec": spec,
    })
}

fn mode(mode: &str) -> Value {
    json!({"mtls": {"mode": mode}})
}

fn web(mode: &str) -> Value {
    json!({"selector": {"matchLabels": {"app": "web"}}, "mtls": {"mode": mode}})
}

/// A pod with the labels app=web and tier=front, in the namespace shop.
fn world(policies: &[Value]) -> Index {
    let mut index = index();
    let mut value = pod("web", "10.0.0.9");
    value["metadata"]["labels"] = json!({"app": "web", "tier": "front"});
    apply(&mut index, Kind::Pod, value);
    for policy in policies {
        apply(&mut index, Kind::PeerAuthentication, policy.clone());
    }
    policies_listed(&mut index);
    index
}

fn subject(index: &Index) -> Vec<String> {
    workload(index, "web").unwrap().authorization_policies
}

#[test]
fn precedence() {
    let all = |namespace: &str, age, word: &str| policy(&format!("{namespace}/all-{age}"), age, mode(word));
    let one = |age, word: &str| policy(&format!("shop/web-{age}"), age, web(word));
    let unset = |age| policy(&format!("shop/unset-{age}"), age, json!({}));
    for (what, policies, strict) in [
        ("nobody says anything", vec![], false),
        ("the mesh", vec![all("istio-system", 9, "STRICT")], true),
        ("the namespace", vec![all("shop", 9, "STRICT")], true),
        ("another namespace", vec![all("other", 9, "STRICT")], false),
        ("the workload", vec![one(9, "STRICT")], true),
        (
            "namespace before mesh",
            vec![all("istio-system", 9, "STRICT"), all("shop", 1, "PERMISSIVE")],
            false,
        ),
        ("namespace before mesh", vec![all("istio-system", 9, "PERMISSIVE"), all("shop", 1, "STRICT")], true),
        ("workload before namespace", vec![all("shop", 9, "STRICT"), one(1, "PERMISSIVE")], false),
        ("workload before namespace", vec![all("shop", 9, "PERMISSIVE"), one(1, "STRICT")], true),
        (
            "the oldest of the mesh",
            vec![all("istio-system", 1, "STRICT"), all("istio-system", 2, "PERMISSIVE")],
            false,
        ),
        ("the oldest of the namespace", vec![all("shop", 2, "STRICT"), all("shop", 1, "PERMISSIVE")], true),
        ("the oldest of the workload", vec![one(1, "STRICT"), one(2, "PERMISSIVE")], false),
        ("UNSET takes the namespace's word", vec![all("shop", 1, "STRICT"), one(9, "UNSET")], true),
        (
            "UNSET takes the mesh's",
            vec![all("istio-system", 1, "STRICT"), all("shop", 1, "UNSET"), one(9, "")],
            true,
        ),
        ("no mtls is UNSET", vec![all("istio-system", 1, "STRICT"), unset(1)], true),
        ("the oldest has no word, its rank has none", vec![unset(9), all("shop", 1, "STRICT")], false),
        (
            "DISABLE lets plaintext in",
            vec![all("istio-system", 9, "STRICT"), all("shop", 9, "DISABLE")],
            false,
        ),
        ("a mode of tomorrow is STRICT", vec![all("shop", 9, "STRICTER")], true),
        (
            "an empty selector is none",
            vec![policy("shop/all", 9, json!({"selector": {"matchLabels": {}}, "mtls": {"mode": "STRICT"}}))],
            true,
        ),
        (
            "all labels of a selector have to be there",
            vec![policy(
                "shop/p",
                9,
                json!({"selector": {"matchLabels": {"app": "web", "tier": "back"}}, "mtls": {"mode": "STRICT"}}),
            )],
            false,
        ),
        ("a selector of another namespace", vec![policy("other/web", 9, web("STRICT"))], false),
        (
            "a selector of the root namespace selects nothing",
            vec![policy("istio-system/web", 9, web("STRICT"))],
            false,
        ),
    ] {
        let expect: &[&str] = if strict { &[STRICT] } else { &[] };
        assert_eq!(subject(&world(&policies)), expect, "{what}");
        let reversed: Vec<Value> = policies.iter().rev().cloned().collect();
        assert_eq!(subject(&world(&reversed)), expect, "{what}, in another order");
        let description = &world(&policies).local_pods()[0].description;
        assert_eq!(description.authorization_policies, expect, "{what}, by the pod protocol");
    }
}

#[test]
fn a_selector_of_the_root_namespace_does_not_select_its_own_pods_either() {
    let mut index = world(&[policy("istio-system/web", 9, web("STRICT"))]);
    let mut own = pod("gateway", "10.0.0.8");
    own["metadata"]["namespace"] = json!("istio-system");
    own["metadata"]["labels"] = json!({"app": "web"});
    apply(&mut index, Kind::Pod, own);
    let resource = index.resource(&Key::Pod(ObjectName::new("istio-system", "gateway"))).unwrap();
    let Some(proto::address::Type::Workload(gateway)) = resource.r#type else { unreachable!() };
    assert!(gateway.authorization_policies.is_empty(), "{gateway:?}");
}

#[test]
fn ports() {
    let ports = |base: &str, ports: Value| {
        let mut spec = web(base);
        spec["portLevelMtls"] = ports;
        policy("shop/p", 9, spec)
    };
    let all = |word: &str| policy("shop/all", 9, mode(word));
    let own = "shop/converted_peer_authentication_p";
    // Clauses of each rule: ports that it is about, ports that it is not about.
    for (what, policies, names, rules) in [
        (
            "ports that let plaintext in",
            vec![ports("STRICT", json!({"80": {"mode": "PERMISSIVE"}, "81": {"mode": "DISABLE"}}))],
            vec![own],
            "!tls !80 !81",
        ),
        (
            "ports that do not",
            vec![ports("PERMISSIVE", json!({"80": {"mode": "STRICT"}, "81": {"mode": "STRICT"}}))],
            vec![own],
            "!tls80 | !tls81",
        ),
        (
            "ports like the rest",
            vec![ports("STRICT", json!({"80": {"mode": "STRICT"}, "81": {}}))],
            vec![STRICT],
            "",
        ),
        ("ports like the rest", vec![ports("PERMISSIVE", json!({"80": {"mode": "UNSET"}}))], vec![], ""),
        (
            "the rest is the namespace's",
            vec![all("STRICT"), ports("UNSET", json!({"80": {"mode": "STRICT"}}))],
            vec![STRICT],
            "",
        ),
        (
            "the rest is the namespace's",
            vec![all("STRICT"), ports("UNSET", json!({"80": {"mode": "DISABLE"}}))],
            vec![own],
            "!tls !80",
        ),
        ("what is no port", vec![ports("PERMISSIVE", json!({"http": {"mode": "STRICT"}}))], vec![], ""),
        (
            "without a selector",
            vec![policy("shop/p", 9, json!({"portLevelMtls": {"80": {"mode": "STRICT"}}}))],
            vec![],
            "",
        ),
    ] {
        let index = world(&policies);
        assert_eq!(subject(&index), names, "{what}");
        let key = PolicyKey::Ports(ObjectName::new("shop", "p"));
        let (name, policy) = (index.policy_name(&key), index.policy(&key));
        assert_eq!(name, own);
        assert_eq!(policy.map(|policy| short(&policy)).unwrap_or_default(), rules, "{what}");
    }
}

/// Rules of a policy that denies, in a line.
fn short(policy: &wire::Authorization) -> String {
    assert_eq!((policy.action(), policy.scope()), (wire::Action::Deny, wire::Scope::WorkloadSelector));
    let clause = |clause: &wire::Clause| {
        let [one] = &clause.matches[..] else { panic!("{clause:?}") };
        let tls = if one.not_principals.is_empty() { "" } else { "!tls" };
        let not: Vec<String> = one.not_destination_ports.iter().map(|port| format!("!{port}")).collect();
        let ports: Vec<String> = one.destination_ports.iter().map(u32::to_string).collect();
        format!("{tls}{}{}", not.join(" "), ports.join(" "))
    };
    let rule = |rule: &wire::Rule| rule.clauses.iter().map(clause).collect::<Vec<_>>().join(" ");
    policy.rules.iter().map(rule).collect::<Vec<_>>().join(" | ")
}

#[test]
fn strict_is_there_from_the_first_list_on() {
    let mut index = index();
    index.handle(Event::Restarted(Kind::PeerAuthentication));
    let changes = index.handle(Event::Listed(Kind::PeerAuthentication));
    assert_eq!(changes.policies, BTreeSet::from([PolicyKey::Strict]));
    let (name, policy) = (index.policy_name(&PolicyKey::Strict), index.policy(&PolicyKey::Strict));
    assert_eq!((name.as_str(), short(&policy.unwrap()).as_str()), (STRICT, "!tls"));
}

/// A pod may start, and be announced by CNI, before an agent that has just started knows the policies.
#[test]
fn a_change_touches_those_that_it_is_about() {
    let mut index = world(&[]);
    let mut elsewhere = pod("db", "10.0.0.10");
    elsewhere["metadata"]["namespace"] = json!("other");
    elsewhere["spec"]["nodeName"] = json!("node-2");
    apply(&mut index, Kind::Pod, elsewhere);
    let other = Key::Pod(ObjectName::new("other", "db"));
    let strict = |name: &str| policy(name, 9, mode("STRICT"));
    let changes = apply(&mut index, Kind::PeerAuthentication, strict("shop/all"));
    assert_eq!((changes.keys, changes.local), (BTreeSet::from([pod_key("web")]), true));
    let changes = apply(&mut index, Kind::PeerAuthentication, strict("shop/all"));
    assert_eq!(changes, Changes::default(), "the same again");
    let changes = apply(&mut index, Kind::PeerAuthentication, strict("other/all"));
    assert_eq!((changes.keys, changes.local), (BTreeSet::from([other.clone()]), false));
    let mut ports = web("UNSET");
    ports["portLevelMtls"] = json!({"80": {"mode": "PERMISSIVE"}});
    apply(&mut index, Kind::PeerAuthentication, policy("shop/ports", 9, ports));
    let batch = json!({"selector": {"matchLabels": {"app": "batch"}}, "mtls": {"mode": "STRICT"}});
    let changes = apply(&mut index, Kind::PeerAuthentication, policy("shop/batch", 9, batch));
    let own = BTreeSet::from([PolicyKey::Ports(ObjectName::new("shop", "batch"))]);
    assert_eq!(
        (changes.keys, changes.policies),
        (BTreeSet::new(), own),
        "it selects nobody, and nobody inherits"
    );
    let changes = apply(&mut index, Kind::PeerAuthentication, policy("shop/younger", 1, mode("PERMISSIVE")));
    assert_eq!(changes.keys, BTreeSet::new(), "an older one has the word");
    let changes = apply(&mut index, Kind::PeerAuthentication, strict("istio-system/all"));
    assert_eq!(changes.keys, BTreeSet::from([other, pod_key("web")]), "the root namespace's is about all");
    let inherits = PolicyKey::Ports(ObjectName::new("shop", "ports"));
    assert!(changes.policies.contains(&inherits), "{:?}", changes.policies);
    let deleted = index.handle(Event::Deleted(Kind::PeerAuthentication, ObjectName::new("shop", "ports")));
    assert_eq!(deleted.keys, BTreeSet::from([pod_key("web")]));
    assert_eq!(index.policy(&inherits), None);
    // A list without it deletes, too.
    index.handle(Event::Restarted(Kind::PeerAuthentication));
    index.handle(Event::Listed(Kind::PeerAuthentication));
    assert!(subject(&index).is_empty());
}

#[test]
fn what_cannot_be_understood_is_reported() {
    let mut index = world(&[]);
    let spec = json!({"mtls": {"mode": 7}, "selector": {"matchLabels": "web"}, "portLevelMtls": {"x": {}}});
    let changes = apply(&mut index, Kind::PeerAuthentication, policy("shop/p", 9, spec));
    let reasons: Vec<&str> = changes.problems.iter().map(|problem| problem.reason.as_str()).collect();
    assert_eq!(
        reasons,
        [
            "spec.selector.matchLabels is no map of texts: the policy selects all pods",
            "spec.mtls.mode is 7, which is no mode: it is taken for STRICT",
            "spec.portLevelMtls has \"x\", which is no port",
        ]
    );
    assert_eq!(subject(&index), [STRICT]);
}

#[test]
fn one_that_cannot_be_read() {
    let unreadable = |index: &mut Index| {
        let (kind, name) = (Kind::PeerAuthentication, ObjectName::new("shop", "p"));
        index.handle(Event::Unreadable { kind, name, reason: "torn".into() })
    };
    // Never known: all of its namespace is strict, whatever others say.
    let mut index = world(&[policy("shop/all", 9, mode("PERMISSIVE"))]);
    assert_eq!(subject(&index), Vec::<String>::new());
    let changes = unreadable(&mut index);
    assert_eq!(subject(&index), [STRICT]);
    assert!(changes.local && changes.keys.contains(&pod_key("web")), "{changes:?}");
    assert!(!changes.problems[0].skipped && changes.problems[0].reason.contains("STRICT"), "{changes:?}");
    apply(&mut index, Kind::PeerAuthentication, policy("shop/p", 1, mode("UNSET")));
    assert_eq!(subject(&index), Vec::<String>::new(), "it can be read again");
    // Else what was known stays.
    let changes = unreadable(&mut index);
    assert!(changes.problems[0].skipped && changes.keys.is_empty(), "{changes:?}");
    assert_eq!(subject(&index), Vec::<String>::new());
}
