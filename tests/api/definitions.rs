//! CustomResourceDefinitions and their objects, through `kubectl` and kube-rs.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, WatchParams};
use mesh_tests::api::Credential;
use serde_json::json;
use tokio::time::timeout;

use crate::cluster::{Cluster, holds};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

const DEFINITION: &str = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: things.example.io}
spec:
  group: example.io
  scope: Namespaced
  names: {kind: Thing, plural: things, shortNames: [th], categories: [all]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources:
      status: {}
      scale: {specReplicasPath: .spec.size, statusReplicasPath: .status.size, labelSelectorPath: .status.selector}
    additionalPrinterColumns:
    - {name: Size, type: integer, jsonPath: .spec.size}
    - {name: Ready, type: string, jsonPath: '.status.conditions[?(@.type=="Ready")].status'}
    - {name: Age, type: date, jsonPath: .metadata.creationTimestamp}
    schema:
      openAPIV3Schema:
        description: A thing of the tests.
        type: object
        required: [spec]
        properties:
          spec:
            type: object
            required: [size]
            properties:
              size: {type: integer, minimum: 1, maximum: 9, description: How large it is.}
              mode: {type: string, enum: [Fast, Safe], default: Safe}
              name: {type: string, pattern: '^[a-z]+$'}
              port: {x-kubernetes-int-or-string: true}
              any: {type: object, x-kubernetes-preserve-unknown-fields: true}
              a: {type: string}
              b: {type: string}
            not: {required: [a, b]}
            x-kubernetes-validations:
            - {rule: "self.mode != 'Fast' || self.size < 5", messageExpression: "'too large for ' + self.mode", fieldPath: .size}
            - {rule: "!has(oldSelf.name) || has(self.name)", message: name may not be removed, reason: FieldValueForbidden}
          status:
            type: object
            x-kubernetes-preserve-unknown-fields: true
  - name: v1alpha1
    served: true
    storage: false
    schema:
      openAPIV3Schema:
        type: object
        properties: {spec: {type: object, properties: {size: {type: integer}}}}
"#;

fn thing(name: &str, spec: &str) -> String {
    format!("apiVersion: example.io/v1\nkind: Thing\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
}

fn with_definition() -> Cluster {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", DEFINITION);
    cluster.kubectl("wait --for=condition=Established crd/things.example.io --timeout=10s");
    cluster
}

#[test]
fn objects_have_the_life_of_any_other() {
    let cluster = with_definition();
    holds(&cluster.kubectl_with("apply -f -", DEFINITION), &["unchanged"]);
    holds(
        &cluster.kubectl("api-resources --api-group=example.io"),
        &["things", "th", "example.io/v1", "Thing"],
    );
    holds(&cluster.kubectl_with("apply -f -", &thing("one", "size: 3")), &["thing.example.io/one created"]);
    holds(&cluster.kubectl_with("apply -f -", &thing("one", "size: 4")), &["configured"]);
    holds(&cluster.kubectl_with("apply -f -", &thing("one", "size: 4")), &["unchanged"]);
    assert_eq!(cluster.kubectl("get th one -o jsonpath={.metadata.generation}{.spec.mode}"), "2Safe");
    let ready = r#"{"status":{"size":2,"selector":"a=b","conditions":[{"type":"Ready","status":"True"}]}}"#;
    cluster.kubectl(&format!("patch th one --subresource=status --type=merge -p '{ready}'"));
    assert_eq!(cluster.kubectl("get th one -o jsonpath={.status.size}{.metadata.generation}"), "22");
    let table = cluster.kubectl("get th");
    holds(&table, &["SIZE", "READY", "AGE"]);
    let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..3], ["one", "4", "True"]);
    let blind = r#"{"metadata":{"name":"one"},"spec":{"size":5}}"#;
    let path = "/apis/example.io/v1/namespaces/default/things/one";
    holds(
        &cluster.refused("admin", &format!("replace --raw {path} -f -"), blind),
        &["metadata.resourceVersion: Invalid value: 0: must be specified for an update"],
    );
    cluster.kubectl("scale th one --replicas=7");
    assert_eq!(cluster.kubectl("get th one -o jsonpath={.spec.size}"), "7");
    assert_eq!(
        cluster.kubectl("get th one --subresource=scale -o jsonpath={.status}"),
        r#"{"replicas":2,"selector":"a=b"}"#
    );
    holds(&cluster.kubectl("get all"), &["thing.example.io/one"]);
    holds(&cluster.kubectl("describe th one"), &["Mode:", "Safe"]);
    holds(
        &cluster.kubectl("explain things.spec"),
        &["size", "How large it is.", "-required-", "enum: Fast, Safe"],
    );
    cluster.kubectl("delete th one");
    assert_eq!(cluster.kubectl("get th -o name"), "");
}

