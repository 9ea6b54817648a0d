//! EndpointSlices from Services and the pods they select: one slice per Service and set of resolved ports.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, Service, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{State, Write, child, create, delete, fingerprint, finished, leaving, ready, text};
use crate::cluster::Kind;

const SERVICE: &str = "kubernetes.io/service-name";
const MANAGED: (&str, &str) = ("endpointslice.kubernetes.io/managed-by", "endpointslice-controller.k8s.io");

pub(super) fn plan(state: &State) -> Vec<Write> {
    let wanted: Vec<EndpointSlice> = state
        .services
        .iter()
        .filter(|service| !leaving(&service.metadata))
        .flat_map(|service| slices(service, &state.pods))
        .collect();
    let managed = |slice: &&EndpointSlice| {
        let labels = slice.metadata.labels.as_ref();
        labels.and_then(|labels| labels.get(MANAGED.0)).is_some_and(|by| by == MANAGED.1)
    };
    let existing: Vec<&EndpointSlice> = state.slices.iter().filter(managed).collect();
    let same = |a: &EndpointSlice, b: &EndpointSlice| {
        a.metadata.name == b.metadata.name && a.metadata.namespace == b.metadata.namespace
    };
    let mut writes = Vec::new();
    for slice in &wanted {
        match existing.iter().find(|other| same(other, slice)) {
            None => writes.extend(create(Kind::EndpointSlice, slice)),
            Some(now) if now.endpoints != slice.endpoints || now.ports != slice.ports => {
                let mut changed = slice.clone();
                changed.metadata.resource_version.clone_from(&now.metadata.resource_version);
                writes.extend(
                    serde_json::to_value(&changed)
                        .ok()
                        .map(|slice| Write::Replace(Kind::EndpointSlice, slice)),
                );
            }
            Some(_) => {}
        }
    }
    let stale = existing.iter().filter(|now| !wanted.iter().any(|slice| same(slice, now)));
    writes.extend(stale.map(|slice| delete(Kind::EndpointSlice, &slice.metadata)));
    writes
}

fn slices(service: &Service, pods: &[Pod]) -> Vec<EndpointSlice> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let Some(selector) = spec.selector.as_ref().filter(|selector| !selector.is_empty()) else {
        return Vec::new();
    };
    let mut by_ports: BTreeMap<String, (Vec<EndpointPort>, Vec<Endpoint>)> = BTreeMap::new();
    for pod in pods {
        let chosen =
            pod.metadata.namespace == service.metadata.namespace && selected(pod, selector) && !finished(pod);
        let Some(endpoint) = chosen.then(|| endpoint(pod, spec)).flatten() else { continue };
        let ports = ports(spec, pod);
        by_ports.entry(fingerprint(&ports)).or_insert_with(|| (ports, Vec::new())).1.push(endpoint);
    }
    if by_ports.is_empty() {
        by_ports.insert(fingerprint(&()), (Vec::new(), Vec::new()));
    }
    by_ports.into_iter().map(|(key, (ports, endpoints))| slice(service, &key, ports, endpoints)).collect()
}

fn slice(
    service: &Service,
    key: &str,
    ports: Vec<EndpointPort>,
    mut endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    endpoints.sort_by(|a, b| a.addresses.cmp(&b.addresses));
    let name = format!("{}-{key}", text(service.metadata.name.as_ref()));
    let mut metadata = child(("v1", "Service", &service.metadata), &Default::default(), name);
    metadata.labels = Some(BTreeMap::from([
        (SERVICE.to_owned(), text(service.metadata.name.as_ref()).to_owned()),
        (MANAGED.0.to_owned(), MANAGED.1.to_owned()),
    ]));
    EndpointSlice { metadata, address_type: "IPv4".to_owned(), endpoints, ports: Some(ports) }
}

fn selected(pod: &Pod, selector: &BTreeMap<String, String>) -> bool {
    let labels = pod.metadata.labels.as_ref();
    selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

fn endpoint(pod: &Pod, service: &ServiceSpec) -> Option<Endpoint> {
    let address = pod.status.as_ref()?.pod_ip.clone().filter(|address| !address.is_empty())?;
    let (ready, leaving) = (ready(pod), leaving(&pod.metadata));
    let always = service.publish_not_ready_addresses == Some(true);
    Some(Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(always || (ready && !leaving)),
            serving: Some(ready),
            terminating: Some(leaving),
        }),
        node_name: pod.spec.as_ref()?.node_name.clone(),
        target_ref: Some(k8s_openapi::api::core::v1::ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..Default::default()
        }),
        ..Endpoint::default()
    })
}

/// The Service's ports as this pod has them: a named target port may differ from pod to pod.
fn ports(service: &ServiceSpec, pod: &Pod) -> Vec<EndpointPort> {
    let ports = service.ports.iter().flatten();
    ports
        .filter_map(|port| {
            let number = match &port.target_port {
                None => port.port,
                Some(IntOrString::Int(number)) => *number,
                Some(IntOrString::String(name)) => named(pod, name)?,
            };
            Some(EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                port: Some(number),
                protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".to_owned())),
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect()
}

/// The containerPort of that name.
pub(crate) fn named(pod: &Pod, name: &str) -> Option<i32> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports.find(|port| port.name.as_deref() == Some(name)).map(|port| port.container_port)
}
