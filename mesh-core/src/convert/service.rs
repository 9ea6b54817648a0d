//! `istio.workload.Service` to [`Service`].

use std::time::Duration;

use ipnet::IpNet;

use super::{InvalidPart, Names, gateway, ip, known, optional_port, port, required};
use crate::addr::NetworkAddress;
use crate::proto::workload as wire;
use crate::service::{Balancing, Families, Gateway, Mode, Scope, Service, ServiceName, ServicePort, Vip};
use crate::store::Claims;

/// Why a service resource is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidService {
    /// A field that other messages have too.
    #[error(transparent)]
    Part(#[from] InvalidPart),
    /// `UNSPECIFIED_SCOPE` in the routing preference.
    #[error("routing_preference has an unspecified scope")]
    UnspecifiedScope,
}

/// Converts a service.
///
/// # Errors
/// When a field is invalid; the resource is to be refused as a whole.
pub fn convert(message: &wire::Service, names: &mut Names) -> Result<Service, InvalidService> {
    let key = ServiceName {
        namespace: names.share(required("namespace", &message.namespace)?),
        hostname: names.share(required("hostname", &message.hostname)?),
    };
    Ok(Service {
        key,
        name: message.name.as_str().into(),
        vips: message.addresses.iter().map(|a| vip(a, names)).collect::<Result<_, _>>()?,
        ports: message.ports.iter().map(service_port).collect::<Result<_, _>>()?,
        port_names: message
            .port_names
            .iter()
            .map(|(name, number)| Ok((names.share(name), port("port_names", *number)?)))
            .collect::<Result<_, InvalidPart>>()?,
        // A name that is no SPIFFE identity can never be proved: leaving it out accepts nothing more.
        identities: message.subject_alt_names.iter().filter_map(|name| name.parse().ok()).collect(),
        waypoints: waypoints(message, names)?,
        balancing: balancing(message.load_balancing.as_ref())?,
        families: families(message.ip_families)?,
        canonical: message.canonical,
        created: message.created,
        // Unknown values count as PUBLIC, as in Istio.
        namespace_only: message.visibility == wire::Visibility::Namespace as i32,
        affinity: match message.session_affinity_seconds {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.into())),
        },
    })
}

/// What a service that was refused lays claim to.
pub fn claims(message: &wire::Service, names: &mut Names) -> Claims {
    let mut claims = Claims::default();
    for address in &message.addresses {
        // Of a prefix whose length makes no sense the address is left.
        let alone = wire::NetworkAddress { length: None, ..address.clone() };
        match vip(address, names).or_else(|_| vip(&alone, names)) {
            Ok(vip) => claims.addresses.push(vip),
            Err(_) => claims.unreadable = true,
        }
    }
    claims
}

fn vip(message: &wire::NetworkAddress, names: &mut Names) -> Result<Vip, InvalidPart> {
    let network = names.share(&message.network).into();
    let address = ip(&message.address)?;
    let whole = if address.is_ipv4() { 32 } else { 128 };
    match message.length.unwrap_or(whole) {
        length if length == whole => Ok(Vip::Address(NetworkAddress::new(network, address))),
        length => {
            let invalid = || InvalidPart::PrefixLength { address, length };
            let bits = u8::try_from(length).map_err(|_| invalid())?;
            let prefix = IpNet::new(address, bits).map_err(|_| invalid())?;
            Ok(Vip::Prefix(network, prefix.trunc()))
        }
    }
}

fn service_port(message: &wire::Port) -> Result<ServicePort, InvalidPart> {
    Ok(ServicePort {
        port: port("service_port", message.service_port)?,
        target: optional_port("target_port", message.target_port)?,
    })
}

/// The weighted list, or the single waypoint where that is empty or all its weights are zero.
fn waypoints(message: &wire::Service, names: &mut Names) -> Result<Box<[(Gateway, u32)]>, InvalidPart> {
    let weighted = message
        .weighted_waypoints
        .iter()
        .filter(|entry| entry.weight > 0)
        .map(|entry| {
            let destination = entry.destination.as_ref().ok_or(InvalidPart::NoDestination)?;
            Ok((gateway(destination, names)?, entry.weight))
        })
        .collect::<Result<Vec<_>, InvalidPart>>()?;
    if !weighted.is_empty() {
        return Ok(weighted.into());
    }
    let single = message.waypoint.as_ref().map(|waypoint| gateway(waypoint, names)).transpose()?;
    Ok(single.into_iter().map(|waypoint| (waypoint, 1)).collect())
}

fn balancing(message: Option<&wire::LoadBalancing>) -> Result<Balancing, InvalidService> {
    use wire::load_balancing as lb;
    let Some(message) = message else { return Ok(Balancing::default()) };
    let scopes = message.routing_preference.iter().map(|value| scope(*value)).collect::<Result<_, _>>()?;
    let mode = match known("load_balancing.mode", message.mode)? {
        lb::Mode::UnspecifiedMode => Mode::Any,
        lb::Mode::Strict => Mode::Strict,
        lb::Mode::Failover => Mode::Failover,
        lb::Mode::Passthrough => Mode::Passthrough,
    };
    let policy: lb::HealthPolicy = known("load_balancing.health_policy", message.health_policy)?;
    Ok(Balancing { mode, scopes, allow_unhealthy: policy == lb::HealthPolicy::AllowAll })
}

