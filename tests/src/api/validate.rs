//! Validation with the real server's field paths and wording, for the mistakes people and controllers make.
//! Types are checked in `schema`; here it is values. Reference: `k8s.io/kubernetes/pkg/apis/*/validation`.

mod metadata;

use serde_json::Value;

use super::kinds::Kind;
use super::meta::{items, name, text};
use super::select::Selector;
use super::status::Status;
use super::structure::{self, Schema};
use super::{convert, definition, events, rules};
use crate::stack::Family;
pub(super) use metadata::is_dns_label;

/// Faults found: field path and what is wrong.
type Faults = Vec<(String, String)>;

/// Refuses (422) an object with invalid values, or a change of what may not change.
pub(super) fn check(kind: &Kind, object: &Value, old: Option<&Value>) -> Result<(), Status> {
    let mut faults = Vec::new();
    metadata::faults(kind, object, old, &mut faults);
    if let Some(custom) = &kind.custom {
        faults.extend(custom_faults(kind, &custom.schema, object, old));
    } else {
        match kind.kind.as_str() {
            "Pod" => pod_spec(&object["spec"], "spec", &mut faults),
            "Service" => service(object, &mut faults),
            "Deployment" | "ReplicaSet" | "DaemonSet" => workload(object, &mut faults),
            "Job" => job(&object["spec"], "spec", &mut faults),
            "CronJob" => cron_job(&object["spec"], &mut faults),
            "RoleBinding" | "ClusterRoleBinding" => binding(object, &mut faults),
            "CustomResourceDefinition" => faults.extend(definition::check::faults(object, old)),
            "ConfigMap" | "Secret" => data_keys(object, &mut faults),
            "EndpointSlice" => slice(object, &mut faults),
            "Event" => faults.extend(events::faults(kind, object, old.is_none())),
            _ => {}
        }
        if let Some(old) = old {
            immutable(kind, old, object, &mut faults);
        }
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(Status::invalid(&kind.kind, &kind.group, name(object), &faults))
    }
}

/// Rules are for objects that are otherwise right.
fn custom_faults(kind: &Kind, schema: &Schema, object: &Value, old: Option<&Value>) -> Faults {
    let old = old.map(|old| convert::serve(kind, old));
    let mut faults = structure::check::faults(schema, object, old.as_ref(), "");
    if faults.is_empty() {
        return rules::faults(schema, object, old.as_ref());
    }
    if rules::exist(schema) {
        let why = "some validation rules were not checked because the object was invalid; correct the existing \
                   errors to complete validation";
        faults.push(("<nil>".to_owned(), format!("Invalid value: \"null\": {why}")));
    }
    faults
}

fn require(value: &Value, field: String, faults: &mut Faults) {
    let missing = match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        _ => false,
    };
    if missing {
        faults.push((field, "Required value".to_owned()));
    }
}

fn pod_spec(spec: &Value, path: &str, faults: &mut Faults) {
    if items(spec, "/containers").next().is_none() {
        faults.push((format!("{path}.containers"), "Required value".into()));
    }
    let volumes: Vec<&str> = items(spec, "/volumes").map(|volume| text(volume, "/name")).collect();
    let mut names = Vec::new();
    for list in ["initContainers", "containers"] {
        for (index, container) in items(spec, &format!("/{list}")).enumerate() {
            let at = format!("{path}.{list}[{index}]");
            require(&container["name"], format!("{at}.name"), faults);
            require(&container["image"], format!("{at}.image"), faults);
            let name = text(container, "/name");
            if names.contains(&name) {
                faults.push((format!("{at}.name"), format!("Duplicate value: \"{name}\"")));
            }
            names.push(name);
            for (index, port) in items(container, "/ports").enumerate() {
                port_number(&port["containerPort"], format!("{at}.ports[{index}].containerPort"), faults);
            }
            for (index, mount) in items(container, "/volumeMounts").enumerate() {
                let name = text(mount, "/name");
                if !volumes.contains(&name) {
                    faults
                        .push((format!("{at}.volumeMounts[{index}].name"), format!("Not found: \"{name}\"")));
                }
            }
            for (index, variable) in items(container, "/env").enumerate() {
                require(&variable["name"], format!("{at}.env[{index}].name"), faults);
            }
        }
    }
    let policy = text(spec, "/restartPolicy");
    if !["Always", "OnFailure", "Never"].contains(&policy) {
        faults.push((
            format!("{path}.restartPolicy"),
            unsupported(policy, "\"Always\", \"OnFailure\", \"Never\""),
        ));
    }
}

