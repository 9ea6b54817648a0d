//! The state of a pod in one word and three numbers.
//! Reference: `printPod` of `k8s.io/kubernetes/pkg/printers/internalversion/printers.go`.

use serde_json::Value;

use super::super::meta::{is_terminating, items, text};
use super::cells::age;

/// Ready containers of all, sidecars included.
pub(super) fn ready(pod: &Value) -> String {
    let sidecars = items(pod, "/spec/initContainers").filter(|container| is_sidecar(container));
    let all = items(pod, "/spec/containers").count() + sidecars.count();
    format!("{}/{all}", Summary::of(pod).ready)
}

/// Why it waits or ended, else its phase.
pub(super) fn status(pod: &Value) -> String {
    let phase = text(pod, "/status/phase");
    if is_terminating(pod) && text(pod, "/status/reason") == "NodeLost" {
        return "Unknown".to_owned();
    }
    if is_terminating(pod) && !["Succeeded", "Failed"].contains(&phase) {
        return "Terminating".to_owned();
    }
    Summary::of(pod).word
}

/// How often its containers were started again, and when last.
pub(super) fn restarts(pod: &Value) -> String {
    let Summary { restarts, last, .. } = Summary::of(pod);
    if restarts == 0 || last.is_empty() {
        restarts.to_string()
    } else {
        format!("{restarts} ({} ago)", age(last))
    }
}

/// Readiness gates that hold, of all; empty if it has none.
pub(super) fn gates(pod: &Value) -> String {
    let all: Vec<&str> =
        items(pod, "/spec/readinessGates").map(|gate| text(gate, "/conditionType")).collect();
    let open = all.iter().filter(|kind| holds(pod, kind)).count();
    if all.is_empty() { String::new() } else { format!("{open}/{}", all.len()) }
}

#[derive(Default)]
struct Summary<'a> {
    word: String,
    ready: usize,
    restarts: i64,
    /// When a container ended that was started again; empty if none was.
    last: &'a str,
}

impl<'a> Summary<'a> {
    fn of(pod: &'a Value) -> Self {
        let own = text(pod, "/status/reason");
        let word = if own.is_empty() { text(pod, "/status/phase") } else { own }.to_owned();
        let mut summary = Self { word, ..Self::default() };
        let gated = |condition: &Value| {
            condition["type"] == "PodScheduled" && condition["reason"] == "SchedulingGated"
        };
        if items(pod, "/status/conditions").any(gated) {
            "SchedulingGated".clone_into(&mut summary.word);
        }
        let sidecars = summary.initialize(pod);
        if let Some(sidecars) = sidecars {
            // Containers for initialization have done their part: what they did no longer counts.
            (summary.restarts, summary.last) = sidecars;
            summary.run(pod);
        }
        summary
    }

    /// Goes through the initialization. When it is over: restarts of the sidecars, and the last of them.
    fn initialize(&mut self, pod: &'a Value) -> Option<(i64, &'a str)> {
        let declared: Vec<&Value> = items(pod, "/spec/initContainers").collect();
        let (mut sidecars, mut over) = ((0, ""), true);
        for (index, container) in items(pod, "/status/initContainerStatuses").enumerate() {
            let spec = declared.iter().find(|spec| spec["name"] == container["name"]);
            let sidecar = spec.is_some_and(|spec| is_sidecar(spec));
            self.count(container);
            if sidecar {
                sidecars.0 += container["restartCount"].as_i64().unwrap_or(0);
                sidecars.1 = sidecars.1.max(ended(container));
            }
            let (terminated, waiting) =
                (&container["state"]["terminated"], text(container, "/state/waiting/reason"));
            if terminated["exitCode"] == 0 {
                continue;
            }
            if sidecar && container["started"] == true {
                self.ready += usize::from(container["ready"] == true);
                continue;
            }
            self.word = if terminated.is_object() {
                format!("Init:{}", reason(terminated))
            } else if !waiting.is_empty() && waiting != "PodInitializing" {
                format!("Init:{waiting}")
            } else {
                format!("Init:{index}/{}", declared.len())
            };
            over = false;
            break;
        }
        (over || holds(pod, "Initialized")).then_some(sidecars)
    }

    /// Goes through the containers; the first one's word is the last.
    fn run(&mut self, pod: &'a Value) {
        let mut running = false;
        let containers: Vec<&Value> = items(pod, "/status/containerStatuses").collect();
        for container in containers.into_iter().rev() {
            self.count(container);
            let state = &container["state"];
            let waiting = text(state, "/waiting/reason");
            if !waiting.is_empty() {
                waiting.clone_into(&mut self.word);
            } else if state["terminated"].is_object() {
                self.word = reason(&state["terminated"]);
            } else if container["ready"] == true && state["running"].is_object() {
                running = true;
                self.ready += 1;
            }
        }
        if self.word == "Completed" && running {
            self.word = if holds(pod, "Ready") { "Running" } else { "NotReady" }.to_owned();
        }
    }

    fn count(&mut self, container: &'a Value) {
        self.restarts += container["restartCount"].as_i64().unwrap_or(0);
        self.last = self.last.max(ended(container));
    }
}

