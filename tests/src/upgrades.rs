//! Daemons replaced by rolling updates under load: how many connections were refused, reset or lost meanwhile.
//!
//! The load: on each of two nodes a client of echo servers on both, by address and by name. Connections that end at
//! once, streams that go on over several upgrades, and streams that go on over all of them, with bytes both ways.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use mesh_core::pod_protocol::VERSIONS;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cluster::Kind;
use crate::demo::progress;
use crate::example::dial::Dialled;
use crate::lab::{Background, Lab, PATIENCE, PodRef};
use crate::rootfs::built_binaries;
use crate::stack::Family;
use crate::workload::{self, Workload};
use crate::{eventually, shell};

const PORT: u16 = 7000;
const NODES: [u8; 2] = [1, 2];
const SYSTEM: &str = "ambit-system";
/// Where a pod says by which rolling update it came.
const ROLLOUT: &str = "lab.ambit/rollout";
/// Limits what a daemon speaks.
const PROTOCOL: &str = "AMBIT_POD_PROTOCOL";
/// Time for the first answer.
const SOON: Duration = Duration::from_secs(15);

#[derive(Debug, clap::Args)]
pub struct Config {
    /// How many rolling updates; each replaces the daemon of both nodes, by turns by one that speaks an older pod protocol
    /// and by one that speaks the newest.
    #[arg(long, default_value_t = 100)]
    count: u32,
    /// Of the agent instead of ztunnel, by turns to one of another map layout as well, and back.
    #[arg(long)]
    agent: bool,
    /// Print the result as one JSON object; progress goes to stderr.
    #[arg(long)]
    json: bool,
}

/// The agent whose maps look otherwise (`cargo xtask ebpf --other-layout`).
pub const OTHER_AGENT: &str = "node-agent-other-layout";

/// What the upgrades did to the load.
#[derive(Debug, Default, Serialize)]
pub struct Toll {
    pub upgrades: u32,
    pub seconds: f64,
    /// Connections that made one round trip.
    pub short: Dialled,
    /// Streams that went on over several upgrades.
    pub streams: Dialled,
    /// Streams that went on over all of them.
    pub throughout: Dialled,
}

impl Toll {
    /// Whether nobody noticed anything.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        [&self.short, &self.streams, &self.throughout].iter().all(|dialled| dialled.failed() == 0)
    }
}

impl std::fmt::Display for Toll {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} upgrades in {:.0} s", self.upgrades, self.seconds)?;
        for (what, dialled) in [
            ("short connections", &self.short),
            ("streams over several upgrades", &self.streams),
            ("streams over all of them", &self.throughout),
        ] {
            let Dialled { done, refused, reset, lost, other, longest_ms } = dialled;
            write!(formatter, "\n{done} {what}: {refused} refused, {reset} reset, {lost} lost")?;
            if !other.is_empty() {
                write!(formatter, ", {other:?}")?;
            }
            write!(formatter, ", longest wait {longest_ms} ms")?;
        }
        Ok(())
    }
}

/// What a client does: how many at a time, how long each lasts, bytes of a round trip, milliseconds between two.
struct Manner {
    parallel: u32,
    last: Duration,
    bytes: u32,
    every_ms: u32,
}

/// Makes a round trip and ends.
const SHORT: Manner = Manner { parallel: 4, last: Duration::ZERO, bytes: 4, every_ms: 20 };
/// Goes on over several upgrades of a node, which take more than a second each.
const STREAM: Manner = Manner { parallel: 4, last: Duration::from_secs(5), bytes: 32_768, every_ms: 50 };
/// Is told when to end.
const THROUGHOUT: Manner = Manner { parallel: 3, last: Duration::MAX, bytes: 1000, every_ms: 100 };

/// The pods of the load.
pub struct Stage<'a> {
    lab: &'a Lab,
    clients: Vec<PodRef<'a>>,
    targets: Vec<String>,
}

