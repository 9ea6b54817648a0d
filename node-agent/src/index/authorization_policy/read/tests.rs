//! What a proxy decides by a policy as it was written.

use std::sync::Arc;

use mesh_core::authz::{self, Applying, Connection, Decision};
use mesh_core::convert::{self, Names};
use serde_json::json;

use super::super::super::tests::config;
use super::*;

fn policy(spec: Value) -> (AuthorizationPolicy, Vec<String>) {
    policy_in("cluster.local", spec)
}

/// In a mesh of this trust domain.
fn policy_in(trust_domain: &str, spec: Value) -> (AuthorizationPolicy, Vec<String>) {
    let object = json!({"metadata": {"namespace": "shop", "name": "p"}, "spec": spec});
    let config = Config { trust_domain: trust_domain.to_owned(), ..config() };
    read(&config, &ObjectName::new("shop", "p"), &serde_json::from_value(object).unwrap())
}

fn allows(policy: &AuthorizationPolicy, client: &str, port: u16) -> bool {
    let (applying, connection) = asked(policy, client, port);
    authz::decide(&applying, &connection) == Decision::Allow
}

fn audits(policy: &AuthorizationPolicy, client: &str) -> bool {
    let (applying, connection) = asked(policy, client, 80);
    !authz::audited(&applying, &connection).is_empty()
}

/// A client of `ns/account` (or none that proved who it is) at 10.1.2.3 dials 10.9.9.9 at a port.
fn asked(policy: &AuthorizationPolicy, client: &str, port: u16) -> (Applying, Connection) {
    let message = policy.enforced.as_deref().unwrap();
    let authorization = convert::authz::convert(message, &mut Names::default()).unwrap();
    let applying = Applying { policies: vec![Arc::new(authorization)], unknown: None };
    let peer = client.split_once('/').map(|(namespace, account)| {
        format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse().unwrap()
    });
    let client = "10.1.2.3:5000".parse::<std::net::SocketAddr>().unwrap();
    let target = std::net::SocketAddr::new("10.9.9.9".parse().unwrap(), port);
    (applying, Connection { peer, client: client.into(), target: target.into() })
}

const CLIENTS: [(&str, u16); 6] = [
    ("shop/web", 80),
    ("shop/web", 81),
    ("shop/job", 80),
    ("bank/web", 80),
    ("shopping/web", 80),
    ("plain", 80),
];

/// Which of the clients a policy lets in.
fn served(policy: &AuthorizationPolicy) -> Vec<String> {
    let served = CLIENTS.iter().filter(|(client, port)| allows(policy, client, *port));
    served.map(|(client, port)| format!("{client}:{port}")).collect()
}

