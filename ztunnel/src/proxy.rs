//! What all connections of the process share, and what all connections of one pod share.

use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use mesh_core::addr::{ClientAddr, NetworkAddress, Target};
use mesh_core::allowance::Allowance;
use mesh_core::certs::Certificates;
use mesh_core::copy::{self, Carried, Meter, Outcome};
use mesh_core::drain::Watch;
use mesh_core::hbone::pool::{Config as PoolConfig, Pool};
use mesh_core::hbone::{Baggage, HboneStream};
use mesh_core::store::Reader;
use mesh_core::tls::revocation::Revocations;
use mesh_core::workload::Workload;
use tokio::io::DuplexStream;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::affinity::Affinities;
use crate::budget::{self, Budget};
use crate::connections::Connections;
use crate::denials::Denials;
use crate::descriptors::Descriptors;
use crate::dial::{self, Dialer};
use crate::dns::{self, names::Zone};
use crate::hosts::Hosts;
use crate::metrics::Metrics;
use crate::neighbours::Neighbours;
use crate::pace::Pace;
use crate::policy::{self, Known, Permit, PolicyChanges};
use crate::reason::{Cause, Phase, ProxyError, Side};
use crate::report::Report;
use crate::sockets::{self, Sockets};
use crate::source;
use crate::tuples::{Tuple, Tuples};

/// The process.
#[derive(Clone)]
pub struct Proxy {
    /// The mesh as known here.
    pub mesh: Reader,
    /// The pods' certificates.
    pub certificates: Certificates,
    /// Whose certificates are revoked.
    pub revocations: Revocations,
    /// What is counted.
    pub metrics: Metrics,
    /// What is open.
    pub connections: Connections,
    /// Endpoints that have a host name instead of an address.
    pub hosts: Hosts,
    /// Who hears of changed policies.
    pub policy: PolicyChanges,
    /// Who hears of connections that policy denied.
    pub denials: Denials,
    /// What each pod may have.
    pub limits: budget::Config,
    /// What all connections may have.
    pub descriptors: Descriptors,
    /// What each client may ask of the process.
    pub pace: Pace,
    /// The pods that are served.
    pub neighbours: Neighbours,
    /// A tunnel without streams is closed after this.
    pub pool_idle: Duration,
    /// Tunnels also between pods of this node.
    pub same_node_mtls: bool,
    /// Where the cluster's services are in DNS.
    pub zone: Zone,
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
    /// The endpoints that its connections go to again.
    pub affinities: Affinities,
    /// What it may have.
    pub budget: Budget,
    /// Places for conversations with DNS servers.
    pub dns_streams: Semaphore,
    /// DNS queries that are looked at.
    pub dns_queries: Allowance,
    /// The process.
    pub proxy: Arc<Proxy>,
    /// Changes when policy has to be asked again about its connections.
    pub(crate) known: Arc<Known>,
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
        let dialer = Dialer::new(sockets.clone());
        let budget = Budget::new(proxy.limits);
        let config = PoolConfig { window: budget.window(), idle: proxy.pool_idle, ..PoolConfig::default() };
        let pool = Pool::new(dialer, proxy.certificates.clone(), config);
        let known = proxy.policy.of(&described, &proxy.mesh);
        let (tuples, affinities) = (Tuples::default(), Affinities::default());
        let dns_streams = Semaphore::new(dns::tcp::MOST);
        let dns_queries = dns::pace(proxy.limits.max_pod_dns_queries);
        Self {
            uid,
            sockets,
            pool,
            tuples,
            affinities,
            budget,
            dns_streams,
            dns_queries,
            proxy,
            known,
            described,
        }
    }

    /// The pod as a workload: what the mesh knows (locality, services), if that is about this pod and not the last one of
    /// its name; until then what the agent said when it added the pod, and once the mesh has forgotten it what it knew
    /// last.
    pub fn workload(&self) -> Arc<Workload> {
        self.proxy
            .mesh
            .workload(self.described.uid.as_str())
            .filter(|known| known.is_same_pod(&self.described))
            .unwrap_or_else(|| self.known.borrow().clone())
    }

    /// The pod as the agent described it.
    pub fn described(&self) -> &Workload {
        &self.described
    }

    /// The workload at an address of the pod's network.
    pub fn workload_at(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        self.proxy.mesh.workload_at(&NetworkAddress::new(self.described.network.clone(), ip))
    }

    /// Connects to the pod's application as `client`, from a port of our choice; from another of its addresses, `others`,
    /// where the target is of the other IP family, and as the pod itself where it has none.
    ///
    /// # Errors
    /// When the application does not answer or no port is free.
    pub async fn connect_application(
        &self,
        client: ClientAddr,
        others: &[IpAddr],
        target: Target,
    ) -> Result<(TcpStream, Tuple), ProxyError> {
        let Some(client) = source::address(client, target, others) else {
            return self.connect_plain(client, target).await;
        };
        dial::to_application(&*self.sockets, target).connect(&self.tuples, client, target).await
    }

    /// Connects to `target` in the clear from the pod's address that `client`, its application, connected from, or the
    /// pod's own of the target's IP family, and from a port of our choice: the application's own would be taken by two
    /// sockets, and the kernel would give the answers to either.
    ///
    /// # Errors
    /// When the target does not answer or no port is free.
    pub async fn connect_plain(
        &self,
        client: ClientAddr,
        target: Target,
    ) -> Result<(TcpStream, Tuple), ProxyError> {
        let client = source::address(client, target, &self.workload().addresses)
            .ok_or_else(|| ProxyError::new(Phase::Connect, Side::Local, Cause::NoAddress(target.ip())))?;
        dial::to_network(&*self.sockets, target).connect(&self.tuples, client, target).await
    }
}

