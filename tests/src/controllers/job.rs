//! Jobs: pods until as many have succeeded as were asked for, or more have failed than may.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::{State, Write, create, finished, leaving, pod, ready, status};
use crate::cluster::Kind;

pub(super) fn plan(state: &State) -> Vec<Write> {
    let jobs = state.jobs.iter().filter(|job| !leaving(&job.metadata) && !is_over(job));
    jobs.flat_map(|job| one(state, job)).collect()
}

fn one(state: &State, job: &Job) -> Vec<Write> {
    let Some(spec) = &job.spec else { return Vec::new() };
    let pods: Vec<&Pod> = state.pods_of(job.metadata.uid.as_deref()).collect();
    let ended = |phase: &str| pods.iter().filter(|pod| is(pod, phase)).count();
    let (succeeded, failed) = (ended("Succeeded"), ended("Failed"));
    let active: Vec<&&Pod> = pods.iter().filter(|pod| !finished(pod) && !leaving(&pod.metadata)).collect();
    let number =
        |given: Option<i32>, default| given.map_or(default, |given| usize::try_from(given).unwrap_or(0));
    let missing = number(spec.completions, 1).saturating_sub(succeeded);
    let outcome = if missing == 0 {
        Some("Complete")
    } else if failed > number(spec.backoff_limit, 6) {
        Some("Failed")
    } else {
        None
    };
    let mut writes = Vec::new();
    if outcome.is_none() && spec.suspend != Some(true) {
        for _ in active.len()..missing.min(number(spec.parallelism, 1)) {
            writes.extend(create(Kind::Pod, &pod(("batch/v1", "Job", &job.metadata), &spec.template)));
        }
    }
    writes.extend(counts(job, &active, [succeeded, failed], outcome, state.now));
    writes
}

/// Times as `metav1.Time` is written.
fn counts(
    job: &Job,
    active: &[&&Pod],
    [succeeded, failed]: [usize; 2],
    outcome: Option<&str>,
    now: Timestamp,
) -> Option<Write> {
    let began = job.metadata.creation_timestamp.as_ref().map(|time| time.0).unwrap_or(now);
    let mut wanted = json!({
        "active": active.len(),
        "ready": active.iter().filter(|pod| ready(pod)).count(),
        "succeeded": succeeded,
        "failed": failed,
        "startTime": seconds(began),
    });
    if let Some(outcome) = outcome {
        let condition = json!({ "type": outcome, "status": "True", "lastTransitionTime": seconds(now) });
        wanted["conditions"] = json!([condition]);
        if outcome == "Complete" {
            wanted["completionTime"] = seconds(now);
        }
    }
    status(Kind::Job, &job.metadata, job.status.as_ref(), wanted)
}

fn seconds(time: Timestamp) -> Value {
    json!(Timestamp::from_second(time.as_second()).unwrap_or(time).to_string())
}

fn is(pod: &Pod, phase: &str) -> bool {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some(phase)
}

/// Whether it has succeeded or failed for good.
fn is_over(job: &Job) -> bool {
    let conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions
        .filter(|one| ["Complete", "Failed"].contains(&one.type_.as_str()))
        .any(|one| one.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written for a Job of these pods, by phase: how many pods are created, and the condition if there is one.
    fn check(spec: Value, phases: &[&str], created: usize, condition: Option<&str>) {
        let mut job = json!({
            "metadata": { "name": "once", "namespace": "shop", "uid": "u" },
            "spec": { "template": { "spec": { "containers": [], "restartPolicy": "Never" } } },
        });
        for (key, value) in spec.as_object().expect("fields") {
            job["spec"][key] = value.clone();
        }
        let owner = json!([{ "apiVersion": "batch/v1", "kind": "Job", "name": "once", "uid": "u", "controller": true }]);
        let pods = phases.iter().map(|phase| {
            let pod = json!({ "metadata": { "ownerReferences": owner }, "status": { "phase": phase } });
            serde_json::from_value(pod).expect("a pod")
        });
        let mut state = State {
            jobs: vec![serde_json::from_value(job).expect("a Job")],
            pods: pods.collect(),
            ..State::default()
        };
        let writes = plan(&state);
        let pods = writes.iter().filter(|write| matches!(write, Write::Create(Kind::Pod, _))).count();
        assert_eq!(pods, created, "{spec} {phases:?}");
        let status = writes.iter().find_map(|write| match write {
            Write::Status { status, .. } => Some(status.clone()),
            _ => None,
        });
        let status = status.expect("a status");
        assert_eq!(status["conditions"][0]["type"].as_str(), condition, "{spec} {phases:?}");
        // Written once, then it is left alone if it is over.
        state.jobs[0].status = serde_json::from_value(status).expect("a status");
        let again = plan(&state);
        assert_eq!(again.len(), created, "{again:?}");
    }

    #[test]
    fn pods_until_enough_have_succeeded_or_too_many_have_failed() {
        let once = || json!({});
        check(once(), &[], 1, None);
        check(once(), &["Running"], 0, None);
        check(once(), &["Succeeded"], 0, Some("Complete"));
        check(once(), &["Failed"], 1, None);
        check(once(), &["Failed"; 7], 0, Some("Failed"));
        check(once(), &["Failed", "Succeeded"], 0, Some("Complete"));
        let three = || json!({ "completions": 3, "parallelism": 2, "backoffLimit": 0 });
        check(three(), &[], 2, None);
        check(three(), &["Running", "Succeeded"], 1, None);
        check(three(), &["Succeeded", "Succeeded"], 1, None);
        check(three(), &["Running", "Failed"], 0, Some("Failed"));
        check(json!({ "suspend": true }), &[], 0, None);
    }
}
