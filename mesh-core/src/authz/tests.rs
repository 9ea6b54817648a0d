//! Evaluation as Istio's ztunnel does it, from the wire's form: one line a case.

mod reference;

use super::*;
use crate::convert::{self, Names};
use crate::proto::security as wire;
use wire::string_match::MatchType;

fn exact(text: &str) -> wire::StringMatch {
    wire::StringMatch { match_type: Some(MatchType::Exact(text.into())) }
}

fn present() -> wire::StringMatch {
    wire::StringMatch { match_type: Some(MatchType::Presence(wire::Presence {})) }
}

fn prefix(bytes: &[u8], length: u32) -> wire::Address {
    wire::Address { address: bytes.to_vec(), length }
}

fn account(namespace: &str, name: &str) -> wire::ServiceAccountMatch {
    wire::ServiceAccountMatch { namespace: namespace.into(), service_account: name.into() }
}

fn policy(name: &str, action: wire::Action, rules: Vec<wire::Rule>) -> wire::Authorization {
    let (name, namespace) = (name.into(), "shop".into());
    wire::Authorization { name, namespace, action: action.into(), rules, ..Default::default() }
}

/// One rule: all of the clauses, each with one of its matches.
fn rule(clauses: Vec<Vec<wire::Match>>) -> wire::Rule {
    wire::Rule { clauses: clauses.into_iter().map(|matches| wire::Clause { matches }).collect() }
}

fn one(one: wire::Match) -> Vec<wire::Rule> {
    vec![rule(vec![vec![one]])]
}

fn applying(policies: &[wire::Authorization]) -> Applying {
    let mut names = Names::default();
    let policies =
        policies.iter().map(|policy| Arc::new(convert::authz::convert(policy, &mut names).unwrap()));
    Applying { policies: policies.collect(), unknown: None }
}

/// From web of shop at 10.0.0.9 (or nobody in particular) to 10.0.0.1:8080.
fn connection(plaintext: bool) -> Connection {
    let peer = (!plaintext).then(|| "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap());
    let (client, target) = (std::net::IpAddr::from([10, 0, 0, 9]), std::net::IpAddr::from([10, 0, 0, 1]));
    Connection { peer, client: (client, 999).into(), target: (target, 8080).into() }
}

#[test]
fn matches() {
    let m = wire::Match::default;
    let web = || exact("cluster.local/ns/shop/sa/web");
    let text = |match_type| wire::StringMatch { match_type: Some(match_type) };
    // The rule, and whether it matches web and plaintext.
    for (what, one, expect) in [
        ("principal", wire::Match { principals: vec![web()], ..m() }, [true, false]),
        (
            "with its scheme it is never one",
            wire::Match { principals: vec![exact("spiffe://cluster.local/ns/shop/sa/web")], ..m() },
            [false, false],
        ),
        ("present", wire::Match { principals: vec![present()], ..m() }, [true, false]),
        ("absent: no mutual TLS", wire::Match { not_principals: vec![present()], ..m() }, [false, true]),
        (
            "prefix",
            wire::Match { principals: vec![text(MatchType::Prefix("cluster.local/ns/sh".into()))], ..m() },
            [true, false],
        ),
        (
            "suffix",
            wire::Match { principals: vec![text(MatchType::Suffix("/sa/db".into()))], ..m() },
            [false, false],
        ),
        (
            "suffix, which is not in the middle",
            wire::Match { principals: vec![text(MatchType::Suffix("/ns/shop".into()))], ..m() },
            [false, false],
        ),
        (
            "another destination",
            wire::Match { destination_ips: vec![prefix(&[10, 0, 0, 2], 32)], ..m() },
            [false, false],
        ),
        ("one of", wire::Match { principals: vec![exact("x"), web()], ..m() }, [true, false]),
        ("none of", wire::Match { not_principals: vec![exact("x"), web()], ..m() }, [false, true]),
        ("namespace", wire::Match { namespaces: vec![exact("shop")], ..m() }, [true, false]),
        ("not the namespace", wire::Match { not_namespaces: vec![exact("shop")], ..m() }, [false, true]),
        ("account", wire::Match { service_accounts: vec![account("shop", "web")], ..m() }, [true, false]),
        (
            "account of another namespace",
            wire::Match { service_accounts: vec![account("x", "web")], ..m() },
            [false, false],
        ),
        (
            "not the account",
            wire::Match { not_service_accounts: vec![account("shop", "web")], ..m() },
            [false, true],
        ),
        ("source", wire::Match { source_ips: vec![prefix(&[10, 0, 0, 0], 24)], ..m() }, [true, true]),
        (
            "source, mapped",
            wire::Match {
                source_ips: vec![prefix(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 0], 96 + 24)],
                ..m()
            },
            [true, true],
        ),
        ("another source", wire::Match { source_ips: vec![prefix(&[10, 0, 0, 1], 32)], ..m() }, [false; 2]),
        (
            "not the source",
            wire::Match { not_source_ips: vec![prefix(&[10, 0, 0, 9], 32)], ..m() },
            [false; 2],
        ),
        ("destination", wire::Match { destination_ips: vec![prefix(&[10, 0, 0, 1], 32)], ..m() }, [true; 2]),
        ("port", wire::Match { destination_ports: vec![80, 8080], ..m() }, [true; 2]),
        ("not the port", wire::Match { not_destination_ports: vec![8080], ..m() }, [false; 2]),
        (
            "both, and the port is another",
            wire::Match { principals: vec![web()], destination_ports: vec![80], ..m() },
            [false; 2],
        ),
        (
            "is, and is not",
            wire::Match { principals: vec![present()], not_principals: vec![web()], ..m() },
            [false; 2],
        ),
        ("nothing said is no match", m(), [false; 2]),
    ] {
        let deny = applying(&[policy("p", wire::Action::Deny, self::one(one))]);
        let denied = [false, true].map(|plaintext| decide(&deny, &connection(plaintext)) != Decision::Allow);
        assert_eq!(denied, expect, "{what}");
    }
}

