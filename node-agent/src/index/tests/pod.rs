//! Pods: what decides their workloads.

use super::*;

#[test]
fn a_pod_is_a_workload() {
    let mut index = index();
    let mut value = pod("cart-6b7f-xyz", "10.0.0.9");
    value["metadata"]["labels"] = json!({"app": "cart", "version": "v2"});
    value["metadata"]["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "cart", "uid": "1", "controller": true}]);
    let changes = apply(&mut index, Kind::Pod, value);
    assert_eq!(changes.keys, BTreeSet::from([pod_key("cart-6b7f-xyz")]));
    assert!(changes.local);
    let expect = proto::Workload {
        uid: "Kubernetes//Pod/shop/cart-6b7f-xyz".into(),
        name: "cart-6b7f-xyz".into(),
        namespace: "shop".into(),
        addresses: vec![vec![10, 0, 0, 9]],
        trust_domain: "cluster.local".into(),
        cluster_id: "Kubernetes".into(),
        service_account: "cart".into(),
        node: "node-1".into(),
        canonical_name: "cart".into(),
        canonical_revision: "v2".into(),
        workload_type: proto::WorkloadType::Pod.into(),
        workload_name: "cart".into(),
        ..Default::default()
    };
    assert_eq!(workload(&index, "cart-6b7f-xyz"), Some(expect));
    assert_eq!(index.resource_name(&pod_key("cart-6b7f-xyz")), "Kubernetes//Pod/shop/cart-6b7f-xyz");
}

/// One change to the pod above, and what it does to its workload.
#[test]
fn what_decides_a_workload() {
    type Field = fn(&proto::Workload) -> String;
    let tunnel: Field = |w| format!("{:?}", w.tunnel_protocol());
    let status: Field = |w| format!("{:?}", w.status());
    let name: Field = |w| format!("{} {}", w.canonical_name, w.canonical_revision);
    let mode: Field = |w| format!("{:?}", w.network_mode());
    let account: Field = |w| w.service_account.clone();
    let addresses: Field = |w| format!("{:?}", w.addresses);
    for (pointer, value, field, expect) in [
        ("/metadata/annotations/ambient.istio.io~1redirection", json!("enabled"), tunnel, "Hbone"),
        ("/metadata/annotations/ambient.istio.io~1redirection", json!("disabled"), tunnel, "None"),
        ("/metadata/labels/ambient.istio.io~1redirection", json!("enabled"), tunnel, "None"),
        ("/metadata/labels/istio.io~1dataplane-mode", json!("ambient"), tunnel, "None"),
        ("/status/conditions", json!([{"type": "Ready", "status": "False"}]), status, "Unhealthy"),
        ("/status/conditions", json!([]), status, "Unhealthy"),
        ("/status/conditions", json!([{"type": "Ready", "status": "True"}]), status, "Healthy"),
        ("/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z"), status, "Unhealthy"),
        ("/metadata/labels/app", json!("a"), name, "a latest"),
        ("/metadata/labels", json!({"app": "a", "app.kubernetes.io/name": "b", "version": "1"}), name, "b 1"),
        (
            "/metadata/labels",
            json!({"app.kubernetes.io/name": "b", "service.istio.io/canonical-name": "c",
                   "app.kubernetes.io/version": "2", "version": "1"}),
            name,
            "c 2",
        ),
        (
            "/metadata/labels",
            json!({"service.istio.io/canonical-revision": "3", "app.kubernetes.io/version": "2"}),
            name,
            "p 3",
        ),
        ("/metadata/labels/app", json!(""), name, "p latest"),
        ("/spec/hostNetwork", json!(true), mode, "HostNetwork"),
        ("/spec/hostNetwork", json!(false), mode, "Standard"),
        ("/spec/serviceAccountName", json!(""), account, "default"),
        (
            "/status/podIPs",
            json!([{"ip": "10.0.0.9"}, {"ip": "::1"}]),
            addresses,
            "[[10, 0, 0, 9], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]]",
        ),
        ("/status/podIPs", json!(null), addresses, "[[10, 0, 0, 9]]"),
    ] {
        let mut index = index();
        apply(&mut index, Kind::Pod, with(pod("p", "10.0.0.9"), pointer, value.clone()));
        let workload = workload(&index, "p").unwrap();
        assert_eq!(field(&workload), expect, "{pointer} = {value}");
    }
}

