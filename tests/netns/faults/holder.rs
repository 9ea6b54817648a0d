//! What a ztunnel is to an agent, and no more: it says that it serves the pod, holds its sockets, and brings them back
//! to the next agent.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use mesh_core::pod_link::Link;
use mesh_core::proto::pods::{self as wire, Fd, from_agent, from_ztunnel};
use socket2::Socket;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// One pod's description and descriptors, in the order of the names.
struct Held {
    pod: wire::Pod,
    names: Vec<i32>,
    descriptors: Vec<OwnedFd>,
}

/// Connects to one agent after the other.
pub(crate) struct Holder {
    held: Arc<Mutex<Option<Held>>>,
    run_dir: PathBuf,
    agents: UnboundedSender<()>,
    runtime: Option<Runtime>,
}

impl Holder {
    pub(crate) fn start() -> Result<Self> {
        let run_dir = std::env::temp_dir().join(format!("ambit-holder-{}", std::process::id()));
        std::fs::create_dir_all(&run_dir)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let held = Arc::default();
        let (agents, next) = unbounded_channel();
        runtime.spawn(follow(run_dir.join("pods.sock"), next, Arc::clone(&held)));
        Ok(Self { held, run_dir, agents, runtime: Some(runtime) })
    }

    /// An agent listens on the socket.
    pub(crate) fn connect(&self) -> Result<()> {
        self.agents.send(()).context("the holder has ended")
    }

    pub(crate) fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// A connection that waits at one of the listeners, if there are any.
    pub(crate) fn accept(&self, name: Fd) -> Result<Option<Socket>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(held) = held.as_ref() else { return Ok(None) };
        let place = held.names.iter().position(|of| *of == i32::from(name)).context("no such listener")?;
        Ok(Socket::from(held.descriptors[place].try_clone()?).accept().ok().map(|(socket, _)| socket))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        let _ = std::fs::remove_dir_all(&self.run_dir);
    }
}

async fn follow(path: PathBuf, mut agents: UnboundedReceiver<()>, held: Arc<Mutex<Option<Held>>>) {
    while agents.recv().await.is_some() {
        if let Ok(link) = Link::connect(&path).await {
            // Ends with the agent.
            let _ = serve(&link, &held).await;
        }
    }
}

async fn serve(link: &Link, held: &Mutex<Option<Held>>) -> Result<()> {
    let hello =
        wire::Hello { min_version: 2, max_version: 2, software: "holder".to_owned(), draining: false };
    send(link, from_ztunnel::Message::Hello(hello), &[]).await?;
    let have = held.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(pod) = have {
        let message = wire::Held { pod: Some(pod.pod.clone()), fds: pod.names.clone() };
        let sent = send(link, from_ztunnel::Message::Held(message), &pod.descriptors).await;
        *held.lock().unwrap_or_else(PoisonError::into_inner) = Some(pod);
        sent?;
    }
    send(link, from_ztunnel::Message::HeldEnd(wire::HeldEnd {}), &[]).await?;
    loop {
        let (message, descriptors) = link.receive::<wire::FromAgent>().await?;
        let sequence = match message.message.context("an empty message")? {
            from_agent::Message::Add(add) => {
                let pod = add.pod.context("no pod")?;
                let new = Held { pod, names: add.fds, descriptors };
                *held.lock().unwrap_or_else(PoisonError::into_inner) = Some(new);
                add.sequence
            }
            from_agent::Message::Keep(keep) => keep.sequence,
            from_agent::Message::Remove(remove) => {
                held.lock().unwrap_or_else(PoisonError::into_inner).take();
                remove.sequence
            }
            from_agent::Message::SnapshotEnd(end) => end.sequence,
            from_agent::Message::Welcome(_)
            | from_agent::Message::Goodbye(_)
            | from_agent::Message::Superseded(_) => continue,
        };
        let ack = wire::Ack { sequence, error: String::new() };
        send(link, from_ztunnel::Message::Ack(ack), &[]).await?;
    }
}

async fn send(link: &Link, message: from_ztunnel::Message, descriptors: &[OwnedFd]) -> Result<()> {
    let descriptors: Vec<_> = descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
    Ok(link.send(&wire::FromZtunnel { message: Some(message) }, &descriptors).await?)
}
