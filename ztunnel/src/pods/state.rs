//! The client's half of the pod protocol, pure: messages in, what to do out (`mesh-core/proto/pods.proto`).
//!
//! **Invariant:** what a message may be depends on what came before; anything else ends the conversation, and the next
//! one starts over. A pod that is described badly is only that pod's failure, told in its Ack.

use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;

use mesh_core::addr::Network;
use mesh_core::convert::{self, Names};
use mesh_core::pod_protocol;
use mesh_core::proto::pods as wire;
use mesh_core::workload::{Health, Locality, Tunnel, Workload};
use wire::Fd;
use wire::from_agent::Message;

/// Descriptors of one pod by what they are.
pub type Descriptors = BTreeMap<Fd, OwnedFd>;

/// A pod as the agent describes it.
#[derive(Clone, Debug)]
pub struct PodInfo {
    /// Kubernetes pod UID.
    pub uid: String,
    /// As a workload; the mesh may know more of it.
    pub workload: Workload,
    /// As it came, to be told to the next agent.
    pub wire: wire::Pod,
}

/// What to do.
#[derive(Debug)]
pub enum Action {
    /// The conversation is open: say what is held.
    Greeted {
        /// What the agent runs, for the log.
        software: String,
        /// Where sockets are flagged, if the agent has a guard.
        flag_map: Option<OwnedFd>,
    },
    /// Serve a pod.
    Add(u64, Box<PodInfo>, Descriptors),
    /// Go on serving a pod.
    Keep(u64, Box<PodInfo>),
    /// Stop serving the pod with this uid.
    Remove(u64, String),
    /// Stop serving all pods but these uids.
    Snapshot(u64, HashSet<String>),
    /// Take no new connections, if the process is to end: another serves the pods.
    Superseded(u64),
    /// The message is understood but cannot be done.
    Refuse(u64, String),
}

/// Why a conversation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The agent does not want us.
    #[error("the node agent refuses: {0}")]
    Goodbye(String),
    /// The agent chose what we do not speak.
    #[error(
        "the node agent chose version {0} of the pod protocol, this ztunnel speaks {start} to {end}; upgrade the older of the two",
        start = .1.start(), end = .1.end()
    )]
    Version(u32, RangeInclusive<u32>),
    /// A message that may not come now.
    #[error("the node agent sent {message} {when}")]
    OutOfOrder {
        /// Which.
        message: &'static str,
        /// When.
        when: &'static str,
    },
    /// No message in the packet.
    #[error("the node agent sent a message that this ztunnel does not know")]
    Unknown,
    /// The descriptors are not those that the message lists.
    #[error("{message} lists {listed} descriptors and carries {carried}")]
    Descriptors {
        /// Which.
        message: &'static str,
        /// In its list.
        listed: usize,
        /// Beside it.
        carried: usize,
    },
}

/// Where a conversation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Greeting,
    Snapshot,
    Serving,
}

/// One connection to an agent.
#[derive(Debug)]
pub struct Conversation {
    phase: Phase,
    versions: RangeInclusive<u32>,
    /// The one that both speak; none before the Welcome.
    agreed: Option<u32>,
    network: Network,
    names: Names,
    named: HashSet<String>,
}

impl Conversation {
    /// Nothing has been received; addresses of pods are of `network`, `versions` those that are spoken.
    pub fn new(network: Network, versions: RangeInclusive<u32>) -> Self {
        let (names, named) = (Names::default(), HashSet::new());
        Self { phase: Phase::Greeting, versions, agreed: None, network, names, named }
    }

    /// The first message to send; one that drains says so.
    pub fn hello(&self, draining: bool) -> wire::FromZtunnel {
        let hello = wire::Hello {
            min_version: *self.versions.start(),
            max_version: *self.versions.end(),
            software: concat!("ztunnel ", env!("CARGO_PKG_VERSION")).to_owned(),
            draining,
        };
        wire::FromZtunnel { message: Some(wire::from_ztunnel::Message::Hello(hello)) }
    }

    /// Whether the agent has named all its pods.
    pub fn is_complete(&self) -> bool {
        self.phase == Phase::Serving
    }

