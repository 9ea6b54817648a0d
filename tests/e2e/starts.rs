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

/// An init container that serves on 9000, and asks `mesh/far` before it answers; it goes on beside the others.
fn sidecar(lab: &Lab, path: &str) -> anyhow::Result<Value> {
    let call = format!("--call=http://{}:{HTTP}/{path}", lab.pod("mesh/far").address()?);
    let mut sidecar = Workload::new("mesh", "sidecar")
        .command(&["ambit-example", "serve", "--listen=127.0.0.1:9000", "--name=sidecar", &call])
        .container_object();
    sidecar["name"] = json!("sidecar");
    sidecar["restartPolicy"] = json!("Always");
    sidecar["startupProbe"] =
        json!({ "exec": { "command": ["curl", "-s", "http://127.0.0.1:9000/healthz"] }, "periodSeconds": 1 });
    Ok(sidecar)
}

/// A container that asks the sidecar beside it, once.
fn asks_the_sidecar(name: &str) -> Value {
    let line = ["curl", "-sS", "--fail", "--max-time", "10", "http://127.0.0.1:9000/"];
    let mut container = Workload::new("mesh", name).command(&line).container_object();
    container["name"] = json!(name);
    container
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn init_containers_and_native_sidecars_are_in_the_mesh_from_their_first_packet() {
    scenario(|lab| {
        let inits = json!([
            asks(lab, "first", "first-words")?,
            sidecar(lab, "first-words-of-the-sidecar")?,
            asks_the_sidecar("second"),
        ]);
        tunnelled(lab, "first-words", || {
            let pod = Workload::new("mesh", "with-inits")
                .with("/spec/initContainers", inits)
                .on_node(1)
                .start(lab)?;
            // It would not have started without the others' answers.
            pod.captured()
        })?;
        let said = lab.pod("mesh/with-inits").container("second").logs()?;
        anyhow::ensure!(said.contains("\"service\":\"far\""), "the sidecar answered {said}");
        Ok(())
    });
}

/// As the pod of a Job has to: its sidecar ends when the rest has.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_whose_work_is_done_ends_its_sidecar_and_is_let_go() {
    scenario(|lab| {
        let before = captured_on(lab, 1)?;
        let pod = Workload::new("mesh", "with-sidecar-once")
            .with("/spec/initContainers", json!([sidecar(lab, "once")?]))
            .with("/spec/containers", json!([asks_the_sidecar("main")]))
            .with("/spec/restartPolicy", json!("Never"))
            .on_node(1)
            .create(lab)?;
        phase(lab, "mesh/with-sidecar-once", "Succeeded")?;
        let status = json!(pod.object()?.status);
        let ended = &status["initContainerStatuses"][0]["state"]["terminated"];
        anyhow::ensure!(ended["exitCode"] == 0, "its sidecar: {status}");
        anyhow::ensure!(pod.container("sidecar").live()?.pid(Some("sidecar")).is_none(), "it runs");
        eventually("the agent has let it go", PATIENCE, || {
            let now = captured_on(lab, 1)?;
            anyhow::ensure!(now == before, "{now} pods are captured, {before} were");
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