fn unsupported(value: &str, supported: &str) -> String {
    format!("Unsupported value: \"{value}\": supported values: {supported}")
}

fn port_number(port: &Value, field: String, faults: &mut Faults) {
    match port.as_i64() {
        Some(1..=65535) => {}
        None => faults.push((field, "Required value".into())),
        Some(port) => {
            faults.push((field, format!("Invalid value: {port}: must be between 1 and 65535, inclusive")));
        }
    }
}

fn service(object: &Value, faults: &mut Faults) {
    let spec = &object["spec"];
    let kind = text(spec, "/type");
    if !["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"].contains(&kind) {
        let supported = "\"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"";
        faults.push(("spec.type".into(), unsupported(kind, supported)));
    }
    if kind == "ExternalName" {
        return require(&spec["externalName"], "spec.externalName".into(), faults);
    }
    let ports: Vec<&Value> = items(spec, "/ports").collect();
    if ports.is_empty() && text(spec, "/clusterIP") != "None" {
        faults.push(("spec.ports".into(), "Required value".into()));
    }
    for (index, port) in ports.iter().enumerate() {
        let at = format!("spec.ports[{index}]");
        port_number(&port["port"], format!("{at}.port"), faults);
        if ports.len() > 1 {
            require(&port["name"], format!("{at}.name"), faults);
        }
        let (name, protocol) = (text(port, "/name"), text(port, "/protocol"));
        if ports[..index].iter().any(|other| text(other, "/name") == name) && !name.is_empty() {
            faults.push((format!("{at}.name"), format!("Duplicate value: \"{name}\"")));
        }
        if !["TCP", "UDP", "SCTP"].contains(&protocol) {
            faults.push((format!("{at}.protocol"), unsupported(protocol, "\"SCTP\", \"TCP\", \"UDP\"")));
        }
    }
}

fn workload(object: &Value, faults: &mut Faults) {
    let spec = &object["spec"];
    require(&spec["selector"], "spec.selector".into(), faults);
    if spec["replicas"].as_i64().is_some_and(|replicas| replicas < 0) {
        faults.push((
            "spec.replicas".into(),
            format!("Invalid value: {}: must be greater than or equal to 0", spec["replicas"]),
        ));
    }
    let template = &spec["template"];
    if !spec["selector"].is_null() && !Selector::of_label_selector(&spec["selector"]).matches(template) {
        let labels = &template["metadata"]["labels"];
        let why = format!("Invalid value: {labels}: `selector` does not match template `labels`");
        faults.push(("spec.template.metadata.labels".into(), why));
    }
    pod_spec(&template["spec"], "spec.template.spec", faults);
    let policy = text(template, "/spec/restartPolicy");
    if policy != "Always" {
        faults.push(("spec.template.spec.restartPolicy".into(), unsupported(policy, "\"Always\"")));
    }
}

fn job(spec: &Value, path: &str, faults: &mut Faults) {
    let template = &spec["template"]["spec"];
    pod_spec(template, &format!("{path}.template.spec"), faults);
    let policy = text(template, "/restartPolicy");
    if policy == "Always" {
        let supported = "\"OnFailure\", \"Never\"";
        faults.push((format!("{path}.template.spec.restartPolicy"), unsupported(policy, supported)));
    }
}

fn cron_job(spec: &Value, faults: &mut Faults) {
    let schedule = text(spec, "/schedule");
    if !schedule.starts_with('@') && schedule.split_whitespace().count() != 5 {
        let why = format!("Invalid value: \"{schedule}\": expected exactly 5 fields");
        faults.push(("spec.schedule".into(), why));
    }
    job(&spec["jobTemplate"]["spec"], "spec.jobTemplate.spec", faults);
}

