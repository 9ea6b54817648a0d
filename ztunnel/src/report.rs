//! One connection's log line and counters. Phases tell facts; only this file knows how they are written.
//!
//! **Invariant:** each accepted connection (each CONNECT of a tunnel) has exactly one access-log line, also when its
//! task is dropped half-way.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use mesh_core::addr::{ClientAddr, Target};
use mesh_core::authz::Denial;
use mesh_core::copy::{Meter, Side, Traffic};
use mesh_core::hbone::{Baggage, ConnectError};
use mesh_core::identity::Identity;
use mesh_core::proto::pods::Denied;
use mesh_core::service::Service;
use mesh_core::workload::Workload;
use tracing::field::{DisplayValue, display};

use crate::connections::{Entry, Place};
use crate::metrics::{Label, PeerLabels, Principal, Security, ServiceLabels, TrafficLabels};
use crate::policy::Remarks;
use crate::proxy::Pod;
use crate::reason::{Cause, Phase, ProxyError, Side as Fault};

/// Which end of the mesh this proxy is for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The client's.
    Outbound,
    /// The server's.
    Inbound,
}

impl Direction {
    /// As in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }

    /// As in metrics.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Outbound => "source",
            Self::Inbound => "destination",
        }
    }
}

/// What is known of one end.
#[derive(Debug, Default)]
pub struct Party {
    /// Its address.
    pub address: Option<SocketAddr>,
    /// What the mesh knows.
    pub workload: Option<Arc<Workload>>,
    /// What it says of itself, where the mesh knows nothing.
    pub baggage: Option<Box<Baggage>>,
    /// What it proved to be.
    pub identity: Option<Identity>,
}

/// What the log line and the labels are made of.
#[derive(Debug)]
pub struct Facts {
    /// Which end this is.
    pub direction: Direction,
    /// Who connected.
    pub source: Party,
    /// What it reaches.
    pub destination: Party,
    /// Authority inside the tunnel.
    pub hbone_target: Option<Target>,
    /// What was dialled.
    pub service: Option<Arc<Service>>,
    /// How its bytes are carried.
    pub security: Security,
    /// How many endpoints of the service were tried, the one that is told of being the last.
    pub tried: usize,
    /// What policies say of it beside whether it may be.
    pub remarks: Remarks,
}

/// The account of one connection.
pub struct Report {
    /// Filled in by the phases.
    pub facts: Facts,
    pod: Arc<Pod>,
    started: Instant,
    place: Option<Place>,
    written: bool,
}

/// Counts carried bytes in the connection's own account and live in the metrics.
impl Meter for Report {
    fn carried(&self, side: Side, bytes: u64) {
        if let Some(place) = &self.place {
            place.entry().carried(side, bytes);
        }
    }

    fn most_at_once(&self) -> usize {
        self.place.as_ref().map_or(usize::MAX, |place| place.entry().most_at_once())
    }
}

impl Report {
    /// A connection from `client` was accepted for the pod.
    pub fn new(pod: &Arc<Pod>, direction: Direction, client: ClientAddr) -> Self {
        let mut facts = Facts::new(direction);
        facts.source.address = Some(client.get());
        Self { facts, pod: pod.clone(), started: Instant::now(), place: None, written: false }
    }

    /// Its destination is known: it counts as opened from now on, with the labels that the facts give now.
    pub fn open(&mut self) {
        let proxy = &self.pod.proxy;
        self.place = Some(proxy.connections.open(Entry {
            direction: self.facts.direction,
            source: self.facts.source.address.unwrap_or_else(|| ([0, 0, 0, 0], 0).into()),
            destination: self.facts.destination.address,
            pod: self.pod.uid.clone(),
            opened: self.started,
            traffic: Traffic::default(),
            counters: proxy.metrics.open(&self.labels("-")),
            window: self.pod.budget.window(),
        }));
        tracing::debug!(target: "access", direction = self.facts.direction.as_str(), "connection opened");
    }

    /// An endpoint did not answer, and another one will be tried: it is counted as a connection that failed.
    pub fn gave_up(&mut self, error: &ProxyError) {
        if let Some(place) = self.place.take() {
            place.entry().counters.closed.inc();
        }
        self.pod.proxy.metrics.fail(&self.labels(error.reason().flag()));
        let endpoint = self.facts.destination.address.map(display);
        tracing::debug!(target: "access", endpoint, %error, "the endpoint does not answer, trying another");
    }

