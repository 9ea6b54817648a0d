//! A kernel, an API server and a ztunnel that do as they are told, and write down what they did.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use mesh_core::pod_link::Link;
use mesh_core::proto::pods::{self as proto, from_agent, from_ztunnel};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use crate::cluster::{Cluster, ClusterError};
use crate::datapath::{Denies, Flaw, Foreign, Listeners, PodError, PodSpec, Proof, Reset, Survivor};
use crate::enrol::kernel::{Drops, Kernel};
use crate::index::event::ObjectName;
use crate::index::pod::{Condition, Reported};

/// Everything that happened, in order.
pub(super) type Journal = Arc<watch::Sender<Vec<String>>>;

pub(super) fn note(journal: &Journal, what: impl Into<String>) {
    journal.send_modify(|entries| entries.push(what.into()));
}

/// What goes wrong at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is not done, and says so.
    Error,
    /// The same, of a pod that is to leave: it stays captured.
    Refusal,
    /// It does not come back until told to, and nothing has been done.
    HangBefore,
    /// The same, and it has been done.
    HangAfter,
}

impl Fault {
    /// As the journal has it, before the step's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Error => "fails to ",
            Self::Refusal => "refuses to ",
            Self::HangBefore => "hangs before ",
            Self::HangAfter => "hangs after ",
        }
    }
}

/// What an error says.
pub(super) const WISH: &str = "as the test wishes";

/// The fault that is to come, and the journal of what was done. Clones are the same.
#[derive(Clone)]
pub(super) struct Faults {
    journal: Journal,
    next: Arc<Mutex<Option<(String, Fault)>>>,
    go_on: Arc<Semaphore>,
}

impl Faults {
    pub(super) fn new(journal: &Journal) -> Self {
        let (next, go_on) = (Arc::default(), Arc::new(Semaphore::new(0)));
        Self { journal: Arc::clone(journal), next, go_on }
    }

    pub(super) fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The next step whose name begins so goes wrong, once.
    pub(super) fn set(&self, step: &str, fault: Fault) {
        *self.next.lock().unwrap() = Some((step.to_owned(), fault));
    }

    /// Whether the step is refused.
    fn refuses(&self, step: &str) -> bool {
        let refusal =
            |(next, fault): &mut (String, Fault)| *fault == Fault::Refusal && step.starts_with(next.as_str());
        let refused = self.next.lock().unwrap().take_if(refusal).is_some();
        if refused {
            note(&self.journal, format!("{}{step}", Fault::Refusal.name()));
        }
        refused
    }

    /// What hangs goes on.
    pub(super) fn go_on(&self) {
        self.go_on.add_permits(1);
    }

    /// Does a step; whether it goes well.
    async fn does(&self, step: &str) -> bool {
        let fault = self.next.lock().unwrap().take_if(|(next, _)| step.starts_with(next.as_str()));
        let fault = fault.map(|(_, fault)| fault);
        if fault == Some(Fault::HangAfter) {
            note(&self.journal, step);
        }
        if let Some(fault) = fault {
            note(&self.journal, format!("{}{step}", fault.name()));
        }
        if matches!(fault, Some(Fault::HangBefore | Fault::HangAfter)) {
            self.go_on.acquire().await.unwrap().forget();
        }
        if matches!(fault, None | Some(Fault::HangBefore)) {
            note(&self.journal, step);
        }
        fault != Some(Fault::Error)
    }
}

pub(super) struct FakeKernel {
    pub(super) faults: Faults,
    pub(super) captured: BTreeMap<String, Vec<IpAddr>>,
    pub(super) unfinished: BTreeSet<String>,
    pub(super) runtime: Handle,
    /// Calls of `upkeep`, which asks to be called again soon.
    pub(super) upkeeps: watch::Sender<usize>,
    /// Programs of others that pods meet once they are captured.
    pub(super) foreign: Arc<Mutex<BTreeMap<String, Vec<Foreign>>>>,
    /// What proofs find, of pods that can be proved. A repair of the guard puts all right.
    pub(super) flaws: Flaws,
}

pub(super) type Flaws = Arc<Mutex<BTreeMap<String, Vec<Flaw>>>>;

