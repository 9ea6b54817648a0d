//! A program that runs a lab, as its users start it, and what it says, line by line.

use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use anyhow::Context as _;
use mesh_tests::eventually;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::fixture::SOON;

/// A running program with a lab; killed with all it started when dropped.
pub(crate) struct Program {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
    /// The name of its run.
    pub(crate) run: String,
}

impl Program {
    /// `ambit-lab`.
    pub(crate) fn lab(arguments: &[&str]) -> anyhow::Result<Self> {
        Self::start(Path::new(env!("CARGO_BIN_EXE_ambit-lab")), arguments)
    }

    /// This suite, with one of its tests.
    pub(crate) fn suite(test: &str) -> anyhow::Result<Self> {
        Self::start(&std::env::current_exe()?, &["--ignored", "--exact", test])
    }

    /// Start it and wait until it has named its run, before it makes anything.
    fn start(program: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        // It is told to end when this process does, which an interrupt ends without a word to anybody.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM"]).arg(program);
        // A process group of its own, as a shell gives to what it starts.
        command.args(arguments).env("RUST_LOG", "warn,mesh_tests::run=info").process_group(0);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (sender, lines) = mpsc::channel();
        pass_on(child.stdout.take().context("no stdout")?, sender.clone());
        pass_on(child.stderr.take().context("no stderr")?, sender);
        let mut program = Self { child, lines, said: Vec::new(), run: String::new() };
        let line = program.wait_for(SOON, |line| line.contains("run amb") && line.contains(" begins"))?;
        let name = line.split_whitespace().find(|word| word.starts_with("amb"));
        program.run = name.context("the run has no name")?.to_owned();
        Ok(program)
    }

    /// The first line that `wanted` holds for, of those that were read and those to come: two streams have no order.
    pub(crate) fn wait_for(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        if let Some(line) = self.said.iter().find(|line| wanted(line)) {
            return Ok(line.clone());
        }
        let deadline = std::time::Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let line = self.lines.recv_timeout(left);
            let line =
                line.with_context(|| format!("it does not say so; it says\n{}", self.said.join("\n")))?;
            self.said.push(line.clone());
            if wanted(&line) {
                return Ok(line);
            }
        }
    }

    /// All that it has said until now.
    pub(crate) fn said(&mut self) -> &[String] {
        self.said.extend(self.lines.try_iter());
        &self.said
    }

    /// Signal the whole group, as a terminal does, and wait for the end of each process in it.
    pub(crate) fn end(mut self, signal: Signal) -> anyhow::Result<ExitStatus> {
        killpg(self.group()?, signal)?;
        let status = eventually("the lab has ended", Duration::from_secs(30), || {
            self.child.try_wait()?.with_context(|| format!("it says\n{}", self.said().join("\n")))
        })?;
        let group = self.group()?;
        eventually("the processes of its group have ended", SOON, || {
            let left = members(group)?;
            anyhow::ensure!(left.is_empty(), "{left:?} are left");
            Ok(())
        })?;
        Ok(status)
    }

    fn group(&self) -> anyhow::Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // The next lab removes what is left of its run.
        if let (Ok(None), Ok(group)) = (self.child.try_wait(), self.group()) {
            let _ = killpg(group, Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// The processes of a group; not those that have ended and that nobody took note of yet.
fn members(group: Pid) -> anyhow::Result<Vec<Pid>> {
    let entries = std::fs::read_dir("/proc")?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(Pid::from_raw);
    let of_group = pids.filter(|pid| nix::unistd::getpgid(Some(*pid)) == Ok(group));
    Ok(of_group.filter(|pid| Path::new(&format!("/proc/{pid}/exe")).exists()).collect())
}

fn pass_on(from: impl Read + Send + 'static, to: Sender<String>) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let _ = to.send(line);
        }
    });
}
