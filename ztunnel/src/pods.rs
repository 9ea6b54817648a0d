//! The pods of this node that are served: their sockets, accept loops and shared parts.
//!
//! `link` talks to the agent, `state` is what the talk means; here is what it leads to.
//! **Invariant:** when [`Pods::remove`] returns, no descriptor of the pod is open in this process: an open listener
//! would keep the pod's network namespace alive. And: no connection is accepted before the mesh is known as a whole,
//! since one to a pod of the mesh would look like one to a stranger and leave in the clear; until then connections wait
//! in the accept queues.

pub mod link;
pub mod state;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::FutureExt;
use futures_util::future::OptionFuture;
use mesh_core::drain::{self, Drain, Watch};
use mesh_core::identity::Identity;
use mesh_core::listener;
use mesh_core::proto::pods::Fd;
use mesh_core::tcp;
use mesh_core::workload::Workload;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::state::{Descriptors, PodInfo};
use crate::descriptors::Limited;
use crate::proxy::{Pod, Proxy};
use crate::sockets::{self, FlagMap, Sockets};
use crate::{canary, dns, inbound, outbound, passthrough};

/// Makes the socket maker of a pod from its network namespace.
pub type OpenPod = dyn Fn(OwnedFd, FlagMap) -> Arc<dyn Sockets> + Send + Sync;

/// For the configuration dump: uid and workload of each pod that is served.
pub type Listing = Arc<ArcSwap<Vec<(String, Arc<Workload>)>>>;

/// For other pods' connections to a pod that is gone; they only have to notice.
const NEIGHBOURS_GRACE: Duration = Duration::from_secs(1);

/// How often a process that is to end without a successor looks whether it may.
const LOOK: Duration = Duration::from_millis(200);

/// Becomes true when the mesh is known as a whole (workloads, services and policies), and stays so.
pub type MeshKnown = watch::Receiver<bool>;

/// All pods that are served.
pub struct Pods {
    proxy: Arc<Proxy>,
    open: Arc<OpenPod>,
    known: MeshKnown,
    flags: FlagMap,
    served: BTreeMap<String, Served>,
    /// When the connections that are left are cut, once the process is to end.
    end: Option<Instant>,
    /// Whether new connections are left to a successor.
    accepts_no_more: bool,
    listing: Listing,
}

/// One of them.
struct Served {
    info: PodInfo,
    /// What came from the agent, to be given to the next one.
    fds: Descriptors,
    pod: Arc<Pod>,
    drain: Drain,
    /// Of earlier listeners, whose connections go on.
    retired: Vec<Drain>,
    loops: JoinSet<()>,
}

impl Pods {
    /// None yet. Pods are taken over at once, their connections from when the mesh is `known`.
    pub fn new(proxy: Arc<Proxy>, open: Arc<OpenPod>, known: MeshKnown) -> Self {
        let (flags, listing) = (FlagMap::default(), Listing::default());
        let (served, accepts_no_more) = (BTreeMap::new(), false);
        Self { proxy, open, known, flags, served, end: None, accepts_no_more, listing }
    }

    /// What is served, kept up to date.
    pub fn listing(&self) -> Listing {
        self.listing.clone()
    }

    /// Where sockets are flagged from now on.
    pub fn flag_in(&self, map: Option<OwnedFd>) {
        self.flags.replace(map);
    }

    /// Starts to serve a pod. If it is served already with these very sockets, nothing changes; with other listeners in
    /// the same network namespace, they take over from the old ones, and open connections go on.
    ///
    /// # Errors
    /// When a descriptor is not what it should be, or the process drains.
    pub async fn add(&mut self, info: PodInfo, fds: Descriptors) -> io::Result<()> {
        if self.served.get(&info.uid).is_some_and(|served| same(&served.fds, &fds)) {
            return Ok(());
        }
        if self.accepts_no_more {
            return Err(io::Error::other("this ztunnel drains; its successor is to serve the pod"));
        }
        if self.served.get(&info.uid).is_some_and(|served| served.is_same_pod(&info, &fds)) {
            return self.relisten(info, fds);
        }
        self.remove(&info.uid.clone()).await;
        let served = self.start(info, fds)?;
        tracing::info!(
            pod = %served.info.wire.name, namespace = %served.info.wire.namespace, uid = %served.info.uid,
            identity = %served.info.workload.identity, "serving pod"
        );
        self.proxy.certificates.prefetch(&served.info.workload.identity);
        self.proxy.metrics.pods_started.inc();
        self.served.insert(served.info.uid.clone(), served);
        self.changed();
        Ok(())
    }