#[test]
fn what_a_policy_means() {
    let from = |source: Value| json!({"rules": [{"from": [{"source": source}]}]});
    let when = |key: &str, values: Value| {
        let mut condition = values;
        condition["key"] = key.into();
        json!({"rules": [{"when": [condition]}]})
    };
    let (all, none) = ("shop/web:80 shop/web:81 shop/job:80 bank/web:80 shopping/web:80 plain:80", "");
    let shop = "shop/web:80 shop/web:81 shop/job:80";
    let web = "cluster.local/ns/shop/sa/web";
    for (what, spec, expect) in [
        ("nothing is allowed", json!({}), none),
        ("no rules are the same", json!({"rules": []}), none),
        ("a rule that says nothing", json!({"rules": [{}]}), all),
        ("a principal", from(json!({"principals": [web]})), "shop/web:80 shop/web:81"),
        ("whoever proves who it is", from(json!({"principals": ["*"]})), &all[..all.len() - 9]),
        ("the beginning", from(json!({"principals": ["cluster.local/ns/shop/*"]})), shop),
        (
            "the end",
            from(json!({"principals": ["*/web"]})),
            "shop/web:80 shop/web:81 bank/web:80 shopping/web:80",
        ),
        ("not who", from(json!({"notPrincipals": ["*/web"]})), "shop/job:80 plain:80"),
        ("a namespace", from(json!({"namespaces": ["shop"]})), shop),
        (
            "a namespace's beginning",
            from(json!({"namespaces": ["shop*"]})),
            "shop/web:80 shop/web:81 shop/job:80 shopping/web:80",
        ),
        ("not a namespace", from(json!({"notNamespaces": ["shop", "bank"]})), "shopping/web:80 plain:80"),
        ("an account here", from(json!({"serviceAccounts": ["job"]})), "shop/job:80"),
        ("an account there", from(json!({"serviceAccounts": ["bank/web"]})), "bank/web:80"),
        (
            "not an account",
            from(json!({"notServiceAccounts": ["web"]})),
            "shop/job:80 bank/web:80 shopping/web:80 plain:80",
        ),
        ("an address", from(json!({"ipBlocks": ["10.1.2.3"]})), all),
        ("another address", from(json!({"ipBlocks": ["10.1.2.4", "10.2.0.0/16"]})), none),
        ("a prefix, as it may be written", from(json!({"ipBlocks": ["10.1.2.3/8"]})), all),
        ("not a prefix", from(json!({"notIpBlocks": ["10.0.0.0/8"]})), none),
        (
            "both",
            from(json!({"namespaces": ["shop"], "notPrincipals": ["*/job"]})),
            "shop/web:80 shop/web:81",
        ),
        (
            "an empty list says nothing",
            from(json!({"namespaces": ["bank"], "principals": []})),
            "bank/web:80",
        ),
        (
            "one of the sources, one of the operations",
            json!({"rules": [{
                "from": [{"source": {"namespaces": ["bank"]}}, {"source": {"principals": [web]}}],
                "to": [{"operation": {"ports": ["81", "82"]}}, {"operation": {"ports": ["83"]}}],
            }]}),
            "shop/web:81",
        ),
        ("not a port", json!({"rules": [{"to": [{"operation": {"notPorts": ["80"]}}]}]}), "shop/web:81"),
        (
            "one of the rules",
            json!({"action": "ALLOW", "rules": [
                {"from": [{"source": {"namespaces": ["bank"]}}]}, {"to": [{"operation": {"ports": ["81"]}}]},
            ]}),
            "shop/web:81 bank/web:80",
        ),
        ("when a namespace", when("source.namespace", json!({"values": ["bank"]})), "bank/web:80"),
        (
            "when a principal",
            when("source.principal", json!({"values": ["*"], "notValues": [web]})),
            "shop/job:80 bank/web:80 shopping/web:80",
        ),
        ("when an account", when("source.serviceAccount", json!({"values": ["shop/job"]})), "shop/job:80"),
        ("when an address", when("source.ip", json!({"notValues": ["10.1.0.0/16"]})), none),
        ("when it goes to", when("destination.ip", json!({"values": ["10.9.9.9"]})), all),
        ("when it goes to a port", when("destination.port", json!({"values": ["81"]})), "shop/web:81"),
        (
            "every condition",
            json!({"rules": [{"when": [
                {"key": "source.namespace", "values": ["shop"]}, {"key": "destination.port", "values": ["80"]},
            ]}]}),
            "shop/web:80 shop/job:80",
        ),
    ] {
        let (read, faults) = policy(spec.clone());
        assert_eq!(faults, Vec::<String>::new(), "{what}");
        assert_eq!(served(&read).join(" "), expect, "{what}");
        // The same as a DENY policy serves all the others.
        let mut spec = spec;
        spec["action"] = "DENY".into();
        let denied: Vec<&str> = expect.split_whitespace().collect();
        let others: Vec<&str> = all.split_whitespace().filter(|one| !denied.contains(one)).collect();
        assert_eq!(served(&policy(spec).0), others, "DENY: {what}");
    }
}