#[test]
fn rules_and_clauses() {
    let yes = || wire::Match { destination_ports: vec![8080], ..Default::default() };
    let no = || wire::Match { destination_ports: vec![1], ..Default::default() };
    for (what, rules, expect) in [
        ("no rule", vec![], None),
        ("a rule without clauses", vec![rule(vec![])], Some(0)),
        ("a clause without matches", vec![rule(vec![vec![]])], Some(0)),
        ("and a true one", vec![rule(vec![vec![], vec![yes()]])], Some(0)),
        ("and a false one", vec![rule(vec![vec![], vec![no()]])], None),
        ("a clause of empty matches", vec![rule(vec![vec![wire::Match::default()]])], None),
        ("one match of two", vec![rule(vec![vec![no(), yes()]])], Some(0)),
        ("one clause of two", vec![rule(vec![vec![no()], vec![yes()]])], None),
        ("the second rule", vec![rule(vec![vec![no()]]), rule(vec![vec![yes()]])], Some(1)),
    ] {
        let deny = applying(&[policy("p", wire::Action::Deny, rules)]);
        let rule = match decide(&deny, &connection(false)) {
            Decision::Deny(Denial::Denied { rule, .. }) => Some(rule),
            _ => None,
        };
        assert_eq!(rule, expect, "{what}");
    }
}

#[test]
fn order_of_actions() {
    use wire::Action::{Allow, Deny};
    let all = || vec![rule(vec![])];
    let dry = |policy: wire::Authorization| wire::Authorization { dry_run: true, ..policy };
    for (what, policies, expect) in [
        ("none", vec![], ""),
        ("one that allows", vec![policy("a", Allow, all())], ""),
        ("one that allows nothing", vec![policy("a", Allow, vec![])], "policy shop/a does not allow it"),
        (
            "two that allow nothing",
            vec![policy("a", Allow, vec![]), policy("b", Allow, vec![])],
            "neither policy shop/a nor 1 more allow it",
        ),
        ("one of two allows", vec![policy("a", Allow, vec![]), policy("b", Allow, all())], ""),
        (
            "one allows, one denies",
            vec![policy("a", Allow, all()), policy("d", Deny, all())],
            "policy shop/d denies it by its rule 0",
        ),
        ("one denies nothing", vec![policy("d", Deny, vec![])], ""),
        ("dry runs", vec![dry(policy("a", Allow, vec![])), dry(policy("d", Deny, all()))], ""),
    ] {
        let said = match decide(&applying(&policies), &connection(false)) {
            Decision::Allow => String::new(),
            Decision::Deny(denial) => denial.to_string(),
        };
        assert_eq!(said, expect, "{what}");
    }
}

#[test]
fn what_is_audited() {
    let yes = || one(wire::Match { destination_ports: vec![8080], ..Default::default() });
    let audit = |name: &str, rules| wire::Authorization {
        dry_run: true,
        extensions: vec![wire::Extension { name: convert::authz::AUDIT.to_owned(), config: None }],
        ..policy(name, wire::Action::Deny, rules)
    };
    let no = || one(wire::Match { destination_ports: vec![1], ..Default::default() });
    let audits = applying(&[audit("a", no()), audit("b", [no(), yes()].concat()), audit("c", yes())]);
    let found: Vec<String> = audited(&audits, &connection(false)).iter().map(Audited::to_string).collect();
    assert_eq!(found, ["policy shop/b, rule 1", "policy shop/c, rule 0"]);
    assert_eq!(decide(&audits, &connection(false)), Decision::Allow, "nobody is refused");
    assert_eq!(rehearse(&audits, &connection(false)), None, "it is no DENY on trial");
    let none = applying(&[audit("a", no()), policy("d", wire::Action::Deny, yes())]);
    assert_eq!(audited(&none, &connection(false)), []);
}

