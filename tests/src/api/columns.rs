//! The columns `kubectl get` shows per kind, named and filled as the real server's printers do it.
//! Reference: `k8s.io/kubernetes/pkg/printers/internalversion/printers.go`.

use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use super::kinds::Kind;
use super::meta::{is_terminating, items, text};

/// One column.
pub(super) struct Column {
    pub(super) name: &'static str,
    /// `string` or `integer`.
    pub(super) kind: &'static str,
    /// Shown with `-o wide` only.
    pub(super) wide: bool,
    pub(super) cell: fn(&Value) -> Value,
}

const fn column(name: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column { name, kind: "string", wide: false, cell }
}

const fn number(name: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column { name, kind: "integer", wide: false, cell }
}

const fn wide(name: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column { name, kind: "string", wide: true, cell }
}

const NAME: Column = column("Name", |object| text(object, "/metadata/name").into());
const AGE: Column = column("Age", |object| age(text(object, "/metadata/creationTimestamp")).into());
const CREATED: Column = column("Created At", |object| text(object, "/metadata/creationTimestamp").into());
const CONTAINERS: Column = wide("Containers", |object| containers(object, "name"));
const IMAGES: Column = wide("Images", |object| containers(object, "image"));
const SELECTOR: Column = wide("Selector", |object| pairs(&object["spec"]["selector"]["matchLabels"]));

/// The columns of a built-in kind.
pub(super) fn of(kind: &Kind) -> &'static [Column] {
    match kind.kind.as_str() {
        "Pod" => POD,
        "Service" => SERVICE,
        "Node" => NODE,
        "Namespace" => &const { [NAME, column("Status", |ns| text(ns, "/status/phase").into()), AGE] },
        "Endpoints" => &const { [NAME, column("Endpoints", endpoints), AGE] },
        "EndpointSlice" => SLICE,
        "Deployment" => DEPLOYMENT,
        "ReplicaSet" => REPLICA_SET,
        "DaemonSet" => DAEMON_SET,
        "Job" => JOB,
        "CronJob" => CRON_JOB,
        "Secret" => {
            &const {
                [
                    NAME,
                    column("Type", |secret| text(secret, "/type").into()),
                    number("Data", |secret| size(&secret["data"]).into()),
                    AGE,
                ]
            }
        }
        "ConfigMap" => {
            &const { [NAME, number("Data", |map| (size(&map["data"]) + size(&map["binaryData"])).into()), AGE] }
        }
        "ServiceAccount" => {
            &const { [NAME, number("Secrets", |account| items(account, "/secrets").count().into()), AGE] }
        }
        "Event" => EVENT,
        "Lease" => {
            &const { [NAME, column("Holder", |lease| text(lease, "/spec/holderIdentity").into()), AGE] }
        }
        "RoleBinding" | "ClusterRoleBinding" => BINDING,
        "Role" | "ClusterRole" | "CustomResourceDefinition" => &const { [NAME, CREATED] },
        _ => &const { [NAME, AGE] },
    }
}

const POD: &[Column] = &[
    NAME,
    column("Ready", |pod| {
        let ready = items(pod, "/status/containerStatuses").filter(|status| status["ready"] == true).count();
        format!("{ready}/{}", items(pod, "/spec/containers").count()).into()
    }),
    column("Status", pod_status),
    number("Restarts", |pod| {
        items(pod, "/status/containerStatuses")
            .filter_map(|status| status["restartCount"].as_i64())
            .sum::<i64>()
            .into()
    }),
    AGE,
    wide("IP", |pod| or_none(text(pod, "/status/podIP"))),
    wide("Node", |pod| or_none(text(pod, "/spec/nodeName"))),
    wide("Nominated Node", |pod| or_none(text(pod, "/status/nominatedNodeName"))),
    wide("Readiness Gates", |_| or_none("")),
];

const SERVICE: &[Column] = &[
    NAME,
    column("Type", |service| text(service, "/spec/type").into()),
    column("Cluster-IP", |service| or_none(text(service, "/spec/clusterIP"))),
    column("External-IP", |service| {
        let assigned: Vec<&str> =
            items(service, "/status/loadBalancer/ingress").map(|ip| text(ip, "/ip")).collect();
        match text(service, "/spec/type") {
            "ExternalName" => text(service, "/spec/externalName").into(),
            "LoadBalancer" if assigned.is_empty() => "<pending>".into(),
            _ => or_none(&assigned.join(",")),
        }
    }),
    column("Port(s)", |service| {
        let port = |port: &Value| {
            let node = port["nodePort"].as_u64().map(|node| format!(":{node}")).unwrap_or_default();
            format!("{}{node}/{}", port["port"], text(port, "/protocol"))
        };
        or_none(&items(service, "/spec/ports").map(port).collect::<Vec<_>>().join(","))
    }),
    AGE,
    wide("Selector", |service| pairs(&service["spec"]["selector"])),
];

