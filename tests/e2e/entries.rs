//! ServiceEntry and WorkloadEntry as their users write them: what is outside of the mesh, reached by a virtual address.

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
