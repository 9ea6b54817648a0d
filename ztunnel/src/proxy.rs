//! What all connections of the process share, and what all connections of one pod share.

use std::io;
use std::sync::Arc;

use mesh_core::addr::{ClientAddr, NetworkAddress, NextHop, Target};
use mesh_core::certs::Certificates;
use mesh_core::copy::{self, Outcome};
use mesh_core::drain::Watch;
use mesh_core::hbone::pool::{Config as PoolConfig, Dial, Key, Pool};
use mesh_core::hbone::{Baggage, HboneStream};
use mesh_core::store::Reader;
use mesh_core::workload::Workload;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;

use crate::budget::{self, Budget};
use crate::connections::Connections;
use crate::metrics::Metrics;
use crate::policy::{self, Permit, PolicyChanges};
use crate::reason::{Cause, Phase, ProxyError, Side};
use crate::report::Metered;
use crate::sockets::{self, Sockets};
use crate::tuples::{Tuple, Tuples};

/// Source ports tried towards an application; the kernel may know of connections that are older than the proxy.
const PORT_TRIES: usize = 8;

/// The process.
#[derive(Clone)]
pub struct Proxy {
    /// The mesh as known here.
    pub mesh: Reader,
    /// The pods' certificates.
    pub certificates: Certificates,
    /// What is counted.
    pub metrics: Metrics,
    /// What is open.
    pub connections: Connections,
    /// Who hears of changed policies.
    pub policy: PolicyChanges,
    /// What each pod may have.
    pub limits: budget::Config,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxy").finish_non_exhaustive()
    }
}

/// One pod that is served.
pub struct Pod {
    /// Kubernetes pod UID.
    pub uid: Arc<str>,
    /// Makes its sockets.
    pub sockets: Arc<dyn Sockets>,
    /// Its tunnels to other pods.
    pub pool: Pool<Dialer>,
    /// Its address pairs in use.
    pub tuples: Tuples,
    /// What it may have.
    pub budget: Budget,
    /// The process.
    pub proxy: Arc<Proxy>,
    /// Changes when policy has to be asked again about its connections.
    pub(crate) policy: Arc<watch::Sender<()>>,
    /// As the agent described it.
    described: Arc<Workload>,
}

impl Pod {
    /// A pod as the agent described it.
    pub fn new(
        uid: Arc<str>,
        described: Arc<Workload>,
        sockets: Arc<dyn Sockets>,
        proxy: Arc<Proxy>,
    ) -> Self {
        let dialer = Dialer { sockets: sockets.clone() };
        let pool = Pool::new(dialer, proxy.certificates.clone(), PoolConfig::default());
        let policy = proxy.policy.of(&described.uid);
        let budget = Budget::new(proxy.limits);
        Self { uid, sockets, pool, tuples: Tuples::default(), budget, proxy, policy, described }
    }

    /// The pod as a workload: what the mesh knows (locality, services), if it is the same identity; until then what
    /// the agent said when it added the pod.
    pub fn workload(&self) -> Arc<Workload> {
        self.proxy
            .mesh
            .workload(self.described.uid.as_str())
            .filter(|known| known.identity == self.described.identity)
            .unwrap_or_else(|| self.described.clone())
    }

    /// The workload at an address of the pod's network.
    pub fn workload_at(&self, ip: std::net::IpAddr) -> Option<Arc<Workload>> {
        self.proxy.mesh.workload_at(&NetworkAddress::new(self.described.network.clone(), ip))
    }

    /// Connects to the pod's application as `client`, from a port of our choice.
    ///
    /// # Errors
    /// When the application does not answer or no port is free.
    pub async fn connect_application(
        &self,
        client: ClientAddr,
        target: Target,
    ) -> Result<(TcpStream, Tuple), ProxyError> {
        let make = |from| self.sockets.to_application(from, target);
        self.connect_from(client, target, make, "connecting to the application").await
    }

    /// Connects to `target` in the clear from the pod's address that `client`, its application, connected from, and from
    /// a port of our choice: the application's own would be taken by two sockets, and the kernel would give the answers
    /// to either.
    ///
    /// # Errors
    /// When the target does not answer or no port is free.
    pub async fn connect_plain(
        &self,
        client: ClientAddr,
        target: Target,
    ) -> Result<(TcpStream, Tuple), ProxyError> {
        let make = |from| self.sockets.to_network(Some(from), NextHop::from(target.get()));
        self.connect_from(client, target, make, "connecting to the destination").await
    }

