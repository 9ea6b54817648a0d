//! Builds the resources of WDS (`workload.proto`) from the facts of the model, as istiod would.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_core::proto::workload as proto;

use super::event::ObjectName;
use super::pod::Pod;
use super::service::Service;
use super::slice::{Endpoint, Slice, Target};
use super::{Config, Index};

/// uid of a pod's workload.
pub(super) fn pod_uid(config: &Config, pod: &ObjectName) -> String {
    format!("{}//Pod/{}/{}", config.cluster_id, pod.namespace, pod.name)
}

/// uid of the workload of an endpoint that is no pod.
pub(super) fn endpoint_uid(config: &Config, slice: &ObjectName, address: IpAddr) -> String {
    format!(
        "{}/discovery.k8s.io/EndpointSlice/{}/{}/{address}",
        config.cluster_id, slice.namespace, slice.name
    )
}

/// "<namespace>/<host name>", the name of a service in xDS and in workloads.
pub(super) fn service_key(config: &Config, service: &ObjectName) -> String {
    format!("{}/{}", service.namespace, hostname(config, service))
}

fn hostname(config: &Config, service: &ObjectName) -> String {
    format!("{}.{}.svc.{}", service.name, service.namespace, config.cluster_domain)
}

/// 4 or 16 bytes, network order.
pub(super) fn bytes(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

impl Index {
    /// None without an address to find it by, or when the address may be another's by now.
    pub(super) fn pod_workload(&self, name: &ObjectName) -> Option<proto::Workload> {
        let pod = self.pods.get(name)?;
        if pod.finished || pod.addresses.is_empty() {
            return None;
        }
        let node = pod.node.as_ref();
        let healthy = pod.ready && !pod.terminating;
        let tunnel = if pod.captured { proto::TunnelProtocol::Hbone } else { proto::TunnelProtocol::None };
        let mode =
            if pod.host_network { proto::NetworkMode::HostNetwork } else { proto::NetworkMode::Standard };
        Some(proto::Workload {
            uid: pod_uid(&self.config, name),
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
            addresses: pod.addresses.iter().map(bytes).collect(),
            tunnel_protocol: tunnel.into(),
            trust_domain: self.config.trust_domain.clone(),
            cluster_id: self.config.cluster_id.clone(),
            service_account: pod.service_account.clone(),
            node: node.map(ToString::to_string).unwrap_or_default(),
            canonical_name: pod.canonical_name.clone(),
            canonical_revision: pod.canonical_revision.clone(),
            workload_type: pod.owner.kind.into(),
            workload_name: pod.owner.name.clone(),
            status: status(healthy).into(),
            draining: pod.ready && pod.terminating,
            services: self.services_of_pod(pod, healthy),
            authorization_policies: self.policies_of(&pod.name.namespace, &pod.labels),
            locality: node.and_then(|node| self.locality(node)),
            network_mode: mode.into(),
            shortcut: pod.node.as_deref() == Some(&*self.config.node_name) && self.network.leaves_alone(pod),
            ..Default::default()
        })
    }

    /// An endpoint that is no pod, for example the API server behind `kubernetes.default`. It is reached through its
    /// service only: HOST_NETWORK keeps it from being found by an address that may be a pod's or a node's too.
    pub(super) fn endpoint_workload(&self, name: &ObjectName, address: IpAddr) -> Option<proto::Workload> {
        let slice = self.slices.find(name)?;
        let is_it = |endpoint: &&Endpoint| matches!(&endpoint.target, Target::Addresses(all) if all.contains(&address));
        let endpoint = slice.endpoints.iter().find(is_it)?;
        Some(proto::Workload {
            uid: endpoint_uid(&self.config, name, address),
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
            addresses: vec![bytes(&address)],
            trust_domain: self.config.trust_domain.clone(),
            cluster_id: self.config.cluster_id.clone(),
            node: endpoint.node.clone(),
            canonical_name: name.name.to_string(),
            canonical_revision: "latest".to_owned(),
            workload_type: proto::WorkloadType::Pod.into(),
            workload_name: name.name.to_string(),
            status: status(endpoint.ready).into(),
            draining: endpoint.draining,
            locality: self.locality(&endpoint.node),
            services: self.ports_in(slice).into_iter().collect(),
            network_mode: proto::NetworkMode::HostNetwork.into(),
            ..Default::default()
        })
    }

    /// WDS has one health for a workload, slices have one per service. A healthy pod is left out of the services
    /// that do not call it ready; an unhealthy one stays in all, so that its flapping is one change, not two.
    fn services_of_pod(&self, pod: &Pod, healthy: bool) -> BTreeMap<String, proto::PortList> {
        let mut services: BTreeMap<String, proto::PortList> = BTreeMap::new();
        for slice in self.slices.of_pod(&pod.name) {
            let behind =
                slice.endpoints.iter().any(|endpoint| is_pod(endpoint, pod) && (endpoint.ready || !healthy));
            if let Some((service, ports)) = self.ports_in(slice).filter(|_| behind) {
                merge(services.entry(service).or_default(), ports);
            }
        }
        services.extend(self.services_of_entries(pod).0);
        services
    }

    /// The service of a slice, and where the slice's endpoints have its ports.
    fn ports_in(&self, slice: &Slice) -> Option<(String, proto::PortList)> {
        let service = self.services.get(&slice.service)?;
        let ports = service.ports.iter().filter_map(|port| {
            let (_, target) = slice.ports.iter().find(|(name, _)| *name == port.name)?;
            Some(wire_port(port.number, *target, port.protocol))
        });
        Some((service_key(&self.config, &slice.service), proto::PortList { ports: ports.collect() }))
    }

    pub(super) fn service(&self, name: &ObjectName) -> Option<proto::Service> {
        let service = self.services.get(name)?;
        Some(proto::Service {
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
            hostname: hostname(&self.config, name),
            addresses: addresses(service),
            ports: service
                .ports
                .iter()
                .map(|port| wire_port(port.number, port.target, port.protocol))
                .collect(),
            port_names: service
                .ports
                .iter()
                .filter(|port| !port.name.is_empty())
                .map(|port| (port.name.clone(), port.number.into()))
                .collect(),
            load_balancing: service.load_balancing.clone(),
            session_affinity_seconds: service.affinity_seconds,
            ip_families: service.families.into(),
            canonical: true,
            ..Default::default()
        })
    }
}

fn addresses(service: &Service) -> Vec<proto::NetworkAddress> {
    let wire = |ip| proto::NetworkAddress { address: bytes(ip), ..Default::default() };
    service.addresses.iter().map(wire).collect()
}

fn is_pod(endpoint: &Endpoint, pod: &Pod) -> bool {
    matches!(&endpoint.target, Target::Pod(name, uid)
        if *name == pod.name && uid.as_ref().is_none_or(|uid| *uid == pod.uid))
}

fn merge(into: &mut proto::PortList, ports: proto::PortList) {
    for port in ports.ports {
        if !into.ports.contains(&port) {
            into.ports.push(port);
        }
    }
    into.ports.sort_by_key(|port| (port.service_port, port.target_port));
}

pub(super) fn status(healthy: bool) -> proto::WorkloadStatus {
    if healthy { proto::WorkloadStatus::Healthy } else { proto::WorkloadStatus::Unhealthy }
}

pub(super) fn wire_port(number: u16, target: u16, protocol: proto::AppProtocol) -> proto::Port {
    proto::Port { service_port: number.into(), target_port: target.into(), app_protocol: protocol.into() }
}
