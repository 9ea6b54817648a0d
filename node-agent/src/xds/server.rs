//! gRPC around the sessions: delta ADS, on any stream of connections.
//!
//! The writer publishes; each client's response stream pulls what its session has to tell, at the pace of the client.
//! **Invariant:** the one lock is never held across an await.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::stream::{self, BoxStream, Stream};
use http::Extensions;
use mesh_core::proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_core::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_core::proto::security::Authorization;
use mesh_core::proto::workload::Address;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::transport::{self, server::Connected};
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

use super::scope::Scope;
use super::session::{Received, Session};
use super::snapshot::{Name, Served, Snapshot, Type};

/// What the writer of the resources holds. There is one.
#[derive(Debug)]
pub struct Publisher(Arc<Shared>);

/// What the server holds; clones are the same.
#[derive(Clone, Debug)]
pub struct Feed(Arc<Shared>);

/// A new pair.
pub fn feed() -> (Publisher, Feed) {
    let shared = Arc::new(Shared::default());
    (Publisher(Arc::clone(&shared)), Feed(shared))
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    snapshot: Snapshot,
    complete: bool,
    clients: HashMap<u64, Client>,
    next_client: u64,
    nacks: u64,
}

#[derive(Debug)]
struct Client {
    session: Session,
    wake: Arc<Notify>,
}

impl Publisher {
    /// Sets resources (or removes those that are none now) and wakes the clients that this concerns. All of one change
    /// come at once: a client that is told in between would hear of them in another order than its session keeps.
    pub fn publish(
        &self,
        addresses: impl IntoIterator<Item = (String, Option<Address>)>,
        policies: impl IntoIterator<Item = (String, Option<Arc<Authorization>>)>,
    ) {
        let mut state = self.0.lock();
        let State { snapshot, clients, .. } = &mut *state;
        let addresses = put::<Address, _>(snapshot, Type::Address, addresses);
        let policies = put::<Authorization, _>(snapshot, Type::Authorization, policies);
        if addresses.is_empty() && policies.is_empty() {
            return;
        }
        for client in clients.values_mut() {
            client.session.changed(Type::Address, addresses.iter().cloned(), snapshot);
            client.session.changed(Type::Authorization, policies.iter().cloned(), snapshot);
            client.wake.notify_one();
        }
    }

    /// From now on clients are answered: every resource was published once.
    pub fn complete(&self) {
        let mut state = self.0.lock();
        state.complete = true;
        state.clients.values().for_each(|client| client.wake.notify_one());
    }
}

/// The names of those that changed.
fn put<M: Served, B: Borrow<M>>(
    snapshot: &mut Snapshot,
    r#type: Type,
    resources: impl IntoIterator<Item = (String, Option<B>)>,
) -> Vec<Name> {
    let put = |(name, resource): (String, Option<B>)| {
        snapshot.put(r#type, &name, resource.as_ref().map(Borrow::borrow))
    };
    resources.into_iter().filter_map(put).collect()
}

impl Feed {
    /// Clients connected, resources of each type, and responses refused since the start.
    pub fn counts(&self) -> Counts {
        let state = self.0.lock();
        Counts {
            clients: state.clients.len(),
            addresses: state.snapshot.count(Type::Address),
            authorizations: state.snapshot.count(Type::Authorization),
            nacks: state.nacks,
        }
    }
}

/// See [`Feed::counts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Streams open now.
    pub clients: usize,
    /// Workloads and services.
    pub addresses: usize,
    /// L4 policies.
    pub authorizations: usize,
    /// Responses that a client refused.
    pub nacks: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: &Arc<Self>, scope: Scope) -> Membership {
        let wake = Arc::new(Notify::new());
        let mut state = self.lock();
        let id = state.next_client;
        state.next_client += 1;
        state.clients.insert(id, Client { session: Session::new(scope), wake: Arc::clone(&wake) });
        Membership { id, wake, shared: Arc::clone(self) }
    }
}

/// A client's place among those that are woken; left on drop.
#[derive(Debug)]
struct Membership {
    id: u64,
    wake: Arc<Notify>,
    shared: Arc<Shared>,
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
        let mut state = self.shared.lock();
        let State { snapshot, complete, clients, .. } = &mut *state;
        let Some(client) = clients.get_mut(&self.id) else { return Ok(()) };
        if !*complete && client.session.is_a_stranger_s() {
            // What it says could only be kept, as there is nothing to compare it with.
            return Err(Status::unavailable("this agent does not know the mesh yet"));
        }
        match client.session.receive(request, snapshot) {
            Ok(Received::Nacked { r#type, names, message }) => {
                state.nacks += 1;
                let more = if names.len() < super::session::NACK_NAMES { "" } else { " and perhaps more" };
                warn!(
                    client = self.id, r#type = r#type.url(), resources = ?names,
                    "xDS: the client refused resources of an update{more}, and keeps what it had: {message}",
                );
                Ok(())
            }
            Ok(received) => {
                debug!(client = self.id, ?received, "xDS request");
                Ok(())
            }
            Err(bad) => {
                warn!(client = self.id, "xDS: {bad}");
                Err(Status::invalid_argument(bad.to_string()))
            }
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.shared.lock().clients.remove(&self.id);
        info!(client = self.id, "xDS client disconnected");
    }
}

/// Decides about each stream before it begins.
pub trait Admission: Send + Sync + 'static {
    /// What is held for as long as the stream lasts.
    type Place: Send + 'static;

