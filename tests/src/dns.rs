//! The cluster's DNS: A and AAAA records of Services and of the pods behind headless ones, and one name of the outside
//! world.
//! Everything else does not exist. One server, in the router's namespace, behind a Service as in a cluster.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;

use anyhow::Context as _;
use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::cluster::{Cluster, Kind};
use crate::fabric;
use crate::netns::Netns;
use crate::stack::{Family, Stack};

const DOMAIN: &str = "cluster.local";
const TTL: u32 = 5;

/// The Service's address, the nameserver of every pod.
#[must_use]
pub fn service(family: Family) -> IpAddr {
    fabric::service_address(family, 10)
}

/// The sockets of one family, made in the router's namespace.
pub struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Sockets {
    pub fn bind(router: &Netns, family: Family) -> anyhow::Result<Self> {
        router.run(|| {
            let address = SocketAddr::from((fabric::control(family), 53));
            let udp = UdpSocket::bind(address).context("bind the DNS server")?;
            let tcp = TcpListener::bind(address).context("bind the DNS server")?;
            udp.set_nonblocking(true)?;
            tcp.set_nonblocking(true)?;
            Ok(Self { udp, tcp })
        })
    }
}

/// Answer for ever. `stack` has the families that the outside can be reached by.
pub async fn run(sockets: Sockets, cluster: Arc<Cluster>, stack: Stack) -> anyhow::Result<()> {
    let udp = tokio::net::UdpSocket::from_std(sockets.udp)?;
    let tcp = tokio::net::TcpListener::from_std(sockets.tcp)?;
    let mut buffer = [0; 4096];
    loop {
        tokio::select! {
            received = udp.recv_from(&mut buffer) => {
                let Ok((length, from)) = received else { continue };
                if let Some(reply) = answer(&cluster, stack, &buffer[..length]) {
                    // The client asks again if this is lost.
                    let _ = udp.send_to(&reply, from).await;
                }
            }
            accepted = tcp.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                tokio::spawn(serve(stream, cluster.clone(), stack));
            }
        }
    }
}

/// Questions over one TCP connection, each after its length (RFC 1035, section 4.2.2).
async fn serve(
    mut stream: tokio::net::TcpStream,
    cluster: Arc<Cluster>,
    stack: Stack,
) -> std::io::Result<()> {
    loop {
        let mut question = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut question).await?;
        let Some(reply) = answer(&cluster, stack, &question) else { return Ok(()) };
        let length = u16::try_from(reply.len()).unwrap_or(u16::MAX);
        stream.write_u16(length).await?;
        stream.write_all(&reply[..usize::from(length)]).await?;
    }
}

fn answer(cluster: &Cluster, stack: Stack, bytes: &[u8]) -> Option<Vec<u8>> {
    let question = Message::from_vec(bytes).ok()?;
    let names =
        Names { services: &cluster.list(Kind::Service), slices: &cluster.list(Kind::EndpointSlice), stack };
    names.reply(&question)?.to_vec().ok()
}

/// What names are made of.
struct Names<'a> {
    services: &'a [Service],
    slices: &'a [EndpointSlice],
    stack: Stack,
}

impl Names<'_> {
    /// No question, no reply.
    fn reply(&self, question: &Message) -> Option<Message> {
        let query = question.queries.first()?.clone();
        let name = query.name().clone();
        let mut reply = Message::response(question.metadata.id, question.metadata.op_code);
        debug_assert_eq!(reply.metadata.message_type, MessageType::Response);
        reply.metadata.recursion_desired = question.metadata.recursion_desired;
        reply.metadata.recursion_available = true;
        reply.metadata.authoritative = true;
        match self.resolve(&name) {
            None => reply.metadata.response_code = ResponseCode::NXDomain,
            // A name that exists may have no such record.
            Some(addresses) => {
                let data = addresses.into_iter().filter_map(|address| record(address, query.query_type()));
                reply.answers.extend(data.map(|data| Record::from_rdata(name.clone(), TTL, data)));
            }
        }
        reply.queries.push(query);
        Some(reply)
    }

    /// The addresses of a name, `None` if there is no such name.
    fn resolve(&self, name: &Name) -> Option<Vec<IpAddr>> {
        let name = name.to_lowercase().to_utf8();
        let name = name.trim_end_matches('.');
        if name == fabric::OUTSIDE_NAME {
            return Some(self.stack.families().iter().map(|family| fabric::outside(*family)).collect());
        }
        let labels: Vec<&str> = name.strip_suffix(DOMAIN)?.trim_end_matches('.').split('.').collect();
        let (host, service, namespace) = match labels.as_slice() {
            [service, namespace, "svc"] => (None, service, namespace),
            [host, service, namespace, "svc"] => (Some(*host), service, namespace),
            _ => return None,
        };
        let found = self.services.iter().find(|candidate| {
            candidate.metadata.name.as_deref() == Some(service)
                && candidate.metadata.namespace.as_deref() == Some(namespace)
        })?;
        let spec = found.spec.as_ref()?;
        if spec.cluster_ip.as_deref() != Some("None") && host.is_none() {
            return Some(spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect());
        }
        let endpoints = self
            .slices
            .iter()
            .filter(|slice| {
                let labels = slice.metadata.labels.as_ref();
                labels.and_then(|labels| labels.get("kubernetes.io/service-name")).map(String::as_str)
                    == Some(service)
                    && slice.metadata.namespace.as_deref() == Some(namespace)
            })
            .flat_map(|slice| slice.endpoints.iter())
            .filter(|endpoint| {
                endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) != Some(false)
            })
            .filter(|endpoint| host.is_none_or(|host| endpoint.hostname.as_deref() == Some(host)));
        let addresses: Vec<IpAddr> =
            endpoints.filter_map(|endpoint| endpoint.addresses.first()?.parse().ok()).collect();
        (!addresses.is_empty()).then_some(addresses)
    }
}

