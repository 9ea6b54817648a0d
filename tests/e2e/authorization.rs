//! AuthorizationPolicy as its users write it: who is refused, by which policy, and what both ends say of it.

use mesh_tests::lab::PodRef;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};
use serde_json::Value;

use crate::fixture::{ECHO, HTTP, SOON, log_end, log_line};
use crate::shared::scenario;

const NAMESPACE: &str = "ruled";
/// Proves to be mesh/client.
const CLIENT: &str = "mesh/client";
/// Proves to be mesh/web.
const WEB: &str = "mesh/near";
const OUTSIDE: &str = "plain/client";

/// A server with the label app=server and an echo server, on node 2; the clients are on node 1.
struct Ruled<'a> {
    lab: &'a Lab,
    server: PodRef<'a>,
    echo: PodRef<'a>,
}

impl<'a> Ruled<'a> {
    fn new(lab: &'a Lab) -> anyhow::Result<Self> {
        lab.apply("apiVersion: v1\nkind: Namespace\nmetadata: { name: istio-system }\n")?;
        lab.namespace(NAMESPACE, &[("istio.io/dataplane-mode", "ambient")])?;
        let unprobed = "/spec/containers/0/readinessProbe";
        let server = Workload::new(NAMESPACE, "server").serve().with(unprobed, Value::Null);
        let echo = Workload::new(NAMESPACE, "echo").echo().with(unprobed, Value::Null);
        let (server, echo) = (server.on_node(2).start(lab)?, echo.on_node(2).start(lab)?);
        server.captured()?;
        echo.captured()?;
        Ok(Self { lab, server, echo })
    }

