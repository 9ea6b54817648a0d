//! The columns `kubectl get` shows per kind, named and filled as the real server's printers do it.
//! Reference: `k8s.io/kubernetes/pkg/printers/internalversion/printers.go`.

mod cells;
mod pod;

use serde_json::Value;

use super::kinds::Kind;
use super::meta::{is_terminating, items, text};
use super::select::Selector;
pub(super) use cells::age;
use cells::{
    between, containers, count, endpoints, node_address, or_none, or_unknown, pairs, shortened, size,
    subjects,
};

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
const SELECTOR: Column = wide("Selector", |object| selector(&object["spec"]["selector"]));

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
        "NetworkPolicy" => {
            &const { [NAME, column("Pod-Selector", |policy| selector(&policy["spec"]["podSelector"])), AGE] }
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
    column("Ready", |pod| pod::ready(pod).into()),
    column("Status", |pod| pod::status(pod).into()),
    column("Restarts", |pod| pod::restarts(pod).into()),
    AGE,
    wide("IP", |pod| or_none(text(pod, "/status/podIP"))),
    wide("Node", |pod| or_none(text(pod, "/spec/nodeName"))),
    wide("Nominated Node", |pod| or_none(text(pod, "/status/nominatedNodeName"))),
    wide("Readiness Gates", |pod| or_none(&pod::gates(pod))),
];

const SERVICE: &[Column] = &[
    NAME,
    column("Type", |service| text(service, "/spec/type").into()),
    column("Cluster-IP", |service| or_none(text(service, "/spec/clusterIP"))),
    column("External-IP", |service| {
        let address = |ingress| match text(ingress, "/ip") {
            "" => text(ingress, "/hostname"),
            ip => ip,
        };
        let mut assigned: Vec<&str> = items(service, "/status/loadBalancer/ingress").map(address).collect();
        assigned.extend(items(service, "/spec/externalIPs").filter_map(Value::as_str));
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
        let ended = ["Complete", "Failed"].into_iter().find(|kind| holds(kind));
        let suspended = || holds("Suspended").then_some("Suspended");
        ended.or(is_terminating(job).then_some("Terminating")).or_else(suspended).unwrap_or("Running").into()
    }),
    column("Completions", |job| {
        let wanted = match (job["spec"]["completions"].as_i64(), count(job, "/spec/parallelism")) {
            (Some(completions), _) => completions.to_string(),
            (None, parallel @ 2..) => format!("1 of {parallel}"),
            (None, _) => "1".to_owned(),
        };
        format!("{}/{wanted}", count(job, "/status/succeeded")).into()
    }),
    column("Duration", |job| {
        let end = text(job, "/status/completionTime");
        between(text(job, "/status/startTime"), end).unwrap_or_default().into()
    }),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
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
        let seen = [
            "/series/lastObservedTime",
            "/lastTimestamp",
            "/deprecatedLastTimestamp",
            "/eventTime",
            "/metadata/creationTimestamp",
        ];
        first_age(event, &seen)
    }),
    column("Type", |event| text(event, "/type").into()),
    column("Reason", |event| text(event, "/reason").into()),
    column("Object", |event| {
        let object = regarded(event);
        format!("{}/{}", text(object, "/kind").to_lowercase(), text(object, "/name")).into()
    }),
    wide("Subobject", |event| text(regarded(event), "/fieldPath").into()),
    wide("Source", |event| {
        let source = ["source", "deprecatedSource"].map(|field| &event[field]);
        let part =
            |field: &str| source.iter().map(|source| text(source, field)).find(|part| !part.is_empty());
        let component = part("/component").unwrap_or_else(|| {
            let controller = text(event, "/reportingController");
            if controller.is_empty() { text(event, "/reportingComponent") } else { controller }
        });
        [component].into_iter().chain(part("/host")).collect::<Vec<_>>().join(", ").into()
    }),
    column("Message", |event| {
        let note = text(event, "/note");
        if note.is_empty() { text(event, "/message") } else { note }.trim().into()
    }),
    wide("First Seen", |event| {
        let seen =
            ["/firstTimestamp", "/deprecatedFirstTimestamp", "/eventTime", "/metadata/creationTimestamp"];
        first_age(event, &seen)
    }),
    Column {
        wide: true,
        ..number("Count", |event| {
            let counts = ["/series/count", "/count", "/deprecatedCount"].map(|path| count(event, path));
            counts.into_iter().find(|count| *count > 0).unwrap_or(1).into()
        })
    },
    wide("Name", |event| text(event, "/metadata/name").into()),
];

/// What an event of either group is about.
fn regarded(event: &Value) -> &Value {
    if event["regarding"].is_object() { &event["regarding"] } else { &event["involvedObject"] }
}

/// The age by the first of these times that is there.
fn first_age(object: &Value, paths: &[&str]) -> Value {
    age(paths.iter().map(|path| text(object, path)).find(|time| !time.is_empty()).unwrap_or_default()).into()
}

/// A label selector as text.
fn selector(selector: &Value) -> Value {
    or_none(&Selector::of_label_selector(selector).to_string())
}

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