#[test]
fn objects_are_checked_against_their_schema() {
    let cluster = with_definition();
    for (spec, expect) in [
        ("size: 3, port: 80, any: {x: {y: 1}}", "created"),
        ("size: 3, port: http", "created"),
        ("mode: Fast", "spec.size: Required value"),
        ("size: 0", "spec.size: Invalid value: 0: spec.size in body should be greater than or equal to 1"),
        (
            "size: x",
            "spec.size: Invalid value: \"string\": spec.size in body must be of type integer: \"string\"",
        ),
        (
            "size: 3, mode: Slow",
            "spec.mode: Unsupported value: \"Slow\": supported values: \"Fast\", \"Safe\"",
        ),
        ("size: 3, name: A", "spec.name: Invalid value: \"A\": spec.name in body should match '^[a-z]+$'"),
        ("size: 3, port: true", "spec.port in body must be of type integer,string: \"boolean\""),
        ("size: 3, a: x, b: y", "spec: Invalid value: \"\": \"spec\" must not validate the schema (not)"),
        ("size: 3, sise: 3", "strict decoding error: unknown field \"spec.sise\""),
    ] {
        let input = thing("t", spec);
        if expect == "created" {
            holds(&cluster.kubectl_with("create -f -", &input), &[expect]);
            cluster.kubectl("delete th t");
        } else {
            holds(&cluster.refused("admin", "create -f -", &input), &[expect]);
        }
    }
    cluster.kubectl_with("create --validate=false -f -", &thing("t", "size: 3, sise: 3, mode: null"));
    assert_eq!(cluster.kubectl("get th t -o jsonpath={.spec}"), r#"{"mode":"Safe","size":3}"#);
    for (spec, expect) in [
        (
            "size: 9, mode: Fast",
            "The Thing \"r\" is invalid: spec.size: Invalid value: \"object\": too large for Fast",
        ),
        ("size: x, mode: Fast", "some validation rules were not checked because the object was invalid"),
    ] {
        holds(&cluster.refused("admin", "create -f -", &thing("r", spec)), &[expect]);
    }
    cluster.kubectl_with("create -f -", &thing("r", "size: 3, name: a"));
    let refused = cluster.refused("admin", r#"patch th r --type=merge -p '{"spec":{"name":null}}'"#, "");
    holds(&refused, &["The Thing \"r\" is invalid: spec: Forbidden: name may not be removed"]);
    let refused = cluster.refused("admin", r#"patch th t --type=merge -p '{"spec":{"size":99}}'"#, "");
    holds(&refused, &["should be less than or equal to 9"]);
}

#[test]
fn versions_show_the_same_objects() {
    let cluster = with_definition();
    cluster.kubectl_with("apply -f -", &thing("one", "size: 3, mode: Fast"));
    let old = "apiVersion: example.io/v1alpha1\nkind: Thing\nmetadata: {name: two}\nspec: {size: 50}\n";
    cluster.kubectl_with("apply -f -", old);
    let shown = |version: &str, name: &str| {
        cluster
            .kubectl(&format!("get things.{version}.example.io {name} -o jsonpath={{.apiVersion}}{{.spec}}"))
    };
    assert_eq!(shown("v1", "one"), r#"example.io/v1{"mode":"Fast","size":3}"#);
    // What the other version's schema does not have, its clients do not see.
    assert_eq!(shown("v1alpha1", "one"), r#"example.io/v1alpha1{"size":3}"#);
    assert_eq!(shown("v1", "two"), r#"example.io/v1{"mode":"Safe","size":50}"#);
    assert_eq!(cluster.kubectl("get th -o jsonpath={.items[*].apiVersion}"), "example.io/v1 example.io/v1");
    let status = cluster.kubectl("get crd things.example.io -o jsonpath={.status.storedVersions}");
    assert_eq!(status, r#"["v1"]"#);
    cluster.kubectl(r#"patch crd things.example.io --type=json -p '[{"op":"replace","path":"/spec/versions/1/served","value":false}]'"#);
    holds(&cluster.refused("admin", "get things.v1alpha1.example.io", ""), &["could not find"]);
}

#[test]
fn definitions_are_checked() {
    let cluster = with_definition();
    for (from, to, expect) in [
        ("scope: Namespaced", "scope: Cluster", "spec.scope: Invalid value: \"Cluster\": field is immutable"),
        ("storage: true", "storage: false", "must have exactly one version marked as storage version"),
        ("pattern: '^[a-z]+$'", "pattern: '('", "must be a valid regular expression"),
        ("a: {type: string}", "a: {format: x}", "properties[a].type: Required value: must not be empty"),
        ("default: Safe", "default: 3", "properties[mode].default"),
        ("self.mode != 'Fast'", "self.mode ~= 'Fast'", "compilation failed"),
        (
            "self.size < 5",
            "self.sise < 5",
            "properties[spec].x-kubernetes-validations[0].rule: Invalid value: \"self.mode != 'Fast' || self.sise < 5\": \
             compilation failed: ERROR: <input>:1:28: undefined field 'sise'",
        ),
        ("self.size < 5", "self.size < '5'", "no matching overload for '_<_' applied to '(int, string)'"),
        (
            "minimum: 1",
            "minimun: 1",
            "unknown field \"spec.versions[0].schema.openAPIV3Schema.properties.spec",
        ),
    ] {
        let input = DEFINITION.replace(from, to);
        holds(&cluster.refused("admin", "apply -f -", &input), &[expect]);
    }
    let other = DEFINITION.replace("things", "others").replace("kind: Thing", "kind: Other");
    cluster.kubectl_with("apply -f -", &other);
    let message = "-o jsonpath={.status.conditions[0].message}";
    assert_eq!(cluster.kubectl(&format!("get crd others.example.io {message}")), r#""th" is already in use"#);
    holds(&cluster.refused("admin", "get others", ""), &["doesn't have a resource type \"others\""]);
    cluster.kubectl("delete crd things.example.io");
    assert_eq!(cluster.kubectl(&format!("get crd others.example.io {message}")), "no conflicts found");
    assert_eq!(cluster.kubectl("get others -o name"), "");
}

#[tokio::test]
async fn a_definition_takes_its_objects_and_watches_along() {
    let cluster = with_definition();
    cluster.kubectl_with("apply -f -", &thing("one", "size: 3"));
    cluster.kubectl_with("apply -f -", &thing("held, finalizers: [example.io/hold]", "size: 3"));
    let client = cluster.client(&Credential::Admin).await;
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("example.io", "v1", "Thing"));
    let things = Api::<DynamicObject>::namespaced_with(client, "default", &resource);
    let version = cluster.server.client().version().to_string();
    let mut watch = Box::pin(things.watch(&WatchParams::default(), &version).await.unwrap());
    cluster.kubectl("delete crd things.example.io --wait=false");
    assert_eq!(cluster.kubectl("get th -o name"), "thing.example.io/held\n");
    holds(
        &cluster.refused("admin", "create -f -", &thing("new", "size: 3")),
        &["create not allowed while custom resource definition is terminating"],
    );
    let conditions = cluster.kubectl("get crd things.example.io -o jsonpath={.status.conditions[*].type}");
    holds(&conditions, &["Terminating"]);
    cluster.kubectl(r#"patch th held --type=merge -p '{"metadata":{"finalizers":null}}'"#);
    let mut events = Vec::new();
    while let Some(event) = timeout(PATIENCE, watch.try_next()).await.unwrap().unwrap() {
        events.push(json!(event)["type"].clone());
    }
    assert_eq!(events, ["MODIFIED", "DELETED", "MODIFIED", "DELETED"]);
    holds(&cluster.refused("admin", "get th", ""), &["could not find"]);
    holds(&cluster.refused("admin", "get crd things.example.io", ""), &["not found"]);
}