    /// Whether the agent has no word for a successor: who is to end stops at once. Not known before its Welcome.
    pub fn knows_no_successors(&self) -> bool {
        self.agreed.is_some_and(|agreed| agreed < pod_protocol::SUCCESSORS)
    }

    /// Whether the agent may be sent this.
    pub fn has_word_for(&self, message: &wire::from_ztunnel::Message) -> bool {
        let expiry = matches!(message, wire::from_ztunnel::Message::Expiring(_));
        !expiry || self.agreed.is_some_and(|agreed| agreed >= pod_protocol::EXPIRY)
    }

    /// What a message asks for.
    ///
    /// # Errors
    /// When the conversation is over.
    pub fn receive(&mut self, message: wire::FromAgent, fds: Vec<OwnedFd>) -> Result<Action, ProtocolError> {
        let message = message.message.ok_or(ProtocolError::Unknown)?;
        match (self.phase, message) {
            (_, Message::Goodbye(goodbye)) => Err(ProtocolError::Goodbye(goodbye.reason)),
            (Phase::Greeting, Message::Welcome(welcome)) => self.welcome(welcome, fds),
            (Phase::Greeting, other) => {
                Err(ProtocolError::OutOfOrder { message: name(&other), when: "before Welcome" })
            }
            (_, Message::Welcome(_)) => {
                Err(ProtocolError::OutOfOrder { message: "Welcome", when: "a second time" })
            }
            (_, Message::Add(add)) => {
                let fds = pair("AddPod", &add.fds, fds)?;
                Ok(self.add(add.sequence, add.pod, fds))
            }
            (Phase::Snapshot, Message::Keep(keep)) => {
                none("KeepPod", &fds)?;
                Ok(self.keep(keep.sequence, keep.pod))
            }
            (Phase::Snapshot, Message::SnapshotEnd(end)) => {
                none("SnapshotEnd", &fds)?;
                self.phase = Phase::Serving;
                Ok(Action::Snapshot(end.sequence, std::mem::take(&mut self.named)))
            }
            (_, Message::Remove(remove)) => {
                none("RemovePod", &fds)?;
                self.named.remove(&remove.uid);
                Ok(Action::Remove(remove.sequence, remove.uid))
            }
            (Phase::Serving, Message::Superseded(superseded)) if !self.knows_no_successors() => {
                none("Superseded", &fds)?;
                Ok(Action::Superseded(superseded.sequence))
            }
            (Phase::Snapshot, Message::Superseded(_)) => Err(ProtocolError::OutOfOrder {
                message: "Superseded",
                when: "before the end of the snapshot",
            }),
            (Phase::Serving, other) => {
                Err(ProtocolError::OutOfOrder { message: name(&other), when: "after the snapshot" })
            }
        }
    }

    fn welcome(&mut self, welcome: wire::Welcome, fds: Vec<OwnedFd>) -> Result<Action, ProtocolError> {
        if !self.versions.contains(&welcome.version) {
            return Err(ProtocolError::Version(welcome.version, self.versions.clone()));
        }
        self.agreed = Some(welcome.version);
        let mut fds = pair("Welcome", &welcome.fds, fds)?;
        self.phase = Phase::Snapshot;
        let flag_map = fds.remove(&Fd::SocketFlagMap);
        Ok(Action::Greeted { software: welcome.software, flag_map })
    }

    fn add(&mut self, sequence: u64, pod: Option<wire::Pod>, fds: Descriptors) -> Action {
        let missing = REQUIRED.iter().find(|fd| !fds.contains_key(fd));
        match (self.describe(pod), missing) {
            (Ok(_), Some(missing)) => {
                Action::Refuse(sequence, format!("{} is missing", missing.as_str_name()))
            }
            (Ok(info), None) => {
                self.note(&info.uid);
                Action::Add(sequence, Box::new(info), fds)
            }
            (Err(reason), _) => Action::Refuse(sequence, reason),
        }
    }

