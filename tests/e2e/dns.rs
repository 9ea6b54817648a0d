//! Names in the mesh: as before for everything that the cluster's DNS knows, and without it for what the mesh knows.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use mesh_tests::lab::PodRef;
use mesh_tests::stack::Family;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, dns, eventually};
use serde_json::json;

use crate::fixture::SOON;
use crate::shared::scenario;

/// As resolvers wait.
const TIMEOUT: Duration = Duration::from_secs(5);

fn query(name: &str, kind: RecordType) -> anyhow::Result<Vec<u8>> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(Name::from_ascii(name)?, kind));
    Ok(message.to_vec()?)
}

/// An application's socket, connected to the cluster's DNS.
fn resolver(pod: &PodRef<'_>, family: Family) -> anyhow::Result<UdpSocket> {
    let netns = pod.live()?.netns().context("the pod has no network namespace")?;
    let server = SocketAddr::new(dns::service(family), 53);
    let any: SocketAddr = match family {
        Family::V4 => "0.0.0.0:0".parse()?,
        Family::V6 => "[::]:0".parse()?,
    };
    netns.run(|| {
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.connect(server)?;
        Ok(socket)
    })
}

fn ask(resolver: &UdpSocket, query: &[u8]) -> anyhow::Result<Vec<u8>> {
    resolver.send(query)?;
    let mut buffer = vec![0; 4096];
    let length = resolver.recv(&mut buffer).context("no answer")?;
    buffer.truncate(length);
    Ok(buffer)
}

/// What an answer says, whoever gives it.
fn gist(answer: &[u8]) -> anyhow::Result<(ResponseCode, BTreeSet<String>)> {
    let answer = Message::from_vec(answer)?;
    let records = answer.answers.iter().map(|record| format!("{} {}", record.name, record.data));
    Ok((answer.metadata.response_code, records.collect()))
}

/// How many queries of these pods the proxy of a node has seen.
fn counted(lab: &Lab, node: u8, service: &str) -> anyhow::Result<u64> {
    let label = format!("source_canonical_service=\"{service}\"");
    let metrics = lab.scrape(node, 15020, "/metrics")?;
    let ours =
        metrics.lines().filter(|line| line.starts_with("istio_dns_requests_total") && line.contains(&label));
    Ok(ours.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn names_resolve_as_outside_of_the_mesh() {
    scenario(|lab| {
        lab.cluster().create(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "headless", "namespace": "mesh" },
            "spec": {
                "clusterIP": "None", "selector": { "app": "web" }, "ipFamilyPolicy": "PreferDualStack",
                "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }],
            },
        }))?;
        let (inside, outside) = (lab.pod("mesh/client"), lab.pod("plain/client"));
        for family in [Family::V4, Family::V6] {
            let (inside, outside) = (resolver(&inside, family)?, resolver(&outside, family)?);
            for (name, of_mesh) in [
                ("web.mesh.svc.cluster.local.", true),
                ("kubernetes.default.svc.cluster.local.", true),
                ("headless.mesh.svc.cluster.local.", true),
                ("outside.example.", false),
                ("outside.example.mesh.svc.cluster.local.", false),
                ("no-such.mesh.svc.cluster.local.", false),
                ("example.org.", false),
            ] {
                for kind in [RecordType::A, RecordType::AAAA, RecordType::TXT, RecordType::SRV] {
                    let query = query(name, kind)?;
                    eventually(&format!("{name} {kind} is the same on both sides"), SOON, || {
                        let (ours, theirs) = (ask(&inside, &query)?, ask(&outside, &query)?);
                        ensure!(
                            gist(&ours)? == gist(&theirs)?,
                            "{:?}, outside {:?}",
                            gist(&ours)?,
                            gist(&theirs)?
                        );
                        let answered = of_mesh && matches!(kind, RecordType::A | RecordType::AAAA);
                        ensure!(answered || ours == theirs, "not the server's answer");
                        Ok(())
                    })?;
                }
            }
        }
        // The lab's DNS has no such records.
        let query = query("_main._tcp.web.mesh.svc.cluster.local.", RecordType::SRV)?;
        let (_, records) = gist(&ask(&resolver(&inside, Family::V4)?, &query)?)?;
        ensure!(
            records.iter().any(|record| record.ends_with(" 80 web.mesh.svc.cluster.local.")),
            "{records:?}"
        );
        ensure!(counted(lab, 1, "client")? > 0);
        let curl =
            inside.curl("http://headless:8080/").or_else(|_| inside.curl("http://headless.mesh:8080/"));
        curl.map(drop)
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_opts_out_asks_the_server_itself() {
    scenario(|lab| {
        let out = Workload::new("mesh", "own-dns")
            .label("app", "own-dns")
            .with("/metadata/annotations", json!({ "ambient.istio.io/dns-capture": "false" }))
            .on_node(1)
            .start(lab)?;
        out.captured()?;
        let name = query("web.mesh.svc.cluster.local.", RecordType::A)?;
        let (code, records) = gist(&ask(&resolver(&out, Family::V4)?, &name)?)?;
        ensure!(code == ResponseCode::NoError && records.len() == 1, "{records:?}");
        out.curl("http://web.mesh/")?;
        ensure!(counted(lab, 1, "own-dns")? == 0);
        // It may change its mind while it lives. Each query is asked from a port of its own.
        for wanted in [true, false] {
            let annotation = format!("ambient.istio.io/dns-capture={wanted}");
            lab.kubectl(["annotate", "--overwrite", "-n", "mesh", "pod", "own-dns", &annotation])?;
            eventually("the pod's queries are captured, or no longer", SOON, || {
                let before = counted(lab, 1, "own-dns")?;
                let (code, records) = gist(&ask(&resolver(&out, Family::V4)?, &name)?)?;
                ensure!(code == ResponseCode::NoError && records.len() == 1, "{records:?}");
                ensure!((counted(lab, 1, "own-dns")? > before) == wanted, "not {wanted} yet");
                Ok(())
            })?;
            out.captured()?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn queries_wait_for_a_killed_proxy() {
    scenario(|lab| {
        let client = lab.pod("mesh/client");
        let resolver = resolver(&client, Family::V4)?;
        for name in ["web.mesh.svc.cluster.local.", "outside.example."] {
            let query = query(name, RecordType::A)?;
            let before = gist(&ask(&resolver, &query)?)?;
            let held = lab.daemon("ztunnel", 1).kill_and_hold()?;
            resolver.send(&query)?;
            held.release()?;
            // Not asked again: it is the query that waited.
            let mut buffer = [0; 4096];
            let length = resolver.recv(&mut buffer).context("the query did not wait")?;
            ensure!(gist(&buffer[..length])? == before);
        }
        // Each is asked twice at most, as resolvers do, while proxies die.
        let query = query("outside.example.", RecordType::A)?;
        for round in 0..3 {
            let before = lab.daemon("ztunnel", 1).restarts()?;
            lab.daemon("ztunnel", 1).signal(nix::sys::signal::Signal::SIGKILL)?;
            for n in 0..50 {
                ask(&resolver, &query)
                    .or_else(|_| ask(&resolver, &query))
                    .with_context(|| format!("query {n} after kill {round}"))?;
            }
            lab.daemon("ztunnel", 1).restarted(before)?;
        }
        Ok(())
    });
}
