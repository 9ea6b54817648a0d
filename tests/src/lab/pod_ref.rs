//! A pod as a scenario speaks of it: by name, whatever its owner appended to the name, wherever it runs.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use nix::sys::signal::Signal;

use super::{Lab, PATIENCE};
use crate::cluster::Kind;
use crate::eventually;
use crate::kubelet::Live;
use crate::shell::{self, Output};
use crate::stack::Family;

/// How long a program inside a pod may take, in seconds.
const EXEC_SECONDS: &str = "60";

/// Annotation that records that the agent captures a pod's traffic.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

/// A pod, looked up anew at each use.
#[derive(Clone)]
pub struct PodRef<'a> {
    lab: &'a Lab,
    namespace: String,
    name: String,
    node: Option<u8>,
    container: Option<String>,
}

impl<'a> PodRef<'a> {
    pub(super) fn new(lab: &'a Lab, name: &str, node: Option<u8>) -> Self {
        let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
        Self { lab, namespace: namespace.to_owned(), name: name.to_owned(), node, container: None }
    }

    /// One of its containers instead of the first.
    #[must_use]
    pub fn container(mut self, name: &str) -> Self {
        self.container = Some(name.to_owned());
        self
    }

    /// The Pod object, ready ones first.
    pub fn object(&self) -> anyhow::Result<Pod> {
        let mut pods: Vec<Pod> = self.lab.cluster().list(Kind::Pod);
        pods.retain(|pod| self.is(pod));
        pods.sort_by_key(|pod| (pod.metadata.deletion_timestamp.is_some(), !is_ready(pod)));
        pods.into_iter().next().with_context(|| format!("there is no pod {}/{}", self.namespace, self.name))
    }

    fn is(&self, pod: &Pod) -> bool {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let appended =
            name.strip_prefix(&self.name).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        appended
            && pod.metadata.namespace.as_deref() == Some(&self.namespace)
            && self.node.is_none_or(|index| node == Some(self.lab.node(index).name()))
    }

    /// The pod on its node.
    pub fn live(&self) -> anyhow::Result<Arc<Live>> {
        let uid = self.object()?.metadata.uid.unwrap_or_default();
        let mut kubelets = self.lab.kubelets().iter();
        let live = kubelets.find_map(|kubelet| kubelet.pods().get(&uid).cloned());
        live.with_context(|| format!("{}/{} is on no node yet", self.namespace, self.name))
    }

    /// Wait until it is ready.
    pub fn ready(&self) -> anyhow::Result<&Self> {
        eventually(&format!("pod {}/{} is ready", self.namespace, self.name), PATIENCE, || {
            let pod = self.object()?;
            anyhow::ensure!(is_ready(&pod), "its status: {}", serde_json::to_string(&pod.status)?);
            Ok(())
        })
        .map_err(|error| error.context(self.lab.story(&self.namespace)))?;
        Ok(self)
    }

    /// Wait until the agent has recorded that it is captured.
    pub fn captured(&self) -> anyhow::Result<()> {
        eventually(&format!("pod {}/{} is captured", self.namespace, self.name), PATIENCE, || {
            let value = self.annotation(REDIRECTION)?;
            anyhow::ensure!(value.as_deref() == Some("enabled"), "{REDIRECTION} is {value:?}");
            Ok(())
        })
    }

    /// Its name in full.
    pub fn name(&self) -> anyhow::Result<String> {
        Ok(self.object()?.metadata.name.unwrap_or_default())
    }

    /// Its primary address.
    pub fn address(&self) -> anyhow::Result<IpAddr> {
        self.addresses()?.first().copied().with_context(|| self.has_no("primary"))
    }

    /// Its address of a family.
    pub fn address_of(&self, family: Family) -> anyhow::Result<IpAddr> {
        let mut addresses = self.addresses()?.into_iter();
        addresses.find(|ip| Family::of(*ip) == family).with_context(|| self.has_no(family.as_str()))
    }