    /// Writes the line and counts the outcome.
    pub fn finish(mut self, result: &Result<(), ProxyError>) {
        self.write(result.as_ref().err());
    }

    /// The same for one that failed.
    pub fn failed(mut self, error: &ProxyError) {
        self.write(Some(error));
    }

    fn write(&mut self, error: Option<&ProxyError>) {
        self.written = true;
        let (mut from_client, mut to_client) = (0, 0);
        if let Some(place) = self.place.take() {
            let Entry { counters, traffic, .. } = place.entry();
            counters.closed.inc();
            (from_client, to_client) = (traffic.from(Side::Downstream), traffic.from(Side::Upstream));
        }
        if let Some(error) = error {
            self.pod.proxy.metrics.fail(&self.labels(error.reason().flag()));
        }
        self.count_policies(error);
        self.tell_denial(error);
        self.log(error, from_client, to_client);
    }

    /// The pod's owners hear of it.
    fn tell_denial(&self, error: Option<&ProxyError>) {
        let Facts { direction: Direction::Inbound, source, destination, .. } = &self.facts else { return };
        let Some(denial) = error.and_then(ProxyError::denial) else { return };
        let Some(policy) = denial.policy() else { return };
        let address = || source.address.map(|address| address.ip().to_string());
        let client = source.identity.as_ref().map(ToString::to_string).or_else(address);
        self.pod.proxy.denials.tell(
            &self.pod.described().namespace,
            Denied {
                uid: self.pod.uid.to_string(),
                client: client.unwrap_or_default(),
                port: destination.address.map_or(0, |address| address.port().into()),
                policy: policy.to_string(),
                reason: denial.to_string(),
            },
        );
    }

    /// What policies did to it, and would have done.
    fn count_policies(&self, error: Option<&ProxyError>) {
        let policies = &self.pod.proxy.metrics.policies;
        let (direction, remarks) = (self.facts.direction, &self.facts.remarks);
        let denied_by = |denial: &Denial, outcome| {
            if let Some(policy) = denial.policy() {
                policies.count(direction, policy, outcome);
            }
        };
        match error.map(|error| &*error.cause) {
            Some(Cause::Denied(denial)) => denied_by(denial, "denied"),
            Some(Cause::Revoked(denial)) => denied_by(denial, "cut"),
            Some(Cause::Tunnel(ConnectError::Refused { policy: Some(policy), .. })) => {
                policies.said(direction, policy, "denied");
            }
            _ => {}
        }
        if let Some(denial) = &remarks.dry_run {
            denied_by(denial, "dry_run");
        }
        remarks.audit.iter().for_each(|audited| policies.count(direction, &audited.policy, "audit"));
    }

    /// The facts' labels; what a peer says of itself is bounded.
    fn labels(&self, response_flags: &'static str) -> TrafficLabels {
        let mut labels = self.facts.labels(response_flags);
        if self.facts.source.workload.is_none() && self.facts.source.baggage.is_some() {
            labels.source = self.pod.proxy.metrics.said(labels.source);
        }
        labels
    }