    /// Whether the pod with this uid is served.
    pub fn is_served(&self, uid: &str) -> bool {
        self.served.contains_key(uid)
    }

    /// Stops serving a pod: cuts its connections and closes all its descriptors.
    pub async fn remove(&mut self, uid: &str) {
        let Some(served) = self.served.remove(uid) else { return };
        self.proxy.neighbours.remove(&served.pod);
        tracing::info!(pod = %served.info.wire.name, namespace = %served.info.wire.namespace, uid, "no longer serving pod");
        let identity = served.info.workload.identity.clone();
        served.stop().await;
        self.forget_unused(&identity);
        self.proxy.metrics.pods_stopped.inc();
        self.changed();
    }

    /// Stops serving all pods but these.
    pub async fn retain(&mut self, named: &HashSet<String>) {
        let gone: Vec<String> = self.served.keys().filter(|uid| !named.contains(*uid)).cloned().collect();
        for uid in gone {
            self.remove(&uid).await;
        }
    }

    /// What is served, with its descriptors.
    pub fn held(&self) -> impl Iterator<Item = (&PodInfo, Vec<(Fd, BorrowedFd<'_>)>)> {
        self.served
            .values()
            .map(|served| (&served.info, served.fds.iter().map(|(kind, fd)| (*kind, fd.as_fd())).collect()))
    }

    /// The process is to end: connections may until `deadline`. New ones are taken until [`Self::accept_no_more`], so
    /// that nobody waits where there is no successor.
    pub fn leave(&mut self, deadline: Duration) {
        self.end = Some(Instant::now() + deadline);
        self.proxy.connections.drain(deadline);
    }

    /// Takes no new connections from now on; the open ones may go on. Pods can still be removed.
    pub fn accept_no_more(&mut self) {
        self.accepts_no_more = true;
        self.proxy.neighbours.clear();
        for drain in self.served.values().flat_map(Served::drains) {
            drain.start();
        }
    }

    /// Whether the process is to end.
    pub fn is_leaving(&self) -> bool {
        self.end.is_some()
    }

    /// Completes when the process is to end and no connection is left, or they have had their time.
    pub async fn drained(&self) {
        let Some(end) = self.end else { return std::future::pending().await };
        // The loops that accept are not done before they are told.
        let done = self.served.values().flat_map(Served::drains).map(Drain::done);
        let _ = tokio::time::timeout_at(end, futures_util::future::join_all(done)).await;
    }

    /// Completes when the process is to end, nobody has told it of a successor, and nothing is open: who manages it may
    /// wait for its end to start one. What comes at this moment is accepted or waits, so the loops are to be told first.
    pub async fn idle(&self) {
        if !self.is_leaving() || self.accepts_no_more {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(LOOK).await;
            if self.proxy.connections.is_empty() {
                return;
            }
        }
    }

    /// Cuts what is left and closes everything.
    pub async fn stop(self) {
        self.proxy.neighbours.clear();
        let mut stopping = JoinSet::new();
        for served in self.served.into_values() {
            stopping.spawn(served.stop());
        }
        while stopping.join_next().await.is_some() {}
    }

    fn start(&self, info: PodInfo, fds: Descriptors) -> io::Result<Served> {
        let netns = fds.get(&Fd::Netns).ok_or(io::ErrorKind::InvalidInput)?.try_clone()?;
        let sockets = (self.open)(netns, self.flags.clone());
        let sockets = Arc::new(Limited { sockets, descriptors: self.proxy.descriptors.clone() });
        let workload = Arc::new(info.workload.clone());
        let pod = Arc::new(Pod::new(info.uid.as_str().into(), workload, sockets, self.proxy.clone()));
        let (drain, watch) = drain::new();
        let mut loops = JoinSet::new();
        self.listen(&mut loops, &fds, &pod, &watch)?;
        self.proxy.neighbours.put(&pod, watch);
        Ok(Served { info, fds, pod, drain, retired: Vec::new(), loops })
    }

    /// Other listeners for a pod that is served.
    fn relisten(&mut self, info: PodInfo, fds: Descriptors) -> io::Result<()> {
        let (drain, watch) = drain::new();
        let mut loops = JoinSet::new();
        let Some(served) = self.served.get(&info.uid) else { return Ok(()) };
        self.listen(&mut loops, &fds, &served.pod, &watch)?;
        self.proxy.neighbours.put(&served.pod, watch);
        let Some(served) = self.served.get_mut(&info.uid) else { return Ok(()) };
        tracing::info!(pod = %info.wire.name, namespace = %info.wire.namespace, uid = %info.uid, "pod has new listeners");
        served.take_over(info, fds, drain, loops);
        Ok(())
    }

    /// Starts the accept loops of a pod.
    fn listen(
        &self,
        loops: &mut JoinSet<()>,
        fds: &Descriptors,
        pod: &Arc<Pod>,
        watch: &Watch,
    ) -> io::Result<()> {
        let known = &self.known;
        let dns = fds.contains_key(&Fd::DnsV4) || fds.contains_key(&Fd::DnsV6);
        for (kind, fd) in fds {
            match kind {
                Fd::DnsV4 | Fd::DnsV6 => answer(loops, fd, pod, watch, known)?,
                Fd::OutboundV4 | Fd::OutboundV6 if dns => {
                    accept(loops, fd, pod, watch, known, dns::tcp::serve)?;
                }
                Fd::OutboundV4 | Fd::OutboundV6 => accept(loops, fd, pod, watch, known, outbound::serve)?,
                Fd::InboundV4 | Fd::InboundV6 => accept(loops, fd, pod, watch, known, passthrough::serve)?,
                Fd::HboneV4 | Fd::HboneV6 => accept(loops, fd, pod, watch, known, inbound::serve)?,
                Fd::Netns | Fd::SocketFlagMap | Fd::Unspecified => {}
            }
        }
        Ok(())
    }

    /// A certificate is kept for as long as a pod has its identity.
    fn forget_unused(&self, identity: &Identity) {
        if !self.served.values().any(|served| served.info.workload.identity == *identity) {
            self.proxy.certificates.forget(identity);
        }
    }

    fn changed(&self) {
        let listing = self.served.iter().map(|(uid, served)| (uid.clone(), served.pod.workload())).collect();
        self.listing.store(Arc::new(listing));
        self.proxy.metrics.pods.set(i64::try_from(self.served.len()).unwrap_or(i64::MAX));
    }
}

impl Served {
    /// Whether what differs, if anything, is only the listeners.
    fn is_same_pod(&self, info: &PodInfo, fds: &Descriptors) -> bool {
        let netns = self.fds.get(&Fd::Netns).and_then(inode);
        netns.is_some()
            && netns == fds.get(&Fd::Netns).and_then(inode)
            && self.info.workload.identity == info.workload.identity
            && self.info.workload.addresses == info.workload.addresses
    }