#[test]
fn what_cannot_be_decided_refuses() {
    let to = |operation: Value| json!({"from": [{"source": {"namespaces": ["shop"]}}], "to": [{"operation": operation}]});
    let from = |source: Value| json!({"from": [{"source": source}]});
    let shop = "shop/web:80 shop/web:81 shop/job:80";
    let (all, alone) = ("shop/web:80 shop/web:81 shop/job:80 bank/web:80 shopping/web:80 plain:80", "");
    // A rule, where the fault is, and what a DENY policy with this rule denies; an ALLOW policy has the rule left out.
    for (rule, place, denied) in [
        (to(json!({"methods": ["GET"]})), "to[0].operation.methods", shop),
        (to(json!({"notPaths": ["/a"]})), "to[0].operation.notPaths", shop),
        (to(json!({"hosts": ["a"], "ports": ["81"]})), "to[0].operation.hosts", "shop/web:81"),
        (to(json!({"ports": ["http"]})), "to[0].operation.ports", shop),
        (to(json!({"ports": ["0"]})), "to[0].operation.ports", shop),
        (to(json!({"notPorts": ["65536"]})), "to[0].operation.notPorts", shop),
        (to(json!({"ports": 80})), "to[0].operation.ports", shop),
        (to(json!({"ofTomorrow": ["x"]})), "to[0].operation.ofTomorrow", shop),
        (to(json!({})), "to[0].operation says nothing", shop),
        (from(json!({"requestPrincipals": ["*"]})), "from[0].source.requestPrincipals", all),
        (
            from(json!({"requestPrincipals": ["*"], "namespaces": ["bank"]})),
            "requestPrincipals",
            "bank/web:80",
        ),
        (from(json!({"remoteIpBlocks": ["10.0.0.0/8"]})), "from[0].source.remoteIpBlocks", all),
        (from(json!({"ipBlocks": ["10.0.0"]})), "from[0].source.ipBlocks", all),
        (from(json!({"namespaces": ["s*p"]})), "from[0].source.namespaces", all),
        (from(json!({"namespaces": ["*é*"]})), "from[0].source.namespaces", all),
        (from(json!({"serviceAccounts": ["a/b/c"]})), "from[0].source.serviceAccounts", all),
        (from(json!({"principals": [""]})), "from[0].source.principals", all),
        (json!({"from": [{"source": {"namespaces": ["bank"]}}, {}]}), "from[1].source", all),
        (json!({"from": "shop"}), "from is no list", all),
        (json!({"unless": []}), "unless is not known", all),
        (
            json!({"when": [{"key": "request.headers[x]", "values": ["y"]}]}),
            "when[0] (request.headers[x])",
            all,
        ),
        (json!({"when": [{"key": "source.namespace"}]}), "when[0] (source.namespace) has no values", all),
        (json!({"when": [{"values": ["shop"]}]}), "when[0] has no key", all),
        (
            json!({"when": [{"key": "source.namespace", "values": ["shop"]}, {"key": "remote.ip", "values": ["10.0.0.0/8"]}]}),
            "when[1] (remote.ip)",
            shop,
        ),
        (json!("x"), "spec.rules[0] is no rule", all),
    ] {
        let other = json!({"from": [{"source": {"principals": ["cluster.local/ns/elsewhere/sa/x"]}}]});
        let (allow, faults) = policy(json!({"rules": [rule.clone(), other]}));
        assert!(faults.len() == 1 && faults[0].contains(place), "{rule}: {faults:?}");
        assert!(faults[0].contains("allows nothing"), "{faults:?}");
        assert_eq!(served(&allow).join(" "), alone, "ALLOW {rule}");
        let (deny, faults) = policy(json!({"action": "DENY", "rules": [rule.clone()]}));
        assert!(faults.len() == 1 && faults[0].contains(place), "{rule}: {faults:?}");
        assert!(faults[0].contains("denies whatever else"), "{faults:?}");
        let denied: Vec<&str> = denied.split_whitespace().collect();
        let served: Vec<String> = served(&deny);
        let expect: Vec<&str> = all.split_whitespace().filter(|one| !denied.contains(one)).collect();
        assert_eq!(served, expect, "DENY {rule}");
    }
}

#[test]
fn a_rule_that_is_left_out_takes_no_other_along() {
    let (read, faults) = policy(json!({"rules": [
        {"to": [{"operation": {"methods": ["GET"]}}]}, {"from": [{"source": {"namespaces": ["bank"]}}]},
    ]}));
    assert_eq!(served(&read), ["bank/web:80"]);
    assert!(faults[0].starts_with("spec.rules[0].to[0].operation.methods"), "{faults:?}");
    // The others are told by the number that they have in the policy.
    let (applying, connection) = asked(&read, "shop/web", 80);
    let Decision::Deny(denial) = authz::decide(&applying, &connection) else { panic!("shop is allowed") };
    assert_eq!(denial.nearest().map(|nearest| nearest.rule), Some(1));
}