    /// May it begin?
    fn admit(
        &self,
        metadata: &MetadataMap,
        connection: &Extensions,
    ) -> impl Future<Output = Result<Admitted<Self::Place>, Status>> + Send;
}

/// A stream that may begin.
#[derive(Debug)]
pub struct Admitted<P> {
    /// For the log.
    pub who: String,
    /// What it is told of.
    pub scope: Scope,
    /// Held until its end.
    pub place: P,
    /// When it ends, so that its client proves itself anew; none: never.
    pub until: Option<Instant>,
}

/// For a socket that only this node's ztunnel can connect to.
#[derive(Clone, Copy, Debug)]
pub struct OfTheNode;

impl Admission for OfTheNode {
    type Place = ();

    async fn admit(&self, _: &MetadataMap, _: &Extensions) -> Result<Admitted<()>, Status> {
        Ok(Admitted { who: "this node's".to_owned(), scope: Scope::Everything, place: (), until: None })
    }
}

/// The socket could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for proxies on {}: {source}; is its directory writable?", path.display())]
pub struct BindError {
    path: PathBuf,
    source: io::Error,
}

/// Listens on a unix socket that only root may connect to; one that an agent before this left there is replaced.
///
/// # Errors
/// When the socket cannot be made.
pub fn bind(path: &Path) -> Result<UnixListenerStream, BindError> {
    // Bound under another name, then renamed: nobody can connect before the mode is set.
    let temporary = path.with_extension("new");
    let made = || {
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&temporary)?;
        std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&temporary, path)?;
        Ok(listener)
    };
    made().map(UnixListenerStream::new).map_err(|source| BindError { path: path.to_owned(), source })
}

/// Serves every connection of `incoming`, a socket of this node, until `shutdown`; the clients keep what they have then.
///
/// # Errors
/// When the transport fails as a whole, not for a single connection.
pub async fn serve<IO>(
    incoming: impl Stream<Item = io::Result<IO>>,
    feed: Feed,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error>
where
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    serve_to(transport::Server::builder(), incoming, feed, OfTheNode, MAX_REQUEST, shutdown).await
}

/// The same for clients that `admission` decides about, whose requests have at most so many bytes.
pub(super) async fn serve_to<IO>(
    server: transport::Server,
    incoming: impl Stream<Item = io::Result<IO>>,
    feed: Feed,
    admission: impl Admission,
    max_request: usize,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error>
where
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let service =
        AggregatedDiscoveryServiceServer::new(Server { feed, admission, shutdown: shutdown.clone() })
            .max_decoding_message_size(max_request);
    server
        .http2_keepalive_interval(Some(KEEPALIVE))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned())
        .await
}

#[derive(Debug)]
struct Server<A> {
    feed: Feed,
    admission: A,
    shutdown: CancellationToken,
}

#[tonic::async_trait]
impl<A: Admission> AggregatedDiscoveryService for Server<A> {
    type DeltaAggregatedResourcesStream = BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let admitted = self.admission.admit(request.metadata(), request.extensions()).await?;
        let Admitted { who, scope, place, until } = admitted;
        let membership = self.feed.0.join(scope);
        info!(client = membership.id, who, "xDS client connected");
        let conversation = Conversation {
            membership,
            requests: request.into_inner(),
            until,
            shutdown: self.shutdown.clone(),
            _place: place,
        };
        Ok(Response::new(Box::pin(stream::unfold(Some(conversation), |conversation| async {
            let mut conversation = conversation?;
            match conversation.next().await {
                Ok(Some(response)) => Some((Ok(response), Some(conversation))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        }))))
    }
}

struct Conversation<P> {
    membership: Membership,
    requests: Streaming<DeltaDiscoveryRequest>,
    until: Option<Instant>,
    shutdown: CancellationToken,
    _place: P,
}

impl<P> Conversation<P> {
    /// The next response; none at the end of the conversation.
    async fn next(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
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
                return Ok(Some(response));
            }
            tokio::select! {
                () = self.shutdown.cancelled() => return Ok(None),
                () = &mut ended => return Ok(None),
                () = self.membership.wake.notified() => {}
                request = self.requests.message() => match request? {
                    Some(request) => self.membership.receive(request)?,
                    None => return Ok(None),
                },
            }
        }
    }
}

/// A reconnecting client names all that it holds: room for 200,000 names.
const MAX_REQUEST: usize = 64 << 20;
/// A client whose process is stuck is noticed by its missing answers.
const KEEPALIVE: std::time::Duration = std::time::Duration::from_secs(30);
