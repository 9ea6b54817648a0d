//! Connections between pods in and out of the mesh: who reaches whom, how, and with every byte.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_tests::capture::{Capture, Packet};
use mesh_tests::lab::PodRef;
use mesh_tests::workload::{self, Workload};
use mesh_tests::{Lab, eventually};
use serde_json::json;

use crate::fixture::{self, ECHO, HBONE, HTTP, SOON, ask, log_end, log_line, service_of};
use crate::shared::scenario;

const CLIENT: &str = "spiffe://cluster.local/ns/mesh/sa/client";
/// What the access log calls the peer's proved identity.
const PROVED: &str = "src.identity";
const WEB: &str = "spiffe://cluster.local/ns/mesh/sa/web";

#[test]
#[ignore = "needs root: cargo xtask test"]
fn captured_to_captured_on_another_node() {
    scenario(|lab| {
        let (client, far) = (lab.pod("mesh/client"), lab.pod("mesh/far"));
        let (source, target) = (client.address()?, far.address()?);
        let ends = [log_end(lab, 1)?, log_end(lab, 2)?];
        let capture = lab.capture("another-node")?;
        let answer = ask(&client, &format!("http://{target}:{HTTP}/a-far-path"))?;
        let captured = capture.stop()?;
        assert_eq!(answer["client"], json!(source.to_string()), "the server sees the client's own address");
        assert!(captured.flows_with(b"/a-far-path").is_empty());
        assert_eq!(captured.count(|packet| packet.has_port(HTTP)), 0);
        assert!(captured.count(|packet| packet.has_port(HBONE) && packet.source.ip() == source) > 0);
        for (node, direction) in [(1, "outbound"), (2, "inbound")] {
            let end = ends[usize::from(node) - 1];
            let line = log_line(lab, node, end, &[direction, &target.to_string(), CLIENT, WEB])?;
            assert!(line.contains(PROVED), "{line}");
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn captured_to_captured_on_the_same_node() {
    scenario(|lab| {
        let (client, near) = (lab.pod("mesh/client"), lab.pod("mesh/near"));
        let (source, target) = (client.address()?, near.address()?);
        // The agent has to know first that there is no network policy.
        eventually("the pair needs no tunnel", SOON, || opened_near(lab, &client, target, "none"))?;
        let end = log_end(lab, 1)?;
        let capture = Capture::start(lab.node(1).netns(), &lab.directory().join("same-node.pcap"))?;
        let answer = ask(&client, &format!("http://{target}:{HTTP}/"))?;
        let captured = capture.stop()?;
        assert_eq!(answer["client"], json!(source.to_string()));
        let of_the_pair = |packet: &Packet<'_>| {
            let ends = [packet.source.ip(), packet.destination.ip()];
            ends.contains(&source) && ends.contains(&target)
        };
        assert_eq!(captured.count(of_the_pair), 0, "nothing of it is on any interface of the node");
        for direction in ["outbound", "inbound"] {
            log_line(lab, 1, end, &[direction, &format!("dst.addr={target}:{HTTP}"), CLIENT, WEB])?;
        }
        Ok(())
    });
}

/// Opens a connection between two pods of node 1; fails if it is not counted, on both sides, as secured in this way.
fn opened_near(lab: &Lab, client: &PodRef<'_>, target: IpAddr, security: &str) -> anyhow::Result<()> {
    let label = format!("connection_security_policy=\"{security}\"");
    let count = || -> anyhow::Result<u64> {
        let metrics = lab.scrape(1, 15020, "/metrics")?;
        let ours = metrics.lines().filter(|line| {
            line.starts_with("istio_tcp_connections_opened_total")
                && [label.as_str(), "source_workload=\"client\"", "destination_workload=\"near\""]
                    .iter()
                    .all(|text| line.contains(text))
        });
        Ok(ours.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
    };
    let before = count()?;
    ask(client, &format!("http://{target}:{HTTP}/"))?;
    let opened = count()? - before;
    anyhow::ensure!(opened == 2, "{opened} connections of {security} are new");
    Ok(())
}

/// A network policy is the CNI's to enforce, so what it may be about has to pass the network.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_network_policy_brings_the_tunnel_back_to_the_same_node() {
    scenario(|lab| {
        let (client, near) = (lab.pod("mesh/client"), lab.pod("mesh/near"));
        let target = near.address()?;
        eventually("the pair needs no tunnel", SOON, || opened_near(lab, &client, target, "none"))?;
        for (name, selector) in [("server", "{ matchLabels: { app: web } }"), ("anybody", "{}")] {
            lab.apply(&format!(
                "{{ apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, \
                   metadata: {{ name: {name}, namespace: mesh }}, spec: {{ podSelector: {selector} }} }}"
            ))?;
            eventually("the pair has a tunnel", SOON, || opened_near(lab, &client, target, "mutual_tls"))?;
            lab.kubectl(["delete", "networkpolicy", "-n", "mesh", name])?;
            eventually("the pair needs none again", SOON, || opened_near(lab, &client, target, "none"))?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn captured_to_uncaptured_falls_back_to_plain_tcp() {
    scenario(|lab| {
        let (client, server) = (lab.pod("mesh/client"), lab.pod("plain/server"));
        let (source, target) = (client.address()?, server.address()?);
        let end = log_end(lab, 1)?;
        let capture = lab.capture("to-uncaptured")?;
        let answer = ask(&client, &format!("http://{target}:{HTTP}/a-plain-path"))?;
        let captured = capture.stop()?;
        assert_eq!(answer["client"], json!(source.to_string()));
        assert!(!captured.flows_with(b"/a-plain-path").is_empty(), "nobody is there to encrypt for");
        log_line(lab, 1, end, &["outbound", &target.to_string()])?;
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn uncaptured_to_captured_is_served_in_the_clear() {
    scenario(|lab| {
        let (client, far) = (lab.pod("plain/client"), lab.pod("mesh/far"));
        let source = client.address()?;
        let end = log_end(lab, 2)?;
        let answer = ask(&client, &format!("http://{}:{HTTP}/", far.address()?))?;
        assert_eq!(answer["client"], json!(source.to_string()));
        let line = log_line(lab, 2, end, &["inbound", &source.to_string()])?;
        assert!(!line.contains(PROVED), "no identity was proved: {line}");
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_service_leads_to_one_endpoint_per_call_and_to_all_in_time() {
    scenario(|lab| {
        let client = lab.pod("mesh/client");
        let calls = 24;
        let handled = |name: &str| -> anyhow::Result<usize> {
            Ok(lab.pod(&format!("mesh/{name}")).logs()?.matches("GET /counted").count())
        };
        let before = [handled("near")?, handled("far")?];
        let answered: Vec<String> =
            (0..calls).map(|_| service_of(&client, "http://web/counted")).collect::<Result<_, _>>()?;
        let served = handled("near")? + handled("far")? - before[0] - before[1];
        assert_eq!(served, calls, "each call hits exactly one endpoint");
        assert_eq!(answered.iter().collect::<BTreeSet<_>>().len(), 2, "{answered:?}");
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_reaches_its_own_service() {
    scenario(|lab| {
        let near = lab.pod("mesh/near");
        let answered: BTreeSet<String> =
            (0..16).map(|_| service_of(&near, "http://web/")).collect::<Result<_, _>>()?;
        assert!(answered.contains("near"), "itself is among its endpoints: {answered:?}");
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_dialling_itself_and_its_loopback_is_not_captured() {
    scenario(|lab| {
        let near = lab.pod("mesh/near");
        let own = near.address()?.to_string();
        let end = log_end(lab, 1)?;
        for host in [own.as_str(), "127.0.0.1"] {
            let answer = ask(&near, &format!("http://{host}:{HTTP}/"))?;
            assert_eq!(answer["client"], json!(host), "no proxy in between");
        }
        // A captured connection after these, so that their lines would have been written.
        ask(&near, &format!("http://{}:{HTTP}/", lab.pod("mesh/far").address()?))?;
        log_line(lab, 1, end, &["outbound", &own, &lab.pod("mesh/far").address()?.to_string()])?;
        let log = lab.daemon("ztunnel", 1).logs()?;
        let own_line = log[end..].lines().find(|line| line.matches(own.as_str()).count() > 1);
        assert_eq!(own_line, None);
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn containers_of_a_pod_talk_over_localhost() {
    scenario(|lab| {
        let second = json!({ "name": "second", "image": "ambit/examples:latest", "command": ["ambit-example", "idle"] });
        let pod = Workload::new("mesh", "pair").serve();
        let first = pod.container_object();
        let pair = pod.with("/spec/containers", json!([first, second])).start(lab)?;
        pair.captured()?;
        let answer = ask(&pair.container("second"), &format!("http://localhost:{HTTP}/"))?;
        assert_eq!(answer["client"], "127.0.0.1");
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_process_of_the_node_dials_loopback_in_the_pod_as_port_forward_does() {
    scenario(|lab| {
        let listening = json!(["ambit-example", "serve", "--listen=[::]:8080", "--name=dual"]);
        let pod = Workload::new("mesh", "forwarded")
            .serve()
            .with("/spec/containers/0/command", listening)
            .start(lab)?;
        pod.captured()?;
        for host in ["127.0.0.1", "[::1]"] {
            let url = format!("http://{host}:{HTTP}/");
            let output = pod.exec_from_node(["curl", "-sS", "--fail", "--max-time", "5", &url])?;
            assert!(output.success(), "{host}: {}", output.stderr);
            assert!(output.stdout.contains("\"service\":\"dual\""), "{}", output.stdout);
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn every_byte_of_a_long_transfer_arrives_and_half_closes_pass_both_ways() {
    scenario(|lab| {
        let client = lab.pod("mesh/client");
        let echo = format!("{}:{ECHO}", lab.pod("mesh/echo").address()?);
        // The client closes its half first; the rest still comes back.
        client.exec_ok(["ambit-example", "send", "--bytes", "67108864", &echo])?;
        client.exec_ok(["ambit-example", "send", "--bytes", "1", &echo])?;
        client.exec_ok(["ambit-example", "send", "--bytes", "0", &echo])?;
        // The server closes its half first; the client goes on sending.
        let greet = Workload::new("mesh", "greet")
            .command(&["ambit-example", "greet", "--listen=[::]:7001"])
            .port("tcp", 7001)
            .on_node(2)
            .start(lab)?;
        greet.captured()?;
        let address = format!("{}:7001", greet.address()?);
        client.exec_ok(["ambit-example", "send", "--after-eof", "--bytes", "5000000", &address])?;
        mesh_tests::eventually("the server has counted what came after its end", fixture::SOON, || {
            let log = greet.logs()?;
            anyhow::ensure!(log.contains("Ok(5000000) bytes"), "it says {log}");
            Ok(())
        })
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn named_target_ports_differ_from_pod_to_pod() {
    scenario(|lab| {
        for (name, port) in [("first", "8081"), ("second", "8082")] {
            let listen = format!("--listen=[::]:{port}");
            Workload::new("mesh", name)
                .command(&["ambit-example", "serve", &listen, &format!("--name={name}")])
                .port("web", port.parse()?)
                .label("app", "named")
                .start(lab)?;
        }
        workload::named_service(lab, "mesh", "named", 80, "web")?;
        let client = lab.pod("mesh/client");
        mesh_tests::eventually("both answer, each on its own port", fixture::SOON, || {
            let answered: BTreeSet<String> =
                (0..10).map(|_| service_of(&client, "http://named/")).collect::<Result<_, _>>()?;
            anyhow::ensure!(answered.len() == 2, "only {answered:?}");
            Ok(())
        })
    });
}
