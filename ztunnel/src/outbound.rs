//! Connections that pods open: identify, plan, connect (`attempt`), copy.
//!
//! The destination is the accepted socket's own address: capture steers without rewriting.

mod attempt;
pub mod plan;

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_core::addr::{ClientAddr, OrigDst, Target};
use mesh_core::copy::Carried;
use mesh_core::drain::Watch;
use mesh_core::hbone::HboneStream;
use tokio::net::TcpStream;

use crate::budget::Share;
use crate::inbound::admit::exhausted;
use crate::inbound::near::Arrived;
use crate::policy::Permit;
use crate::proxy::{Abort, Carrying, Pod, carrying, in_two_parts};
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
pub(crate) enum Upstream {
    Tunnel(HboneStream),
    /// A pod of this process.
    Near(Box<Arrived>),
    /// With the address pair that it occupies.
    Plain(TcpStream, Tuple),
    /// The same to the pod itself, whose policy counts.
    Own(TcpStream, Tuple, Permit),
}

impl Upstream {
    /// Carries a client's bytes there; `occupied` is what the client takes for as long.
    pub(crate) fn carry<Down>(
        self,
        stream: Down,
        occupied: impl Send + 'static,
        report: Report,
        drain: Watch,
    ) -> Carrying
    where
        Down: Carried + Abort + Send + 'static,
    {
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
pub(crate) type Occupied = (Tuple, Share);

/// Takes it.
///
/// # Errors
/// When the pod has too many connections.
pub(crate) fn occupy(pod: &Pod, client: ClientAddr, dst: OrigDst) -> Result<Occupied, ProxyError> {
    let accepted = pod.tuples.accepted(client, Target::from(dst.get()));
    let share = pod.budget.connection().map_err(exhausted)?;
    Ok((accepted, share))
}

async fn connect(
    pod: &Arc<Pod>,
    stream: &TcpStream,
    client: ClientAddr,
    report: &mut Report,
) -> Result<(Upstream, Occupied), ProxyError> {
    let dst = stream.local_addr().map_err(|error| ProxyError::local(Phase::Accept, "getsockname", error))?;
    let dst = OrigDst::from(dst);
    report.facts.source.workload = Some(pod.workload());
    report.facts.destination.address = Some(dst.get());
    let occupied = occupy(pod, client, dst)?;
    let upstream = reach(pod, dst, client, report).await?;
    Ok((upstream, occupied))
}

/// Plans and connects.
///
/// # Errors
/// When there is no way.
pub(crate) async fn reach(
    pod: &Arc<Pod>,
    dst: OrigDst,
    client: ClientAddr,
    report: &mut Report,
) -> Result<Upstream, ProxyError> {
    let source = pod.workload();
    report.facts.source.workload = Some(source.clone());
    report.facts.destination.address = Some(dst.get());
    attempt::connect(pod, &source, client, dst, report).await
}
