//! What is in every cluster before anyone does anything: namespaces, the service of the API server, the roles
//! that bindings commonly refer to.

use serde_json::{Value, json};

use crate::fabric;
use crate::stack::Stack;

/// The objects, in an order in which they can be created.
pub(super) fn objects(stack: Stack) -> Vec<Value> {
    let namespaces = ["default", "kube-system", "kube-public", "kube-node-lease"]
        .map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}));
    let read = ["get", "list", "watch"];
    let workloads = [
        "pods",
        "pods/log",
        "pods/status",
        "services",
        "endpoints",
        "configmaps",
        "serviceaccounts",
        "events",
        "deployments",
        "replicasets",
        "daemonsets",
        "jobs",
        "cronjobs",
        "endpointslices",
        "networkpolicies",
        "leases",
    ];
    let everything = [
        json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}),
        json!({"nonResourceURLs": ["*"], "verbs": ["*"]}),
    ];
    let groups = ["", "apps", "batch", "discovery.k8s.io", "networking.k8s.io", "coordination.k8s.io"];
    let edit = [json!({"apiGroups": groups, "resources": ["*"], "verbs": ["*"]})];
    let others = [
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": "kubernetes", "namespace": "default",
                "labels": {"component": "apiserver", "provider": "kubernetes"},
            },
            "spec": {
                "clusterIP": fabric::service_address(stack.primary(), 1),
                "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": 6443}],
            },
        }),
        role("cluster-admin", &json!(everything)),
        role("admin", &json!(edit)),
        role("edit", &json!(edit)),
        role("view", &json!([{"apiGroups": groups, "resources": workloads, "verbs": read}])),
        role(
            "system:auth-delegator",
            &json!([
                {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
                {"apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"], "verbs": ["create"]},
            ]),
        ),
    ];
    namespaces.into_iter().chain(others).collect()
}

fn role(name: &str, rules: &Value) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}},
        "rules": rules,
    })
}
