//! What ztunnel has to tell of a pod, as Events on it: connections that policy denied, certificates that are not renewed.
//!
//! **Invariant:** however much there is to tell, this node writes a bounded number of Events, and what there is to tell of
//! one namespace's pods leaves room for the others'.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::cluster::{ApiServer, ClusterError};
use crate::index::event::ObjectName;

/// One Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The pod that it is about.
    pub pod: ObjectName,
    /// Its Kubernetes UID.
    pub uid: String,
    /// Somebody should look at it.
    pub is_warning: bool,
    /// `reason` of the Event.
    pub reason: &'static str,
    /// What tells it from others on that pod: there is one Event of each.
    pub key: Vec<String>,
    /// In words.
    pub message: String,
}

impl Notice {
    /// Policy denied a connection: one for each client, which is what it proved to be or its IP address, and policy.
    pub fn refused(
        pod: ObjectName,
        uid: String,
        client: String,
        port: u32,
        policy: String,
        reason: &str,
    ) -> Self {
        let message = format!("refused {client} at port {port}: {reason}");
        Self { pod, uid, is_warning: true, reason: "PolicyDenied", key: vec![client, policy], message }
    }

    /// The pod's certificate is not renewed and has no more than `percent` of its life left: one for each certificate and
    /// share. Half a life is time enough for an authority to come back, so that is nothing to wake anybody for.
    pub fn expiring(pod: ObjectName, uid: String, percent: u32, not_after: u64, why: &str) -> Self {
        let is_warning = percent < 50;
        let why: String = why.chars().take(MOST_WORDS).collect();
        Self {
            pod,
            uid,
            is_warning,
            reason: if is_warning { "CertificateExpiring" } else { "CertificateRenewalLate" },
            key: vec!["certificate".to_owned(), percent.to_string(), not_after.to_string()],
            message: format!(
                "the certificate of its identity is not renewed, no more than {percent} percent of its life is left: {why}"
            ),
        }
    }
}

/// Characters of a reason.
const MOST_WORDS: usize = 512;
/// That wait to be written.
const WAITING: usize = 64;

/// Where notices are put. Clones are the same.
#[derive(Clone, Debug)]
pub struct Notices {
    buckets: Arc<Mutex<Buckets>>,
    waiting: mpsc::Sender<Notice>,
}

impl Notices {
    /// One more, unless there are too many. What is too much never waits: it would take others' places.
    pub fn put(&self, notice: Notice) {
        let (pod, reason) = (notice.pod.clone(), notice.reason);
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if !buckets.take(&pod.namespace, Instant::now()) {
            drop(buckets);
            debug!(%pod, reason, "no Event of this, there are too many");
        } else if self.waiting.try_send(notice).is_err() {
            drop(buckets);
            debug!(%pod, reason, "no Event of this: those before it cannot be written");
        }
    }
}

/// Where ztunnel's notices are put, and where they are taken from.
pub fn queue() -> (Notices, mpsc::Receiver<Notice>) {
    let (waiting, noticed) = mpsc::channel(WAITING);
    let buckets = Arc::new(Mutex::new(Buckets::new(Instant::now())));
    (Notices { buckets, waiting }, noticed)
}

/// Writes them until `shutdown`.
pub async fn run(mut notices: mpsc::Receiver<Notice>, cluster: ApiServer, shutdown: CancellationToken) {
    let mut failing = false;
    loop {
        let notice = tokio::select! {
            () = shutdown.cancelled() => return,
            notice = notices.recv() => match notice { Some(notice) => notice, None => return },
        };
        let (pod, reason) = (&notice.pod, notice.reason);
        let before = failing;
        failing = match cluster.tell(&notice).await {
            // It was told, or the namespace goes.
            Ok(()) | Err(ClusterError::Gone) => false,
            Err(error) if before => {
                debug!(%pod, reason, "still cannot write Events: {error}");
                true
            }
            Err(error) => {
                warn!(%pod, reason, "cannot write an Event, ztunnel's log has it: {error}");
                true
            }
        };
    }
}

