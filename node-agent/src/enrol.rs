//! Brings the node's pods into the mesh and out of it, as they start, run and end.
//!
//! One task keeps the table of pods (`plan`), begins the steps that are due and answers the CNI plugin; `steps` carries
//! out one step, `kernel` owns the datapath's thread. **Invariant:** a pod has one step under way at most; stopping the
//! agent changes nothing for any pod.

pub mod cni;
pub mod kernel;
pub mod plan;
mod proving;
pub mod steps;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::causes::chain;
use crate::cluster::Cluster;
use crate::cni::server::AddError;
use crate::datapath::{Flaw, Foreign, Proof};
use crate::index::event::ObjectName;
use crate::index::local::LocalPod;
use crate::model::Reader;
use plan::{Captures, Outcome, Step, Table};
use steps::Hands;

/// What the CNI side asks of the table's task.
#[derive(Debug)]
enum Request {
    Add {
        pod: Box<LocalPod>,
        netns: OwnedFd,
        addresses: Vec<IpAddr>,
        container: String,
        reply: oneshot::Sender<Result<(), AddError>>,
    },
    Del {
        uid: Option<String>,
        name: ObjectName,
        container: String,
        reply: oneshot::Sender<()>,
    },
    Check {
        uid: String,
        reply: oneshot::Sender<bool>,
    },
    Gc {
        containers: BTreeSet<String>,
        reply: oneshot::Sender<()>,
    },
}

/// Something that was begun and has ended.
enum Ended {
    Step(String, Step, Outcome),
    Added {
        pod: Box<LocalPod>,
        container: String,
        result: Result<(), AddError>,
        reply: oneshot::Sender<Result<(), AddError>>,
    },
    Deleted {
        uid: String,
        released: bool,
        reply: oneshot::Sender<()>,
    },
    Looked(Result<BTreeMap<String, String>, String>),
    /// The pods that were to be proved, and the proofs.
    Surveyed(BTreeSet<String>, BTreeMap<String, Proof>),
    Proved(String, Option<Vec<Flaw>>),
}

/// The task.
pub struct Enrolment<C> {
    hands: Hands<C>,
    model: Reader,
    table: Table,
    requests: mpsc::Receiver<Request>,
    /// Requests whose pod has a step under way.
    waiting: VecDeque<Request>,
    tasks: JoinSet<Ended>,
    counts: Counts,
    /// When others' eBPF programs are looked for next; none while they are.
    look: Option<Instant>,
    /// Places for proofs under way.
    provers: Arc<Semaphore>,
}

/// Pods enrolled, pods whose last step failed, and pods that meet eBPF programs of others; for metrics.
#[derive(Clone, Debug, Default)]
pub struct Counts(Arc<Mutex<Counted>>);

type Counted = ((usize, usize, usize), Captures);

impl Counts {
    /// The numbers.
    pub fn read(&self) -> (usize, usize, usize) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// How pods are captured.
    pub fn captures(&self) -> Captures {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

/// A new task, and the desk for the CNI server. Pods that leave stay captured for `leave_grace`, see [`Table::new`].
pub fn enrolment<C: Cluster>(
    hands: Hands<C>,
    model: Reader,
    leave_grace: Duration,
) -> (Enrolment<C>, cni::Desk<C>) {
    let (sender, requests) = mpsc::channel(REQUESTS);
    let desk = cni::Desk { requests: sender, model: model.clone(), cluster: Arc::clone(&hands.cluster) };
    let enrolment = Enrolment {
        hands,
        model,
        table: Table::new(leave_grace),
        requests,
        waiting: VecDeque::new(),
        tasks: JoinSet::new(),
        counts: Counts::default(),
        look: Some(Instant::now()),
        provers: Arc::new(Semaphore::new(proving::PROVERS)),
    };
    (enrolment, desk)
}

impl<C: Cluster> Enrolment<C> {
    /// See [`Counts`].
    pub fn counts(&self) -> Counts {
        self.counts.clone()
    }

    /// Runs until `shutdown`, and then until the steps under way have ended.
    pub async fn run(mut self, shutdown: CancellationToken) {
        self.take_over().await;
        let pods = self.hands.pods.clone();
        let sockets_back = async {
            // ztunnel may be away as well; then new listeners take the place of the ones it had.
            let _ = tokio::time::timeout(SOCKETS_BACK, pods.connected()).await;
        };
        tokio::pin!(sockets_back);
        let mut waits_for_sockets = !self.table.is_empty();
        let mut settled = false;
        self.observe();
        loop {
            let wake = if waits_for_sockets { None } else { self.begin_due() };
            if !settled && !waits_for_sockets && self.table.is_settled() {
                settled = true;
                self.hands.pods.settle();
            }
            self.begin_waiting();
            self.begin_look();
            let prove = self.begin_proofs();
            *self.counts.0.lock().unwrap_or_else(PoisonError::into_inner) =
                (self.table.counts(), self.table.captures());
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = &mut sockets_back, if waits_for_sockets => waits_for_sockets = false,
                changed = self.model.changed() => match changed {
                    Ok(()) => self.observe(),
                    Err(_) => break,
                },
                Some(request) = self.requests.recv() => self.waiting.push_back(request),
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok(ended) => self.end(ended),
                    Err(lost) => error!("a step of enrolment died: {lost}"),
                },
                () = sleep_until(wake.into_iter().chain(self.look).chain(prove).min()) => {}
            }
        }
        self.requests.close();
        while let Some(ended) = self.tasks.join_next().await {
            if let Ok(ended) = ended {
                self.end(ended);
            }
        }
    }

