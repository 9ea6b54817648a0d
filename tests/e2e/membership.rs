//! Who is in the mesh, from when to when, and what it says about those who are not.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context as _;
use mesh_tests::Lab;
use mesh_tests::capture::Packet;
use mesh_tests::eventually;
use mesh_tests::lab::{PATIENCE, PodRef, REDIRECTION};
use mesh_tests::workload::Workload;
use serde_json::{Value, json};

use crate::fixture::{self, ECHO, HBONE, HTTP, SOON, ask};
use crate::shared::scenario;

const MODE: &str = "istio.io/dataplane-mode";

/// Whether what a pod asks of `mesh/far` crosses the fabric as HBONE.
fn over_hbone(lab: &Lab, pod: &PodRef<'_>) -> anyhow::Result<bool> {
    let capture = lab.capture("membership")?;
    let url = format!("http://{}:{HTTP}/membership", lab.pod("mesh/far").address()?);
    ask(pod, &url)?;
    let captured = capture.stop()?;
    let clear = !captured.flows_with(b"/membership").is_empty();
    // Others' tunnels are none of its business.
    let address = pod.address()?;
    let tunnelled = |packet: &Packet<'_>| packet.destination.port() == HBONE && packet.source.ip() == address;
    let hbone = captured.count(|packet| tunnelled(packet) && !packet.payload.is_empty()) > 0;
    anyhow::ensure!(clear != hbone, "in the clear: {clear}, HBONE: {hbone}");
    Ok(hbone)
}