    /// All its addresses, the primary one first; none yet while it has no network.
    pub fn addresses(&self) -> anyhow::Result<Vec<IpAddr>> {
        Ok(self.live()?.addresses())
    }

    fn has_no(&self, what: &str) -> String {
        format!("{}/{} has no {what} address", self.namespace, self.name)
    }

    /// The number of the node it runs on.
    pub fn node_index(&self) -> anyhow::Result<u8> {
        Ok(self.live()?.node().index())
    }

    /// An annotation's value.
    pub fn annotation(&self, key: &str) -> anyhow::Result<Option<String>> {
        Ok(self.object()?.metadata.annotations.and_then(|annotations| annotations.get(key).cloned()))
    }

    /// Run a program inside: in its network, its root, its cgroup, as its user.
    pub fn exec<'s>(&self, line: impl IntoIterator<Item = &'s str>) -> anyhow::Result<Output> {
        shell::capture(self.command(line)?, "")
    }

    /// Like [`Self::exec`], but failing is an error; its stdout.
    pub fn exec_ok<'s>(&self, line: impl IntoIterator<Item = &'s str>) -> anyhow::Result<String> {
        let words: Vec<&str> = line.into_iter().collect();
        self.exec(words.iter().copied())?.ok(&format!(
            "{} in {}/{}",
            words.join(" "),
            self.namespace,
            self.name
        ))
    }

    /// `curl` inside; the body.
    pub fn curl(&self, url: &str) -> anyhow::Result<String> {
        self.exec_ok(["curl", "-sS", "--fail", "--max-time", "10", url])
    }

    /// The same, over one IP family.
    pub fn curl_over(&self, family: Family, url: &str) -> anyhow::Result<String> {
        let option = match family {
            Family::V4 => "-4",
            Family::V6 => "-6",
        };
        self.exec_ok(["curl", option, "-sS", "--fail", "--max-time", "10", url])
    }

    fn command<'s>(&self, line: impl IntoIterator<Item = &'s str>) -> anyhow::Result<Command> {
        let mut command = self.live()?.command(self.container.as_deref(), "timeout")?;
        command.args(["-k", "1", EXEC_SECONDS]).args(line);
        Ok(command)
    }

    /// Start a program inside and go on; it is killed when the result is dropped.
    pub fn spawn<'s>(&self, line: impl IntoIterator<Item = &'s str>) -> anyhow::Result<Background> {
        let mut words = line.into_iter();
        let program = words.next().context("no program")?;
        let mut command = self.live()?.command(self.container.as_deref(), program)?;
        command.args(words);
        Background::start(self.lab, command)
    }

    /// Run a program of the node in the pod's network namespace, as the kubelet's port-forward is one.
    pub fn exec_from_node<'s>(&self, line: impl IntoIterator<Item = &'s str>) -> anyhow::Result<Output> {
        let mut command = self.live()?.command_of_node("timeout")?;
        command.args(["-k", "1", EXEC_SECONDS]).args(line);
        shell::capture(command, "")
    }

    /// What it answers on its own loopback.
    pub fn scrape(&self, port: u16, path: &str) -> anyhow::Result<String> {
        let url = format!("http://127.0.0.1:{port}{path}");
        self.exec_from_node(["curl", "-sS", "--fail", "--max-time", "5", &url])?.ok("curl")
    }

    /// A program of the host in the pod's network, for those that no container has. Its connections come from no
    /// process of the pod, so that they are not captured.
    pub fn beside(&self, program: &str) -> anyhow::Result<Command> {
        self.lab.in_network(&*self.live()?.netns().context("the pod has no network")?, program)
    }

    /// All output of its container so far, of all its runs.
    pub fn logs(&self) -> anyhow::Result<String> {
        let path = self.live()?.log_path(self.container.as_deref()).context("no such container")?;
        Ok(String::from_utf8_lossy(&std::fs::read(path)?).into_owned())
    }

    /// Send a signal to its container's first process.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.live()?.pid(self.container.as_deref()).context("it does not run")?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).context("send a signal")
    }

    /// How often its container was started again.
    pub fn restarts(&self) -> anyhow::Result<i32> {
        Ok(self.live()?.restarts(self.container.as_deref()))
    }

    /// Kill it as the kernel would, and wait until the kubelet has started it again and it is ready.
    pub fn kill_and_wait(&self) -> anyhow::Result<()> {
        let before = self.restarts()?;
        self.signal(Signal::SIGKILL)?;
        self.restarted(before)
    }

    /// Wait until it was restarted more often than `before`, and is ready.
    pub fn restarted(&self, before: i32) -> anyhow::Result<()> {
        eventually("the killed container runs again", PATIENCE, || {
            let live = self.live()?;
            let restarts = live.restarts(self.container.as_deref());
            anyhow::ensure!(
                restarts > before && live.pid(self.container.as_deref()).is_some(),
                "{restarts} restarts"
            );
            Ok(())
        })?;
        self.ready().map(drop)
    }

    /// Kill it as the kernel would; the kubelet does not start it again as long as the result is there.
    pub fn kill_and_hold(&self) -> anyhow::Result<Held<'a>> {
        let held = Held { pod: self.clone(), live: self.live()? };
        held.live.hold(true);
        self.signal(Signal::SIGKILL)?;
        eventually("the killed container is gone", PATIENCE, || {
            anyhow::ensure!(held.live.pid(self.container.as_deref()).is_none(), "it runs");
            Ok(())
        })?;
        Ok(held)
    }
}

