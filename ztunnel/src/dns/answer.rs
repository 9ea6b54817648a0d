//! What a query is answered with: a decision over a snapshot, no I/O.
//!
//! Answered is what the mesh knows for certain; everything else goes to the server that the client asked. So a name of
//! the mesh has addresses from here, of either family and also none (a client that asked the server for the other one
//! would pass the mesh by), but records of other types, ports (SRV) and names that do not exist come from the server.

use std::net::IpAddr;

use mesh_core::addr::Network;
use mesh_core::service::Vip;
use mesh_core::store::Reader;

use super::message::{A, AAAA, Query, Reply, Transport, is_query};
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
        let query = Query::read(bytes).filter(|query| matches!(query.kind, A | AAAA))?;
        let meaning = zone.find(mesh, client.namespace, &query.name)?;
        let mut addresses = addresses(&meaning, client.network, query.kind == A)?;
        if !addresses.is_empty() {
            let first = random % addresses.len();
            addresses.rotate_left(first);
        }
        let mut reply = Reply::new(&query, transport);
        if let Some(canonical) = &meaning.canonical
            && !reply.alias(canonical, TTL)
        {
            return None;
        }
        if addresses.is_empty() {
            reply.nothing(TTL);
        }
        addresses.into_iter().for_each(|ip| reply.address(ip, TTL));
        Some(reply.finish())
    };
    reply().map_or(Answer::Forward, Answer::Reply)
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