impl FakeKernel {
    pub(super) fn new(faults: &Faults) -> Self {
        let (faults, runtime) = (faults.clone(), Handle::current());
        let (captured, unfinished, upkeeps) = (BTreeMap::new(), BTreeSet::new(), watch::Sender::default());
        Self {
            faults,
            captured,
            unfinished,
            runtime,
            upkeeps,
            foreign: Arc::default(),
            flaws: Arc::default(),
        }
    }

    fn does(&self, uid: &str, step: String) -> Result<(), PodError> {
        self.runtime.block_on(self.faults.does(&step)).then_some(()).ok_or_else(|| failure(uid))
    }
}

fn failure(uid: &str) -> PodError {
    PodError { uid: uid.to_owned(), step: "obey", source: std::io::Error::other(WISH) }
}

impl Kernel for FakeKernel {
    fn surviving(&self) -> Vec<Survivor> {
        let survivor = |(uid, addresses): (&String, &Vec<IpAddr>)| Survivor {
            uid: uid.clone(),
            addresses: addresses.clone(),
            netns_cookie: None,
        };
        self.captured.iter().map(survivor).collect()
    }

    fn unfinished(&self) -> Vec<String> {
        self.unfinished.iter().cloned().collect()
    }

    fn clear(&mut self, uid: &str, netns: Option<OwnedFd>) -> Result<(), PodError> {
        if !self.unfinished.contains(uid) {
            return self.leave(uid);
        }
        note(&self.faults.journal, format!("clear {uid}, alive: {}", netns.is_some()));
        self.unfinished.remove(uid);
        Ok(())
    }

    fn keep_pins(&mut self) -> std::io::Result<usize> {
        let kept = self.runtime.block_on(self.faults.does("keep pins"));
        if kept { Ok(0) } else { Err(std::io::Error::other(WISH)) }
    }

    fn prepare(&mut self, pod: &PodSpec, kept: Option<Listeners>) -> Result<Listeners, PodError> {
        let how = if kept.is_some() { "kept" } else { "new" };
        self.does(&pod.uid, format!("prepare {} {:?} {how} listeners", pod.uid, pod.addresses))?;
        Ok(kept.unwrap_or_else(listeners))
    }

    fn capture(&mut self, uid: &str) -> Result<(), PodError> {
        self.does(uid, format!("capture {uid}"))?;
        self.captured.insert(uid.to_owned(), Vec::new());
        Ok(())
    }

    fn survey(&mut self, uids: &BTreeSet<String>) -> BTreeMap<String, Proof> {
        let flaws = self.flaws.lock().unwrap();
        let found = uids.iter().filter_map(|uid| Some((uid.clone(), flaws.get(uid)?.clone())));
        let proof = |(uid, found): (String, Vec<Flaw>)| -> (String, Proof) { (uid, Box::new(|_| Ok(found))) };
        found.map(proof).collect()
    }

    fn spec(&self, uid: &str) -> std::io::Result<PodSpec> {
        let (uid, netns, addresses) = (uid.to_owned(), descriptor(), Vec::new());
        Ok(PodSpec { uid, netns, addresses, probe_ports: BTreeSet::new(), dns: true })
    }

    fn guard_again(&mut self, uid: &str) -> Result<(), PodError> {
        self.flaws.lock().unwrap().insert(uid.to_owned(), Vec::new());
        self.does(uid, format!("guard {uid} again"))
    }

    /// As the real one: a pod of which something cannot be removed is captured no more all the same, unless that is
    /// refused.
    fn leave(&mut self, uid: &str) -> Result<(), PodError> {
        if self.faults.refuses(&format!("leave {uid}")) {
            return Err(failure(uid));
        }
        self.captured.remove(uid);
        let left = self.does(uid, format!("leave {uid}"));
        if left.is_err() {
            note(&self.faults.journal, format!("leave {uid}"));
        }
        left
    }

    fn upkeep(&mut self) -> Duration {
        self.upkeeps.send_modify(|calls| *calls += 1);
        Duration::from_millis(10)
    }

    fn reset_older(&mut self, _: &str, _: &Denies<'_>) -> Result<Reset, PodError> {
        Ok(Reset { count: 0, more: false })
    }

    fn drops(&mut self, _: usize) -> Drops {
        Drops::default()
    }

    fn follow_kubelet(&mut self) {}

