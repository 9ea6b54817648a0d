//! What is asked of the API server, and what is made of its answers.

use serde_json::{Value, json};

use super::*;
use crate::cluster::fake_api::{self, Journal, failure};

fn cluster(answer: impl Fn(&str) -> (u16, Value) + Send + Sync + 'static) -> (Cluster, Journal) {
    let (client, seen) = fake_api::client(answer);
    (Cluster::new(client, "ambit-system".into()), seen)
}

fn only(seen: &Journal) -> String {
    let seen = seen.lock().unwrap();
    let [request] = seen.as_slice() else { panic!("{seen:?}") };
    request.clone()
}

fn of_pod(phase: &str, account: &Value) -> Value {
    json!({
        "metadata": {"name": "a", "uid": "u1"},
        "spec": {"nodeName": "n1", "serviceAccountName": account, "containers": []},
        "status": {"phase": phase},
    })
}

#[tokio::test]
async fn a_token_is_reviewed_for_our_audience() {
    let status = json!({
        "authenticated": true, "audiences": ["istio-ca"], "error": "",
        "user": {"username": "system:serviceaccount:a:b", "extra": {"authentication.kubernetes.io/node-name": ["n1"]}},
    });
    let (server, seen) = cluster(move |_| (201, json!({"metadata": {}, "spec": {}, "status": status})));
    let review = server.review("the-token").await.unwrap();
    let request = only(&seen);
    let (line, body) = request.split_once(" {").unwrap();
    assert_eq!(line, "POST /apis/authentication.k8s.io/v1/tokenreviews");
    assert!(body.contains(r#""spec":{"audiences":["istio-ca"],"token":"the-token"}"#), "{body}");
    let extra = [("authentication.kubernetes.io/node-name".to_owned(), vec!["n1".to_owned()])].into();
    let expect = Review {
        authenticated: true,
        error: None,
        audiences: vec!["istio-ca".into()],
        username: "system:serviceaccount:a:b".into(),
        extra,
    };
    assert_eq!(review, expect);
}

#[tokio::test]
async fn a_review_that_says_nothing_is_no_yes() {
    for status in [json!(null), json!({}), json!({"user": {"username": "system:serviceaccount:a:b"}})] {
        let answer = json!({"metadata": {}, "spec": {}, "status": status});
        let (server, _) = cluster(move |_| (201, answer.clone()));
        assert!(!server.review("t").await.unwrap().authenticated, "{status}");
    }
}

/// Errors are logged, and told to whoever asked.
#[tokio::test]
async fn a_failed_review_says_why_without_the_token() {
    let (server, _) = cluster(|_| failure(403, "Forbidden", "tokenreviews is forbidden"));
    let error = server.review("the-secret-token").await.unwrap_err();
    let said = format!("{error} {error:?}");
    assert!(said.contains("cannot review a token") && said.contains("is forbidden"), "{said}");
    assert!(!said.contains("the-secret-token"), "{said}");
}

#[tokio::test]
async fn a_pod_is_as_the_server_has_it() {
    let pod = |account: &str, ended| Pod {
        uid: "u1".into(),
        service_account: account.into(),
        node: "n1".into(),
        ended,
    };
    for (answer, expect) in [
        ((200, of_pod("Running", &json!("web"))), Some(pod("web", false))),
        ((200, of_pod("Pending", &json!(""))), Some(pod("default", false))),
        ((200, of_pod("Succeeded", &json!(null))), Some(pod("default", true))),
        ((200, of_pod("Failed", &json!("web"))), Some(pod("web", true))),
        (
            (200, json!({"metadata": {"name": "a"}})),
            Some(Pod { uid: "".into(), node: "".into(), ..pod("default", false) }),
        ),
        (failure(404, "NotFound", "no such pod"), None),
    ] {
        let told = answer.clone();
        let (server, seen) = cluster(move |_| told.clone());
        assert_eq!(server.pod("shop", "a").await.unwrap(), expect, "{answer:?}");
        assert_eq!(only(&seen), "GET /api/v1/namespaces/shop/pods/a ");
    }
}

#[tokio::test]
async fn a_nodes_pods_come_from_the_cache_or_not() {
    for (freshness, query) in
        [(Freshness::Cached, "&resourceVersion=0&resourceVersionMatch=NotOlderThan"), (Freshness::Latest, "")]
    {
        let list = json!({"metadata": {}, "items": [of_pod("Running", &json!("web")), of_pod("Failed", &json!("web"))]});
        let (server, seen) = cluster(move |_| (200, list.clone()));
        let pods = server.pods("n1", "shop", freshness).await.unwrap();
        assert_eq!(pods.iter().map(|pod| pod.ended).collect::<Vec<_>>(), [false, true]);
        assert_eq!(
            only(&seen),
            format!("GET /api/v1/namespaces/shop/pods?&fieldSelector=spec.nodeName%3Dn1{query} ")
        );
    }
}

#[tokio::test]
async fn a_secret_is_read_and_created_once() {
    let path = "/api/v1/namespaces/ambit-system/secrets";
    let metadata = json!({"name": "s", "resourceVersion": "7", "annotations": {"a": "b"}});
    let (server, seen) = cluster(move |_| (200, json!({"metadata": metadata, "data": {"key.pem": "a2V5"}})));
    let files = Files::from([("key.pem".to_owned(), b"key".to_vec())]);
    let annotations = [("a".to_owned(), "b".to_owned())].into();
    let stored = Stored { files: files.clone(), annotations, version: "7".to_owned() };
    assert_eq!(server.secret("s").await.unwrap(), Some(stored));
    assert_eq!(only(&seen), format!("GET {path}/s "));
    let (server, _) = cluster(|_| failure(404, "NotFound", "no"));
    assert_eq!(server.secret("s").await.unwrap(), None);

    for (answer, expect) in [
        ((201, json!({"metadata": {"name": "s"}})), Some(true)),
        (failure(409, "AlreadyExists", "there is one"), Some(false)),
        (failure(403, "Forbidden", "may not"), None),
    ] {
        let (server, seen) = cluster(move |_| answer.clone());
        assert_eq!(server.create_secret("s", files.clone()).await.ok(), expect);
        let request = only(&seen);
        assert!(
            request.starts_with(&format!("POST {path}? {{"))
                || request.starts_with(&format!("POST {path} {{")),
            "{request}"
        );
        for part in [
            r#""data":{"key.pem":"a2V5"}"#,
            r#""name":"s""#,
            r#"managed-by":"ambit-ca""#,
            r#""type":"Opaque""#,
        ] {
            assert!(request.contains(part), "{part} is not in {request}");
        }
    }
}

#[tokio::test]
async fn a_secret_is_replaced_only_as_it_was_read() {
    let files = Files::from([("key.pem".to_owned(), b"key".to_vec())]);
    for (answer, expect) in [
        ((200, json!({"metadata": {"name": "s"}})), Some(true)),
        (failure(409, "Conflict", "another one wrote"), Some(false)),
        (failure(404, "NotFound", "it is gone"), Some(false)),
        (failure(403, "Forbidden", "may not"), None),
    ] {
        let (server, seen) = cluster(move |_| answer.clone());
        assert_eq!(server.replace_secret("s", files.clone(), "7").await.ok(), expect);
        let request = only(&seen);
        assert!(request.starts_with("PUT /api/v1/namespaces/ambit-system/secrets/s"), "{request}");
        for part in [r#""data":{"key.pem":"a2V5"}"#, r#""resourceVersion":"7""#] {
            assert!(request.contains(part), "{part} is not in {request}");
        }
    }
}

#[tokio::test]
async fn an_event_of_a_secret_is_one_for_each_share_of_a_life() {
    let expiry = |percent, message: &str| Expiry {
        secret: "cacerts",
        subject: "CN=root".into(),
        percent,
        until: UNIX_EPOCH + Duration::from_secs(7),
        message: message.into(),
    };
    let mut events = Vec::new();
    for (answer, expiry) in [
        ((201, json!({"metadata": {}, "involvedObject": {}})), expiry(50, "half")),
        (failure(409, "AlreadyExists", "another replica was first"), expiry(50, "nearly half")),
        ((201, json!({"metadata": {}, "involvedObject": {}})), expiry(10, "soon")),
    ] {
        let (server, seen) = cluster(move |_| answer.clone());
        server.tell(&expiry).await.unwrap();
        let request = only(&seen);
        let (line, body) = request.split_once(" {").unwrap();
        assert!(line.starts_with("POST /api/v1/namespaces/ambit-system/events"), "{line}");
        events.push(serde_json::from_str::<Value>(&format!("{{{body}")).unwrap());
    }
    let name = |event: &Value| event["metadata"]["name"].as_str().unwrap().to_owned();
    assert!(name(&events[0]) == name(&events[1]) && name(&events[0]) != name(&events[2]), "{events:#?}");
    for (event, kind, message) in [(&events[0], "Normal", "half"), (&events[2], "Warning", "soon")] {
        assert_eq!((&event["type"], &event["message"]), (&json!(kind), &json!(message)));
        assert_eq!(
            (&event["involvedObject"]["kind"], &event["involvedObject"]["name"]),
            (&json!("Secret"), &json!("cacerts"))
        );
    }
    let (server, _) = cluster(|_| failure(403, "Forbidden", "may not"));
    assert!(server.tell(&expiry(10, "soon")).await.is_err());
}

#[tokio::test]
async fn a_file_is_published_in_a_new_or_an_old_config_map() {
    let path = "/api/v1/namespaces/ambit-system/configmaps";
    let there = || (200, json!({"metadata": {"name": "m"}, "data": {"root.pem": "R", "other": "O"}}));
    let (server, _) = cluster(move |_| there());
    assert_eq!(server.published("m", "root.pem").await.unwrap().as_deref(), Some("R"));
    assert_eq!(server.published("m", "missing").await.unwrap(), None);
    let (server, _) = cluster(|_| failure(404, "NotFound", "no"));
    assert_eq!(server.published("m", "root.pem").await.unwrap(), None);

    let (server, seen) = cluster(move |_| there());
    server.publish("m", "root.pem", "R").await.unwrap();
    assert!(only(&seen).starts_with(&format!("POST {path}")), "{seen:?}");

    // Only the file: others in the map are not ours.
    let (server, seen) = cluster(move |request| match request.split(' ').next() {
        Some("POST") => failure(409, "AlreadyExists", "there is one"),
        _ => there(),
    });
    server.publish("m", "root.pem", "R").await.unwrap();
    let seen = seen.lock().unwrap().clone();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(seen[1].starts_with(&format!("PATCH {path}/m")), "{seen:?}");
    assert!(seen[1].ends_with(r#" {"data":{"root.pem":"R"}}"#), "{seen:?}");

    let (server, _) = cluster(|request| match request.split(' ').next() {
        Some("POST") => failure(409, "AlreadyExists", "there is one"),
        _ => failure(403, "Forbidden", "may not"),
    });
    let error = server.publish("m", "root.pem", "R").await.unwrap_err().to_string();
    assert!(error.contains("change ConfigMap ambit-system/m"), "{error}");
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_not_waited_for() {
    let silence = std::future::pending::<Result<(), kube::Error>>();
    let error = within(Duration::from_millis(1), "get it", silence).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot get it: the API server did not answer within 10 s");
}
