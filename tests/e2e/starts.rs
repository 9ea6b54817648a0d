//! Pods of every kind of start: what they say first is in the mesh, and what they leave is nothing.

use mesh_tests::lab::PATIENCE;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, crowd, eventually};
use serde_json::{Value, json};

use crate::fixture::{HBONE, HTTP};
use crate::shared::scenario;

/// A container that asks `mesh/far` for a path, once, and fails when it gets no answer.
fn asks(lab: &Lab, name: &str, path: &str) -> anyhow::Result<Value> {
    let url = format!("http://{}:{HTTP}/{path}", lab.pod("mesh/far").address()?);
    let mut container = Workload::new("mesh", name)
        .command(&["curl", "-sS", "--fail", "--max-time", "10", &url])
        .container_object();
    container["name"] = json!(name);
    Ok(container)
}

/// Nothing that was asked meanwhile crosses the fabric in the clear, and something does as HBONE.
fn tunnelled(lab: &Lab, marker: &str, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let capture = lab.capture(marker)?;
    work()?;
    let captured = capture.stop()?;
    let clear = captured.flows_with(marker.as_bytes());
    anyhow::ensure!(clear.is_empty(), "in the clear: {clear:?}");
    let hbone = captured.count(|packet| packet.has_port(HBONE) && !packet.payload.is_empty());
    anyhow::ensure!(hbone > 0, "nothing was tunnelled");
    Ok(())
}

/// Pods that a node's agent has captured.
fn captured_on(lab: &Lab, node: u8) -> anyhow::Result<u64> {
    let metrics = lab.scrape(node, 15014, "/metrics")?;
    let line = metrics.lines().find_map(|line| line.strip_prefix("ambit_agent_pods_enrolled "));
    line.and_then(|number| number.parse().ok()).ok_or_else(|| anyhow::anyhow!("no number in {metrics}"))
}

fn phase(lab: &Lab, pod: &str, expect: &str) -> anyhow::Result<()> {
    eventually(&format!("{pod} is {expect}"), PATIENCE, || {
        let phase = lab.pod(pod).object()?.status.and_then(|status| status.phase);
        anyhow::ensure!(phase.as_deref() == Some(expect), "it is {phase:?}");
        Ok(())
    })
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_of_one_second_are_in_the_mesh_and_then_gone_from_it() {
    scenario(|lab| {
        let before = captured_on(lab, 1)?;
        tunnelled(lab, "one-second", || {
            for number in 1..=5 {
                Workload::new("mesh", &format!("brief{number}"))
                    .with("/spec/containers", json!([asks(lab, "main", "one-second")?]))
                    .with("/spec/restartPolicy", json!("Never"))
                    .on_node(1)
                    .create(lab)?;
            }
            (1..=5).try_for_each(|number| phase(lab, &format!("mesh/brief{number}"), "Succeeded"))
        })?;
        eventually("the agent has let them go", PATIENCE, || {
            let now = captured_on(lab, 1)?;
            anyhow::ensure!(now == before, "{now} pods are captured, {before} were");
            Ok(())
        })
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn init_containers_and_native_sidecars_are_in_the_mesh_from_their_first_packet() {
    scenario(|lab| {
        let mut sidecar = asks(lab, "sidecar", "first-words-of-the-sidecar")?;
        sidecar["restartPolicy"] = json!("Always");
        let inits = json!([asks(lab, "first", "first-words")?, sidecar]);
        tunnelled(lab, "first-words", || {
            let pod = Workload::new("mesh", "with-inits")
                .with("/spec/initContainers", inits)
                .on_node(1)
                .start(lab)?;
            pod.captured()
        })?;
        eventually("the sidecar has had its answer", PATIENCE, || {
            let log = lab.pod("mesh/with-inits").container("sidecar").logs()?;
            anyhow::ensure!(log.contains("far"), "its log: {log}");
            Ok(())
        })
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_hundred_pods_at_once_are_in_the_mesh_and_leave_nothing() {
    scenario(|lab| {
        lab.namespace("crowd", &[("istio.io/dataplane-mode", "ambient")])?;
        let before = [captured_on(lab, 1)?, captured_on(lab, 2)?];
        let outcome = crowd::start(lab, "crowd", "pod", 100)?;
        eprintln!("{outcome:?}");
        let during = [captured_on(lab, 1)?, captured_on(lab, 2)?];
        assert_eq!(during, before.map(|count| count + 50));
        tunnelled(lab, "of-a-crowd", || {
            let url = format!("http://{}:{HTTP}/of-a-crowd", lab.pod("mesh/far").address()?);
            lab.pod("crowd/pod-100").curl(&url).map(drop)
        })?;
        lab.kubectl(["delete", "namespace", "crowd", "--wait=false"])?;
        eventually("the agents have let them go", PATIENCE * 2, || {
            let now = [captured_on(lab, 1)?, captured_on(lab, 2)?];
            anyhow::ensure!(now == before, "{now:?} pods are captured, {before:?} were");
            Ok(())
        })
    });
}
