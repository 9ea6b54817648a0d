//! The agent's xDS over the network, asked by a client of others' making (`xds_client.py`) with real tokens.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use mesh_tests::cluster::Kind;
use mesh_tests::lab::Background;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually, tools};
use serde_json::{Value, json};

use crate::ca::{AUDIENCE, token};
use crate::fixture::{HTTP, SOON};
use crate::shared::scenario;

const PORT: u16 = 15012;
const WEB: &str = "mesh/web.mesh.svc.cluster.local";

/// The client, in the network of a pod outside the mesh, which asks the agent of node 1.
struct Client {
    program: Background,
}

impl Client {
    /// `state`: what it holds, by a name of its own.
    fn start(lab: &Lab, token: &str, state: &str, more: &[&str]) -> anyhow::Result<Self> {
        let server = SocketAddr::new(lab.node(1).address(), PORT);
        Self::start_at(lab, server, token, state, more)
    }

    fn start_at(
        lab: &Lab,
        server: SocketAddr,
        token: &str,
        state: &str,
        more: &[&str],
    ) -> anyhow::Result<Self> {
        for node in [1, 2] {
            eventually(&format!("the agent of n{node} serves"), SOON, || {
                let serves = lab.daemon("node-agent", node).logs()?.contains("serving xDS to proxies");
                serves.then_some(()).context("it does not say so")
            })?;
        }
        let root = lab.directory().join("mesh-root.pem");
        let map: k8s_openapi::api::core::v1::ConfigMap =
            lab.cluster().get(Kind::ConfigMap, "ambit-system", "ambit-ca-root-cert")?;
        std::fs::write(&root, map.data.context("no roots")?.remove("root-cert.pem").context("no roots")?)?;
        let mut command = lab.pod("plain/client").beside("/usr/bin/python3")?;
        command.env("PYTHONPATH", tools::directory().join("pypi")).arg("-B");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/xds_client.py"));
        command.args(["--server", &server.to_string(), "--name", "node-agent.ambit-system.svc"]);
        command.arg("--root").arg(root).arg("--state").arg(held(lab, state));
        command.args(["--token", token]).args(more);
        Ok(Self { program: Background::start(lab, command)? })
    }

    /// The lines so far; of one that is being written, nothing.
    fn lines(&self) -> anyhow::Result<Vec<Value>> {
        let output = self.program.output();
        let whole = output.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("it says {output}")))
            .collect()
    }

    /// The first line of which this holds.
    fn line(&self, what: &str, holds: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        eventually(what, SOON, || {
            let lines = self.lines()?;
            lines.iter().find(|line| holds(line)).cloned().with_context(|| format!("{lines:?}"))
        })
    }

    /// Its first response.
    fn first(&self) -> anyhow::Result<Value> {
        self.line("the first response", |_| true)
    }

    /// A later one that has this resource.
    fn told(&self, name: &str) -> anyhow::Result<Value> {
        let line = self.line(&format!("{name} is told"), |line| line["resources"].get(name).is_some())?;
        Ok(line["resources"][name].clone())
    }
}

fn held(lab: &Lab, state: &str) -> PathBuf {
    lab.directory().join(format!("xds-client-{state}"))
}

fn uid(pod: &str) -> String {
    format!("Kubernetes//Pod/{pod}")
}

fn ztunnels(lab: &Lab) -> anyhow::Result<String> {
    token(lab, "ambit-system", "ztunnel", &lab.daemon("ztunnel", 1).name()?, AUDIENCE)
}

/// Address as the wire has it, in hexadecimal.
fn wire(ip: std::net::IpAddr) -> Value {
    let octets = match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    json!(octets.iter().map(|octet| format!("{octet:02x}")).collect::<String>())
}

