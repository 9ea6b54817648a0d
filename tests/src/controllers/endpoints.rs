//! EndpointSlices from Services and the pods they select: one slice per Service, IP family and set of resolved ports.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, Service, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{State, Write, child, create, delete, fingerprint, finished, leaving, ready, text};
use crate::cluster::Kind;
use crate::stack::Family;

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
    let families = spec.ip_families.iter().flatten().filter_map(|name| Family::named(name));
    families.flat_map(|family| of_family(family, service, spec, selector, pods)).collect()
}

fn of_family(
    family: Family,
    service: &Service,
    spec: &ServiceSpec,
    selector: &BTreeMap<String, String>,
    pods: &[Pod],
) -> Vec<EndpointSlice> {
    let mut by_ports: BTreeMap<String, (Vec<EndpointPort>, Vec<Endpoint>)> = BTreeMap::new();
    for pod in pods {
        let chosen =
            pod.metadata.namespace == service.metadata.namespace && selected(pod, selector) && !finished(pod);
        let Some(endpoint) = chosen.then(|| endpoint(family, pod, spec)).flatten() else { continue };
        let ports = ports(spec, pod);
        by_ports.entry(fingerprint(&ports)).or_insert_with(|| (ports, Vec::new())).1.push(endpoint);
    }
    if by_ports.is_empty() {
        by_ports.insert(fingerprint(&()), (Vec::new(), Vec::new()));
    }
    let slice = |(key, (ports, endpoints)): (String, _)| slice(family, service, &key, ports, endpoints);
    by_ports.into_iter().map(slice).collect()
}

fn slice(
    family: Family,
    service: &Service,
    key: &str,
    ports: Vec<EndpointPort>,
    mut endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    endpoints.sort_by(|a, b| a.addresses.cmp(&b.addresses));
    let name =
        format!("{}-{}-{key}", text(service.metadata.name.as_ref()), family.as_str().to_ascii_lowercase());
    let mut metadata = child(("v1", "Service", &service.metadata), &Default::default(), name);
    metadata.labels = Some(BTreeMap::from([
        (SERVICE.to_owned(), text(service.metadata.name.as_ref()).to_owned()),
        (MANAGED.0.to_owned(), MANAGED.1.to_owned()),
    ]));
    EndpointSlice { metadata, address_type: family.as_str().to_owned(), endpoints, ports: Some(ports) }
}

fn selected(pod: &Pod, selector: &BTreeMap<String, String>) -> bool {
    let labels = pod.metadata.labels.as_ref();
    selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

/// None for a pod that has no address of the family (yet).
fn endpoint(family: Family, pod: &Pod, service: &ServiceSpec) -> Option<Endpoint> {
    let mut addresses = pod.status.as_ref()?.pod_ips.iter().flatten().map(|ip| &ip.ip);
    let of_family = |ip: &&String| ip.parse().is_ok_and(|ip| Family::of(ip) == family);
    let address = addresses.find(of_family)?.clone();
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn state(families: &[&str], addresses: &[&[&str]]) -> State {
        let service = json!({
            "metadata": { "name": "web", "namespace": "shop" },
            "spec": {
                "selector": { "app": "web" }, "ipFamilies": families,
                "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }],
            },
        });
        let pods = addresses.iter().enumerate().map(|(index, addresses)| {
            let ips: Vec<_> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
            json!({
                "metadata": { "name": format!("p{index}"), "namespace": "shop", "labels": { "app": "web" } },
                "spec": { "nodeName": "n1", "containers": [] },
                "status": { "podIP": addresses.first(), "podIPs": ips },
            })
        });
        State {
            services: vec![serde_json::from_value(service).expect("a service")],
            pods: pods.map(|pod| serde_json::from_value(pod).expect("a pod")).collect(),
            ..State::default()
        }
    }

    /// Address type and addresses of each slice that is created.
    fn created(families: &[&str], addresses: &[&[&str]]) -> Vec<(String, Vec<String>)> {
        let slices = plan(&state(families, addresses)).into_iter().map(|write| match write {
            Write::Create(Kind::EndpointSlice, slice) => serde_json::from_value(slice).expect("a slice"),
            other => panic!("{other:?}"),
        });
        let of =
            |slice: &EndpointSlice| slice.endpoints.iter().flat_map(|one| one.addresses.clone()).collect();
        slices.map(|slice: EndpointSlice| (slice.address_type.clone(), of(&slice))).collect()
    }

    #[test]
    fn one_slice_for_each_family_of_the_service() {
        let pods: &[&[&str]] = &[&["10.244.1.2", "fd00::2"], &["10.244.1.3"], &["fd00::4"], &[]];
        let v4 = ("IPv4".to_owned(), vec!["10.244.1.2".to_owned(), "10.244.1.3".to_owned()]);
        let v6 = ("IPv6".to_owned(), vec!["fd00::2".to_owned(), "fd00::4".to_owned()]);
        assert_eq!(created(&["IPv4"], pods), std::slice::from_ref(&v4));
        assert_eq!(created(&["IPv6"], pods), std::slice::from_ref(&v6));
        assert_eq!(created(&["IPv4", "IPv6"], pods), [v4, v6]);
        assert_eq!(created(&["IPv6"], &[]), [("IPv6".to_owned(), vec![])], "it says that there is none");
    }

    #[test]
    fn a_slice_of_a_family_that_the_service_gave_up_is_removed() {
        let mut state = state(&["IPv4", "IPv6"], &[&["10.244.1.2", "fd00::2"]]);
        for write in plan(&state) {
            let Write::Create(_, slice) = write else { panic!("{write:?}") };
            state.slices.push(serde_json::from_value(slice).expect("a slice"));
        }
        assert_eq!(plan(&state), []);
        state.services[0].spec.as_mut().expect("spec").ip_families = Some(vec!["IPv4".to_owned()]);
        let gone = state.slices[1].metadata.name.clone().unwrap_or_default();
        let delete = Write::Delete { kind: Kind::EndpointSlice, namespace: "shop".to_owned(), name: gone };
        assert_eq!(plan(&state), [delete]);
    }
}
