//! The agent's side of the pod protocol (`pods.proto`): which pods ztunnel serves, and their sockets.
//!
//! The agent keeps a copy of every listener, so that a restarted ztunnel finds connections waiting in them; a
//! restarted agent takes them back from ztunnel. `state` decides, this file carries it out.
//! **Invariant:** a silent, confused or foreign peer costs its own connection only.

mod greeting;
mod served;
mod state;

#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_core::pod_link::{Link, LinkError, Listener};
use mesh_core::pod_protocol;
use mesh_core::proto::pods::{self as proto, from_agent, from_ztunnel};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::index::event::ObjectName;
use crate::notices::{self, Notice, Notices};
pub use served::{InvalidDescriptors, Served};
use state::{BadAck, LinkId, Next, Progress, State};

/// The pods that ztunnel is to serve. Clones are the same.
#[derive(Clone, Debug)]
pub struct Pods {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    notices: Notices,
    versions: RangeInclusive<u32>,
}

/// Why a pod is not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServeError {
    /// No ztunnel.
    #[error(
        "no ztunnel is connected to the agent on this node; see `kubectl get pods -n ambit-system -l app=ztunnel -o wide`"
    )]
    NoProxy,
    /// It does not answer.
    #[error("ztunnel did not take the pod within {} s; see its log", ACK_DEADLINE.as_secs())]
    Timeout,
    /// It says no.
    #[error("ztunnel could not take the pod: {0}")]
    Refused(String),
}

impl Pods {
    /// No pods, no proxies yet; pods that a proxy reports are taken over until [`Self::settle`].
    /// What there is to tell of them is told nobody.
    pub fn new() -> Self {
        Self::telling(notices::queue().0, &pod_protocol::Config::default())
    }

    /// The same; what there is to tell of them goes to `notices`, and proxies are spoken to as `protocol` says.
    pub fn telling(notices: Notices, protocol: &pod_protocol::Config) -> Self {
        let (state, changed) = (Mutex::new(State::new()), watch::channel(()).0);
        let shared = Shared { state, changed, notices, versions: protocol.versions() };
        Self { shared: Arc::new(shared) }
    }

