//! Connections that pods open: identify, plan, connect, copy.
//!
//! The destination is the accepted socket's own address: capture steers without rewriting.

pub mod plan;

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_core::addr::{ClientAddr, NextHop, OrigDst, Target};
use mesh_core::authz::Connection;
use mesh_core::drain::Watch;
use mesh_core::hbone::pool::Key;
use mesh_core::hbone::{Authority, ConnectRequest, Forwarded, HboneStream, TraceParent};
use mesh_core::identity::Identity;
use mesh_core::workload::Workload;
use tokio::net::TcpStream;

use self::plan::{Plan, Route};
use crate::budget::Share;
use crate::inbound::admit::exhausted;
use crate::inbound::near::{self, Arrived};
use crate::metrics::Security;
use crate::neighbours::Neighbour;
use crate::policy::Permit;
use crate::proxy::{Carrying, Pod, baggage, carrying, in_two_parts};
use crate::reason::{Cause, Phase, ProxyError, Side};
use crate::report::{Direction, Report};
use crate::sockets;
use crate::tuples::Tuple;

/// Carries one connection that the pod opened.
pub fn serve(
    pod: Arc<Pod>,
    drain: Watch,
    stream: TcpStream,
    client: SocketAddr,
) -> impl Future<Output = ()> + Send {
    in_two_parts(way(pod, drain, stream, ClientAddr::from(client)))
}

async fn way(pod: Arc<Pod>, drain: Watch, stream: TcpStream, client: ClientAddr) -> Option<Carrying> {
    let mut report = Report::new(&pod, Direction::Outbound, client);
    let result = tokio::select! {
        biased;
        () = drain.closing() => Err(ProxyError::new(Phase::Connect, Side::Local, Cause::Cut)),
        result = connect(&pod, &stream, client, &mut report) => result,
    };
    match result {
        Ok((upstream, occupied)) => Some(upstream.carry(stream, occupied, report, drain)),
        Err(error) => {
            // The application's connect() has succeeded already: a reset is the only "no" that it understands.
            sockets::reset_on_close(&stream);
            drop(stream);
            report.finish(&Err(error));
            None
        }
    }
}

/// The far side, ready for bytes.
enum Upstream {
    Tunnel(HboneStream),
    /// A pod of this process.
    Near(Box<Arrived>),
    /// With the address pair that it occupies.
    Plain(TcpStream, Tuple),
    /// The same to the pod itself, whose policy counts.
    Own(TcpStream, Tuple, Permit),
}

impl Upstream {
    fn carry(self, stream: TcpStream, occupied: Occupied, report: Report, drain: Watch) -> Carrying {
        match self {
            Self::Near(arrived) => Box::pin(async move {
                let result = arrived.carry(stream, &report, &drain).await;
                drop(occupied);
                report.finish(&result);
            }),
            Self::Tunnel(upstream) => carrying(stream, upstream, report, drain, None, occupied),
            Self::Plain(upstream, tuple) => {
                carrying(stream, upstream, report, drain, None, (tuple, occupied))
            }
            Self::Own(upstream, tuple, permit) => {
                carrying(stream, upstream, report, drain, Some(permit), (tuple, occupied))
            }
        }
    }
}

/// What a connection takes from its pod for its life: the address pair that it came by, and a share of the budget.
type Occupied = (Tuple, Share);

async fn connect(
    pod: &Arc<Pod>,
    stream: &TcpStream,
    client: ClientAddr,
    report: &mut Report,
) -> Result<(Upstream, Occupied), ProxyError> {
    let dst = stream.local_addr().map_err(|error| ProxyError::local(Phase::Accept, "getsockname", error))?;
    let accepted = pod.tuples.accepted(client, Target::from(dst));
    let dst = OrigDst::from(dst);
    let source = pod.workload();
    report.facts.source.workload = Some(source.clone());
    report.facts.destination.address = Some(dst.get());
    let share = pod.budget.connection().map_err(exhausted)?;
    let plan = plan::outbound(&pod.proxy.mesh, &source, dst, rand::random::<u64>() as usize)
        .map_err(|error| ProxyError::new(Phase::Plan, Side::Upstream, error))?;
    let neighbour = neighbour(pod, &plan);
    planned(report, &source, &plan, neighbour.as_ref());
    let upstream = match plan.route.clone() {
        Route::Hbone { next_hop, expected, .. } => {
            let request = request(&source, client, &plan);
            if let Some(neighbour) = neighbour {
                let (peer, local) = (source.identity.clone(), plan.target.ip());
                let arrived = Box::pin(near::arrive(neighbour, peer, client, &request, local)).await?;
                Upstream::Near(Box::new(arrived))
            } else {
                let key = key(&source, client, next_hop, expected, &plan);
                Upstream::Tunnel(tunnel(pod, key, request, report).await?)
            }
        }
        Route::Plain => {
            let (stream, tuple) = pod.connect_plain(client, plan.target).await?;
            Upstream::Plain(stream, tuple)
        }
        Route::Own => {
            // The kernel vouches for both ends, they are one pod; still its policy is asked.
            let connection = Connection { peer: Some(source.identity.clone()), client, target: plan.target };
            let (permit, on_trial) = Permit::ask(pod, connection)?;
            report.facts.dry_run = on_trial;
            // From the pod's address to itself, as it would dial itself: bound to lo, as connections to the application
            // are, the answer would not find the socket, since the route to a local address is not lo's.
            let (stream, tuple) = pod.connect_plain(client, plan.target).await?;
            Upstream::Own(stream, tuple, permit)
        }
    };
    Ok((upstream, (accepted, share)))
}

/// The destination, if its connections may skip the network and this process serves it.
fn neighbour(pod: &Pod, plan: &Plan) -> Option<Neighbour> {
    let Route::Hbone { near: true, expected, .. } = &plan.route else { return None };
    let neighbours = (!pod.proxy.same_node_mtls).then_some(&pod.proxy.neighbours)?;
    let found = neighbours.find(&plan.destination.as_ref()?.uid)?;
    // What a tunnel's end would have to prove, and the address that it would be at.
    let is_it = expected.contains(&found.pod.workload().identity)
        && found.pod.described().addresses.contains(&plan.target.ip());
    is_it.then_some(found)
}

/// Tells the report what the plan is.
fn planned(report: &mut Report, source: &Workload, plan: &Plan, neighbour: Option<&Neighbour>) {
    let facts = &mut report.facts;
    facts.destination.workload.clone_from(&plan.destination);
    facts.service = plan.service.as_ref().map(|entry| entry.service.clone());
    facts.destination.address = Some(plan.target.get());
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

async fn tunnel(
    pod: &Pod,
    key: Key,
    request: ConnectRequest,
    report: &mut Report,
) -> Result<HboneStream, ProxyError> {
    let connected = Box::pin(pod.pool.connect(&key, &request))
        .await
        .map_err(|error| ProxyError::new(Phase::Connect, Side::Upstream, error))?;
    report.facts.destination.identity = Some(connected.peer);
    Ok(connected.stream)
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

fn request(source: &Workload, client: ClientAddr, plan: &Plan) -> ConnectRequest {
    let host = plan.service.as_ref().map(|entry| entry.service.key.hostname.to_string());
    ConnectRequest {
        baggage: baggage(source),
        forwarded: Some(Forwarded { client: Some(client.get()), host }),
        traceparent: Some(TraceParent::random()),
        workload_uid: plan.destination.as_ref().map(|workload| workload.uid.to_string()),
        ..ConnectRequest::new(Authority::from(plan.target.get()))
    }
}
