//! One address that pods of changing identities take from each other, while clients go on calling each by its Service.
//!
//! A client knows whom it means: a call to the Service `one` says so in its path, and `one` has to answer. What was
//! answered by another, and what another was asked, is told in full.
//!
//! The agents hear of every change late, so that a client's proxy goes on meaning the pod that had the address before:
//! the attempts to reach it there are counted, because without them nothing would be proved. How late is told.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use crate::cluster::Kind;
use crate::demo::progress;
use crate::eventually;
use crate::example::ask::Asked;
use crate::lab::{Background, Lab, PATIENCE};
use crate::workload::{self, Workload};

/// Who takes the address, in turns: the Service, and the service account. The last two differ in nothing but the pod.
const ROLES: [(&str, &str); 3] = [("one", "first"), ("two", "second"), ("twin", "second")];
const PORT: u16 = 8080;
const AGENT: &str = "system:serviceaccount:ambit-system:node-agent";
/// How late, unless told otherwise. A pod takes the address of the one before within a fifth of a second.
pub const LATE: Duration = Duration::from_millis(500);
/// What ztunnel's log says of a connection to a pod that was not meant: by its identity, or only by its UID.
const REFUSALS: [&str; 2] = ["reason=\"TLS_FAILURE\"", "reason=\"WRONG_WORKLOAD\""];
/// Nodes on which an address is passed on; there are clients on each.
const NODES: [u8; 2] = [1, 2];

#[derive(Debug, clap::Args)]
pub struct Config {
    /// How often the address goes to another pod.
    #[arg(long, default_value_t = 1000)]
    cycles: usize,
    /// By how much the agents hear of every change late, in milliseconds.
    #[arg(long, default_value_t = 500)]
    late_ms: u64,
    /// Print the result as one JSON object; progress goes to stderr.
    #[arg(long)]
    json: bool,
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
pub struct Tally {
    /// By how much the agents heard of every change late.
    pub late_ms: u128,
    /// How often an address went to another pod.
    pub cycles: usize,
    /// Calls that whom they were meant for answered.
    pub right: u64,
    /// Calls that nobody answered, by the kind of error: pods come and go.
    pub failed: BTreeMap<String, u64>,
    /// Connections that were refused because they had come to another pod than they were meant for.
    pub refused: usize,
    /// Answers of others, and requests that others got.
    pub wrong: Vec<String>,
    pub seconds: f64,
}

impl std::fmt::Display for Tally {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let failed: u64 = self.failed.values().sum();
        write!(
            formatter,
            "{} times an address went to another pod, {:.1} s, the agents heard of it {} ms late; {} calls answered by whom they were meant for, \
             {failed} by nobody, {} by another; {} connections had come to another pod, and were refused",
            self.cycles,
            self.seconds,
            self.late_ms,
            self.right,
            self.wrong.len(),
            self.refused,
        )
    }
}

/// Connections that were refused as meant for another pod, as either node's log has them.
fn refusals(lab: &Lab) -> anyhow::Result<usize> {
    let mut count = 0;
    for node in NODES {
        let log = lab.daemon("ztunnel", node).logs()?;
        count += REFUSALS.iter().map(|reason| log.matches(reason).count()).sum::<usize>();
    }
    Ok(count)
}

/// Pass an address on, on each node, until `enough` holds of the times it was and the time that took.
pub fn churn(
    lab: &Lab,
    namespace: &str,
    late: Duration,
    enough: impl Fn(usize, Duration) -> bool + Sync,
) -> anyhow::Result<Tally> {
    lab.namespace(namespace, &[("istio.io/dataplane-mode", "ambient")])?;
    let mut targets = Vec::new();
    for (role, account) in ROLES {
        workload::service_account(lab, namespace, account)?;
        workload::service(lab, namespace, role, 80, PORT)?;
        targets.push(format!("{role}=http://{}/{role}", lab.service_address(namespace, role)?));
    }
    let mut load = Vec::new();
    for node in NODES {
        let client = Workload::new(namespace, &format!("client-{node}")).on_node(node).start(lab)?;
        client.captured()?;
        let line =
            ["ambit-example", "ask", "--parallel=3"].into_iter().chain(targets.iter().map(String::as_str));
        load.push(client.spawn(line)?);
    }
    let (began, cycles, refused) = (Instant::now(), AtomicUsize::new(0), refusals(lab)?);
    lab.api().set_watch_delay(None, Some(AGENT), late);
    let enough = || enough(cycles.load(Ordering::Relaxed), began.elapsed());
    let passed = std::thread::scope(|scope| {
        let lanes: Vec<_> = NODES
            .iter()
            .map(|node| {
                let (cycles, enough) = (&cycles, &enough);
                scope.spawn(move || lane(lab, namespace, *node, cycles, enough))
            })
            .collect();
        lanes.into_iter().try_for_each(|lane| lane.join().map_err(|_| anyhow::anyhow!("a lane panicked"))?)
    });
    lab.api().set_watch_delay(None, Some(AGENT), Duration::ZERO);
    passed.map_err(|error| error.context(lab.story(namespace)))?;
    let mut tally = Tally { late_ms: late.as_millis(), cycles: cycles.into_inner(), ..Tally::default() };
    tally.seconds = began.elapsed().as_secs_f64();
    for client in load {
        tally.add(client)?;
    }
    tally.wrong.extend(strays(lab, namespace)?);
    tally.refused = refusals(lab)?.saturating_sub(refused);
    Ok(tally)
}

