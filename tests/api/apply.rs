//! Server-side apply and the owners of fields, through `kubectl` and kube-rs.

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, Patch, PatchParams, PostParams};
use mesh_tests::api::Credential;
use serde_json::{Value, json};

use crate::cluster::{Cluster, definition, holds};

const DEPLOYMENT: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: i:1
        env: [{name: A, value: '1'}, {name: B, value: '2'}]
        ports: [{containerPort: 80}]
";

/// `manager operation` of each entry, in order.
fn managers(cluster: &Cluster, object: &str) -> String {
    cluster.kubectl(&format!(
        "get {object} --show-managed-fields -o jsonpath='{{range .metadata.managedFields[*]}}{{.manager}} {{.operation}} \
         {{.subresource}};{{end}}'"
    ))
}

#[test]
fn fields_have_owners() {
    let cluster = Cluster::start();
    let apply = |manager: &str, input: &str| {
        cluster.kubectl_with(&format!("apply --server-side --field-manager={manager} -f -"), input)
    };
    holds(&apply("one", DEPLOYMENT), &["deployment.apps/web serverside-applied"]);
    let version = cluster.kubectl("get deploy web -o jsonpath={.metadata.resourceVersion}");
    apply("one", DEPLOYMENT);
    assert_eq!(cluster.kubectl("get deploy web -o jsonpath={.metadata.resourceVersion}"), version);
    assert_eq!(managers(&cluster, "deploy web"), "one Apply ;");

    // Removed from the configuration, an item goes; what the server defaulted stays.
    apply("one", &DEPLOYMENT.replace("{name: A, value: '1'}, ", ""));
    let container = "-o jsonpath={.spec.template.spec.containers[0]";
    assert_eq!(
        cluster.kubectl(&format!("get deploy web {container}.env}}")),
        r#"[{"name":"B","value":"2"}]"#
    );
    assert_eq!(cluster.kubectl(&format!("get deploy web {container}.imagePullPolicy}}")), "IfNotPresent");

    let other = DEPLOYMENT.replace("replicas: 2", "replicas: 5").replace("i:1", "i:2");
    let refused = cluster.refused("admin", "apply --server-side --field-manager=two -f -", &other);
    holds(
        &refused,
        &[
            "Apply failed with 2 conflicts: conflicts with \"one\":",
            "- .spec.replicas",
            "- .spec.template.spec.containers[name=\"web\"].image",
            "--force-conflicts",
        ],
    );
    cluster.kubectl_with("apply --server-side --field-manager=two --force-conflicts -f -", &other);
    assert_eq!(cluster.kubectl("get deploy web -o jsonpath={.spec.replicas}"), "5");
    let refused = cluster.refused("admin", "apply --server-side --field-manager=one -f -", DEPLOYMENT);
    holds(&refused, &["conflicts with \"two\":", ".spec.replicas"]);
    // Given up by the one, kept by the other.
    apply("one", &DEPLOYMENT.replace("  replicas: 2\n", "").replace("i:1", "i:2"));
    assert_eq!(cluster.kubectl("get deploy web -o jsonpath={.spec.replicas}"), "5");
}

#[test]
fn every_write_has_its_manager() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", DEPLOYMENT);
    assert_eq!(managers(&cluster, "deploy web"), "kubectl-client-side-apply Update ;");
    cluster.kubectl("scale deploy web --replicas=3");
    cluster.kubectl("label deploy web a=b");
    cluster.kubectl(r#"patch deploy web --subresource=status --type=merge -p '{"status":{"replicas":1}}'"#);
    holds(
        &managers(&cluster, "deploy web"),
        &[
            "kubectl-client-side-apply Update ;",
            "kubectl Update scale;",
            "kubectl-label Update ;",
            "kubectl-patch Update status;",
        ],
    );
    let all = cluster.kubectl("get deploy web --show-managed-fields -o json");
    let all: Value = serde_json::from_str(&all).unwrap();
    let label = all["metadata"]["managedFields"].as_array().unwrap().iter();
    let label = label.clone().find(|entry| entry["manager"] == "kubectl-label").unwrap();
    assert_eq!(label["fieldsV1"], json!({"f:metadata": {"f:labels": {"f:a": {}}}}));
    // kubectl moves what it applied itself before to its server-side name; nothing conflicts, what was left out goes.
    let without = DEPLOYMENT.replace("{name: A, value: '1'}, ", "").replace("replicas: 2", "replicas: 3");
    cluster.kubectl_with("apply --server-side -f -", &without);
    let env = cluster.kubectl("get deploy web -o jsonpath={.spec.template.spec.containers[0].env[*].name}");
    assert_eq!(env, "B");
    holds(&managers(&cluster, "deploy web"), &["kubectl Apply ;"]);
}

#[test]
fn a_selector_has_one_owner() {
    let cluster = Cluster::start();
    let policy = |labels: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p}}\n\
             spec: {{podSelector: {{matchLabels: {{{labels}}}}}, ingress: [{{}}]}}\n"
        )
    };
    cluster.kubectl_with("apply --server-side --field-manager=one -f -", &policy("a: b"));
    let fields = "get netpol p --show-managed-fields -o jsonpath={.metadata.managedFields[0].fieldsV1}";
    let fields: Value = serde_json::from_str(&cluster.kubectl(fields)).unwrap();
    assert_eq!(fields, json!({"f:spec": {"f:podSelector": {}, "f:ingress": {}}}));
    // Another label is another selector, though the first is in it.
    let refused =
        cluster.refused("admin", "apply --server-side --field-manager=two -f -", &policy("a: b, c: d"));
    holds(&refused, &["conflict with \"one\": .spec.podSelector"]);
    cluster.kubectl_with("apply --server-side --field-manager=one -f -", &policy("c: d"));
    assert_eq!(
        cluster.kubectl("get netpol p -o jsonpath={.spec.podSelector}"),
        r#"{"matchLabels":{"c":"d"}}"#
    );
    holds(&cluster.kubectl("get netpol"), &["POD-SELECTOR", "c=d"]);
    assert_eq!(cluster.kubectl("get netpol p -o jsonpath={.spec.policyTypes}"), r#"["Ingress"]"#);
}

