//! An agent that dies or gets an error at each call by which it enrols a pod, or lets it go: while it enrols, the pod's
//! traffic goes as before or meets the proxy, in both directions, and the next agent finishes the job and leaves nothing
//! behind.

mod holder;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_core::proto::pods::Fd;

use crate::lifecycle::{Traces, nothing_pinned};
use crate::packets::Sniffer;
use crate::world::{PATIENCE, PORT, REFUSAL, World, converse, into_stream};
use holder::Holder;

/// How a connection got to its application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// As if there was no mesh.
    Direct,
    /// By way of the proxy.
    Proxy,
}

/// What an agent said.
#[derive(Debug)]
enum Said {
    /// It is at the call, and does not come back.
    Stopped,
    /// After so many calls.
    Done(usize, String),
}

/// The pods, their applications, and who holds the listeners.
struct Scene {
    world: World,
    holder: Holder,
    /// The applications of `a` and `b`.
    apps: [TcpListener; 2],
    before: Traces,
}

impl Scene {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let apps = [world.a.serve()?, world.b.serve()?];
        for app in &apps {
            app.set_nonblocking(true)?;
        }
        let before = Traces::of(&world.a)?;
        Ok(Self { holder: Holder::start()?, apps, before, world })
    }

    /// The next agent, once it has cleared what the one before left unfinished.
    fn agent(&self) -> Result<Agent> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ambit-faulty"));
        let pod = &self.world.a;
        command.arg("--bpffs").arg(&self.world.bpffs).arg("--cgroup").arg(&self.world.cgroup);
        command.arg("--netns").arg(format!("/run/netns/{}", pod.netns.name()));
        command.args(["--uid", &pod.uid]);
        for address in pod.spec()?.addresses {
            command.arg("--address").arg(address.to_string());
        }
        command.arg("--run-dir").arg(self.holder.run_dir());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take().context("its output")?;
        let mut agent = Agent { child, output: BufReader::new(output) };
        agent.says("listening")?;
        self.holder.connect()?;
        agent.says("ready")?;
        Ok(agent)
    }

    /// The pod opens a connection.
    fn outbound(&self) -> Result<Way> {
        self.meets(self.world.a.dial(self.world.b.at(PORT), PATIENCE)?, &self.apps[1], Fd::OutboundV4)
    }

    /// A pod outside of the mesh opens one to it.
    fn inbound(&self) -> Result<Way> {
        self.meets(self.world.b.dial(self.world.a.at(PORT), PATIENCE)?, &self.apps[0], Fd::InboundV4)
    }

    fn meets(&self, client: TcpStream, app: &TcpListener, proxy: Fd) -> Result<Way> {
        let (server, way) = mesh_tests::eventually("somebody accepts the connection", PATIENCE, || {
            if let Ok((server, _)) = app.accept() {
                return Ok((server, Way::Direct));
            }
            let server = self.holder.accept(proxy)?.context("nobody")?;
            Ok((into_stream(server), Way::Proxy))
        })?;
        server.set_nonblocking(false)?;
        converse(&client, &server)?;
        Ok(way)
    }

    /// A connection each way from before the mesh, client's end first.
    fn old_connections(&self) -> Result<[(TcpStream, TcpStream); 2]> {
        let pair = |client: TcpStream, app: &TcpListener| -> Result<(TcpStream, TcpStream)> {
            let (server, _) = mesh_tests::eventually("the connection", PATIENCE, || Ok(app.accept()?))?;
            server.set_nonblocking(false)?;
            Ok((client, server))
        };
        Ok([
            pair(self.world.a.dial(self.world.b.at(PORT), PATIENCE)?, &self.apps[1])?,
            pair(self.world.b.dial(self.world.a.at(PORT), PATIENCE)?, &self.apps[0])?,
        ])
    }

    /// Both directions work, whichever way they go.
    fn works(&self, old: &[(TcpStream, TcpStream)]) -> Result<[Way; 2]> {
        let ways = [self.outbound().context("outbound")?, self.inbound().context("inbound")?];
        for (client, server) in old {
            converse(client, server).context("an older connection is cut")?;
        }
        Ok(ways)
    }

    /// The pod's connections go as if there was no mesh, or not at all.
    fn is_out_or_shut(&self) -> Result<()> {
        let mut sniffer = Sniffer::new(&self.world)?;
        match self.world.a.dial(self.world.b.at(PORT), REFUSAL) {
            Ok(client) => {
                let way = self.meets(client, &self.apps[1], Fd::OutboundV4)?;
                ensure!(way == Way::Direct, "it meets a proxy that was told to forget it");
            }
            Err(_) => {
                let seen = sniffer.tcp_from(&self.world.a, self.world.b.address)?;
                ensure!(seen.is_empty(), "shut, but not all of it: {seen:?}");
            }
        }
        Ok(())
    }

    /// As if there had never been a mesh.
    fn is_clean(&self) -> Result<()> {
        ensure!(self.outbound()? == Way::Direct && self.inbound()? == Way::Direct, "still captured");
        let after = Traces::of(&self.world.a)?;
        ensure!(after == self.before, "left behind: {after:?} instead of {:?}", self.before);
        ensure!(!self.world.pod_pins(&self.world.a).exists(), "its pins are left");
        nothing_pinned(&self.world)
    }

    /// It enrols the pod, with which nothing goes wrong; how many calls it took.
    fn is_enrolled_by(&self, agent: &mut Agent) -> Result<usize> {
        let calls = agent.does_well("enrol")?;
        ensure!(self.works(&[])? == [Way::Proxy; 2], "not captured whole");
        Ok(calls)
    }

    /// It lets the pod go.
    fn is_released_by(&self, agent: &mut Agent) -> Result<usize> {
        let calls = agent.does_well("release")?;
        self.is_clean()?;
        Ok(calls)
    }

    /// The next agent finds the pod captured, or left as if nothing had been; it enrols it, and lets it go.
    fn is_finished_by(&self, next: &mut Agent) -> Result<()> {
        if self.world.pod_pins(&self.world.a).exists() {
            ensure!(self.works(&[])? == [Way::Proxy; 2], "captured by halves");
        } else {
            self.is_clean()?;
        }
        self.is_enrolled_by(next)?;
        self.is_released_by(next).map(drop)
    }
}