    fn keep(&mut self, sequence: u64, pod: Option<wire::Pod>) -> Action {
        match self.describe(pod) {
            Ok(info) => {
                self.note(&info.uid);
                Action::Keep(sequence, Box::new(info))
            }
            Err(reason) => Action::Refuse(sequence, reason),
        }
    }

    fn note(&mut self, uid: &str) {
        if self.phase == Phase::Snapshot {
            self.named.insert(uid.to_owned());
        }
    }

    fn describe(&mut self, pod: Option<wire::Pod>) -> Result<PodInfo, String> {
        let pod = pod.ok_or("the message describes no pod")?;
        describe(pod, self.network.clone(), &mut self.names)
    }
}

/// What a pod cannot be served without.
const REQUIRED: [Fd; 4] = [Fd::Netns, Fd::OutboundV4, Fd::InboundV4, Fd::HboneV4];

/// The agent's description as a workload: enough to serve the pod before the mesh names it.
fn describe(pod: wire::Pod, network: Network, names: &mut Names) -> Result<PodInfo, String> {
    if pod.uid.is_empty() || pod.workload_uid.is_empty() {
        return Err("the pod has no uid".to_owned());
    }
    let what = format!("pod {}/{}", pod.namespace, pod.name);
    let bad = |error: &dyn std::fmt::Display| format!("{what}: {error}");
    let addresses: Vec<_> = pod
        .addresses
        .iter()
        .map(|bytes| convert::ip(bytes))
        .collect::<Result<_, _>>()
        .map_err(|error| bad(&error))?;
    if addresses.is_empty() {
        return Err(bad(&"it has no address"));
    }
    let account = if pod.service_account.is_empty() { "default" } else { &pod.service_account };
    let identity = names.identity(&pod.trust_domain, &pod.namespace, account).map_err(|error| bad(&error))?;
    let workload = Workload {
        uid: pod.workload_uid.as_str().into(),
        name: pod.name.as_str().into(),
        namespace: names.share(&pod.namespace),
        addresses: addresses.into(),
        network,
        tunnel: Tunnel::Hbone,
        identity,
        waypoint: None,
        node: names.share(&pod.node),
        canonical_name: names.share(&pod.canonical_name),
        canonical_revision: names.share(&pod.canonical_revision),
        workload_name: names.share(&pod.workload_name),
        workload_type: convert::workload::workload_type(pod.workload_type).map_err(|error| bad(&error))?,
        authorization_policies: pod.authorization_policies.iter().map(|name| names.share(name)).collect(),
        health: Health::Healthy,
        cluster: names.share(&pod.cluster_id),
        network_gateway: None,
        hostname: names.share(""),
        services: [].into(),
        application_tunnel: None,
        locality: Locality::default(),
        host_network: false,
        capacity: 1,
        // Not before the mesh says so.
        shortcut: false,
    };
    Ok(PodInfo { uid: pod.uid.clone(), workload, wire: pod })
}

/// The descriptors by their kinds; kinds that this version does not know are closed.
fn pair(message: &'static str, kinds: &[i32], fds: Vec<OwnedFd>) -> Result<Descriptors, ProtocolError> {
    if kinds.len() != fds.len() {
        return Err(ProtocolError::Descriptors { message, listed: kinds.len(), carried: fds.len() });
    }
    Ok(kinds.iter().zip(fds).filter_map(|(kind, fd)| Some((Fd::try_from(*kind).ok()?, fd))).collect())
}

fn none(message: &'static str, fds: &[OwnedFd]) -> Result<(), ProtocolError> {
    if fds.is_empty() {
        return Ok(());
    }
    Err(ProtocolError::Descriptors { message, listed: 0, carried: fds.len() })
}

fn name(message: &Message) -> &'static str {
    match message {
        Message::Welcome(_) => "Welcome",
        Message::Goodbye(_) => "Goodbye",
        Message::Add(_) => "AddPod",
        Message::Keep(_) => "KeepPod",
        Message::Remove(_) => "RemovePod",
        Message::SnapshotEnd(_) => "SnapshotEnd",
        Message::Superseded(_) => "Superseded",
    }
}

#[cfg(test)]
mod tests;
