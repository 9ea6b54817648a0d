//! The cluster's DNS: A records of Services and of the pods behind headless ones, and one name of the outside world.
//! Everything else does not exist. One server, in the router's namespace, behind a Service as in a cluster.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;

use anyhow::Context as _;
use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::cluster::{Cluster, Kind};
use crate::fabric;
use crate::netns::Netns;

/// The Service's address, the nameserver of every pod.
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const DOMAIN: &str = "cluster.local";
const TTL: u32 = 5;

/// The sockets, made in the router's namespace.
pub struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Sockets {
    pub fn bind(router: &Netns) -> anyhow::Result<Self> {
        router.run(|| {
            let address = SocketAddr::from((fabric::CONTROL, 53));
            let udp = UdpSocket::bind(address).context("bind the DNS server")?;
            let tcp = TcpListener::bind(address).context("bind the DNS server")?;
            udp.set_nonblocking(true)?;
            tcp.set_nonblocking(true)?;
            Ok(Self { udp, tcp })
        })
    }
}

/// Answer for ever.
pub async fn run(sockets: Sockets, cluster: Arc<Cluster>) -> anyhow::Result<()> {
    let udp = tokio::net::UdpSocket::from_std(sockets.udp)?;
    let tcp = tokio::net::TcpListener::from_std(sockets.tcp)?;
    let mut buffer = [0; 4096];
    loop {
        tokio::select! {
            received = udp.recv_from(&mut buffer) => {
                let Ok((length, from)) = received else { continue };
                if let Some(reply) = answer(&cluster, &buffer[..length]) {
                    // The client asks again if this is lost.
                    let _ = udp.send_to(&reply, from).await;
                }
            }
            accepted = tcp.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                tokio::spawn(serve(stream, cluster.clone()));
            }
        }
    }
}

/// Questions over one TCP connection, each after its length (RFC 1035, section 4.2.2).
async fn serve(mut stream: tokio::net::TcpStream, cluster: Arc<Cluster>) -> std::io::Result<()> {
    loop {
        let mut question = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut question).await?;
        let Some(reply) = answer(&cluster, &question) else { return Ok(()) };
        let length = u16::try_from(reply.len()).unwrap_or(u16::MAX);
        stream.write_u16(length).await?;
        stream.write_all(&reply[..usize::from(length)]).await?;
    }
}

fn answer(cluster: &Cluster, bytes: &[u8]) -> Option<Vec<u8>> {
    let question = Message::from_vec(bytes).ok()?;
    let reply = reply(&question, &cluster.list(Kind::Service), &cluster.list(Kind::EndpointSlice))?;
    reply.to_vec().ok()
}

/// No question, no reply.
fn reply(question: &Message, services: &[Service], slices: &[EndpointSlice]) -> Option<Message> {
    let query = question.queries.first()?.clone();
    let name = query.name().clone();
    let mut reply = Message::response(question.metadata.id, question.metadata.op_code);
    debug_assert_eq!(reply.metadata.message_type, MessageType::Response);
    reply.metadata.recursion_desired = question.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.authoritative = true;
    match resolve(&name, services, slices) {
        None => reply.metadata.response_code = ResponseCode::NXDomain,
        Some(addresses) if query.query_type() == RecordType::A => {
            let record = |address| Record::from_rdata(name.clone(), TTL, RData::A(A(address)));
            reply.answers.extend(addresses.into_iter().map(record));
        }
        // The name exists, it has no such record.
        Some(_) => {}
    }
    reply.queries.push(query);
    Some(reply)
}

/// The addresses of a name, `None` if there is no such name.
fn resolve(name: &Name, services: &[Service], slices: &[EndpointSlice]) -> Option<Vec<Ipv4Addr>> {
    let name = name.to_lowercase().to_utf8();
    let name = name.trim_end_matches('.');
    if name == fabric::OUTSIDE_NAME {
        return Some(vec![fabric::OUTSIDE]);
    }
    let labels: Vec<&str> = name.strip_suffix(DOMAIN)?.trim_end_matches('.').split('.').collect();
    let (host, service, namespace) = match labels.as_slice() {
        [service, namespace, "svc"] => (None, service, namespace),
        [host, service, namespace, "svc"] => (Some(*host), service, namespace),
        _ => return None,
    };
    let found = services.iter().find(|candidate| {
        candidate.metadata.name.as_deref() == Some(service)
            && candidate.metadata.namespace.as_deref() == Some(namespace)
    })?;
    let address = found.spec.as_ref()?.cluster_ip.as_deref().unwrap_or_default();
    if address != "None" && host.is_none() {
        return Some(address.parse().into_iter().collect());
    }
    let endpoints = slices
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
    let addresses: Vec<Ipv4Addr> =
        endpoints.filter_map(|endpoint| endpoint.addresses.first()?.parse().ok()).collect();
    (!addresses.is_empty()).then_some(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(name: &str, expect: Option<&[&str]>) {
        let services: Vec<Service> = serde_json::from_value(json!([
            { "metadata": { "name": "web", "namespace": "shop" }, "spec": { "clusterIP": "10.96.0.7" } },
            { "metadata": { "name": "db", "namespace": "shop" }, "spec": { "clusterIP": "None" } },
        ]))
        .expect("services");
        let slices: Vec<EndpointSlice> = serde_json::from_value(json!([{
            "metadata": { "namespace": "shop", "labels": { "kubernetes.io/service-name": "db" } },
            "addressType": "IPv4",
            "endpoints": [
                { "addresses": ["10.244.1.2"], "hostname": "db-0" },
                { "addresses": ["10.244.1.3"], "conditions": { "ready": false } },
            ],
        }]))
        .expect("slices");
        let found = resolve(&Name::from_utf8(name).expect("a name"), &services, &slices);
        let expect =
            expect.map(|list| list.iter().map(|ip| ip.parse().expect("literal")).collect::<Vec<Ipv4Addr>>());
        assert_eq!(found, expect, "{name}");
    }

    #[test]
    fn names_of_the_cluster() {
        check("web.shop.svc.cluster.local.", Some(&["10.96.0.7"]));
        check("WEB.shop.svc.cluster.local.", Some(&["10.96.0.7"]));
        check("db.shop.svc.cluster.local.", Some(&["10.244.1.2"]));
        check("db-0.db.shop.svc.cluster.local.", Some(&["10.244.1.2"]));
        check("db-1.db.shop.svc.cluster.local.", None);
        check("web.other.svc.cluster.local.", None);
        check("web.shop.svc.cluster.local.shop.svc.cluster.local.", None);
        check("outside.example.", Some(&["203.0.113.10"]));
        check("example.org.", None);
    }
}
