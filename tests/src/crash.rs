//! Parts of the mesh killed under load: how many connections were refused, reset or lost meanwhile.
//!
//! The load: one client on node 1 that opens connections to an echo server on either node, 8 at a time, and keeps one
//! to each open.

use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::Serialize;

use crate::demo::progress;
use crate::example::dial::Dialled;
use crate::lab::{Background, Lab, PATIENCE, PodRef};
use crate::workload::Workload;
use crate::{eventually, workload};

const PORT: u16 = 7000;
/// For what takes a message or two.
const SOON: Duration = Duration::from_secs(15);

#[derive(Debug, clap::Args)]
pub struct Config {
    /// Print the result as one JSON array; progress goes to stderr.
    #[arg(long)]
    json: bool,
}

/// What is killed, with SIGKILL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Blow {
    Ztunnel,
    Agent,
    /// The agent, and ztunnel once the new agent has its sockets back.
    AgentThenZtunnel,
    /// Both at once: with them go the pods' listeners.
    Both,
}

/// What a blow did to the load.
#[derive(Debug, Serialize)]
pub struct Toll {
    #[serde(flatten)]
    pub new: Dialled,
    /// Of the open connections, those that broke.
    pub broken: usize,
}

impl Toll {
    /// Whether every new connection came about, and none hung: what broke was in the hands of what was killed.
    #[must_use]
    pub fn keeps_the_door_open(&self) -> bool {
        self.new.refused == 0 && self.new.lost == 0 && self.new.other.is_empty()
    }

    /// Whether nobody noticed anything.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.new.failed() == 0 && self.broken == 0
    }
}

impl std::fmt::Display for Toll {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Dialled { done, refused, reset, lost, other, longest_ms } = &self.new;
        write!(formatter, "{done} connections, {refused} refused, {reset} reset, {lost} lost")?;
        if !other.is_empty() {
            write!(formatter, ", {other:?}")?;
        }
        write!(formatter, ", longest {longest_ms} ms, {} of 2 open ones broken", self.broken)
    }
}

impl Blow {
    /// Deal it on a node, and wait until all that was killed is ready again.
    pub fn strike(self, lab: &Lab, node: u8) -> anyhow::Result<()> {
        let (agent, ztunnel) = (lab.daemon("node-agent", node), lab.daemon("ztunnel", node));
        match self {
            Self::Ztunnel => ztunnel.kill_and_wait(),
            Self::Agent => agent.kill_and_wait(),
            Self::AgentThenZtunnel => {
                agent.kill_and_wait()?;
                ztunnel.kill_and_wait()
            }
            Self::Both => {
                let before = (agent.restarts()?, ztunnel.restarts()?);
                agent.signal(Signal::SIGKILL)?;
                ztunnel.signal(Signal::SIGKILL)?;
                agent.restarted(before.0)?;
                ztunnel.restarted(before.1)
            }
        }
    }
}

/// The pods of the load.
pub struct Stage<'a> {
    lab: &'a Lab,
    client: PodRef<'a>,
    /// The server on the client's node, then the other.
    echoes: [String; 2],
}

impl<'a> Stage<'a> {
    /// Make a namespace in the mesh with the pods in it.
    pub fn set(lab: &'a Lab, namespace: &str) -> anyhow::Result<Self> {
        lab.namespace(namespace, &[("istio.io/dataplane-mode", "ambient")])?;
        workload::service_account(lab, namespace, "echo")?;
        let client = Workload::new(namespace, "client").on_node(1).start(lab)?;
        let echo = |name: &str, node: u8| -> anyhow::Result<String> {
            let echo =
                Workload::new(namespace, name).echo().service_account("echo").on_node(node).start(lab)?;
            Ok(format!("{}:{PORT}", echo.address()?))
        };
        let echoes = [echo("near", 1)?, echo("far", 2)?];
        for name in ["client", "near", "far"] {
            lab.pod(&format!("{namespace}/{name}")).captured()?;
        }
        Ok(Self { lab, client, echoes })
    }

    /// Deal the blow on a node under load, and see that new connections are served after it.
    pub fn suffer(&self, blow: Blow, node: u8) -> anyhow::Result<Toll> {
        let [near, far] = &self.echoes;
        let mut dial = self.client.spawn(["ambit-example", "dial", "--parallel=8", near, far])?;
        dial.wait_for("answered", SOON)?;
        let mut held: Vec<Background> = Vec::new();
        for echo in &self.echoes {
            let hold = self.client.spawn(["ambit-example", "hold", echo])?;
            hold.wait_for("ok 3", SOON)?;
            held.push(hold);
        }
        blow.strike(self.lab, node)?;
        for echo in &self.echoes {
            eventually("new connections are served", PATIENCE, || {
                self.client.exec_ok(["ambit-example", "send", "--bytes=100", echo]).map(drop)
            })?;
        }
        let mut broken = 0;
        for hold in &mut held {
            broken += usize::from(!lives_on(hold)?);
        }
        anyhow::ensure!(dial.runs()?, "the load ended early: {}", dial.output());
        let output = dial.finish()?.ok("dial")?;
        let new: Dialled = serde_json::from_str(output.lines().last().unwrap_or_default())?;
        anyhow::ensure!(new.done > 0, "there was no load: {new:?}");
        Ok(Toll { new, broken })
    }
}

/// Whether an open connection makes more rounds; one that neither does nor ends is an error.
fn lives_on(hold: &mut Background) -> anyhow::Result<bool> {
    let rounds = hold.output().lines().count();
    eventually("the open connection goes on or breaks", SOON, || {
        let runs = hold.runs()?;
        let more = hold.output().lines().count() > rounds + 3;
        anyhow::ensure!(more || !runs, "it hangs after round {rounds}");
        Ok(runs)
    })
}

/// Every blow on either node, one row each.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Row {
        blow: Blow,
        /// 1 is the client's.
        node: u8,
        #[serde(flatten)]
        toll: Toll,
    }
    progress("starting a cluster of two nodes with the mesh");
    let lab = Lab::new().nodes(2).mesh().start()?;
    let stage = Stage::set(&lab, "crash")?;
    let mut rows = Vec::new();
    for blow in [Blow::Ztunnel, Blow::Agent, Blow::AgentThenZtunnel, Blow::Both] {
        for node in [1, 2] {
            progress(&format!("kill -9 under load: {blow:?} on n{node}"));
            let toll = stage.suffer(blow, node)?;
            if !config.json {
                println!("{:<28} {toll}", format!("{blow:?} on n{node}"));
            }
            rows.push(Row { blow, node, toll });
        }
    }
    if config.json {
        println!("{}", serde_json::to_string(&rows)?);
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection that cannot be made is one, whatever the error is called.
    #[test]
    fn any_error_of_connect_is_a_closed_door() {
        let toll = |new: Dialled| Toll { new, broken: 2 };
        assert!(toll(Dialled { done: 9, reset: 3, ..Dialled::default() }).keeps_the_door_open());
        let other = [("NetworkUnreachable".to_owned(), 1)].into();
        for new in [
            Dialled { refused: 1, ..Dialled::default() },
            Dialled { lost: 1, ..Dialled::default() },
            Dialled { other, ..Dialled::default() },
        ] {
            assert!(!toll(new.clone()).keeps_the_door_open(), "{new:?}");
        }
    }
}
