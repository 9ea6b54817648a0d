//! A client's tunnels, shared by all its connections to the same peer.
//!
//! One pool serves one pod (its dialer opens sockets in that pod's netns); dropping it cuts its tunnels.
//!
//! **Invariant:** a tunnel is reused only for the same source identity and address, destination address, expected
//! identities and destination workload: its peer was verified against exactly these.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::client::{self, ConnectError, Connected, DialError, Lease, Tunnel};
use super::request::ConnectRequest;
use super::settings::KeepAlive;
use super::window::Window;
use crate::certs::Certificates;
use crate::identity::Identity;

/// Limits of a pool.
#[derive(Clone, Debug)]
pub struct Config {
    /// Streams at once on one tunnel; for more, another is dialled.
    pub max_streams: usize,
    /// A tunnel without streams is closed after this.
    pub idle: Duration,
    /// With more tunnels than this, those without streams are closed at the next dial.
    pub max_tunnels: usize,
    /// Time for TCP to connect.
    pub connect_timeout: Duration,
    /// How a dead peer is found.
    pub keep_alive: KeepAlive,
    /// What one stream may hold.
    pub window: Window,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_streams: 100,
            idle: Duration::from_secs(5 * 60),
            max_tunnels: 1024,
            connect_timeout: Duration::from_secs(10),
            keep_alive: KeepAlive::default(),
            window: Window::default(),
        }
    }
}

/// What two connections must have in common to share a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Who dials.
    pub source: Identity,
    /// From which address.
    pub source_address: IpAddr,
    /// Where the peer listens.
    pub destination: SocketAddr,
    /// Who may answer, in order.
    pub expected: Vec<Identity>,
    /// Uid of the workload that is meant, if one is: its address may be another's tomorrow.
    pub workload_uid: Option<Arc<str>>,
}

/// Opens sockets.
pub trait Dial: Send + Sync + 'static {
    /// What it opens.
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Connects to `key.destination` from `key.source_address`; the pool bounds the time.
    fn dial(&self, key: &Key) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

/// See the module. Clones are the same pool.
pub struct Pool<D: Dial> {
    inner: Arc<Inner<D>>,
    /// Cuts the tunnels when the last clone goes.
    _stop_on_drop: Arc<DropGuard>,
}

impl<D: Dial> Clone for Pool<D> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), _stop_on_drop: self._stop_on_drop.clone() }
    }
}

struct Inner<D> {
    slots: Mutex<HashMap<Key, Slot>>,
    dial: D,
    certificates: Certificates,
    config: Config,
    drivers: TaskTracker,
    stop: CancellationToken,
}

/// Between two looks for tunnels that nobody uses.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// A tunnel that is dialled has no stream at first.
const YOUNG: Duration = Duration::from_secs(1);

type Dialing = Shared<BoxFuture<'static, Result<(), DialError>>>;

/// The tunnels of one key, and the attempt that all who wait for another one share.
#[derive(Default)]
struct Slot {
    tunnels: Vec<Arc<Tunnel>>,
    dialing: Option<WeakShared<BoxFuture<'static, Result<(), DialError>>>>,
}

impl<D: Dial> Pool<D> {
    /// An empty pool; must be called inside a tokio runtime.
    pub fn new(dial: D, certificates: Certificates, config: Config) -> Self {
        let (stop, idle) = (CancellationToken::new(), config.idle);
        let inner = Arc::new(Inner {
            slots: Mutex::default(),
            dial,
            certificates,
            config,
            drivers: TaskTracker::new(),
            stop: stop.clone(),
        });
        let weak = Arc::downgrade(&inner);
        let sweeping = async move {
            loop {
                tokio::time::sleep((idle / 4).max(SHORTEST_PAUSE)).await;
                let Some(inner) = weak.upgrade() else { return };
                inner.sweep(idle);
            }
        };
        inner.drivers.spawn(stop.clone().run_until_cancelled_owned(sweeping));
        Self { inner, _stop_on_drop: Arc::new(stop.drop_guard()) }
    }

    /// Tunnels a connection to `key`'s destination. A tunnel that turns out to be closed by the peer, or to be full,
    /// before it has taken the request is replaced once.
    ///
    /// # Errors
    /// When there is no tunnel, or the peer does not answer 200.
    pub async fn connect(&self, key: &Key, request: &ConnectRequest) -> Result<Connected, ConnectError> {
        let (tunnel, lease, reused) = self.checkout(key).await?;
        match tunnel.connect(request, lease).await {
            Err(error) if is_stale(&error, reused) => {
                tracing::debug!(destination = %key.destination, %error, "pooled tunnel is stale, dialling another");
                self.inner.remove(key, &tunnel);
                let (tunnel, lease, _) = self.checkout(key).await?;
                tunnel.connect(request, lease).await
            }
            answered => answered,
        }
    }