const NODE: &[Column] = &[
    NAME,
    column("Status", |node| {
        let ready = items(node, "/status/conditions").find(|condition| condition["type"] == "Ready");
        let status = match ready.map(|condition| text(condition, "/status")) {
            Some("True") => "Ready",
            Some(_) => "NotReady",
            None => "Unknown",
        };
        let cordoned = node.pointer("/spec/unschedulable") == Some(&Value::Bool(true));
        format!("{status}{}", if cordoned { ",SchedulingDisabled" } else { "" }).into()
    }),
    column("Roles", |node| {
        let labels = node["metadata"]["labels"].as_object().into_iter().flatten();
        let roles: Vec<&str> =
            labels.filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/")).collect();
        or_none(&roles.join(","))
    }),
    AGE,
    column("Version", |node| text(node, "/status/nodeInfo/kubeletVersion").into()),
    wide("Internal-IP", |node| node_address(node, "InternalIP")),
    wide("External-IP", |node| node_address(node, "ExternalIP")),
    wide("OS-Image", |node| or_unknown(text(node, "/status/nodeInfo/osImage"))),
    wide("Kernel-Version", |node| or_unknown(text(node, "/status/nodeInfo/kernelVersion"))),
    wide("Container-Runtime", |node| or_unknown(text(node, "/status/nodeInfo/containerRuntimeVersion"))),
];

const SLICE: &[Column] = &[
    NAME,
    column("AddressType", |slice| text(slice, "/addressType").into()),
    column("Ports", |slice| {
        let ports: Vec<String> = items(slice, "/ports").map(|port| port["port"].to_string()).collect();
        if ports.is_empty() { "<unset>".into() } else { ports.join(",").into() }
    }),
    column("Endpoints", |slice| {
        let addresses: Vec<&str> = items(slice, "/endpoints")
            .flat_map(|endpoint| items(endpoint, "/addresses"))
            .filter_map(Value::as_str)
            .collect();
        if addresses.is_empty() { "<unset>".into() } else { shortened(&addresses).into() }
    }),
    AGE,
];