impl<'a> Stage<'a> {
    /// Make a namespace in the mesh with the pods in it.
    pub fn set(lab: &'a Lab, namespace: &str) -> anyhow::Result<Self> {
        lab.namespace(namespace, &[("istio.io/dataplane-mode", "ambient")])?;
        workload::service_account(lab, namespace, "echo")?;
        workload::service(lab, namespace, "echo", PORT, PORT)?;
        let mut targets = vec![format!("echo:{PORT}")];
        let mut clients = Vec::new();
        for node in NODES {
            let echo = Workload::new(namespace, &format!("echo-{node}")).echo().label("app", "echo");
            let echo = echo.service_account("echo").on_node(node).start(lab)?;
            targets.push(format!("{}:{PORT}", echo.address_of(Family::V4)?));
            targets.push(format!("[{}]:{PORT}", echo.address_of(Family::V6)?));
            let client = Workload::new(namespace, &format!("client-{node}")).on_node(node).start(lab)?;
            for pod in [&echo, &client] {
                pod.captured()?;
            }
            clients.push(client);
        }
        Ok(Self { lab, clients, targets })
    }

    /// Put the pods under load, have `upgrade` done so many times, and see what came of the load.
    pub fn suffer(&self, count: u32, upgrade: impl Fn(u32) -> anyhow::Result<()>) -> anyhow::Result<Toll> {
        let [short, streams, throughout] = [SHORT, STREAM, THROUGHOUT].map(|manner| self.load(&manner));
        let (short, streams, throughout) = (short?, streams?, throughout?);
        let began = Instant::now();
        for number in 1..=count {
            upgrade(number)?;
        }
        let seconds = began.elapsed().as_secs_f64();
        Ok(Toll {
            upgrades: count,
            seconds,
            short: counted(short)?,
            streams: counted(streams)?,
            throughout: counted(throughout)?,
        })
    }

    fn load(&self, manner: &Manner) -> anyhow::Result<Vec<Background>> {
        let mut load = Vec::new();
        for client in &self.clients {
            let last = u64::try_from(manner.last.as_millis()).unwrap_or(u64::MAX);
            let line = [
                "ambit-example".to_owned(),
                "dial".to_owned(),
                format!("--parallel={}", manner.parallel),
                format!("--last-ms={last}"),
                format!("--bytes={}", manner.bytes),
                format!("--every-ms={}", manner.every_ms),
            ];
            load.push(client.spawn(line.iter().chain(&self.targets).map(String::as_str))?);
        }
        for one in &load {
            one.wait_for("answered", SOON)?;
        }
        Ok(load)
    }

    /// Roll a daemon out anew, as a changed template does, and wait until the new one runs on each node and the old
    /// one is asked to end.
    pub fn roll(&self, daemon: &str, template: Value) -> anyhow::Result<()> {
        let number = format!("{:016x}", rand::random::<u64>());
        let mut patch = json!({ "spec": { "template": template } });
        patch["spec"]["template"]["metadata"]["annotations"][ROLLOUT] = json!(number);
        self.lab.cluster().patch(Kind::DaemonSet, SYSTEM, daemon, patch)?;
        eventually(&format!("{daemon} is rolled out"), PATIENCE, || {
            let live =
                pods(self.lab, daemon).into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
            let new = |pod: &Pod| {
                let annotations = pod.metadata.annotations.as_ref();
                annotations.and_then(|annotations| annotations.get(ROLLOUT)) == Some(&number)
            };
            let (new, old): (Vec<Pod>, Vec<Pod>) = live.partition(new);
            let ready = new.iter().filter(|pod| crate::lab::is_ready(pod)).count();
            anyhow::ensure!(
                ready == NODES.len() && old.is_empty(),
                "{ready} new ones, {} old ones",
                old.len()
            );
            Ok(())
        })
        .map_err(|error| error.context(self.lab.story(SYSTEM)))
    }

    /// A daemon's template with another program, and no newer version of the pod protocol than this.
    pub fn variant(&self, daemon: &str, program: &str, protocol: u32) -> anyhow::Result<Value> {
        let set: Value = self.lab.cluster().get(Kind::DaemonSet, SYSTEM, daemon)?;
        let mut containers = set["spec"]["template"]["spec"]["containers"].clone();
        containers[0]["command"][0] = json!(program);
        let variables = containers[0]["env"].as_array_mut().context("no variables")?;
        variables.retain(|variable| variable["name"] != PROTOCOL);
        variables.push(json!({ "name": PROTOCOL, "value": protocol.to_string() }));
        Ok(json!({ "spec": { "containers": containers } }))
    }

