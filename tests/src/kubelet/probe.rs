//! Readiness, liveness and startup probes. HTTP and TCP ones are dialled by a process in the kubelet's own cgroup and
//! network namespace, so that the mesh sees them as it does on a real node; exec ones run in the container.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::worker::Worker;
use crate::rootfs::BINARIES;

/// Probe a running container for ever; returns why it has to be killed, if it does.
pub(super) async fn watch(worker: &Worker, container: &Container) -> String {
    if let Some(probe) = &container.startup_probe
        && let Err(reason) = until_first_success(worker, container, probe).await
    {
        return format!("startup probe: {reason}");
    }
    worker.live.change(&container.name, |state| state.started = true);
    let readiness = readiness(worker, container);
    let liveness = liveness(worker, container);
    tokio::select! {
        () = readiness => std::future::pending().await,
        reason = liveness => reason,
    }
}

async fn until_first_success(worker: &Worker, container: &Container, probe: &Probe) -> Result<(), String> {
    let mut failures = 0;
    tokio::time::sleep(seconds(probe.initial_delay_seconds, 0)).await;
    loop {
        match once(worker, container, probe).await {
            Ok(()) => return Ok(()),
            Err(reason) => failures = failed(failures, probe).ok_or(reason)?,
        }
        tokio::time::sleep(seconds(probe.period_seconds, 10)).await;
    }
}

async fn readiness(worker: &Worker, container: &Container) {
    let Some(probe) = &container.readiness_probe else {
        worker.live.change(&container.name, |state| state.ready = true);
        worker.publish();
        return std::future::pending().await;
    };
    tokio::time::sleep(seconds(probe.initial_delay_seconds, 0)).await;
    let (mut failures, mut ready) = (0, false);
    loop {
        match once(worker, container, probe).await {
            Ok(()) => (failures, ready) = (0, true),
            Err(reason) => match failed(failures, probe) {
                Some(count) => failures = count,
                None => {
                    if ready {
                        worker.event("Unhealthy", &format!("readiness of {}: {reason}", container.name));
                    }
                    ready = false;
                }
            },
        }
        worker.live.change(&container.name, |state| state.ready = ready);
        worker.publish();
        // Until it is ready for the first time, ask often: start-up is what everybody waits for.
        let pause = if ready { seconds(probe.period_seconds, 10) } else { Duration::from_millis(200) };
        tokio::time::sleep(pause).await;
    }
}

async fn liveness(worker: &Worker, container: &Container) -> String {
    let Some(probe) = &container.liveness_probe else { return std::future::pending().await };
    tokio::time::sleep(seconds(probe.initial_delay_seconds, 0)).await;
    let mut failures = 0;
    loop {
        tokio::time::sleep(seconds(probe.period_seconds, 10)).await;
        match once(worker, container, probe).await {
            Ok(()) => failures = 0,
            Err(reason) => match failed(failures, probe) {
                Some(count) => failures = count,
                None => return format!("liveness probe: {reason}"),
            },
        }
    }
}

/// One more failure, or `None` when that is too many.
fn failed(failures: i32, probe: &Probe) -> Option<i32> {
    (failures + 1 < probe.failure_threshold.unwrap_or(3)).then_some(failures + 1)
}

async fn once(worker: &Worker, container: &Container, probe: &Probe) -> Result<(), String> {
    let command = command(worker, container, probe).map_err(|error| format!("{error:#}"))?;
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true).stdin(std::process::Stdio::null());
    let timeout = seconds(probe.timeout_seconds, 1);
    let output = tokio::time::timeout(timeout, command.output())
        .await
        .map_err(|_| format!("no answer within {timeout:?}"))?
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stderr, output.stdout].concat();
    Err(String::from_utf8_lossy(&text).trim().chars().take(300).collect())
}

fn command(worker: &Worker, container: &Container, probe: &Probe) -> anyhow::Result<std::process::Command> {
    if let Some(exec) = &probe.exec {
        let line = exec.command.as_deref().unwrap_or_default();
        let (program, arguments) =
            line.split_first().ok_or_else(|| anyhow::anyhow!("an exec probe without command"))?;
        let mut command = worker.live.command(Some(&container.name), program)?;
        command.args(arguments);
        return Ok(command);
    }
    let address = worker.live.addresses().first().map(ToString::to_string).unwrap_or_default();
    let target = if let Some(http) = &probe.http_get {
        let scheme = http.scheme.as_deref().unwrap_or("HTTP").to_ascii_lowercase();
        anyhow::ensure!(scheme == "http", "the lab probes over plain HTTP only");
        let host = in_url(http.host.clone().unwrap_or(address));
        let path = http.path.as_deref().unwrap_or("/");
        format!("http://{host}:{}{path}", port(container, &http.port)?)
    } else if let Some(tcp) = &probe.tcp_socket {
        let host = in_url(tcp.host.clone().unwrap_or(address));
        format!("tcp://{host}:{}", port(container, &tcp.port)?)
    } else {
        anyhow::bail!("the lab knows no probe of this kind")
    };
    let mut command = worker.live.node().command(&format!("{BINARIES}/ambit-example"))?;
    command.args(["probe", &target]);
    Ok(command)
}

/// An IPv6 address in brackets.
fn in_url(host: String) -> String {
    if host.parse::<std::net::Ipv6Addr>().is_ok() { format!("[{host}]") } else { host }
}

fn port(container: &Container, port: &IntOrString) -> anyhow::Result<i32> {
    match port {
        IntOrString::Int(number) => Ok(*number),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            let named = ports.find(|port| port.name.as_deref() == Some(name));
            let named = named.map(|port| port.container_port);
            named.ok_or_else(|| anyhow::anyhow!("container {} has no port called {name}", container.name))
        }
    }
}

fn seconds(given: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(given.and_then(|given| u64::try_from(given).ok()).unwrap_or(default))
}