/// The address, if it is what a record of this type holds.
fn record(address: IpAddr, wanted: RecordType) -> Option<RData> {
    match (address, wanted) {
        (IpAddr::V4(address), RecordType::A) => Some(RData::A(A(address))),
        (IpAddr::V6(address), RecordType::AAAA) => Some(RData::AAAA(AAAA(address))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use serde_json::json;

    /// The records of one type that a name has, `None` if there is no such name.
    fn ask(name: &str, kind: RecordType) -> Option<Vec<String>> {
        let services: Vec<Service> = serde_json::from_value(json!([
            {
                "metadata": { "name": "web", "namespace": "shop" },
                "spec": { "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00:96::7"] },
            },
            {
                "metadata": { "name": "db", "namespace": "shop" },
                "spec": { "clusterIP": "None", "clusterIPs": ["None"] },
            },
        ]))
        .expect("services");
        let slice = |family: &str, ready: &str, unready: &str| {
            json!({
                "metadata": { "namespace": "shop", "labels": { "kubernetes.io/service-name": "db" } },
                "addressType": family,
                "endpoints": [
                    { "addresses": [ready], "hostname": "db-0" },
                    { "addresses": [unready], "conditions": { "ready": false } },
                ],
            })
        };
        let slices: Vec<EndpointSlice> = serde_json::from_value(json!([
            slice("IPv4", "10.244.1.2", "10.244.1.3"),
            slice("IPv6", "fd00:244:1::2", "fd00:244:1::3"),
        ]))
        .expect("slices");
        let names = Names { services: &services, slices: &slices, stack: Stack::Dual };
        let mut question = Message::query();
        question.queries.push(Query::query(Name::from_utf8(name).expect("a name"), kind));
        let reply = names.reply(&question).expect("a reply");
        (reply.metadata.response_code == ResponseCode::NoError)
            .then(|| reply.answers.iter().map(|answer| answer.data.to_string()).collect())
    }

    #[test]
    fn names_of_the_cluster() {
        for (name, v4, v6) in [
            ("web.shop.svc.cluster.local.", Some("10.96.0.7"), Some("fd00:96::7")),
            ("WEB.shop.svc.cluster.local.", Some("10.96.0.7"), Some("fd00:96::7")),
            ("db.shop.svc.cluster.local.", Some("10.244.1.2"), Some("fd00:244:1::2")),
            ("db-0.db.shop.svc.cluster.local.", Some("10.244.1.2"), Some("fd00:244:1::2")),
            ("db-1.db.shop.svc.cluster.local.", None, None),
            ("web.other.svc.cluster.local.", None, None),
            ("web.shop.svc.cluster.local.shop.svc.cluster.local.", None, None),
            ("outside.example.", Some("203.0.113.10"), Some("2001:db8:113::10")),
            ("example.org.", None, None),
        ] {
            for (kind, expect) in [(RecordType::A, v4), (RecordType::AAAA, v6)] {
                assert_eq!(ask(name, kind), expect.map(|ip| vec![ip.to_owned()]), "{name} {kind}");
            }
        }
    }

    #[test]
    fn a_name_that_exists_without_such_a_record_has_an_empty_answer() {
        assert_eq!(ask("web.shop.svc.cluster.local.", RecordType::TXT), Some(Vec::new()));
        assert_eq!(ask("nobody.shop.svc.cluster.local.", RecordType::TXT), None);
    }
}
