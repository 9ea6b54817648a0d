//! An agent with one pod that goes wrong at a chosen point: the real steps, datapath and pod protocol, in a process of
//! its own, whose n-th call that changes something in the kernel fails or is never made.
//!
//! It says `listening` when something like a ztunnel may connect, and `ready` once it has cleared what an agent before it
//! left unfinished. Then each line of stdin is an order,
//! `enrol` or `release`, with `fail` or `stop` and the number of the call, 0 for none; it answers `stopped`, or
//! `done <calls> <outcome>`. It ends with its stdin.

use std::fs::File;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use mesh_core::pod_link::Listener;
use mesh_core::proto::pods as proto;
use node_agent::cluster::{Cluster, ClusterError};
use node_agent::datapath::{Config, Datapath, GuardHook, KubeletConfig, Numbers};
use node_agent::enrol::kernel;
use node_agent::enrol::plan::{Outcome, Step};
use node_agent::enrol::steps::Hands;
use node_agent::index::event::ObjectName;
use node_agent::index::local::LocalPod;
use node_agent::index::membership::Membership;
use node_agent::index::pod::{Condition, Reported};
use node_agent::netns_of_pod::NotFound;
use node_agent::pods::Pods;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio_util::sync::CancellationToken;

pub mod tripwire;

use tripwire::{Fault, Tripwire};

/// One pod.
#[derive(Clone, Debug, clap::Parser)]
pub struct Arguments {
    #[arg(long)]
    pub bpffs: PathBuf,
    #[arg(long)]
    pub cgroup: PathBuf,
    #[arg(long, env = "AMBIT_GUARD_HOOK", value_enum, default_value = "auto")]
    pub guard_hook: GuardHook,
    /// The pod's network namespace.
    #[arg(long)]
    pub netns: PathBuf,
    #[arg(long)]
    pub uid: String,
    /// Its addresses, the primary one first.
    #[arg(long)]
    pub address: Vec<IpAddr>,
    /// Directory of `pods.sock`, to which something like a ztunnel connects.
    #[arg(long)]
    pub run_dir: PathBuf,
}

/// Does as it is told until stdin ends.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(serve(&arguments))?;
    // A thread that never comes back is not waited for.
    std::process::exit(0)
}

async fn serve(arguments: &Arguments) -> anyhow::Result<()> {
    let datapath = Datapath::open(&Config {
        bpffs: arguments.bpffs.clone(),
        cgroup_root: Some(arguments.cgroup.clone()),
        guard_hook: arguments.guard_hook,
        kubelet: KubeletConfig { cgroup: None, port: 0 },
        proc: "/proc".into(),
        numbers: Numbers::default(),
    })?;
    let flag_map = datapath.skproxy_map().try_clone_to_owned()?;
    let pods = Pods::new();
    let listener = Listener::bind(&arguments.run_dir.join("pods.sock"))?;
    tokio::spawn(pods.clone().serve(listener, flag_map, CancellationToken::new()));
    println!("listening");
    pods.connected().await;

    let wire = Tripwire::default();
    let kernel = watched(datapath, &wire)?;
    let (uid, netns) = (arguments.uid.clone(), arguments.netns.clone());
    let find = move |_: &str, _: Option<u64>| {
        File::open(&netns).map(Into::into).map_err(|_| NotFound::NoProcess { uid: uid.clone() })
    };
    let hands = Hands { cluster: Arc::new(NoCluster), pods, kernel, find: Arc::new(find) };
    hands.clear_unfinished().await;
    println!("ready");
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    while let Some(order) = orders.next_line().await? {
        let (step, fault, at) = read(&order, arguments).with_context(|| format!("no order: {order:?}"))?;
        settle(&hands.kernel, &wire).await?;
        wire.arm(at, fault);
        let outcome = tokio::time::timeout(PATIENCE, hands.carry_out(&arguments.uid, &step)).await;
        settle(&hands.kernel, &wire).await?;
        let calls = wire.disarm();
        match outcome {
            Ok(Outcome::Done) => println!("done {calls} well"),
            Ok(Outcome::Failed { error, .. }) => println!("done {calls} {error}"),
            Err(_) => println!("done {calls} no end of it within {PATIENCE:?}"),
        }
    }
    Ok(())
}

/// Until the datapath's thread has looked after what follows from its jobs by itself: so these calls belong to the order
/// that they came of, and an order has as many calls each time.
async fn settle(kernel: &kernel::Handle, wire: &Tripwire) -> anyhow::Result<()> {
    let calls = || {
        let wire = wire.clone();
        kernel.run(move |_| wire.seen())
    };
    while calls().await? != calls().await? {}
    Ok(())
}

/// For one order; one that was stopped is given up with the process.
const PATIENCE: Duration = Duration::from_secs(60);

fn read(order: &str, arguments: &Arguments) -> Option<(Step, Fault, usize)> {
    let mut words = order.split(' ');
    let step = match words.next()? {
        "enrol" => Step::Enrol(Box::new(pod(arguments))),
        "release" => Step::Release,
        _ => return None,
    };
    let fault = match words.next()? {
        "fail" => Fault::Fail,
        "stop" => Fault::Stop,
        _ => return None,
    };
    Some((step, fault, words.next()?.parse().ok()?))
}

/// The datapath's thread, whose calls are counted.
fn watched(datapath: Datapath, wire: &Tripwire) -> anyhow::Result<kernel::Handle> {
    let wire = wire.clone();
    let begun = std::thread::spawn(move || -> anyhow::Result<kernel::Handle> {
        wire.watch(|| println!("stopped"))?;
        Ok(kernel::spawn(datapath)?)
    });
    begun.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?.context("watch the datapath's thread")
}

fn pod(arguments: &Arguments) -> LocalPod {
    let uid = arguments.uid.clone();
    LocalPod {
        name: ObjectName::new("shop", "faulty"),
        uid: uid.clone(),
        membership: Membership::Member,
        inherits: true,
        addresses: arguments.address.clone(),
        probe_ports: [8080].into(),
        dns: true,
        annotated: false,
        finished: false,
        terminating: false,
        reported: None,
        proved: None,
        description: proto::Pod { uid, name: "faulty".to_owned(), ..Default::default() },
    }
}

/// Nobody is told.
struct NoCluster;

impl Cluster for NoCluster {
    async fn pod(&self, _: &ObjectName) -> Result<Option<(Pod, Namespace)>, ClusterError> {
        Ok(None)
    }

    async fn namespace(&self, _: &str) -> Result<Option<Namespace>, ClusterError> {
        Ok(None)
    }

    async fn annotate(&self, _: &ObjectName, _: &str, _: bool) -> Result<(), ClusterError> {
        Ok(())
    }

    async fn report(
        &self,
        _: &ObjectName,
        _: &str,
        _: Condition,
        _: Option<&Reported>,
    ) -> Result<(), ClusterError> {
        Ok(())
    }
}
