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
use mesh_core::store::{Endpoint, Reader, ServiceEntry};

use super::message::{A, AAAA, Location, Query, Reply, SRV, Transport, is_query};
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
            A | AAAA => with_addresses(reply, zone.find(mesh, client.namespace, &query.name)?, |meaning| {
                addresses(meaning, client.network, query.kind == A).map(|all| rotated(all, random))
            }),
            SRV => {
                let (service, port) = zone.port(mesh, client.namespace, &query.name)?;
                with_locations(reply, rotated(locations(service, port, client.network)?, random))
            }
            _ => None,
        }
    };
    reply().map_or(Answer::Forward, |reply: Reply| Answer::Reply(reply.finish()))
}

fn with_addresses(
    mut reply: Reply,
    meaning: Meaning,
    addresses: impl FnOnce(&Meaning) -> Option<Vec<IpAddr>>,
) -> Option<Reply> {
    let addresses = addresses(&meaning)?;
    if let Some(canonical) = &meaning.canonical
        && !reply.alias(canonical, TTL)
    {
        return None;
    }
    if addresses.is_empty() {
        reply.nothing(TTL);
    }
    addresses.into_iter().for_each(|ip| reply.address(ip, TTL));
    Some(reply)
}

fn with_locations(mut reply: Reply, locations: Vec<Location>) -> Option<Reply> {
    // As the cluster's DNS has it.
    let weight = u16::try_from(100 / locations.len().max(1)).unwrap_or(1).max(1);
    locations.into_iter().all(|location| reply.location(location, weight, TTL)).then_some(reply)
}

/// Another one first.
fn rotated<T>(mut all: Vec<T>, random: usize) -> Vec<T> {
    if !all.is_empty() {
        let first = random % all.len();
        all.rotate_left(first);
    }
    all
}

/// Where a port of a service of the cluster is: at the service, or, where it has no address, at each of its pods. None if
/// that is not known of all of them, or there are none.
fn locations(service: Arc<ServiceEntry>, port: ServicePort, network: &Network) -> Option<Vec<Location>> {
    let host = service.service.key.hostname.to_string();
    let (vips, namespace) = (!service.service.vips.is_empty(), service.service.key.namespace.clone());
    if vips {
        let meaning = Meaning { service, pod: None, of_cluster: true, canonical: None };
        let [v4, v6] = [true, false].map(|v4| addresses(&meaning, network, v4));
        return Some(vec![Location { port: port.port, host, addresses: [v4?, v6?].concat() }]);
    }
    let (endpoints, families) = (service.endpoints(), service.service.families);
    let here = endpoints.iter().filter(|endpoint| endpoint.workload.network == *network);
    let of_pod = |endpoint: &Arc<Endpoint>| {
        let workload = &endpoint.workload;
        let pod =
            (workload.is_pod() && workload.namespace == namespace).then(|| workload.name.to_string())?;
        // Of this one alone: to look for the pod among all would cost the square of their number.
        let mut addresses = Some(workload.addresses.to_vec()).filter(|all| !all.is_empty())?;
        addresses.retain(|ip| families.allows(*ip));
        addresses.sort_unstable();
        Some(Location { port: endpoint.target_port(port)?, host: format!("{pod}.{host}"), addresses })
    };
    let locations: Vec<Location> = here.map(of_pod).collect::<Option<_>>()?;
    (!locations.is_empty()).then_some(locations)
}

/// The addresses of one family; none if the mesh does not know what the name's are.
fn addresses(meaning: &Meaning, network: &Network, v4: bool) -> Option<Vec<IpAddr>> {
    let Meaning { service: entry, pod, of_cluster, .. } = meaning;
    let service = &entry.service;
    if !service.vips.is_empty() {
        let own = |vip: &Vip| match vip {
            Vip::Address(at) if at.network == *network => Some(at.address),
            _ => None,
        };
        let all: Vec<IpAddr> = service.vips.iter().filter_map(own).collect();
        let mut found = all.clone();
        found.retain(|ip| ip.is_ipv4() == v4 && (!of_cluster || service.families.allows(*ip)));
        if *of_cluster {
            // Its own one of each family comes first; a load balancer's, which may follow, is for others.
            found.truncate(1);
        }
        return (!all.is_empty()).then_some(found);
    }
    if !of_cluster {
        return None;
    }
    let endpoints = entry.endpoints();
    let workloads = endpoints.iter().map(|endpoint| &endpoint.workload).filter(|workload| {
        workload.network == *network && pod.as_ref().is_none_or(|pod| *workload.name == **pod)
    });
    let mut all: Vec<IpAddr> = workloads.flat_map(|workload| workload.addresses.iter().copied()).collect();
    if all.is_empty() {
        // Whether there is such a name at all, the server knows.
        return None;
    }
    all.retain(|ip| ip.is_ipv4() == v4 && service.families.allows(*ip));
    // Neighbours in the map are in no order, and one may be named by two slices.
    all.sort_unstable();
    all.dedup();
    Some(all)
}

#[cfg(test)]
mod tests;