/// The node's, and each namespace's.
#[derive(Debug)]
struct Buckets {
    node: Bucket,
    by_namespace: HashMap<Arc<str>, Bucket>,
}

impl Buckets {
    /// For all of the node: at once, and time for one more.
    const OF_NODE: (f64, Duration) = (25.0, Duration::from_secs(1));
    /// For one namespace's pods.
    const OF_NAMESPACE: (f64, Duration) = (10.0, Duration::from_secs(3));
    /// Namespaces before those are looked for that have used nothing lately.
    const MANY: usize = 256;

    fn new(now: Instant) -> Self {
        Self { node: Bucket::new(Self::OF_NODE, now), by_namespace: HashMap::new() }
    }

    fn take(&mut self, namespace: &Arc<str>, now: Instant) -> bool {
        if self.by_namespace.len() >= Self::MANY && !self.by_namespace.contains_key(namespace) {
            self.by_namespace.retain(|_, bucket| !bucket.is_full(now));
        }
        let own = || Bucket::new(Self::OF_NAMESPACE, now);
        let own = self.by_namespace.entry(namespace.clone()).or_insert_with(own);
        // What is not had of the node is not used up of the namespace.
        own.has_one(now) && self.node.take(now) && own.take(now)
    }
}

/// So many at once, and one more each time that this has passed.
#[derive(Debug)]
struct Bucket {
    most: f64,
    each: Duration,
    left: f64,
    at: Instant,
}

impl Bucket {
    fn new((most, each): (f64, Duration), now: Instant) -> Self {
        Self { most, each, left: most, at: now }
    }

    fn fill(&mut self, now: Instant) {
        let more = now.saturating_duration_since(self.at).as_secs_f64() / self.each.as_secs_f64();
        self.left = (self.left + more).min(self.most);
        self.at = now;
    }

    fn is_full(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.left >= self.most
    }

    fn has_one(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.left >= 1.0
    }

    fn take(&mut self, now: Instant) -> bool {
        let one = self.has_one(now);
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
    fn a_burst_and_then_one_after_the_other() {
        let start = Instant::now();
        let mut bucket = Bucket::new((25.0, Duration::from_secs(1)), start);
        let taken = |bucket: &mut Bucket, at| (0..100).filter(|_| bucket.take(at)).count();
        assert_eq!(taken(&mut bucket, start), 25);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(999)), 0);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(3)), 3);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(3600)), 25, "no more than at first");
    }

    #[test]
    fn what_is_too_much_takes_nobody_s_place_in_the_queue() {
        let (notices, mut noticed) = queue();
        let refused = |namespace: &str| {
            let pod = ObjectName::new(namespace, "p");
            Notice::refused(pod, "uid".into(), "client".into(), 80, "p".into(), "because")
        };
        for _ in 0..2 * WAITING {
            notices.put(refused("shop"));
        }
        notices.put(refused("bank"));
        let waiting = std::iter::from_fn(|| noticed.try_recv().ok());
        let waiting: Vec<_> = waiting.map(|notice| notice.pod.namespace.to_string()).collect();
        assert_eq!((waiting.len(), waiting.last().map(String::as_str)), (11, Some("bank")));
    }

    #[test]
    fn one_namespace_leaves_room_for_others_and_all_have_a_bound() {
        let start = Instant::now();
        let mut buckets = Buckets::new(start);
        let mut taken =
            |namespace: &str, at| (0..100).filter(|_| buckets.take(&namespace.into(), at)).count();
        assert_eq!((taken("shop", start), taken("bank", start)), (10, 10));
        assert_eq!((taken("shop", start), taken("pay", start)), (0, 5), "the node's are used up");
        assert_eq!(taken("shop", start + Duration::from_secs(6)), 2);
        // "pay" still has five of its own, which the node had no room for.
        assert_eq!(taken("pay", start + Duration::from_secs(11)), 8);
        let later = start + Duration::from_secs(3600);
        for number in 0..1000 {
            taken(&number.to_string(), later);
        }
        let known = buckets.by_namespace.len();
        assert!(known <= Buckets::MANY, "{known}: those that have used nothing lately are forgotten");
    }
}
