//! PeerAuthentication as its users write it: who is refused, who is served, and which open connections have to go.

use anyhow::Context as _;
use mesh_tests::lab::PodRef;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};
use serde_json::Value;

use crate::fixture::{ECHO, HTTP, SOON, log_end, log_line};
use crate::shared::scenario;

const NAMESPACE: &str = "sealed";

/// What a workload that is STRICT names, and what the ports of a policy do.
const STATIC: &str = "istio-system/istio_converted_static_strict";
const OF_PORTS: &str = "sealed/converted_peer_authentication_server";

/// A namespace of pods that the kubelet does not probe, one server and one echo server.
struct Sealed<'a> {
    lab: &'a Lab,
    server: PodRef<'a>,
    echo: PodRef<'a>,
}

impl<'a> Sealed<'a> {
    fn new(lab: &'a Lab) -> anyhow::Result<Self> {
        lab.namespace(NAMESPACE, &[])?;
        let unprobed = "/spec/containers/0/readinessProbe";
        let server = Workload::new(NAMESPACE, "server").serve().with(unprobed, Value::Null);
        let echo = Workload::new(NAMESPACE, "echo").echo().with(unprobed, Value::Null);
        let (server, echo) = (server.on_node(2).start(lab)?, echo.on_node(2).start(lab)?);
        Ok(Self { lab, server, echo })
    }

    fn enrol(&self) -> anyhow::Result<()> {
        self.lab.label_namespace(NAMESPACE, "istio.io/dataplane-mode=ambient")?;
        self.server.captured()?;
        self.echo.captured()
    }

    /// In the words of the older API version, as most examples have it.
    fn apply(&self, name: &str, spec: &str) -> anyhow::Result<()> {
        self.lab.apply(&format!(
            "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\n\
             metadata: {{ name: {name}, namespace: {NAMESPACE} }}\nspec: {spec}\n"
        ))
    }

    /// Waits until the status of a policy says this of it.
    fn told(&self, name: &str, status: &str, message: &str) -> anyhow::Result<()> {
        let path = "-ojsonpath={.status.conditions[?(@.type==\"ZtunnelAccepted\")]}";
        eventually(&format!("the status of {name} says {message:?}"), SOON, || {
            let told = self.lab.kubectl(["get", "-n", NAMESPACE, "peerauthentication", name, path])?;
            let told: Value = serde_json::from_str(&told)?;
            let said = told["message"].as_str().unwrap_or_default();
            anyhow::ensure!(told["status"] == status && said.contains(message), "{told}");
            Ok(())
        })
    }

    fn url(&self) -> anyhow::Result<String> {
        Ok(format!("http://{}:{HTTP}/", self.server.address()?))
    }

    /// Until a pod's request is answered.
    fn serves(&self, client: &str) -> anyhow::Result<()> {
        let (pod, url) = (self.lab.pod(client), self.url()?);
        eventually(&format!("{client} is served"), SOON, || pod.curl(&url).map(drop))
    }

    /// Until a pod's request is reset, for the sake of this policy: a port that nobody listens on looks the same to curl,
    /// which calls it a failure to connect (7) where the reset is there before connect() returns.
    fn refuses(&self, client: &str, policy: &str) -> anyhow::Result<()> {
        let (pod, url, end) = (self.lab.pod(client), self.url()?, log_end(self.lab, 2)?);
        eventually(&format!("{client} is refused"), SOON, || {
            let answer = pod.exec(["curl", "-sS", "--max-time", "5", &url])?;
            let reset = answer.stderr.contains("reset by peer") || answer.stderr.contains("curl: (7)");
            anyhow::ensure!(!answer.success() && reset, "{answer:?}");
            Ok(())
        })?;
        let (source, why) = (pod.address()?.to_string(), format!("policy {policy} denies it"));
        log_line(self.lab, 2, end, &["inbound", &source, &why, "did not use mutual TLS"]).map(drop)
    }
}

