//! What a query is answered with: a decision over a snapshot, no I/O.
//!
//! Answered is what the mesh knows for certain; everything else goes to the server that the client asked. So a name of
//! the mesh has addresses from here, of either family and also none (a client that asked the server for the other one
//! would pass the mesh by), and the ports of the cluster's services (SRV), but records of other types and names that do
//! not exist come from the server.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::addr::Network;
use mesh_core::service::{ServicePort, Vip};
use mesh_core::store::{Reader, ServiceEntry};

use super::message::{A, AAAA, Location, Put, Query, Reply, SRV, Transport, is_query};
use super::names::{Meaning, Zone};

/// Seconds that clients may keep an answer, as in Istio; also that there is none.
pub const TTL: u32 = 30;

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Whose addresses it can reach.
    pub network: &'a Network,
    /// Its own addresses: it has no way to those of another family.
    pub addresses: &'a [IpAddr],
}

/// What becomes of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This is the answer.
    Reply(Vec<u8>),
    /// The server that was asked has to answer.
    Forward,
    /// Nobody waits for an answer: it is no query.
    Drop,
}

/// Decides. `random` is any number; it chooses which of several addresses is the first.
pub fn answer(
    mesh: &Reader,
    zone: &Zone,
    client: Client<'_>,
    bytes: &[u8],
    transport: Transport,
    random: usize,
) -> Answer {
    if !is_query(bytes) {
        return Answer::Drop;
    }
    let reply = || {
        let query = Query::read(bytes)?;
        let reply = Reply::new(&query, transport);
        match query.kind {
            A | AAAA => {
                let meaning = zone.find(mesh, client, &query.name)?;
                with_addresses(reply, &meaning, client, query.kind == A, random)
            }
            SRV => {
                let (service, port) = zone.port(mesh, client.namespace, &query.name)?;
                with_locations(reply, &service, port, client, random)
            }
            _ => None,
        }
    };
    reply().map_or(Answer::Forward, |reply: Reply| Answer::Reply(reply.finish()))
}

fn with_addresses(
    mut reply: Reply,
    meaning: &Meaning,
    client: Client<'_>,
    v4: bool,
    random: usize,
) -> Option<Reply> {
    if let Some(canonical) = &meaning.canonical
        && !reply.alias(canonical, TTL)
    {
        return None;
    }
    let service = &meaning.service;
    if meaning.pod.is_none() && meaning.of_cluster && service.service.vips.is_empty() {
        let directory = service.directory();
        // Whether there is such a name at all, the server knows.
        put(&mut reply, directory.here(client.network)?.addresses(v4)?, random);
    } else {
        put(&mut reply, &addresses(meaning, client, v4)?, random);
    }
    Some(reply)
}

/// As many as there is room for, another one first each time.
fn put(reply: &mut Reply, addresses: &[IpAddr], random: usize) {
    if addresses.is_empty() {
        reply.nothing(TTL);
    }
    let _room = rotated(addresses, random).all(|ip| reply.address(*ip, TTL));
}

/// Where a port of a service of the cluster is: at the service, or, where it has no address, at each of its pods, as many
/// as there is room for. None if that is not known of all of them, or there are none.
fn with_locations(
    mut reply: Reply,
    service: &Arc<ServiceEntry>,
    port: ServicePort,
    client: Client<'_>,
    random: usize,
) -> Option<Reply> {
    let host = &service.service.key.hostname;
    if !service.service.vips.is_empty() {
        let meaning = Meaning { service: service.clone(), pod: None, of_cluster: true, canonical: None };
        let [v4, v6] = [true, false].map(|v4| addresses(&meaning, client, v4));
        let location = Location { port: port.port, host: host.to_string(), addresses: [v4?, v6?].concat() };
        return (reply.location(location, WHOLE, TTL) != Put::NoName).then_some(reply);
    }
    let directory = service.directory();
    let endpoints = directory.here(client.network)?.all_with_port(port.port)?;
    // As the cluster's DNS has it.
    let weight = u16::try_from(usize::from(WHOLE) / endpoints.len()).unwrap_or(1).max(1);
    for endpoint in rotated(endpoints, random) {
        let workload = &endpoint.workload;
        let families = service.service.families;
        let mut addresses: Vec<IpAddr> =
            workload.addresses.iter().copied().filter(|ip| families.allows(*ip)).collect();
        addresses.sort_unstable();
        let location = Location {
            port: endpoint.target_port(port)?,
            host: format!("{}.{host}", workload.name),
            addresses,
        };
        match reply.location(location, weight, TTL) {
            Put::Whole => {}
            Put::NoRoom => break,
            Put::NoName => return None,
        }
    }
    Some(reply)
}

/// The weight of all places of a service together.
const WHOLE: u16 = 100;

/// Another one first.
fn rotated<T>(all: &[T], random: usize) -> impl Iterator<Item = &T> {
    let (last, first) = all.split_at(random % all.len().max(1));
    first.iter().chain(last)
}

/// The addresses of one family, which are few: of a service that has its own, or of one pod; none if the mesh does not
/// know what the name's are.
fn addresses(meaning: &Meaning, client: Client<'_>, v4: bool) -> Option<Vec<IpAddr>> {
    let Client { network, .. } = client;
    let Meaning { service: entry, pod, of_cluster, .. } = meaning;
    let service = &entry.service;
    if let (Some(pod), true) = (pod, service.vips.is_empty()) {
        let directory = entry.directory();
        let of_name = || directory.here(network).into_iter().flat_map(|here| here.pods(pod));
        let all = || of_name().flat_map(|endpoint| endpoint.workload.addresses.iter().copied());
        all().next()?;
        let mut own: Vec<IpAddr> =
            all().filter(|ip| ip.is_ipv4() == v4 && service.families.allows(*ip)).collect();
        own.sort_unstable();
        own.dedup();
        return Some(own);
    }
    let own = |vip: &Vip| match vip {
        Vip::Address(at) if at.network == *network => Some(at.address),
        _ => None,
    };
    let mut found: Vec<IpAddr> = service.vips.iter().filter_map(own).collect();
    if found.is_empty() {
        return None;
    }
    // A host's other addresses would only be tried in vain. What the cluster's own services have, its DNS tells all.
    let usable = |ip: &IpAddr| client.addresses.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
    if !of_cluster && found.iter().any(usable) {
        found.retain(usable);
    }
    found.retain(|ip| ip.is_ipv4() == v4 && (!of_cluster || service.families.allows(*ip)));
    if *of_cluster {
        // Its own one of each family comes first; a load balancer's, which may follow, is for others.
        found.truncate(1);
    }
    Some(found)
}

#[cfg(test)]
mod tests;