    fn apply(&self, namespace: &str, name: &str, spec: &str) -> anyhow::Result<()> {
        self.lab.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{ name: {name}, namespace: {namespace} }}\nspec: {spec}\n"
        ))
    }

    /// There is one Event on the server for each of these clients, and none for others.
    fn told(&self, clients: &[&str]) -> anyhow::Result<()> {
        let fields = "--field-selector=reason=PolicyDenied,involvedObject.name=server";
        eventually("their Events", SOON, || {
            let template = "-ojsonpath={range .items[*]}{.message}{\"\\n\"}{end}";
            let events = self.lab.kubectl(["get", "events", "-n", NAMESPACE, fields, template])?;
            let lines: Vec<&str> = events.lines().collect();
            let one = |client: &&str| {
                lines.iter().filter(|line| line.contains(&format!("refused {client} "))).count() == 1
            };
            anyhow::ensure!(lines.len() == clients.len() && clients.iter().all(one), "{lines:?}");
            Ok(())
        })
    }

    fn delete(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        self.lab.kubectl(["delete", "-n", namespace, "authorizationpolicy", name]).map(drop)
    }

    /// Which of the clients the server answers becomes this.
    fn serves(&self, expected: &[&str]) -> anyhow::Result<()> {
        let url = format!("http://{}:{HTTP}/", self.server.address()?);
        for client in [CLIENT, WEB, OUTSIDE] {
            let (pod, served) = (self.lab.pod(client), expected.contains(&client));
            eventually(&format!("{client} is served: {served}"), SOON, || {
                let answer = pod.exec(["curl", "-sS", "--max-time", "5", &url])?;
                anyhow::ensure!(answer.success() == served, "{answer:?}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// A client becomes refused for this reason.
    fn refused_soon(&self, client: &str, reason: &str) -> anyhow::Result<()> {
        eventually(&format!("{client} is refused: {reason}"), SOON, || self.refused(client, reason))
    }

    /// A client is refused for this reason, which the server's node logs, and the client's node if it is in the mesh.
    fn refused(&self, client: &str, reason: &str) -> anyhow::Result<()> {
        let (here, there) = (log_end(self.lab, 1)?, log_end(self.lab, 2)?);
        let pod = self.lab.pod(client);
        let url = format!("http://{}:{HTTP}/", self.server.address()?);
        let answer = pod.exec(["curl", "-sS", "--max-time", "5", &url])?;
        anyhow::ensure!(!answer.success(), "{client} is served: {answer:?}");
        let source = pod.address()?.to_string();
        log_line(self.lab, 2, there, &["inbound", &source, reason])?;
        if client != OUTSIDE {
            log_line(self.lab, 1, here, &["outbound", &source, reason])?;
        }
        Ok(())
    }
}

impl Drop for Ruled<'_> {
    fn drop(&mut self) {
        let _ = self.lab.kubectl(["delete", "-n", "istio-system", "authorizationpolicy", "--all"]);
        let _ = self.lab.kubectl(["delete", "namespace", NAMESPACE]);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn policies_let_in_and_refuse_and_both_ends_say_which() {
    scenario(|lab| {
        let ruled = Ruled::new(lab)?;
        ruled.serves(&[CLIENT, WEB, OUTSIDE])?;
        let server = "selector: { matchLabels: { app: server } }";
        // Whoever is not allowed by one is refused.
        let principal = "rules: [{ from: [{ source: { principals: [cluster.local/ns/mesh/sa/client] } }] }]";
        ruled.apply(NAMESPACE, "clients", &format!("{{ {server}, {principal} }}"))?;
        ruled.serves(&[CLIENT])?;
        ruled.refused(WEB, "policy ruled/clients does not allow it")?;
        ruled
            .refused(OUTSIDE, "policy ruled/clients does not allow it; the client did not use mutual TLS")?;
        let outside = lab.pod(OUTSIDE).address()?.to_string();
        ruled.told(&["spiffe://cluster.local/ns/mesh/sa/web", &outside])?;
        // Several add up, the namespace's own without a selector, too.
        ruled.apply(
            NAMESPACE,
            "web",
            "{ rules: [{ from: [{ source: { serviceAccounts: [mesh/web] } }] }] }",
        )?;
        ruled.serves(&[CLIENT, WEB])?;
        // DENY goes before ALLOW, the mesh's before nobody's.
        let deny = format!(
            "{{ {server}, action: DENY, rules: [{{ from: [{{ source: {{ namespaces: [other] }} }}] }}, \
             {{ from: [{{ source: {{ notPrincipals: [\"*/sa/web\"] }} }}], to: [{{ operation: {{ ports: [\"{HTTP}\"] }} }}] }}] }}"
        );
        ruled.apply("istio-system", "deny", &deny)?;
        ruled.serves(&[WEB])?;
        ruled.refused(CLIENT, "policy istio-system/deny denies it by its rule 1")?;
        let metrics = lab.scrape(2, 15020, "/metrics")?;
        let counted = metrics.lines().any(|line| {
            line.starts_with("istio_tcp_connections_failed_total")
                && line.contains("response_flags=\"DENY\"")
                && line.contains("destination_workload=\"server\"")
        });
        anyhow::ensure!(counted, "{metrics}");
        ruled.delete("istio-system", "deny")?;
        ruled.serves(&[CLIENT, WEB])?;
        // From some pods to all of the namespace: nobody who is refused gets in while it changes.
        ruled.delete(NAMESPACE, "web")?;
        ruled.serves(&[CLIENT])?;
        ruled.apply(NAMESPACE, "clients", &format!("{{ selector: null, {principal} }}"))?;
        ruled.serves(&[CLIENT])?;
        ruled.delete(NAMESPACE, "clients")?;
        ruled.serves(&[CLIENT, WEB, OUTSIDE])
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_needs_a_request_refuses_and_the_agent_says_so() {
    scenario(|lab| {
        let ruled = Ruled::new(lab)?;
        let methods = "to: [{ operation: { methods: [GET], paths: [/api/v1/accounts/*] } }]";
        ruled.apply(NAMESPACE, "get", &format!("{{ action: ALLOW, rules: [{{ {methods} }}] }}"))?;
        ruled.refused_soon(CLIENT, "policy ruled/get does not allow it")?;
        ruled.apply(NAMESPACE, "get", &format!("{{ action: DENY, rules: [{{ {methods} }}] }}"))?;
        ruled.refused_soon(CLIENT, "policy ruled/get denies it by its rule 0")?;
        let log = lab.daemon("node-agent", 2).logs()?;
        let said =
            ["ruled/get", "spec.rules[0].to[0].operation.methods cannot be decided without a waypoint"];
        anyhow::ensure!(log.lines().any(|line| said.iter().all(|text| line.contains(text))), "{log}");
        // So does the policy itself, which some agent has written.
        let status = |wanted: &str| {
            eventually("the policy's status says what became of it", SOON, || {
                let path = "-ojsonpath={.status.conditions[?(@.type==\"ZtunnelAccepted\")]}";
                let status = lab.kubectl(["get", "-n", NAMESPACE, "authorizationpolicy", "get", path])?;
                anyhow::ensure!(status.contains(wanted), "{status}");
                Ok(())
            })
        };
        status("spec.rules[0].to[0].operation.methods cannot be decided without a waypoint")?;
        // What a waypoint is to enforce is nothing to a proxy at layer 4.
        ruled.apply(NAMESPACE, "get", &format!(
            "{{ action: DENY, targetRefs: [{{ kind: Service, group: \"\", name: server }}], rules: [{{ {methods} }}] }}"
        ))?;
        ruled.serves(&[CLIENT, WEB, OUTSIDE])?;
        status("enforced by nobody")
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_policy_on_trial_refuses_nobody_and_the_log_says_whom_it_would() {
    scenario(|lab| {
        let ruled = Ruled::new(lab)?;
        lab.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{ name: trial, namespace: {NAMESPACE}, annotations: {{ istio.io/dry-run: \"true\" }} }}\n\
             spec: {{ rules: [{{ from: [{{ source: {{ principals: [\"*/sa/client\"] }} }}] }}] }}\n"
        ))?;
        let verdict = "dry_run=policy ruled/trial does not allow it";
        let source = lab.pod(WEB).address()?.to_string();
        eventually("the trial has begun", SOON, || {
            let end = log_end(lab, 2)?;
            ruled.serves(&[CLIENT, WEB, OUTSIDE])?;
            let log = lab.daemon("ztunnel", 2).logs()?;
            let new: Vec<&str> =
                log[end..].lines().filter(|line| line.contains("connection complete")).collect();
            let by = |text: &str| new.iter().filter(|line| line.contains(text)).count();
            anyhow::ensure!(by(verdict) == 2, "{new:?}");
            anyhow::ensure!(
                new.iter().any(|line| line.contains(&source) && line.contains(verdict)),
                "{new:?}"
            );
            Ok(())
        })
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn open_connections_that_a_policy_does_not_allow_any_more_are_cut() {
    scenario(|lab| {
        let ruled = Ruled::new(lab)?;
        let address = format!("{}:{ECHO}", ruled.echo.address()?);
        let open = |client: &str| -> anyhow::Result<_> {
            let chat = lab.pod(client).spawn(["ambit-example", "hold", &address])?;
            chat.wait_for("ok 1", SOON)?;
            Ok(chat)
        };
        let (mut client, mut web, mut outside) = (open(CLIENT)?, open(WEB)?, open(OUTSIDE)?);
        let end = log_end(lab, 2)?;
        ruled.apply(
            NAMESPACE,
            "clients",
            "{ rules: [{ from: [{ source: { principals: [\"*/sa/client\"] } }] }] }",
        )?;
        for (who, chat) in [(WEB, &mut web), (OUTSIDE, &mut outside)] {
            eventually(&format!("the connection of {who} is cut"), SOON, || {
                anyhow::ensure!(!chat.runs()?, "it goes on");
                Ok(())
            })?;
        }
        log_line(lab, 2, end, &["inbound", "policy has changed: policy ruled/clients does not allow it"])?;
        anyhow::ensure!(client.runs()?, "what is allowed was cut: {}", client.output());
        Ok(())
    });
}
