//! Parts of the mesh that die or are away: what goes on, what waits, what says why.

use std::time::Duration;

use mesh_tests::lab::{Background, PATIENCE};
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};
use nix::sys::signal::Signal;

use crate::fixture::{ECHO, SOON, ask, enrolled};
use crate::shared::scenario;

/// Connections and failures of `ambit-example dial`.
fn dialled(mut dial: Background) -> anyhow::Result<(u64, serde_json::Value)> {
    let output = dial.finish()?.ok("dial")?;
    let result: serde_json::Value = serde_json::from_str(output.trim())?;
    Ok((result["done"].as_u64().unwrap_or_default(), result["failed"].clone()))
}

fn echo(lab: &Lab) -> anyhow::Result<String> {
    Ok(format!("{}:{ECHO}", lab.pod("mesh/echo").address()?))
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_killed_ztunnel_refuses_no_connection() {
    scenario(|lab| {
        let client = lab.pod("mesh/client");
        for node in [1, 2] {
            let dial = client.spawn(["ambit-example", "dial", "--seconds", "6", &echo(lab)?])?;
            eventually("connections are being made", SOON, || lab.scrape(node, 15020, "/metrics").map(drop))?;
            lab.daemon("ztunnel", node).kill_and_wait()?;
            let (done, failed) = dialled(dial)?;
            assert!(done > 50, "only {done} connections came about, failures: {failed}");
            assert_eq!(failed["ConnectionRefused"], serde_json::Value::Null, "n{node}: {failed}");
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_killed_agent_leaves_traffic_alone_and_takes_the_sockets_back() {
    scenario(|lab| {
        let client = lab.pod("mesh/client");
        let mut held = client.spawn(["ambit-example", "hold", &echo(lab)?])?;
        held.wait_for("ok 3", SOON)?;
        let dial = client.spawn(["ambit-example", "dial", "--seconds", "8", &echo(lab)?])?;
        lab.daemon("node-agent", 1).kill_and_wait()?;
        lab.daemon("node-agent", 2).kill_and_wait()?;
        let (done, failed) = dialled(dial)?;
        assert_eq!(failed, serde_json::json!({}), "{done} connections came about");
        assert!(held.runs()?, "the open connection broke: {}", held.output());
        // The new agents hold the listeners: a ztunnel that dies now gets them from there.
        for node in [1, 2] {
            lab.daemon("ztunnel", node).kill_and_wait()?;
        }
        eventually("traffic goes on", PATIENCE, || ask(&client, "http://web/").map(drop))?;
        enrolled(&Workload::new("mesh", "after-the-agents").on_node(1).start(lab)?)
    });
}

/// Wait for an event about a pod that says all of this.
fn told(lab: &Lab, namespace: &str, texts: &[&str]) -> anyhow::Result<String> {
    eventually(&format!("an event says {texts:?}"), PATIENCE, || {
        let events = lab.cluster().events(namespace);
        let found = events.iter().find(|event| texts.iter().all(|text| event.contains(text)));
        found.cloned().ok_or_else(|| anyhow::anyhow!("events: {}", events.join("\n")))
    })
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_the_agent_no_pod_starts_unprotected() {
    scenario(|lab| {
        // Stopped, not killed: a killed one would be back at once.
        let agent = lab.daemon("node-agent", 1);
        let pid = agent.live()?.pid(None);
        agent.signal(Signal::SIGSTOP)?;
        let stopped = || -> anyhow::Result<()> {
            let waiting = Workload::new("mesh", "waits-for-agent").on_node(1).create(lab)?;
            told(lab, "mesh", &["waits-for-agent", "FailedCreatePodSandBox", "mesh-cni"])?;
            anyhow::ensure!(waiting.live()?.pid(None).is_none(), "its container runs");
            // Excluded namespaces do not need the mesh.
            Workload::new("kube-system", "needs-no-mesh").on_node(1).start(lab)?;
            Ok(())
        };
        let result = stopped();
        if agent.live()?.pid(None) == pid {
            agent.signal(Signal::SIGCONT)?;
        }
        result?;
        agent.ready()?;
        enrolled(lab.pod("mesh/waits-for-agent").ready()?)
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_the_api_server_no_pod_starts_unprotected() {
    scenario(|lab| {
        // The agents' watches have to miss the new pod, else they need nobody.
        let agent = "system:serviceaccount:ambit-system:node-agent";
        lab.api().set_watch_delay(None, Some(agent), Duration::from_secs(30));
        lab.api().set_available(false);
        let away = || -> anyhow::Result<()> {
            Workload::new("mesh", "waits-for-api").on_node(1).create(lab)?;
            let event = told(lab, "mesh", &["waits-for-api", "FailedCreatePodSandBox"])?;
            anyhow::ensure!(event.to_lowercase().contains("api server"), "it does not say why: {event}");
            Workload::new("kube-system", "needs-no-api").on_node(1).start(lab)?;
            // What runs goes on.
            ask(&lab.pod("mesh/client"), "http://web/").map(drop)
        };
        let result = away();
        lab.api().set_watch_delay(None, Some(agent), Duration::ZERO);
        lab.api().set_available(true);
        result?;
        enrolled(lab.pod("mesh/waits-for-api").ready()?)
    });
}
