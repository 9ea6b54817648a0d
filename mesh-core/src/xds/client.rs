//! The gRPC shell around [`Session`]: connects to the agent's unix socket, for ever.
//!
//! **Invariant:** losing the agent changes nothing but the log: what was received stays in the store.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use super::metrics::Metrics;
use super::stream::{Reply, Session};
use super::{Effect, Handler, Rejected};
use crate::backoff::Backoff;
use crate::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;

/// A mesh of the design size (100,000 workloads) is one response of some 30 MiB.
const MAX_MESSAGE: usize = 200 << 20;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("connecting to {}: {}", path.display(), chain(source))]
    Connect { path: PathBuf, source: tonic::transport::Error },
    #[error("stream: {}", .0.message())]
    Status(#[from] tonic::Status),
}

/// Follows the agent at `socket`; `complete` is called when every type has been answered for the first time. Never
/// returns: drop the future to stop.
pub async fn run(
    socket: &Path,
    mut session: Session,
    mut handler: impl Handler,
    metrics: &Metrics,
    complete: impl FnOnce(),
) -> std::convert::Infallible {
    let mut backoff = Backoff::control_plane();
    let mut complete = Some(complete);
    loop {
        let started = Instant::now();
        let mut responses = 0_u64;
        let result = follow(socket, &mut session, &mut handler, metrics, |session| {
            responses += 1;
            if session.is_complete()
                && let Some(complete) = complete.take()
            {
                tracing::info!("the mesh is known: every type of resource has arrived");
                complete();
            }
        })
        .await;
        if responses > 0 {
            backoff.reset();
        }
        metrics.ended(match &result {
            Ok(()) => "Complete",
            Err(StreamError::Connect { .. }) => "ConnectionError",
            Err(StreamError::Status(_)) => "Error",
        });
        let retry_in = backoff.delay();
        match result {
            Ok(()) => tracing::info!(
                responses,
                seconds = started.elapsed().as_secs(),
                "the agent ended the xDS stream"
            ),
            // Retries are frequent at first: one line a second is enough.
            Err(error) if retry_in >= Duration::from_secs(1) || responses > 0 => tracing::warn!(
                %error, ?retry_in,
                "no configuration from the node agent, the last one stays in force; is it running?"
            ),
            Err(error) => tracing::debug!(%error, ?retry_in, "xDS stream failed"),
        }
        tokio::time::sleep(retry_in).await;
    }
}

async fn follow(
    socket: &Path,
    session: &mut Session,
    handler: &mut impl Handler,
    metrics: &Metrics,
    mut answered: impl FnMut(&Session),
) -> Result<(), StreamError> {
    let mut client =
        AggregatedDiscoveryServiceClient::new(connect(socket).await?).max_decoding_message_size(MAX_MESSAGE);
    let (requests, outgoing) = mpsc::channel(8);
    for request in session.start() {
        if requests.send(request).await.is_err() {
            return Ok(());
        }
    }
    let mut responses = client.delta_aggregated_resources(ReceiverStream::new(outgoing)).await?.into_inner();
    metrics.started();
    while let Some(response) = responses.message().await? {
        tracing::debug!(
            type_url = response.type_url,
            resources = response.resources.len(),
            removed = response.removed_resources.len(),
            "xDS response"
        );
        metrics.received(&response);
        let Reply { request, rejected } = session.receive(response, handler);
        metrics.rejected(&request.type_url, &rejected);
        rejected.iter().for_each(tell);
        answered(session);
        if requests.send(request).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// What opens a hole is told louder than what closes one.
fn tell(rejected: &Rejected) {
    let Rejected { name, reason, effect } = rejected;
    if *effect == Effect::Unreadable {
        tracing::error!(resource = name, reason, "resource refused: {effect}");
    } else {
        tracing::warn!(resource = name, reason, "resource refused: {effect}");
    }
}

async fn connect(socket: &Path) -> Result<Channel, StreamError> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The name is not resolved; gRPC wants an authority.
    Endpoint::from_static("http://node-agent")
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .connect_with_connector(connector)
        .await
        .map_err(|source| StreamError::Connect { path: socket.to_owned(), source })
}

/// tonic's errors hide their cause.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