    async fn take_over(&mut self) {
        self.hands.clear_unfinished().await;
        match self.hands.kernel.run(|kernel| kernel.surviving()).await {
            Ok(survivors) if survivors.is_empty() => {}
            Ok(survivors) => {
                info!(pods = survivors.len(), "pods are captured since before this agent; taking them over");
                self.table.survived(survivors.into_iter().map(|pod| pod.uid), now());
            }
            Err(dead) => error!("{dead}"),
        }
    }

    fn observe(&mut self) {
        let complete = self.model.is_synced();
        let pods = self.model.local_pods();
        self.table.observe(pods, complete, now());
    }

    /// Begins all steps that are due; when the next one will be.
    fn begin_due(&mut self) -> Option<Instant> {
        let plan = self.table.plan(now());
        for (uid, step) in plan.steps {
            if self.table.begin(&uid) {
                let hands = self.hands.clone();
                self.tasks.spawn(async move {
                    let outcome = unwinding(hands.carry_out(&uid, &step)).await;
                    let outcome =
                        outcome.unwrap_or_else(|error| Outcome::Failed { error: error.into(), early: false });
                    Ended::Step(uid, step, outcome)
                });
            }
        }
        plan.wake.map(Instant::from_std)
    }

    /// Begins to look for others' eBPF programs, when it is time.
    fn begin_look(&mut self) {
        if self.look.take_if(|look| *look <= Instant::now()).is_none() {
            return;
        }
        let kernel = self.hands.kernel.clone();
        self.tasks.spawn(async move {
            let text = |all: Vec<Foreign>| all.iter().map(Foreign::to_string).collect::<Vec<_>>().join("; ");
            let found = kernel.run(|kernel| kernel.foreign()).await.map_err(|dead| dead.to_string());
            let found = found.and_then(|found| found.map_err(|error| error.to_string()));
            Ended::Looked(found.map(|found| found.into_iter().map(|(uid, all)| (uid, text(all))).collect()))
        });
    }

    /// Begins the requests whose pods have no step under way, in order.
    fn begin_waiting(&mut self) {
        for request in std::mem::take(&mut self.waiting) {
            if let Some(request) = self.begin_request(request) {
                self.waiting.push_back(request);
            }
        }
    }

    /// Begins a request, or gives it back if its pod is busy.
    fn begin_request(&mut self, request: Request) -> Option<Request> {
        match request {
            // The runtime was told that it took too long; it will ask again.
            Request::Add { reply, .. } if reply.is_closed() => {}
            Request::Add { pod, netns, addresses, container, reply } => {
                if !self.table.begin(&pod.uid) {
                    return Some(Request::Add { pod, netns, addresses, container, reply });
                }
                let (hands, again) = (self.hands.clone(), self.table.is_enrolled(&pod.uid));
                self.tasks.spawn(async move {
                    let result = unwinding(add(&hands, &pod, netns, addresses, again)).await;
                    let result = result.unwrap_or_else(|error| Err(AddError::Unavailable(error.into())));
                    Ended::Added { pod, container, result, reply }
                });
            }
            Request::Del { uid, name, container, reply } => {
                if uid.as_deref().is_some_and(|uid| self.table.is_busy(uid)) {
                    // Perhaps by an ADD that the runtime gave up: it has to end before it can be undone.
                    return Some(Request::Del { uid, name, container, reply });
                }
                let Some((found, certain)) = self.table.attached(uid.as_deref(), &name, &container) else {
                    let _ = reply.send(());
                    return None;
                };
                if !self.table.begin(&found) {
                    return Some(Request::Del { uid, name, container, reply });
                }
                let hands = self.hands.clone();
                self.tasks.spawn(async move {
                    let released = unwinding(hands.detach(&found, certain)).await == Ok(true);
                    Ended::Deleted { uid: found, released, reply }
                });
            }
            Request::Check { uid, reply } => {
                let _ = reply.send(self.table.is_enrolled(&uid));
            }
            Request::Gc { containers, reply } => {
                for uid in self.table.detached(&containers) {
                    self.table.detach(&uid);
                }
                let _ = reply.send(());
            }
        }
        None
    }

