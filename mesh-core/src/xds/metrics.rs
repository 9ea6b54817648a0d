//! What is counted of the talk with the agent; the first three as Istio's ztunnel names them.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::Rejected;
use crate::proto::discovery::DeltaDiscoveryResponse;

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Termination {
    /// `ConnectionError`, `Error` or `Complete`.
    pub reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeUrl {
    url: String,
}

/// All families; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    terminations: Family<Termination, Counter>,
    messages: Family<TypeUrl, Counter>,
    bytes: Counter,
    connected: Gauge,
    rejected: Family<TypeUrl, Counter>,
}

impl Metrics {
    /// Registers all families.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let istio = registry.sub_registry_with_prefix("istio");
        let terminations = metrics.terminations.clone();
        istio.register("xds_connection_terminations", "Streams of configuration that ended", terminations);
        istio.register("message_types", "Responses with configuration", metrics.messages.clone());
        istio.register("total_messages_size", "Bytes of resources received", metrics.bytes.clone());
        let own = registry.sub_registry_with_prefix("ambit_xds");
        own.register("connected", "Whether the node agent sends configuration", metrics.connected.clone());
        own.register("rejected_resources", "Resources refused and skipped", metrics.rejected.clone());
        metrics
    }

    pub(super) fn started(&self) {
        self.connected.set(1);
    }

    pub(super) fn ended(&self, reason: &'static str) {
        self.connected.set(0);
        self.terminations.get_or_create(&Termination { reason }).inc();
    }

    pub(super) fn received(&self, response: &DeltaDiscoveryResponse) {
        self.messages.get_or_create(&TypeUrl { url: response.type_url.clone() }).inc();
        let bodies = response.resources.iter().filter_map(|resource| resource.resource.as_ref());
        self.bytes.inc_by(bodies.map(|body| body.value.len() as u64).sum());
    }

    pub(super) fn rejected(&self, type_url: &str, rejected: &[Rejected]) {
        if !rejected.is_empty() {
            let counter = self.rejected.get_or_create_owned(&TypeUrl { url: type_url.to_owned() });
            counter.inc_by(rejected.len() as u64);
        }
    }
}
