//! Many pods created at once: how long enrolment holds each of them up.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use crate::demo::progress;
use crate::lab::PodRef;
use crate::workload::Workload;
use crate::{Lab, eventually};

/// For all pods of a crowd together; they share this machine's processors.
const PATIENCE: Duration = Duration::from_secs(240);

#[derive(Debug, clap::Args)]
pub struct Config {
    /// Pods, on two nodes in turns.
    #[arg(long, default_value_t = 100)]
    pods: usize,
    /// Print the result as one JSON object; progress goes to stderr.
    #[arg(long)]
    json: bool,
}

/// What a crowd took. Enrolment is from the runtime's call of the plugin to its answer: the pod's containers start after
/// it, so that it is what the mesh adds to a pod's start.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub pods: usize,
    pub enrolment_p50_ms: f64,
    pub enrolment_p99_ms: f64,
    pub enrolment_max_ms: f64,
    /// Until the last one ran and was said to be captured.
    pub all_seconds: f64,
    /// Attempts that the runtime had to repeat.
    pub repeated: usize,
}

pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    progress("starting a cluster of two nodes with the mesh");
    let lab = Lab::new().nodes(2).mesh().start()?;
    lab.namespace("crowd", &[("istio.io/dataplane-mode", "ambient")])?;
    // Programs, certificates and caches are warm.
    start(&lab, "crowd", "warm", 2)?;
    progress(&format!("creating {} pods", config.pods));
    let outcome = start(&lab, "crowd", "pod", config.pods.max(1))?;
    if config.json {
        println!("{}", serde_json::to_string(&outcome)?);
    } else {
        let Outcome { pods, enrolment_p50_ms, enrolment_p99_ms, enrolment_max_ms, all_seconds, repeated } =
            outcome;
        println!("{pods} pods at once on two nodes: all run and captured after {all_seconds:.1} s");
        println!(
            "enrolment of each: p50 {enrolment_p50_ms:.0} ms, p99 {enrolment_p99_ms:.0} ms, max {enrolment_max_ms:.0} ms; {repeated} repeated"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Creates idle pods `<prefix>-1` and so on, and waits until all of them run and are said to be captured.
pub fn start(lab: &Lab, namespace: &str, prefix: &str, count: usize) -> anyhow::Result<Outcome> {
    let began = Instant::now();
    let failed = |lab: &Lab| {
        let events = lab.cluster().events(namespace);
        events.iter().filter(|event| event.contains("FailedCreatePodSandBox")).count()
    };
    let before = failed(lab);
    let mut pods: Vec<PodRef<'_>> = Vec::new();
    for number in 1..=count {
        let node = if number % 2 == 0 { 1 } else { 2 };
        pods.push(Workload::new(namespace, &format!("{prefix}-{number}")).on_node(node).create(lab)?);
    }
    let mut rest = pods.clone();
    eventually(&format!("{count} pods run and are captured"), PATIENCE, || {
        let mut waits = Vec::new();
        for pod in &rest {
            if !is_in_the_mesh(pod)? {
                waits.push(pod.clone());
            }
        }
        rest = waits;
        anyhow::ensure!(rest.is_empty(), "{} are not", rest.len());
        Ok(())
    })
    .map_err(|error| error.context(lab.story(namespace)))?;
    let all_seconds = began.elapsed().as_secs_f64();
    let mut times = Vec::new();
    for pod in &pods {
        let time = pod.live()?.enrolment().context("a pod that the mesh's plugin was not called for")?;
        times.push(time.as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(Outcome {
        pods: count,
        enrolment_p50_ms: percentile(&times, 50),
        enrolment_p99_ms: percentile(&times, 99),
        enrolment_max_ms: percentile(&times, 100),
        all_seconds,
        repeated: failed(lab).saturating_sub(before),
    })
}

fn is_in_the_mesh(pod: &PodRef<'_>) -> anyhow::Result<bool> {
    let object = pod.object()?;
    let phase = object.status.and_then(|status| status.phase);
    let annotations = object.metadata.annotations.unwrap_or_default();
    let said = annotations.get("ambient.istio.io/redirection").is_some_and(|said| said == "enabled");
    Ok(said && phase.as_deref() == Some("Running"))
}

/// The smallest that so many of a hundred do not exceed.
fn percentile(sorted: &[f64], of_hundred: usize) -> f64 {
    let rank = (sorted.len() * of_hundred).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn percentiles_by_nearest_rank() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([50, 99, 100].map(|of| percentile(&hundred, of)), [50.0, 99.0, 100.0]);
        assert_eq!([1, 50, 99, 100].map(|of| percentile(&[3.0, 4.0], of)), [3.0, 3.0, 4.0, 4.0]);
        assert!(percentile(&[], 50).is_nan());
    }
}
