//! What the mesh refuses, and how it says so: strangers' certificates, wrong authorities, calls to its own ports.

use std::net::SocketAddr;

use anyhow::Context as _;
use mesh_tests::lab::PodRef;
use mesh_tests::peer::{self, Authority, Credentials, Outcome};
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};
use serde_json::json;

use crate::fixture::{ECHO, HBONE, HTTP, SOON, ask, log_end, log_line, service_of};
use crate::shared::scenario;

const CLIENT: &str = "spiffe://cluster.local/ns/mesh/sa/client";

/// A tunnel to `mesh/far` from the uncaptured client, which is on another node.
fn dial(
    lab: &Lab,
    authority: &str,
    headers: &[(&str, &str)],
    credentials: &Credentials,
) -> anyhow::Result<Outcome> {
    let server = SocketAddr::new(lab.pod("mesh/far").address()?, HBONE);
    peer::connect_with(lab, &lab.pod("plain/client"), server, authority, headers, credentials)
}

fn far(lab: &Lab) -> anyhow::Result<String> {
    Ok(format!("{}:{HTTP}", lab.pod("mesh/far").address()?))
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_authority_of_another_pod_is_a_bad_request() {
    scenario(|lab| {
        let credentials = Authority::of_the_mesh(lab)?.issue(CLIENT)?;
        let other = format!("{}:{HTTP}", lab.pod("mesh/near").address()?);
        let vip = format!("{}:80", lab.service_address("mesh", "web")?);
        let end = log_end(lab, 2)?;
        assert_eq!(dial(lab, &far(lab)?, &[], &credentials)?, Outcome::Status(200), "the pod's own address");
        assert_eq!(dial(lab, &other, &[], &credentials)?, Outcome::Status(400), "another pod's address");
        assert_eq!(dial(lab, &vip, &[], &credentials)?, Outcome::Status(400), "a Service's address");
        let line = log_line(lab, 2, end, &["inbound", "error", "BAD_REQUEST"])?;
        assert!(line.contains(CLIENT), "the peer proved who it is: {line}");
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_tunnel_meant_for_another_pod_of_that_address_is_refused() {
    scenario(|lab| {
        let credentials = Authority::of_the_mesh(lab)?.issue(CLIENT)?;
        for (name, status) in [("far", 200), ("near", 421)] {
            let end = log_end(lab, 2)?;
            let uid = format!("Kubernetes//Pod/mesh/{name}");
            let outcome = dial(lab, &far(lab)?, &[("ambit-workload-uid", &uid)], &credentials)?;
            assert_eq!(outcome, Outcome::Status(status), "meant for {name}");
            if status != 200 {
                log_line(lab, 2, end, &["inbound", CLIENT, "WRONG_WORKLOAD"])?;
            }
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn certificates_that_prove_nothing_are_refused_with_the_reason() {
    scenario(|lab| {
        let mesh = Authority::of_the_mesh(lab)?;
        let cases = [
            ("unknown root", Authority::foreign()?.issue(CLIENT)?, &["issuer", "root"][..]),
            (
                "foreign trust domain",
                mesh.issue("spiffe://elsewhere.local/ns/mesh/sa/client")?,
                &["trust domain"],
            ),
            ("expired", mesh.issue_expired(CLIENT)?, &["expired"]),
            ("no identity", mesh.issue("https://mesh.example/client")?, &["identity", "SPIFFE"]),
        ];
        let source = lab.pod("plain/client").address()?.to_string();
        for (name, credentials, words) in cases {
            let end = log_end(lab, 2)?;
            let outcome = dial(lab, &far(lab)?, &[], &credentials)?;
            assert!(matches!(outcome, Outcome::Refused(_)), "{name}: {outcome:?}");
            let line = log_line(lab, 2, end, &["inbound", &source, "error"])?;
            let told = words.iter().any(|word| line.to_lowercase().contains(&word.to_lowercase()));
            assert!(told, "{name}: the log does not say why: {line}");
        }
        assert_eq!(
            dial(lab, &far(lab)?, &[], &mesh.issue(CLIENT)?)?,
            Outcome::Status(200),
            "and a good one is served"
        );
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn plain_bytes_on_the_hbone_port_are_closed_and_counted() {
    scenario(|lab| {
        let plain = lab.pod("plain/client");
        // Not of this kind, whatever else happens in the lab.
        let failed = || -> anyhow::Result<u64> {
            let metrics = lab.scrape(2, 15020, "/metrics")?;
            let lines = metrics.lines().filter(|line| {
                line.starts_with("istio_tcp_connections_failed_total{")
                    && line.contains("response_flags=\"TLS_FAILURE\"")
            });
            Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
        };
        let (before, end) = (failed()?, log_end(lab, 2)?);
        let url = format!("http://{}:{HBONE}/", lab.pod("mesh/far").address()?);
        nobody_answers(&plain, &url)?;
        log_line(lab, 2, end, &["inbound", &plain.address()?.to_string(), "TLS_FAILURE"])?;
        eventually("the refusal is counted", SOON, || {
            let now = failed()?;
            anyhow::ensure!(now > before, "still {now}");
            Ok(())
        })
    });
}

/// No answer, and no waiting for one.
fn nobody_answers(pod: &PodRef<'_>, url: &str) -> anyhow::Result<()> {
    let output = pod.exec(["curl", "-sS", "--max-time", "15", url])?;
    let (code, said) = (output.code, format!("{}{}", output.stdout, output.stderr));
    // 28 is curl's for a timeout.
    anyhow::ensure!(code != 0 && code != 28 && output.stdout.is_empty(), "{url}: {code}, {said}");
    Ok(())
}

/// ztunnel's ports are of no use to a pod, from inside or outside, and no port but HBONE's is taken from it.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn calls_to_the_meshs_own_ports_lead_nowhere() {
    scenario(|lab| {
        let (far, plain) = (lab.pod("mesh/far"), lab.pod("plain/client"));
        let own = far.address()?.to_string();
        let ports = [15000_u16, 15001, 15006, HBONE, 15020, 15021, 15053];
        for (caller, host) in [
            (&far, "127.0.0.1"),
            (&far, own.as_str()),
            (&lab.pod("mesh/client"), own.as_str()),
            (&lab.pod("mesh/near"), own.as_str()),
            (&plain, own.as_str()),
        ] {
            for port in ports {
                nobody_answers(caller, &format!("http://{host}:{port}/config_dump"))?;
            }
        }
        // ztunnel's own dump is on its loopback, where the same call does find it.
        for node in [1, 2] {
            let address = lab.daemon("ztunnel", node).address()?;
            nobody_answers(&plain, &format!("http://{address}:15000/config_dump"))?;
            assert!(!lab.scrape(node, 15000, "/config_dump")?.is_empty());
        }
        // An application that listens on such a port is answered for: it was nobody's, and these calls can see an answer.
        let listening = json!(["ambit-example", "serve", "--listen=0.0.0.0:15021", "--name=squatter"]);
        let squatter =
            Workload::new("mesh", "squatter").on_node(2).with("/spec/containers/0/command", listening);
        let squatter = squatter.start(lab)?;
        squatter.captured()?;
        let url = format!("http://{}:15021/config_dump", squatter.address()?);
        for caller in [&squatter, &lab.pod("mesh/client"), &plain] {
            eventually("the application answers", SOON, || {
                anyhow::ensure!(service_of(caller, &url)? == "squatter");
                Ok(())
            })?;
            assert!(nobody_answers(caller, &url).is_err(), "an answer was not seen");
        }
        Ok(())
    });
}

/// Descriptors that a node's ztunnel has open.
fn descriptors(lab: &Lab, node: u8) -> anyhow::Result<usize> {
    let pid = lab.daemon("ztunnel", node).live()?.pid(None).context("ztunnel does not run")?;
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// A proxy that meets itself would multiply connections until its descriptors run out.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn calls_to_the_meshs_own_ports_do_not_loop() {
    scenario(|lab| {
        let (client, far) = (lab.pod("mesh/client"), lab.pod("mesh/far"));
        let open = || Ok::<_, anyhow::Error>([descriptors(lab, 1)?, descriptors(lab, 2)?]);
        let before = open()?;
        // The count does see connections.
        let echo = format!("{}:{ECHO}", lab.pod("mesh/echo").address()?);
        let mut parked = client.spawn(["ambit-example", "park", "--count=50", &echo])?;
        parked.wait_for("connections are open", SOON)?;
        let while_parked = open()?;
        let grew = (0..2).all(|node| while_parked[node] >= before[node] + 50);
        assert!(grew, "50 connections changed {before:?} to {while_parked:?}");
        parked.finish()?;
        for host in [client.address()?, far.address()?] {
            for port in [15001_u16, 15006, HBONE] {
                let url = format!("http://{host}:{port}/");
                for _ in 0..10 {
                    nobody_answers(&client, &url)?;
                }
            }
        }
        eventually("no connection of these is left", SOON, || {
            let after = open()?;
            let settled = (0..2).all(|node| after[node] < before[node] + 25);
            anyhow::ensure!(settled, "{before:?} descriptors before, {after:?} now");
            Ok(())
        })?;
        ask(&client, &format!("http://{}:{HTTP}/", far.address()?)).map(drop)
    });
}
