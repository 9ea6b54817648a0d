//! Services: host name, virtual addresses, ports and how to choose an endpoint.

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as api;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_core::proto::workload as proto;
use proto::load_balancing::{HealthPolicy, Mode, Scope};

use super::event::ObjectName;
use super::{Changes, Index, Invalid, Key, address, port};

/// What the model keeps of a Service.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Service {
    /// Virtual addresses; none for a headless service.
    pub(super) addresses: Vec<IpAddr>,
    /// Its TCP ports: nothing else is captured.
    pub(super) ports: Vec<Port>,
    pub(super) families: proto::IpFamilies,
    pub(super) load_balancing: Option<proto::LoadBalancing>,
    /// How long a client keeps its endpoint; 0: it does not.
    pub(super) affinity_seconds: u32,
}

/// One TCP port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    /// Empty when the service has one unnamed port; EndpointSlices refer to it.
    pub(super) name: String,
    pub(super) number: u16,
    /// 0: a named port, which each endpoint resolves for itself.
    pub(super) target: u16,
    pub(super) protocol: proto::AppProtocol,
}

impl Service {
    /// None for a service that only is an alias of a host elsewhere.
    fn read(object: &api::Service) -> Result<Option<Self>, Invalid> {
        let Some(spec) = &object.spec else { return Ok(None) };
        if spec.type_.as_deref() == Some("ExternalName") {
            return Ok(None);
        }
        Ok(Some(Self {
            addresses: addresses(object, spec)?,
            ports: spec
                .ports
                .iter()
                .flatten()
                .filter(|port| is_tcp(port))
                .map(Port::read)
                .collect::<Result<_, _>>()?,
            families: families(spec),
            load_balancing: load_balancing(spec),
            affinity_seconds: affinity_seconds(spec),
        }))
    }
}

impl Port {
    fn read(object: &api::ServicePort) -> Result<Self, Invalid> {
        let number = port("spec.ports.port", object.port)?;
        let target = match &object.target_port {
            Some(IntOrString::Int(0)) | None => number,
            Some(IntOrString::Int(target)) => port("spec.ports.targetPort", *target)?,
            Some(IntOrString::String(_)) => 0,
        };
        Ok(Self {
            name: object.name.clone().unwrap_or_default(),
            number,
            target,
            protocol: app_protocol(object),
        })
    }
}

/// Cluster addresses, and the load balancer's where kube-proxy would answer for them on the node (`ipMode: VIP`).
fn addresses(object: &api::Service, spec: &api::ServiceSpec) -> Result<Vec<IpAddr>, Invalid> {
    let mut found = Vec::new();
    let cluster = spec.cluster_ips.iter().flatten().chain(spec.cluster_ip.iter());
    for ip in cluster.filter(|ip| !ip.is_empty() && *ip != "None") {
        found.push(address("spec.clusterIPs", ip)?);
    }
    let balancer = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.into_iter().flat_map(|balancer| balancer.ingress.iter().flatten());
    for ip in
        ingress.filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip.as_ref())
    {
        found.push(address("status.loadBalancer.ingress", ip)?);
    }
    let mut seen = std::collections::HashSet::new();
    found.retain(|ip| seen.insert(*ip));
    Ok(found)
}

fn is_tcp(port: &api::ServicePort) -> bool {
    port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP")
}

fn app_protocol(port: &api::ServicePort) -> proto::AppProtocol {
    match port.app_protocol.as_deref().unwrap_or_default().to_ascii_lowercase().as_str() {
        "http" => proto::AppProtocol::Http11,
        "http2" | "kubernetes.io/h2c" => proto::AppProtocol::Http2,
        "grpc" => proto::AppProtocol::Grpc,
        "tcp" => proto::AppProtocol::Tcp,
        "https" | "tls" => proto::AppProtocol::Tls,
        _ => proto::AppProtocol::Unknown,
    }
}

fn families(spec: &api::ServiceSpec) -> proto::IpFamilies {
    let families = spec.ip_families.iter().flatten().map(String::as_str);
    match families.fold((false, false), |(v4, v6), family| (v4 || family == "IPv4", v6 || family == "IPv6")) {
        (true, true) => proto::IpFamilies::Dual,
        (true, false) => proto::IpFamilies::Ipv4Only,
        (false, true) => proto::IpFamilies::Ipv6Only,
        (false, false) => proto::IpFamilies::Automatic,
    }
}

/// `sessionAffinity: ClientIP`, for three hours unless the service says how long (the API's default).
fn affinity_seconds(spec: &api::ServiceSpec) -> u32 {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return 0;
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    config.and_then(|config| config.timeout_seconds?.try_into().ok()).unwrap_or(10_800)
}

/// As istiod maps it: `internalTrafficPolicy` first, then `trafficDistribution`.
fn load_balancing(spec: &api::ServiceSpec) -> Option<proto::LoadBalancing> {
    let (mode, scopes): (Mode, &[Scope]) =
        match (spec.internal_traffic_policy.as_deref(), spec.traffic_distribution.as_deref()) {
            (Some("Local"), _) => (Mode::Strict, &[Scope::Node]),
            (_, preferred) => distribution(preferred).unwrap_or((Mode::UnspecifiedMode, &[])),
        };
    let unready = spec.publish_not_ready_addresses.unwrap_or_default();
    if mode == Mode::UnspecifiedMode && !unready {
        return None;
    }
    let health = if unready { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    Some(proto::LoadBalancing {
        routing_preference: scopes.iter().map(|scope| i32::from(*scope)).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}

/// `trafficDistribution`; none: anywhere.
pub(super) fn distribution(preferred: Option<&str>) -> Option<(Mode, &'static [Scope])> {
    match preferred? {
        "PreferClose" | "PreferSameZone" => {
            Some((Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone]))
        }
        "PreferSameNode" => {
            Some((Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node]))
        }
        _ => None,
    }
}

impl Index {
    pub(super) fn apply_service(
        &mut self,
        name: &ObjectName,
        object: &api::Service,
        changes: &mut Changes,
    ) -> Result<(), Invalid> {
        let Some(service) = Service::read(object)? else {
            self.delete_service(name, changes);
            return Ok(());
        };
        let selector = object.spec.as_ref().and_then(|spec| spec.selector.clone());
        let before = self.services.insert(name.clone(), service.clone());
        if before.as_ref() == Some(&service) && !self.is_other_selector(name, selector.as_ref()) {
            return Ok(());
        }
        changes.keys.insert(Key::Service(name.clone()));
        if before.is_none_or(|before| before.ports != service.ports) {
            changes.keys.extend(self.slices.endpoints_of_service(name));
        }
        self.service_selects(name, selector, changes);
        Ok(())
    }

    pub(super) fn delete_service(&mut self, name: &ObjectName, changes: &mut Changes) {
        if self.services.remove(name).is_some() {
            changes.keys.insert(Key::Service(name.clone()));
            changes.keys.extend(self.slices.endpoints_of_service(name));
            self.service_selects(name, None, changes);
        }
    }
}
