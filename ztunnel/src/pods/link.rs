//! The talk with the node agent: connects, greets, says what is held, does what it is told. For ever.
//!
//! **Invariant:** losing the agent, or being sent away by it, changes nothing for the pods that are served. Until the last
//! connection is over the agent is heard, also while the process drains: a pod that is removed then is cut then.

use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_core::addr::Network;
use mesh_core::backoff::Backoff;
use mesh_core::drain::Watch;
use mesh_core::pod_link::{Link, LinkError};
use mesh_core::proto::pods::{self as wire, from_ztunnel::Message};
use mesh_core::readiness::Gate;
use tokio::sync::mpsc;

use super::Pods;
use super::state::{Action, Conversation, ProtocolError};
use crate::denials::Waiting;

/// Time for the agent's first answer.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait before the agent is called again. Short, because an agent that is back waits only a few seconds for what
/// is held before it makes new listeners, and calling a unix socket costs nothing.
const LAST_DELAY: Duration = Duration::from_secs(1);

/// How often a failure that lasts is told.
const TOLD_EVERY: Duration = Duration::from_secs(30);

/// Why a talk ended.
#[derive(Debug, thiserror::Error)]
enum TalkError {
    #[error("connecting to {}: {source}", path.display())]
    Connect { path: PathBuf, source: LinkError },
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("the node agent does not answer within {} s", GREETING_TIMEOUT.as_secs())]
    Silent,
    #[error("the process has drained")]
    Drained,
}

/// How to follow the agent.
pub struct Follow {
    /// Where it listens.
    pub socket: PathBuf,
    /// Of the pods' addresses.
    pub network: Network,
    /// Opens with the first whole snapshot.
    pub ready: Gate,
    /// When the process drains ...
    pub drain: Watch,
    /// ... connections may go on for this long.
    pub deadline: Duration,
    /// Of the pod protocol.
    pub versions: RangeInclusive<u32>,
}

/// Follows the agent until the process has drained. Returns the pods that are served then, whose connections have had
/// their time.
pub async fn run(mut pods: Pods, follow: Follow, mut to_tell: mpsc::Receiver<Waiting>) -> Pods {
    let mut backoff = calls();
    let mut told: Option<(String, Instant)> = None;
    loop {
        let conversation = Conversation::new(follow.network.clone(), follow.versions.clone());
        let mut talk = Talk { conversation, follow: &follow, to_tell: &mut to_tell };
        let ended = talk.run(&mut pods).await;
        if matches!(ended, TalkError::Drained) {
            return pods;
        }
        if talk.conversation.is_complete() {
            backoff.reset();
            told = None;
        }
        let retry_in = backoff.delay();
        // The first failure of a kind is news; the same one again is not, until it has lasted.
        let text = ended.to_string();
        if told.as_ref().is_none_or(|(last, at)| *last != text || at.elapsed() >= TOLD_EVERY) {
            tracing::warn!(
                error = %text, ?retry_in,
                "no talk with the node agent; the pods that are served stay served, others wait for it"
            );
            told = Some((text, Instant::now()));
        }
        tokio::select! {
            biased;
            () = pods.drained() => return pods,
            () = follow.is_to_end(&pods) => pods.leave(follow.deadline),
            () = pods.idle() => pods.accept_no_more(),
            () = tokio::time::sleep(retry_in) => {}
        }
    }
}

impl Follow {
    /// Completes when the process is to end and the pods do not know it yet.
    async fn is_to_end(&self, pods: &Pods) {
        if pods.is_leaving() {
            return std::future::pending().await;
        }
        self.drain.draining().await;
    }
}

/// When to call the agent again.
fn calls() -> Backoff {
    Backoff::new(Duration::from_millis(10), LAST_DELAY)
}

struct Talk<'a> {
    conversation: Conversation,
    follow: &'a Follow,
    /// What the agent is to be told.
    to_tell: &'a mut mpsc::Receiver<Waiting>,
}

