//! The agent's own metrics, read from the parts when they are scraped.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::datapath::Part;
use crate::drops;
use crate::enrol;
use crate::older;
use crate::pods::Pods;
use crate::xds::server::Feed;

type Parts = Family<Vec<(&'static str, &'static str)>, Gauge>;
type Repairs = Family<Vec<(&'static str, &'static str)>, Counter>;

/// Where the numbers come from.
#[derive(Debug)]
pub struct Sources {
    /// Delta xDS.
    pub feed: Feed,
    /// ztunnel.
    pub pods: Pods,
    /// Enrolment.
    pub enrolment: enrol::Counts,
    /// The eBPF programs.
    pub datapath: drops::Counts,
    /// Policy, where the proxy cannot ask it.
    pub older: older::Resets,
}

impl Sources {
    /// All metrics in the Prometheus text format.
    pub fn text(&self) -> String {
        let mut registry = Registry::with_prefix("ambit_agent");
        let mut set = |name: &str, help: &str, value: u64| {
            let gauge = Gauge::<i64>::default();
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            registry.register(name, help, gauge);
        };
        let (enrolled, failing, disturbed) = self.enrolment.read();
        let (served, ztunnels) = self.pods.counts();
        let xds = self.feed.counts();
        set("pods_enrolled", "Pods of this node whose traffic is captured", enrolled as u64);
        set("pods_failing", "Pods of this node whose last step of enrolment failed", failing as u64);
        set(
            "pods_with_foreign_programs",
            "Pods of this node whose connections meet eBPF programs of others, as their status tells",
            disturbed as u64,
        );
        let captures = self.enrolment.captures();
        set("pods_captured", "Pods of this node whose capture was found whole", captures.whole as u64);
        set("pods_served", "Pods that ztunnel was told to serve", served as u64);
        set("ztunnels_connected", "ztunnels connected to the pod socket", ztunnels as u64);
        set("xds_clients", "Proxies connected to the xDS socket", xds.clients as u64);
        set("xds_nacks", "xDS responses that a proxy refused since the agent's start", xds.nacks);
        set(
            "older_connections_reset",
            "Connections older than their pod's enrolment that were reset because policy denies them",
            self.older.read(),
        );
        let datapath = Family::<Vec<(&'static str, &'static str)>, Gauge>::default();
        for (counter, count) in self.datapath.read() {
            let gauge = datapath.get_or_create_owned(&vec![("event", counter.name())]);
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        registry.register(
            "datapath_events",
            "What the eBPF programs counted since they were first loaded",
            datapath,
        );
        let (flawed, repairs) = (Parts::default(), Repairs::default());
        for part in Part::ALL {
            let label = vec![("part", part.name())];
            let count = captures.flawed.get(&part).copied().unwrap_or_default();
            flawed.get_or_create_owned(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
            if part.repairable() {
                let count = captures.repairs.get(&part).copied().unwrap_or_default();
                repairs.get_or_create_owned(&label).inc_by(count);
            }
        }
        let help = "Pods of this node of whose capture this part was not as it has to be";
        registry.register("pods_not_captured", help, flawed);
        let help = "Parts of pods' capture that were put back since the agent's start";
        registry.register("capture_repairs", help, repairs);
        let resources = Family::<Vec<(&'static str, &'static str)>, Gauge>::default();
        for (kind, count) in [("address", xds.addresses), ("authorization", xds.authorizations)] {
            let gauge = resources.get_or_create_owned(&vec![("type", kind)]);
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        registry.register("xds_resources", "Resources served, by type", resources);
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &registry);
        text
    }
}