#[tokio::test]
async fn applied_by_a_controller() {
    let cluster = Cluster::start();
    let maps = Api::<ConfigMap>::namespaced(cluster.client(&Credential::Admin).await, "default");
    let map = |data: Value| Patch::Apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "data": data}));
    let (one, two) = (PatchParams::apply("one"), PatchParams::apply("two"));
    maps.patch("m", &one, &map(json!({"a": "1", "b": "1"}))).await.unwrap();
    maps.patch("m", &two, &map(json!({"c": "1"}))).await.unwrap();
    let refused = maps.patch("m", &two, &map(json!({"c": "1", "a": "2"}))).await.unwrap_err();
    let kube::Error::Api(status) = refused else { panic!("{refused}") };
    assert_eq!(
        (status.code, status.message.as_str()),
        (409, "Apply failed with 1 conflict: conflict with \"one\": .data.a")
    );
    maps.patch("m", &two.clone().force(), &map(json!({"c": "1", "a": "2"}))).await.unwrap();
    let left = maps.patch("m", &one, &map(json!({"b": "1"}))).await.unwrap();
    assert_eq!(json!(left.data), json!({"a": "2", "b": "1", "c": "1"}));
    let left = maps.patch("m", &two, &map(json!({}))).await.unwrap();
    assert_eq!(json!(left.data), json!({"b": "1"}));
    let nameless = maps.patch("m", &PatchParams::default(), &map(json!({}))).await.unwrap_err();
    assert!(nameless.to_string().contains("fieldManager"), "{nameless}");
}

#[tokio::test]
async fn a_status_is_applied_apart() {
    let cluster = Cluster::start();
    let pods = Api::<Pod>::namespaced(cluster.client(&Credential::Admin).await, "default");
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
    let condition = |name: &str| json!({"type": name, "status": "True"});
    let status = |conditions: &[&str]| {
        let conditions: Vec<Value> = conditions.iter().map(|name| condition(name)).collect();
        Patch::Apply(json!({"apiVersion": "v1", "kind": "Pod", "status": {"conditions": conditions}}))
    };
    let names = |pod: Pod| -> Vec<String> {
        pod.status
            .unwrap()
            .conditions
            .unwrap_or_default()
            .into_iter()
            .map(|condition| condition.type_)
            .collect()
    };
    let (one, two) = (PatchParams::apply("one"), PatchParams::apply("two"));
    pods.patch_status("p", &one, &status(&["A", "B"])).await.unwrap();
    let both = pods.patch_status("p", &two, &status(&["C"])).await.unwrap();
    assert_eq!(names(both), ["A", "B", "C"]);
    let left = pods.patch_status("p", &one, &status(&["B"])).await.unwrap();
    assert_eq!(names(left), ["B", "C"]);
}

#[test]
fn custom_resources_merge_as_their_schema_says() {
    let cluster = Cluster::start();
    let port = json!({
        "type": "object", "required": ["port"],
        "properties": {
            "port": {"type": "integer"}, "protocol": {"type": "string", "default": "TCP"}, "name": {"type": "string"},
        },
    });
    let spec = json!({"type": "object", "properties": {
        "plain": {"type": "array", "items": {"type": "string"}},
        "set": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
        "ports": {
            "type": "array", "items": port, "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["port", "protocol"],
        },
    }});
    let schema = json!({"type": "object", "properties": {"spec": spec}});
    cluster.kubectl_with("apply --server-side -f -", &definition("Route", &schema));
    cluster.kubectl("wait --for=condition=Established crd/routes.example.io --timeout=10s");
    let route = |spec: &str| {
        format!("apiVersion: example.io/v1\nkind: Route\nmetadata: {{name: r}}\nspec: {{{spec}}}\n")
    };
    let apply = |manager: &str, spec: &str| {
        cluster.kubectl_with(&format!("apply --server-side --field-manager={manager} -f -"), &route(spec));
    };
    let spec = || cluster.kubectl("get routes r -o jsonpath={.spec}");
    apply("one", "ports: [{port: 1, name: a}, {port: 1, protocol: UDP}], set: [x], plain: [x]");
    apply("two", "ports: [{port: 2}], set: [z]");
    let merged: Value = serde_json::from_str(&spec()).unwrap();
    assert_eq!(
        merged,
        json!({
            "ports": [
                {"port": 1, "protocol": "TCP", "name": "a"}, {"port": 1, "protocol": "UDP"}, {"port": 2, "protocol": "TCP"},
            ],
            "set": ["x", "z"], "plain": ["x"],
        })
    );
    let refused =
        cluster.refused("admin", "apply --server-side --field-manager=two -f -", &route("plain: [z]"));
    holds(&refused, &["conflict with \"one\": .spec.plain"]);
    apply("one", "ports: [{port: 1, protocol: UDP}]");
    let left: Value = serde_json::from_str(&spec()).unwrap();
    assert_eq!(left["ports"], json!([{"port": 1, "protocol": "UDP"}, {"port": 2, "protocol": "TCP"}]));
    assert_eq!((&left["set"], left.get("plain")), (&json!(["z"]), None));
}
