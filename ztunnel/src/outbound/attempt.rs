//! Reaches an endpoint. One that does not answer, or cannot even be tried, is given up for another of its service, and
//! an address that does not answer for another of the same endpoint's.
//!
//! **Invariant:** not one byte of the application has been sent until an endpoint has taken the connection, and what
//! policy refuses is not tried elsewhere.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use mesh_core::addr::{ClientAddr, HBONE_PORT, NextHop, OrigDst, Target};
use mesh_core::authz::Connection;
use mesh_core::hbone::pool::Key;
use mesh_core::hbone::{Authority, ConnectRequest, Forwarded, TraceParent};
use mesh_core::identity::Identity;
use mesh_core::service::Service;
use mesh_core::workload::{Workload, WorkloadUid};

use super::Upstream;
use super::plan::{self, Choose, Chosen, Plan, PlanError, Route, Unplanned};
use crate::eyeballs::race;
use crate::hosts::Addresses;
use crate::inbound::near;
use crate::metrics::Security;
use crate::neighbours::Neighbour;
use crate::policy::Permit;
use crate::proxy::{Pod, baggage};
use crate::reason::{Cause, Phase, ProxyError, Side};
use crate::report::{Party, Report};

/// Endpoints of a service that are tried.
const MOST: usize = 3;
/// The same with those that cannot even be tried, such as one whose host name leads nowhere.
const MOST_CHOSEN: usize = 8;
/// Time for all of them.
const DEADLINE: Duration = Duration::from_secs(10);
/// Time for one, where there is another: a lost SYN and its repetition, a second later, are no reason to go on.
const PATIENCE: Duration = Duration::from_secs(3);

/// Reaches what was dialled, or one of its endpoints.
pub(super) async fn connect(
    pod: &Arc<Pod>,
    source: &Arc<Workload>,
    client: ClientAddr,
    dst: OrigDst,
    report: &mut Report,
) -> Result<Upstream, ProxyError> {
    let (random, started) = (rand::random::<u64>() as usize, Instant::now());
    let (mut chosen, mut tries): (Vec<WorkloadUid>, usize) = (Vec::new(), 0);
    loop {
        let plan = match Box::pin(plan(pod, source, client, dst, (random, &chosen))).await {
            Ok(plan) => plan,
            Err((error, None)) => return Err(error),
            Err((error, Some(at_fault))) => {
                chosen.push(at_fault.endpoint.uid.clone());
                unplanned(report, &at_fault, chosen.len());
                let another = chosen.len() < MOST_CHOSEN
                    && at_fault.service.pick_other(source, dst, 0, &chosen).is_some();
                if !another || started.elapsed() >= DEADLINE {
                    return Err(error);
                }
                report.gave_up(&error);
                continue;
            }
        };
        chosen.extend(plan.endpoint.clone());
        tries += 1;
        report.facts.tried = chosen.len();
        let another = tries < MOST && chosen.len() < MOST_CHOSEN && plan.has_another(source, dst, &chosen);
        let left = DEADLINE.saturating_sub(started.elapsed());
        let patience = match (another, chosen.len()) {
            (true, _) => Some(left.min(PATIENCE)),
            (false, 0 | 1) => None,
            (false, _) => Some(left),
        };
        let reached = Box::pin(in_time(patience, reach(pod, source, client, &plan, report))).await;
        match reached {
            Err(error) if another && error.is_endpoints() && started.elapsed() < DEADLINE => {
                report.gave_up(&error);
            }
            reached => return reached,
        }
    }
}

/// Tells the report of an endpoint that cannot be tried, in place of an earlier one.
fn unplanned(report: &mut Report, at_fault: &Chosen, chosen: usize) {
    let facts = &mut report.facts;
    facts.tried = chosen;
    facts.destination = Party { workload: Some(at_fault.endpoint.clone()), ..Party::default() };
    facts.service = Some(at_fault.service.service.clone());
    (facts.hbone_target, facts.source.identity) = (None, None);
    facts.security = Security::default();
}