    /// Sees to it that there is a tunnel with a place for one more connection.
    ///
    /// # Errors
    /// When there is none and none can be made.
    pub async fn prepare(&self, key: &Key) -> Result<(), DialError> {
        self.checkout(key).await.map(drop)
    }

    /// Cuts all tunnels, and waits until their sockets are closed: an open one would hold its network namespace.
    pub async fn close(&self) {
        self.inner.stop.cancel();
        self.inner.lock().clear();
        self.inner.drivers.close();
        self.inner.drivers.wait().await;
    }

    /// Tunnels that are open, for metrics and tests.
    pub fn len(&self) -> usize {
        self.inner.len()
    }

    /// Whether no tunnel is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A place on a tunnel, and whether the tunnel was there before.
    async fn checkout(&self, key: &Key) -> Result<(Arc<Tunnel>, Lease, bool), DialError> {
        let mut reused = true;
        loop {
            let dialing = {
                let mut slots = self.inner.lock();
                let slot = slots.entry(key.clone()).or_default();
                if let Some((tunnel, lease)) = slot.lease(self.inner.config.max_streams) {
                    return Ok((tunnel, lease, reused));
                }
                slot.join_or(|| self.inner.clone().open(key.clone()).boxed().shared())
            };
            reused = false;
            dialing.await?;
        }
    }
}

/// Whether another tunnel may serve the request: the peer has not looked at it, or the tunnel had died unnoticed. No
/// byte of the app has been sent in either case.
fn is_stale(error: &ConnectError, reused: bool) -> bool {
    match error {
        ConnectError::NotTaken(_) => true,
        ConnectError::Broken(_) | ConnectError::Tls(_) => reused,
        _ => false,
    }
}

impl Slot {
    fn lease(&mut self, max_streams: usize) -> Option<(Arc<Tunnel>, Lease)> {
        self.tunnels.retain(|tunnel| tunnel.is_alive());
        self.tunnels.iter().find_map(|tunnel| Some((tunnel.clone(), tunnel.lease(max_streams)?)))
    }

    /// The attempt that is under way, else a new one. Held weakly: when all who waited for it have gone, so has it.
    fn join_or(&mut self, start: impl FnOnce() -> Dialing) -> Dialing {
        if let Some(dialing) = self.dialing.as_ref().and_then(WeakShared::upgrade)
            && dialing.peek().is_none()
        {
            return dialing;
        }
        let dialing = start();
        self.dialing = dialing.downgrade();
        dialing
    }
}

impl<D: Dial> Inner<D> {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open(self: Arc<Self>, key: Key) -> Result<(), DialError> {
        let certificate = self.certificates.get(&key.source).await?;
        let timeout = self.config.connect_timeout;
        let io = tokio::time::timeout(timeout, self.dial.dial(&key))
            .await
            .map_err(|_| DialError::ConnectTimeout(timeout))?
            .map_err(|error| DialError::Connect(error.to_string()))?;
        let (tunnel, driver) = client::handshake(
            io,
            &certificate,
            &key.expected,
            self.config.keep_alive,
            self.config.window.clone(),
        )
        .await?;
        self.drivers.spawn(self.stop.clone().run_until_cancelled_owned(driver));
        if self.len() >= self.config.max_tunnels {
            self.sweep(YOUNG);
        }
        self.lock().entry(key).or_default().tunnels.push(tunnel);
        Ok(())
    }

    fn remove(&self, key: &Key, stale: &Arc<Tunnel>) {
        if let Some(slot) = self.lock().get_mut(key) {
            slot.tunnels.retain(|tunnel| !Arc::ptr_eq(tunnel, stale));
        }
    }

    fn len(&self) -> usize {
        self.lock().values().map(|slot| slot.tunnels.len()).sum()
    }

    /// Lets go of tunnels that nobody has used for `idle`; a tunnel closes when its last handle has gone.
    fn sweep(&self, idle: Duration) {
        self.lock().retain(|_, slot| {
            slot.tunnels.retain(|tunnel| tunnel.is_alive() && !tunnel.is_idle(idle));
            let dialing = slot.dialing.as_ref().and_then(WeakShared::upgrade).is_some();
            dialing || !slot.tunnels.is_empty()
        });
    }
}
