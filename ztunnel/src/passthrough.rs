//! Connections to pods in the clear, from clients outside the mesh: authorize, connect, copy.
//!
//! There is no identity; a policy that asks for one denies (this is how STRICT works).

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_core::addr::{ClientAddr, HBONE_PORT, Target};
use mesh_core::authz::Connection;
use mesh_core::drain::Watch;
use tokio::net::TcpStream;

use crate::inbound::admit::{Admitted, admit};
use crate::inbound::authority::Refusal;
use crate::proxy::{Carrying, Pod, carrying, in_two_parts};
use crate::reason::{Cause, Phase, ProxyError, Side};
use crate::report::{Direction, Report};
use crate::sockets;
use crate::tuples::Tuple;

/// Carries one connection to the pod.
pub fn serve(
    pod: Arc<Pod>,
    drain: Watch,
    stream: TcpStream,
    client: SocketAddr,
) -> impl Future<Output = ()> + Send {
    in_two_parts(way(pod, drain, stream, ClientAddr::from(client)))
}

async fn way(pod: Arc<Pod>, drain: Watch, stream: TcpStream, client: ClientAddr) -> Option<Carrying> {
    let mut report = Report::new(&pod, Direction::Inbound, client);
    let result = tokio::select! {
        biased;
        () = drain.closing() => Err(ProxyError::new(Phase::Connect, Side::Local, Cause::Cut)),
        result = connect(&pod, &stream, client, &mut report) => result,
    };
    match result {
        Ok((Admitted { upstream, permit, occupied }, accepted)) => {
            Some(carrying(stream, upstream, report, drain, Some(permit), (occupied, accepted)))
        }
        Err(error) => {
            // As the application itself would have answered.
            sockets::reset_on_close(&stream);
            drop(stream);
            report.finish(&Err(error));
            None
        }
    }
}

/// The way to the application, and the address pair that the client's connection occupies.
async fn connect(
    pod: &Arc<Pod>,
    stream: &TcpStream,
    client: ClientAddr,
    report: &mut Report,
) -> Result<(Admitted, Tuple), ProxyError> {
    let local =
        stream.local_addr().map_err(|error| ProxyError::local(Phase::Accept, "getsockname", error))?;
    let target = Target::from(local);
    let accepted = pod.tuples.accepted(client, target);
    let destination = pod.workload();
    report.facts.source.workload = pod.workload_at(client.ip());
    report.facts.destination.workload = Some(destination.clone());
    report.facts.destination.address = Some(target.get());
    if target.port() == HBONE_PORT {
        let refusal = Refusal::IllegalPort(HBONE_PORT);
        return Err(ProxyError::new(Phase::Request, Side::Downstream, refusal));
    }
    let connection = Connection { peer: None, client, target };
    Ok((admit(pod, connection, report).await?, accepted))
}
