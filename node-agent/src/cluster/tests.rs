//! What is sent to the API server, and what may be.

use serde_json::json;

use super::*;
use crate::cluster::fake_api::{self, Journal};

/// An API server that agrees to everything, and what it was asked.
fn recorder() -> (ApiServer, Journal) {
    let (client, seen) = fake_api::client(|_| (200, json!({"metadata": {"name": "a"}})));
    (ApiServer::new(client), seen)
}

#[tokio::test]
async fn annotates_by_way_of_the_status() {
    let (server, seen) = recorder();
    let name = ObjectName::new("shop", "a");
    server.annotate(&name, "uid-a", true).await.unwrap();
    server.annotate(&name, "uid-a", false).await.unwrap();
    let path = "PATCH /api/v1/namespaces/shop/pods/a/status";
    let body = |value: &str| {
        format!(r#"{{"metadata":{{"annotations":{{"{REDIRECTION_ANNOTATION}":{value}}},"uid":"uid-a"}}}}"#)
    };
    let expect = [format!("{path} {}", body("\"enabled\"")), format!("{path} {}", body("null"))];
    assert_eq!(*seen.lock().unwrap(), expect);
}

#[tokio::test]
async fn a_static_pods_hash_is_no_precondition() {
    let (server, seen) = recorder();
    let name = ObjectName::new("shop", "a");
    server.annotate(&name, "0123456789abcdef0123456789abcdef", true).await.unwrap();
    assert!(seen.lock().unwrap()[0].contains(r#""uid":null"#), "{seen:?}");
}

#[tokio::test]
async fn a_policys_status_is_of_the_version_that_was_read() {
    let (server, seen) = recorder();
    let conditions = vec![json!({"type": "Other"}), json!({"type": verdict::CONDITION, "status": "True"})];
    let (kind, name) = (crate::index::event::Kind::AuthorizationPolicy, ObjectName::new("shop", "p"));
    let api_version = "security.istio.io/v1beta1".into();
    let verdict =
        Verdict { kind, name, api_version, resource_version: "7".into(), conditions, addresses: None };
    server.judge(&verdict).await.unwrap();
    let seen = seen.lock().unwrap();
    let (request, body) = seen[0].split_once(" {").unwrap();
    assert_eq!(
        request,
        "PATCH /apis/security.istio.io/v1beta1/namespaces/shop/authorizationpolicies/p/status"
    );
    let body: Value = serde_json::from_str(&format!("{{{body}")).unwrap();
    assert_eq!(body["metadata"], json!({"resourceVersion": "7"}));
    let conditions = body["status"]["conditions"].as_array().unwrap();
    assert_eq!(conditions[0], json!({"type": "Other"}), "others' conditions are not touched");
    assert_eq!(conditions[1]["status"], "True");
    assert!(conditions[1]["lastTransitionTime"].as_str().unwrap().ends_with('Z'), "{conditions:?}");
    assert_eq!(seen.len(), 1);
}

#[tokio::test]
async fn addresses_are_written_together_with_the_conditions() {
    let (server, seen) = recorder();
    let addresses = json!([{"host": "db.example", "value": "240.240.0.1"}]);
    for (addresses, expect) in [
        (addresses.as_array().cloned(), json!({"conditions": [], "addresses": addresses})),
        (Some(Vec::new()), json!({"conditions": [], "addresses": null})),
        (None, json!({"conditions": []})),
    ] {
        let (kind, name) = (crate::index::event::Kind::ServiceEntry, ObjectName::new("shop", "db"));
        let (api_version, resource_version) = ("networking.istio.io/v1".into(), "7".into());
        let verdict = Verdict { kind, name, api_version, resource_version, conditions: vec![], addresses };
        server.judge(&verdict).await.unwrap();
        let request = seen.lock().unwrap().pop().unwrap();
        let (path, body) = request.split_once(" {").unwrap();
        assert_eq!(path, "PATCH /apis/networking.istio.io/v1/namespaces/shop/serviceentries/db/status");
        let body: Value = serde_json::from_str(&format!("{{{body}")).unwrap();
        assert_eq!(body, json!({"metadata": {"resourceVersion": "7"}, "status": expect}));
    }
}

#[tokio::test]
async fn an_event_of_a_refusal_is_one_for_each_client_and_policy() {
    let (server, seen) = recorder();
    let refusal = |client: &str, policy: &str| {
        let pod = ObjectName::new("shop", "a");
        Notice::refused(
            pod,
            "uid-a".into(),
            client.into(),
            80,
            policy.into(),
            "policy shop/p does not allow it",
        )
    };
    for refusal in
        [refusal("x", "shop/p"), refusal("y", "shop/p"), refusal("x", "shop/q"), refusal("x", "shop/p")]
    {
        server.tell(&refusal).await.unwrap();
    }
    let seen = seen.lock().unwrap();
    let body = |request: &String| -> Value {
        let (path, body) = request.split_once(" {").unwrap();
        assert_eq!(path, "POST /api/v1/namespaces/shop/events");
        serde_json::from_str(&format!("{{{body}")).unwrap()
    };
    let events: Vec<Value> = seen.iter().map(body).collect();
    let names: Vec<&str> = events.iter().map(|event| event["metadata"]["name"].as_str().unwrap()).collect();
    assert!(names[0] == names[3] && names[0] != names[1] && names[0] != names[2], "{names:?}");
    assert_eq!(events[0]["involvedObject"]["uid"], "uid-a");
    assert_eq!(events[0]["message"], "refused x at port 80: policy shop/p does not allow it");
    assert_eq!((&events[0]["type"], &events[0]["reason"]), (&json!("Warning"), &json!("PolicyDenied")));
}

#[tokio::test]
async fn an_event_of_a_certificate_is_one_for_each_share_of_its_life() {
    let (server, seen) = recorder();
    for (percent, until) in [(50, 7), (25, 7), (50, 7), (50, 8)] {
        let pod = ObjectName::new("shop", "a");
        server.tell(&Notice::expiring(pod, "uid-a".into(), percent, until, "the CA is away")).await.unwrap();
    }
    let seen = seen.lock().unwrap();
    let events = seen.iter().map(|request| {
        let (_, body) = request.split_once(" {").unwrap();
        serde_json::from_str::<Value>(&format!("{{{body}")).unwrap()
    });
    let events: Vec<Value> = events.collect();
    let names: Vec<&str> = events.iter().map(|event| event["metadata"]["name"].as_str().unwrap()).collect();
    assert!(names[0] == names[2] && names[0] != names[1] && names[0] != names[3], "{names:?}");
    let kinds: Vec<_> = events.iter().map(|event| (&event["type"], &event["reason"])).collect();
    assert_eq!(kinds[0], (&json!("Normal"), &json!("CertificateRenewalLate")));
    assert_eq!(kinds[1], (&json!("Warning"), &json!("CertificateExpiring")));
    let message = events[1]["message"].as_str().unwrap();
    assert!(message.contains("25 percent") && message.ends_with("the CA is away"), "{message}");
}

/// Whoever may patch pods may give every pod of the cluster another image.
#[test]
fn the_manifest_allows_to_write_nothing_but_statuses_and_events() {
    let manifest = include_str!("../../../manifests/base/node-agent.yaml");
    let rules: Vec<_> = manifest.split("- apiGroups:").skip(1).collect();
    assert!(!rules.is_empty());
    for rule in rules {
        let writes = ["patch", "update", "create", "delete", "*"].iter().any(|verb| {
            let verbs = rule.lines().find(|line| line.trim_start().starts_with("verbs:")).unwrap();
            verbs.contains(verb)
        });
        let status = [
            "[pods/status]",
            "[peerauthentications/status, authorizationpolicies/status]",
            "[serviceentries/status, workloadentries/status]",
        ];
        let only_status = status.iter().any(|resources| rule.contains(&format!("resources: {resources}\n")));
        let new_events = rule.contains("resources: [events]\n") && rule.contains("verbs: [create]\n");
        // A question, which leaves nothing behind.
        let reviews = rule.contains("resources: [tokenreviews]\n") && rule.contains("verbs: [create]\n");
        assert!(!writes || only_status || new_events || reviews, "{rule}");
    }
}
