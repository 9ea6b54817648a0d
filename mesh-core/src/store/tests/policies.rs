//! Policies by what they are about, and who is told when that changes.

use super::*;
use crate::authz::{Authorization, Rules, Scope};

fn policy(key: &str, scope: Scope) -> Authorization {
    let (namespace, _) = key.split_once('/').unwrap();
    let rules = Rules::Deny([].into());
    Authorization { key: key.into(), namespace: namespace.into(), scope, dry_run: false, rules }
}

#[test]
fn a_workload_is_shown_the_policies_that_are_about_it_and_no_others() {
    use Scope::{Global, Namespace, Selected, Unreadable};
    let (mut writer, reader) = new();
    for (key, scope) in [
        ("root/all", Global),
        ("shop/all", Namespace),
        ("shop/odd", Unreadable),
        ("other/all", Namespace),
        ("other/odd", Unreadable),
        ("shop/named", Selected),
        ("shop/not-named", Selected),
    ] {
        writer.put_authorization(policy(key, scope));
    }
    let named = |names: &[&str]| Workload {
        authorization_policies: names.iter().map(|name| Arc::from(*name)).collect(),
        ..pod("a", "10.0.0.1")
    };
    let shown = |names: &[&str]| {
        let applying = reader.policies_of(&named(names));
        let mut keys: Vec<String> = applying.policies.iter().map(|policy| policy.key.to_string()).collect();
        keys.sort();
        keys.extend(applying.unknown.map(|name| format!("?{name}")));
        keys.join(" ")
    };
    assert_eq!(shown(&[]), "", "nothing is visible before the commit");
    assert!(!writer.commit().policies.is_empty());
    assert_eq!(shown(&[]), "root/all shop/all shop/odd");
    assert_eq!(shown(&["shop/named", "other/odd"]), "other/odd root/all shop/all shop/named shop/odd");
    assert_eq!(shown(&["shop/gone"]), "root/all shop/all shop/odd ?shop/gone");
    // Of another scope now, and in one place only.
    writer.put_authorization(policy("shop/all", Selected));
    assert!(writer.remove_authorization("root/all") && !writer.remove_authorization("root/all"));
    assert!(!writer.commit().policies.is_empty());
    assert_eq!(shown(&[]), "shop/odd");
    assert_eq!(reader.size().authorizations, 6);
    assert!(writer.remove_authorization("shop/odd"));
    assert!(!writer.commit().policies.is_empty(), "one that goes alone is told, too");
    assert!(writer.commit().policies.is_empty());
}

#[test]
fn a_commit_tells_whose_policies_changed() {
    let (mut writer, _) = new();
    let named = |name: &str, policies: &[&str]| Workload {
        authorization_policies: policies.iter().map(|name| Arc::from(*name)).collect(),
        ..pod(name, "10.0.0.1")
    };
    let (a, b) = ("c//Pod/shop/a", "c//Pod/shop/b");
    let other = Names::default().identity("cluster.local", "shop", "other").unwrap();
    for (what, workloads, expected) in [
        ("new ones", vec![named("a", &[]), named("b", &["shop/p"])], vec![a, b]),
        ("one more policy", vec![named("a", &["shop/p"]), named("b", &["shop/p"])], vec![a]),
        ("another capacity", vec![Workload { capacity: 2, ..named("a", &["shop/p"]) }], vec![]),
        ("none any more", vec![named("a", &[])], vec![a]),
        ("another identity", vec![Workload { identity: other, ..named("a", &[]) }], vec![a]),
        ("another namespace", vec![Workload { namespace: "x".into(), ..named("b", &["shop/p"]) }], vec![b]),
    ] {
        workloads.into_iter().for_each(|workload| writer.put_workload(workload));
        let changes = writer.commit();
        let told: Vec<&str> = changes.workloads.iter().map(WorkloadUid::as_str).collect();
        assert_eq!((told, changes.policies.is_empty()), (expected, true), "{what}");
    }
    assert!(writer.remove_workload(a) && !writer.remove_workload("c//Pod/shop/gone"));
    assert_eq!(writer.commit().workloads, [WorkloadUid::from(a)]);
}

#[test]
fn a_change_concerns_those_whom_the_policy_is_or_was_about() {
    use Scope::{Global, Namespace, Selected, Unreadable};
    let (mut writer, _) = new();
    let named = |policies: &[&str]| Workload {
        authorization_policies: policies.iter().map(|name| Arc::from(*name)).collect(),
        ..pod("a", "10.0.0.1")
    };
    let (plain, selected) = (named(&[]), named(&["shop/p"]));
    let elsewhere = Workload { namespace: "bank".into(), ..named(&[]) };
    let mut concerned = |changed: Option<Scope>| {
        match changed {
            Some(scope) => writer.put_authorization(policy("shop/p", scope)),
            None => assert!(writer.remove_authorization("shop/p")),
        }
        let policies = writer.commit().policies;
        [&plain, &selected, &elsewhere].map(|workload| policies.concern(workload))
    };
    assert_eq!(concerned(Some(Selected)), [false, true, false]);
    assert_eq!(concerned(Some(Selected)), [false; 3], "the same again");
    assert_eq!(concerned(None), [false, true, false], "what names one that is not known lets nobody in");
    assert_eq!(concerned(Some(Namespace)), [true, true, false]);
    assert_eq!(concerned(Some(Selected)), [true, true, false], "it was about all of them");
    assert_eq!(concerned(Some(Global)), [true; 3]);
    assert_eq!(concerned(Some(Selected)), [true; 3]);
    assert_eq!(concerned(Some(Unreadable)), [true, true, false]);
}
