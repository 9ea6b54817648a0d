//! The status of a Pod, from what its kubelet knows: a pure function.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::env::Place;
use super::live::{Container, State};

/// As a strategic merge patch has it: only this kubelet's conditions are named.
pub(super) fn of(pod: &Pod, state: &State, place: &Place, started: Timestamp) -> Value {
    let spec = pod.spec.as_ref();
    let names = |containers: &[k8s_openapi::api::core::v1::Container]| -> Vec<(String, String)> {
        containers
            .iter()
            .map(|container| (container.name.clone(), container.image.clone().unwrap_or_default()))
            .collect()
    };
    let mains = names(spec.map(|spec| spec.containers.as_slice()).unwrap_or_default());
    let inits = names(spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default());
    let of = |name: &str| state.containers.get(name);
    let sidecars =
        spec.iter().flat_map(|spec| spec.init_containers.iter().flatten()).filter(|init| is_sidecar(init));
    let mut lasting = mains.iter().map(|(name, _)| name).chain(sidecars.map(|sidecar| &sidecar.name));
    let all_ready = lasting.all(|name| of(name).is_some_and(|one| one.pid.is_some() && one.ready));
    let any_started = mains.iter().any(|(name, _)| of(name).is_some_and(|one| one.since.is_some()));
    let phase = state.phase.unwrap_or(if any_started { "Running" } else { "Pending" });
    let ready = all_ready && state.phase.is_none();

    let mut status = json!({
        "phase": phase,
        "hostIP": place.host_ips.first(),
        "hostIPs": ips(&place.host_ips),
        "startTime": whole_seconds(started),
        "qosClass": "BestEffort",
        "conditions": [
            condition("PodScheduled", true),
            condition("Initialized", state.initialized || (inits.is_empty() && state.network.is_some())),
            condition("ContainersReady", ready),
            condition("Ready", ready),
        ],
        "containerStatuses": statuses(&mains, state),
        "initContainerStatuses": statuses(&inits, state),
    });
    if let Some(primary) = place.pod_ips.first() {
        status["podIP"] = json!(primary);
        status["podIPs"] = ips(&place.pod_ips);
    }
    status
}

/// Whether an init container goes on beside the others (`restartPolicy: Always`).
pub(super) fn is_sidecar(init: &k8s_openapi::api::core::v1::Container) -> bool {
    init.restart_policy.as_deref() == Some("Always")
}

fn ips(addresses: &[IpAddr]) -> Value {
    addresses.iter().map(|ip| json!({ "ip": ip })).collect()
}

fn condition(kind: &str, holds: bool) -> Value {
    json!({ "type": kind, "status": if holds { "True" } else { "False" } })
}

fn statuses(containers: &[(String, String)], state: &State) -> Vec<Value> {
    let unknown = Container::default();
    containers
        .iter()
        .map(|(name, image)| {
            let known = state.containers.get(name).unwrap_or(&unknown);
            let ready = known.pid.is_some() && known.ready || known.init && known.exit == Some(0);
            json!({
                "name": name,
                "image": image,
                "imageID": image,
                "containerID": if known.id.is_empty() { String::new() } else { format!("containerd://{}", known.id) },
                "ready": ready,
                "started": known.pid.is_some() && known.started,
                "restartCount": known.restarts,
                "state": now(known),
            })
        })
        .collect()
}

fn now(container: &Container) -> Value {
    let since = container.since.map(whole_seconds);
    if container.pid.is_some() {
        return json!({ "running": { "startedAt": since }, "waiting": null, "terminated": null });
    }
    if let Some((reason, message)) = &container.waiting {
        let waiting = json!({ "reason": reason, "message": message });
        return json!({ "waiting": waiting, "running": null, "terminated": null });
    }
    if let Some(code) = container.exit {
        let reason = if code == 0 { "Completed" } else { "Error" };
        let terminated = json!({ "exitCode": code, "reason": reason, "startedAt": since });
        return json!({ "terminated": terminated, "running": null, "waiting": null });
    }
    json!({ "waiting": { "reason": "ContainerCreating" }, "running": null, "terminated": null })
}

/// As `metav1.Time` is written.
fn whole_seconds(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut State), phase: &str, ready: &str) {
        let pod: Pod =
            serde_json::from_value(json!({ "metadata": {}, "spec": { "containers": [{ "name": "c" }] } }))
                .expect("a pod");
        let mut state = State::default();
        change(&mut state);
        let place = Place { pod_ips: Vec::new(), host_ips: vec!["172.30.1.2".parse().expect("literal")] };
        let status = of(&pod, &state, &place, Timestamp::UNIX_EPOCH);
        assert_eq!(status["phase"], phase);
        assert_eq!(status["conditions"][3], json!({ "type": "Ready", "status": ready }));
    }

    #[test]
    fn addresses_of_both_families() {
        let parse = |list: &[&str]| list.iter().map(|ip| ip.parse().expect("literal")).collect();
        let place =
            Place { pod_ips: parse(&["10.244.1.2", "fd00::2"]), host_ips: parse(&["172.30.1.2", "fd00::1"]) };
        let status = of(&Pod::default(), &State::default(), &place, Timestamp::UNIX_EPOCH);
        assert_eq!(status["podIP"], "10.244.1.2");
        assert_eq!(status["podIPs"], json!([{ "ip": "10.244.1.2" }, { "ip": "fd00::2" }]));
        assert_eq!(status["hostIP"], "172.30.1.2");
        assert_eq!(status["hostIPs"], json!([{ "ip": "172.30.1.2" }, { "ip": "fd00::1" }]));
    }

    #[test]
    fn a_pod_is_ready_when_its_sidecars_are() {
        let pod: Pod = serde_json::from_value(json!({ "metadata": {}, "spec": {
            "initContainers": [{ "name": "init" }, { "name": "s", "restartPolicy": "Always" }],
            "containers": [{ "name": "c" }],
        } }))
        .expect("a pod");
        let place = Place { pod_ips: Vec::new(), host_ips: Vec::new() };
        let ready = Container { pid: Some(7), ready: true, ..Container::default() };
        let mut state = State::default();
        for (name, expect) in [("c", "False"), ("s", "True")] {
            state.containers.insert(name.to_owned(), ready.clone());
            let status = of(&pod, &state, &place, Timestamp::UNIX_EPOCH);
            assert_eq!(status["conditions"][3], json!({ "type": "Ready", "status": expect }), "{name} is");
        }
    }

    #[test]
    fn phase_and_readiness() {
        let running = Container { pid: Some(7), since: Some(Timestamp::UNIX_EPOCH), ..Container::default() };
        let ready = Container { ready: true, ..running.clone() };
        let ended = Container { pid: None, exit: Some(0), ready: false, ..ready.clone() };
        check(|_| {}, "Pending", "False");
        check(|state| drop(state.containers.insert("c".to_owned(), running)), "Running", "False");
        check(|state| drop(state.containers.insert("c".to_owned(), ready)), "Running", "True");
        check(
            |state| {
                state.containers.insert("c".to_owned(), ended);
                state.phase = Some("Succeeded");
            },
            "Succeeded",
            "False",
        );
    }
}