/// A process that is killed with this.
struct Agent {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Agent {
    /// Gives an order and waits for what comes of it.
    fn does(&mut self, work: &str, fault: &str, at: usize) -> Result<Said> {
        writeln!(self.child.stdin.as_ref().context("its stdin")?, "{work} {fault} {at}")?;
        let line = self.line()?;
        let mut words = line.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some("stopped"), None, None) => Ok(Said::Stopped),
            (Some("done"), Some(calls), Some(outcome)) => Ok(Said::Done(calls.parse()?, outcome.to_owned())),
            _ => bail!("the agent said {line:?}"),
        }
    }

    fn does_well(&mut self, work: &str) -> Result<usize> {
        match self.does(work, "fail", 0)? {
            Said::Done(calls, outcome) if outcome == "well" => Ok(calls),
            said => bail!("{work}: {said:?}"),
        }
    }

    /// That call fails; what comes of it.
    fn fails(&mut self, work: &str, at: usize) -> Result<String> {
        match self.does(work, "fail", at)? {
            Said::Done(calls, outcome) if calls >= at => Ok(outcome),
            said => bail!("nothing failed: {said:?}"),
        }
    }

    /// It hangs at that call.
    fn stops(&mut self, work: &str, at: usize) -> Result<()> {
        let said = self.does(work, "stop", at)?;
        ensure!(matches!(said, Said::Stopped), "{said:?}");
        Ok(())
    }

    fn says(&mut self, word: &str) -> Result<()> {
        let line = self.line()?;
        ensure!(line == word, "the agent said {line:?} instead of {word}");
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    fn dies(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Dead already is as good.
        let _ = self.dies();
    }
}