impl Tally {
    fn add(&mut self, mut client: Background) -> anyhow::Result<()> {
        anyhow::ensure!(client.runs()?, "a client ended early: {}", client.output());
        let output = client.finish()?.ok("ask")?;
        let asked: Asked = serde_json::from_str(output.lines().last().unwrap_or_default())?;
        self.right += asked.right;
        self.wrong.extend(asked.wrong);
        for (kind, count) in asked.failed {
            *self.failed.entry(kind).or_default() += count;
        }
        Ok(())
    }
}

/// One node's address, passed on and on.
fn lane(
    lab: &Lab,
    namespace: &str,
    node: u8,
    cycles: &AtomicUsize,
    enough: &(impl Fn() -> bool + Sync),
) -> anyhow::Result<()> {
    let address = IpAddr::V4(Ipv4Addr::new(10, 244, node, 201));
    for turn in 0.. {
        if enough() {
            return Ok(());
        }
        // The nodes are out of step, so that a Service may have either address.
        let (role, account) = ROLES[(turn + usize::from(node)) % ROLES.len()];
        let name = format!("{role}-{node}-{turn}");
        let pod = Workload::new(namespace, &name)
            .command(&["ambit-example", "serve", "--listen=0.0.0.0:8080", &format!("--name={role}")])
            .port("http", PORT)
            .label("app", role)
            .service_account(account)
            .on_node(node)
            .at(address)
            .create(lab)?;
        let mut live = None;
        eventually(&format!("{name} at {address} is asked"), PATIENCE, || {
            let now = live.insert(pod.live()?);
            anyhow::ensure!(pod.logs()?.contains("GET "), "{:?}", now.addresses());
            Ok(())
        })?;
        // By turns at once, and with the time to end that a pod usually has.
        let grace = Duration::from_secs(u64::from(turn % 2 == 0));
        lab.cluster().delete(Kind::Pod, namespace, &name, Some(grace))?;
        let live = live.context("it was never there")?;
        eventually(&format!("{name} has left"), PATIENCE, || {
            let there = lab.kubelets().iter().any(|kubelet| kubelet.pods().contains_key(live.uid()));
            anyhow::ensure!(!there, "it is there");
            Ok(())
        })?;
        cycles.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Requests that the servers got and that were meant for others, from the logs of all of them.
fn strays(lab: &Lab, namespace: &str) -> anyhow::Result<Vec<String>> {
    let mut strays = Vec::new();
    for node in lab.nodes() {
        for entry in std::fs::read_dir(node.path("/var/log/pods"))? {
            let directory = entry?;
            let name = directory.file_name().to_string_lossy().into_owned();
            let role = name.strip_prefix(&format!("{namespace}_")).and_then(|rest| rest.split('-').next());
            let Some(role) = role.filter(|role| ROLES.iter().any(|(known, _)| known == role)) else {
                continue;
            };
            let log = std::fs::read_to_string(directory.path().join("main.log")).unwrap_or_default();
            let meant = format!("GET /{role} ");
            let wrong = log.lines().filter(|line| line.starts_with("GET ") && !line.starts_with(&meant));
            strays.extend(wrong.map(|line| format!("{name} got {line}")));
        }
    }
    Ok(strays)
}

/// Exit code 1 if anything went to the wrong pod.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    progress("starting a cluster of two nodes with the mesh");
    let lab = Lab::new().nodes(2).mesh().start()?;
    progress(&format!("{} cycles", config.cycles));
    let late = Duration::from_millis(config.late_ms);
    let tally = churn(&lab, "reuse", late, |cycles, _| cycles >= config.cycles)?;
    if config.json {
        println!("{}", serde_json::to_string(&tally)?);
    } else {
        println!("{tally}");
        println!("{:?}", tally.failed);
    }
    for wrong in &tally.wrong {
        eprintln!("WRONG: {wrong}");
    }
    Ok(if tally.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
