//! What the server answers, against the types of k8s-openapi: every field of an answer must be one that its type has.

use k8s_openapi::List;
use k8s_openapi::Resource;
use k8s_openapi::api::{apps, autoscaling, batch, coordination, core, discovery, events, networking, rbac};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions;
use k8s_openapi::apimachinery::pkg::apis::meta;
use k8s_openapi::jiff::Timestamp;
use k8s_openapi::{ListableResource, api::authentication, api::authorization};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::cluster::{Cluster, WORKLOADS, definition};

/// Decodes strictly: nothing may be lost on the way through the type, nor be of another type.
#[track_caller]
fn decode<T: DeserializeOwned + Serialize>(answer: &Value) {
    let typed: T = T::deserialize(answer).unwrap_or_else(|error| panic!("{error} in {answer}"));
    let again = serde_json::to_value(typed).unwrap();
    let lost = lost(answer, &again, "");
    assert!(lost.is_empty(), "unknown {lost:?} in {answer}");
}

/// Fields that are not in the other; null is absent, and a time may be written in two ways.
fn lost(given: &Value, again: &Value, path: &str) -> Vec<String> {
    match (given, again) {
        (Value::Object(given), Value::Object(again)) => given
            .iter()
            .filter(|(_, value)| !value.is_null())
            .flat_map(|(key, value)| match again.get(key) {
                Some(again) => lost(value, again, &format!("{path}.{key}")),
                None => vec![format!("{path}.{key}")],
            })
            .collect(),
        (Value::Array(given), Value::Array(again)) if given.len() == again.len() => {
            given.iter().zip(again).flat_map(|(given, again)| lost(given, again, path)).collect()
        }
        (Value::String(given), Value::String(again)) if is_same_time(given, again) => Vec::new(),
        (given, again) if given == again => Vec::new(),
        _ => vec![path.to_owned()],
    }
}

fn is_same_time(one: &str, other: &str) -> bool {
    let time = |text: &str| text.parse::<Timestamp>().ok();
    time(one).is_some() && time(one) == time(other)
}

fn raw(cluster: &Cluster, path: &str) -> Value {
    serde_json::from_str(&cluster.kubectl(&format!("get --raw {path}"))).unwrap()
}

/// Checks the list of a kind and each object in it.
fn check_kind<T: Resource + ListableResource + DeserializeOwned + Serialize>(cluster: &Cluster) {
    let place = if T::GROUP.is_empty() { "/api/v1".to_owned() } else { format!("/apis/{}", T::API_VERSION) };
    let list = raw(cluster, &format!("{place}/{}", T::URL_PATH_SEGMENT));
    assert!(!list["items"].as_array().unwrap().is_empty(), "no {} to look at", T::KIND);
    decode::<List<T>>(&list);
}

/// Checks all that is stored, by its lists.
pub(crate) fn check_objects(cluster: &Cluster) {
    check_kind::<core::v1::Namespace>(cluster);
    check_kind::<core::v1::Pod>(cluster);
    check_kind::<core::v1::Service>(cluster);
    check_kind::<core::v1::ServiceAccount>(cluster);
    check_kind::<core::v1::ConfigMap>(cluster);
    check_kind::<core::v1::Secret>(cluster);
    check_kind::<core::v1::Node>(cluster);
    check_kind::<core::v1::Endpoints>(cluster);
    check_kind::<core::v1::Event>(cluster);
    check_kind::<events::v1::Event>(cluster);
    check_kind::<discovery::v1::EndpointSlice>(cluster);
    check_kind::<networking::v1::NetworkPolicy>(cluster);
    check_kind::<apps::v1::Deployment>(cluster);
    check_kind::<apps::v1::ReplicaSet>(cluster);
    check_kind::<apps::v1::DaemonSet>(cluster);
    check_kind::<batch::v1::Job>(cluster);
    check_kind::<batch::v1::CronJob>(cluster);
    check_kind::<rbac::v1::Role>(cluster);
    check_kind::<rbac::v1::RoleBinding>(cluster);
    check_kind::<rbac::v1::ClusterRole>(cluster);
    check_kind::<rbac::v1::ClusterRoleBinding>(cluster);
    check_kind::<coordination::v1::Lease>(cluster);
    check_kind::<apiextensions::v1::CustomResourceDefinition>(cluster);
}

