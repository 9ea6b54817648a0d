//! What the mesh refuses, and how it says so: strangers' certificates, wrong authorities, calls to its own ports.

use std::net::SocketAddr;

use mesh_tests::Lab;
use mesh_tests::peer::{self, Authority, Credentials, Outcome};

use crate::fixture::{HBONE, HTTP, ask, log_end, log_line};
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
        let uid = |name: &str| [("ambit-workload-uid", format!("Kubernetes//Pod/mesh/{name}"))];
        for (name, expect) in [("far", true), ("near", false)] {
            let headers = uid(name);
            let headers: Vec<(&str, &str)> =
                headers.iter().map(|(key, value)| (*key, value.as_str())).collect();
            let outcome = dial(lab, &far(lab)?, &headers, &credentials)?;
            assert_eq!(outcome == Outcome::Status(200), expect, "{name}: {outcome:?}");
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
            ("unknown root", Authority::foreign()?.issue(CLIENT)?, &["unknown", "issuer", "root"][..]),
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
        let failed = || -> anyhow::Result<u64> {
            let metrics = lab.scrape(2, 15020, "/metrics")?;
            let lines =
                metrics.lines().filter(|line| line.starts_with("istio_tcp_connections_failed_total{"));
            Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
        };
        let before = failed()?;
        let url = format!("http://{}:{HBONE}/", lab.pod("mesh/far").address()?);
        for pod in ["plain/client", "mesh/client"] {
            let output = lab.pod(pod).exec(["curl", "-sS", "--max-time", "20", &url])?;
            assert!(!output.success(), "{pod} got {}", output.stdout);
            assert_ne!(output.code, 28, "{pod} was left waiting");
        }
        mesh_tests::eventually("the refusal is counted", crate::fixture::SOON, || {
            let now = failed()?;
            anyhow::ensure!(now > before, "still {now}");
            Ok(())
        })
    });
}

/// Neither loops nor data: ztunnel's ports are of no use to a pod, at whichever address.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn calls_to_the_meshs_own_ports_lead_nowhere() {
    scenario(|lab| {
        let nodes = [lab.node(1).address().to_string(), lab.node(2).address().to_string()];
        let far = lab.pod("mesh/far").address()?.to_string();
        for caller in ["mesh/client", "plain/client"] {
            let pod = lab.pod(caller);
            let own = pod.address()?.to_string();
            for host in [own.as_str(), "127.0.0.1", far.as_str(), &nodes[0], &nodes[1]] {
                for port in [15000_u16, 15001, 15006, 15008, 15021, 15053] {
                    let url = format!("http://{host}:{port}/config_dump");
                    let output = pod.exec(["curl", "-s", "--max-time", "3", &url])?;
                    assert!(!output.stdout.contains("workloads"), "{caller} read {url}: {}", output.stdout);
                }
            }
        }
        // The proxies are well and did not multiply connections among themselves.
        ask(&lab.pod("mesh/client"), &format!("http://{far}:{HTTP}/"))?;
        for node in [1, 2] {
            let open = lab.scrape(node, 15020, "/metrics")?;
            let sockets = open.lines().find_map(|line| line.strip_prefix("process_open_fds "));
            let sockets: u64 = sockets.and_then(|text| text.trim().parse().ok()).unwrap_or_default();
            assert!(sockets < 1000, "n{node} has {sockets} descriptors open");
        }
        Ok(())
    });
}