fn scope(value: i32) -> Result<Scope, InvalidService> {
    use wire::load_balancing::Scope as Wire;
    match known("routing_preference", value)? {
        Wire::UnspecifiedScope => Err(InvalidService::UnspecifiedScope),
        Wire::Region => Ok(Scope::Region),
        Wire::Zone => Ok(Scope::Zone),
        Wire::Subzone => Ok(Scope::Subzone),
        Wire::Node => Ok(Scope::Node),
        Wire::Cluster => Ok(Scope::Cluster),
        Wire::Network => Ok(Scope::Network),
    }
}

fn families(value: i32) -> Result<Families, InvalidPart> {
    Ok(match known("ip_families", value)? {
        wire::IpFamilies::Automatic | wire::IpFamilies::Dual => Families::Any,
        wire::IpFamilies::Ipv4Only => Families::V4Only,
        wire::IpFamilies::Ipv6Only => Families::V6Only,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(bytes: &[u8], length: Option<u32>) -> wire::NetworkAddress {
        wire::NetworkAddress { network: String::new(), address: bytes.to_vec(), length }
    }

    fn minimal() -> wire::Service {
        wire::Service {
            name: "web".into(),
            namespace: "shop".into(),
            hostname: "web.shop.svc.cluster.local".into(),
            addresses: vec![address(&[10, 96, 0, 7], None)],
            ports: vec![wire::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
            ..Default::default()
        }
    }

    fn named(hostname: &str) -> wire::GatewayAddress {
        let name = wire::NamespacedHostname { namespace: "shop".into(), hostname: hostname.into() };
        wire::GatewayAddress {
            destination: Some(wire::gateway_address::Destination::Hostname(name)),
            hbone_mtls_port: 0,
        }
    }

    #[test]
    fn plain_service() {
        let service = convert(&minimal(), &mut Names::default()).unwrap();
        assert_eq!(service.key.to_string(), "shop/web.shop.svc.cluster.local");
        assert_eq!(service.port(80), Some(ServicePort { port: 80, target: Some(8080) }));
        assert_eq!(service.port(81), None);
        assert!(matches!(&service.vips[0], Vip::Address(vip) if vip.to_string() == "/10.96.0.7"));
    }

    #[test]
    fn prefixes_and_waypoints() {
        let mut message = minimal();
        message.addresses = vec![address(&[10, 1, 2, 3], Some(16)), address(&[10, 1, 2, 3], Some(32))];
        message.waypoint = Some(named("single"));
        message.weighted_waypoints =
            vec![wire::WeightedWaypoint { destination: Some(named("w")), weight: 0 }];
        let service = convert(&message, &mut Names::default()).unwrap();
        assert!(matches!(&service.vips[0], Vip::Prefix(_, prefix) if prefix.to_string() == "10.1.0.0/16"));
        assert!(matches!(service.vips[1], Vip::Address(_)));
        assert_eq!(service.waypoints[0].0.destination.to_string(), "shop/single");
        message.weighted_waypoints[0].weight = 3;
        let service = convert(&message, &mut Names::default()).unwrap();
        assert_eq!(service.waypoints[0].0.destination.to_string(), "shop/w");
        assert_eq!(service.waypoints[0].1, 3);
    }

    #[test]
    fn scopes_are_those_of_the_wire() {
        // Numbers of the field, as Istio's workload.proto has them.
        let routing_preference = vec![1, 2, 3, 4, 5, 6];
        let load_balancing = Some(wire::LoadBalancing { routing_preference, mode: 2, health_policy: 0 });
        let service = convert(&wire::Service { load_balancing, ..minimal() }, &mut Names::default()).unwrap();
        let names: Vec<&str> = service.balancing.scopes.iter().map(|scope| scope.as_str()).collect();
        assert_eq!(names, ["region", "zone", "subzone", "node", "cluster", "network"]);
        assert_eq!(service.balancing.mode, Mode::Failover);
    }

    #[test]
    fn bad_fields_refuse_the_resource() {
        type Break = fn(&mut wire::Service);
        let cases: [(&str, Break, &str); 7] = [
            ("no host", |s| s.hostname.clear(), "hostname is empty"),
            ("no namespace", |s| s.namespace.clear(), "namespace is empty"),
            ("port", |s| s.ports[0].service_port = 0, "service_port 0 is no port"),
            ("length", |s| s.addresses[0].length = Some(33), "prefix length 33 of 10.96.0.7"),
            ("address", |s| s.addresses[0].address = vec![1], "an address of 1 bytes"),
            (
                "scope",
                |s| {
                    s.load_balancing =
                        Some(wire::LoadBalancing { routing_preference: vec![0], mode: 2, health_policy: 0 });
                },
                "unspecified scope",
            ),
            (
                "mode",
                |s| {
                    s.load_balancing =
                        Some(wire::LoadBalancing { routing_preference: vec![], mode: 7, health_policy: 0 });
                },
                "load_balancing.mode has the unknown value 7",
            ),
        ];
        for (what, damage, expect) in cases {
            let mut message = minimal();
            damage(&mut message);
            let error = convert(&message, &mut Names::default()).unwrap_err().to_string();
            assert!(error.contains(expect), "{what}: {error}");
        }
    }
}