async fn plan(
    pod: &Pod,
    source: &Workload,
    client: ClientAddr,
    dst: OrigDst,
    (random, tried): (usize, &[WorkloadUid]),
) -> Result<Plan, (ProxyError, Option<Chosen>)> {
    let now = Instant::now();
    let remembered = |service: &Service, port| pod.affinities.find(client.ip(), service, port, now);
    let mut found: Option<(Arc<str>, Addresses)> = None;
    let plan = loop {
        let planned = {
            let looked_up = |host: &str| match &found {
                Some((known, addresses)) if **known == *host => Some(addresses.clone()),
                _ => pod.proxy.hosts.get(host),
            };
            let choose = Choose { random, tried, looked_up: &looked_up, remembered: &remembered };
            plan::outbound(&pod.proxy.mesh, source, dst, &choose)
        };
        let (host, chosen) = match planned {
            Ok(plan) => break plan,
            Err(Unplanned { error: PlanError::Unresolved(host), chosen }) => (host, chosen),
            Err(Unplanned { error, chosen }) => {
                return Err((ProxyError::new(Phase::Plan, Side::Upstream, error), chosen));
            }
        };
        let addresses = pod.proxy.hosts.look_up(&host, &source.namespace).await.map_err(|error| {
            let what = "looking up the endpoint's host name";
            (ProxyError::new(Phase::Plan, Side::Upstream, Cause::Io { what, error }), chosen)
        })?;
        found = Some((host, addresses));
    };
    // Before it is reached, so that connections at the same time go to the same one.
    if let (Some(entry), Some(endpoint)) = (&plan.service, &plan.endpoint) {
        pod.affinities.keep(client.ip(), &entry.service, dst.port(), endpoint, now);
    }
    Ok(plan)
}

async fn in_time<T>(
    patience: Option<Duration>,
    attempt: impl Future<Output = Result<T, ProxyError>>,
) -> Result<T, ProxyError> {
    let Some(patience) = patience else { return attempt.await };
    tokio::time::timeout(patience, attempt).await.unwrap_or_else(|_| {
        let error = io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {patience:.1?}"));
        Err(ProxyError::new(
            Phase::Connect,
            Side::Upstream,
            Cause::Io { what: "reaching the endpoint", error },
        ))
    })
}

async fn reach(
    pod: &Arc<Pod>,
    source: &Arc<Workload>,
    client: ClientAddr,
    plan: &Plan,
    report: &mut Report,
) -> Result<Upstream, ProxyError> {
    let neighbour = neighbour(pod, plan);
    planned(report, source, plan, neighbour.as_ref());
    match &plan.route {
        Route::Hbone { next_hop, expected, .. } => match neighbour {
            Some(neighbour) => {
                let (peer, local) = (source.identity.clone(), plan.target.ip());
                let request = request(source, client, plan, plan.target);
                let arrived = Box::pin(near::arrive(neighbour, peer, client, &request, local)).await?;
                Ok(Upstream::Near(Box::new(arrived)))
            }
            None => {
                let key = key(source, client, *next_hop, expected.clone(), plan);
                Box::pin(tunnel(pod, source, client, key, plan, report)).await
            }
        },
        Route::Plain => {
            let to = |target: Target| pod.connect_plain(client, target).boxed();
            let (stream, tuple) = if plan.others.is_empty() {
                to(plan.target).await?
            } else {
                let others: Vec<_> = plan.others.iter().map(|other| to(*other)).collect();
                race(to(plan.target), others).await?
            };
            report.facts.destination.address = stream.peer_addr().ok().or(Some(plan.target.get()));
            Ok(Upstream::Plain(stream, tuple))
        }
        Route::Own => {
            // The kernel vouches for both ends, they are one pod; still its policy is asked.
            let connection = Connection { peer: Some(source.identity.clone()), client, target: plan.target };
            let permit = Permit::ask(pod, connection, &mut report.facts.remarks)?;
            // From the pod's address to itself, as it would dial itself: bound to lo, as connections to the application
            // are, the answer would not find the socket, since the route to a local address is not lo's.
            let (stream, tuple) = Box::pin(pod.connect_plain(client, plan.target)).await?;
            Ok(Upstream::Own(stream, tuple, permit))
        }
    }
}

