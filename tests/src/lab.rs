//! A running lab: the scenario builder, and what a scenario can do and see.

use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use tokio::runtime::Runtime;

use crate::api::{ApiServer, Credential};
use crate::capture::Capture;
use crate::cluster::{Cluster, Kind};
use crate::fabric::{self, Fabric};
use crate::kubelet::Kubelet;
use crate::netns::Netns;
use crate::node::Node;
use crate::run::Run;
use crate::sandbox::{Plan, Step};
use crate::stack::{Family, Stack};
use crate::{cgroup, controllers, dns, eventually, kube_proxy, shell, tools};

mod bootstrap;
mod pod_ref;

pub(crate) use pod_ref::is_ready;
pub use pod_ref::{Background, Held, PodRef, REDIRECTION};

/// How long the lab waits for pods, unless a scenario says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where the node agent has its metrics.
const AGENT_PORT: u16 = 15014;

/// Describes a lab before it starts.
#[derive(Clone, Debug)]
pub struct Builder {
    nodes: u8,
    mesh: bool,
    stack: Stack,
    variables: Vec<Variable>,
}

/// An environment variable of a daemon: `Deployment/ambit-ca`, its name and value.
type Variable = [String; 3];

/// A cluster in a box; dropping it removes everything.
pub struct Lab {
    kubelets: Vec<Arc<Kubelet>>,
    cluster: Arc<Cluster>,
    server: Arc<ApiServer>,
    fabric: Fabric,
    kubeconfig: PathBuf,
    runtime: Option<Runtime>,
    run: Run,
}

impl Builder {
    /// How many nodes, at most 9; 2 unless told otherwise.
    #[must_use]
    pub fn nodes(mut self, count: u8) -> Self {
        self.nodes = count.clamp(1, 9);
        self
    }

    /// The IP families of nodes, pods and Services; both unless told otherwise.
    #[must_use]
    pub fn stack(mut self, stack: Stack) -> Self {
        self.stack = stack;
        self
    }

    /// Install the mesh from `manifests/base` and wait until it is ready.
    #[must_use]
    pub fn mesh(mut self) -> Self {
        self.mesh = true;
        self
    }

    /// The same with an environment variable of a daemon, named as in `Deployment/ambit-ca`, as a kustomization of the
    /// user's would have it.
    #[must_use]
    pub fn mesh_with(mut self, daemon: &str, name: &str, value: &str) -> Self {
        self.variables.push([daemon, name, value].map(str::to_owned));
        self.mesh()
    }

    pub fn start(self) -> anyhow::Result<Lab> {
        log_to_stderr();
        let run = Run::begin()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("start the runtime")?;
        let inside = runtime.enter();
        let fabric = Fabric::create(&run, self.stack)?;
        let control = self.stack.families().iter().map(|family| fabric::control(*family));
        let mut listeners = Vec::new();
        for address in control.clone() {
            listeners.push(fabric.router.run(|| Ok(TcpListener::bind((address, 6443))?)).context("listen")?);
        }
        let for_host = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("https://{}", for_host.local_addr()?);
        listeners.push(for_host);
        let sans = control.map(|address| address.to_string()).collect();
        let server = Arc::new(ApiServer::start(listeners, sans, self.stack)?);
        let kubeconfig = run.directory().join("kubeconfig");
        std::fs::write(&kubeconfig, server.kubeconfig(&Credential::Admin, &url)?)?;

        let cluster = Arc::new(Cluster::new(server.clone()));
        bootstrap::services(&cluster, self.stack)?;
        for family in self.stack.families() {
            tokio::spawn(dns::run(dns::Sockets::bind(&fabric.router, *family)?, cluster.clone(), self.stack));
        }
        tokio::spawn(controllers::run(cluster.clone()));
        let mut kubelets = Vec::new();
        for index in 1..=self.nodes {
            let node = Arc::new(Node::create(&run, &fabric, index)?);
            bootstrap::node(&cluster, &node)?;
            tokio::spawn(kube_proxy::run(node.clone(), cluster.clone()));
            let kubelet = Arc::new(Kubelet::new(node, cluster.clone())?);
            tokio::spawn(kubelet.clone().run());
            kubelets.push(kubelet);
        }
        server.set_log_source(bootstrap::logs(&kubelets));
        drop(inside);
        let lab = Lab { kubelets, cluster, server, fabric, kubeconfig, runtime: Some(runtime), run };
        lab.start_outside()?;
        if self.mesh {
            lab.install_mesh_with(&self.variables)?;
        }
        Ok(lab)
    }
}

impl Lab {
    /// Two nodes, both IP families, no mesh.
    #[expect(clippy::new_ret_no_self, reason = "the scenario begins with Lab::new() and ends with start()")]
    #[must_use]
    pub fn new() -> Builder {
        Builder { nodes: 2, mesh: false, stack: Stack::Dual, variables: Vec::new() }
    }