/// Policies are written for `cluster.local`, and a mesh by another name has none by that.
#[test]
fn the_well_known_trust_domain_is_the_mesh_s_own() {
    for (principal, own, shops, faults) in [
        ("cluster.local/ns/shop/sa/web", "corp.example", true, 0),
        ("cluster.local/ns/shop/sa/*", "corp.example", true, 0),
        ("cluster.local/*", "corp.example", true, 0),
        ("cluster.local/ns/bank/sa/web", "corp.example", false, 0),
        ("cluster.local*", "corp.example", false, 0),
        ("corp.example/ns/shop/sa/web", "corp.example", true, 0),
        ("*/sa/web", "corp.example", true, 0),
        ("old.example/ns/shop/sa/web", "corp.example", false, 1),
        ("old.example/*", "corp.example", false, 1),
        ("corp.example/ns/shop/sa/web", "cluster.local", false, 1),
    ] {
        let from = json!([{"from": [{"source": {"principals": [principal]}}]}]);
        let when = json!([{"when": [{"key": "source.principal", "values": [principal]}]}]);
        let except = json!([{"from": [{"source": {"notPrincipals": [principal]}}]}]);
        for (rules, matches) in [(from, shops), (when, shops), (except, !shops)] {
            for action in ["ALLOW", "DENY"] {
                let (read, found) = policy_in(own, json!({"action": action, "rules": rules}));
                let (applying, mut connection) = asked(&read, "shop/web", 80);
                connection.peer = Some(format!("spiffe://{own}/ns/shop/sa/web").parse().unwrap());
                let allowed = authz::decide(&applying, &connection) == Decision::Allow;
                assert_eq!(allowed, matches == (action == "ALLOW"), "{action} {rules} in {own}");
                assert_eq!(found.len(), faults, "{found:?}");
                assert!(found.iter().all(|fault| fault.contains("trust domain")), "{found:?}");
            }
        }
    }
}

#[test]
fn actions() {
    let bank = json!([{"from": [{"source": {"namespaces": ["bank"]}}]}]);
    let read = |action: Value| policy(json!({"action": action, "rules": bank}));
    for (action, allows_bank, faults) in
        [("ALLOW", true, 0), ("", true, 0), ("DENY", false, 0), ("CUSTOM", false, 1), ("BLESS", false, 1)]
    {
        let (policy, found) = read(action.into());
        assert_eq!(allows(&policy, "bank/web", 80), allows_bank, "{action}");
        assert_eq!(allows(&policy, "shop/web", 80), !allows_bank, "{action}");
        assert_eq!(found.len(), faults, "{action}: {found:?}");
    }
    let (audit, faults) = read("AUDIT".into());
    assert_eq!((served(&audit).len(), faults.len()), (CLIENTS.len(), 0), "nobody is refused");
    assert_eq!(["bank/web", "shop/web"].map(|client| audits(&audit, client)), [true, false]);
    assert!(audit.enforced.as_ref().unwrap().dry_run, "to a proxy that does not know it, it is on trial");
    let to = json!([{"to": [{"operation": {"methods": ["GET"], "ports": ["80"]}}]}]);
    let (audit, faults) = policy(json!({"action": "AUDIT", "rules": to}));
    assert!(audits(&audit, "bank/web") && faults[0].contains("the rule notes whatever else"), "{faults:?}");
    // What is no list of rules is everything to DENY, and nothing to ALLOW.
    for action in ["ALLOW", "DENY"] {
        let (policy, faults) = policy(json!({"action": action, "rules": {"from": []}}));
        assert_eq!((served(&policy), faults.len()), (Vec::new(), 1), "{action}");
    }
}

