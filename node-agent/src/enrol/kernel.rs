//! The thread that owns the datapath: netlink, BPF and namespace changes block, and are done one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mesh_ebpf_abi::event::{Counter, DropEvent};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::datapath::{Datapath, Denies, Foreign, Listeners, PodError, PodSpec, Proof, Reset, Survivor};

/// What enrolment needs of the datapath; a test has its own.
pub trait Kernel: Send + 'static {
    /// See [`Datapath::surviving`].
    fn surviving(&self) -> Vec<Survivor>;
    /// See [`Datapath::unfinished`].
    fn unfinished(&self) -> Vec<String>;
    /// See [`Datapath::clear`].
    ///
    /// # Errors
    /// As there.
    fn clear(&mut self, uid: &str, netns: Option<OwnedFd>) -> Result<(), PodError>;
    /// See [`Datapath::keep_pins`].
    ///
    /// # Errors
    /// As there.
    fn keep_pins(&mut self) -> std::io::Result<usize>;
    /// See [`Datapath::prepare`].
    ///
    /// # Errors
    /// As there.
    fn prepare(&mut self, pod: &PodSpec, kept: Option<Listeners>) -> Result<Listeners, PodError>;
    /// See [`Datapath::capture`].
    ///
    /// # Errors
    /// As there.
    fn capture(&mut self, uid: &str) -> Result<(), PodError>;
    /// See [`Datapath::survey`].
    fn survey(&mut self, uids: &BTreeSet<String>) -> BTreeMap<String, Proof>;
    /// See [`Datapath::spec`].
    ///
    /// # Errors
    /// As there.
    fn spec(&self, uid: &str) -> std::io::Result<PodSpec>;
    /// See [`Datapath::guard_again`].
    ///
    /// # Errors
    /// As there.
    fn guard_again(&mut self, uid: &str) -> Result<(), PodError>;
    /// See [`Datapath::leave`].
    ///
    /// # Errors
    /// As there.
    fn leave(&mut self, uid: &str) -> Result<(), PodError>;
    /// See [`Datapath::upkeep`]; called between jobs.
    fn upkeep(&mut self) -> Duration;
    /// See [`Datapath::reset_older`].
    ///
    /// # Errors
    /// As there.
    fn reset_older(&mut self, uid: &str, denies: &Denies<'_>) -> Result<Reset, PodError>;
    /// What the programs counted, and up to `most` of the packets and connections that they dropped.
    fn drops(&mut self, most: usize) -> Drops;
    /// See [`Datapath::follow_kubelet`].
    fn follow_kubelet(&mut self);
    /// See [`Datapath::foreign`].
    ///
    /// # Errors
    /// As there.
    fn foreign(&mut self) -> std::io::Result<BTreeMap<String, Vec<Foreign>>>;
}

/// See [`Kernel::drops`].
#[derive(Clone, Debug, Default)]
pub struct Drops {
    /// Since the maps were made.
    pub counts: Vec<(Counter, u64)>,
    /// New ones.
    pub events: Vec<DropEvent>,
}

impl Kernel for Datapath {
    fn surviving(&self) -> Vec<Survivor> {
        Datapath::surviving(self)
    }

    fn unfinished(&self) -> Vec<String> {
        Datapath::unfinished(self)
    }

    fn clear(&mut self, uid: &str, netns: Option<OwnedFd>) -> Result<(), PodError> {
        Datapath::clear(self, uid, netns)
    }

    fn keep_pins(&mut self) -> std::io::Result<usize> {
        Datapath::keep_pins(self)
    }

    fn prepare(&mut self, pod: &PodSpec, kept: Option<Listeners>) -> Result<Listeners, PodError> {
        Datapath::prepare(self, pod, kept)
    }

    fn capture(&mut self, uid: &str) -> Result<(), PodError> {
        Datapath::capture(self, uid)
    }

    fn survey(&mut self, uids: &BTreeSet<String>) -> BTreeMap<String, Proof> {
        Datapath::survey(self, uids)
    }

    fn spec(&self, uid: &str) -> std::io::Result<PodSpec> {
        Datapath::spec(self, uid)
    }

    fn guard_again(&mut self, uid: &str) -> Result<(), PodError> {
        Datapath::guard_again(self, uid)
    }