    /// The name that everything of this run carries.
    #[must_use]
    pub fn name(&self) -> &str {
        self.run.name()
    }

    /// Files of this run; gone with it.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.run.directory()
    }

    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    #[must_use]
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// The API server, to delay watches or take it away.
    #[must_use]
    pub fn api(&self) -> &ApiServer {
        &self.server
    }

    #[must_use]
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// Node `index`, counted from 1.
    #[must_use]
    pub fn node(&self, index: u8) -> &Arc<Node> {
        self.kubelets[usize::from(index) - 1].node()
    }

    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.kubelets.iter().map(|kubelet| kubelet.node())
    }

    /// Run something asynchronous on the lab's runtime.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let runtime = self.runtime.as_ref().expect("taken only when the lab is dropped");
        runtime.block_on(future)
    }

    /// The stock `kubectl` with the lab's kubeconfig; its stdout.
    pub fn kubectl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> anyhow::Result<String> {
        self.kubectl_with_input(arguments, "")
    }

    pub fn kubectl_with_input<'a>(
        &self,
        arguments: impl IntoIterator<Item = &'a str>,
        input: &str,
    ) -> anyhow::Result<String> {
        let command = self.kubectl_command(arguments);
        let line = format!("{command:?}");
        shell::capture(command, input)?.ok(&line)
    }

    /// The same while the scenario goes on, for a watch.
    pub fn kubectl_in_background<'a>(
        &self,
        arguments: impl IntoIterator<Item = &'a str>,
    ) -> anyhow::Result<Background> {
        Background::start(self, self.kubectl_command(arguments))
    }

    fn kubectl_command<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(tools::kubectl());
        // A cache of discovery outside the run would outlive it.
        command.env("KUBECONFIG", &self.kubeconfig).env("KUBECACHEDIR", self.run.directory().join("kubectl"));
        command.args(arguments);
        command
    }

    /// `kubectl apply -f -`.
    pub fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        self.kubectl_with_input(["apply", "-f", "-"], yaml).map(drop)
    }

    /// `kubectl apply -k` of a directory below `manifests`.
    pub fn apply_manifests(&self, directory: &str) -> anyhow::Result<()> {
        let path = manifests().join(directory);
        self.kubectl(["apply", "-k", &path.to_string_lossy()]).map(drop)
    }

    /// Install the mesh and wait until every part of it is ready.
    pub fn install_mesh(&self) -> anyhow::Result<()> {
        self.install_mesh_with(&[])
    }

    fn install_mesh_with(&self, variables: &[Variable]) -> anyhow::Result<()> {
        let base = manifests().join("base");
        let up = "../".repeat(self.directory().components().count());
        let base = base.strip_prefix("/").unwrap_or(&base);
        let patches = variables.iter().map(|[daemon, name, value]| {
            let (kind, daemon) = daemon.split_once('/').unwrap_or_default();
            let add = json!([{
                "op": "add", "path": "/spec/template/spec/containers/0/env/-", "value": { "name": name, "value": value },
            }]);
            json!({ "target": { "kind": kind, "name": daemon }, "patch": add.to_string() })
        });
        let kustomization = json!({
            "resources": [format!("{up}{}", base.display())], "patches": patches.collect::<Vec<_>>(),
        });
        let directory = self.directory().join("mesh");
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join("kustomization.yaml"), kustomization.to_string())?;
        self.kubectl(["apply", "-k", &directory.to_string_lossy()])?;
        self.wait_ready("ambit-system")
    }

    /// Wait until all pods of a namespace that should run are ready, and as many as their owners want.
    pub fn wait_ready(&self, namespace: &str) -> anyhow::Result<()> {
        let what = format!("the pods of {namespace} are ready");
        eventually(&what, PATIENCE, || {
            let unready = self.unready(namespace);
            anyhow::ensure!(unready.is_empty(), "{}", unready.join(", "));
            Ok(())
        })
        .map_err(|error| error.context(self.story(namespace)))
    }

    fn unready(&self, namespace: &str) -> Vec<String> {
        let workloads = ["daemonsets.apps", "deployments.apps"];
        let mut unready: Vec<String> =
            workloads.iter().flat_map(|kind| self.cluster.unready_workloads(kind, namespace)).collect();
        let pods: Vec<Pod> = self.cluster.list(Kind::Pod);
        unready.extend(
            pods.iter()
                .filter(|pod| pod.metadata.namespace.as_deref() == Some(namespace))
                .filter(|pod| pod_ref::expected_ready(pod) && !pod_ref::is_ready(pod))
                .map(|pod| format!("pod {}", pod.metadata.name.as_deref().unwrap_or_default())),
        );
        unready
    }

    /// What happened in a namespace: for the text of a failure.
    #[must_use]
    pub fn story(&self, namespace: &str) -> String {
        let mut story = String::new();
        for line in self.cluster.events(namespace).iter().rev().take(20).rev() {
            story.push_str(&format!("event: {line}\n"));
        }
        for kubelet in &self.kubelets {
            let pods: Vec<_> = kubelet.pods().values().cloned().collect();
            for live in pods.iter().filter(|live| live.full_name().starts_with(&format!("{namespace}/"))) {
                let log = live.log_path(None).and_then(|path| std::fs::read_to_string(path).ok());
                let log = log.unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(15)..].join("\n    ");
                story.push_str(&format!(
                    "log of {} on {}:\n    {tail}\n",
                    live.full_name(),
                    kubelet.node().name()
                ));
            }
        }
        story
    }

    /// A pod by `namespace/name`, where the name may leave out what its owner appended.
    #[must_use]
    pub fn pod(&self, name: &str) -> PodRef<'_> {
        PodRef::new(self, name, None)
    }

    /// The pod of a daemon of the mesh on node `index`: `ztunnel` or `node-agent`.
    #[must_use]
    pub fn daemon(&self, name: &str, index: u8) -> PodRef<'_> {
        PodRef::new(self, &format!("ambit-system/{name}"), Some(index))
    }

    pub(crate) fn kubelets(&self) -> &[Arc<Kubelet>] {
        &self.kubelets
    }

    /// What a daemon of node `index` answers on its own loopback, e.g. on 15020 `/metrics`: the agent on 15014, else
    /// the ztunnel that takes new connections.
    pub fn scrape(&self, index: u8, port: u16, path: &str) -> anyhow::Result<String> {
        let daemon = self.daemon(if port == AGENT_PORT { "node-agent" } else { "ztunnel" }, index);
        daemon.scrape(port, path)
    }

    /// Capture the fabric from now on.
    pub fn capture(&self, name: &str) -> anyhow::Result<Capture> {
        Capture::start(&self.fabric.router, &self.run.directory().join(format!("{name}.pcap")))
    }

    /// A program on the host outside the cluster.
    pub fn outside(&self, program: &str) -> anyhow::Result<Command> {
        self.in_network(&self.fabric.outside, program)
    }

    /// A program of the host in a network of this run.
    fn in_network(&self, network: &Netns, program: &str) -> anyhow::Result<Command> {
        let mut plan = Plan::new();
        plan.step(Step::Cgroup(cgroup::procs(&self.run.cgroup().join("outside"))?));
        plan.step(Step::Enter(network.descriptor()?, nix::sched::CloneFlags::CLONE_NEWNET));
        let mut command = Command::new(program);
        plan.apply(&mut command);
        Ok(command)
    }

    /// The outside host answers HTTP on 80 and echoes on 7, over TCP and UDP.
    fn start_outside(&self) -> anyhow::Result<()> {
        let program = crate::rootfs::built_binaries()?.join("ambit-example");
        let program = program.to_string_lossy();
        for arguments in
            [vec!["serve", "--listen=[::]:80", "--name=outside"], vec!["echo", "--listen=[::]:7", "--udp"]]
        {
            let mut command = self.outside(&program)?;
            command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let _inside = self.runtime.as_ref().map(Runtime::enter);
            tokio::process::Command::from(command).spawn().context("start the outside host")?;
        }
        Ok(())
    }

    /// Create or change labels of a namespace, as `kubectl label --overwrite` does.
    pub fn label_namespace(&self, namespace: &str, label: &str) -> anyhow::Result<()> {
        self.kubectl(["label", "--overwrite", "namespace", namespace, label]).map(drop)
    }

    /// Create a namespace with labels.
    pub fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<()> {
        let labels: serde_json::Map<String, serde_json::Value> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        self.cluster.create(json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels },
        }))
    }

    /// The primary address of a Service.
    pub fn service_address(&self, namespace: &str, name: &str) -> anyhow::Result<IpAddr> {
        self.service_addresses(namespace, name)?.first().copied().context("it has no address")
    }

    /// A Service's address of a family.
    pub fn service_address_of(&self, family: Family, namespace: &str, name: &str) -> anyhow::Result<IpAddr> {
        let addresses = self.service_addresses(namespace, name)?;
        addresses
            .into_iter()
            .find(|ip| Family::of(*ip) == family)
            .with_context(|| format!("{namespace}/{name} has no {} address", family.as_str()))
    }

    /// All addresses of a Service, the primary one first.
    pub fn service_addresses(&self, namespace: &str, name: &str) -> anyhow::Result<Vec<IpAddr>> {
        let service: k8s_openapi::api::core::v1::Service =
            self.cluster.get(Kind::Service, namespace, name)?;
        let addresses = service.spec.and_then(|spec| spec.cluster_ips).unwrap_or_default();
        let parse = |ip: &String| ip.parse().with_context(|| format!("{namespace}/{name} is at {ip:?}"));
        addresses.iter().map(parse).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Nobody starts what the end of the run kills.
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        self.run.end();
    }
}

/// What the lab itself has to say: warnings, or what RUST_LOG asks for.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    // A second lab of the process finds it done.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// The project's manifests.
#[must_use]
pub fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests")
}
