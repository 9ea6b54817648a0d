//! A client pod on the first node and its servers on the second or beside it, in the mesh or not.

use anyhow::Context as _;
use serde_json::{Value, json};

use super::machine;
use crate::lab::{Lab, PATIENCE, PodRef};
use crate::workload::Workload;
use crate::{eventually, workload};

/// Port of the iperf3 server.
const IPERF: u16 = 5201;

/// See the module.
pub(super) struct Pair<'a> {
    pub(super) client: PodRef<'a>,
    /// `address:port` of the echo service's endpoint.
    pub(super) echo: String,
    /// The same endpoint at a port that nobody listens on.
    closed: String,
    bulk: PodRef<'a>,
}

/// What one round measures of one pair.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) gigabits: f64,
    pub(super) cpu_per_gigabyte: f64,
    pub(super) connect_p50: f64,
    pub(super) connect_p99: f64,
    pub(super) first_byte_p50: f64,
    pub(super) first_byte_p99: f64,
    pub(super) refused_p50: f64,
    pub(super) refused_p99: f64,
}

impl<'a> Pair<'a> {
    /// Creates namespace `name` with the pods; in the mesh they are waited for until peers are told to tunnel to them.
    pub(super) fn start(lab: &'a Lab, name: &str, mesh: bool, server_node: u8) -> anyhow::Result<Self> {
        let mode: &[(&str, &str)] = if mesh { &[("istio.io/dataplane-mode", "ambient")] } else { &[] };
        lab.namespace(name, mode)?;
        let client = Workload::new(name, "client").on_node(1).start(lab)?;
        let echo = Workload::new(name, "echo").echo().on_node(server_node).start(lab)?;
        let bulk = Workload::new(name, "bulk")
            .command(&["iperf3", "--server"])
            .port("iperf3", IPERF)
            .readiness(json!({ "exec": { "command": ["true"] }, "periodSeconds": 1 }))
            .on_node(server_node)
            .start(lab)?;
        workload::service(lab, name, "echo", 7000, 7000)?;
        let address = echo.address()?;
        let pair = Self { echo: format!("{address}:7000"), closed: format!("{address}:9"), client, bulk };
        if mesh {
            // On one node the proxy hands connections over, without a tunnel.
            pair.wait_for(lab, server_node, if server_node == 1 { "none" } else { "mutual_tls" })?;
        }
        Ok(pair)
    }

    /// Until the server's own proxy counts a connection of the pair as secured in this way.
    fn wait_for(&self, lab: &Lab, server_node: u8, security: &str) -> anyhow::Result<()> {
        let security = format!("connection_security_policy=\"{security}\"");
        eventually("the pair is connected as it will be measured", PATIENCE, || {
            self.client.exec_ok(["ambit-example", "latency", &self.echo, "--count=1"])?;
            let metrics = lab.scrape(server_node, 15020, "/metrics")?;
            let so = metrics.lines().any(|line| {
                line.starts_with("istio_tcp_connections_opened_total")
                    && line.contains("reporter=\"destination\"")
                    && line.contains("destination_workload=\"echo\"")
                    && line.contains(&security)
            });
            anyhow::ensure!(so, "none is counted with {security}");
            Ok(())
        })
    }

    /// One measurement of everything.
    pub(super) fn measure(&self, seconds: u32, connections: usize) -> anyhow::Result<Sample> {
        let (gigabits, cpu_per_gigabyte) = self.throughput(seconds)?;
        let count = format!("--count={}", connections.max(1));
        let latency = self.client.exec_ok(["ambit-example", "latency", &self.echo, &count])?;
        let latency: Value = serde_json::from_str(&latency).context("read the latencies")?;
        let refused = self.client.exec_ok(["ambit-example", "refused", &self.closed, &count])?;
        let refused: Value = serde_json::from_str(&refused).context("read the latencies of refusals")?;
        let time = |which: &str, percentile: &str| {
            let found = latency[which][percentile].as_f64().or(refused[which][percentile].as_f64());
            found.with_context(|| format!("no {which} {percentile}"))
        };
        Ok(Sample {
            gigabits,
            cpu_per_gigabyte,
            connect_p50: time("connect", "p50")?,
            connect_p99: time("connect", "p99")?,
            first_byte_p50: time("first_byte", "p50")?,
            first_byte_p99: time("first_byte", "p99")?,
            refused_p50: time("refused", "p50")?,
            refused_p99: time("refused", "p99")?,
        })
    }

    /// Gbit/s that arrived, and the machine's busy seconds for each GB of them.
    fn throughput(&self, seconds: u32) -> anyhow::Result<(f64, f64)> {
        let (server, time) = (self.bulk.address()?.to_string(), seconds.to_string());
        let port = IPERF.to_string();
        let busy = machine::busy_seconds()?;
        let report = self
            .client
            .exec_ok(["iperf3", "--client", &server, "--port", &port, "--time", &time, "--json"])?;
        let busy = machine::busy_seconds()? - busy;
        let report: Value = serde_json::from_str(&report).context("read iperf3's report")?;
        let received = &report["end"]["sum_received"];
        let number = |name: &str| {
            received[name]
                .as_f64()
                .with_context(|| format!("iperf3 does not tell {name}: {}", report["error"]))
        };
        Ok((number("bits_per_second")? / 1e9, busy / (number("bytes")? / 1e9)))
    }
}