fn binding(object: &Value, faults: &mut Faults) {
    require(&object["roleRef"]["name"], "roleRef.name".into(), faults);
    let kind = text(object, "/roleRef/kind");
    if !["Role", "ClusterRole"].contains(&kind) {
        faults.push(("roleRef.kind".into(), unsupported(kind, "\"Role\", \"ClusterRole\"")));
    }
    for (index, subject) in items(object, "/subjects").enumerate() {
        require(&subject["name"], format!("subjects[{index}].name"), faults);
        if text(subject, "/kind") == "ServiceAccount" && text(object, "/kind") == "ClusterRoleBinding" {
            require(&subject["namespace"], format!("subjects[{index}].namespace"), faults);
        }
    }
}

fn data_keys(object: &Value, faults: &mut Faults) {
    for field in ["data", "binaryData"] {
        for (key, _) in object[field].as_object().into_iter().flatten() {
            let good = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
            if key.is_empty() || !key.chars().all(good) {
                let why = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'";
                faults.push((format!("{field}[{key}]"), format!("Invalid value: \"{key}\": {why}")));
            }
        }
    }
}

fn slice(object: &Value, faults: &mut Faults) {
    let family = text(object, "/addressType");
    if !["IPv4", "IPv6", "FQDN"].contains(&family) {
        faults.push(("addressType".into(), unsupported(family, "\"FQDN\", \"IPv4\", \"IPv6\"")));
    }
    for (index, endpoint) in items(object, "/endpoints").enumerate() {
        let at = format!("endpoints[{index}].addresses");
        if items(endpoint, "/addresses").next().is_none() {
            faults.push((at.clone(), "Required value".into()));
        }
        for (position, address) in items(endpoint, "/addresses").enumerate() {
            let parsed = address.as_str().and_then(|text| text.parse().ok()).map(Family::of);
            if family != "FQDN" && parsed != Family::named(family) {
                let why = format!("Invalid value: {address}: must be a valid {family} address");
                faults.push((format!("{at}[{position}]"), why));
            }
        }
    }
}

fn immutable(kind: &Kind, old: &Value, new: &Value, faults: &mut Faults) {
    if ["ConfigMap", "Secret"].contains(&kind.kind.as_str()) && old["immutable"] == true {
        for field in ["data", "binaryData", "immutable"] {
            if old.get(field) != new.get(field) {
                faults.push((field.into(), "Forbidden: field is immutable when `immutable` is set".into()));
            }
        }
    }
    let why = "field is immutable";
    let mut fixed = |pointer: &str| {
        if old.pointer(pointer) != new.pointer(pointer) {
            let value = new.pointer(pointer).unwrap_or(&Value::Null);
            faults.push((pointer[1..].replace('/', "."), format!("Invalid value: {value}: {why}")));
        }
    };
    match kind.kind.as_str() {
        "Deployment" | "ReplicaSet" | "DaemonSet" => fixed("/spec/selector"),
        "Job" => fixed("/spec/template"),
        "RoleBinding" | "ClusterRoleBinding" => fixed("/roleRef"),
        "Secret" => fixed("/type"),
        "EndpointSlice" => fixed("/addressType"),
        "Service" if text(old, "/spec/type") == text(new, "/spec/type") => fixed("/spec/clusterIP"),
        "Pod" if frozen(&old["spec"]) != frozen(&new["spec"]) || moved(old, new) => {
            let why = "Forbidden: pod updates may not change fields other than `spec.containers[*].image`,\
                       `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only \
                       additions to existing tolerations),`spec.terminationGracePeriodSeconds`";
            faults.push(("spec".into(), why.into()));
        }
        _ => {}
    }
}

/// Whether a pod that has a node is given another.
fn moved(old: &Value, new: &Value) -> bool {
    let node = text(old, "/spec/nodeName");
    !node.is_empty() && node != text(new, "/spec/nodeName")
}

/// A pod's spec without what may change.
fn frozen(spec: &Value) -> Value {
    let mut frozen = spec.clone();
    for field in ["nodeName", "tolerations", "activeDeadlineSeconds", "terminationGracePeriodSeconds"] {
        frozen[field] = Value::Null;
    }
    for list in ["initContainers", "containers"] {
        for container in frozen[list].as_array_mut().into_iter().flatten() {
            container["image"] = Value::Null;
            container["imagePullPolicy"] = Value::Null;
        }
    }
    frozen["ephemeralContainers"] = Value::Null;
    frozen
}