    /// What each ztunnel that drains tells of its connections.
    pub fn draining(&self) -> anyhow::Result<Vec<Value>> {
        let mut all = Vec::new();
        for pod in leaving(self.lab, "ztunnel") {
            let name = pod.metadata.name.unwrap_or_default();
            let Ok(dump) = self.lab.pod(&format!("{SYSTEM}/{name}")).scrape(15000, "/config_dump") else {
                // It has just ended.
                continue;
            };
            all.push(serde_json::from_str(&dump).context("a dump")?);
        }
        Ok(all)
    }

    /// Wait until each replaced one has ended, as it does when its last connection is over.
    pub fn nobody_drains(&self, daemon: &str) -> anyhow::Result<()> {
        eventually(&format!("each replaced {daemon} ends"), PATIENCE, || {
            let left = leaving(self.lab, daemon).len();
            anyhow::ensure!(left == 0, "{left} are left");
            Ok(())
        })
    }
}

fn pods(lab: &Lab, daemon: &str) -> Vec<Pod> {
    let mut pods: Vec<Pod> = lab.cluster().list(Kind::Pod);
    pods.retain(|pod| {
        let labels = pod.metadata.labels.as_ref();
        pod.metadata.namespace.as_deref() == Some(SYSTEM)
            && labels.and_then(|labels| labels.get("app")).is_some_and(|app| app == daemon)
    });
    pods
}

fn leaving(lab: &Lab, daemon: &str) -> Vec<Pod> {
    pods(lab, daemon).into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_some()).collect()
}

/// Both nodes' counts; what failed or was slow is told.
pub fn counted(load: Vec<Background>) -> anyhow::Result<Dialled> {
    let mut sum = Dialled::default();
    for mut one in load {
        anyhow::ensure!(one.runs()?, "the load ended early: {}", one.output());
        let output: shell::Output = one.finish()?;
        let output = output.ok("dial")?;
        let (counts, told): (Vec<&str>, Vec<&str>) = output.lines().partition(|line| line.starts_with('{'));
        for line in told.iter().filter(|line| **line != "answered").take(50) {
            progress(line);
        }
        let dialled: Dialled = serde_json::from_str(counts.last().context("no counts")?)?;
        anyhow::ensure!(dialled.done > 0, "there was no load: {dialled:?}");
        sum = sum.and(dialled);
    }
    Ok(sum)
}

/// Exit code 1 if anybody noticed anything.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let missing = config.agent && !built_binaries()?.join(OTHER_AGENT).is_file();
    anyhow::ensure!(!missing, "there is no {OTHER_AGENT}; `cargo xtask ebpf --other-layout` builds it");
    progress("starting a cluster of two nodes with the mesh");
    let lab = Lab::new().nodes(2).mesh().start()?;
    let stage = Stage::set(&lab, "upgrades")?;
    let daemon = if config.agent { "node-agent" } else { "ztunnel" };
    let toll = stage.suffer(config.count, |number| {
        if number == 1 || number % 10 == 0 {
            progress(&format!("{daemon}, rolling update {number} of {}", config.count));
        }
        let (program, protocol) = match (config.agent, number % 2) {
            (false, 1) => ("ztunnel", *VERSIONS.start()),
            (false, _) => ("ztunnel", *VERSIONS.end()),
            (true, 1) => (OTHER_AGENT, *VERSIONS.start()),
            (true, _) => ("node-agent", *VERSIONS.end()),
        };
        stage.roll(daemon, stage.variant(daemon, program, protocol)?)
    })?;
    stage.nobody_drains(daemon)?;
    if config.json {
        println!("{}", serde_json::to_string(&toll)?);
    } else {
        println!("{toll}");
    }
    Ok(if toll.is_nothing() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
