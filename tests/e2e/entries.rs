//! ServiceEntry and WorkloadEntry as their users write them: what is outside of the mesh, reached by a virtual address.

use std::net::{IpAddr, SocketAddr};

use mesh_tests::fabric::{self, OUTSIDE_NAME};
use mesh_tests::lab::PodRef;
use mesh_tests::stack::Family;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};
use serde_json::{Value, json};

use crate::fixture::{HTTP, SOON, log_end, log_line, service_of};
use crate::shared::scenario;

const NAMESPACE: &str = "entries";

/// The namespace, gone at the end.
struct Entries<'a> {
    lab: &'a Lab,
    client: PodRef<'a>,
}

impl<'a> Entries<'a> {
    fn new(lab: &'a Lab) -> anyhow::Result<Self> {
        lab.namespace(NAMESPACE, &[("istio.io/dataplane-mode", "ambient")])?;
        Ok(Self { lab, client: lab.pod("mesh/client") })
    }

    fn apply(&self, kind: &str, name: &str, spec: &Value) -> anyhow::Result<()> {
        let object = json!({
            "apiVersion": "networking.istio.io/v1", "kind": kind,
            "metadata": { "name": name, "namespace": NAMESPACE }, "spec": spec,
        });
        self.lab.apply(&object.to_string())
    }

    /// Answers from a virtual address are of these, and no others.
    fn answers(&self, address: &str, expected: &[&str]) -> anyhow::Result<()> {
        let url = format!("http://{address}/");
        eventually(&format!("{expected:?} answer at {address}"), SOON, || {
            let all: Result<std::collections::BTreeSet<String>, _> =
                (0..12).map(|_| service_of(&self.client, &url)).collect();
            let all = all?;
            anyhow::ensure!(all.iter().map(String::as_str).eq(expected.iter().copied()), "{all:?}");
            Ok(())
        })
    }

    /// The addresses of a host by the status of its entry, once they are so many.
    fn made_up(&self, entry: &str, host: &str, count: usize) -> anyhow::Result<Vec<IpAddr>> {
        eventually(&format!("the status of {entry} has {count} addresses"), SOON, || {
            let object = self.lab.kubectl(["get", "-n", NAMESPACE, "serviceentry", entry, "-o", "json"])?;
            let object: Value = serde_json::from_str(&object)?;
            let all = object["status"]["addresses"].as_array().cloned().unwrap_or_default();
            anyhow::ensure!(all.len() == count && all.iter().all(|one| one["host"] == host), "{all:?}");
            Ok(all
                .iter()
                .map(|one| one["value"].as_str().unwrap_or_default().parse())
                .collect::<Result<_, _>>()?)
        })
    }

    /// Where a URL leads, and who answers there.
    fn reached(&self, family: &str, url: &str) -> anyhow::Result<(IpAddr, Value)> {
        let line = ["curl", family, "-sS", "--fail", "--max-time", "10", "-w", "\\n%{remote_ip}", url];
        let answer = self.client.exec_ok(line)?;
        let (answer, address) = answer.trim().rsplit_once('\n').unwrap_or_default();
        Ok((address.parse()?, serde_json::from_str(answer)?))
    }

    /// What the status of an object says of it.
    fn status(&self, kind: &str, name: &str, status: &str, text: &str) -> anyhow::Result<()> {
        eventually(&format!("the status of {name} is {status}"), SOON, || {
            let object = self.lab.kubectl(["get", "-n", NAMESPACE, kind, name, "-o", "json"])?;
            let object: Value = serde_json::from_str(&object)?;
            let condition = &object["status"]["conditions"][0];
            let told = condition["message"].as_str().unwrap_or_default();
            anyhow::ensure!(condition["status"] == status && told.contains(text), "{condition}");
            Ok(())
        })
    }
}

impl Drop for Entries<'_> {
    fn drop(&mut self) {
        let _ = self.lab.kubectl(["delete", "namespace", NAMESPACE, "--wait=true"]);
    }
}

