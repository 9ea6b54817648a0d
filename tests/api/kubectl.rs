//! Drives the real `kubectl` through what people and the lab do with it.

use std::io::{BufRead as _, BufReader};
use std::time::Duration;

use mesh_tests::api::{Credential, PatchKind};
use serde_json::{Value, json};

use crate::cluster::{Cluster, WORKLOADS, holds};

#[test]
fn apply_twice_and_change() {
    let cluster = Cluster::start();
    let first = cluster.kubectl_with("apply -f -", WORKLOADS);
    assert_eq!(first.matches("created").count(), 7, "{first}");
    let again = cluster.kubectl_with("apply -f -", WORKLOADS);
    assert_eq!(again.matches("unchanged").count(), 7, "{again}");
    let changed = WORKLOADS.replace("value: '2'", "value: '3'").replace("{name: A, value: '1'}, ", "");
    holds(
        &cluster.kubectl_with("apply -f -", &changed),
        &["deployment.apps/web configured", "service/web unchanged"],
    );
    let env = cluster.kubectl("get deploy web -n demo -o jsonpath={.spec.template.spec.containers[0].env}");
    assert_eq!(env, r#"[{"name":"B","value":"3"}]"#);
    let generation = cluster.kubectl("get deploy web -n demo -o jsonpath={.metadata.generation}");
    assert_eq!(generation, "2");
    holds(&cluster.kubectl_with("diff -f -", &changed), &[]);
    let side = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {a: b}\n";
    holds(&cluster.kubectl_with("apply --server-side -f -", side), &["configmap/c serverside-applied"]);
    holds(
        &cluster.kubectl_with("delete --ignore-not-found -f -", WORKLOADS),
        &["namespace \"demo\" deleted"],
    );
    holds(&cluster.refused("admin", "get ns demo", ""), &["namespaces \"demo\" not found"]);
}

#[test]
fn tables_selectors_and_formats() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    holds(
        &cluster.kubectl("get all -n demo"),
        &["pod/client", "service/web", "daemonset.apps/agent", "cronjob.batch/tick"],
    );
    holds(
        &cluster.kubectl("get pods -A -o wide"),
        &["NAMESPACE", "NOMINATED NODE", "client", "0/1", "Pending"],
    );
    holds(&cluster.kubectl("get svc -n demo"), &["ClusterIP", "10.96.", "80/TCP"]);
    holds(
        &cluster.kubectl("get deploy,ds -n demo -o wide"),
        &["web", "0/1", "ambit/examples:latest", "app=agent"],
    );
    assert_eq!(cluster.kubectl("get pods -n demo -l app=client -o name"), "pod/client\n");
    assert_eq!(cluster.kubectl("get pods -n demo -l app!=client -o name"), "");
    holds(
        &cluster.refused("admin", "get pods -A --field-selector spec.priority=1", ""),
        &["field label not supported: spec.priority"],
    );
    for selector in ["metadata.name=client", "status.phase=Pending", "spec.nodeName="] {
        let found = cluster.kubectl(&format!("get pods -A --field-selector {selector} -o name"));
        assert_eq!(found, "pod/client\n", "{selector}");
    }
    let list: Value = serde_json::from_str(&cluster.kubectl("get pods -n demo -o json")).unwrap();
    let pod = &list["items"][0];
    assert_eq!((&pod["kind"], &pod["spec"]["serviceAccountName"]), (&json!("Pod"), &json!("default")));
    assert_eq!(pod["spec"]["volumes"][0]["projected"]["sources"].as_array().unwrap().len(), 3);
    holds(&cluster.kubectl("get ns demo -o yaml"), &["kubernetes.io/metadata.name: demo", "phase: Active"]);
    holds(&cluster.kubectl("get pods -A --chunk-size=1"), &["client"]);
    holds(&cluster.kubectl("describe pod client -n demo"), &["Service Account:", "kube-api-access-"]);
    holds(&cluster.kubectl("describe deploy,svc,ns,ds,cronjob,sa -n demo"), &["RollingUpdate"]);
    holds(&cluster.kubectl("api-resources"), &["deployments", "endpointslices", "customresourcedefinitions"]);
    holds(&cluster.kubectl("version"), &["Server Version"]);
    assert_eq!(cluster.kubectl("get --raw /readyz"), "ok");
}

