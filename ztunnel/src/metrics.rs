//! Metric families, named and labelled as Istio's ztunnel has them, so that its dashboards work.
//!
//! Labels are resolved to counters once a connection; what is kept for its life are the counters.

mod certificates;
mod policies;

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use mesh_core::identity::Identity;
use mesh_core::metrics::process::Process;
use mesh_core::store::Size;
use mesh_core::tls::revocation;
use mesh_core::xds;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelSetEncoder, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub use self::certificates::Certificates;
pub use self::policies::Policies;
use crate::descriptors::Descriptors;
use crate::dns;
use crate::report::Direction;

/// A label that may be unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Label(Option<Arc<str>>);

impl From<&Arc<str>> for Label {
    fn from(text: &Arc<str>) -> Self {
        Self((!text.is_empty()).then(|| text.clone()))
    }
}

impl From<Option<&String>> for Label {
    fn from(text: Option<&String>) -> Self {
        Self(text.filter(|text| !text.is_empty()).map(|text| text.as_str().into()))
    }
}

impl EncodeLabelValue for Label {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.as_deref().unwrap_or(UNKNOWN).encode(encoder)
    }
}

const UNKNOWN: &str = "unknown";

/// An identity as a label; kept as it is, because printing it would cost an allocation a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Principal(pub Option<Identity>);

impl EncodeLabelValue for Principal {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        match &self.0 {
            Some(identity) => fmt::Write::write_fmt(encoder, format_args!("{identity}")),
            None => UNKNOWN.encode(encoder),
        }
    }
}

/// One end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are those of the labels")]
pub struct PeerLabels {
    pub workload: Label,
    pub canonical_service: Label,
    pub canonical_revision: Label,
    pub namespace: Label,
    pub principal: Principal,
    pub cluster: Label,
    pub region: Label,
    pub zone: Label,
}

/// The service that was meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are those of the labels")]
pub struct ServiceLabels {
    pub host: Label,
    pub namespace: Label,
    pub name: Label,
}

/// How the bytes of a connection were carried: the label `connection_security_policy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Security {
    /// In the clear, from or to somebody outside the mesh.
    #[default]
    Unknown,
    /// Both ends proved who they are.
    MutualTls,
    /// Between two pods of this node, inside this process. Nothing was encrypted, hence `none`, Istio's word for that;
    /// yet both principals are given, since the kernel vouches for them: each end is in the network namespace of its pod.
    SameNode,
}

impl Security {
    fn label(self) -> &'static str {
        match self {
            Self::Unknown => UNKNOWN,
            Self::MutualTls => "mutual_tls",
            Self::SameNode => "none",
        }
    }
}

/// Labels of the `istio_tcp_*` families.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TrafficLabels {
    /// Which proxy counts.
    pub reporter: Direction,
    /// Who connected.
    pub source: PeerLabels,
    /// What it reached.
    pub destination: PeerLabels,
    /// What it dialled.
    pub service: ServiceLabels,
    /// `-`, or why it failed.
    pub response_flags: &'static str,
    /// How the bytes were carried.
    pub security: Security,
}

impl EncodeLabelSet for TrafficLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let Self { reporter, source, destination, service, response_flags, security } = self;
        let labels: [(&str, &dyn Value); 27] = [
            ("reporter", &reporter.reporter()),
            ("source_workload", &source.workload),
            ("source_canonical_service", &source.canonical_service),
            ("source_canonical_revision", &source.canonical_revision),
            ("source_workload_namespace", &source.namespace),
            ("source_principal", &source.principal),
            ("source_app", &source.canonical_service),
            ("source_version", &source.canonical_revision),
            ("source_cluster", &source.cluster),
            ("destination_service", &service.host),
            ("destination_service_namespace", &service.namespace),
            ("destination_service_name", &service.name),
            ("destination_workload", &destination.workload),
            ("destination_canonical_service", &destination.canonical_service),
            ("destination_canonical_revision", &destination.canonical_revision),
            ("destination_workload_namespace", &destination.namespace),
            ("destination_principal", &destination.principal),
            ("destination_app", &destination.canonical_service),
            ("destination_version", &destination.canonical_revision),
            ("destination_cluster", &destination.cluster),
            ("request_protocol", &"tcp"),
            ("response_flags", response_flags),
            ("connection_security_policy", &security.label()),
            ("source_region", &source.region),
            ("source_zone", &source.zone),
            ("destination_region", &destination.region),
            ("destination_zone", &destination.zone),
        ];
        labels.into_iter().try_for_each(|(name, value)| value.label(name, encoder))
    }
}