    fn end(&mut self, ended: Ended) {
        if matches!(
            &ended,
            Ended::Step(_, Step::Enrol(_), Outcome::Done) | Ended::Added { result: Ok(()), .. }
        ) {
            let soon = Instant::now() + SOON;
            self.look = self.look.map(|look| look.min(soon));
        }
        match ended {
            Ended::Step(uid, step, outcome) => self.table.finish(&uid, &step, outcome, now()),
            Ended::Looked(found) => {
                self.look = Some(Instant::now() + LOOK);
                match found {
                    Ok(found) => self.table.meet(found).iter().for_each(|(uid, news)| tell(uid, news)),
                    Err(error) => warn!("cannot look for eBPF programs of others: {error}"),
                }
            }
            Ended::Surveyed(due, proofs) => self.prove(due, proofs),
            Ended::Proved(uid, found) => self.found(&uid, found),
            Ended::Added { pod, container, result, reply } => {
                self.table.idle(&pod.uid);
                match &result {
                    Ok(()) => {
                        self.table.enrolled(&pod.uid, Some(pod.name.clone()), Some(container), now());
                        self.table.enrolled_with(&pod.uid, pod.dns);
                    }
                    Err(_) => self.table.released(&pod.uid),
                }
                // The runtime may have given up; it calls DEL then.
                let _ = reply.send(result);
            }
            Ended::Deleted { uid, released, reply } => {
                self.table.idle(&uid);
                if released {
                    self.table.deleted(&uid, now());
                }
                let _ = reply.send(());
            }
        }
    }
}

/// Enrols a pod that is about to start. One that is enrolled already has a new sandbox: the old one is forgotten first.
async fn add<C: Cluster>(
    hands: &Hands<C>,
    pod: &LocalPod,
    netns: OwnedFd,
    addresses: Vec<IpAddr>,
    again: bool,
) -> Result<(), AddError> {
    if again {
        // What could not be taken off is gone with the old sandbox, or taken over in this one.
        let _ = hands.release(&pod.uid).await;
    }
    match hands.enrol(pod, netns, addresses).await {
        Ok(()) => {
            info!(pod = %pod.name, uid = pod.uid, "pod enrolled before its start");
            Ok(())
        }
        Err(error) => {
            hands.undo(&pod.uid).await;
            Err(AddError::Unavailable(chain(&error)))
        }
    }
}

/// What is done for a pod; a panic in it, which has been logged, is its failure: the pod must not stay busy for ever.
async fn unwinding<T>(work: impl Future<Output = T>) -> Result<T, &'static str> {
    AssertUnwindSafe(work).catch_unwind().await.map_err(|_| "the agent panicked, which is a bug; see its log")
}

fn tell(uid: &str, foreign: &str) {
    if foreign.is_empty() {
        info!(uid, "the pod meets no eBPF programs of others any more");
    } else {
        warn!(uid, "the pod meets eBPF programs of others: {foreign}");
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(wake).await,
        None => std::future::pending().await,
    }
}

/// Requests of the CNI server that are not looked at yet; it has a bound of its own.
const REQUESTS: usize = 16;
/// How often others' eBPF programs are looked for, and how soon after a pod was enrolled: with others that are enrolled
/// together.
const LOOK: Duration = Duration::from_secs(10);
const SOON: Duration = Duration::from_secs(1);
/// How long a restarted agent waits for ztunnel to bring back the pods' sockets.
const SOCKETS_BACK: Duration = Duration::from_secs(5);