fn not_enrolled(pod: &PodRef<'_>) -> anyhow::Result<()> {
    let value = pod.annotation(REDIRECTION)?;
    anyhow::ensure!(value.is_none(), "{REDIRECTION} is {value:?}");
    Ok(())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_opts_out_and_in_again() {
    scenario(|lab| {
        let pod = Workload::new("mesh", "fickle").label(MODE, "none").on_node(1).start(lab)?;
        assert!(!over_hbone(lab, &pod)?);
        not_enrolled(&pod)?;
        lab.kubectl([
            "label",
            "--overwrite",
            "-n",
            "mesh",
            "pod",
            "fickle",
            "istio.io/dataplane-mode=ambient",
        ])?;
        pod.captured()?;
        assert!(over_hbone(lab, &pod)?);
        lab.kubectl(["label", "--overwrite", "-n", "mesh", "pod", "fickle", "istio.io/dataplane-mode=none"])?;
        eventually("the pod has left", PATIENCE, || not_enrolled(&pod))?;
        eventually("its traffic is plain again", PATIENCE, || {
            anyhow::ensure!(!over_hbone(lab, &pod)?, "still HBONE");
            Ok(())
        })
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn connections_from_before_live_on_when_a_pod_joins_and_leaves() {
    scenario(|lab| {
        lab.namespace("moving", &[])?;
        let client = Workload::new("moving", "client").on_node(1).start(lab)?;
        let server = Workload::new("moving", "echo").echo().on_node(2).start(lab)?;
        let address = format!("{}:{ECHO}", server.address()?);
        let goes_on = |held: &mut mesh_tests::lab::Background| -> anyhow::Result<()> {
            let rounds = held.output().lines().count();
            eventually("the open connection goes on", SOON, || {
                anyhow::ensure!(held.runs()?, "it ended: {}", held.output());
                anyhow::ensure!(
                    held.output().lines().count() > rounds + 5,
                    "no progress after round {rounds}"
                );
                Ok(())
            })
        };
        let mut before = client.spawn(["ambit-example", "hold", &address])?;
        before.wait_for("ok 3", SOON)?;
        lab.label_namespace("moving", "istio.io/dataplane-mode=ambient")?;
        client.captured()?;
        server.captured()?;
        goes_on(&mut before)?;
        let mut during = client.spawn(["ambit-example", "hold", &address])?;
        during.wait_for("ok 3", SOON)?;
        lab.kubectl(["label", "namespace", "moving", "istio.io/dataplane-mode-"])?;
        eventually("both have left", PATIENCE, || not_enrolled(&client).and(not_enrolled(&server)))?;
        goes_on(&mut before)?;
        eventually("a connection that the mesh carried has ended, and does not hang", SOON, || {
            anyhow::ensure!(!during.runs()?, "it goes on: {}", during.output());
            Ok(())
        })?;
        client.exec_ok(["ambit-example", "send", "--bytes", "100000", &address])?;
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_that_cannot_be_in_the_mesh_say_why() {
    scenario(|lab| {
        let sidecar = json!([
            { "name": "main", "image": "ambit/examples:latest", "command": ["ambit-example", "idle"] },
            { "name": "istio-proxy", "image": "ambit/examples:latest", "command": ["ambit-example", "idle"] },
        ]);
        let host = Workload::new("mesh", "on-host").with("/spec/hostNetwork", json!(true)).start(lab)?;
        let istio = Workload::new("mesh", "with-sidecar")
            .with("/spec/containers", sidecar)
            .with("/metadata/annotations", json!({ "sidecar.istio.io/status": "{}" }))
            .start(lab)?;
        for (pod, word) in [(host, "host"), (istio, "sidecar")] {
            eventually("the pod's status says why it is not in the mesh", PATIENCE, || {
                let status = pod.object()?.status.unwrap_or_default();
                let conditions = status.conditions.unwrap_or_default();
                let ours = conditions.iter().find(|condition| condition.type_.contains('/'));
                let text = format!("{ours:?}").to_lowercase();
                anyhow::ensure!(text.contains(word), "conditions: {}", json!(conditions));
                Ok(())
            })?;
            not_enrolled(&pod)?;
        }
        Ok(())
    });
}

/// The workloads that the ztunnel of node 1 has at an address.
pub(crate) fn known_at(lab: &Lab, address: IpAddr) -> anyhow::Result<Vec<String>> {
    let dump: Value = serde_json::from_str(&lab.scrape(1, 15000, "/config_dump")?)?;
    let workloads = dump["workloads"].as_array().context("no workloads in the dump")?;
    let at = |one: &&Value| one["addresses"].as_array().is_some_and(|all| all.contains(&json!(address)));
    Ok(workloads.iter().filter(at).map(|one| one["uid"].as_str().unwrap_or_default().to_owned()).collect())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_finished_pod_leaves_the_model_and_its_address_serves_another() {
    scenario(|lab| {
        let address = IpAddr::from([10, 244, 2, 250]);
        let job = Workload::new("mesh", "job")
            .command(&["sleep", "1"])
            .on_node(2)
            .at(address)
            .with("/spec/restartPolicy", json!("Never"))
            .create(lab)?;
        eventually("ztunnel knows the job", SOON, || {
            let known = known_at(lab, address)?;
            anyhow::ensure!(known.len() == 1 && known[0].ends_with("Pod/mesh/job"), "{known:?}");
            Ok(())
        })?;
        let done = || -> anyhow::Result<()> {
            let status = job.object()?.status.unwrap_or_default();
            anyhow::ensure!(status.phase.as_deref() == Some("Succeeded"), "it is {:?}", status.phase);
            // What makes it a trap: the object still says that the address is the job's.
            let stale = status.pod_ip.unwrap_or_default();
            anyhow::ensure!(stale == address.to_string(), "its address is {stale}");
            Ok(())
        };
        eventually("the job is done", PATIENCE, done)?;
        eventually("ztunnel has forgotten it", SOON, || {
            let known = known_at(lab, address)?;
            anyhow::ensure!(known.is_empty(), "{known:?}");
            Ok(())
        })?;
        let heir = Workload::new("mesh", "heir").serve().service_account("web").on_node(2).at(address);
        let heir = heir.start(lab)?;
        heir.captured()?;
        done()?;
        assert_eq!(heir.address()?, address);
        let known = known_at(lab, address)?;
        assert!(known.len() == 1 && known[0].ends_with("Pod/mesh/heir"), "{known:?}");
        let client = lab.pod("mesh/client");
        assert_eq!(fixture::service_of(&client, &format!("http://{address}:{HTTP}/"))?, "heir");
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_new_pod_is_in_the_mesh_though_the_agents_hear_of_it_late() {
    scenario(|lab| {
        let agent = "system:serviceaccount:ambit-system:node-agent";
        let delay = Duration::from_secs(20);
        lab.api().set_watch_delay(None, Some(agent), delay);
        let late = || -> anyhow::Result<()> {
            let began = std::time::Instant::now();
            let pod = Workload::new("mesh", "early").on_node(1).start(lab)?;
            let address = pod.address()?;
            let hbone = over_hbone(lab, &pod)?;
            anyhow::ensure!(hbone, "the new pod {address} spoke in the clear");
            let took = began.elapsed();
            anyhow::ensure!(took < delay, "too late to say anything: {took:?}");
            Ok(())
        };
        let result = late();
        lab.api().set_watch_delay(None, Some(agent), Duration::ZERO);
        result
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_removed_server_is_no_longer_reached() {
    scenario(|lab| {
        let server = Workload::new("mesh", "doomed").echo().on_node(2).start(lab)?;
        server.captured()?;
        let client = lab.pod("mesh/client");
        let address = format!("{}:{ECHO}", server.address()?);
        let mut held = client.spawn(["ambit-example", "hold", &address])?;
        held.wait_for("ok 3", SOON)?;
        lab.kubectl(["delete", "-n", "mesh", "pod", "doomed", "--wait"])?;
        eventually("the open connection breaks", SOON, || {
            anyhow::ensure!(!held.runs()?, "it still runs");
            Ok(())
        })?;
        let output = client.exec(["timeout", "15", "ambit-example", "send", "--bytes", "10", &address])?;
        assert!(!output.success(), "somebody answered for the removed pod: {}", output.stdout);
        fixture::ask(&client, "http://web/").map(drop)
    });
}