/// A connection that can be ended so that the other end knows that it was not to end there.
pub trait Abort {
    /// Ends it now, or at the latest when it is dropped.
    fn abort(&mut self);

    /// The same because of policy, which the other end learns where it can be told.
    fn deny(&mut self) {
        self.abort();
    }
}

impl Abort for TcpStream {
    fn abort(&mut self) {
        sockets::reset_on_close(self);
    }
}

/// Its other end is this process's own, and sees the end.
impl Abort for DuplexStream {
    fn abort(&mut self) {}
}

impl Abort for HboneStream {
    fn abort(&mut self) {
        Self::abort(self);
    }

    fn deny(&mut self) {
        Self::deny(self);
    }
}

/// The second part of a connection's life: what carries its bytes, and reports at the end.
pub type Carrying = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A connection's life in two parts, each in a box of its own: what the way to the other side takes (kilobytes) is given
/// back when the bytes begin to flow, which may go on for days. None: there is no way, which has been told.
pub fn in_two_parts(
    way: impl Future<Output = Option<Carrying>> + Send + 'static,
) -> impl Future<Output = ()> + Send + 'static {
    let way = Box::pin(way);
    async move {
        let carrying = way.await;
        if let Some(carrying) = carrying {
            carrying.await;
        }
    }
}

/// Carries bytes until both sides have ended, or until `cut` says why they have to. Where one side breaks, the other is
/// reset: an end would look to the application as if it had received everything. The caller is to drop both, and that
/// before it reports.
///
/// # Errors
/// When a side breaks, or the connection is cut.
pub async fn carry<Down, Up>(
    downstream: &mut Down,
    upstream: &mut Up,
    meter: &impl Meter,
    cut: impl Future<Output = Cause>,
) -> Result<(), ProxyError>
where
    Down: Carried + Abort,
    Up: Carried + Abort,
{
    let outcome = copy::both(&mut *downstream, &mut *upstream, meter, cut).await;
    match &outcome {
        Outcome::Finished { .. } => {}
        Outcome::Cancelled(Cause::Revoked(_)) => {
            downstream.deny();
            upstream.abort();
        }
        _ => {
            downstream.abort();
            upstream.abort();
        }
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

/// The same as the second part of a connection's life, until the pod's time is over or policy revokes its permit (where
/// one was needed); `occupied` is what it takes for as long.
pub fn carrying<Down, Up>(
    mut downstream: Down,
    mut upstream: Up,
    report: Report,
    drain: Watch,
    permit: Option<Permit>,
    occupied: impl Send + 'static,
) -> Carrying
where
    Down: Carried + Abort + Send + 'static,
    Up: Carried + Abort + Send + 'static,
{
    Box::pin(async move {
        // Each is here once; an async function around them would keep a second copy.
        let (mut closing, mut revoked) = (pin!(drain.closing()), pin!(policy::revoked(permit.as_ref())));
        let cut = poll_fn(|cx| match closing.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Cause::Cut),
            Poll::Pending => revoked.as_mut().poll(cx).map(Cause::Revoked),
        });
        let result = carry(&mut downstream, &mut upstream, &report, cut).await;
        drop((downstream, upstream, occupied));
        report.finish(&result);
    })
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