const DEPLOYMENT: &[Column] = &[
    NAME,
    column("Ready", |deployment| {
        format!("{}/{}", count(deployment, "/status/readyReplicas"), count(deployment, "/spec/replicas"))
            .into()
    }),
    number("Up-to-date", |deployment| count(deployment, "/status/updatedReplicas").into()),
    number("Available", |deployment| count(deployment, "/status/availableReplicas").into()),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

const REPLICA_SET: &[Column] = &[
    NAME,
    number("Desired", |set| count(set, "/spec/replicas").into()),
    number("Current", |set| count(set, "/status/replicas").into()),
    number("Ready", |set| count(set, "/status/readyReplicas").into()),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

const DAEMON_SET: &[Column] = &[
    NAME,
    number("Desired", |set| count(set, "/status/desiredNumberScheduled").into()),
    number("Current", |set| count(set, "/status/currentNumberScheduled").into()),
    number("Ready", |set| count(set, "/status/numberReady").into()),
    number("Up-to-date", |set| count(set, "/status/updatedNumberScheduled").into()),
    number("Available", |set| count(set, "/status/numberAvailable").into()),
    column("Node Selector", |set| pairs(&set["spec"]["template"]["spec"]["nodeSelector"])),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

const JOB: &[Column] = &[
    NAME,
    column("Status", |job| {
        let holds = |kind: &str| {
            items(job, "/status/conditions")
                .any(|condition| condition["type"] == kind && condition["status"] == "True")
        };
        if holds("Complete") {
            "Complete"
        } else if holds("Failed") {
            "Failed"
        } else {
            "Running"
        }
        .into()
    }),
    column("Completions", |job| {
        format!("{}/{}", count(job, "/status/succeeded"), count(job, "/spec/completions")).into()
    }),
    column("Duration", |job| {
        let end = text(job, "/status/completionTime");
        between(text(job, "/status/startTime"), end).unwrap_or_default().into()
    }),
    AGE,
    CONTAINERS,
    IMAGES,
];

const CRON_JOB: &[Column] = &[
    NAME,
    column("Schedule", |job| text(job, "/spec/schedule").into()),
    column("Timezone", |job| or_none(text(job, "/spec/timeZone"))),
    column("Suspend", |job| if job["spec"]["suspend"] == true { "True" } else { "False" }.into()),
    number("Active", |job| items(job, "/status/active").count().into()),
    column("Last Schedule", |job| {
        or_none(&between(text(job, "/status/lastScheduleTime"), "").unwrap_or_default())
    }),
    AGE,
];

const EVENT: &[Column] = &[
    column("Last Seen", |event| {
        let seen =
            ["/lastTimestamp", "/eventTime", "/deprecatedLastTimestamp", "/metadata/creationTimestamp"];
        age(seen.iter().map(|path| text(event, path)).find(|time| !time.is_empty()).unwrap_or_default())
            .into()
    }),
    column("Type", |event| text(event, "/type").into()),
    column("Reason", |event| text(event, "/reason").into()),
    column("Object", |event| {
        let object =
            if event["regarding"].is_object() { &event["regarding"] } else { &event["involvedObject"] };
        format!("{}/{}", text(object, "/kind").to_lowercase(), text(object, "/name")).into()
    }),
    column("Message", |event| {
        let note = text(event, "/note");
        if note.is_empty() { text(event, "/message") } else { note }.into()
    }),
    wide("Name", |event| text(event, "/metadata/name").into()),
];

const BINDING: &[Column] = &[
    NAME,
    column("Role", |binding| {
        format!("{}/{}", text(binding, "/roleRef/kind"), text(binding, "/roleRef/name")).into()
    }),
    AGE,
    wide("Users", |binding| subjects(binding, "User")),
    wide("Groups", |binding| subjects(binding, "Group")),
    wide("ServiceAccounts", |binding| subjects(binding, "ServiceAccount")),
];

/// The word for a pod's state: why it waits or ended, else its phase.
fn pod_status(pod: &Value) -> Value {
    let own = text(pod, "/status/reason");
    let mut status = if own.is_empty() { text(pod, "/status/phase") } else { own };
    for container in items(pod, "/status/containerStatuses") {
        for path in ["/state/waiting/reason", "/state/terminated/reason"] {
            let reason = text(container, path);
            if !reason.is_empty() {
                status = reason;
            }
        }
    }
    if is_terminating(pod) { "Terminating" } else { status }.into()
}

fn containers(object: &Value, field: &str) -> Value {
    let names: Vec<&str> = items(object, "/spec/template/spec/containers")
        .filter_map(|container| container[field].as_str())
        .collect();
    names.join(",").into()
}

fn subjects(binding: &Value, kind: &str) -> Value {
    let name = |subject: &Value| match text(subject, "/namespace") {
        "" => text(subject, "/name").to_owned(),
        namespace => format!("{namespace}/{}", text(subject, "/name")),
    };
    let named = items(binding, "/subjects").filter(|subject| subject["kind"] == kind);
    named.map(name).collect::<Vec<_>>().join(", ").into()
}

fn endpoints(object: &Value) -> Value {
    let mut all = Vec::new();
    for subset in items(object, "/subsets") {
        for address in items(subset, "/addresses") {
            for port in items(subset, "/ports") {
                all.push(format!("{}:{}", text(address, "/ip"), port["port"]));
            }
        }
    }
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    or_none(&shortened(&all))
}

/// The first three, and how many more there are.
fn shortened(all: &[&str]) -> String {
    let shown = all.iter().take(3).copied().collect::<Vec<_>>().join(",");
    if all.len() > 3 { format!("{shown} + {} more...", all.len() - 3) } else { shown }
}

fn node_address(node: &Value, kind: &str) -> Value {
    let found = items(node, "/status/addresses").find(|address| address["type"] == kind);
    or_none(found.map(|address| text(address, "/address")).unwrap_or_default())
}

fn pairs(labels: &Value) -> Value {
    let pair = |(key, value): (&String, &Value)| format!("{key}={}", value.as_str().unwrap_or_default());
    or_none(&labels.as_object().into_iter().flatten().map(pair).collect::<Vec<_>>().join(","))
}

fn count(object: &Value, path: &str) -> i64 {
    object.pointer(path).and_then(Value::as_i64).unwrap_or(0)
}

fn size(map: &Value) -> usize {
    map.as_object().map_or(0, serde_json::Map::len)
}

fn or_none(text: &str) -> Value {
    if text.is_empty() { "<none>" } else { text }.into()
}

fn or_unknown(text: &str) -> Value {
    if text.is_empty() { "<unknown>" } else { text }.into()
}

/// How long ago `time` was, in the short form of `kubectl`.
pub(super) fn age(time: &str) -> String {
    between(time, "").unwrap_or_else(|| "<unknown>".to_owned())
}

/// From `start` to `end`, or to now when `end` is empty.
fn between(start: &str, end: &str) -> Option<String> {
    let start: Timestamp = start.parse().ok()?;
    let end = if end.is_empty() { Timestamp::now() } else { end.parse().ok()? };
    Some(human(end.as_second().saturating_sub(start.as_second()).max(0)))
}

/// Two units at most, as `k8s.io/apimachinery/pkg/util/duration.HumanDuration`.
fn human(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |large: i64, unit: &str, small: i64, below: &str| match small {
        0 => format!("{large}{unit}"),
        _ => format!("{large}{unit}{small}{below}"),
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        _ => two(days / 365, "y", days % 365, "d"),
    }
}

#[cfg(test)]
mod tests {
    use super::{human, shortened};

    #[test]
    fn durations_are_short() {
        for (seconds, expect) in [
            (0, "0s"),
            (119, "119s"),
            (125, "2m5s"),
            (3000, "50m"),
            (3 * 3600 + 60, "3h1m"),
            (10 * 3600, "10h"),
            (3 * 86_400, "3d"),
            (30 * 86_400, "30d"),
        ] {
            assert_eq!(human(seconds), expect);
        }
        assert_eq!(shortened(&["a", "b", "c", "d"]), "a,b,c + 1 more...");
    }
}