/// A pod whose container was killed and stays away until this is dropped.
pub struct Held<'a> {
    pod: PodRef<'a>,
    live: Arc<Live>,
}

impl Held<'_> {
    /// Let it come back, and wait until it is ready.
    pub fn release(self) -> anyhow::Result<()> {
        self.live.hold(false);
        eventually("the container that was held runs", PATIENCE, || {
            anyhow::ensure!(self.live.pid(self.pod.container.as_deref()).is_some(), "it does not run");
            Ok(())
        })?;
        self.pod.ready().map(drop)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.live.hold(false);
    }
}

/// A program that runs while the scenario goes on.
#[derive(Debug)]
pub struct Background {
    child: Child,
    output: PathBuf,
}

impl Background {
    /// Start what is ready to run.
    pub fn start(lab: &Lab, mut command: Command) -> anyhow::Result<Self> {
        let output = lab.directory().join(format!("background-{:08x}", rand::random::<u32>()));
        let file = std::fs::File::create(&output)?;
        let child = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn()?;
        Ok(Self { child, output })
    }

    /// What it has written so far.
    #[must_use]
    pub fn output(&self) -> String {
        std::fs::read(&self.output)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Wait until its output holds a text.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> anyhow::Result<()> {
        eventually(&format!("a program wrote {text:?}"), timeout, || {
            let output = self.output();
            anyhow::ensure!(output.contains(text), "it wrote {output:?}");
            Ok(())
        })
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Ask it to come to its end with SIGTERM, and wait for that; what it wrote, and whether it went well.
    pub fn finish(&mut self) -> anyhow::Result<Output> {
        if self.runs()? {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?);
            nix::sys::signal::kill(pid, Signal::SIGTERM).context("ask a program to end")?;
        }
        let status = eventually("a program that was asked to end has ended", PATIENCE, || {
            self.child.try_wait()?.with_context(|| format!("it runs; it wrote {}", self.output()))
        })?;
        Ok(Output { code: status.code().unwrap_or(-1), stdout: self.output(), stderr: String::new() })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // One that has ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether its condition `Ready` holds and nobody has asked for its end.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.filter(|condition| condition.type_ == "Ready").any(|condition| condition.status == "True")
}

/// Whether it is one to wait for: not leaving, not finished.
pub(super) fn expected_ready(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
}
