//! Capture is proved from inside the pods, told in their status, and put back where somebody takes it away.

use std::time::Duration;

use anyhow::ensure;
use mesh_tests::eventually;
use mesh_tests::lab::{Background, Lab, PodRef};
use mesh_tests::workload::Workload;

use crate::fixture::{HTTP, ask};
use crate::shared::scenario;

/// In which a loss is found and made good: a period and a repair, on a busy machine.
const SECONDS: Duration = Duration::from_secs(20);

const CAPTURED: &str = "--for=condition=ambit.io/captured";

/// What `kubectl` shows of a pod's condition as it changes.
fn watch(lab: &Lab, pod: &str) -> anyhow::Result<Background> {
    let fields =
        "-o=jsonpath={.status.conditions[?(@.type==\"ambit.io/captured\")]['status','reason']}{\"\\n\"}";
    lab.kubectl_in_background(["get", "-n", "mesh", "pod", pod, "--watch", fields])
}

fn from_node(pod: &PodRef<'_>, line: &str) -> anyhow::Result<()> {
    pod.exec_from_node(line.split(' '))?.ok(line).map(drop)
}

fn repairs(lab: &Lab, part: &str) -> anyhow::Result<u64> {
    let metrics = lab.scrape(1, 15014, "/metrics")?;
    let name = format!("ambit_agent_capture_repairs_total{{part=\"{part}\"}} ");
    let count =
        metrics.lines().find_map(|line| line.strip_prefix(&name)).unwrap_or_default().trim().to_owned();
    count.parse().map_err(|_| anyhow::anyhow!("no {name} in\n{metrics}"))
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_a_pod_loses_is_told_and_put_back() {
    scenario(|lab| {
        let pod = Workload::new("mesh", "proved").serve().on_node(1).start(lab)?;
        lab.kubectl(["wait", "-n", "mesh", CAPTURED, "--timeout=30s", "pod/proved"])?;
        let seen = watch(lab, "proved")?;
        seen.wait_for("True Proved", SECONDS)?;
        for (loss, reason, part) in [
            ("ip rule del priority 100", "RulesMissing", "rules"),
            ("ip -6 route flush table 1337", "RulesMissing", "rules"),
            ("ip rule del priority 102", "DnsNotCaptured", "dns"),
        ] {
            let (before, repaired) = (seen.output().len(), repairs(lab, part)?);
            from_node(&pod, loss)?;
            eventually(&format!("{loss}: told and put back"), SECONDS, || {
                let output = seen.output();
                let news = &output[before..];
                let lost = news.find(&format!("False {reason}"));
                ensure!(lost.is_some_and(|at| news[at..].contains("True Proved")), "{news:?}");
                Ok(())
            })?;
            ensure!(repairs(lab, part)? == repaired + 1, "{loss}: not counted");
            ask(&pod, &format!("http://{}:{HTTP}/after", lab.pod("mesh/far").address()?))?;
        }
        lab.kubectl(["wait", "-n", "mesh", CAPTURED, "--timeout=5s", "pod/proved"])?;
        // Nobody else hears of canaries.
        for daemon in ["ztunnel", "node-agent"] {
            let log = lab.daemon(daemon, 1).logs()?;
            ensure!(!log.contains("192.0.2.1"), "a canary in the log of {daemon}");
        }
        Ok(())
    });
}

/// As a sandboxed runtime does, which takes the address away that the CNI plugin gave.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_cannot_be_captured_is_not_called_captured() {
    scenario(|lab| {
        let pod = Workload::new("mesh", "sandboxed").on_node(1).start(lab)?;
        lab.kubectl(["wait", "-n", "mesh", CAPTURED, "--timeout=30s", "pod/sandboxed"])?;
        from_node(&pod, "ip -4 addr flush dev eth0")?;
        let not = format!("{CAPTURED}=false");
        lab.kubectl(["wait", "-n", "mesh", &not, "--timeout=30s", "pod/sandboxed"])?;
        let status = pod.object()?.status.unwrap_or_default();
        let ours = status.conditions.unwrap_or_default();
        let ours = ours.iter().find(|condition| condition.type_ == "ambit.io/captured");
        let text = format!("{ours:?}");
        ensure!(text.contains("AddressMissing") && text.contains("dataplane-mode=none"), "{text}");
        lab.kubectl(["delete", "-n", "mesh", "pod", "sandboxed", "--wait"]).map(drop)
    });
}
