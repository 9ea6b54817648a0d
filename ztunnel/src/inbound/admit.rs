//! The last steps to a pod's application, the same for every way in: policy, budget, connect.

use std::sync::Arc;

use mesh_core::authz::Connection;
use tokio::net::TcpStream;

use crate::budget::{Exhausted, Share};
use crate::policy::Permit;
use crate::proxy::Pod;
use crate::reason::{Phase, ProxyError, Side};
use crate::report::Report;
use crate::tuples::Tuple;

/// The application's connection.
pub struct Admitted {
    /// To the application.
    pub upstream: TcpStream,
    /// Policy allows it, so far.
    pub permit: Permit,
    /// What it takes from the pod for its life: an address pair, and a share of the budget.
    pub occupied: (Tuple, Share),
}

/// Lets a connection in to the application of `pod`; the report counts it as opened once it may try.
///
/// # Errors
/// When policy denies it, the pod's budget is used up, or the application does not answer.
pub async fn admit(
    pod: &Arc<Pod>,
    connection: Connection,
    report: &mut Report,
) -> Result<Admitted, ProxyError> {
    let (client, target) = (connection.client, connection.target);
    let proved = connection.peer.is_some();
    let permit = Permit::ask(pod, connection, &mut report.facts.remarks)?;
    let share =
        if proved { pod.budget.connection() } else { pod.budget.clear(client.ip()) }.map_err(exhausted)?;
    report.open();
    let others = report.facts.source.workload.as_ref().map_or(&[][..], |peer| &peer.addresses);
    let (upstream, tuple) = pod.connect_application(client, others, target).await?;
    Ok(Admitted { upstream, permit, occupied: (tuple, share) })
}

/// A client that came when nothing was left.
pub fn exhausted(error: Exhausted) -> ProxyError {
    ProxyError::new(Phase::Accept, Side::Local, error)
}
