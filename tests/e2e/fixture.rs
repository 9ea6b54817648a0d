//! The pods that most scenarios talk to, made once.
//!
//! `mesh`: in the mesh; `client` and `near` on node 1, `far` on node 2, `web` a Service over both servers, `echo` on
//! node 2. `plain`: outside; `client` on node 1, `server` on node 2.

use std::time::Duration;

use mesh_tests::lab::{PATIENCE, PodRef};
use mesh_tests::workload::{self, Workload};
use mesh_tests::{Lab, eventually};

/// The servers' HTTP port.
pub(crate) const HTTP: u16 = 8080;
pub(crate) const ECHO: u16 = 7000;
pub(crate) const HBONE: u16 = 15008;
/// For things that take a message or two.
pub(crate) const SOON: Duration = Duration::from_secs(15);

pub(crate) fn make(lab: &Lab) -> anyhow::Result<()> {
    lab.namespace("mesh", &[("istio.io/dataplane-mode", "ambient")])?;
    lab.namespace("plain", &[])?;
    for account in ["client", "web"] {
        workload::service_account(lab, "mesh", account)?;
    }
    Workload::new("mesh", "client").service_account("client").on_node(1).create(lab)?;
    for (name, node) in [("near", 1), ("far", 2)] {
        Workload::new("mesh", name)
            .serve()
            .label("app", "web")
            .service_account("web")
            .on_node(node)
            .create(lab)?;
    }
    Workload::new("mesh", "echo").echo().service_account("web").on_node(2).create(lab)?;
    Workload::new("plain", "client").on_node(1).create(lab)?;
    Workload::new("plain", "server").serve().on_node(2).create(lab)?;
    workload::service(lab, "mesh", "web", 80, HTTP)?;
    workload::service(lab, "mesh", "echo", ECHO, ECHO)?;
    for pod in ["mesh/client", "mesh/near", "mesh/far", "mesh/echo", "plain/client", "plain/server"] {
        lab.pod(pod).ready()?;
    }
    for pod in ["mesh/client", "mesh/near", "mesh/far", "mesh/echo"] {
        lab.pod(pod).captured()?;
    }
    // Readiness has to get around before anybody counts.
    for pod in ["mesh/client", "plain/client"] {
        eventually("both servers answer through their Service", PATIENCE, || {
            let answers: std::collections::BTreeSet<String> =
                (0..6).map(|_| service_of(&lab.pod(pod), "http://web.mesh/")).collect::<Result<_, _>>()?;
            anyhow::ensure!(answers.len() == 2, "only {answers:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// What a server of the fixture answers.
pub(crate) fn ask(pod: &PodRef<'_>, url: &str) -> anyhow::Result<serde_json::Value> {
    Ok(serde_json::from_str(&pod.curl(url)?)?)
}

/// Which server answered.
pub(crate) fn service_of(pod: &PodRef<'_>, url: &str) -> anyhow::Result<String> {
    Ok(ask(pod, url)?["service"].as_str().unwrap_or_default().to_owned())
}

/// Wait for a new line in the access log of a node's ztunnel that has all these texts.
pub(crate) fn log_line(lab: &Lab, node: u8, from: usize, texts: &[&str]) -> anyhow::Result<String> {
    eventually(&format!("the ztunnel of n{node} logs {texts:?}"), SOON, || {
        let log = lab.daemon("ztunnel", node).logs()?;
        let new = log.get(from..).unwrap_or_default();
        let found = new.lines().find(|line| texts.iter().all(|text| line.contains(text)));
        found.map(str::to_owned).ok_or_else(|| anyhow::anyhow!("new in the log:\n{new}"))
    })
}

/// Where the log of a node's ztunnel ends now.
pub(crate) fn log_end(lab: &Lab, node: u8) -> anyhow::Result<usize> {
    Ok(lab.daemon("ztunnel", node).logs()?.len())
}