impl Drop for Sealed<'_> {
    fn drop(&mut self) {
        let _ = self.lab.kubectl(["delete", "namespace", NAMESPACE]);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn strict_refuses_whoever_is_outside_the_mesh_and_serves_the_others() {
    scenario(|lab| {
        let sealed = Sealed::new(lab)?;
        sealed.enrol()?;
        sealed.serves("plain/client")?;
        let before = denied(lab)?;
        sealed.apply("default", "{ mtls: { mode: STRICT } }")?;
        sealed.refuses("plain/client", STATIC)?;
        let now = denied(lab)?;
        assert!(now > before, "{before} connections were counted as denied, now {now}");
        sealed.serves("mesh/client")?;
        // Other namespaces are not concerned.
        let far = format!("http://{}:{HTTP}/", lab.pod("mesh/far").address()?);
        lab.pod("plain/client").curl(&far)?;
        // A policy that selects the pod goes before the namespace's, which goes before the mesh's.
        let one = "{ selector: { matchLabels: { app: server } }, mtls: { mode: PERMISSIVE } }";
        sealed.apply("server", one)?;
        sealed.serves("plain/client")?;
        lab.kubectl(["delete", "-n", NAMESPACE, "peerauthentication", "server"])?;
        sealed.refuses("plain/client", STATIC)?;
        sealed.apply("default", "{ mtls: { mode: UNSET } }")?;
        sealed.serves("plain/client")?;
        let ports =
            "{ selector: { matchLabels: { app: server } }, portLevelMtls: { 8080: { mode: STRICT } } }";
        sealed.apply("server", ports)?;
        sealed.refuses("plain/client", OF_PORTS)?;
        sealed.serves("mesh/client")?;
        sealed.told("server", "True", "accepted by ztunnel")?;
        sealed.apply("default", "{ portLevelMtls: { 8080: { mode: PERMISSIVE } } }")?;
        sealed.told("default", "False", "needs a selector")
    });
}

/// Connections to pods of node 2 that policy has denied.
fn denied(lab: &Lab) -> anyhow::Result<u64> {
    let metrics = lab.scrape(2, 15020, "/metrics")?;
    let lines = metrics.lines().filter(|line| {
        line.starts_with("istio_tcp_connections_failed_total{")
            && line.contains("response_flags=\"DENY\"")
            && line.contains("reporter=\"destination\"")
    });
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
}

/// Connections older than their pod's enrolment that the agent of node 2 has reset.
fn older_reset(lab: &Lab) -> anyhow::Result<u64> {
    let metrics = lab.scrape(2, 15014, "/metrics")?;
    let line = metrics.lines().find_map(|line| line.strip_prefix("ambit_agent_older_connections_reset "));
    Ok(line.context("no such metric")?.parse()?)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn plaintext_connections_that_were_open_before_strict_are_reset() {
    scenario(|lab| {
        let sealed = Sealed::new(lab)?;
        let address = format!("{}:{ECHO}", sealed.echo.address()?);
        let open = |client: &str| -> anyhow::Result<_> {
            let chat = lab.pod(client).spawn(["ambit-example", "hold", &address])?;
            chat.wait_for("ok 1", SOON)?;
            Ok(chat)
        };
        // Older than enrolment: the proxy never saw it.
        let mut older = open("plain/client")?;
        sealed.enrol()?;
        let mut carried = open("plain/client")?;
        let mut inside = open("mesh/client")?;
        anyhow::ensure!(older.runs()?, "it did not outlive enrolment: {}", older.output());
        let before = older_reset(lab)?;
        sealed.apply("default", "{ mtls: { mode: STRICT } }")?;
        for (what, chat) in [("older than enrolment", &mut older), ("by way of the proxy", &mut carried)] {
            eventually(&format!("the connection that is {what} is reset"), SOON, || {
                anyhow::ensure!(!chat.runs()?, "it goes on");
                anyhow::ensure!(chat.output().contains("reset by peer"), "{}", chat.output());
                Ok(())
            })?;
        }
        let rounds = inside.output().lines().count();
        eventually("mutual TLS goes on", SOON, || {
            anyhow::ensure!(inside.runs()?, "it was cut: {}", inside.output());
            anyhow::ensure!(inside.output().lines().count() > rounds + 5, "no progress after {rounds}");
            Ok(())
        })?;
        eventually("the agent counts the one that it has reset", SOON, || {
            let now = older_reset(lab)?;
            anyhow::ensure!(now == before + 1, "{before} before, now {now}");
            Ok(())
        })?;
        Ok(())
    });
}