/// The calls to try: some, spread over all of them, or each with `AMBIT_FAULTS=all cargo xtask test netns -- faults`.
fn points(calls: usize) -> Result<impl Iterator<Item = usize>> {
    ensure!(calls > 10, "{calls} calls are too few for all that is to be done");
    let each = std::env::var_os("AMBIT_FAULTS").is_some();
    let step = if each { 1 } else { calls.div_ceil(POINTS) };
    eprintln!("{calls} calls, every {step}th is tried");
    Ok((1..=calls).step_by(step))
}

const POINTS: usize = 10;

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_hangs_and_dies_at_a_call_of_enrolment() -> Result<()> {
    let scene = Scene::new()?;
    let mut agent = scene.agent()?;
    let calls = scene.is_enrolled_by(&mut agent)?;
    scene.is_released_by(&mut agent)?;
    for at in points(calls)? {
        let mut point = || -> Result<()> {
            let old = scene.old_connections()?;
            agent.stops("enrol", at)?;
            scene.works(&old).context("while it hangs")?;
            agent.dies()?;
            scene.works(&old).context("once it is dead")?;
            drop(old);
            agent = scene.agent()?;
            scene.is_finished_by(&mut agent).context("the next agent")
        };
        point().with_context(|| format!("call {at} of {calls}"))?;
    }
    Ok(())
}

/// Until the pod is let go nothing of it leaves but by the proxy, which is not there any more.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_dies_at_a_call_of_release() -> Result<()> {
    let scene = Scene::new()?;
    let mut agent = scene.agent()?;
    scene.is_enrolled_by(&mut agent)?;
    let calls = scene.is_released_by(&mut agent)?;
    for at in points(calls)? {
        let mut point = || -> Result<()> {
            scene.is_enrolled_by(&mut agent)?;
            agent.stops("release", at)?;
            scene.is_out_or_shut().context("while it hangs")?;
            agent.dies()?;
            scene.is_out_or_shut().context("once it is dead")?;
            agent = scene.agent()?;
            scene.is_enrolled_by(&mut agent)?;
            scene.is_released_by(&mut agent).map(drop)
        };
        point().with_context(|| format!("call {at} of {calls}"))?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_error_at_any_call_of_enrolment() -> Result<()> {
    let scene = Scene::new()?;
    let mut agent = scene.agent()?;
    let calls = scene.is_enrolled_by(&mut agent)?;
    scene.is_released_by(&mut agent)?;
    for at in 1..=calls {
        let mut point = || -> Result<()> {
            let outcome = agent.fails("enrol", at)?;
            if outcome != "well" {
                return scene.is_clean().context(outcome);
            }
            // It could do without.
            ensure!(scene.works(&[])? == [Way::Proxy; 2], "not captured whole");
            scene.is_released_by(&mut agent).map(drop)
        };
        point().with_context(|| format!("call {at} of {calls}"))?;
    }
    Ok(())
}

/// The pod is let go all the same, and can join and leave again.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_error_at_any_call_of_release() -> Result<()> {
    let scene = Scene::new()?;
    let mut agent = scene.agent()?;
    scene.is_enrolled_by(&mut agent)?;
    let calls = scene.is_released_by(&mut agent)?;
    for at in 1..=calls {
        let mut point = || -> Result<()> {
            scene.is_enrolled_by(&mut agent)?;
            let outcome = agent.fails("release", at)?;
            ensure!(outcome == "well", "{outcome}");
            ensure!(scene.works(&[])? == [Way::Direct; 2], "not let go");
            scene.is_enrolled_by(&mut agent)?;
            scene.is_released_by(&mut agent).context("the second time").map(drop)
        };
        point().with_context(|| format!("call {at} of {calls}"))?;
    }
    Ok(())
}

/// It leaves while no agent runs: the next one does not enrol it first, and finds out where it is.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_next_agent_lets_a_pod_go_that_it_has_not_enrolled() -> Result<()> {
    let scene = Scene::new()?;
    let mut agent = scene.agent()?;
    scene.is_enrolled_by(&mut agent)?;
    agent.dies()?;
    scene.is_released_by(&mut scene.agent()?).map(drop)
}
