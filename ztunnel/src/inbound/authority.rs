//! What a CONNECT may ask for: the authority against the pod that it arrived at; no I/O.
//!
//! **Invariant:** the target is always the pod itself; an authority never makes the proxy dial elsewhere.

use std::net::IpAddr;

use mesh_core::addr::{HBONE_PORT, Target};
use mesh_core::hbone::{ConnectRequest, Host};
use mesh_core::store::Reader;
use mesh_core::workload::Workload;

/// Why a CONNECT is refused before policy is asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// An address that is none of the pod's.
    #[error("authority {asked} names another address than this pod's, {local}")]
    OtherAddress {
        /// As asked.
        asked: IpAddr,
        /// Where the connection arrived.
        local: IpAddr,
    },
    /// A host name that is no service of the pod's, or without that port.
    #[error("authority {0:?} is no service of this pod, or has no such port")]
    UnknownService(String),
    /// The tunnel's own port would be a loop.
    #[error("port {0} is the tunnel's own")]
    IllegalPort(u16),
    /// The caller meant another workload: addresses are reused.
    #[error("the caller means workload {expected}, but this is {actual}")]
    OtherWorkload {
        /// `ambit-workload-uid` of the request.
        expected: String,
        /// Whose address it is now.
        actual: String,
    },
    /// The pod wants a PROXY header in front.
    #[error("this pod has an application tunnel, which is not supported yet")]
    ApplicationTunnel,
}