    async fn connect_from(
        &self,
        client: ClientAddr,
        target: Target,
        make: impl Fn(ClientAddr) -> io::Result<TcpSocket>,
        what: &'static str,
    ) -> Result<(TcpStream, Tuple), ProxyError> {
        for _ in 0..PORT_TRIES {
            let Some((from, tuple)) = self.tuples.choose(client, target, rand::random()) else { break };
            let socket = match make(from) {
                Ok(socket) => socket,
                Err(error) if is_taken(&error) => continue,
                Err(error) => {
                    return Err(ProxyError::local(Phase::Connect, "opening a socket in the pod", error));
                }
            };
            match sockets::connect(socket, target.get()).await {
                Ok(stream) => return Ok((stream, tuple)),
                Err(error) if is_taken(&error) => {}
                Err(error) => {
                    let cause = Cause::Io { what, error };
                    return Err(ProxyError::new(Phase::Connect, Side::Upstream, cause));
                }
            }
        }
        Err(ProxyError::new(Phase::Connect, Side::Local, Cause::NoPort))
    }
}

/// The pair of addresses is in use by a connection that the proxy does not know, or waits in TIME-WAIT.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// Opens the pod's tunnels.
pub struct Dialer {
    sockets: Arc<dyn Sockets>,
}

impl Dial for Dialer {
    type Io = TcpStream;

    async fn dial(&self, key: &Key) -> io::Result<TcpStream> {
        self.sockets.to_network(None, NextHop::from(key.destination))?.connect(key.destination).await
    }
}

/// A connection that can be ended so that the other end knows that it was not to end there.
pub trait Abort {
    /// Ends it now, or at the latest when it is dropped.
    fn abort(&mut self);
}

impl Abort for TcpStream {
    fn abort(&mut self) {
        sockets::reset_on_close(self);
    }
}

impl Abort for HboneStream {
    fn abort(&mut self) {
        Self::abort(self);
    }
}

/// Carries bytes until both sides have ended, the pod's time is over, or policy revokes its permit (where one was
/// needed). Where one side breaks, the other is reset: an end would look to the application as if it had received
/// everything.
///
/// # Errors
/// When a side breaks, or the connection is cut.
pub async fn carry<Down, Up>(
    mut downstream: Down,
    mut upstream: Up,
    meter: &Metered,
    drain: &Watch,
    permit: Option<&Permit>,
) -> Result<(), ProxyError>
where
    Down: AsyncRead + AsyncWrite + Unpin + Abort,
    Up: AsyncRead + AsyncWrite + Unpin + Abort,
{
    let cut = async {
        tokio::select! {
            biased;
            () = drain.closing() => Cause::Cut,
            denial = policy::revoked(permit) => Cause::Revoked(denial),
        }
    };
    let outcome = copy::both(&mut downstream, &mut upstream, meter, cut).await;
    if !matches!(outcome, Outcome::Finished { .. }) {
        downstream.abort();
        upstream.abort();
    }
    match outcome {
        Outcome::Finished { .. } => Ok(()),
        Outcome::Broken { side, error } => {
            let side = match side {
                copy::Side::Downstream => Side::Downstream,
                copy::Side::Upstream => Side::Upstream,
            };
            Err(ProxyError::new(Phase::Copy, side, Cause::Io { what: "the connection broke", error }))
        }
        Outcome::Cancelled(cause) => Err(ProxyError::new(Phase::Copy, Side::Local, cause)),
    }
}

/// What a workload says of itself to its peers.
pub fn baggage(workload: &Workload) -> Baggage {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Baggage {
        cluster: some(&workload.cluster),
        namespace: some(&workload.namespace),
        workload: some(&workload.workload_name).map(|name| (workload.workload_type, name)),
        service: some(&workload.canonical_name),
        revision: some(&workload.canonical_revision),
        region: some(&workload.locality.region),
        zone: some(&workload.locality.zone),
    }
}