/// One of a host at a virtual address, which is served on `target`.
fn service(address: &str, resolution: &str, target: u16, more: &Value) -> Value {
    let mut spec = json!({
        "hosts": [format!("{}.host", address.replace(['.', '/'], "-"))], "addresses": [address],
        "resolution": resolution,
        "ports": [{ "number": 80, "name": "http", "protocol": "HTTP", "targetPort": target }],
    });
    for (field, value) in more.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    spec
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_is_outside_is_reached_by_a_virtual_address() {
    scenario(|lab| {
        let entries = Entries::new(lab)?;
        let outside = fabric::outside(Family::V4).to_string();
        let endpoints = json!({ "endpoints": [{ "address": outside }] });
        entries.apply("ServiceEntry", "static", &service("240.0.0.1", "STATIC", 80, &endpoints))?;
        let end = log_end(lab, 1)?;
        entries.answers("240.0.0.1", &["outside"])?;
        let target = format!("dst.addr={outside}:80");
        log_line(lab, 1, end, &["outbound", "connection complete", "240-0-0-1.host", &target])?;
        entries.status("serviceentry", "static", "True", "accepted")?;

        // By name, which the node's resolver knows.
        let named = json!({ "hosts": [OUTSIDE_NAME] });
        entries.apply("ServiceEntry", "dns", &service("240.0.0.2", "DNS", 80, &named))?;
        entries.answers("240.0.0.2", &["outside"])?;

        // Where the client dialled, and known by its host.
        let net = format!("{outside}/31");
        entries.apply(
            "ServiceEntry",
            "none",
            &service(&net, "NONE", 80, &json!({ "hosts": ["any.host"] })),
        )?;
        eventually("it is known by its host", SOON, || {
            let end = log_end(lab, 1)?;
            service_of(&entries.client, &format!("http://{outside}/"))?;
            log_line(lab, 1, end, &["outbound", "connection complete", "any.host", &target])
        })?;

        let odd = json!({ "endpoints": [{ "address": "unix:///run/odd" }] });
        entries.apply("ServiceEntry", "odd", &service("240.0.0.3", "STATIC", 80, &odd))?;
        entries.status("serviceentry", "odd", "False", "unix:///run/odd")
    });
}

/// As most of Istio's users write them: without addresses.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_host_without_an_address_gets_one() {
    scenario(|lab| {
        let entries = Entries::new(lab)?;
        let outside = fabric::outside(Family::V4).to_string();
        let spec = |host: &str, more: Value| {
            let mut spec = service("192.0.2.1", "STATIC", 80, &more);
            spec["hosts"] = json!([host]);
            spec.as_object_mut().and_then(|spec| spec.remove("addresses"));
            spec
        };
        let host = "no-address.example";
        let endpoints = json!({ "endpoints": [{ "address": outside }] });
        entries.apply("ServiceEntry", "static", &spec(host, endpoints))?;
        entries.apply("ServiceEntry", "dns", &spec(OUTSIDE_NAME, json!({ "resolution": "DNS" })))?;
        for (entry, host) in [("static", host), ("dns", OUTSIDE_NAME)] {
            let addresses = entries.made_up(entry, host, 2)?;
            for (family, option, address) in
                [(Family::V4, "-4", addresses[0]), (Family::V6, "-6", addresses[1])]
            {
                let url = format!("http://{host}/");
                let end = log_end(lab, 1)?;
                let answer = eventually(&format!("{host} is reached at {address}"), SOON, || {
                    let (at, answer) = entries.reached(option, &url)?;
                    anyhow::ensure!(at == address, "at {at}");
                    Ok(answer)
                })?;
                assert_eq!(answer["service"], "outside");
                // The name leads to both, the listed endpoint is where it is.
                let family = if entry == "dns" { family } else { Family::V4 };
                let target = format!("dst.addr={}", SocketAddr::new(fabric::outside(family), 80));
                log_line(lab, 1, end, &["outbound", "connection complete", host, &target])?;
            }
            entries.status("serviceentry", entry, "True", "accepted")?;
        }

        let label = "networking.istio.io/enable-autoallocate-ip=false";
        lab.kubectl(["label", "serviceentry", "-n", NAMESPACE, "static", label])?;
        entries.made_up("static", host, 0)?;
        eventually("nobody knows the host any more", SOON, || {
            let error = entries.reached("-4", &format!("http://{host}/")).err();
            let text = error.map(|error| format!("{error:#}")).unwrap_or_default();
            anyhow::ensure!(text.contains("not resolve"), "{text:?}");
            Ok(())
        })
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_and_workload_entries_are_endpoints_of_what_selects_them() {
    scenario(|lab| {
        let entries = Entries::new(lab)?;
        let pod = Workload::new(NAMESPACE, "pod").serve().label("app", "both").on_node(2).start(lab)?;
        pod.captured()?;
        let selector = json!({ "workloadSelector": { "labels": { "app": "both" } } });
        entries.apply("ServiceEntry", "both", &service("240.0.0.4", "STATIC", HTTP, &selector))?;
        let end = log_end(lab, 1)?;
        entries.answers("240.0.0.4", &["pod"])?;
        let tunnel = format!("dst.hbone_addr={}:{HTTP}", pod.address_of(Family::V4)?);
        log_line(lab, 1, end, &["outbound", "connection complete", "240-0-0-4.host", &tunnel])?;
        let machine = json!({
            "address": fabric::outside(Family::V4).to_string(), "labels": { "app": "both" },
            "ports": { "http": 80 },
        });
        entries.apply("WorkloadEntry", "machine", &machine)?;
        entries.answers("240.0.0.4", &["outside", "pod"])?;
        entries.status("workloadentry", "machine", "True", "accepted")?;

        // A Service of Kubernetes selects it, too.
        lab.cluster().create(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "kube", "namespace": NAMESPACE },
            "spec": {
                "selector": { "app": "both" },
                "ports": [{ "name": "http", "port": 80, "targetPort": HTTP }],
            },
        }))?;
        let vip = lab.service_address_of(Family::V4, NAMESPACE, "kube")?.to_string();
        entries.answers(&vip, &["outside", "pod"])?;
        lab.kubectl(["delete", "workloadentry", "-n", NAMESPACE, "machine"])?;
        entries.answers("240.0.0.4", &["pod"])?;
        entries.answers(&vip, &["pod"])
    });
}