/// When a container ended before it was started again. Such times are in order as texts are.
fn ended(container: &Value) -> &str {
    text(container, "/lastState/terminated/finishedAt")
}

fn is_sidecar(container: &Value) -> bool {
    container["restartPolicy"] == "Always"
}

fn holds(pod: &Value, kind: &str) -> bool {
    items(pod, "/status/conditions")
        .any(|condition| condition["type"] == kind && condition["status"] == "True")
}

/// Why a container ended.
fn reason(terminated: &Value) -> String {
    match (text(terminated, "/reason"), terminated["signal"].as_i64().unwrap_or(0)) {
        ("", 0) => format!("ExitCode:{}", terminated["exitCode"]),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{ready, restarts, status};

    /// Ready, status and restarts of a pod with two init containers, the second a sidecar, and two containers.
    fn shown(init: &Value, containers: &Value, rest: &Value) -> [String; 3] {
        let mut pod = json!({
            "metadata": {},
            "spec": {
                "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}],
                "containers": [{"name": "a"}, {"name": "b"}],
            },
            "status": {"phase": "Pending", "initContainerStatuses": init, "containerStatuses": containers},
        });
        super::super::super::patch::merge(&mut pod, rest);
        [ready(&pod), status(&pod), restarts(&pod)]
    }

    #[test]
    fn initialization() {
        let waiting = json!({"name": "s", "state": {"waiting": {"reason": "PodInitializing"}}});
        let done = json!({"name": "i", "restartCount": 3, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}});
        let sidecar =
            json!({"name": "s", "started": true, "ready": true, "restartCount": 1, "state": {"running": {}}});
        let failed =
            |terminated: Value| json!({"name": "i", "restartCount": 3, "state": {"terminated": terminated}});
        for (init, expect) in [
            (json!([{"name": "i", "state": {"running": {}}}, waiting]), ["0/3", "Init:0/2", "0"]),
            (json!([done, waiting]), ["0/3", "Init:1/2", "3"]),
            (
                json!([{"name": "i", "restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]),
                ["0/3", "Init:CrashLoopBackOff", "2"],
            ),
            (json!([failed(json!({"exitCode": 1, "reason": "Error"})), waiting]), ["0/3", "Init:Error", "3"]),
            (json!([failed(json!({"exitCode": 1})), waiting]), ["0/3", "Init:ExitCode:1", "3"]),
            (json!([failed(json!({"exitCode": 137, "signal": 9})), waiting]), ["0/3", "Init:Signal:9", "3"]),
            (json!([done, sidecar]), ["1/3", "Pending", "1"]),
        ] {
            assert_eq!(shown(&init, &json!([]), &json!({})), expect, "{init}");
        }
    }

    #[test]
    fn containers() {
        let (up, down) =
            (json!({"ready": true, "state": {"running": {}}}), json!({"state": {"running": {}}}));
        let ended = |reason: &str| json!({"state": {"terminated": {"exitCode": 0, "reason": reason}}});
        let waiting = json!({"restartCount": 4, "state": {"waiting": {"reason": "CrashLoopBackOff"}}});
        let conditions = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        for (containers, rest, expect) in [
            (json!([up, up]), json!({"status": {"phase": "Running"}}), ["2/3", "Running", "0"]),
            (json!([up, down]), json!({"status": {"phase": "Running"}}), ["1/3", "Running", "0"]),
            (json!([up, waiting]), json!({}), ["1/3", "CrashLoopBackOff", "4"]),
            (json!([waiting, ended("Error")]), json!({}), ["0/3", "CrashLoopBackOff", "4"]),
            (json!([ended("Completed"), up]), conditions, ["1/3", "Running", "0"]),
            (json!([ended("Completed"), up]), json!({}), ["1/3", "NotReady", "0"]),
            (json!([ended("Completed"), ended("Completed")]), json!({}), ["0/3", "Completed", "0"]),
            (json!([up]), json!({"metadata": {"deletionTimestamp": "x"}}), ["1/3", "Terminating", "0"]),
            (
                json!([ended("Error")]),
                json!({"metadata": {"deletionTimestamp": "x"}, "status": {"phase": "Failed"}}),
                ["0/3", "Error", "0"],
            ),
            (json!([]), json!({"status": {"phase": "Failed", "reason": "Evicted"}}), ["0/3", "Evicted", "0"]),
        ] {
            assert_eq!(shown(&json!([]), &containers, &rest), expect, "{containers} {rest}");
        }
    }

    #[test]
    fn the_last_restart_is_told() {
        let container = |count: i64, at: &str| json!({"restartCount": count, "lastState": {"terminated": {"finishedAt": at}}});
        let containers = json!([container(1, "2000-01-01T00:00:00Z"), container(1, "2001-01-01T00:00:00Z")]);
        let told = shown(&json!([]), &containers, &json!({})).into_iter().next_back().unwrap();
        assert!(told.starts_with("2 (") && told.ends_with("y ago)"), "{told}");
    }
}
