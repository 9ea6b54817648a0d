//! The commands of `kubectl` that have a typed client: they send protobuf. What the server stores is compared with what
//! the same command would have sent as JSON.

use serde_json::{Value, json};

use crate::cluster::{Cluster, holds};

/// Whether all of `part` is in `whole`.
fn is_in(part: &Value, whole: &Value) -> bool {
    match (part, whole) {
        (Value::Object(part), Value::Object(whole)) => part.iter().all(|(key, value)| {
            let empty = value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty);
            empty || whole.get(key).is_some_and(|whole| is_in(value, whole))
        }),
        (Value::Array(part), Value::Array(whole)) => {
            part.len() == whole.len() && part.iter().zip(whole).all(|(part, whole)| is_in(part, whole))
        }
        (part, whole) => part == whole,
    }
}

#[test]
fn created_as_their_json_says() {
    let cluster = Cluster::start();
    for command in [
        "create namespace demo",
        "create configmap c --from-literal=a=b --from-literal=c=d",
        "create secret generic s --from-literal=a=b",
        "create serviceaccount a",
        "create service clusterip web --tcp=80:8080",
        "create service nodeport node --tcp=80:http",
        "create service externalname out --external-name=example.com",
    ] {
        let json = |flags: &str| -> Value {
            serde_json::from_str(&cluster.kubectl(&format!("{command} {flags}-o json"))).unwrap()
        };
        let wanted = json("--dry-run=client ");
        let made = json("");
        assert!(is_in(&wanted, &made), "{command}: {made} is not {wanted}");
    }
}

#[test]
fn asked_and_told() {
    let cluster = Cluster::start();
    let token = cluster.kubectl("create token default --duration=20m --audience=x");
    assert_eq!(token.trim().split('.').count(), 3, "{token}");
    assert_eq!(cluster.kubectl("auth can-i delete nodes").trim(), "yes");
    holds(&cluster.kubectl("auth can-i --list"), &["*.*", "selfsubjectrulesreviews", "/openapi/*"]);
    holds(&cluster.kubectl("auth whoami"), &["kubernetes-admin", "system:masters"]);
}

#[test]
fn a_node_is_drained() {
    let cluster = Cluster::start();
    let client = cluster.server.client();
    client.create(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})).unwrap();
    let spec = json!({"nodeName": "n1", "terminationGracePeriodSeconds": 0, "containers": [{"name": "c", "image": "i"}]});
    client
        .create(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}))
        .unwrap();
    cluster.kubectl("drain n1 --force --timeout=20s --dry-run=server");
    holds(&cluster.kubectl("get pods -o name"), &["pod/p"]);
    let told = cluster.kubectl("drain n1 --force --timeout=20s");
    holds(&told, &["node/n1 cordoned", "evicting pod default/p", "node/n1 drained"]);
    holds(&cluster.kubectl("get node n1"), &["SchedulingDisabled"]);
    cluster.kubectl("uncordon n1");
}