    fn leave(&mut self, uid: &str) -> Result<(), PodError> {
        Datapath::leave(self, uid)
    }

    fn upkeep(&mut self) -> Duration {
        Datapath::upkeep(self)
    }

    fn reset_older(&mut self, uid: &str, denies: &Denies<'_>) -> Result<Reset, PodError> {
        Datapath::reset_older(self, uid, denies)
    }

    fn drops(&mut self, most: usize) -> Drops {
        let count = |counter: &Counter| Some((*counter, self.count(*counter).ok()?));
        let counts = Counter::ALL.iter().filter_map(count).collect();
        let events = std::iter::from_fn(|| self.next_drop()).take(most).collect();
        Drops { counts, events }
    }

    fn follow_kubelet(&mut self) {
        Datapath::follow_kubelet(self);
    }

    fn foreign(&mut self) -> std::io::Result<BTreeMap<String, Vec<Foreign>>> {
        Datapath::foreign(self)
    }
}

type Job = Box<dyn FnOnce(&mut dyn Kernel) + Send>;

/// Hands jobs to the thread, which ends with the last handle.
#[derive(Clone, Debug)]
pub struct Handle {
    jobs: mpsc::Sender<Job>,
    /// Cancelled as the thread ends, by a panic too.
    ended: CancellationToken,
    pulse: Arc<Mutex<Instant>>,
}

/// The thread is gone: a job panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the agent's datapath thread has died, see the log for a panic; the agent has to be restarted")]
pub struct Dead;

/// Why the thread is of no use; only a new process helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unwell {
    /// It has ended.
    #[error(transparent)]
    Dead(#[from] Dead),
    /// It does not come back from a job.
    #[error("the agent's datapath thread has been at one job for {} s; the agent has to be restarted", .0.as_secs())]
    Stuck(Duration),
}

/// Starts the thread.
///
/// # Errors
/// When the process can have no more threads.
pub fn spawn(mut kernel: impl Kernel) -> std::io::Result<Handle> {
    let (jobs, queue) = mpsc::channel::<Job>();
    let pulse = Arc::new(Mutex::new(Instant::now()));
    let beat = Arc::clone(&pulse);
    let ended = CancellationToken::new();
    let end = ended.clone().drop_guard();
    thread::Builder::new().name("datapath".to_owned()).spawn(move || {
        let _end = end;
        loop {
            *beat.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
            let next = kernel.upkeep();
            match queue.recv_timeout(next.min(PULSE)) {
                Ok(job) => job(&mut kernel),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    })?;
    Ok(Handle { jobs, ended, pulse })
}

/// How often an idle thread shows that it is there, at least.
const PULSE: Duration = Duration::from_secs(5);
/// Longer than any job takes on a busy node.
const STUCK: Duration = Duration::from_secs(60);

impl Handle {
    /// Whether the thread takes jobs; for the liveness probe.
    ///
    /// # Errors
    /// When it has ended, or has been at one job for a minute.
    pub fn check(&self, now: Instant) -> Result<(), Unwell> {
        if self.ended.is_cancelled() {
            return Err(Dead.into());
        }
        let silent =
            now.saturating_duration_since(*self.pulse.lock().unwrap_or_else(PoisonError::into_inner));
        if silent > STUCK { Err(Unwell::Stuck(silent)) } else { Ok(()) }
    }

    /// Waits for the thread's end.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Runs a job there. A job that was handed over runs even if the caller stops waiting.
    ///
    /// # Errors
    /// When the thread is gone.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Kernel) -> T + Send + 'static,
    ) -> Result<T, Dead> {
        let (sender, result) = oneshot::channel();
        let job: Job = Box::new(move |kernel| {
            // The caller may have gone: its job is done all the same.
            let _ = sender.send(job(kernel));
        });
        self.jobs.send(job).map_err(|_| Dead)?;
        result.await.map_err(|_| Dead)
    }
}

/// Looks where the kubelet is, until `shutdown`.
pub async fn follow_kubelet(kernel: Handle, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(FOLLOW) => {}
        }
        if kernel.run(|kernel| kernel.follow_kubelet()).await.is_err() {
            return;
        }
    }
}

/// A kubelet that was restarted probes from a new cgroup: for this long its probes meet the proxy.
const FOLLOW: Duration = Duration::from_secs(2);