/// One of each kind that `WORKLOADS` has not.
pub(crate) const OTHERS: &str = r#"
apiVersion: v1
kind: Secret
metadata: {name: s}
stringData: {a: b}
---
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDR: 10.244.1.0/24}
status: {addresses: [{type: InternalIP, address: 10.0.0.1}], capacity: {cpu: 2, memory: 1Gi}}
---
apiVersion: v1
kind: Service
metadata: {name: lb}
spec: {type: LoadBalancer, selector: {a: b}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Endpoints
metadata: {name: e}
subsets: [{addresses: [{ip: 10.0.0.1}], ports: [{port: 80}]}]
---
apiVersion: v1
kind: Event
metadata: {name: e}
involvedObject: {kind: Pod, name: p, namespace: default}
reason: Tested
message: m
type: Normal
count: 1
firstTimestamp: 2025-01-01T00:00:00Z
lastTimestamp: 2025-01-01T00:00:00Z
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s}
addressType: IPv4
endpoints: [{addresses: [10.0.0.1], conditions: {ready: true}}]
ports: [{port: 80}]
---
apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: r}
spec:
  selector: {matchLabels: {a: b}}
  template: {metadata: {labels: {a: b}}, spec: {containers: [{name: c, image: i, livenessProbe: {httpGet: {port: 80}}}]}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: j}
spec: {template: {spec: {restartPolicy: Never, containers: [{name: c, image: i}]}}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: r}
rules: [{apiGroups: [''], resources: [pods], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: r}
roleRef: {kind: Role, name: r}
subjects: [{kind: User, name: u}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: r}
roleRef: {kind: ClusterRole, name: view}
subjects: [{kind: ServiceAccount, name: default, namespace: default}]
---
apiVersion: coordination.k8s.io/v1
kind: Lease
metadata: {name: l}
spec: {holderIdentity: h, leaseDurationSeconds: 15, renewTime: '2025-01-01T00:00:00.000000Z'}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: np}
spec: {podSelector: {matchLabels: {a: b}}, ingress: [{ports: [{port: 80}]}]}
"#;

#[test]
fn every_object_is_of_its_type() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    cluster.kubectl_with("apply -f -", OTHERS);
    cluster.kubectl_with("apply -f -", &definition("Thing", &json!({"type": "object"})));
    check_objects(&cluster);
}

#[test]
fn all_other_answers_are_of_their_types() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    decode::<meta::v1::APIVersions>(&raw(&cluster, "/api"));
    let groups = raw(&cluster, "/apis");
    decode::<meta::v1::APIGroupList>(&groups);
    decode::<meta::v1::APIResourceList>(&raw(&cluster, "/api/v1"));
    for group in groups["groups"].as_array().unwrap() {
        let version = group["preferredVersion"]["groupVersion"].as_str().unwrap();
        decode::<meta::v1::APIResourceList>(&raw(&cluster, &format!("/apis/{version}")));
    }
    decode::<k8s_openapi::apimachinery::pkg::version::Info>(&raw(&cluster, "/version"));
    decode::<autoscaling::v1::Scale>(&raw(&cluster, "/apis/apps/v1/namespaces/demo/deployments/web/scale"));
    let post = |path: &str, body: Value| -> Value {
        serde_json::from_str(&cluster.kubectl_with(&format!("create --raw {path} -f -"), &body.to_string()))
            .unwrap()
    };
    let asked = json!({"spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}, "user": "u"}});
    let authorization = "/apis/authorization.k8s.io/v1";
    let path = format!("{authorization}/subjectaccessreviews");
    decode::<authorization::v1::SubjectAccessReview>(&post(&path, asked.clone()));
    let asked = json!({"spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}});
    let path = format!("{authorization}/selfsubjectaccessreviews");
    decode::<authorization::v1::SelfSubjectAccessReview>(&post(&path, asked));
    let path = format!("{authorization}/selfsubjectrulesreviews");
    let rules = post(&path, json!({"spec": {"namespace": "demo"}}));
    decode::<authorization::v1::SelfSubjectRulesReview>(&rules);
    let authentication = "/apis/authentication.k8s.io/v1";
    decode::<authentication::v1::SelfSubjectReview>(&post(
        &format!("{authentication}/selfsubjectreviews"),
        json!({}),
    ));
    let token = json!({"spec": {"token": "x"}});
    decode::<authentication::v1::TokenReview>(&post(&format!("{authentication}/tokenreviews"), token));
    let path = "/api/v1/namespaces/demo/serviceaccounts/web/token";
    decode::<authentication::v1::TokenRequest>(&post(path, json!({"spec": {"audiences": ["a"]}})));
    let refused = cluster.refused("admin", "get --raw /api/v1/namespaces/demo/pods/none", "");
    assert!(refused.contains("(NotFound)"), "{refused}");
}
