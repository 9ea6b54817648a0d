//! Defaults that do not depend on other objects, as `k8s.io/kubernetes/pkg/apis/*/v1/defaults.go` sets them: the
//! ones that clients or controllers look at. Applied on every write, so they must not change what is set.

use serde_json::{Value, json};

use super::definition;
use super::kinds::Kind;
use super::meta::{self, default};

/// Fills in what the user left out.
pub(super) fn apply(kind: &Kind, object: &mut Value) {
    if let Some(custom) = &kind.custom {
        return custom.fill(object);
    }
    let spec = "spec";
    match kind.kind.as_str() {
        "Pod" => {
            pod_spec(&mut object[spec]);
            default(&mut object[spec], "enableServiceLinks", true);
        }
        "Service" => service(&mut object[spec]),
        "Deployment" => {
            let spec = &mut object[spec];
            default(spec, "replicas", 1);
            default(spec, "revisionHistoryLimit", 10);
            default(spec, "progressDeadlineSeconds", 600);
            rolling(spec, "strategy", &json!({"maxUnavailable": "25%", "maxSurge": "25%"}));
            pod_spec(&mut spec["template"]["spec"]);
        }
        "ReplicaSet" => {
            default(&mut object[spec], "replicas", 1);
            pod_spec(&mut object[spec]["template"]["spec"]);
        }
        "DaemonSet" => {
            let spec = &mut object[spec];
            default(spec, "revisionHistoryLimit", 10);
            rolling(spec, "updateStrategy", &json!({"maxUnavailable": 1, "maxSurge": 0}));
            pod_spec(&mut spec["template"]["spec"]);
        }
        "Job" => job_spec(&mut object[spec]),
        "CronJob" => {
            let spec = &mut object[spec];
            default(spec, "concurrencyPolicy", "Allow");
            default(spec, "suspend", false);
            default(spec, "successfulJobsHistoryLimit", 3);
            default(spec, "failedJobsHistoryLimit", 1);
            pod_spec(&mut spec["jobTemplate"]["spec"]["template"]["spec"]);
        }
        "Secret" => secret(object),
        "Namespace" => {
            let name = meta::name(object).to_owned();
            default(&mut object["metadata"]["labels"], "kubernetes.io/metadata.name", name);
            default(&mut object[spec], "finalizers", json!(["kubernetes"]));
            default(&mut object["status"], "phase", "Active");
        }
        "NetworkPolicy" => policy(&mut object[spec]),
        "EndpointSlice" => {
            for port in each(object, "ports") {
                default(port, "name", "");
                default(port, "protocol", "TCP");
            }
        }
        "RoleBinding" | "ClusterRoleBinding" => binding(object),
        "CustomResourceDefinition" => define(object),
        _ => {}
    }
}

/// What a new object starts with; later writes may remove it.
pub(super) fn on_create(kind: &Kind, object: &mut Value) {
    if kind.custom.is_some() {
        return;
    }
    match kind.kind.as_str() {
        "Pod" => object["status"] = json!({"phase": "Pending", "qosClass": qos_class(object)}),
        "Service" => object["status"] = json!({"loadBalancer": {}}),
        "CustomResourceDefinition" => object["status"] = definition::first_status(object),
        "Deployment" | "ReplicaSet" | "Job" | "CronJob" => object["status"] = json!({}),
        "DaemonSet" => {
            object["status"] = json!({
                "currentNumberScheduled": 0, "desiredNumberScheduled": 0, "numberMisscheduled": 0,
                "numberReady": 0,
            });
        }
        "Node" => {
            let name = meta::name(object).to_owned();
            default(&mut object["metadata"]["labels"], "kubernetes.io/hostname", name);
        }
        _ => {}
    }
    if kind.kind == "Job" && object["spec"]["selector"].is_null() {
        let (uid, name) = (meta::uid(object).to_owned(), meta::name(object).to_owned());
        object["spec"]["selector"] = json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}});
        let labels = &mut object["spec"]["template"]["metadata"]["labels"];
        default(labels, "batch.kubernetes.io/controller-uid", uid);
        default(labels, "batch.kubernetes.io/job-name", name.clone());
        default(labels, "job-name", name);
    }
}

/// The items of an array field, to change them.
fn each<'a>(object: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> + use<'a> {
    object.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten()
}

fn rolling(spec: &mut Value, field: &str, limits: &Value) {
    default(spec, field, json!({}));
    let strategy = &mut spec[field];
    default(strategy, "type", "RollingUpdate");
    if meta::text(strategy, "/type") == "RollingUpdate" {
        default(strategy, "rollingUpdate", json!({}));
        for (limit, value) in limits.as_object().into_iter().flatten() {
            default(&mut strategy["rollingUpdate"], limit, value.clone());
        }
    }
}

