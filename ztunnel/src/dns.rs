//! The in-pod DNS proxy: answers what the mesh knows, and forwards everything else to the server that was asked.
//!
//! Which server that is needs no configuration: queries are steered here without rewriting, so it is the destination that
//! they came with. `names` and `answer` decide; `udp` and `tcp` carry it out.
//! **Invariant:** a query that is not answered here reaches the server byte for byte, its identifier over UDP apart, and
//! so does the server's answer the client.
//! **Invariant:** connections need no DNS: nothing of the proxy depends on it.

pub mod answer;
mod forward;
pub mod message;
pub mod metrics;
pub mod names;
pub mod tcp;
pub mod udp;

use std::time::Duration;

use mesh_core::allowance::Allowance;
use mesh_core::workload::Workload;

use self::answer::{Answer, Client};
use self::message::Transport;
use self::metrics::Labels;
use crate::proxy::Pod;

/// Time for the server's answer. Clients wait five seconds, mostly, and should learn before that they wait in vain.
const PATIENCE: Duration = Duration::from_secs(4);

/// How fast one pod may ask, `per_second` and twice as much at once: who asks more waits, and nobody else.
pub fn pace(per_second: usize) -> Allowance {
    let per_second = u32::try_from(per_second).unwrap_or(u32::MAX);
    Allowance::new(per_second.saturating_mul(2), per_second)
}

/// Waits until the pod may ask once more.
async fn turn(pod: &Pod) {
    while let Err(later) = pod.dns_queries.take(1) {
        tokio::time::sleep(later).await;
    }
}

/// What becomes of a message of the pod's application, which is counted.
fn judge(pod: &Pod, bytes: &[u8], transport: Transport) -> (Answer, Labels) {
    let labels = Labels::new(message::kind(bytes), transport, pod.described());
    let Workload { namespace, network, addresses, .. } = pod.described();
    let client = Client { namespace, network, addresses };
    let Pod { proxy, .. } = pod;
    let random = rand::random::<u64>() as usize;
    let answer = answer::answer(&proxy.mesh, &proxy.zone, client, bytes, transport, random);
    if answer != Answer::Drop {
        proxy.metrics.dns.requests.get_or_create(&labels).inc();
    }
    (answer, labels)
}