/// The destination, if its connections may skip the network and this process serves it.
fn neighbour(pod: &Pod, plan: &Plan) -> Option<Neighbour> {
    let Route::Hbone { near: true, expected, .. } = &plan.route else { return None };
    // Nothing but a tunnel's handshake looks at certificates.
    let tunnels_only = pod.proxy.same_node_mtls || pod.proxy.revocations.are_in_force();
    let neighbours = (!tunnels_only).then_some(&pod.proxy.neighbours)?;
    let found = neighbours.find(&plan.destination.as_ref()?.uid)?;
    // What a tunnel's end would have to prove, and the address that it would be at.
    let is_it = expected.contains(&found.pod.workload().identity)
        && found.pod.described().addresses.contains(&plan.target.ip());
    is_it.then_some(found)
}

/// Tells the report what the plan is, in place of an earlier one.
fn planned(report: &mut Report, source: &Workload, plan: &Plan, neighbour: Option<&Neighbour>) {
    let facts = &mut report.facts;
    facts.destination.workload.clone_from(&plan.destination);
    facts.service = plan.service.as_ref().map(|entry| entry.service.clone());
    facts.destination.address = Some(plan.target.get());
    (facts.hbone_target, facts.source.identity, facts.destination.identity) = (None, None, None);
    facts.security = Security::default();
    if let Some(neighbour) = neighbour {
        facts.source.identity = Some(source.identity.clone());
        facts.destination.identity = Some(neighbour.pod.workload().identity.clone());
        facts.security = Security::SameNode;
    } else if let Route::Hbone { next_hop, .. } = &plan.route {
        facts.destination.address = Some(next_hop.get());
        facts.hbone_target = Some(plan.target);
        facts.source.identity = Some(source.identity.clone());
        facts.security = Security::MutualTls;
    }
    report.open();
}

/// A tunnel to the address that answers first asks for that address: other servers know no more than where they are.
async fn tunnel(
    pod: &Pod,
    source: &Workload,
    client: ClientAddr,
    first: Key,
    plan: &Plan,
    report: &mut Report,
) -> Result<Upstream, ProxyError> {
    let failed = |error| ProxyError::new(Phase::Connect, Side::Upstream, error);
    let (key, target) = if plan.others.is_empty() {
        (first, plan.target)
    } else {
        let at = |other: &Target| Key { destination: (other.ip(), HBONE_PORT).into(), ..first.clone() };
        let ready = |key: Key, target: Target| {
            async move { pod.pool.prepare(&key).await.map(|()| (key, target)) }.boxed()
        };
        let others: Vec<_> = plan.others.iter().map(|other| ready(at(other), *other)).collect();
        let won = race(ready(first.clone(), plan.target), others).await;
        won.map_err(|error| failed(error.into()))?
    };
    report.facts.destination.address = Some(key.destination);
    report.facts.hbone_target = Some(target);
    let request = request(source, client, plan, target);
    let connected = Box::pin(pod.pool.connect(&key, &request)).await.map_err(failed)?;
    report.facts.destination.identity = Some(connected.peer);
    Ok(Upstream::Tunnel(connected.stream))
}

fn key(
    source: &Workload,
    client: ClientAddr,
    next_hop: NextHop,
    expected: Vec<Identity>,
    plan: &Plan,
) -> Key {
    Key {
        source: source.identity.clone(),
        source_address: client.ip(),
        destination: next_hop.get(),
        expected,
        workload_uid: plan.destination.as_ref().map(|workload| workload.uid.shared()),
    }
}

fn request(source: &Workload, client: ClientAddr, plan: &Plan, target: Target) -> ConnectRequest {
    let host = plan.service.as_ref().map(|entry| entry.service.key.hostname.to_string());
    ConnectRequest {
        baggage: baggage(source),
        forwarded: Some(Forwarded { client: Some(client.get()), host }),
        traceparent: Some(TraceParent::random()),
        workload_uid: plan.destination.as_ref().map(|workload| workload.uid.to_string()),
        ..ConnectRequest::new(Authority::from(target.get()))
    }
}