fn job_spec(spec: &mut Value) {
    // With a parallelism and no number of completions, the first pod that succeeds ends it.
    if spec["parallelism"].is_null() {
        default(spec, "completions", 1);
    }
    default(spec, "parallelism", 1);
    default(spec, "backoffLimit", 6);
    default(spec, "completionMode", "NonIndexed");
    default(spec, "suspend", false);
    pod_spec(&mut spec["template"]["spec"]);
}

fn service(spec: &mut Value) {
    default(spec, "type", "ClusterIP");
    default(spec, "sessionAffinity", "None");
    for port in each(spec, "ports") {
        default(port, "protocol", "TCP");
        let number = port["port"].clone();
        default(port, "targetPort", number);
    }
    if meta::text(spec, "/type") != "ExternalName" {
        default(spec, "internalTrafficPolicy", "Cluster");
    }
    if ["NodePort", "LoadBalancer"].contains(&meta::text(spec, "/type")) {
        default(spec, "externalTrafficPolicy", "Cluster");
    }
    if meta::text(spec, "/type") == "LoadBalancer" {
        default(spec, "allocateLoadBalancerNodePorts", true);
    }
}

fn policy(spec: &mut Value) {
    let mut types = vec!["Ingress"];
    if meta::items(spec, "/egress").next().is_some() {
        types.push("Egress");
    }
    default(spec, "policyTypes", json!(types));
    for direction in ["ingress", "egress"] {
        for port in each(spec, direction).flat_map(|rule| each(rule, "ports")) {
            default(port, "protocol", "TCP");
        }
    }
}

fn secret(object: &mut Value) {
    default(object, "type", "Opaque");
    if let Some(Value::Object(texts)) = meta::map(object).remove("stringData") {
        for (key, text) in texts {
            let encoded = meta::base64(text.as_str().unwrap_or_default().as_bytes());
            meta::map(meta::map(object).entry("data").or_insert(Value::Null)).insert(key, encoded.into());
        }
    }
}

fn binding(object: &mut Value) {
    default(&mut object["roleRef"], "apiGroup", "rbac.authorization.k8s.io");
    for subject in each(object, "subjects") {
        if meta::text(subject, "/kind") != "ServiceAccount" {
            default(subject, "apiGroup", "rbac.authorization.k8s.io");
        }
    }
}

fn define(object: &mut Value) {
    let kind = meta::text(object, "/spec/names/kind").to_owned();
    let names = &mut object["spec"]["names"];
    default(names, "singular", kind.to_lowercase());
    default(names, "listKind", format!("{kind}List"));
    default(&mut object["spec"], "conversion", json!({"strategy": "None"}));
}

fn pod_spec(spec: &mut Value) {
    default(spec, "restartPolicy", "Always");
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "terminationGracePeriodSeconds", 30);
    default(spec, "schedulerName", "default-scheduler");
    default(spec, "securityContext", json!({}));
    if let Some(account) = spec["serviceAccountName"].as_str().map(str::to_owned) {
        spec["serviceAccount"] = account.into();
    }
    let host_network = spec["hostNetwork"].as_bool() == Some(true);
    for list in ["initContainers", "containers"] {
        for container in each(spec, list) {
            self::container(container, host_network);
        }
    }
    for volume in each(spec, "volumes") {
        self::volume(volume);
    }
}

fn container(container: &mut Value, host_network: bool) {
    let image = meta::text(container, "/image");
    let tag = image.rsplit('/').next().and_then(|last| last.split_once(':')).map_or("latest", |(_, tag)| tag);
    let pull = if tag == "latest" && !image.contains('@') { "Always" } else { "IfNotPresent" };
    default(container, "imagePullPolicy", pull);
    default(container, "resources", json!({}));
    default(container, "terminationMessagePath", "/dev/termination-log");
    default(container, "terminationMessagePolicy", "File");
    for port in each(container, "ports") {
        default(port, "protocol", "TCP");
        if host_network {
            let number = port["containerPort"].clone();
            default(port, "hostPort", number);
        }
    }
    for variable in each(container, "env") {
        if let Some(reference) = variable.pointer_mut("/valueFrom/fieldRef") {
            default(reference, "apiVersion", "v1");
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = container.get_mut(probe).filter(|probe| probe.is_object()) else { continue };
        for (field, value) in
            [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)]
        {
            default(probe, field, value);
        }
        if let Some(http) = probe.get_mut("httpGet").filter(|http| http.is_object()) {
            default(http, "path", "/");
            default(http, "scheme", "HTTP");
        }
    }
}

fn volume(volume: &mut Value) {
    if let Some(path) = volume.get_mut("hostPath").filter(|path| path.is_object()) {
        default(path, "type", "");
    }
    for source in ["configMap", "secret", "projected", "downwardAPI"] {
        let Some(source) = volume.get_mut(source).filter(|source| source.is_object()) else { continue };
        default(source, "defaultMode", 420);
        for projection in each(source, "sources") {
            if let Some(token) = projection.get_mut("serviceAccountToken") {
                default(token, "expirationSeconds", 3600);
            }
        }
    }
}

