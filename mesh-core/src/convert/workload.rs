//! `istio.workload.Workload` to [`Workload`].

use std::collections::HashSet;

use super::{InvalidPart, Names, gateway, ip, known, optional_port, or_default, port, required};
use crate::addr::NetworkAddress;
use crate::identity::InvalidIdentity;
use crate::proto::workload as wire;
use crate::service::{ServiceName, Vip};
use crate::store::Claims;
use crate::workload::{
    ApplicationTunnel, Health, Locality, Membership, Tunnel, Workload, WorkloadType, WorkloadUid,
};

/// Why a workload resource is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWorkload {
    /// A field that other messages have too.
    #[error(transparent)]
    Part(#[from] InvalidPart),
    /// Trust domain, namespace or service account.
    #[error("its identity is invalid: {0}")]
    Identity(#[from] InvalidIdentity),
    /// A key of `services`.
    #[error("service key {0:?} is not <namespace>/<hostname>")]
    ServiceKey(String),
    /// Istio's old sidecar protocol.
    #[error("tunnel protocol LEGACY_ISTIO_MTLS is not supported")]
    LegacyTunnel,
}

/// Converts a workload.
///
/// # Errors
/// When a field is invalid; the resource is to be refused as a whole.
pub fn convert(message: &wire::Workload, names: &mut Names) -> Result<Workload, InvalidWorkload> {
    let uid = WorkloadUid::from(required("uid", &message.uid)?);
    let account = or_default(&message.service_account, "default");
    let trust_domain = or_default(&message.trust_domain, "cluster.local");
    let mut addresses = message.addresses.iter().map(|bytes| ip(bytes)).collect::<Result<Vec<_>, _>>()?;
    let mut seen = HashSet::new();
    addresses.retain(|address| seen.insert(*address));
    let services = message
        .services
        .iter()
        .map(|(key, ports)| membership(key, ports, names))
        .collect::<Result<Vec<_>, _>>()?;
    let network_mode: wire::NetworkMode = known("network_mode", message.network_mode)?;
    Ok(Workload {
        identity: names.identity(trust_domain, &message.namespace, account)?,
        name: message.name.as_str().into(),
        namespace: names.share(&message.namespace),
        addresses: addresses.into(),
        network: names.share(&message.network).into(),
        tunnel: tunnel(message.tunnel_protocol)?,
        waypoint: message.waypoint.as_ref().map(|waypoint| gateway(waypoint, names)).transpose()?,
        node: names.share(&message.node),
        canonical_name: names.share(&message.canonical_name),
        canonical_revision: names.share(&message.canonical_revision),
        workload_name: names.share(&message.workload_name),
        workload_type: workload_type(message.workload_type)?,
        authorization_policies: message.authorization_policies.iter().map(|name| names.share(name)).collect(),
        health: health(message)?,
        cluster: names.share(or_default(&message.cluster_id, "Kubernetes")),
        network_gateway: message.network_gateway.as_ref().map(|g| gateway(g, names)).transpose()?,
        hostname: names.share(&message.hostname),
        services: services.into(),
        application_tunnel: message.application_tunnel.map(application_tunnel).transpose()?,
        locality: locality(message.locality.as_ref(), names),
        host_network: network_mode == wire::NetworkMode::HostNetwork,
        capacity: message.capacity.unwrap_or(1),
        shortcut: message.shortcut,
        uid,
    })
}

/// What a workload that was refused lays claim to. One that shares its node's network has no address of its own.
pub fn claims(message: &wire::Workload, names: &mut Names) -> Claims {
    if message.network_mode == wire::NetworkMode::HostNetwork as i32 {
        return Claims::default();
    }
    let mut claims = Claims::default();
    for bytes in &message.addresses {
        match ip(bytes) {
            Ok(address) => {
                let network = names.share(&message.network).into();
                claims.addresses.push(Vip::Address(NetworkAddress::new(network, address)));
            }
            Err(_) => claims.unreadable = true,
        }
    }
    claims
}

/// The owner kind behind a WDS number.
///
/// # Errors
/// When the number is unknown.
pub fn workload_type(value: i32) -> Result<WorkloadType, InvalidPart> {
    Ok(match known("workload_type", value)? {
        wire::WorkloadType::Deployment => WorkloadType::Deployment,
        wire::WorkloadType::Cronjob => WorkloadType::CronJob,
        wire::WorkloadType::Pod => WorkloadType::Pod,
        wire::WorkloadType::Job => WorkloadType::Job,
    })
}

fn tunnel(value: i32) -> Result<Tunnel, InvalidWorkload> {
    match known("tunnel_protocol", value)? {
        wire::TunnelProtocol::None => Ok(Tunnel::Plain),
        wire::TunnelProtocol::Hbone => Ok(Tunnel::Hbone),
        wire::TunnelProtocol::LegacyIstioMtls => Err(InvalidWorkload::LegacyTunnel),
    }
}

fn health(message: &wire::Workload) -> Result<Health, InvalidPart> {
    Ok(match known("status", message.status)? {
        wire::WorkloadStatus::Healthy => Health::Healthy,
        wire::WorkloadStatus::Unhealthy if message.draining => Health::Draining,
        wire::WorkloadStatus::Unhealthy => Health::Unhealthy,
    })
}

fn membership(key: &str, ports: &wire::PortList, names: &mut Names) -> Result<Membership, InvalidWorkload> {
    let (namespace, hostname) = key
        .split_once('/')
        .filter(|(namespace, hostname)| !namespace.is_empty() && !hostname.is_empty())
        .ok_or_else(|| InvalidWorkload::ServiceKey(key.to_owned()))?;
    // A target port of 0 says nothing about this endpoint: the service's own target holds.
    let ports = ports
        .ports
        .iter()
        .filter(|entry| entry.target_port != 0)
        .map(|entry| Ok((port("service_port", entry.service_port)?, port("target_port", entry.target_port)?)))
        .collect::<Result<Vec<_>, InvalidPart>>()?;
    let service = ServiceName { namespace: names.share(namespace), hostname: names.share(hostname) };
    Ok(Membership { service, ports: ports.into() })
}

fn application_tunnel(message: wire::ApplicationTunnel) -> Result<ApplicationTunnel, InvalidPart> {
    use wire::application_tunnel::Protocol;
    let protocol: Protocol = known("application_tunnel.protocol", message.protocol)?;
    Ok(ApplicationTunnel {
        proxy_protocol: protocol == Protocol::Proxy,
        port: optional_port("application_tunnel.port", message.port)?,
    })
}

fn locality(message: Option<&wire::Locality>, names: &mut Names) -> Locality {
    message.map_or_else(Locality::default, |message| Locality {
        region: names.share(&message.region),
        zone: names.share(&message.zone),
        subzone: names.share(&message.subzone),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn minimal() -> wire::Workload {
        wire::Workload {
            uid: "Kubernetes//Pod/shop/web-1".into(),
            name: "web-1".into(),
            namespace: "shop".into(),
            addresses: vec![vec![10, 0, 0, 7]],
            ..Default::default()
        }
    }

    fn port_list(service_port: u32, target_port: u32) -> wire::PortList {
        wire::PortList { ports: vec![wire::Port { service_port, target_port, app_protocol: 0 }] }
    }

    #[test]
    fn defaults_are_those_of_the_protocol() {
        let workload = convert(&minimal(), &mut Names::default()).unwrap();
        assert_eq!(workload.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/default");
        assert_eq!(&*workload.cluster, "Kubernetes");
        assert_eq!(
            (workload.capacity, workload.tunnel, workload.health),
            (1, Tunnel::Plain, Health::Healthy)
        );
        assert!(!workload.host_network && !workload.shortcut && workload.waypoint.is_none());
    }

    #[test]
    fn each_address_once_and_in_one_form() {
        let v6 = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec();
        let addresses = vec![vec![10, 0, 0, 7], v6("fd00::7"), v6("::ffff:10.0.0.7"), v6("fd00::7")];
        let workload = convert(&wire::Workload { addresses, ..minimal() }, &mut Names::default()).unwrap();
        let addresses: Vec<String> = workload.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.0.0.7", "fd00::7"]);
    }

    #[test]
    fn bad_fields_refuse_the_resource() {
        type Break = fn(&mut wire::Workload);
        let cases: [(&str, Break, &str); 10] = [
            ("no uid", |w| w.uid.clear(), "uid is empty"),
            ("address", |w| w.addresses.push(vec![1, 2, 3]), "an address of 3 bytes"),
            ("enum", |w| w.status = 9, "status has the unknown value 9"),
            ("legacy", |w| w.tunnel_protocol = 2, "LEGACY_ISTIO_MTLS"),
            ("mode", |w| w.network_mode = 5, "network_mode has the unknown value 5"),
            ("identity", |w| w.namespace = "a/b".into(), "namespace \"a/b\""),
            ("no namespace", |w| w.namespace.clear(), "namespace \"\""),
            (
                "key",
                |w| w.services = BTreeMap::from([("web".into(), port_list(80, 80))]),
                "service key \"web\"",
            ),
            (
                "port",
                |w| w.services = BTreeMap::from([("a/b".into(), port_list(80, 70_000))]),
                "target_port 70000 is no port",
            ),
            (
                "waypoint",
                |w| w.waypoint = Some(wire::GatewayAddress::default()),
                "a gateway without destination",
            ),
        ];
        for (what, damage, expect) in cases {
            let mut message = minimal();
            damage(&mut message);
            let error = convert(&message, &mut Names::default()).unwrap_err().to_string();
            assert!(error.contains(expect), "{what}: {error}");
        }
    }

    #[test]
    fn a_target_port_of_zero_leaves_the_services_own() {
        let mut message = minimal();
        message.services = BTreeMap::from([("shop/web".into(), port_list(80, 0))]);
        let workload = convert(&message, &mut Names::default()).unwrap();
        assert!(workload.services[0].ports.is_empty());
    }

    #[test]
    fn equal_names_share_memory_until_nothing_uses_them() {
        let mut names = Names::default();
        let one = convert(&minimal(), &mut names).unwrap();
        let two = convert(&minimal(), &mut names).unwrap();
        assert!(std::sync::Arc::ptr_eq(&one.namespace, &two.namespace));
        for i in 0..5000 {
            names.share(&i.to_string());
        }
        names.prune();
        assert!(names.strings.len() < 50, "{}", names.strings.len());
        assert!(std::sync::Arc::ptr_eq(&one.namespace, &names.share("shop")));
    }
}