    /// Has the pod served; returns once the newest ztunnel has said that it does.
    ///
    /// # Errors
    /// When none does within the deadline; the pod stays wanted until it is removed.
    pub async fn add(&self, served: Served) -> Result<(), ServeError> {
        let uid = served.pod().uid.clone();
        let mut changed = self.shared.changed.subscribe();
        self.change(|state| state.put(Arc::new(served)));
        let deadline = Instant::now() + ACK_DEADLINE;
        loop {
            let progress = self.state().progress(&uid);
            match progress {
                Progress::Served => return Ok(()),
                Progress::Failed(error) => return Err(ServeError::Refused(error)),
                Progress::Pending { connected } => {
                    if tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
                        return Err(if connected { ServeError::Timeout } else { ServeError::NoProxy });
                    }
                }
            }
        }
    }

    /// Has no ztunnel serve the pod any more; returns once all have closed its sockets, or after a deadline (a ztunnel
    /// that does not answer is disconnected, and told again when it is back).
    pub async fn remove(&self, uid: &str) {
        let mut changed = self.shared.changed.subscribe();
        self.change(|state| state.remove(uid));
        let gone = async {
            while !self.state().is_gone(uid) {
                // We hold a sender: it cannot fail.
                let _ = changed.changed().await;
            }
        };
        if timeout(ACK_DEADLINE, gone).await.is_err() {
            warn!(uid, "a ztunnel did not confirm that it has let the pod go");
        }
    }

    /// Waits until a ztunnel has told which pods it holds.
    pub async fn connected(&self) {
        let mut changed = self.shared.changed.subscribe();
        while !self.state().is_connected() {
            let _ = changed.changed().await;
        }
    }

    /// Whether a ztunnel has told which pods it holds.
    pub fn is_connected(&self) -> bool {
        self.state().is_connected()
    }

    /// The listeners of a pod, for example as taken over from ztunnel.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn listeners(&self, uid: &str) -> std::io::Result<Option<crate::datapath::Listeners>> {
        let served = self.state().find(uid).cloned();
        served.map(|served| served.listeners().try_clone()).transpose()
    }

    /// What a proxy was told of a pod.
    pub fn description(&self, uid: &str) -> Option<proto::Pod> {
        self.state().find(uid).map(|served| served.pod().clone())
    }

    /// The agent knows its pods now: what ztunnel holds beyond them is dropped.
    pub fn settle(&self) {
        let dropped = self.change(State::settle);
        if !dropped.is_empty() {
            info!(pods = ?dropped, "ztunnel holds pods that are no longer of the mesh; it will drop them");
        }
    }

    /// How many pods are to be served, by how many ztunnels.
    pub fn counts(&self) -> (usize, usize) {
        self.state().counts()
    }

    /// Serves ztunnels until `shutdown`; they go on with what they have then. `flag_map` is the socket flag map.
    pub async fn serve(self, listener: Listener, flag_map: OwnedFd, shutdown: CancellationToken) {
        let flag_map = Arc::new(flag_map);
        let mut links = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => return,
                Some(_) = links.join_next() => continue,
                accepted = listener.accept(), if links.len() < MAX_LINKS => accepted,
            };
            match accepted {
                Ok(link) => {
                    let (pods, flag_map) = (self.clone(), Arc::clone(&flag_map));
                    links.spawn(async move { pods.converse(&link, &flag_map).await });
                }
                Err(error) => {
                    warn!("cannot accept a ztunnel: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// One ztunnel, until its connection ends.
    pub async fn converse(&self, link: &Link, flag_map: &OwnedFd) {
        let greeted = match greeting::greet(link, &self.shared.versions, flag_map).await {
            Ok(greeted) => greeted,
            Err(error) => return warn!("a ztunnel connected, but: {error}"),
        };
        info!(pods = greeted.held.len(), "ztunnel connected");
        let id = self.change(|state| state.join(greeted));
        let error = self.keep_informed(link, id).await;
        self.change(|state| state.part(id));
        match error {
            ConversationError::Link(LinkError::Closed) => info!("ztunnel disconnected"),
            error => warn!("ztunnel is disconnected: {error}"),
        }
    }

    /// Brings one ztunnel up to date, and keeps it so until something fails.
    async fn keep_informed(&self, link: &Link, id: LinkId) -> ConversationError {
        let mut changed = self.shared.changed.subscribe();
        loop {
            let next = self.state().next(id, Instant::now().into_std());
            let step = match next {
                Next::Wait(until) => {
                    tokio::select! {
                        _ = changed.changed() => Ok(()),
                        () = sleep_until(until) => Ok(()),
                        message = receive(link) => message.and_then(|(message, _)| self.told(id, &message)),
                    }
                }
                message => self.exchange(link, id, message).await,
            };
            if let Err(error) = step {
                return error;
            }
        }
    }

    /// Sends one message and waits for its Ack.
    async fn exchange(&self, link: &Link, id: LinkId, message: Next) -> Result<(), ConversationError> {
        let sequence = message.sequence();
        let sent = timeout(ACK_DEADLINE, send(link, message)).await.map_err(|_| ConversationError::Silent)?;
        let ack = match (sent, sequence) {
            // Nothing has left: it is this pod that cannot be told of, and no other is to suffer for it.
            (Err(ConversationError::Link(error @ LinkError::Size(_))), Some(sequence)) => {
                proto::Ack { sequence, error: error.to_string() }
            }
            (sent, _) => {
                sent?;
                self.answer(link, id).await?
            }
        };
        if let Some((uid, error)) = self.change(|state| state.acked(id, ack, Instant::now().into_std()))? {
            warn!(uid, "ztunnel does not serve a pod: {error}");
        }
        Ok(())
    }

    /// The Ack of the message that was sent last.
    async fn answer(&self, link: &Link, id: LinkId) -> Result<proto::Ack, ConversationError> {
        let ack = async {
            loop {
                match receive(link).await? {
                    (from_ztunnel::Message::Ack(ack), _) => return Ok(ack),
                    (other, _) => self.told(id, &other)?,
                }
            }
        };
        timeout(ACK_DEADLINE, ack).await.map_err(|_| ConversationError::Silent)?
    }

    /// What a ztunnel says without being asked.
    fn told(&self, id: LinkId, message: &from_ztunnel::Message) -> Result<(), ConversationError> {
        match message {
            from_ztunnel::Message::Draining(_) => {
                info!("ztunnel drains");
                self.change(|state| state.drains(id));
                Ok(())
            }
            from_ztunnel::Message::Denied(denied) => {
                self.denied(denied);
                Ok(())
            }
            from_ztunnel::Message::Expiring(expiring) => {
                self.expiring(expiring);
                Ok(())
            }
            other => Err(unexpected(other)),
        }
    }

    fn denied(&self, denied: &proto::Denied) {
        let state = self.state();
        let Some(pod) = state.find(&denied.uid).map(|served| served.pod()) else { return };
        let (client, policy) = (denied.client.clone(), denied.policy.clone());
        let pod = ObjectName::new(&pod.namespace, &pod.name);
        let uid = denied.uid.clone();
        self.shared.notices.put(Notice::refused(pod, uid, client, denied.port, policy, &denied.reason));
    }

    fn expiring(&self, expiring: &proto::Expiring) {
        let state = self.state();
        let whose = |pod: &&proto::Pod| {
            let proto::Pod { trust_domain, namespace, service_account, .. } = pod;
            expiring.identity == format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
        };
        for pod in state.all().map(|served| served.pod()).filter(whose).take(MOST_TOLD) {
            let name = ObjectName::new(&pod.namespace, &pod.name);
            let proto::Expiring { percent, not_after, reason, .. } = expiring;
            self.shared.notices.put(Notice::expiring(name, pod.uid.clone(), *percent, *not_after, reason));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.shared.changed.send_replace(());
        result
    }
}

impl Default for Pods {
    fn default() -> Self {
        Self::new()
    }
}

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
enum ConversationError {
    #[error(
        "it speaks versions {theirs:?} of the pod protocol, this agent {ours:?}; upgrade the older of both"
    )]
    Version { theirs: RangeInclusive<u32>, ours: RangeInclusive<u32> },
    #[error("it sent {0} where that has no place in the pod protocol")]
    Unexpected(&'static str),
    #[error("it sent a message without content, perhaps of a newer version")]
    Empty,
    #[error("it did not answer within {} s", ACK_DEADLINE.as_secs())]
    Silent,
    #[error("it holds more than {MAX_HELD} pods")]
    TooMany,
    #[error(transparent)]
    Ack(#[from] BadAck),
    #[error(transparent)]
    Link(#[from] LinkError),
}

async fn send(link: &Link, message: Next) -> Result<(), ConversationError> {
    let message = match message {
        Next::Add(sequence, served) => {
            let (fds, descriptors): (Vec<i32>, Vec<_>) =
                served.descriptors().into_iter().map(|(name, fd)| (i32::from(name), fd)).unzip();
            let add = proto::AddPod { sequence, pod: Some(served.pod().clone()), fds };
            link.send(&from_agent(from_agent::Message::Add(add)), &descriptors).await?;
            return Ok(());
        }
        Next::Keep(sequence, served) => {
            from_agent::Message::Keep(proto::KeepPod { sequence, pod: Some(served.pod().clone()) })
        }
        Next::Remove(sequence, uid) => from_agent::Message::Remove(proto::RemovePod { sequence, uid }),
        Next::SnapshotEnd(sequence) => from_agent::Message::SnapshotEnd(proto::SnapshotEnd { sequence }),
        Next::Superseded(sequence) => from_agent::Message::Superseded(proto::Superseded { sequence }),
        Next::Wait(_) => return Ok(()),
    };
    Ok(link.send(&from_agent(message), &[]).await?)
}

async fn receive(link: &Link) -> Result<(from_ztunnel::Message, Vec<OwnedFd>), ConversationError> {
    let (message, descriptors) = link.receive::<proto::FromZtunnel>().await?;
    let message = message.message.ok_or(ConversationError::Empty)?;
    if !descriptors.is_empty() && !matches!(message, from_ztunnel::Message::Held(_)) {
        return Err(LinkError::Descriptors { expected: 0, actual: descriptors.len() }.into());
    }
    Ok((message, descriptors))
}

fn from_agent(message: from_agent::Message) -> proto::FromAgent {
    proto::FromAgent { message: Some(message) }
}

fn unexpected(message: &from_ztunnel::Message) -> ConversationError {
    ConversationError::Unexpected(match message {
        from_ztunnel::Message::Hello(_) => "Hello",
        from_ztunnel::Message::Held(_) => "Held",
        from_ztunnel::Message::HeldEnd(_) => "HeldEnd",
        from_ztunnel::Message::Ack(_) => "Ack",
        from_ztunnel::Message::Draining(_) => "Draining",
        from_ztunnel::Message::Denied(_) => "Denied",
        from_ztunnel::Message::Expiring(_) => "Expiring",
    })
}

async fn sleep_until(until: Option<std::time::Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}

/// For one message and its Ack, and for a pod to be served.
const ACK_DEADLINE: Duration = Duration::from_secs(10);
const GREETING_DEADLINE: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// More pods than the kubelet allows on a node, by far.
const MAX_HELD: usize = 4096;
/// Pods of one identity that are told of its certificate.
const MOST_TOLD: usize = 8;
/// Two during an upgrade; some more for what is about to time out.
const MAX_LINKS: usize = 8;