#[test]
fn every_kind_of_patch() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    let label = |name: &str| {
        cluster.kubectl(&format!("get pod client -n demo -o jsonpath={{.metadata.labels.{name}}}"))
    };
    cluster.kubectl("label pod client -n demo istio=x");
    assert_eq!(label("istio"), "x");
    cluster.kubectl("label pod client -n demo istio-");
    assert_eq!(label("istio"), "");
    cluster.kubectl("annotate pod client -n demo ambient.istio.io/redirection=enabled");
    cluster.kubectl(r#"patch pod client -n demo -p '{"metadata":{"labels":{"z":"1"}}}'"#);
    assert_eq!(label("z"), "1");
    cluster.kubectl(r#"patch pod client -n demo --type=merge -p '{"metadata":{"labels":{"z":"2"}}}'"#);
    assert_eq!(label("z"), "2");
    let patch = r#"[{"op":"test","path":"/metadata/labels/z","value":"2"},{"op":"remove","path":"/metadata/labels/z"}]"#;
    cluster.kubectl(&format!("patch pod client -n demo --type=json -p '{patch}'"));
    assert_eq!(label("z"), "");
    let patch =
        r#"{"spec":{"template":{"spec":{"containers":[{"name":"web","env":[{"name":"B","value":"9"}]}]}}}}"#;
    cluster.kubectl(&format!("patch deploy web -n demo -p '{patch}'"));
    let env = cluster
        .kubectl("get deploy web -n demo -o jsonpath={.spec.template.spec.containers[0].env[*].value}");
    assert_eq!(env, "1 9");
    cluster.kubectl("set image deploy/web -n demo web=i:2");
    cluster.kubectl("scale deploy/web -n demo --replicas=0 --current-replicas=1");
    assert_eq!(cluster.kubectl("get deploy web -n demo -o jsonpath={.spec.replicas}"), "0");
    cluster.kubectl("scale deploy/web -n demo --replicas=3");
    assert_eq!(cluster.kubectl("get deploy web -n demo -o jsonpath={.spec.replicas}"), "3");
    cluster.kubectl(
        r#"patch pod client -n demo --subresource=status --type=merge -p '{"status":{"phase":"Running"}}'"#,
    );
    holds(&cluster.kubectl("get pod client -n demo"), &["Running"]);
    holds(
        &cluster.refused("admin", r#"patch pod client -n demo -p '{"spec":{"hostNetwork":true}}'"#, ""),
        &["Forbidden: pod updates"],
    );
}

#[test]
fn invalid_objects_are_refused() {
    let cluster = Cluster::start();
    let pod = |name: &str, container: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{containers: [{container}]}}\n"
        )
    };
    for (input, expect) in [
        (pod("a", "{name: c, imagee: x}"), "unknown field \"spec.containers[0].imagee\""),
        (pod("a", "{name: c}"), "spec.containers[0].image: Required value"),
        (pod("A_", "{name: c, image: i}"), "lowercase RFC 1123 subdomain"),
        (pod("a", "{name: c, image: i, ports: x}"), "cannot be handled as a Pod"),
        (pod("a, namespace: none", "{name: c, image: i}"), "namespaces \"none\" not found"),
    ] {
        holds(&cluster.refused("admin", "apply -f -", &input), &[expect]);
    }
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 1}]}";
    holds(&cluster.refused("admin", "apply -f -", service), &["provided IP is already allocated"]);
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata: {a: b}\nimmutable: true\n";
    cluster.kubectl_with("apply -f -", map);
    cluster.kubectl("label configmap m a=b");
    for patch in [r#"{"data":{"a":"c"}}"#, r#"{"immutable":false}"#] {
        let refused = cluster.refused("admin", &format!("patch configmap m -p '{patch}'"), "");
        holds(&refused, &["field is immutable when `immutable` is set"]);
    }
}

#[test]
fn running_pods_go_when_their_kubelet_says_so() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    let client = cluster.server.client();
    let node = json!({"spec": {"nodeName": "node1"}});
    client.patch("pods", "demo", "client", PatchKind::Merge, node).unwrap();
    cluster.kubectl("delete pod client -n demo --wait=false");
    holds(&cluster.kubectl("get pod client -n demo"), &["Terminating"]);
    let pod = client.get("pods", "demo", "client").unwrap();
    assert_eq!(pod["metadata"]["deletionGracePeriodSeconds"], 5);
    let mut waiting = cluster.spawn("admin", "delete pod client -n demo");
    // Once it watches, kubectl has asked for the deletion; it must not end before the kubelet says so.
    cluster.wait_until_asked("watch", "pods");
    assert!(waiting.try_wait().unwrap().is_none());
    client.delete("pods", "demo", "client", Some(Duration::ZERO)).unwrap();
    assert!(waiting.wait().unwrap().success());
    holds(&cluster.refused("admin", "get pod client -n demo", ""), &["not found"]);
}

#[test]
fn a_patch_of_a_pods_status_takes_annotations_and_nothing_of_the_spec() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    let client = cluster.server.client();
    let before = client.get("pods", "demo", "client").unwrap();
    let patch = json!({
        "metadata": {"annotations": {"a": "1"}, "labels": {"b": "2"}, "ownerReferences": [{"name": "x"}]},
        "spec": {"hostNetwork": true, "containers": [{"name": "evil", "image": "evil"}]},
        "status": {"phase": "Running"},
    });
    let after = client.patch_status("pods", "demo", "client", PatchKind::Merge, patch).unwrap();
    assert_eq!(after["spec"], before["spec"]);
    assert_eq!(after["status"]["phase"], "Running");
    assert_eq!(
        (&after["metadata"]["annotations"]["a"], &after["metadata"]["labels"]["b"]),
        (&json!("1"), &json!("2"))
    );
    assert_eq!(after["metadata"]["ownerReferences"], before["metadata"]["ownerReferences"]);
    let patch = json!({"metadata": {"annotations": {"a": null}}});
    let after = client.patch_status("pods", "demo", "client", PatchKind::Merge, patch).unwrap();
    assert_eq!(after["metadata"]["annotations"].get("a"), None);
    assert_eq!(after["status"]["phase"], "Running");
}

