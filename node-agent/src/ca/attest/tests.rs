//! The decision, by table.

use super::*;
use crate::ca::fakes::pod;

const OWN: &str = "spiffe://cluster.local/ns/ambit-system/sa/ztunnel";
const PAYMENT: &str = "spiffe://cluster.local/ns/payments/sa/payment";

fn rules() -> Rules {
    let ztunnel = ServiceAccount { namespace: "ambit-system".into(), name: "ztunnel".into() };
    let agent = ServiceAccount { name: "node-agent".into(), ..ztunnel.clone() };
    let agent_names = vec!["node-agent.ambit-system.svc".into()];
    Rules { trust_domain: "cluster.local".parse().unwrap(), ztunnel, agent, agent_names }
}

fn review(username: &str, extra: &[(&str, &str)]) -> Review {
    Review {
        authenticated: true,
        error: None,
        audiences: vec![AUDIENCE.into()],
        username: username.into(),
        extra: extra
            .iter()
            .map(|(key, value)| (format!("authentication.kubernetes.io/{key}"), vec![(*value).to_owned()]))
            .collect(),
    }
}

#[test]
fn callers_are_service_accounts_with_a_token_for_us() {
    let good = review("system:serviceaccount:ns:sa", &[]);
    let caller = Caller::from_review(&good).unwrap();
    assert_eq!(caller.account.to_string(), "ns/sa");
    for (review, reason) in [
        (Review::default(), "bad_token"),
        (Review { authenticated: false, ..good.clone() }, "bad_token"),
        (Review { audiences: vec![], ..good.clone() }, "wrong_audience"),
        (
            Review { audiences: vec!["https://kubernetes.default.svc".into()], ..good.clone() },
            "wrong_audience",
        ),
        (Review { username: "system:node:n1".into(), ..good.clone() }, "not_service_account"),
        (Review { username: "system:serviceaccount:ns".into(), ..good.clone() }, "not_service_account"),
        (Review { username: String::new(), ..good }, "not_service_account"),
    ] {
        let refusal = Caller::from_review(&review).unwrap_err();
        assert_eq!(refusal.reason(), reason, "{review:?}");
        assert!(refusal.is_unauthenticated());
    }
}

fn check(username: &str, extra: &[(&str, &str)], asked: Option<&str>, facts: &Facts, expect: &str) {
    let caller = Caller::from_review(&review(username, extra)).unwrap();
    let asked = asked.map(|asked| asked.parse().unwrap());
    let found = match attest(&rules(), &caller, asked.as_ref(), facts) {
        Verdict::Issue(identity) => identity.to_string(),
        Verdict::Refuse(refusal) => format!("refused: {}", refusal.reason()),
        Verdict::Need(Fact::CallerPod { namespace, name }) => format!("need pod {namespace}/{name}"),
        Verdict::Need(Fact::Pods { node, namespace, freshness }) => {
            format!("need pods {node} {namespace} {freshness:?}")
        }
    };
    assert_eq!(found, expect, "{username} {extra:?} {asked:?} {facts:?}");
}

#[test]
fn an_account_has_its_own_identity_only() {
    let nothing = Facts::default();
    let payment = "system:serviceaccount:payments:payment";
    let ztunnel = "system:serviceaccount:ambit-system:ztunnel";
    let foreign = "spiffe://other.mesh/ns/payments/sa/payment";
    let account = "spiffe://cluster.local/ns/payments/sa/account";
    for (username, asked, expect) in [
        (payment, None, PAYMENT),
        (payment, Some(PAYMENT), PAYMENT),
        (payment, Some(account), "refused: foreign_identity"),
        (payment, Some(OWN), "refused: foreign_identity"),
        (payment, Some(foreign), "refused: wrong_trust_domain"),
        (ztunnel, None, OWN),
        (ztunnel, Some(OWN), OWN),
        (ztunnel, Some(foreign), "refused: wrong_trust_domain"),
        // Same name in another namespace, or with a part of it.
        ("system:serviceaccount:payments:ztunnel", Some(PAYMENT), "refused: foreign_identity"),
        ("system:serviceaccount:ambit-system:ztunnel:x", None, "refused: malformed_identity"),
        // A name that would change the path.
        ("system:serviceaccount:a/sa/b:c", None, "refused: malformed_identity"),
    ] {
        check(username, &[("node-name", "n1")], asked, &nothing, expect);
    }
}

