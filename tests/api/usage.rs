//! What people use `kubectl` for besides objects: explanations, waiting, descriptions, events.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use mesh_tests::api::{Credential, PatchKind};
use serde_json::json;

use crate::answers::OTHERS;
use crate::cluster::{Cluster, WORKLOADS, holds};

#[test]
fn built_in_kinds_are_explained() {
    let cluster = Cluster::start();
    holds(
        &cluster.kubectl("explain pod.spec.containers"),
        &[
            "KIND:       Pod",
            "FIELD: containers",
            "A single application container",
            "livenessProbe",
            "-required-",
        ],
    );
    holds(&cluster.kubectl("explain deployments --recursive"), &["GROUP:      apps", "maxUnavailable"]);
    holds(&cluster.kubectl("explain crd.spec.versions.schema"), &["openAPIV3Schema"]);
    holds(&cluster.kubectl("explain lease.spec.renewTime"), &["FIELD: renewTime", "a lease"]);
    holds(&cluster.refused("admin", "explain pod.spec.nothing", ""), &["field \"nothing\" does not exist"]);
    for group in ["events.k8s.io/v1", "discovery.k8s.io/v1", "rbac.authorization.k8s.io/v1"] {
        let document = cluster.kubectl(&format!("get --raw /openapi/v3/apis/{group}"));
        holds(&document, &["x-kubernetes-group-version-kind"]);
    }
}

#[test]
fn waiting_ends_when_the_condition_holds() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    let client = cluster.server.client();
    let mut waits = [
        "wait pod/client -n demo --for=condition=Ready --timeout=20s",
        "wait pod/client -n demo --for=jsonpath={.status.phase}=Running --timeout=20s",
    ]
    .map(|command| cluster.spawn("admin", command));
    cluster.wait_until_asked("watch", "pods");
    holds(
        &cluster.refused("admin", "wait pod/client -n demo --for=condition=Ready --timeout=10ms", ""),
        &["timed out waiting for the condition"],
    );
    let status = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    client.patch_status("pods", "demo", "client", PatchKind::Strategic, status).unwrap();
    for wait in &mut waits {
        assert!(wait.wait().unwrap().success());
    }
    let mut gone = cluster.spawn("admin", "wait pod/client -n demo --for=delete --timeout=20s");
    client.delete("pods", "demo", "client", Some(Duration::ZERO)).unwrap();
    assert!(gone.wait().unwrap().success());
}

#[test]
fn what_is_waited_for_differs_by_kind() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    let client = cluster.server.client();
    client.create(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})).unwrap();
    client
        .create(json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"},
            "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}},
        }))
        .unwrap();
    let holds = |kind: &str| json!({"status": {"conditions": [{"type": kind, "status": "True"}]}});
    for (kind, namespace, name, status, wanted) in [
        ("nodes", "", "n1", holds("Ready"), "condition=Ready"),
        ("jobs", "default", "j", holds("Complete"), "condition=complete"),
        ("deployments", "demo", "web", holds("Available"), "condition=Available"),
        (
            "daemonsets",
            "demo",
            "agent",
            json!({"status": {"numberReady": 1}}),
            "jsonpath={.status.numberReady}=1",
        ),
    ] {
        let place = if namespace.is_empty() { String::new() } else { format!("-n {namespace} ") };
        let mut wait =
            cluster.spawn("admin", &format!("wait {kind}/{name} {place}--for={wanted} --timeout=20s"));
        cluster.wait_until_asked("watch", kind);
        assert!(wait.try_wait().unwrap().is_none(), "{kind}: nothing to wait for");
        client.patch_status(kind, namespace, name, PatchKind::Merge, status).unwrap();
        assert!(wait.wait().unwrap().success(), "{kind}");
    }
    cluster.kubectl("wait ns/demo --for=jsonpath={.status.phase}=Active --timeout=20s");
    cluster.kubectl("delete ns demo --wait=false");
    cluster.kubectl("wait ns/demo --for=delete --timeout=20s");
}

#[test]
fn every_kind_is_described() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    cluster.kubectl_with("apply -f -", OTHERS);
    for (what, expect) in [
        ("ns demo", "Active"),
        ("node n1", "InternalIP:"),
        ("pod client -n demo", "Service Account:"),
        ("svc web -n demo", "TargetPort:"),
        ("endpoints e", "10.0.0.1"),
        ("endpointslice s", "AddressType:"),
        ("deploy web -n demo", "StrategyType:"),
        ("rs r", "Selector:"),
        ("ds agent -n demo", "Desired Number of Nodes Scheduled:"),
        ("job j", "Completions:"),
        ("cronjob tick -n demo", "Schedule:"),
        ("netpol np", "PodSelector:"),
        ("secret s", "Type:"),
        ("configmap kube-root-ca.crt", "ca.crt:"),
        ("sa web -n demo", "Tokens:"),
        ("role r", "PolicyRule:"),
        ("rolebinding r", "Subjects:"),
        ("clusterrole view", "PolicyRule:"),
        ("clusterrolebinding r", "Subjects:"),
        ("lease l", "Holder Identity:"),
        ("event e", "Involved Object:"),
    ] {
        holds(&cluster.kubectl(&format!("describe {what}")), &["Name:", expect]);
    }
}

