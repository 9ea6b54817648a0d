//! Who is in the mesh: labels, precedence, and what is refused.

use serde_json::{Value, json};

use super::{Kind, ObjectName, apply, index, pod, with};
use crate::index::membership::{Membership, Refusal};

const MODE: &str = "/metadata/labels/istio.io~1dataplane-mode";

fn namespace(name: &str, mode: Option<&str>) -> Value {
    match mode {
        Some(mode) => json!({"metadata": {"name": name, "labels": {"istio.io/dataplane-mode": mode}}}),
        None => json!({"metadata": {"name": name}}),
    }
}

fn check(namespace_mode: Option<&str>, pod: Value, expect: &Membership) {
    let mut index = index();
    let name = pod["metadata"]["namespace"].as_str().unwrap().to_owned();
    apply(&mut index, Kind::Namespace, namespace(&name, namespace_mode));
    let object = ObjectName::new(&name, pod["metadata"]["name"].as_str().unwrap());
    apply(&mut index, Kind::Pod, pod.clone());
    let found = index.pod(&object).unwrap();
    assert_eq!(found.membership, *expect, "namespace {namespace_mode:?}, pod {pod}");
    assert_eq!(index.local_pods(), [found]);
}

#[test]
fn labels_and_their_precedence() {
    let plain = || pod("p", "10.0.0.9");
    let labelled = |mode: &str| with(plain(), MODE, json!(mode));
    for (namespace, pod, expect) in [
        (None, plain(), Membership::NotAsked),
        (Some("ambient"), plain(), Membership::Member),
        (Some("none"), plain(), Membership::NotAsked),
        (Some("sidecar"), plain(), Membership::NotAsked),
        (None, labelled("ambient"), Membership::Member),
        (None, labelled("none"), Membership::NotAsked),
        (Some("ambient"), labelled("none"), Membership::NotAsked),
        (Some("none"), labelled("ambient"), Membership::Member),
        (Some("ambient"), labelled("sidecar"), Membership::Member),
    ] {
        check(namespace, pod, &expect);
    }
}

#[test]
fn refusals() {
    let plain = || pod("p", "10.0.0.9");
    let annotated = |key: &str| with(plain(), &format!("/metadata/annotations/{key}"), json!("x"));
    let contains = |list: &str, name: &str| {
        with(plain(), &format!("/spec/{list}"), json!([{"name": "app"}, {"name": name}]))
    };
    let of = |namespace: &str| with(plain(), "/metadata/namespace", json!(namespace));
    let istio = Refusal::OtherMesh("Istio (sidecar)");
    for (pod, refusal) in [
        (with(plain(), "/spec/hostNetwork", json!(true)), Refusal::HostNetwork),
        (with(plain(), "/spec/runtimeClassName", json!("gvisor")), Refusal::Sandboxed("gvisor".into())),
        (with(plain(), "/spec/runtimeClassName", json!("Kata-qemu")), Refusal::Sandboxed("Kata-qemu".into())),
        (annotated("sidecar.istio.io~1status"), istio.clone()),
        (contains("containers", "istio-proxy"), istio.clone()),
        (contains("initContainers", "istio-proxy"), istio),
        (contains("containers", "linkerd-proxy"), Refusal::OtherMesh("Linkerd")),
        (annotated("linkerd.io~1created-by"), Refusal::OtherMesh("Linkerd")),
        (contains("containers", "kuma-sidecar"), Refusal::OtherMesh("Kuma")),
        (annotated("consul.hashicorp.com~1connect-inject-status"), Refusal::OtherMesh("Consul")),
        (of("ambit-system"), Refusal::SystemNamespace),
        (of("kube-system"), Refusal::ExcludedNamespace),
    ] {
        check(None, pod.clone(), &Membership::NotAsked);
        check(Some("ambient"), pod.clone(), &Membership::Refused(refusal.clone()));
        // Nobody asks for a pod that opted out: there is nothing to tell.
        check(Some("ambient"), with(pod, MODE, json!("none")), &Membership::NotAsked);
        assert!(refusal.to_string().starts_with("the pod") || refusal.to_string().starts_with("a proxy"));
    }
}

#[test]
fn a_namespace_changes_its_pods() {
    let mut index = index();
    apply(&mut index, Kind::Pod, pod("p", "10.0.0.9"));
    let name = ObjectName::new("shop", "p");
    assert_eq!(index.pod(&name), None, "nobody can say without the namespace");
    for (mode, expect, local) in [
        (None, Membership::NotAsked, true),
        (Some("ambient"), Membership::Member, true),
        (Some("ambient"), Membership::Member, false),
        (None, Membership::NotAsked, true),
    ] {
        let changes = apply(&mut index, Kind::Namespace, namespace("shop", mode));
        assert_eq!(changes.local, local);
        assert!(changes.keys.is_empty(), "membership is no part of a workload");
        assert_eq!(index.pod(&name).unwrap().membership, expect);
    }
}

#[test]
fn pods_of_other_nodes_are_not_local() {
    let mut index = index();
    let changes = apply(&mut index, Kind::Pod, with(pod("p", "10.0.0.9"), "/spec/nodeName", json!("node-2")));
    assert!(!changes.local);
    assert!(index.local_pods().is_empty());
    let changes = apply(&mut index, Kind::Pod, pod("p", "10.0.0.9"));
    assert!(changes.local);
    assert_eq!(index.local_pods().len(), 1);
    let changes = index.handle(crate::index::event::Event::Deleted(Kind::Pod, ObjectName::new("shop", "p")));
    assert!(changes.local);
    assert!(index.local_pods().is_empty());
}

#[test]
fn a_description_for_the_proxy() {
    let mut index = index();
    apply(&mut index, Kind::Namespace, namespace("shop", Some("ambient")));
    apply(&mut index, Kind::Pod, pod("p", "10.0.0.9"));
    let description = index.pod(&ObjectName::new("shop", "p")).unwrap().description;
    let workload = super::workload(&index, "p").unwrap();
    assert_eq!(description.uid, "uid-p");
    assert_eq!(description.workload_uid, workload.uid);
    assert_eq!(description.service_account, workload.service_account);
    assert_eq!(description.addresses, workload.addresses);
    assert_eq!(description.node, "node-1");
}
