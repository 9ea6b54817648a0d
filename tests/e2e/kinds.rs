//! Pods of less common kinds: with users of their own, with a second network, of a Job.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, ensure};
use mesh_tests::capture::Packet;
use mesh_tests::lab::{Lab, PATIENCE, PodRef, REDIRECTION};
use mesh_tests::workload::Workload;
use mesh_tests::{eventually, fabric, shell};
use serde_json::{Value, json};

use crate::fixture::{ECHO, HBONE, HTTP, SOON, ask, log_end, log_line};
use crate::membership::known_at;
use crate::shared::scenario;

const AMBIENT: &str = "istio.io/dataplane-mode=ambient";

/// A server on node 2 whose root is nobody on the host, and may change the network that is its own.
fn with_own_users(name: &str) -> Workload {
    Workload::new("own-users", name)
        .serve()
        .with("/spec/hostUsers", json!(false))
        .with("/spec/containers/0/securityContext", json!({ "capabilities": { "add": ["NET_ADMIN"] } }))
        .on_node(2)
}

/// To the pod and from it, over either family: carried by the mesh, each with the client's own address.
fn is_carried(lab: &Lab, pod: &PodRef<'_>) -> anyhow::Result<()> {
    let (client, near) = (lab.pod("mesh/client"), lab.pod("mesh/near"));
    for (own, (source, other)) in
        pod.addresses()?.into_iter().zip(client.addresses()?.into_iter().zip(near.addresses()?))
    {
        let capture = lab.capture("kinds")?;
        let to = ask(&client, &format!("http://{}/to-it", SocketAddr::new(own, HTTP)))?;
        let from = ask(pod, &format!("http://{}/from-it", SocketAddr::new(other, HTTP)))?;
        let captured = capture.stop()?;
        ensure!(to["client"] == json!(source) && from["client"] == json!(own), "{to} {from}");
        for path in [&b"/to-it"[..], b"/from-it"] {
            let clear = captured.flows_with(path);
            ensure!(clear.is_empty(), "in the clear: {clear:?}");
        }
        for end in [own, source] {
            let tunnelled = |packet: &Packet<'_>| {
                packet.source.ip() == end && packet.destination.port() == HBONE && !packet.payload.is_empty()
            };
            ensure!(captured.count(tunnelled) > 0, "nothing of {end} was tunnelled");
        }
    }
    Ok(())
}

/// Its network namespace belongs to its users: to the host's programs it is a stranger's.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_with_users_of_their_own_join_leave_and_are_born_in_the_mesh() {
    scenario(|lab| {
        lab.namespace("own-users", &[])?;
        let running = with_own_users("running").start(lab)?;
        let map = running.exec_ok(["cat", "/proc/self/uid_map"])?;
        let ids: Vec<u32> = map.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        ensure!(ids.len() == 3 && ids[0] == 0 && ids[1] >= 65_536, "its users are {map}");
        // With CAP_NET_ADMIN among its own users only.
        running.exec_ok(["ip", "link", "set", "eth0", "mtu", "1400"])?;

        lab.label_namespace("own-users", AMBIENT)?;
        running.captured()?;
        is_carried(lab, &running)?;
        let born = with_own_users("born").start(lab)?;
        born.captured()?;
        is_carried(lab, &born)?;

        lab.kubectl(["label", "namespace", "own-users", "istio.io/dataplane-mode-"])?;
        for pod in [&running, &born] {
            eventually("it has left", PATIENCE, || {
                let said = pod.annotation(REDIRECTION)?;
                ensure!(said.is_none(), "{REDIRECTION} is {said:?}");
                let rules = pod.exec_from_node(["ip", "rule", "list"])?.ok("ip")?;
                ensure!(!rules.contains("100:"), "{rules}");
                Ok(())
            })?;
            ask(pod, &format!("http://{}:{HTTP}/", lab.pod("mesh/near").address()?))?;
        }
        lab.kubectl(["delete", "namespace", "own-users"]).map(drop)
    });
}

/// A pod's IPv4 address in the second network.
fn second_address(pod: &PodRef<'_>) -> anyhow::Result<IpAddr> {
    let text = pod.exec_from_node(["ip", "-j", "-4", "addr", "show", "dev", "net1"])?.ok("ip")?;
    let links: Value = serde_json::from_str(&text)?;
    let address = links[0]["addr_info"][0]["local"].as_str().context("no address on net1")?;
    Ok(address.parse()?)
}

/// Bytes to an echo server and back, by a process of the node in the pod's network, whose connections nobody captures:
/// what the guard lets out of any socket that missed the hook.
fn stray(pod: &PodRef<'_>, to: SocketAddr) -> anyhow::Result<shell::Output> {
    pod.exec_from_node(["timeout", "3", "ambit-example", "send", "--bytes=100", &to.to_string()])
}

