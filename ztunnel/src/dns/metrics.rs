//! What is counted of queries, with the names and labels of Istio's ztunnel.

use std::time::Duration;

use mesh_core::workload::Workload;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::message::Transport;
use crate::metrics::Label;

/// The labels of every family.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Labels {
    request_query_type: &'static str,
    request_protocol: &'static str,
    source_canonical_service: Label,
    source_canonical_revision: Label,
}

impl Labels {
    /// Of a query of that type, if it has one.
    pub fn new(kind: Option<u16>, transport: Transport, source: &Workload) -> Self {
        Self {
            request_query_type: kind.map_or("UNKNOWN", name),
            request_protocol: transport.label(),
            source_canonical_service: Label::from(&source.canonical_name),
            source_canonical_revision: Label::from(&source.canonical_revision),
        }
    }
}

/// A type's name; those that are seldom asked for have one together, since clients may ask for any of 65,536.
fn name(kind: u16) -> &'static str {
    match kind {
        1 => "A",
        2 => "NS",
        5 => "CNAME",
        6 => "SOA",
        12 => "PTR",
        15 => "MX",
        16 => "TXT",
        28 => "AAAA",
        33 => "SRV",
        64 => "SVCB",
        65 => "HTTPS",
        255 => "ANY",
        _ => "OTHER",
    }
}

/// The families. Clones count in the same ones.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Queries.
    pub requests: Family<Labels, Counter>,
    upstream_requests: Family<Labels, Counter>,
    upstream_failures: Family<Labels, Counter>,
    upstream_duration: Family<Labels, Histogram, fn() -> Histogram>,
}

impl Metrics {
    /// Registers the families in the registry of the prefix `istio`.
    pub fn register(istio: &mut Registry) -> Self {
        let dns = istio.sub_registry_with_prefix("dns");
        let counters = |registry: &mut Registry, name: &str, help: &str| {
            let family = Family::<Labels, Counter>::default();
            registry.register(name, help, family.clone());
            family
        };
        let requests = counters(dns, "requests", "DNS queries of pods");
        let upstream_requests = counters(dns, "upstream_requests", "Those that were forwarded");
        let upstream_failures =
            counters(dns, "upstream_failures", "Those of them that the server did not answer");
        let histogram: fn() -> Histogram = || Histogram::new([0.0005, 0.001, 0.01, 0.1, 1.0, 5.0]);
        let upstream_duration = Family::new_with_constructor(histogram);
        let help = "How long the server took for its answers";
        dns.register("upstream_request_duration_seconds", help, upstream_duration.clone());
        Self { requests, upstream_requests, upstream_failures, upstream_duration }
    }

    /// Counts a query that was forwarded: how long the server took, none if there was no answer.
    pub fn forwarded(&self, labels: &Labels, took: Option<Duration>) {
        self.upstream_requests.get_or_create(labels).inc();
        match took {
            Some(took) => self.upstream_duration.get_or_create(labels).observe(took.as_secs_f64()),
            None => drop(self.upstream_failures.get_or_create(labels).inc()),
        }
    }
}