#[test]
fn events_are_selected_by_what_they_are_about() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    for (name, kind, object, level) in [
        ("e1", "Pod, apiVersion: v1", "client", "Normal"),
        ("e2", "Pod, apiVersion: v1", "client", "Warning"),
        ("e3", "Deployment, apiVersion: apps/v1", "web", "Normal"),
    ] {
        let event = format!(
            "apiVersion: v1\nkind: Event\nmetadata: {{name: {name}, namespace: demo}}\nreason: Tested\nmessage: of-{name}\n\
             type: {level}\ninvolvedObject: {{kind: {kind}, name: {object}, namespace: demo}}\n"
        );
        cluster.kubectl_with("create -f -", &event);
    }
    for (flags, expect) in [
        ("--for pod/client", "e1 e2"),
        ("--for deployment/web", "e3"),
        ("--types=Warning", "e2"),
        ("--for pod/client --types=Normal", "e1"),
    ] {
        let told = cluster.kubectl(&format!("events -n demo {flags}"));
        let found = ["e1", "e2", "e3"].into_iter().filter(|name| told.contains(&format!("of-{name}")));
        assert_eq!(found.collect::<Vec<_>>().join(" "), expect, "{flags}: {told}");
    }
    let regarding = "get events.v1.events.k8s.io -n demo --field-selector regarding.kind=Deployment -o name";
    assert_eq!(cluster.kubectl(regarding), "event.events.k8s.io/e3\n");
    holds(&cluster.kubectl("get events -n demo -o wide"), &["SUBOBJECT", "SOURCE", "FIRST SEEN", "COUNT"]);
}

#[test]
fn a_rollout_is_followed_to_its_end() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    let mut follow = cluster.spawn("admin", "rollout status deploy/web -n demo --timeout=20s");
    let status = json!({"status": {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1,
                                   "availableReplicas": 1}});
    cluster.server.client().patch_status("deployments", "demo", "web", PatchKind::Merge, status).unwrap();
    assert!(follow.wait().unwrap().success());
    cluster.kubectl("rollout restart deploy/web -n demo");
    assert_eq!(cluster.kubectl("get deploy web -n demo -o jsonpath={.metadata.generation}"), "2");
}

#[tokio::test]
async fn events_are_the_same_in_both_groups() {
    let cluster = Cluster::start();
    cluster.kubectl_with("apply -f -", WORKLOADS);
    let core = "apiVersion: v1\nkind: Event\nmetadata: {name: e1, namespace: demo}\nreason: Pulled\nmessage: from core\n\
                type: Normal\ncount: 3\nsource: {component: kubelet}\n\
                involvedObject: {apiVersion: v1, kind: Pod, name: client, namespace: demo, uid: UID}\n\
                firstTimestamp: 2025-01-01T00:00:00Z\nlastTimestamp: 2025-01-01T00:00:00Z\n";
    let uid = cluster.kubectl("get pod client -n demo -o jsonpath={.metadata.uid}");
    cluster.kubectl_with("create -f -", &core.replace("UID", &uid));
    let reporter = Reporter { controller: "tests".into(), instance: Some("tests-0".into()) };
    let recorder = Recorder::new(cluster.client(&Credential::Admin).await, reporter);
    let about = json!({"apiVersion": "v1", "kind": "Pod", "name": "client", "namespace": "demo", "uid": uid});
    let event = Event {
        type_: EventType::Warning,
        reason: "Failed".into(),
        note: Some("from events.k8s.io".into()),
        action: "Testing".into(),
        secondary: None,
    };
    recorder.publish(&event, &serde_json::from_value(about).unwrap()).await.unwrap();
    for command in ["get events -n demo", "events -n demo", "describe pod client -n demo"] {
        let told = cluster.kubectl(command);
        holds(&told, &["Pulled", "from core", "Warning", "Failed", "from events.k8s.io"]);
    }
    let notes = cluster.kubectl("get events.v1.events.k8s.io -n demo -o jsonpath={.items[*].note}");
    holds(&notes, &["from core", "from events.k8s.io"]);
    let messages =
        cluster.kubectl("get events -n demo --field-selector type=Warning -o jsonpath={.items[*].message}");
    assert_eq!(messages, "from events.k8s.io");
    let strange = core.replace("namespace: demo, uid", "namespace: other, uid").replace("e1", "e2");
    holds(
        &cluster.refused("admin", "create -f -", &strange),
        &["involvedObject.namespace", "does not match"],
    );
}

#[tokio::test]
async fn a_lease_changes_hands() {
    let cluster = Cluster::start();
    let leases = Api::<Lease>::namespaced(cluster.client(&Credential::Admin).await, "kube-system");
    let lease = |holder: &str| {
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"},
               "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": "2025-01-01T00:00:00.000001Z"}})
    };
    let first = serde_json::from_value(lease("one")).unwrap();
    let mut held: Lease = leases.create(&PostParams::default(), &first).await.unwrap();
    let stale = held.clone();
    held.spec.as_mut().unwrap().holder_identity = Some("two".into());
    leases.replace("l", &PostParams::default(), &held).await.unwrap();
    assert!(matches!(leases.replace("l", &PostParams::default(), &stale).await,
        Err(kube::Error::Api(status)) if status.code == 409));
    let refused = leases.patch("l", &PatchParams::apply("three"), &Patch::Apply(lease("three"))).await;
    assert!(refused.unwrap_err().to_string().contains(".spec.holderIdentity"));
    holds(&cluster.kubectl("get lease -n kube-system"), &["HOLDER", "two"]);
}