/// Mesh-cni is asked before the second network is attached, and never about it.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_goes_by_a_second_network_is_captured_and_guarded_too() {
    scenario(|lab| {
        lab.namespace("homes", &[])?;
        let home = |name: &str, namespace: &str, node: u8| {
            Workload::new(namespace, name).echo().second_network().on_node(node).start(lab)
        };
        let server = home("homes-server", "plain", 2)?;
        let there = SocketAddr::new(second_address(&server)?, ECHO);
        let running = home("running", "homes", 1)?;
        // Without the mesh all of it works: by net1 it goes out, and comes in.
        stray(&running, there)?.ok("by net1")?;
        let back = SocketAddr::new(second_address(&running)?, ECHO);
        server.exec_ok(["ambit-example", "send", "--bytes=100", &back.to_string()])?;

        lab.label_namespace("homes", AMBIENT)?;
        running.captured()?;
        is_guarded(lab, &running, &server, there)?;
        let born = home("born", "homes", 1)?;
        born.captured()?;
        is_guarded(lab, &born, &server, there)?;
        lab.kubectl(["delete", "pod", "-n", "plain", "homes-server"])?;
        lab.kubectl(["delete", "namespace", "homes"]).map(drop)
    });
}

fn is_guarded(lab: &Lab, pod: &PodRef<'_>, server: &PodRef<'_>, there: SocketAddr) -> anyhow::Result<()> {
    // An interface that came after enrolment is found within a second or two.
    eventually("what was not captured stays in", SOON, || {
        let output = stray(pod, there)?;
        ensure!(!output.success(), "out by net1: {}", output.stdout);
        Ok(())
    })?;
    let end = log_end(lab, 1)?;
    pod.exec_ok(["ambit-example", "send", "--bytes=100000", &there.to_string()])?;
    log_line(lab, 1, end, &["outbound", &there.to_string()])?;
    let echoed = pod.exec_ok(["ambit-example", "datagram", &there.to_string(), "hello"])?;
    ensure!(echoed.trim() == "hello", "UDP is left alone, but {echoed}");
    // Kubernetes does not name this address of the pod, so nobody is behind it.
    let own = SocketAddr::new(second_address(pod)?, ECHO).to_string();
    let reached = server.exec(["timeout", "3", "ambit-example", "send", "--bytes=100", &own])?;
    ensure!(!reached.success(), "in by net1, past the mesh: {}", reached.stdout);
    // And what is the mesh's goes through the mesh.
    let capture = lab.capture("second-network")?;
    ask(pod, &format!("http://{}:{HTTP}/by-the-first", lab.pod("mesh/far").address()?))?;
    let captured = capture.stop()?;
    let clear = captured.flows_with(b"/by-the-first");
    ensure!(clear.is_empty(), "in the clear: {clear:?}");
    let outside = SocketAddr::new(fabric::outside(mesh_tests::stack::Family::V4), 80);
    pod.exec_ok(["ambit-example", "get", &format!("http://{outside}/")]).map(drop)
}

/// One call, one second, and it is over.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_job_of_one_second_is_carried_and_leaves_the_model_at_once() {
    scenario(|lab| {
        let call = format!(
            "curl -sS --fail --max-time 10 http://{}:{HTTP}/of-a-job",
            lab.pod("mesh/far").address()?
        );
        let job = json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": "once", "namespace": "mesh" },
            "spec": { "backoffLimit": 0, "template": { "spec": {
                "restartPolicy": "Never",
                "nodeSelector": { "kubernetes.io/hostname": "n1" },
                "containers": [{
                    "name": "main", "image": "ambit/examples:latest",
                    "command": ["bash", "-c", format!("{call} && sleep 1")],
                }],
            } } },
        });
        let capture = lab.capture("job")?;
        lab.apply(&job.to_string())?;
        let pod = lab.pod("mesh/once");
        let address = eventually("the Job's pod has an address", PATIENCE, || pod.address())?;
        eventually("ztunnel knows it", SOON, || {
            let known = known_at(lab, address)?;
            ensure!(known.len() == 1 && known[0].contains("Pod/mesh/once-"), "{known:?}");
            Ok(())
        })?;
        lab.kubectl(["wait", "-n", "mesh", "--for=condition=complete", "job/once", "--timeout=60s"])?;
        eventually("ztunnel has forgotten it", SOON, || {
            let known = known_at(lab, address)?;
            ensure!(known.is_empty(), "{known:?}");
            Ok(())
        })?;
        let captured = capture.stop()?;
        let (logs, clear) = (pod.logs()?, captured.flows_with(b"/of-a-job"));
        ensure!(logs.contains(&format!("\"client\":\"{address}\"")), "it got no answer: {logs}");
        ensure!(clear.is_empty(), "in the clear: {clear:?}");
        let opened: Vec<u16> = captured
            .packets()
            .filter(|packet| packet.opens() && packet.source.ip() == address)
            .map(|packet| packet.destination.port())
            .collect();
        ensure!(
            !opened.is_empty() && opened.iter().all(|port| *port == HBONE),
            "it opened connections to {opened:?}"
        );
        // Its object is there still, and says that it had the address.
        let phase = pod.object()?.status.and_then(|status| status.phase);
        ensure!(phase.as_deref() == Some("Succeeded"), "it is {phase:?}");
        lab.kubectl(["delete", "-n", "mesh", "job", "once"])?;
        eventually("its pod goes with it", PATIENCE, || {
            ensure!(pod.object().is_err(), "it is there");
            Ok(())
        })
    });
}
