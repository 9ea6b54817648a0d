//! How a conversation begins: the version that both speak, and what the ztunnel holds.

use std::ops::RangeInclusive;
use std::os::fd::{AsFd as _, OwnedFd};

use mesh_core::pod_link::Link;
use mesh_core::pod_protocol;
use mesh_core::proto::pods::{self as proto, from_ztunnel};
use tokio::time::timeout;
use tracing::{info, warn};

use super::served::Served;
use super::{ConversationError, GREETING_DEADLINE, MAX_HELD, from_agent, receive, unexpected};

/// For the peer's log.
const SOFTWARE: &str = concat!("node-agent ", env!("CARGO_PKG_VERSION"));

/// A ztunnel that has told all that it holds.
#[derive(Debug)]
pub(super) struct Greeted {
    /// What both speak.
    pub(super) version: u32,
    pub(super) held: Vec<Served>,
    /// It has been told to end.
    pub(super) draining: bool,
}

/// Hello, Welcome, Held ..., HeldEnd.
///
/// # Errors
/// When there is no version that both speak, or the ztunnel is silent or confused.
pub(super) async fn greet(
    link: &Link,
    versions: &RangeInclusive<u32>,
    flag_map: &OwnedFd,
) -> Result<Greeted, ConversationError> {
    let deadline = |_| ConversationError::Silent;
    let (hello, _) = timeout(GREETING_DEADLINE, receive(link)).await.map_err(deadline)??;
    let from_ztunnel::Message::Hello(hello) = hello else { return Err(unexpected(&hello)) };
    let theirs = hello.min_version..=hello.max_version;
    let Some(version) = pod_protocol::agree(versions, &theirs) else {
        let error = ConversationError::Version { theirs: theirs.clone(), ours: versions.clone() };
        let goodbye = from_agent::Message::Goodbye(proto::Goodbye { reason: goodbye(&theirs, versions) });
        // It may have gone already.
        let _ = timeout(GREETING_DEADLINE, link.send(&from_agent(goodbye), &[])).await;
        return Err(error);
    };
    let welcome =
        proto::Welcome { version, software: SOFTWARE.to_owned(), fds: vec![proto::Fd::SocketFlagMap.into()] };
    link.send(&from_agent(from_agent::Message::Welcome(welcome)), &[flag_map.as_fd()]).await?;
    info!(software = hello.software, hello.draining, version, "ztunnel says hello");
    let mut greeted = Greeted { version, held: Vec::new(), draining: hello.draining };
    loop {
        let (message, descriptors) = timeout(GREETING_DEADLINE, receive(link)).await.map_err(deadline)??;
        match message {
            from_ztunnel::Message::Held(_) if greeted.held.len() >= MAX_HELD => {
                return Err(ConversationError::TooMany);
            }
            from_ztunnel::Message::Held(pod) => match Served::held(pod, descriptors) {
                Ok(pod) => greeted.held.push(pod),
                Err(error) => warn!("ztunnel holds a pod that cannot be taken over: {error}"),
            },
            from_ztunnel::Message::Draining(_) => greeted.draining = true,
            from_ztunnel::Message::HeldEnd(_) => return Ok(greeted),
            other => return Err(unexpected(&other)),
        }
    }
}

fn goodbye(theirs: &RangeInclusive<u32>, ours: &RangeInclusive<u32>) -> String {
    format!(
        "{SOFTWARE} speaks versions {} to {} of the pod protocol, you speak {} to {}; upgrade the older of both",
        ours.start(),
        ours.end(),
        theirs.start(),
        theirs.end(),
    )
}