    fn foreign(&mut self) -> std::io::Result<BTreeMap<String, Vec<Foreign>>> {
        let captured = |(uid, _): &(&String, &Vec<Foreign>)| self.captured.contains_key(*uid);
        let foreign = self.foreign.lock().unwrap();
        Ok(foreign.iter().filter(captured).map(|(uid, all)| (uid.clone(), all.clone())).collect())
    }
}

pub(super) struct FakeCluster {
    pub(super) journal: Journal,
    pub(super) faults: Faults,
    /// The next annotation is a panic.
    pub(super) panics: AtomicBool,
    pub(super) answer: Mutex<Result<Option<(Pod, Namespace)>, ClusterError>>,
}

impl Cluster for FakeCluster {
    async fn pod(&self, name: &ObjectName) -> Result<Option<(Pod, Namespace)>, ClusterError> {
        note(&self.journal, format!("get {name}"));
        self.answer.lock().unwrap().clone()
    }

    async fn namespace(&self, name: &str) -> Result<Option<Namespace>, ClusterError> {
        note(&self.journal, format!("get namespace {name}"));
        self.answer.lock().unwrap().clone().map(|answer| answer.map(|(_, namespace)| namespace))
    }

    async fn annotate(&self, name: &ObjectName, uid: &str, captured: bool) -> Result<(), ClusterError> {
        if !self.faults.does(&format!("annotate {name} {uid} {captured}")).await {
            return Err(ClusterError::Unreachable { act: "annotate", reason: WISH.to_owned() });
        }
        assert!(!self.panics.swap(false, Ordering::Relaxed), "as the test wishes");
        Ok(())
    }

    async fn report(
        &self,
        name: &ObjectName,
        _: &str,
        _: Condition,
        reported: Option<&Reported>,
    ) -> Result<(), ClusterError> {
        note(&self.journal, format!("report {name} {:?}", reported.map(|reported| &reported.reason)));
        Ok(())
    }
}

/// A ztunnel that takes everything; it has these pods already.
pub(super) async fn obey(link: Link, faults: Faults, held: Vec<String>) {
    let send = async |message: from_ztunnel::Message, fds: &[BorrowedFd<'_>]| {
        link.send(&proto::FromZtunnel { message: Some(message) }, fds).await
    };
    let hello = proto::Hello { min_version: 2, max_version: 2, ..Default::default() };
    send(from_ztunnel::Message::Hello(hello), &[]).await.unwrap();
    for uid in held {
        let names = [proto::Fd::Netns, proto::Fd::OutboundV4, proto::Fd::InboundV4, proto::Fd::HboneV4];
        let descriptors = names.map(|_| descriptor());
        let held = proto::Held {
            pod: Some(proto::Pod { uid, ..Default::default() }),
            fds: names.map(i32::from).to_vec(),
        };
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        send(from_ztunnel::Message::Held(held), &descriptors).await.unwrap();
    }
    send(from_ztunnel::Message::HeldEnd(proto::HeldEnd {}), &[]).await.unwrap();
    while let Ok((message, _)) = link.receive::<proto::FromAgent>().await {
        let (sequence, step) = match message.message.unwrap() {
            from_agent::Message::Add(add) => (add.sequence, format!("ztunnel adds {}", add.pod.unwrap().uid)),
            from_agent::Message::Remove(remove) => {
                (remove.sequence, format!("ztunnel removes {}", remove.uid))
            }
            from_agent::Message::Keep(keep) => {
                (keep.sequence, format!("ztunnel keeps {}", keep.pod.unwrap().uid))
            }
            from_agent::Message::SnapshotEnd(end) => (end.sequence, String::new()),
            _ => continue,
        };
        let mut error = String::new();
        if !step.is_empty() && !faults.does(&step).await {
            error = WISH.to_owned();
            if step.contains("removes") {
                // Whatever is wrong, it serves the pod no more.
                note(&faults.journal, step);
            }
        }
        if send(from_ztunnel::Message::Ack(proto::Ack { sequence, error }), &[]).await.is_err() {
            return;
        }
    }
}

pub(super) fn descriptor() -> OwnedFd {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().into()
}

fn listeners() -> Listeners {
    Listeners {
        outbound_v4: descriptor(),
        inbound_v4: descriptor(),
        hbone_v4: descriptor(),
        outbound_v6: None,
        inbound_v6: None,
        hbone_v6: None,
        dns_v4: None,
        dns_v6: None,
    }
}