    fn log(&self, error: Option<&ProxyError>, from_client: u64, to_client: u64) {
        let Facts { direction, source, destination, hbone_target, service, tried, remarks, .. } = &self.facts;
        // From the view of the workload whose proxy this is.
        let (bytes_sent, bytes_recv) = match direction {
            Direction::Outbound => (from_client, to_client),
            Direction::Inbound => (to_client, from_client),
        };
        let duration = format!("{}ms", self.started.elapsed().as_millis());
        macro_rules! line {
            ($level:expr, $message:literal) => {
                tracing::event!(
                    target: "access", $level,
                    src.addr = source.address.map(display),
                    src.workload = source.name(),
                    src.namespace = source.namespace(),
                    src.identity = source.proved(),
                    src.cluster = source.cluster(),
                    dst.addr = destination.address.map(display),
                    dst.hbone_addr = hbone_target.map(display),
                    dst.service = service.as_ref().map(|service| &*service.key.hostname),
                    dst.workload = destination.name(),
                    dst.namespace = destination.namespace(),
                    dst.identity = destination.proved(),
                    dst.cluster = destination.cluster(),
                    direction = direction.as_str(),
                    bytes_sent, bytes_recv, duration,
                    tried = (*tried > 1).then_some(*tried),
                    dry_run = remarks.dry_run.as_ref().map(display),
                    audit = (!remarks.audit.is_empty()).then(|| display(Listed(&remarks.audit))),
                    error = error.map(display),
                    nearest = error.and_then(|error| error.denial()?.nearest()).map(display),
                    reason = error.map(|error| error.reason().flag()),
                    $message
                )
            };
        }
        match error {
            None => line!(tracing::Level::INFO, "connection complete"),
            Some(_) => line!(tracing::Level::ERROR, "connection failed"),
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if !self.written {
            self.write(Some(&ProxyError::new(Phase::Copy, Fault::Local, Cause::Cut)));
        }
    }
}

impl Party {
    fn name(&self) -> Option<&str> {
        let owner = || self.baggage.as_ref()?.workload.as_ref().map(|(_, name)| name.as_str());
        self.workload.as_ref().map(|workload| &*workload.name).or_else(owner)
    }

    fn namespace(&self) -> Option<&str> {
        let said = || self.baggage.as_ref()?.namespace.as_deref();
        self.workload.as_ref().map(|workload| &*workload.namespace).or_else(said)
    }

    fn cluster(&self) -> Option<&str> {
        let said = || self.baggage.as_ref()?.cluster.as_deref();
        self.workload.as_ref().map(|workload| &*workload.cluster).or_else(said)
    }

    fn proved(&self) -> Option<DisplayValue<&Identity>> {
        self.identity.as_ref().map(display)
    }

    fn labels(&self, principal: Option<&Identity>) -> PeerLabels {
        let principal = Principal(principal.cloned());
        match (&self.workload, &self.baggage) {
            (Some(workload), _) => PeerLabels {
                workload: Label::from(&workload.workload_name),
                canonical_service: Label::from(&workload.canonical_name),
                canonical_revision: Label::from(&workload.canonical_revision),
                namespace: Label::from(&workload.namespace),
                principal,
                cluster: Label::from(&workload.cluster),
                region: Label::from(&workload.locality.region),
                zone: Label::from(&workload.locality.zone),
            },
            (None, Some(baggage)) => PeerLabels {
                workload: Label::from(baggage.workload.as_ref().map(|(_, name)| name)),
                canonical_service: Label::from(baggage.service.as_ref()),
                canonical_revision: Label::from(baggage.revision.as_ref()),
                namespace: Label::from(baggage.namespace.as_ref()),
                principal,
                cluster: Label::from(baggage.cluster.as_ref()),
                region: Label::from(baggage.region.as_ref()),
                zone: Label::from(baggage.zone.as_ref()),
            },
            (None, None) => PeerLabels { principal, ..Default::default() },
        }
    }
}

impl Facts {
    /// Nothing is known yet.
    pub fn new(direction: Direction) -> Self {
        Self {
            direction,
            source: Party::default(),
            destination: Party::default(),
            hbone_target: None,
            service: None,
            security: Security::default(),
            tried: 0,
            remarks: Remarks::default(),
        }
    }

    /// Labels as of now. The source's principal is what was proved; the destination's what the mesh says it is.
    pub fn labels(&self, response_flags: &'static str) -> TrafficLabels {
        let known = self.destination.workload.as_ref().map(|workload| &workload.identity);
        TrafficLabels {
            reporter: self.direction,
            source: self.source.labels(self.source.identity.as_ref()),
            destination: self.destination.labels(self.destination.identity.as_ref().or(known)),
            service: self.service.as_ref().map(|service| service_labels(service)).unwrap_or_default(),
            response_flags,
            security: self.security,
        }
    }
}

/// One after the other.
struct Listed<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for Listed<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, item) in self.0.iter().enumerate() {
            write!(f, "{}{item}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

fn service_labels(service: &Service) -> ServiceLabels {
    ServiceLabels {
        host: Label::from(&service.key.hostname),
        namespace: Label::from(&service.key.namespace),
        name: Label::from(&service.name),
    }
}
