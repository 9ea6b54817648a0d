//! PeerAuthentication as its users write it: who is refused, who is served, and which open connections have to go.

use mesh_tests::lab::PodRef;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};
use serde_json::Value;

use crate::fixture::{ECHO, HTTP, SOON, log_end, log_line};
use crate::shared::scenario;

const NAMESPACE: &str = "sealed";

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

    fn url(&self) -> anyhow::Result<String> {
        Ok(format!("http://{}:{HTTP}/", self.server.address()?))
    }

    /// Whether a pod's request is answered becomes this.
    fn answers(&self, client: &str, expected: bool) -> anyhow::Result<()> {
        let (pod, url) = (self.lab.pod(client), self.url()?);
        eventually(&format!("{client} is served: {expected}"), SOON, || {
            let answer = pod.exec(["curl", "-sS", "--max-time", "5", &url])?;
            anyhow::ensure!(answer.success() == expected, "{answer:?}");
            // Curl calls it a failure to connect (7) where the reset is there before connect() returns.
            let reset = answer.stderr.contains("reset by peer") || answer.stderr.contains("curl: (7)");
            anyhow::ensure!(expected || reset, "{answer:?}");
            Ok(())
        })
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
        sealed.answers("plain/client", true)?;
        let end = log_end(lab, 2)?;
        sealed.apply("default", "{ mtls: { mode: STRICT } }")?;
        sealed.answers("plain/client", false)?;
        let source = lab.pod("plain/client").address()?.to_string();
        let reason = "policy istio-system/istio_converted_static_strict denies it";
        log_line(lab, 2, end, &["inbound", &source, reason, "did not use mutual TLS"])?;
        let metrics = lab.scrape(2, 15020, "/metrics")?;
        let counted = metrics.lines().any(|line| {
            line.starts_with("istio_tcp_connections_failed_total")
                && line.contains("response_flags=\"DENY\"")
                && line.contains("reporter=\"destination\"")
        });
        assert!(counted, "{metrics}");
        sealed.answers("mesh/client", true)?;
        // Other namespaces are not concerned.
        let far = format!("http://{}:{HTTP}/", lab.pod("mesh/far").address()?);
        lab.pod("plain/client").curl(&far)?;
        // A policy that selects the pod goes before the namespace's, which goes before the mesh's.
        let one = "{ selector: { matchLabels: { app: server } }, mtls: { mode: PERMISSIVE } }";
        sealed.apply("server", one)?;
        sealed.answers("plain/client", true)?;
        lab.kubectl(["delete", "-n", NAMESPACE, "peerauthentication", "server"])?;
        sealed.answers("plain/client", false)?;
        sealed.apply("default", "{ mtls: { mode: UNSET } }")?;
        sealed.answers("plain/client", true)?;
        let ports =
            "{ selector: { matchLabels: { app: server } }, portLevelMtls: { 8080: { mode: STRICT } } }";
        sealed.apply("server", ports)?;
        sealed.answers("plain/client", false)?;
        sealed.answers("mesh/client", true)
    });
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
        sealed.apply("default", "{ mtls: { mode: STRICT } }")?;
        for (what, chat) in [("older than enrolment", &mut older), ("by way of the proxy", &mut carried)] {
            eventually(&format!("the connection that is {what} is reset"), SOON, || {
                anyhow::ensure!(!chat.runs()?, "it goes on");
                anyhow::ensure!(chat.output().contains("reset by peer"), "{}", chat.output());
                Ok(())
            })?;
        }
        anyhow::ensure!(inside.runs()?, "mutual TLS was cut: {}", inside.output());
        let reset = lab.scrape(2, 15014, "/metrics")?;
        assert!(reset.contains("ambit_agent_older_connections_reset 1"), "{reset}");
        Ok(())
    });
}