    /// The old listeners are closed, the connections that came through them go on.
    fn take_over(&mut self, info: PodInfo, fds: Descriptors, drain: Drain, loops: JoinSet<()>) {
        let mut old = std::mem::replace(&mut self.loops, loops);
        self.loops.spawn(async move { while old.join_next().await.is_some() {} });
        let old = std::mem::replace(&mut self.drain, drain);
        old.start();
        // One that is done has nothing to be told at the end.
        self.retired.retain(|drain| !drain.is_done());
        self.retired.push(old);
        (self.info, self.fds) = (info, fds);
    }

    fn drains(&self) -> impl Iterator<Item = &Drain> {
        self.retired.iter().chain([&self.drain])
    }

    /// Cuts its connections and closes its descriptors.
    async fn stop(self) {
        let Self { fds, pod, drain, retired, mut loops, .. } = self;
        let drains: Vec<Drain> = retired.into_iter().chain([drain]).collect();
        drains.iter().for_each(Drain::close);
        while loops.join_next().await.is_some() {}
        pod.pool.close().await;
        // Connections from other pods of this process are carried by those.
        let theirs = futures_util::future::join_all(drains.iter().map(Drain::done));
        if tokio::time::timeout(NEIGHBOURS_GRACE, theirs).await.is_err() {
            tracing::error!(uid = %pod.uid, "a connection to the pod was not let go; please report this");
        }
        drop(fds);
    }
}

/// Starts the accept loop of one listener; it accepts once the mesh is known.
fn accept<Serve, Served>(
    loops: &mut JoinSet<()>,
    fd: &OwnedFd,
    pod: &Arc<Pod>,
    watch: &Watch,
    known: &MeshKnown,
    serve: Serve,
) -> io::Result<()>
where
    Serve: Fn(Arc<Pod>, Watch, TcpStream, SocketAddr) -> Served + Copy + Send + Sync + 'static,
    Served: Future<Output = ()> + Send,
{
    let socket = std::net::TcpListener::from(fd.try_clone()?);
    // Shared with the agent's copy, which never accepts.
    socket.set_nonblocking(true)?;
    tcp::tune(&socket)?;
    let socket = TcpListener::from_std(socket)?;
    let (pod, drain) = (pod.clone(), watch.clone());
    let handler = move |stream: TcpStream, client: SocketAddr| {
        let served = admitted(&pod.proxy, stream, client).map(|stream| serve(pod, drain, stream, client));
        // An async block would keep a second copy.
        OptionFuture::from(served).map(drop)
    };
    let (watch, mut known) = (watch.clone(), known.clone());
    loops.spawn(async move {
        if is_known(&watch, &mut known).await {
            listener::serve(socket, handler, watch).await;
        }
    });
    Ok(())
}

/// The connection, unless it is a canary, which is answered here, or there are too few descriptors for it.
fn admitted(proxy: &Proxy, stream: TcpStream, client: SocketAddr) -> Option<TcpStream> {
    // First: a canary is closed at once, so it takes no descriptor from anybody, and capture works without one.
    if canary::answered(&stream, client) {
        return None;
    }
    let admitted = proxy.descriptors.admit(stream);
    admitted.map_err(|stream| sockets::reset_on_close(&stream)).ok()
}

/// Starts to answer the DNS queries that come in by one socket, once the mesh is known: until then they wait in it.
fn answer(
    loops: &mut JoinSet<()>,
    fd: &OwnedFd,
    pod: &Arc<Pod>,
    watch: &Watch,
    known: &MeshKnown,
) -> io::Result<()> {
    let listener = dns::udp::Listener::new(pod.clone(), fd.try_clone()?)?;
    let (watch, mut known) = (watch.clone(), known.clone());
    loops.spawn(async move {
        if is_known(&watch, &mut known).await {
            listener.serve(watch).await;
        }
    });
    Ok(())
}

/// Waits until the mesh is known; false if that is not to be waited for any more.
async fn is_known(watch: &Watch, known: &mut MeshKnown) -> bool {
    tokio::select! {
        biased;
        () = watch.draining() => false,
        // An error: who follows the mesh has gone without knowing it, which is the end of the process.
        known = known.wait_for(|known| *known) => known.is_ok(),
    }
}

/// Whether two sets are the same kernel objects under other numbers.
fn same(ours: &Descriptors, theirs: &Descriptors) -> bool {
    ours.len() == theirs.len()
        && ours
            .iter()
            .zip(theirs)
            .all(|((a, fd_a), (b, fd_b))| a == b && inode(fd_a).is_some() && inode(fd_a) == inode(fd_b))
}

/// Which kernel object a descriptor is of.
fn inode(fd: &OwnedFd) -> Option<(u64, u64)> {
    nix::sys::stat::fstat(fd).ok().map(|stat| (stat.st_dev, stat.st_ino))
}