impl Refusal {
    /// The reply that Istio's ztunnel gives in the same case.
    pub fn status(&self) -> http::StatusCode {
        match self {
            Self::OtherAddress { .. } => http::StatusCode::BAD_REQUEST,
            // 421: the request is fine but came to the wrong workload.
            Self::OtherWorkload { .. } => http::StatusCode::MISDIRECTED_REQUEST,
            Self::UnknownService(_) | Self::IllegalPort(_) | Self::ApplicationTunnel => {
                http::StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }
}

/// Decides what to dial. `local` is the address that the connection arrived at, `pod` the workload whose listener
/// accepted it.
///
/// # Errors
/// When the request has to be refused.
pub fn check(
    request: &ConnectRequest,
    local: IpAddr,
    pod: &Workload,
    mesh: &Reader,
) -> Result<Target, Refusal> {
    if let Some(expected) = &request.workload_uid
        && expected != pod.uid.as_str()
    {
        return Err(Refusal::OtherWorkload { expected: expected.clone(), actual: pod.uid.to_string() });
    }
    if pod.application_tunnel.is_some() {
        return Err(Refusal::ApplicationTunnel);
    }
    let port = request.authority.port;
    let target = match &request.authority.host {
        Host::Address(asked) => Target::from((own_address(*asked, local, pod)?, port)),
        Host::Name(hostname) => {
            let port = service_port(mesh, pod, hostname, port)
                .ok_or_else(|| Refusal::UnknownService(request.authority.to_string()))?;
            Target::from((local, port))
        }
    };
    if target.port() == HBONE_PORT {
        return Err(Refusal::IllegalPort(HBONE_PORT));
    }
    Ok(target)
}

/// The address asked for, if it is the one that the tunnel arrived at or another of the pod's: a tunnel over IPv4 may
/// carry a connection to its IPv6 address.
fn own_address(asked: IpAddr, local: IpAddr, pod: &Workload) -> Result<IpAddr, Refusal> {
    let asked = asked.to_canonical();
    let own = asked == local || pod.addresses.contains(&asked);
    own.then_some(asked).ok_or(Refusal::OtherAddress { asked, local })
}

/// The pod's own port for a port of a service that it is a part of.
fn service_port(mesh: &Reader, workload: &Workload, hostname: &str, port: u16) -> Option<u16> {
    let service = mesh.service_named(hostname, &workload.namespace)?;
    let membership = workload.services.iter().find(|member| member.service == service.service.key)?;
    let entry = service.service.port(port)?;
    let own = membership.ports.iter().find(|(service_port, _)| *service_port == port);
    own.map(|(_, target)| *target).or(entry.target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::convert::Names;
    use mesh_core::proto::workload as wire;
    use mesh_core::store;

    const UID: &str = "c//Pod/shop/web";

    fn wire_pod() -> wire::Workload {
        let port = |service_port, target_port| wire::Port { service_port, target_port, app_protocol: 0 };
        wire::Workload {
            uid: UID.into(),
            name: "web".into(),
            namespace: "shop".into(),
            addresses: vec![
                vec![10, 0, 0, 2],
                "fd00::2".parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec(),
            ],
            services: [
                ("shop/web.local".to_owned(), wire::PortList { ports: vec![port(81, 9091)] }),
                ("shop/gone.local".to_owned(), wire::PortList::default()),
            ]
            .into(),
            ..Default::default()
        }
    }

    fn world(workload: wire::Workload) -> (Reader, Workload) {
        let (mut writer, reader) = store::new();
        let mut names = Names::default();
        let port = |service_port, target_port| wire::Port { service_port, target_port, app_protocol: 0 };
        for hostname in ["web.local", "foreign.local"] {
            let service = wire::Service {
                namespace: "shop".into(),
                hostname: hostname.into(),
                ports: vec![port(80, 8080), port(81, 0), port(82, 0)],
                ..Default::default()
            };
            writer.put_service(mesh_core::convert::service::convert(&service, &mut names).unwrap());
        }
        let pod = mesh_core::convert::workload::convert(&workload, &mut names).unwrap();
        writer.put_workload(pod.clone());
        writer.commit();
        (reader, pod)
    }

    fn ask(authority: &str, workload_uid: Option<&str>) -> Result<Target, Refusal> {
        ask_at("10.0.0.2", authority, workload_uid)
    }

    fn ask_at(local: &str, authority: &str, workload_uid: Option<&str>) -> Result<Target, Refusal> {
        let (reader, pod) = world(wire_pod());
        let mut request = ConnectRequest::new(authority.parse().unwrap());
        request.workload_uid = workload_uid.map(str::to_owned);
        check(&request, local.parse().unwrap(), &pod, &reader)
    }

    #[test]
    fn every_address_of_the_pod_is_its_own() {
        for (local, authority, expect) in [
            ("fd00::2", "[fd00::2]:8080", Some("[fd00::2]:8080")),
            ("fd00::2", "[FD00:0::2]:8080", Some("[fd00::2]:8080")),
            ("fd00::2", "10.0.0.2:8080", Some("10.0.0.2:8080")),
            ("10.0.0.2", "[fd00::2]:8080", Some("[fd00::2]:8080")),
            ("fd00::2", "web.local:80", Some("[fd00::2]:8080")),
            // The mesh may know less of a new pod than the network does.
            ("fd00::7", "[fd00::7]:8080", Some("[fd00::7]:8080")),
            ("fd00::2", "[fd00::3]:8080", None),
            ("fd00::2", "[::1]:8080", None),
            ("fd00::2", "127.0.0.1:8080", None),
        ] {
            let target = ask_at(local, authority, None).ok().map(|target| target.to_string());
            assert_eq!(target.as_deref(), expect, "{authority} at {local}");
        }
    }

    #[test]
    fn accepted() {
        for (authority, uid, target) in [
            ("10.0.0.2:8080", None, "10.0.0.2:8080"),
            ("10.0.0.2:8080", Some(UID), "10.0.0.2:8080"),
            ("[::ffff:10.0.0.2]:8080", None, "10.0.0.2:8080"),
            ("10.0.0.2:15020", None, "10.0.0.2:15020"),
            ("web.local:80", None, "10.0.0.2:8080"),
            ("web.local:81", None, "10.0.0.2:9091"),
        ] {
            assert_eq!(ask(authority, uid).unwrap().to_string(), target, "{authority}");
        }
    }

    #[test]
    fn refused() {
        for (authority, uid, status, expect) in [
            ("10.0.0.3:80", None, 400, "names another address than this pod's, 10.0.0.2"),
            ("127.0.0.1:80", None, 400, "names another address"),
            ("10.0.0.2:15008", None, 503, "port 15008 is the tunnel's own"),
            ("unknown.local:80", None, 503, "is no service of this pod"),
            ("foreign.local:80", None, 503, "is no service of this pod"),
            ("gone.local:80", None, 503, "is no service of this pod"),
            ("web.local:83", None, 503, "has no such port"),
            ("web.local:82", None, 503, "has no such port"),
            ("10.0.0.2:80", Some("c//Pod/shop/old"), 421, "the caller means workload c//Pod/shop/old"),
            ("10.0.0.2:80", Some(""), 421, "the caller means workload"),
        ] {
            let refusal = ask(authority, uid).unwrap_err();
            assert_eq!(refusal.status(), status, "{authority}");
            assert!(refusal.to_string().contains(expect), "{authority}: {refusal}");
        }
    }

    #[test]
    fn application_tunnels_are_refused_for_now() {
        let tunnel = wire::ApplicationTunnel { protocol: 1, port: 15088 };
        let (reader, pod) = world(wire::Workload { application_tunnel: Some(tunnel), ..wire_pod() });
        let request = ConnectRequest::new("10.0.0.2:80".parse().unwrap());
        let refusal = check(&request, "10.0.0.2".parse().unwrap(), &pod, &reader).unwrap_err();
        assert_eq!(refusal, Refusal::ApplicationTunnel);
    }
}
