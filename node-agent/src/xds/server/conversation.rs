//! One client's stream: its place among those that are woken, what it says, and what it is told next.

use std::sync::Arc;

use mesh_core::hbone::allowance::Allowance;
use mesh_core::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use prost::Message;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use super::unsent::Account;
use super::{Shared, State};
use crate::xds::session::{BadRequest, NACK_NAMES, Received};

/// A client's place among those that are woken; left on drop.
#[derive(Debug)]
pub(super) struct Membership {
    pub(super) id: u64,
    pub(super) wake: Arc<Notify>,
    pub(super) shared: Arc<Shared>,
}

impl Membership {
    fn next(&self) -> Option<DeltaDiscoveryResponse> {
        let mut state = self.shared.lock();
        let State { snapshot, complete, clients, .. } = &mut *state;
        if !*complete {
            return None;
        }
        clients.get_mut(&self.id)?.session.next(snapshot)
    }

    fn receive(&self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let (received, is_stranger) = {
            let mut state = self.shared.lock();
            let State { snapshot, complete, clients, .. } = &mut *state;
            let Some(client) = clients.get_mut(&self.id) else { return Ok(()) };
            let is_stranger = client.session.is_a_stranger_s();
            if !*complete && is_stranger {
                // What it says could only be kept, as there is nothing to compare it with.
                return Err(Status::unavailable("this agent does not know the mesh yet"));
            }
            let received = client.session.receive(request, snapshot);
            state.nacks += u64::from(matches!(received, Ok(Received::Nacked { .. })));
            (received, is_stranger)
        };
        // The lock is not held: a log may be slow.
        self.tell(&received, is_stranger);
        received.map(drop).map_err(|bad| Status::invalid_argument(bad.to_string()))
    }

    /// To the log. What a stranger says is its own affair, and may be said often.
    fn tell(&self, received: &Result<Received, BadRequest>, is_stranger: bool) {
        let client = self.id;
        match (received, is_stranger) {
            (Ok(Received::Nacked { r#type, names, message }), false) => {
                let more = if names.len() < NACK_NAMES { "" } else { " and perhaps more" };
                warn!(
                    client, r#type = r#type.url(), resources = ?names,
                    "xDS: the client refused resources of an update{more}, and keeps what it had: {}", shown(message),
                );
            }
            (Ok(Received::Nacked { r#type, names, message }), true) => debug!(
                client, r#type = r#type.url(), resources = ?names, "xDS: the client refused an update: {}", shown(message)
            ),
            (Ok(received), _) => debug!(client, ?received, "xDS request"),
            (Err(bad), false) => warn!(client, "xDS: {bad}"),
            (Err(bad), true) => debug!(client, "xDS: {bad}"),
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.shared.lock().clients.remove(&self.id);
        info!(client = self.id, "xDS client disconnected");
    }
}

/// The beginning of what a client says, in one line.
fn shown(message: &str) -> String {
    let shown: String = message.chars().take(MOST_WORDS).flat_map(char::escape_debug).collect();
    if message.chars().nth(MOST_WORDS).is_some() { shown + "..." } else { shown }
}

/// What is counted of a client that comes over the network and is no proxy of the mesh.
pub(super) struct Stranger {
    account: Account,
    requests: Allowance,
}

impl Stranger {
    pub(super) fn new(account: Account) -> Self {
        Self { account, requests: Allowance::new(REQUESTS_AT_ONCE, REQUESTS_PER_SECOND) }
    }

    /// Who asks much waits.
    async fn pace(&self, shutdown: &CancellationToken) {
        while let Err(wait) = self.requests.take(1) {
            if shutdown.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                return;
            }
        }
    }
}

/// A stream with what it depends on, `P` among it.
pub(super) struct Conversation<P> {
    pub(super) membership: Membership,
    pub(super) requests: Streaming<DeltaDiscoveryRequest>,
    pub(super) until: Option<Instant>,
    pub(super) shutdown: CancellationToken,
    pub(super) stranger: Option<Stranger>,
    pub(super) _place: P,
}

impl<P> Conversation<P> {
    /// The next response; none at the end of the conversation.
    pub(super) async fn next(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        let until = self.until;
        let ended = async {
            match until {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(ended);
        loop {
            if let Some(response) = self.membership.next() {
                return self.counted(response).map(Some);
            }
            tokio::select! {
                () = self.shutdown.cancelled() => return Ok(None),
                () = &mut ended => return Ok(None),
                () = self.membership.wake.notified() => {}
                request = self.requests.message() => match request? {
                    Some(request) => {
                        if let Some(stranger) = &self.stranger {
                            stranger.pace(&self.shutdown).await;
                        }
                        self.membership.receive(request)?;
                    }
                    None => return Ok(None),
                },
            }
        }
    }

    fn counted(&self, response: DeltaDiscoveryResponse) -> Result<DeltaDiscoveryResponse, Status> {
        let fits = self.stranger.as_ref().is_none_or(|one| one.account.charge(response.encoded_len()));
        fits.then_some(response).ok_or_else(|| {
            Status::resource_exhausted(
                "clients have not taken yet what they were told before: come again later",
            )
        })
    }
}

/// Characters of a message that are shown.
const MOST_WORDS: usize = 512;
/// A stranger's requests, one for each response that it takes.
const REQUESTS_AT_ONCE: u32 = 50;
const REQUESTS_PER_SECOND: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_short_and_one_line() {
        assert_eq!(shown("a\nb\u{1b}[0m"), "a\\nb\\u{1b}[0m");
        assert_eq!(shown(&"é".repeat(MOST_WORDS)), "é".repeat(MOST_WORDS));
        assert_eq!(shown(&"n".repeat(1 << 20)), "n".repeat(MOST_WORDS) + "...");
    }
}
