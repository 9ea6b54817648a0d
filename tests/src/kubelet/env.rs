//! The environment and command line of a container, from what its Pod says.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, EnvVar, EnvVarSource, Pod};

/// Looks up a key of a ConfigMap or Secret in the pod's namespace.
pub trait Lookup {
    fn config_map(&self, name: &str, key: &str) -> Option<String>;
    fn secret(&self, name: &str, key: &str) -> Option<String>;
}

/// Where the pod runs; of each list the primary address is the first.
#[derive(Clone, Debug)]
pub struct Place {
    /// Empty before it has a network.
    pub pod_ips: Vec<IpAddr>,
    pub host_ips: Vec<IpAddr>,
}

/// A variable that has no value yet; the container waits for it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("environment variable {variable}: {reason}")]
pub struct Unresolved {
    variable: String,
    reason: String,
}

/// The container's variables, references to earlier ones (`$(NAME)`) expanded.
pub fn environment(
    pod: &Pod,
    container: &Container,
    place: &Place,
    lookup: &dyn Lookup,
) -> Result<BTreeMap<String, String>, Unresolved> {
    let mut variables = BTreeMap::new();
    for variable in container.env.iter().flatten() {
        if let Some(value) = value(pod, variable, place, lookup)? {
            variables.insert(variable.name.clone(), expand(&value, &variables));
        }
    }
    Ok(variables)
}

/// `command` and `args`; without a command, the entrypoint of the image.
#[must_use]
pub fn command_line(container: &Container, variables: &BTreeMap<String, String>) -> Vec<String> {
    let given = container.command.iter().flatten().chain(container.args.iter().flatten());
    let mut line: Vec<String> = given.map(|word| expand(word, variables)).collect();
    if container.command.as_ref().is_none_or(Vec::is_empty) {
        let image = container.image.as_deref().unwrap_or_default();
        let name = image.rsplit('/').next().unwrap_or_default().split(':').next().unwrap_or_default();
        let entrypoint = if name == "examples" { "ambit-example" } else { name };
        line.insert(0, entrypoint.to_owned());
    }
    line
}

fn value(
    pod: &Pod,
    variable: &EnvVar,
    place: &Place,
    lookup: &dyn Lookup,
) -> Result<Option<String>, Unresolved> {
    let unresolved = |reason: String| Unresolved { variable: variable.name.clone(), reason };
    let Some(source) = &variable.value_from else {
        return Ok(Some(variable.value.clone().unwrap_or_default()));
    };
    match source {
        EnvVarSource { field_ref: Some(field), .. } => self::field(pod, &field.field_path, place)
            .map(Some)
            .ok_or_else(|| unresolved(format!("the lab knows no field {}", field.field_path))),
        EnvVarSource { config_map_key_ref: Some(reference), .. } => {
            let found = lookup.config_map(&reference.name, &reference.key);
            found_or(found, reference.optional).ok_or_else(|| {
                unresolved(format!("no key {} in ConfigMap {}", reference.key, reference.name))
            })
        }
        EnvVarSource { secret_key_ref: Some(reference), .. } => {
            let found = lookup.secret(&reference.name, &reference.key);
            found_or(found, reference.optional)
                .ok_or_else(|| unresolved(format!("no key {} in Secret {}", reference.key, reference.name)))
        }
        // Limits are not enforced here; one of everything is a safe thing to be told.
        EnvVarSource { resource_field_ref: Some(_), .. } => Ok(Some("1".to_owned())),
        _ => Err(unresolved("the lab knows no such source".to_owned())),
    }
}

fn found_or(found: Option<String>, optional: Option<bool>) -> Option<Option<String>> {
    match found {
        Some(value) => Some(Some(value)),
        None if optional == Some(true) => Some(None),
        None => None,
    }
}

