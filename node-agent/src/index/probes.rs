//! The ports that the kubelet may reach directly: those that a pod's own probes and lifecycle hooks name.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, PodSpec, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// All of them: of readiness, liveness and startup probes (httpGet, tcpSocket, grpc), and of the hooks postStart and
/// preStop (httpGet, tcpSocket), in containers and init containers, some of which are sidecars.
///
/// One that names a `host` is not about this pod but about whoever is there, so it opens nothing.
pub(super) fn ports(spec: &PodSpec) -> BTreeSet<u16> {
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    containers.flat_map(of_container).collect()
}

fn of_container(container: &Container) -> impl Iterator<Item = u16> + '_ {
    let probes = [&container.readiness_probe, &container.liveness_probe, &container.startup_probe];
    let lifecycle = container.lifecycle.as_ref();
    let hooks = [
        lifecycle.and_then(|hooks| hooks.post_start.as_ref()),
        lifecycle.and_then(|hooks| hooks.pre_stop.as_ref()),
    ];
    let of_probe = probes.into_iter().flatten().flat_map(move |probe| of_probe(container, probe));
    of_probe.chain(hooks.into_iter().flatten().flat_map(move |hook| of_hook(container, hook)))
}

fn of_probe(container: &Container, probe: &Probe) -> impl Iterator<Item = u16> {
    let http = probe.http_get.as_ref().and_then(|get| local(container, get.host.as_ref(), &get.port));
    let tcp =
        probe.tcp_socket.as_ref().and_then(|socket| local(container, socket.host.as_ref(), &socket.port));
    let grpc = probe.grpc.as_ref().and_then(|grpc| number(grpc.port));
    [http, tcp, grpc].into_iter().flatten()
}

fn of_hook(container: &Container, hook: &LifecycleHandler) -> impl Iterator<Item = u16> {
    let http = hook.http_get.as_ref().and_then(|get| local(container, get.host.as_ref(), &get.port));
    let tcp =
        hook.tcp_socket.as_ref().and_then(|socket| local(container, socket.host.as_ref(), &socket.port));
    [http, tcp].into_iter().flatten()
}

/// The port of an action that goes to the pod itself.
fn local(container: &Container, host: Option<&String>, port: &IntOrString) -> Option<u16> {
    if host.is_some_and(|host| !host.is_empty()) {
        return None;
    }
    match port {
        IntOrString::Int(port) => number(*port),
        IntOrString::String(name) => named(container, name),
    }
}

/// As the kubelet resolves it (`probe.ResolveContainerPort`): a port of the same container, else a number in a string.
fn named(container: &Container, name: &str) -> Option<u16> {
    let ports = container.ports.iter().flatten();
    let found = ports.into_iter().find(|port| port.name.as_deref() == Some(name));
    match found {
        Some(port) => number(port.container_port),
        None => name.parse().ok().filter(|port| *port != 0),
    }
}

fn number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn check(why: &str, spec: Value, expect: &[u16]) {
        let spec: PodSpec = serde_json::from_value(spec).unwrap();
        assert_eq!(ports(&spec).into_iter().collect::<Vec<_>>(), expect, "{why}");
    }

    fn container(fields: Value) -> Value {
        let mut container = json!({"name": "c", "ports": [
            {"name": "http", "containerPort": 8080}, {"name": "admin", "containerPort": 9000},
        ]});
        container.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        json!({"containers": [container]})
    }

    #[test]
    fn every_kind_of_action() {
        check("none", container(json!({})), &[]);
        check(
            "all probes",
            container(json!({
                "readinessProbe": {"httpGet": {"port": 81}},
                "livenessProbe": {"tcpSocket": {"port": 82}},
                "startupProbe": {"grpc": {"port": 83}},
            })),
            &[81, 82, 83],
        );
        check(
            "hooks",
            container(json!({"lifecycle": {
                "postStart": {"httpGet": {"port": 84}},
                "preStop": {"tcpSocket": {"port": 85}},
            }})),
            &[84, 85],
        );
        check("exec", container(json!({"readinessProbe": {"exec": {"command": ["true"]}}})), &[]);
    }

    #[test]
    fn ports_by_name_and_number() {
        let probe = |port: Value| container(json!({"readinessProbe": {"httpGet": {"port": port}}}));
        for (port, expect) in [
            (json!("http"), &[8080_u16][..]),
            (json!("admin"), &[9000]),
            (json!("7070"), &[7070]),
            (json!("nowhere"), &[]),
            (json!(""), &[]),
            (json!("0"), &[]),
            (json!(0), &[]),
            (json!(-1), &[]),
            (json!(65_536), &[]),
            (json!(65_535), &[65_535]),
        ] {
            check(&port.to_string(), probe(port), expect);
        }
    }

    #[test]
    fn a_name_is_the_containers_own() {
        check(
            "two containers and a sidecar",
            json!({
                "containers": [
                    {"name": "a", "ports": [{"name": "http", "containerPort": 80}],
                     "readinessProbe": {"httpGet": {"port": "http"}}},
                    {"name": "b", "ports": [{"name": "http", "containerPort": 90}],
                     "livenessProbe": {"httpGet": {"port": "http"}}},
                    {"name": "c", "livenessProbe": {"httpGet": {"port": "http"}}},
                ],
                "initContainers": [
                    {"name": "d", "restartPolicy": "Always", "startupProbe": {"tcpSocket": {"port": 70}}},
                ],
            }),
            &[70, 80, 90],
        );
    }

    #[test]
    fn an_action_at_another_host_opens_nothing() {
        check(
            "host",
            container(json!({
                "readinessProbe": {"httpGet": {"host": "10.1.0.7", "port": 81}},
                "livenessProbe": {"tcpSocket": {"host": "10.1.0.7", "port": 82}},
                "startupProbe": {"tcpSocket": {"host": "", "port": 83}},
                "lifecycle": {"preStop": {"httpGet": {"host": "victim", "port": 84}}},
            })),
            &[83],
        );
    }
}