#[test]
fn the_rule_that_almost_allows() {
    use wire::Action::Allow;
    let m = wire::Match::default;
    let port = || vec![m_port(1)];
    let who = || vec![wire::Match { principals: vec![exact("x")], namespaces: vec![exact("shop")], ..m() }];
    for (what, policies, expect) in [
        ("no rule", vec![policy("a", Allow, vec![])], ""),
        ("one that nothing matches", vec![policy("a", Allow, vec![rule(vec![vec![m()]])])], ""),
        ("one", vec![policy("a", Allow, vec![rule(vec![port()])])], "rule 0 of policy shop/a, but for ports"),
        (
            "what holds is not told",
            vec![policy("a", Allow, vec![rule(vec![who()])])],
            "rule 0 of policy shop/a, but for principals",
        ),
        (
            "all that does not hold is told",
            vec![policy("a", Allow, vec![rule(vec![port(), who()])])],
            "rule 0 of policy shop/a, but for ports and principals",
        ),
        (
            "the match that misses least",
            vec![policy(
                "a",
                Allow,
                vec![rule(vec![vec![
                    wire::Match { destination_ports: vec![1], ..who()[0].clone() },
                    m_port(1),
                ]])],
            )],
            "rule 0 of policy shop/a, but for ports",
        ),
        (
            "the rule that misses least, of all policies",
            vec![
                policy("a", Allow, vec![rule(vec![port(), who()])]),
                policy("b", Allow, vec![rule(vec![vec![m()]]), rule(vec![who()])]),
            ],
            "rule 1 of policy shop/b, but for principals",
        ),
    ] {
        let Decision::Deny(denial) = decide(&applying(&policies), &connection(false)) else {
            panic!("{what}")
        };
        assert_eq!(denial.nearest().map(ToString::to_string).unwrap_or_default(), expect, "{what}");
        assert!(!denial.to_string().contains("but for"), "the client is not told: {denial}");
    }
}

fn m_port(port: u32) -> wire::Match {
    wire::Match { destination_ports: vec![port], ..Default::default() }
}

#[test]
fn policies_on_trial() {
    use wire::Action::{Allow, Deny};
    let all = || vec![rule(vec![])];
    let dry = |policy: wire::Authorization| wire::Authorization { dry_run: true, ..policy };
    let allows_nothing = || policy("a", Allow, vec![]);
    for (what, policies, expect) in [
        ("none", vec![policy("a", Allow, all())], ""),
        ("one that denies", vec![dry(policy("d", Deny, all()))], "policy shop/d denies it by its rule 0"),
        ("one that denies nothing", vec![dry(policy("d", Deny, vec![]))], ""),
        ("one that does not allow", vec![dry(allows_nothing())], "policy shop/a does not allow it"),
        ("another does, in force", vec![dry(allows_nothing()), policy("b", Allow, all())], ""),
        ("it allows what another does not", vec![allows_nothing(), dry(policy("b", Allow, all()))], ""),
        ("without it, none is on trial", vec![allows_nothing()], ""),
    ] {
        let said = rehearse(&applying(&policies), &connection(false)).map(|denial| denial.to_string());
        assert_eq!(said.unwrap_or_default(), expect, "{what}");
    }
    // What cannot be read says nothing of what it would do.
    let mut names = Names::default();
    let unreadable =
        convert::authz::refused("shop/p", Some(&dry(policy("p", Deny, all()))), "torn", "r", &mut names);
    let applying = Applying { policies: vec![Arc::new(unreadable)], unknown: None };
    assert_eq!(rehearse(&applying, &connection(false)), None);
}

#[test]
fn what_is_not_known_denies_and_says_so() {
    let mut unknown = applying(&[]);
    unknown.unknown = Some("shop/p".into());
    let Decision::Deny(denial) = decide(&unknown, &connection(false)) else { panic!("allowed") };
    assert_eq!(denial.to_string(), "the pod is subject to policy shop/p, which is not known");
    let plain = wire::Match { not_principals: vec![present()], ..Default::default() };
    let strict = applying(&[policy("strict", wire::Action::Deny, one(plain))]);
    let Decision::Deny(denial) = decide(&strict, &connection(true)) else { panic!("allowed") };
    let expect = "policy shop/strict denies it by its rule 0; the client did not use mutual TLS";
    assert_eq!(denial.to_string(), expect);
}

#[test]
fn bad_fields_refuse_the_resource() {
    let m = wire::Match::default;
    for (one, expect) in [
        (wire::Match { destination_ports: vec![70_000], ..m() }, "70000 is no port"),
        (wire::Match { source_ips: vec![prefix(&[10, 0, 0, 1], 33)], ..m() }, "prefix length 33 of 10.0.0.1"),
        (wire::Match { source_ips: vec![prefix(&[10], 8)], ..m() }, "an address of 1 bytes"),
        (
            wire::Match { principals: vec![wire::StringMatch::default()], ..m() },
            "principals has a match without",
        ),
    ] {
        let policy = policy("p", wire::Action::Deny, self::one(one));
        let error = convert::authz::convert(&policy, &mut Names::default()).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
}
