//! The kubelet's probes of pods in the mesh: they pass by the proxy, and tell the truth.

use anyhow::{Context as _, ensure};
use mesh_tests::eventually;
use mesh_tests::lab::PATIENCE;
use mesh_tests::workload::Workload;
use serde_json::json;

use crate::fixture::{HTTP, SOON, log_end, log_line};
use crate::shared::scenario;

/// Who asked the pod for this path, so far.
fn askers(log: &str, path: &str) -> Vec<String> {
    let marker = format!("GET {path} from ");
    log.lines().filter_map(|line| line.strip_prefix(&marker)).map(str::to_owned).collect()
}

/// Also while nobody else gets in without mutual TLS.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_server_sees_the_nodes_address_and_the_proxy_sees_nothing() {
    scenario(|lab| {
        let end = log_end(lab, 1)?;
        lab.apply(
            "{ apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: { name: probed, namespace: mesh }, \
             spec: { selector: { matchLabels: { app: probed } }, mtls: { mode: STRICT } } }",
        )?;
        let pod = Workload::new("mesh", "probed")
            .command(&["ambit-example", "serve", "--listen=0.0.0.0:8080", "--name=probed"])
            .port("http", HTTP)
            .readiness(json!({ "httpGet": { "path": "/probed", "port": "http" }, "periodSeconds": 1 }))
            .liveness(json!({ "tcpSocket": { "port": 8080 }, "periodSeconds": 1 }))
            .on_node(1)
            .start(lab)?;
        let (address, plain) = (pod.address()?.to_string(), lab.pod("plain/client"));
        // What the proxy has to say of probes it says before the line of this one, or while probes go on.
        let url = format!("http://{address}:{HTTP}/");
        eventually("a pod outside the mesh is refused", SOON, || {
            let refused = plain.exec(["curl", "-sS", "--max-time", "5", &url])?;
            ensure!(!refused.success(), "STRICT lets it in: {}", refused.stdout);
            Ok(())
        })?;
        log_line(lab, 1, end, &["inbound", &address, &plain.address()?.to_string(), "denies it"])?;
        let before = askers(&pod.logs()?, "/probed").len();
        let sources = eventually("three more probes are answered", PATIENCE, || {
            let sources = askers(&pod.logs()?, "/probed");
            ensure!(sources.len() >= before + 3, "{sources:?}");
            Ok(sources)
        })?;
        pod.ready()?;
        ensure!(pod.restarts()? == 0, "a TCP probe failed");
        let node = lab.node(1).interface_addresses()?;
        for source in &sources {
            let source: std::net::SocketAddr = source.parse().context("the probe's source")?;
            ensure!(node.contains(&source.ip()), "a probe came from {source}, the node is {node:?}");
        }
        let log = lab.daemon("ztunnel", 1).logs()?;
        let of_node =
            |line: &&str| line.contains(&address) && node.iter().any(|ip| line.contains(&format!("{ip}:")));
        let line = log[end..].lines().find(of_node);
        ensure!(line.is_none(), "the proxy carried a probe: {line:?}");
        lab.kubectl(["delete", "-n", "mesh", "peerauthentication", "probed"]).map(drop)
    });
}

/// Through a proxy every TCP probe would succeed.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_tcp_probe_of_a_closed_port_fails() {
    scenario(|lab| {
        let probe = json!({ "tcpSocket": { "port": 9 }, "periodSeconds": 1, "failureThreshold": 1 });
        let pod = Workload::new("mesh", "closed").liveness(probe).on_node(1).create(lab)?;
        eventually("the kubelet restarts a container whose port is closed", PATIENCE, || {
            let restarts = pod.live()?.restarts(None);
            ensure!(restarts >= 1, "{restarts} restarts");
            Ok(())
        })
    });
}

/// A port that nobody's probe names meets the proxy also when the kubelet dials it, which another pod can make it do.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_probe_of_one_pod_opens_nothing_in_another() {
    scenario(|lab| {
        let victim = Workload::new("mesh", "victim")
            .command(&["ambit-example", "serve", "--listen=0.0.0.0:8080", "--name=victim"])
            .port("http", HTTP)
            .on_node(1)
            .start(lab)?;
        let (address, end) = (victim.address()?.to_string(), log_end(lab, 1)?);
        let action = json!({ "host": address, "path": "/through", "port": HTTP });
        Workload::new("plain", "attacker")
            .readiness(json!({ "httpGet": action, "periodSeconds": 1 }))
            .on_node(1)
            .create(lab)?;
        eventually("the victim is asked", PATIENCE, || {
            ensure!(!askers(&victim.logs()?, "/through").is_empty(), "not yet");
            Ok(())
        })?;
        log_line(lab, 1, end, &["inbound", &address]).map(drop)
    });
}