/// `EncodeLabelValue` made into an object, for the table above.
trait Value {
    fn label(&self, name: &str, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error>;
}

impl<T: EncodeLabelValue> Value for T {
    fn label(&self, name: &str, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        use prometheus_client::encoding::EncodeLabelKey;
        let mut label = encoder.encode_label();
        let mut key = label.encode_label_key()?;
        EncodeLabelKey::encode(&name, &mut key)?;
        let mut value = key.encode_label_value()?;
        self.encode(&mut value)?;
        value.finish()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReporterLabels {
    reporter: &'static str,
}

/// Peers outside the known mesh that are told apart by what they say of themselves. They may say anything, and a series
/// is kept for ever.
const MAX_SAID: usize = 1000;

/// All families; clones are the same.
#[derive(Clone, Debug)]
pub struct Metrics {
    opened: Family<TrafficLabels, Counter>,
    closed: Family<TrafficLabels, Counter>,
    failed: Family<TrafficLabels, Counter>,
    sent: Family<TrafficLabels, Counter>,
    received: Family<TrafficLabels, Counter>,
    sockets: Family<ReporterLabels, Gauge>,
    /// Pods that are served now.
    pub pods: Gauge,
    /// Pods that were ever served.
    pub pods_started: Counter,
    /// Pods that are no longer.
    pub pods_stopped: Counter,
    /// See [`pace::Paced`](crate::pace::Paced).
    pub slowed: Seconds,
    refused: Gauge,
    unreadable: Gauge,
    denying: Gauge,
    /// What policies did.
    pub policies: Policies,
    /// Of the talk with the agent.
    pub xds: xds::metrics::Metrics,
    /// Of the pods' certificates.
    pub certificates: Certificates,
    /// Of certificate revocation lists.
    pub crl: revocation::Metrics,
    /// Of the pods' DNS queries.
    pub dns: dns::metrics::Metrics,
    /// Label sets that peers made up.
    said: Arc<Mutex<HashSet<PeerLabels>>>,
    registry: Arc<Registry>,
}

/// A counter of time.
pub type Seconds = Counter<f64, AtomicU64>;

/// What one open connection counts in.
#[derive(Clone, Debug)]
pub struct Counters {
    /// At its end.
    pub closed: Counter,
    /// Bytes to the client.
    pub sent: Counter,
    /// Bytes from the client.
    pub received: Counter,
    sockets: Gauge,
}

impl Drop for Counters {
    fn drop(&mut self) {
        self.sockets.dec();
    }
}

impl Metrics {
    /// Registers everything.
    pub fn new(descriptors: &Descriptors) -> Self {
        let mut root = Registry::default();
        root.register(
            "ambit_shed_connections",
            "Connections that were reset because the process has too few descriptors for more",
            descriptors.shed.clone(),
        );
        let slowed = Seconds::default();
        root.register(
            "ambit_slowed_seconds",
            "Time that tunnels were told to wait, of clients that send more frames than are read of one",
            slowed.clone(),
        );
        let (pods, pods_started, pods_stopped) = (Gauge::default(), Counter::default(), Counter::default());
        root.register("workload_manager_active_proxy_count", "Pods that are served", pods.clone());
        root.register("workload_manager_proxies_started", "Pods whose serving began", pods_started.clone());
        root.register("workload_manager_proxies_stopped", "Pods whose serving ended", pods_stopped.clone());
        let (refused, unreadable, denying) = (Gauge::default(), Gauge::default(), Gauge::default());
        root.register(
            "ambit_refused_resources",
            "Workloads and services that are not valid: connections to their addresses are refused",
            refused.clone(),
        );
        root.register(
            "ambit_unreadable_resources",
            "Workloads and services that are not valid and whose addresses are not known: connections to them are \
             taken for connections to the outside",
            unreadable.clone(),
        );
        root.register(
            "ambit_refused_policies",
            "Policies that are not valid: connections to everything that they may select are denied",
            denying.clone(),
        );
        let policies = Policies::register(&mut root);
        let xds = xds::metrics::Metrics::register(&mut root);
        let certificates = Certificates::register(&mut root);
        let crl = revocation::Metrics::register(&mut root);
        root.register_collector(Box::new(Process));
        let istio = root.sub_registry_with_prefix("istio");
        let build = vec![("component", "ztunnel"), ("tag", env!("CARGO_PKG_VERSION"))];
        istio.register("build", "Version of this program", Info::new(build));
        let dns = dns::metrics::Metrics::register(istio);
        let tcp = istio.sub_registry_with_prefix("tcp");
        let traffic = |registry: &mut Registry, name: &str, help: &str| {
            let family = Family::<TrafficLabels, Counter>::default();
            registry.register(name, help, family.clone());
            family
        };
        let sockets = Family::default();
        tcp.register("sockets_open", "Connections that are open", sockets.clone());
        Self {
            opened: traffic(tcp, "connections_opened", "Connections whose destination was found"),
            closed: traffic(tcp, "connections_closed", "Connections that ended"),
            failed: traffic(tcp, "connections_failed", "Connections that failed, by response_flags"),
            sent: traffic(tcp, "sent_bytes", "Bytes sent to clients"),
            received: traffic(tcp, "received_bytes", "Bytes received from clients"),
            sockets,
            pods,
            pods_started,
            pods_stopped,
            slowed,
            refused,
            unreadable,
            denying,
            policies,
            xds,
            certificates,
            crl,
            dns,
            said: Arc::default(),
            registry: Arc::new(root),
        }
    }

    /// Counts a connection as opened and returns what it counts in from now on.
    pub fn open(&self, labels: &TrafficLabels) -> Counters {
        self.opened.get_or_create(labels).inc();
        let sockets =
            self.sockets.get_or_create_owned(&ReporterLabels { reporter: labels.reporter.reporter() });
        sockets.inc();
        Counters {
            closed: self.closed.get_or_create_owned(labels),
            sent: self.sent.get_or_create_owned(labels),
            received: self.received.get_or_create_owned(labels),
            sockets,
        }
    }

    /// Labels that a peer said of itself, if there is room for them; else only what it proved.
    pub fn said(&self, labels: PeerLabels) -> PeerLabels {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.contains(&labels) {
            return labels;
        }
        if said.len() < MAX_SAID {
            said.insert(labels.clone());
            return labels;
        }
        PeerLabels { namespace: labels.namespace, principal: labels.principal, ..Default::default() }
    }

    /// Counts a failure; `labels.response_flags` says of what.
    pub fn fail(&self, labels: &TrafficLabels) {
        self.failed.get_or_create(labels).inc();
    }

    /// Takes over how the mesh looks now; to be called before what is written is read.
    pub fn observe(&self, size: &Size) {
        for (gauge, count) in [
            (&self.refused, size.refused),
            (&self.unreadable, size.unreadable),
            (&self.denying, size.refused_authorizations),
        ] {
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// All families in `OpenMetrics` text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_labels_and_order_are_istios() {
        let metrics = Metrics::new(&Descriptors::without_limit());
        let labels = TrafficLabels {
            reporter: Direction::Outbound,
            source: PeerLabels {
                workload: Label::from(&Arc::from("web")),
                principal: Principal(Some("spiffe://td/ns/shop/sa/web".parse().unwrap())),
                ..Default::default()
            },
            destination: PeerLabels::default(),
            service: ServiceLabels::default(),
            response_flags: "-",
            security: Security::MutualTls,
        };
        let counters = metrics.open(&labels);
        counters.sent.inc_by(5);
        let text = metrics.encode();
        let line = text.lines().find(|line| line.starts_with("istio_tcp_connections_opened_total{")).unwrap();
        let names: Vec<&str> = line
            .split_once('{')
            .and_then(|(_, rest)| rest.split_once('}'))
            .map(|(labels, _)| {
                labels.split(',').filter_map(|label| label.split_once('=')).map(|(n, _)| n).collect()
            })
            .unwrap();
        assert_eq!(names.join(" "), LABELS);
        assert!(line.contains("reporter=\"source\"") && line.contains("source_workload=\"web\""), "{line}");
        assert!(line.contains("source_principal=\"spiffe://td/ns/shop/sa/web\""), "{line}");
        assert!(line.contains("destination_workload=\"unknown\"") && line.ends_with("} 1"), "{line}");
        assert!(line.contains("connection_security_policy=\"mutual_tls\""), "{line}");
        assert!(text.contains("istio_tcp_sockets_open{reporter=\"source\"} 1"), "{text}");
        drop(counters);
        assert!(metrics.encode().contains("istio_tcp_sockets_open{reporter=\"source\"} 0"));
        assert!(metrics.encode().contains("istio_build_info{component=\"ztunnel\",tag="));
        assert!(metrics.encode().contains("\nworkload_manager_active_proxy_count 0"));
    }

    #[test]
    fn what_peers_say_makes_no_endless_series() {
        let metrics = Metrics::new(&Descriptors::without_limit());
        let principal = Principal(Some("spiffe://td/ns/shop/sa/web".parse().unwrap()));
        let said = |i: usize| PeerLabels {
            workload: Label::from(Some(&format!("w{i}"))),
            namespace: Label::from(Some(&"shop".to_owned())),
            principal: principal.clone(),
            ..Default::default()
        };
        let kept: HashSet<PeerLabels> = (0..5000).map(|i| metrics.said(said(i))).collect();
        assert_eq!(kept.len(), MAX_SAID + 1, "and one for all others");
        assert_eq!(metrics.said(said(0)), said(0), "those that are known stay");
        let other = metrics.said(said(4999));
        assert_eq!((other.principal, other.workload), (principal.clone(), Label::default()));
    }

    const LABELS: &str = "reporter source_workload source_canonical_service source_canonical_revision \
        source_workload_namespace source_principal source_app source_version source_cluster \
        destination_service destination_service_namespace destination_service_name destination_workload \
        destination_canonical_service destination_canonical_revision destination_workload_namespace \
        destination_principal destination_app destination_version destination_cluster request_protocol \
        response_flags connection_security_policy source_region source_zone destination_region destination_zone";
}