#[test]
fn owners_as_istio_names_them() {
    let mut index = index();
    for (kind, name, hash, expect_type, expect_name) in [
        ("ReplicaSet", "cart-6b7f4d9c88", Some("6b7f4d9c88"), proto::WorkloadType::Deployment, "cart"),
        ("ReplicaSet", "cart-v2-7c9bd", None, proto::WorkloadType::Deployment, "cart-v2"),
        ("ReplicaSet", "cart-handmade", None, proto::WorkloadType::Pod, "cart-handmade"),
        ("ReplicaSet", "cart", None, proto::WorkloadType::Pod, "cart"),
        ("Job", "report-28912345", None, proto::WorkloadType::Cronjob, "report"),
        ("Job", "report-289", None, proto::WorkloadType::Job, "report-289"),
        ("Job", "-28912345", None, proto::WorkloadType::Job, "-28912345"),
        ("DaemonSet", "agent", None, proto::WorkloadType::Pod, "agent"),
    ] {
        let mut value = pod("p", "10.0.0.9");
        value["metadata"]["ownerReferences"] = json!([
            {"apiVersion": "v1", "kind": "Deployment", "name": "not-the-controller", "uid": "0"},
            {"apiVersion": "v1", "kind": kind, "name": name, "uid": "1", "controller": true},
        ]);
        if let Some(hash) = hash {
            value["metadata"]["labels"] = json!({"pod-template-hash": hash});
        }
        apply(&mut index, Kind::Pod, value);
        let workload = workload(&index, "p").unwrap();
        assert_eq!(
            (workload.workload_type(), &*workload.workload_name),
            (expect_type, expect_name),
            "{kind} {name}"
        );
    }
}

#[test]
fn a_finished_pod_leaves_at_once() {
    for phase in ["Succeeded", "Failed"] {
        let mut index = index();
        apply(&mut index, Kind::Pod, pod("job", "10.0.0.9"));
        assert!(workload(&index, "job").is_some());
        let changes =
            apply(&mut index, Kind::Pod, with(pod("job", "10.0.0.9"), "/status/phase", json!(phase)));
        assert_eq!(changes.keys, BTreeSet::from([pod_key("job")]), "{phase}");
        assert_eq!(workload(&index, "job"), None, "{phase}");
    }
}

#[test]
fn locality_comes_from_the_node() {
    let mut index = index();
    apply(&mut index, Kind::Pod, pod("p", "10.0.0.9"));
    let node = json!({"metadata": {"name": "node-1", "labels": {
        "topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": "z", "topology.istio.io/subzone": "s"}}});
    assert_eq!(apply(&mut index, Kind::Node, node.clone()).keys, BTreeSet::from([pod_key("p")]));
    let locality = proto::Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() };
    assert_eq!(workload(&index, "p").unwrap().locality, Some(locality));
    assert_eq!(apply(&mut index, Kind::Node, node), Changes::default());
    index.handle(Event::Deleted(Kind::Node, ObjectName::new("", "node-1")));
    assert_eq!(workload(&index, "p").unwrap().locality, None);
}

#[test]
fn a_static_pod_has_the_uid_that_the_runtime_knows() {
    let hash = "0123456789abcdef0123456789abcdef";
    let read = |uid: &str, annotations: Value| {
        let pod = json!({
            "metadata": {"namespace": "shop", "name": "a", "uid": uid, "annotations": annotations},
        });
        let pod = serde_json::from_value(pod).unwrap();
        let name = ObjectName::new("shop", "a");
        let pod = crate::index::pod::Pod::read(&name, &pod).unwrap();
        (pod.uid, pod.runtime_uid)
    };
    let (own, others) = ("4f0c1b7e-5b1e-4c53-8f5e-1d2a3b4c5d6e", "aaaaaaaa-5b1e-4c53-8f5e-1d2a3b4c5d6e");
    let (config, mirror) = ("kubernetes.io/config.hash", "kubernetes.io/config.mirror");
    for (annotations, expect) in [
        (json!({config: hash, mirror: hash}), hash),
        (json!({config: hash}), own),
        (json!({config: hash, mirror: "other"}), own),
        // Somebody would like to be another pod.
        (json!({config: others, mirror: others}), own),
        (json!({}), own),
    ] {
        assert_eq!(read(own, annotations.clone()), (own.to_owned(), expect.to_owned()), "{annotations}");
    }
}
