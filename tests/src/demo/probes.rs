//! Claim: the kubelet's probes reach the application directly, and tell the truth.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::Context as _;
use serde_json::json;

use super::{Scene, strict};
use crate::eventually;
use crate::lab::PATIENCE;
use crate::workload::Workload;

/// How many probes have to be answered.
const ENOUGH: usize = 3;

/// A new pod of the mesh sees its probes come from an address of the node, which no proxy's line is about; and one that
/// nobody listens in is found out by a TCP probe. All of it while nobody else gets in without mutual TLS.
pub(super) fn direct(scene: &Scene<'_>) -> anyhow::Result<String> {
    strict::under_it(scene, &scene.marker(13), |refusal| {
        let probes = probed(scene)?;
        Ok(format!("{probes}\nunder STRICT: of payments from outside the mesh, {refusal}"))
    })
}

fn probed(scene: &Scene<'_>) -> anyhow::Result<String> {
    let from = scene.access_log(1)?.len();
    let honest = Workload::new("payments", "probed")
        .serve()
        .readiness(json!({ "httpGet": { "path": "/probed", "port": "http" }, "periodSeconds": 1 }))
        .on_node(1)
        .start(scene.lab)?;
    let deaf = Workload::new("payments", "deaf")
        .liveness(json!({ "tcpSocket": { "port": 9 }, "periodSeconds": 1, "failureThreshold": 1 }))
        .on_node(1)
        .create(scene.lab)?;
    let sources = eventually("probes are answered", PATIENCE, || {
        let log = honest.logs()?;
        let sources: BTreeSet<String> = log
            .lines()
            .filter_map(|line| line.strip_prefix("GET /probed from "))
            .map(str::to_owned)
            .collect();
        anyhow::ensure!(sources.len() >= ENOUGH, "{sources:?}");
        Ok(sources)
    })?;
    let node = scene.lab.node(1).interface_addresses()?;
    let mut seen = BTreeSet::new();
    for source in &sources {
        let source: SocketAddr = source.parse().context("the source of a probe")?;
        anyhow::ensure!(node.contains(&source.ip()), "a probe came from {source}; the node has {node:?}");
        seen.insert(source.ip());
    }
    eventually("a TCP probe of a closed port fails", PATIENCE, || {
        let restarts = deaf.live()?.restarts(None);
        anyhow::ensure!(restarts > 0, "the container was not restarted");
        Ok(())
    })?;
    // The payment's line comes after those that there would be of the probes.
    let (address, marker) = (honest.address()?.to_string(), format!("{}:8080", honest.address()?));
    let client = scene.gateway();
    client.curl(&format!("http://{marker}/"))?;
    let other = client.address()?.to_string();
    let log = eventually("the proxy tells of a connection that is no probe", PATIENCE, || {
        let log = scene.access_log(1)?.get(from..).unwrap_or_default().to_owned();
        let told = log.lines().any(|line| line.contains(&address) && line.contains(&format!("{other}:")));
        anyhow::ensure!(told, "not yet");
        Ok(log)
    })?;
    let carried = log
        .lines()
        .find(|line| line.contains(&address) && node.iter().any(|ip| line.contains(&format!("{ip}:"))));
    anyhow::ensure!(carried.is_none(), "the proxy carried a probe: {carried:?}");
    Ok(format!(
        "{} probes of {address}, all from {seen:?}, an address of the node; lines of the proxy about them: 0; \
         a TCP probe of a closed port fails, so its container is restarted",
        sources.len()
    ))
}
