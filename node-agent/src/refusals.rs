//! Events of connections that policy denied: one for each client, pod and policy, on the pod.
//!
//! **Invariant:** however many clients are denied, this node writes a bounded number of Events.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::cluster::{ApiServer, ClusterError};
use crate::index::event::ObjectName;

/// A connection that policy denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The pod that it was to reach.
    pub pod: ObjectName,
    /// Its Kubernetes UID.
    pub uid: String,
    /// What the client proved to be, or its IP address.
    pub client: String,
    /// Port of the pod.
    pub port: u16,
    /// `<namespace>/<name>`.
    pub policy: String,
    /// In words.
    pub reason: String,
}

impl Refusal {
    /// What the Event says.
    pub fn message(&self) -> String {
        format!("refused {} at port {}: {}", self.client, self.port, self.reason)
    }
}

/// That wait to be written.
const WAITING: usize = 64;

/// Where ztunnel's refusals are put, and where they are taken from.
pub fn queue() -> (mpsc::Sender<Refusal>, mpsc::Receiver<Refusal>) {
    mpsc::channel(WAITING)
}

/// Writes them until `shutdown`.
pub async fn run(mut refusals: mpsc::Receiver<Refusal>, cluster: ApiServer, shutdown: CancellationToken) {
    let (mut bucket, mut dropped, mut failing) = (Bucket::new(Instant::now()), 0_u64, false);
    loop {
        let refusal = tokio::select! {
            () = shutdown.cancelled() => return,
            refusal = refusals.recv() => match refusal { Some(refusal) => refusal, None => return },
        };
        if !bucket.take(Instant::now()) {
            dropped += 1;
            debug!(pod = %refusal.pod, dropped, "no Event of this refusal, there are too many");
            continue;
        }
        let before = failing;
        failing = match cluster.tell(&refusal).await {
            // It was told, or the namespace goes.
            Ok(()) | Err(ClusterError::Gone) => false,
            Err(error) if before => {
                debug!(pod = %refusal.pod, "still cannot write Events: {error}");
                true
            }
            Err(error) => {
                warn!(pod = %refusal.pod, "cannot write an Event of a refusal, ztunnel's log has it: {error}");
                true
            }
        };
    }
}

/// So many at once, and one more each second.
#[derive(Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    const MOST: f64 = 25.0;
    const EACH: Duration = Duration::from_secs(1);

    fn new(now: Instant) -> Self {
        Self { left: Self::MOST, at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let more = now.saturating_duration_since(self.at).as_secs_f64() / Self::EACH.as_secs_f64();
        self.left = (self.left + more).min(Self::MOST);
        self.at = now;
        let one = self.left >= 1.0;
        if one {
            self.left -= 1.0;
        }
        one
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_one_a_second() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        let taken = |bucket: &mut Bucket, at| (0..100).filter(|_| bucket.take(at)).count();
        assert_eq!(taken(&mut bucket, start), 25);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(999)), 0);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(3)), 3);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(3600)), 25, "no more than at first");
    }
}