#[test]
fn owners_take_their_dependents_along() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    let client = cluster.server.client();
    let owner = client.get("deployments", "demo", "web").unwrap();
    client
        .create(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"generateName": "web-", "namespace": "demo", "labels": {"app": "web"}, "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "uid": owner["metadata"]["uid"],
            }]},
            "spec": {"containers": [{"name": "c", "image": "i"}]},
        }))
        .unwrap();
    assert_eq!(cluster.kubectl("get pods -n demo -l app=web -o name").lines().count(), 1);
    cluster.kubectl("delete deploy web -n demo");
    assert_eq!(cluster.kubectl("get pods -n demo -l app=web -o name"), "");
}

#[test]
fn a_namespace_that_goes_takes_nothing_new() {
    let cluster = Cluster::start();
    cluster.kubectl("create namespace demo");
    let client = cluster.server.client();
    let map = |name: &str, finalizers: &[&str]| {
        json!({"apiVersion": "v1", "kind": "ConfigMap",
               "metadata": {"name": name, "namespace": "demo", "finalizers": finalizers}})
    };
    client.create(map("held", &["x.io/hold"])).unwrap();
    cluster.kubectl("delete namespace demo --wait=false");
    let refused = client.create(map("new", &[])).unwrap_err();
    assert_eq!(
        (refused.code, &refused.details["causes"][0]["reason"]),
        (403, &json!("NamespaceTerminating"))
    );
    let more = json!({"metadata": {"finalizers": ["x.io/hold", "x.io/more"]}});
    let refused = client.patch("configmaps", "demo", "held", PatchKind::Merge, more).unwrap_err();
    assert!(refused.message.contains("no new finalizers can be added"), "{refused}");
    client
        .patch("configmaps", "demo", "held", PatchKind::Merge, json!({"metadata": {"finalizers": null}}))
        .unwrap();
    holds(&cluster.refused("admin", "get ns demo", ""), &["not found"]);
}

#[test]
fn get_w_shows_each_change() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    let mut watching =
        cluster.spawn("admin", "get pods -n demo -w -o jsonpath='{.metadata.labels.step}{\"\\n\"}'");
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "");
    for step in ["1", "2", "3"] {
        cluster.kubectl(&format!("label pod client -n demo --overwrite step={step}"));
        assert_eq!(lines.next().unwrap().unwrap(), step);
    }
    watching.kill().unwrap();
    watching.wait().unwrap();
}

#[test]
fn logs_come_from_the_lab() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    holds(&cluster.refused("admin", "logs client -n demo", ""), &["pods/log is not supported"]);
    let log =
        |namespace: &str, pod: &str, _: Option<&str>| Some(format!("{namespace}/{pod}\nlast\n").into_bytes());
    cluster.server.set_log_source(std::sync::Arc::new(log));
    assert_eq!(cluster.kubectl("logs client -n demo"), "demo/client\nlast\n");
    assert_eq!(cluster.kubectl("logs client -n demo --tail=1"), "last\n");
}

#[test]
fn service_accounts_have_the_rights_bound_to_them() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    let rules = "
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader, namespace: demo}
rules:
- {apiGroups: [''], resources: [pods], verbs: [get, list]}
- {apiGroups: [''], resources: [configmaps], resourceNames: [kube-root-ca.crt], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader, namespace: demo}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: ServiceAccount, name: web, namespace: demo}]
";
    cluster.kubectl_with("apply -f -", rules);
    let account = Credential::ServiceAccount { namespace: "demo".into(), name: "web".into() };
    cluster.write_kubeconfig("web", &account);
    cluster.write_kubeconfig("stranger", &Credential::Token("wrong".into()));
    cluster.write_kubeconfig("token", &Credential::Admin);
    cluster.write_kubeconfig("node", &Credential::Node("node1".into()));
    let output = cluster.spawn("web", "get pods -n demo -o name").wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "pod/client\n");
    holds(
        &cluster.refused("web", "delete pod client -n demo", ""),
        &[
            "(Forbidden): pods \"client\" is forbidden: User \"system:serviceaccount:demo:web\" cannot delete resource",
        ],
    );
    holds(
        &cluster.refused("web", "get pods", ""),
        &["cannot list resource \"pods\" in API group \"\" in the namespace \"default\""],
    );
    let named = "get configmaps -n demo -o name --field-selector metadata.name=";
    let output = cluster.spawn("web", &format!("{named}kube-root-ca.crt")).wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "configmap/kube-root-ca.crt\n");
    holds(&cluster.refused("web", &format!("{named}other"), ""), &["configmaps \"other\" is forbidden"]);
    holds(&cluster.refused("stranger", "get pods", ""), &["must be logged in to the server"]);
    for user in ["token", "node"] {
        assert!(cluster.spawn(user, "get nodes").wait_with_output().unwrap().status.success(), "{user}");
    }
}