/// Guaranteed, Burstable or BestEffort, by whether requests and limits are set.
fn qos_class(pod: &Value) -> &'static str {
    let resources = || meta::items(pod, "/spec/containers").map(|container| &container["resources"]);
    let some =
        |resources: &Value, field: &str| resources[field].as_object().is_some_and(|set| !set.is_empty());
    let limited = |resources: &Value| {
        let limits = &resources["limits"];
        limits.get("cpu").is_some()
            && limits.get("memory").is_some()
            && (resources["requests"].is_null() || resources["requests"] == *limits)
    };
    if resources().all(limited) {
        "Guaranteed"
    } else if resources().any(|resources| some(resources, "limits") || some(resources, "requests")) {
        "Burstable"
    } else {
        "BestEffort"
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{apply, qos_class};
    use crate::api::kinds::Kinds;

    #[test]
    fn defaults_fill_gaps_and_keep_what_is_set() {
        let kinds = Kinds::new();
        let mut service =
            json!({"spec": {"ports": [{"port": 80}, {"port": 53, "protocol": "UDP", "targetPort": "dns"}]}});
        apply(&kinds.named("svc").unwrap(), &mut service);
        assert_eq!(service["spec"]["ports"][0], json!({"port": 80, "protocol": "TCP", "targetPort": 80}));
        assert_eq!(service["spec"]["ports"][1], json!({"port": 53, "protocol": "UDP", "targetPort": "dns"}));
        let mut secret = json!({"data": {"a": "eA=="}, "stringData": {"b": "y"}});
        apply(&kinds.named("secret").unwrap(), &mut secret);
        assert_eq!(secret, json!({"data": {"a": "eA==", "b": "eQ=="}, "type": "Opaque"}));
    }

    #[test]
    fn a_policy_is_about_what_it_has_rules_for() {
        let kind = Kinds::new().named("netpol").unwrap();
        for (spec, types) in [
            (json!({}), json!(["Ingress"])),
            (json!({"egress": []}), json!(["Ingress"])),
            (json!({"egress": [{}]}), json!(["Ingress", "Egress"])),
            (json!({"egress": [{}], "policyTypes": ["Egress"]}), json!(["Egress"])),
        ] {
            let mut policy = json!({"spec": spec});
            apply(&kind, &mut policy);
            assert_eq!(policy["spec"]["policyTypes"], types, "{spec}");
        }
        let mut policy = json!({"spec": {"ingress": [{"ports": [{"port": 1}]}], "egress": [{"ports": [{"protocol": "UDP"}]}]}});
        apply(&kind, &mut policy);
        assert_eq!(policy["spec"]["ingress"][0]["ports"][0]["protocol"], "TCP");
        assert_eq!(policy["spec"]["egress"][0]["ports"][0]["protocol"], "UDP");
    }

    #[test]
    fn a_job_is_done_once_unless_it_says_otherwise() {
        let kind = Kinds::new().named("jobs").unwrap();
        for (spec, expect) in [
            (json!({}), (json!(1), json!(1))),
            (json!({"completions": 3}), (json!(1), json!(3))),
            (json!({"parallelism": 2}), (json!(2), json!(null))),
        ] {
            let mut job = json!({"spec": spec});
            apply(&kind, &mut job);
            assert_eq!(
                (job["spec"]["parallelism"].clone(), job["spec"]["completions"].clone()),
                expect,
                "{spec}"
            );
        }
    }

    #[test]
    fn applying_twice_changes_nothing_more() {
        let kinds = Kinds::new();
        for word in [
            "pods",
            "services",
            "deployments",
            "daemonsets",
            "jobs",
            "cronjobs",
            "namespaces",
            "crd",
            "netpol",
        ] {
            let kind = kinds.named(word).unwrap();
            let mut once = json!({"metadata": {"name": "a"}, "spec": {
                "containers": [{"image": "x:1", "readinessProbe": {"httpGet": {"port": 1}}}],
                "volumes": [{"hostPath": {"path": "/x"}}, {"projected": {"sources": [{"serviceAccountToken": {}}]}}],
            }});
            apply(&kind, &mut once);
            let mut twice = once.clone();
            apply(&kind, &mut twice);
            assert_eq!(once, twice, "{word}");
        }
    }

    #[test]
    fn quality_of_service() {
        let pod = |resources| json!({"spec": {"containers": [{"resources": resources}]}});
        for (resources, expect) in [
            (json!({}), "BestEffort"),
            (json!({"requests": {"cpu": "1"}}), "Burstable"),
            (json!({"limits": {"cpu": "1", "memory": "1Gi"}}), "Guaranteed"),
        ] {
            assert_eq!(qos_class(&pod(resources)), expect);
        }
    }
}