#[test]
fn ztunnel_has_the_identities_of_its_node() {
    let latest = |pods: &[Pod]| Facts { caller_pod: None, pods: Some((Freshness::Latest, pods.to_vec())) };
    let cached = |pods: &[Pod]| Facts { caller_pod: None, pods: Some((Freshness::Cached, pods.to_vec())) };
    let (here, there) = (pod("payment", "n1"), pod("payment", "n2"));
    let other = pod("account", "n1");
    let ended = Pod { ended: true, ..here.clone() };
    for (facts, expect) in [
        (Facts::default(), "need pods n1 payments Cached"),
        (cached(&[]), "need pods n1 payments Latest"),
        (cached(std::slice::from_ref(&ended)), "need pods n1 payments Latest"),
        (cached(&[other.clone(), here.clone()]), PAYMENT),
        (latest(std::slice::from_ref(&here)), PAYMENT),
        (latest(&[ended.clone(), here.clone()]), PAYMENT),
        (latest(&[]), "refused: no_pod_on_node"),
        (latest(&[ended]), "refused: no_pod_on_node"),
        (latest(&[other]), "refused: no_pod_on_node"),
        // Even from an API server that ignores the field selector.
        (latest(&[there]), "refused: no_pod_on_node"),
    ] {
        let username = "system:serviceaccount:ambit-system:ztunnel";
        check(username, &[("node-name", "n1")], Some(PAYMENT), &facts, expect);
    }
}

#[test]
fn the_callers_node_is_proved() {
    let by_pod = [("pod-name", "ztunnel-1"), ("pod-uid", "u1")];
    let its_pod = |pod: Option<Pod>| Facts { caller_pod: Some(pod), pods: None };
    let ztunnel = pod("ztunnel", "n1");
    let nothing = Facts::default();
    for (extra, facts, expect) in [
        (&[][..], &nothing, "refused: unknown_node"),
        (&[("node-name", "")][..], &nothing, "refused: unknown_node"),
        (&[("pod-name", "ztunnel-1")][..], &nothing, "refused: unknown_node"),
        (&by_pod[..], &nothing, "need pod ambit-system/ztunnel-1"),
        (&by_pod[..], &its_pod(Some(ztunnel.clone())), "need pods n1 payments Cached"),
        (&by_pod[..], &its_pod(None), "refused: unknown_node"),
        (&by_pod[..], &its_pod(Some(Pod { uid: "u2".into(), ..ztunnel.clone() })), "refused: unknown_node"),
        (&by_pod[..], &its_pod(Some(pod("ztunnel", ""))), "refused: unknown_node"),
    ] {
        check("system:serviceaccount:ambit-system:ztunnel", extra, Some(PAYMENT), facts, expect);
    }
}

#[test]
fn refusals_say_what_was_asked_and_why() {
    let asked: Identity = PAYMENT.parse().unwrap();
    let refusal = Refusal::NoPod { asked: asked.clone(), node: "n1".into(), ended: true };
    assert_eq!(
        refusal.to_string(),
        format!("no running pod on node n1 has identity {asked}; one that had it has ended")
    );
    assert!(!refusal.is_unauthenticated());
}

/// A DNS name is a claim to be that server: only the agent itself makes it, and only in its own name.
#[test]
fn the_agent_alone_has_dns_names() {
    let rules = rules();
    let account =
        |namespace: &str, name: &str| ServiceAccount { namespace: namespace.into(), name: name.into() };
    let agents = "spiffe://cluster.local/ns/ambit-system/sa/node-agent";
    for (namespace, name, identity, expected) in [
        ("ambit-system", "node-agent", agents, 1),
        ("ambit-system", "node-agent", PAYMENT, 0),
        ("ambit-system", "ztunnel", agents, 0),
        ("ambit-system", "ztunnel", OWN, 0),
        ("payments", "node-agent", "spiffe://cluster.local/ns/payments/sa/node-agent", 0),
    ] {
        let names = server_names(&rules, &account(namespace, name), &identity.parse().unwrap());
        assert_eq!(names.len(), expected, "{namespace}/{name} as {identity}");
    }
}
