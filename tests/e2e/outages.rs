//! Parts of the mesh that die or are away: what goes on, what waits, what says why.

use std::time::Duration;

use mesh_tests::crash::{Blow, Stage};
use mesh_tests::lab::PATIENCE;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};
use nix::sys::signal::Signal;

use crate::fixture::{ECHO, SOON, ask};
use crate::shared::scenario;

fn echo(lab: &Lab) -> anyhow::Result<String> {
    Ok(format!("{}:{ECHO}", lab.pod("mesh/echo").address()?))
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn killed_parts_refuse_no_connection_and_are_back_by_themselves() {
    scenario(|lab| {
        let stage = Stage::set(lab, "crash")?;
        for (blow, node) in [
            (Blow::Ztunnel, 1),
            (Blow::Ztunnel, 2),
            (Blow::AgentThenZtunnel, 1),
            (Blow::Both, 1),
            (Blow::Both, 2),
        ] {
            let toll = stage.suffer(blow, node)?;
            assert!(toll.keeps_the_door_open(), "{blow:?} on n{node}: {toll}");
        }
        for node in [1, 2] {
            let toll = stage.suffer(Blow::Agent, node)?;
            assert!(toll.is_nothing(), "the agent of n{node} was missed: {toll}");
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_killed_agent_takes_the_sockets_back() {
    scenario(|lab| {
        let client = lab.pod("mesh/client");
        let mut held = client.spawn(["ambit-example", "hold", &echo(lab)?])?;
        held.wait_for("ok 3", SOON)?;
        lab.daemon("node-agent", 1).kill_and_wait()?;
        lab.daemon("node-agent", 2).kill_and_wait()?;
        assert!(held.runs()?, "the open connection broke: {}", held.output());
        // The new agents hold the listeners: a ztunnel that dies now gets them from there.
        for node in [1, 2] {
            lab.daemon("ztunnel", node).kill_and_wait()?;
        }
        eventually("traffic goes on", PATIENCE, || ask(&client, "http://web/").map(drop))?;
        Workload::new("mesh", "after-the-agents").on_node(1).start(lab)?.captured()
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
        lab.pod("mesh/waits-for-agent").ready()?.captured()
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
        lab.pod("mesh/waits-for-api").ready()?.captured()
    });
}