#[test]
fn whom_it_is_about() {
    use wire::Scope::{Global, Namespace, WorkloadSelector};
    let web = json!({"matchLabels": {"app": "web"}});
    for (namespace, selector, scope, faults) in [
        ("shop", json!(null), Namespace, 0),
        ("shop", json!({}), Namespace, 0),
        ("shop", json!({"matchLabels": {}}), Namespace, 0),
        ("shop", web.clone(), WorkloadSelector, 0),
        ("istio-system", json!(null), Global, 0),
        ("istio-system", web, WorkloadSelector, 0),
        ("shop", json!({"matchLabels": {"app": 1}}), Namespace, 1),
    ] {
        let name = ObjectName::new(namespace, "p");
        let object = json!({"metadata": {}, "spec": {"selector": selector}});
        let (policy, found) = read(&config(), &name, &serde_json::from_value(object).unwrap());
        let enforced = policy.enforced.unwrap();
        assert_eq!(enforced.scope(), scope, "{namespace} {selector}");
        assert_eq!(
            (&*enforced.namespace, &*enforced.name, found.len()),
            (namespace, "p", faults),
            "{selector}"
        );
    }
    for targeted in
        [json!({"targetRef": {"kind": "Gateway", "name": "w"}}), json!({"targetRefs": [{"kind": "Service"}]})]
    {
        let (policy, faults) = policy(targeted);
        assert_eq!(policy, AuthorizationPolicy { selector: Labels::new(), enforced: None });
        assert!(faults.len() == 1 && faults[0].contains("enforced by nobody"), "{faults:?}");
    }
    assert!(policy(json!({"targetRefs": []})).0.enforced.is_some());
}

/// Whom it lets in there it may not be meant to let in elsewhere.
#[test]
fn an_allow_of_which_it_is_not_known_whom_it_is_about_allows_nothing() {
    let selector = json!({"matchLabels": {"app": 1}});
    let (allow, _) = policy(json!({"selector": selector, "rules": [{}]}));
    let (deny, _) = policy(json!({"selector": selector, "action": "DENY", "rules": [{}]}));
    for policy in [allow, deny] {
        assert_eq!(served(&policy), Vec::<String>::new());
    }
}

/// As in Istio they are matched all the same: nobody who is not refused there is here.
#[test]
fn patterns_that_match_nobody_are_reported() {
    let web = "cluster.local/ns/shop/sa/web";
    for source in [
        json!({"principals": [format!("spiffe://{web}")]}),
        json!({"notPrincipals": ["*/ns/shop/*"]}),
        json!({"principals": ["cluster.local/*/sa/web"]}),
        json!({"serviceAccounts": ["shop/*"]}),
        json!({"notServiceAccounts": ["*/web"]}),
    ] {
        let negative = source.as_object().unwrap().keys().all(|key| key.starts_with("not"));
        let (read, faults) = policy(json!({"rules": [{"from": [{"source": source}]}]}));
        assert!(faults.len() == 1 && faults[0].contains("matches nobody"), "{source}: {faults:?}");
        assert_eq!(served(&read).len(), if negative { CLIENTS.len() } else { 0 }, "{source}");
    }
    let when = json!({"rules": [{"when": [{"key": "source.principal", "values": ["*/ns/*/sa/web"]}]}]});
    let (_, faults) = policy(when);
    assert!(faults.len() == 1 && faults[0].starts_with("spec.rules[0].when[0] has"), "{faults:?}");
}

#[test]
fn a_dry_run() {
    let read = |value: &str| {
        let object = json!({"metadata": {"annotations": {"istio.io/dry-run": value}}, "spec": {}});
        let (policy, faults) =
            read(&config(), &ObjectName::new("shop", "p"), &serde_json::from_value(object).unwrap());
        (policy.enforced.unwrap().dry_run, faults.len())
    };
    assert_eq!(
        ["true", "T", "false", "0", "yes"].map(read),
        [(true, 0), (true, 0), (false, 0), (false, 0), (false, 1)]
    );
    assert!(!policy(json!({})).0.enforced.unwrap().dry_run);
}

#[test]
fn of_what_cannot_be_read_everything_is_denied() {
    for (namespace, scope) in [("shop", wire::Scope::Namespace), ("istio-system", wire::Scope::Global)] {
        let policy = unreadable("istio-system", &ObjectName::new(namespace, "p"));
        assert_eq!(policy.enforced.as_ref().unwrap().scope(), scope);
        assert_eq!(served(&policy), Vec::<String>::new());
    }
}