impl Talk<'_> {
    async fn run(&mut self, pods: &mut Pods) -> TalkError {
        match self.talk(pods, &self.follow.socket).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn talk(&mut self, pods: &mut Pods, socket: &Path) -> Result<std::convert::Infallible, TalkError> {
        let link = Link::connect(socket)
            .await
            .map_err(|source| TalkError::Connect { path: socket.to_owned(), source })?;
        link.send(&self.conversation.hello(pods.is_leaving()), &[]).await?;
        let (welcome, fds) = tokio::time::timeout(GREETING_TIMEOUT, self.next(pods, &link))
            .await
            .map_err(|_| TalkError::Silent)??;
        self.obey(pods, &link, welcome, fds).await?;
        loop {
            let (message, fds) = self.next(pods, &link).await?;
            self.obey(pods, &link, message, fds).await?;
        }
    }

    /// The agent's next message; meanwhile the process may begin to drain, which the agent is told, and end.
    async fn next(
        &mut self,
        pods: &mut Pods,
        link: &Link,
    ) -> Result<(wire::FromAgent, Vec<OwnedFd>), TalkError> {
        let listens = self.conversation.is_complete();
        loop {
            tokio::select! {
                biased;
                () = pods.drained() => return Err(TalkError::Drained),
                () = self.follow.is_to_end(pods) => {
                    pods.leave(self.follow.deadline);
                    self.stop_at_once(pods);
                    send(link, Message::Draining(wire::Draining {}), &[]).await?;
                }
                received = link.receive() => return Ok(received?),
                () = pods.idle() => pods.accept_no_more(),
                Some(Waiting { message, .. }) = self.to_tell.recv(), if listens => {
                    if self.conversation.has_word_for(&message) {
                        send(link, message, &[]).await?;
                    }
                }
            }
        }
    }

    /// Without an agent that tells of a successor: there should be one already.
    fn stop_at_once(&self, pods: &mut Pods) {
        if pods.is_leaving() && self.conversation.knows_no_successors() {
            pods.accept_no_more();
        }
    }

    async fn obey(
        &mut self,
        pods: &mut Pods,
        link: &Link,
        message: wire::FromAgent,
        fds: Vec<OwnedFd>,
    ) -> Result<(), TalkError> {
        let (sequence, result) = match self.conversation.receive(message, fds)? {
            Action::Greeted { software, flag_map } => {
                self.stop_at_once(pods);
                return greeted(pods, link, &software, flag_map).await;
            }
            Action::Add(sequence, info, fds) => {
                let what = format!("pod {}/{}", info.wire.namespace, info.wire.name);
                (sequence, pods.add(*info, fds).await.map_err(|error| format!("{what}: {error}")))
            }
            Action::Keep(sequence, info) if pods.is_served(&info.uid) => (sequence, Ok(())),
            Action::Keep(sequence, info) => {
                (sequence, Err(format!("pod {}/{} is not served here", info.wire.namespace, info.wire.name)))
            }
            Action::Remove(sequence, uid) => {
                pods.remove(&uid).await;
                (sequence, Ok(()))
            }
            Action::Snapshot(sequence, named) => {
                pods.retain(&named).await;
                tracing::info!(pods = named.len(), "the node agent has named its pods");
                self.follow.ready.open();
                (sequence, Ok(()))
            }
            Action::Superseded(sequence) if pods.is_leaving() => {
                tracing::info!("another ztunnel serves the pods: no new connections");
                pods.accept_no_more();
                (sequence, Ok(()))
            }
            Action::Superseded(sequence) => (sequence, Err("this ztunnel is not to end".to_owned())),
            Action::Refuse(sequence, reason) => (sequence, Err(reason)),
        };
        if let Err(error) = &result {
            tracing::warn!(%error, "cannot do what the node agent asks");
        }
        let ack = wire::Ack { sequence, error: result.err().unwrap_or_default() };
        send(link, Message::Ack(ack), &[]).await
    }
}

/// Answers a Welcome with what is held.
async fn greeted(
    pods: &mut Pods,
    link: &Link,
    software: &str,
    flag_map: Option<OwnedFd>,
) -> Result<(), TalkError> {
    tracing::info!(agent = software, guard = flag_map.is_some(), "connected to the node agent");
    pods.flag_in(flag_map);
    for (info, fds) in pods.held() {
        let (kinds, fds): (Vec<_>, Vec<_>) = fds.into_iter().map(|(kind, fd)| (kind as i32, fd)).unzip();
        let held = wire::Held { pod: Some(info.wire.clone()), fds: kinds };
        send(link, Message::Held(held), &fds).await?;
    }
    send(link, Message::HeldEnd(wire::HeldEnd {}), &[]).await
}

async fn send(link: &Link, message: Message, fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<(), TalkError> {
    Ok(link.send(&wire::FromZtunnel { message: Some(message) }, fds).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_was_away_for_long_is_found_within_its_grace() {
        let mut backoff = calls();
        let longest = (0..1000).map(|_| backoff.delay()).max().unwrap();
        assert!(longest <= Duration::from_secs(1), "calls again only after {longest:?}");
    }
}
