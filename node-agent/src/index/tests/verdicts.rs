//! What the status of a policy is to say.

use super::super::verdict::{CONDITION, Verdict};
use super::*;

pub(super) fn verdicts(index: &Index) -> Vec<Verdict> {
    index.unsaid().iter().filter_map(|policy| index.verdict(policy)).collect()
}

/// What is to be written for a policy with this spec and these conditions, and whether the writer is told.
fn verdict(kind: Kind, spec: Value, conditions: Value) -> (Vec<Value>, bool) {
    let mut index = index();
    let policy = json!({
        "apiVersion": "security.istio.io/v1beta1",
        "metadata": {"namespace": "shop", "name": "p", "generation": 3, "resourceVersion": "70"},
        "spec": spec, "status": {"conditions": conditions},
    });
    let told = apply(&mut index, kind, policy).verdicts;
    let verdicts = self::verdicts(&index);
    assert_eq!(verdicts.len(), usize::from(told));
    let Some(verdict) = verdicts.into_iter().next() else { return (Vec::new(), told) };
    assert_eq!((verdict.kind, &*verdict.resource_version), (kind, "70"));
    assert_eq!(verdict.api_version, "security.istio.io/v1beta1");
    assert_eq!(verdict.name, ObjectName::new("shop", "p"));
    (verdict.conditions, told)
}

fn accepted() -> Value {
    json!({
        "type": CONDITION, "status": "True", "reason": "Accepted", "message": "accepted by ztunnel, for layer 4",
        "observedGeneration": 3,
    })
}

fn at(mut condition: Value, time: &str) -> Value {
    condition["lastTransitionTime"] = time.into();
    condition
}

#[test]
fn what_is_in_force() {
    for kind in [Kind::AuthorizationPolicy, Kind::PeerAuthentication] {
        assert_eq!(verdict(kind, json!({}), json!(null)), (vec![accepted()], true));
        let other = json!({"type": "WaypointAccepted", "status": "False"});
        assert_eq!(verdict(kind, json!({}), json!([other])), (vec![other.clone(), accepted()], true));
        assert_eq!(
            verdict(kind, json!({}), json!([at(accepted(), "t"), other])),
            (vec![], false),
            "it says so"
        );
        let mut older = at(accepted(), "t");
        older["observedGeneration"] = 2.into();
        assert_eq!(
            verdict(kind, json!({}), json!([older])),
            (vec![at(accepted(), "t")], true),
            "of another spec"
        );
        let mut refused = at(accepted(), "t");
        refused["status"] = "False".into();
        assert_eq!(verdict(kind, json!({}), json!([refused])), (vec![accepted()], true), "since now");
    }
}

#[test]
fn what_is_not() {
    let faulty =
        |count: usize| json!({"rules": vec![json!({"to": [{"operation": {"methods": ["GET"]}}]}); count]});
    let said = |spec| {
        let (conditions, _) = verdict(Kind::AuthorizationPolicy, spec, json!([accepted()]));
        assert_eq!(
            (&conditions[0]["status"], &conditions[0]["reason"]),
            (&json!("False"), &json!("UnsupportedValue"))
        );
        conditions[0]["message"].as_str().unwrap().to_owned()
    };
    let two = said(faulty(2));
    for place in ["spec.rules[0].to[0].operation.methods", "; spec.rules[1].to[0].operation.methods"] {
        assert!(two.contains(place), "{two}");
    }
    assert!(!two.contains("more"), "{two}");
    let many = said(faulty(12));
    assert!(
        many.contains("rules[9]") && !many.contains("rules[10]") && many.ends_with("; and 2 more"),
        "{many}"
    );
    assert!(said(json!({"action": "CUSTOM"})).contains("CUSTOM"));
    let (conditions, _) =
        verdict(Kind::PeerAuthentication, json!({"mtls": {"mode": "TOMORROW"}}), json!(null));
    assert!(conditions[0]["message"].as_str().unwrap().contains("taken for STRICT"), "{conditions:?}");
    let mut index = index();
    let spec = json!({"selector": {"matchLabels": {"app": "web"}}, "mtls": {"mode": "STRICT"}});
    let of_the_mesh = json!({"metadata": {"namespace": "istio-system", "name": "p"}, "spec": spec});
    apply(&mut index, Kind::PeerAuthentication, of_the_mesh);
    let message = verdicts(&index)[0].conditions[0]["message"].clone();
    assert!(message.as_str().unwrap().contains("selects nothing"), "{message}");
}

/// Whoever may write a policy can neither fill the log with it nor make its status too large to be written.
#[test]
fn what_is_wrong_is_told_once_and_briefly() {
    let mut index = index();
    let policy = |generation: u32, rules: Value| json!({"metadata": {"namespace": "shop", "name": "p", "generation": generation}, "spec": {"rules": rules}});
    let long = "é".repeat(5000);
    let rules = json!(vec![json!({"from": [{"source": {"ipBlocks": [long]}}]}); 500]);
    let changes = apply(&mut index, Kind::AuthorizationPolicy, policy(1, rules.clone()));
    let length: usize = changes.problems.iter().map(|problem| problem.reason.chars().count()).sum();
    assert!(changes.problems.len() == 11 && length < 4000, "{} of {length}", changes.problems.len());
    assert_eq!(changes.problems[10].reason, "and 490 more");
    let again = apply(&mut index, Kind::AuthorizationPolicy, policy(2, rules));
    assert!(
        again.problems.is_empty() && again.verdicts,
        "the same of a new generation: {:?}",
        again.problems
    );
    let other = json!([{"from": [{"source": {"ipBlocks": ["x"]}}]}]);
    assert_eq!(apply(&mut index, Kind::AuthorizationPolicy, policy(3, other)).problems.len(), 1);
}

/// There are none.
#[test]
fn what_is_for_waypoints() {
    let targeted = json!({"targetRefs": [{"kind": "Service", "name": "web"}], "action": "DENY"});
    let other = json!({"type": "WaypointAccepted", "status": "True"});
    let (conditions, told) = verdict(Kind::AuthorizationPolicy, targeted, json!([accepted(), other]));
    assert_eq!((told, &conditions[0]), (true, &other));
    assert_eq!(conditions[1]["status"], "False");
    assert!(conditions[1]["message"].as_str().unwrap().contains("enforced by nobody"), "{conditions:?}");
}

#[test]
fn what_is_gone() {
    let mut index = index();
    let policy = json!({"metadata": {"namespace": "shop", "name": "p"}, "spec": {}});
    apply(&mut index, Kind::PeerAuthentication, policy);
    assert_eq!(verdicts(&index).len(), 1);
    index.handle(Event::Deleted(Kind::PeerAuthentication, ObjectName::new("shop", "p")));
    assert_eq!(verdicts(&index), []);
}
