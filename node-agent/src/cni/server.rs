//! Answers the CNI plugin on a unix socket: root on this node only, one short request a connection.
//!
//! **Invariant:** never cancels an enrolment it began; the plugin has its own deadline, and a runtime whose ADD failed
//! calls DEL.

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::cni::protocol::{self, Refused, Request};
use crate::cni::spec;

pub use crate::cni::protocol::{AddRequest, Attachment, DelRequest};

/// What the agent does with the pods that the runtime announces. Implementations bound their own time: the plugin
/// gives up after [`crate::cni::plugin::ADD_DEADLINE`].
pub trait Enroller: Send + Sync + 'static {
    /// Enrols the pod, or finds that it is none of the mesh's. Once this is `Ok`, the pod's first process may start.
    fn add(&self, request: AddRequest) -> impl Future<Output = Result<(), AddError>> + Send;

    /// Forgets the pod; must accept one that it never saw.
    fn del(&self, request: DelRequest) -> impl Future<Output = ()> + Send;

    /// Is the pod still as `add` left it?
    fn check(&self, request: AddRequest) -> impl Future<Output = Result<(), AddError>> + Send;

    /// Could `add` succeed now? `Err` says what is missing.
    fn status(&self) -> impl Future<Output = Result<(), AddError>> + Send;

    /// These are all the attachments the runtime still has; others may be forgotten.
    fn gc(&self, valid: Vec<Attachment>) -> impl Future<Output = ()> + Send;
}

/// Why a pod could not be enrolled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// A part that is needed is away; the runtime's retry may succeed. The text names the part and the next command.
    #[error("{0}")]
    Unavailable(String),
    /// The pod cannot be enrolled as it is.
    #[error("{0}")]
    Refused(String),
}

/// Serves until `shutdown`; enrolments under way are finished first.
///
/// # Errors
/// When the socket cannot be made.
pub async fn serve(
    path: &Path,
    enroller: Arc<impl Enroller>,
    shutdown: CancellationToken,
) -> Result<(), BindError> {
    serve_bound(bind(path)?, enroller, shutdown).await;
    Ok(())
}

/// Makes the socket: private from its first moment, and in place of one that an agent before this left behind.
///
/// # Errors
/// When the directory or the socket cannot be made.
pub fn bind(path: &Path) -> Result<UnixListener, BindError> {
    let failed = |source| BindError { path: path.to_owned(), source };
    let parent = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(parent).map_err(failed)?;
    // Bound under another name, then renamed: nobody can connect before the mode is set, and a plugin finds either
    // the old socket or the new one.
    let temporary = parent.join(format!(".{}.{}", file_name(path), std::process::id()));
    remove_if_there(&temporary).map_err(failed)?;
    let listener = UnixListener::bind(&temporary).map_err(failed)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)?;
    Ok(listener)
}

/// The socket could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for the CNI plugin on {}: {source}; is its directory writable?", path.display())]
pub struct BindError {
    path: PathBuf,
    source: io::Error,
}

/// As [`serve`], on a socket made by [`bind`].
pub async fn serve_bound(listener: UnixListener, enroller: Arc<impl Enroller>, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener, &slots) => accepted,
        };
        match accepted {
            Ok((stream, slot)) => {
                let enroller = Arc::clone(&enroller);
                connections.spawn(async move {
                    answer(stream, &*enroller).await;
                    drop(slot);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a CNI plugin's connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

async fn accept(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, slot))
}

async fn answer(mut stream: UnixStream, enroller: &impl Enroller) {
    let reply = match tokio::time::timeout(REQUEST_DEADLINE, read(&mut stream)).await {
        Ok(Ok(request)) => act(request, enroller).await,
        Ok(Err(error)) => Err(error),
        Err(_) => Err(bad_request("no whole request came within the deadline".into())),
    };
    if let Err(refused) = &reply {
        warn!(code = refused.code, details = refused.details, "CNI: {}", refused.message);
    }
    let line = protocol::reply_to_line(&reply);
    let sent = tokio::time::timeout(REQUEST_DEADLINE, stream.write_all(line.as_bytes())).await;
    if !matches!(sent, Ok(Ok(()))) {
        debug!("the CNI plugin left before its answer");
    }
}

async fn read(stream: &mut UnixStream) -> Result<Request, Refused> {
    let unreadable = |error: io::Error| bad_request(format!("cannot read the request: {error}"));
    // The socket's mode says the same; this holds also where someone loosened it.
    let peer = stream.peer_cred().map_err(unreadable)?;
    if peer.uid() != 0 {
        return Err(bad_request(format!(
            "user {} is not root, and only a container runtime may ask",
            peer.uid()
        )));
    }
    let mut line = Vec::new();
    let bound = protocol::MAX_REQUEST as u64 + 1;
    BufReader::new(stream.take(bound)).read_until(b'\n', &mut line).await.map_err(unreadable)?;
    if line.pop() != Some(b'\n') {
        let bound = protocol::MAX_REQUEST;
        return Err(bad_request(format!("the request has no end, or is longer than {bound} bytes")));
    }
    Request::from_line(&line).map_err(|malformed| bad_request(malformed.to_string()))
}

async fn act(request: Request, enroller: &impl Enroller) -> Result<(), Refused> {
    match request {
        Request::Add(add) => {
            let pod = format!("{}/{}", add.namespace, add.name);
            info!(%pod, container = add.attachment.container_id, addresses = ?add.addresses, "CNI ADD");
            enroller.add(add).await.map_err(|error| refused(&format!("cannot enrol pod {pod}"), &error))
        }
        Request::Check(check) => {
            let pod = format!("{}/{}", check.namespace, check.name);
            let check = enroller.check(check).await;
            check.map_err(|error| refused(&format!("pod {pod} is not as it was enrolled"), &error))
        }
        Request::Del(del) => {
            info!(
                namespace = del.namespace,
                name = del.name,
                container = del.attachment.container_id,
                "CNI DEL"
            );
            enroller.del(del).await;
            Ok(())
        }
        Request::Status => enroller
            .status()
            .await
            .map_err(|error| refused("new pods cannot be enrolled on this node", &error)),
        Request::Gc(valid) => {
            enroller.gc(valid).await;
            Ok(())
        }
    }
}

fn refused(message: &str, error: &AddError) -> Refused {
    let code = match error {
        AddError::Unavailable(_) => spec::TRY_AGAIN,
        AddError::Refused(_) => spec::REFUSED,
    };
    Refused { code, message: message.to_owned(), details: error.to_string() }
}

fn bad_request(details: String) -> Refused {
    Refused { code: spec::DECODE, message: "the agent does not understand the plugin".to_owned(), details }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A burst of pods waits in the socket's backlog beyond this.
const MAX_CONNECTIONS: usize = 64;
/// A request is one small write.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// Out of file descriptors: wait for some to come back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests;