/// A field of the downward API.
pub(super) fn field(pod: &Pod, path: &str, place: &Place) -> Option<String> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    Some(match path {
        "metadata.name" => meta.name.clone()?,
        "metadata.namespace" => meta.namespace.clone()?,
        "metadata.uid" => meta.uid.clone()?,
        "spec.nodeName" => spec?.node_name.clone().unwrap_or_default(),
        "spec.serviceAccountName" => {
            spec?.service_account_name.clone().unwrap_or_else(|| "default".to_owned())
        }
        "status.podIP" => list(&place.pod_ips[..place.pod_ips.len().min(1)]),
        "status.podIPs" => list(&place.pod_ips),
        "status.hostIP" => list(&place.host_ips[..place.host_ips.len().min(1)]),
        "status.hostIPs" => list(&place.host_ips),
        _ => {
            let (map, key) = path.strip_suffix("']")?.split_once("['")?;
            let map = match map {
                "metadata.labels" => meta.labels.as_ref(),
                "metadata.annotations" => meta.annotations.as_ref(),
                _ => return None,
            };
            map.and_then(|map| map.get(key)).cloned().unwrap_or_default()
        }
    })
}

/// As the downward API writes addresses.
fn list(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// `$(NAME)` becomes the variable's value, `$$` a dollar; an unknown name stays as it is.
fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            expanded.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|rest| rest.split_once(')'))
            && let Some(value) = variables.get(name)
        {
            expanded.push_str(value);
            rest = after;
        } else {
            expanded.push('$');
        }
    }
    expanded.push_str(rest);
    expanded
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;
    impl Lookup for Nothing {
        fn config_map(&self, _: &str, _: &str) -> Option<String> {
            None
        }
        fn secret(&self, _: &str, _: &str) -> Option<String> {
            None
        }
    }

    #[test]
    fn references_expand_as_in_kubernetes() {
        let variables = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        for (text, expect) in [
            ("$(A)", "1"),
            ("x$(A)y", "x1y"),
            ("$$(A)", "$(A)"),
            ("$(B)", "$(B)"),
            ("$A", "$A"),
            ("5$", "5$"),
            ("", ""),
        ] {
            assert_eq!(expand(text, &variables), expect, "{text}");
        }
    }

    #[test]
    fn fields_and_missing_keys() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": { "name": "p", "namespace": "ns", "labels": { "app": "x" } },
            "spec": { "nodeName": "n1", "containers": [{
                "name": "c", "image": "ambit/examples:latest", "args": ["serve", "--name=$(APP)"],
                "env": [
                    { "name": "APP", "valueFrom": { "fieldRef": { "fieldPath": "metadata.labels['app']" } } },
                    { "name": "IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } },
                    { "name": "IPS", "valueFrom": { "fieldRef": { "fieldPath": "status.podIPs" } } },
                    { "name": "HOST", "valueFrom": { "fieldRef": { "fieldPath": "status.hostIP" } } },
                    { "name": "MAYBE", "valueFrom": {
                        "configMapKeyRef": { "name": "m", "key": "k", "optional": true } } },
                ],
            }] },
        }))
        .expect("a pod");
        let addresses = |list: [&str; 2]| list.map(|ip| ip.parse().expect("literal")).to_vec();
        let place = Place {
            pod_ips: addresses(["10.244.1.2", "fd00:244:1::2"]),
            host_ips: addresses(["172.30.1.2", "fd00:30:1::2"]),
        };
        let mut container = pod.spec.as_ref().expect("spec").containers[0].clone();
        let variables = environment(&pod, &container, &place, &Nothing).expect("resolves");
        for (name, expect) in
            [("IP", "10.244.1.2"), ("IPS", "10.244.1.2,fd00:244:1::2"), ("HOST", "172.30.1.2")]
        {
            assert_eq!(variables.get(name).map(String::as_str), Some(expect), "{name}");
        }
        assert!(!variables.contains_key("MAYBE"));
        assert_eq!(command_line(&container, &variables), ["ambit-example", "serve", "--name=x"]);

        let missing = &mut container.env.as_mut().expect("env")[4];
        missing
            .value_from
            .as_mut()
            .and_then(|from| from.config_map_key_ref.as_mut())
            .expect("ref")
            .optional = None;
        let error = environment(&pod, &container, &place, &Nothing).expect_err("not optional now");
        assert_eq!(error.to_string(), "environment variable MAYBE: no key k in ConfigMap m");
    }
}