/// Somebody without a good token asks the agent of node 1.
pub(crate) fn a_stranger(lab: &Lab) -> anyhow::Result<()> {
    let line = Client::start(lab, "x.y.z", "stranger", &[])?.first()?;
    anyhow::ensure!(line["ended"] == "UNAUTHENTICATED", "{line}");
    Ok(())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_client_of_others_making_follows_the_mesh() {
    scenario(|lab| {
        let client = Client::start(lab, &ztunnels(lab)?, "follows", &[])?;
        let first = client.first()?;
        let far = lab.pod("mesh/far");
        let told = &first["resources"][uid("mesh/far")];
        let addresses: Vec<Value> = far.addresses()?.into_iter().map(wire).collect();
        assert_eq!(told["addresses"], json!(addresses), "{first}");
        assert_eq!((&told["tunnel"], &told["service_account"]), (&json!(1), &json!("web")), "{told}");
        // Other scenarios have services of it as well.
        let services = told["services"].as_array().cloned().unwrap_or_default();
        assert!(told["node"] == "n2" && services.contains(&json!(WEB)), "{told}");
        assert_eq!(first["resources"][uid("plain/server")]["tunnel"], json!(0), "it is outside the mesh");
        let service = &first["resources"][WEB];
        assert_eq!(service["ports"], json!([[80, HTTP]]), "{service}");
        let vips: Vec<Value> = lab.service_addresses("mesh", "web")?.into_iter().map(wire).collect();
        assert_eq!(service["addresses"], json!(vips));

        let late = Workload::new("mesh", "late").on_node(2).start(lab)?;
        late.captured()?;
        let late = uid("mesh/late");
        client.line("the new pod is captured", |line| line["resources"][&late]["tunnel"] == json!(1))?;
        assert_eq!(client.told(&late)?["workload"], json!("late"));
        lab.kubectl(["delete", "pod", "-n", "mesh", "late"])?;
        client.line("the pod is gone", |line| line["removed"] == json!([late]))?;

        // Away, and back: it is told of what has changed, and of what has gone.
        Workload::new("mesh", "gone").on_node(2).start(lab)?;
        client.told(&uid("mesh/gone"))?;
        drop(client);
        lab.kubectl(["delete", "pod", "-n", "mesh", "gone"])?;
        Workload::new("mesh", "new").on_node(2).start(lab)?.captured()?;
        let client = Client::start(lab, &ztunnels(lab)?, "follows", &[])?;
        client.told(&uid("mesh/new"))?;
        client.line("what has gone", |line| line["removed"] == json!([uid("mesh/gone")]))?;
        let again: Vec<_> =
            client.lines()?.iter().filter_map(|line| line["resources"].get(WEB)).cloned().collect();
        assert!(again.is_empty(), "it was told of what it holds: {again:?}");
        lab.kubectl(["delete", "pod", "-n", "mesh", "new"]).map(drop)
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_a_client_refuses_is_logged_and_the_rest_goes_on() {
    scenario(|lab| {
        let log = || lab.daemon("node-agent", 1).logs();
        let end = log()?.len();
        let refused = uid("mesh/refused");
        let client = Client::start(lab, &ztunnels(lab)?, "refuses", &["--refuse", &refused])?;
        client.first()?;
        Workload::new("mesh", "refused").on_node(2).start(lab)?;
        client.line("it refuses", |line| line["refused"] == json!([refused]))?;
        eventually("the agent says so", SOON, || {
            let log = log()?;
            let new = log.get(end..).unwrap_or_default();
            let line = new.lines().find(|line| line.contains("refused resources"));
            let line = line.with_context(|| format!("it says {new}"))?;
            anyhow::ensure!(line.contains(&refused) && line.contains("not this one"), "{line}");
            Ok(())
        })?;
        lab.kubectl(["delete", "pod", "-n", "mesh", "refused"])?;
        client.line("the pod is gone", |line| line["removed"] == json!([refused])).map(drop)
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn others_are_told_of_their_namespace_alone() {
    scenario(|lab| {
        let own = token(lab, "plain", "default", "client", AUDIENCE)?;
        // By the Service: any agent will do.
        let service = SocketAddr::new(lab.service_address("ambit-system", "node-agent")?, PORT);
        let client = Client::start_at(lab, service, &own, "scoped", &[])?;
        let first = client.first()?;
        let told = first["resources"].as_object().context("no resources")?;
        assert!(
            told.contains_key(&uid("plain/client")) && told.contains_key(&uid("plain/server")),
            "{told:?}"
        );
        assert!(told.values().all(|resource| resource["namespace"] == "plain"), "{told:?}");
        Workload::new("mesh", "unheard").on_node(2).start(lab)?;
        Workload::new("plain", "heard").on_node(2).start(lab)?;
        client.told(&uid("plain/heard"))?;
        let told = client.lines()?;
        assert!(!told.iter().any(|line| line.to_string().contains("unheard")), "{told:?}");
        lab.kubectl(["delete", "pod", "-n", "mesh", "unheard"])?;
        lab.kubectl(["delete", "pod", "-n", "plain", "heard"]).map(drop)
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn clients_that_prove_nothing_are_told_nothing() {
    scenario(|lab| {
        let for_api = token(lab, "mesh", "client", "client", None)?;
        let second = token(lab, "ambit-system", "ztunnel", &lab.daemon("ztunnel", 2).name()?, AUDIENCE)?;
        for (what, token, code, reason) in [
            ("none", "", "UNAUTHENTICATED", "no token"),
            ("nonsense", "x.y.z", "UNAUTHENTICATED", "does not accept"),
            ("another audience's", for_api.as_str(), "UNAUTHENTICATED", "audience"),
            ("another node's", second.as_str(), "PERMISSION_DENIED", "pod is on n2"),
        ] {
            let client = Client::start(lab, token, "nothing", &[])?;
            let line = client.first()?;
            assert_eq!(line["ended"], code, "{what}: {line}");
            assert!(line["reason"].as_str().is_some_and(|text| text.contains(reason)), "{what}: {line}");
        }
        Ok(())
    });
}
