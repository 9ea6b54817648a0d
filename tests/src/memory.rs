//! What a workload costs in memory, in the agent and in a ztunnel, and what a change costs, by how many workloads there
//! are: from the API server's event to the proxy having it, without the network in between.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use mesh_core::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use mesh_core::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use mesh_core::store;
use mesh_core::xds::{mesh::Mesh, stream};
use node_agent::index::event::{Event, Object};
use node_agent::index::{self, Index};
use node_agent::xds::session::Session;
use node_agent::xds::snapshot::{Snapshot, Type};
use prost::Message as _;
use serde_json::{Value, json};

/// Pods of one Deployment, which have a Service and an EndpointSlice together.
const PODS_OF_SERVICE: usize = 20;
/// Pods of one node.
const PODS_OF_NODE: usize = 100;

#[derive(Debug, clap::Args)]
pub struct Config {
    /// Numbers of workloads.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,100000")]
    workloads: Vec<usize>,
    /// Changes that each figure is the mean of.
    #[arg(long, default_value_t = 500)]
    changes: usize,
}

/// The agent's side and the proxy's, both in this process.
struct Both {
    index: Index,
    snapshot: Snapshot,
    session: Session,
    client: stream::Session,
    mesh: Mesh<fn(&store::Changes)>,
    known: store::Reader,
}

/// Prints a line for each number.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    println!(
        "bytes in use for each workload (a pod; every {PODS_OF_SERVICE}th brings a Service), {build} build:"
    );
    for count in &config.workloads {
        measure(*count, config.changes)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(count: usize, changes: usize) -> anyhow::Result<()> {
    let mut both = Both::new();
    let start = in_use();
    let mut keys = BTreeSet::new();
    for object in objects(count) {
        let changes = both.index.handle(Event::Applied(object?));
        anyhow::ensure!(changes.problems.is_empty(), "refused: {:?}", changes.problems);
        keys.extend(changes.keys);
    }
    let before = in_use();
    for key in &keys {
        let resource = both.index.resource(key);
        both.snapshot.put(Type::Address, &both.index.resource_name(key), resource.as_ref());
    }
    let encoded = in_use() - before;
    drop(keys);
    let model = in_use() - start;
    let responses = both.responses(true)?;
    let sent: usize = responses.iter().map(Vec::capacity).sum();
    let agent = in_use() - start - sent;
    for response in &responses {
        both.receive(response)?;
    }
    let proxy = in_use() - start - sent - agent;
    drop(responses);
    let each = |bytes: usize| bytes / count.max(1);
    println!(
        "{count} workloads: agent {} (index {}, encoded {}, what one proxy has {}), ztunnel {}; \
         a change of one pod is there after {:?}, of one endpoint after {:?}",
        each(agent),
        each(model - encoded),
        each(encoded),
        each(agent - model),
        each(proxy),
        both.change(changes, |i| pod(i % count, &format!("changed-{i}")))?,
        both.change(changes, |i| slice(0, count.min(PODS_OF_SERVICE), !i.is_multiple_of(2)))?,
    );
    Ok(())
}

impl Both {
    fn new() -> Self {
        let (writer, known) = store::new();
        let told: fn(&store::Changes) = |_| {};
        Self {
            index: Index::new(index::Config {
                cluster_id: "Kubernetes".to_owned(),
                trust_domain: "cluster.local".to_owned(),
                cluster_domain: "cluster.local".to_owned(),
                node_name: "node-0".to_owned(),
                system_namespace: "ambit-system".to_owned(),
                root_namespace: "istio-system".to_owned(),
                dns_capture: true,
                excluded_namespaces: Default::default(),
            }),
            snapshot: Snapshot::default(),
            session: Session::default(),
            client: stream::Session::new(Node::default(), &[AUTHORIZATION_TYPE, ADDRESS_TYPE]),
            mesh: Mesh::new(writer, "istio-system", told),
            known,
        }
    }

    /// All that a proxy is sent now, as it travels; at first it has to ask.
    fn responses(&mut self, first: bool) -> anyhow::Result<Vec<Vec<u8>>> {
        if first {
            for request in self.client.start() {
                self.session.receive(request, &self.snapshot)?;
            }
        }
        let mut sent = Vec::new();
        while let Some(response) = self.session.next(&self.snapshot) {
            sent.push(response.encode_to_vec());
            let DeltaDiscoveryResponse { type_url, nonce: response_nonce, .. } = response;
            let acknowledged = DeltaDiscoveryRequest { type_url, response_nonce, ..Default::default() };
            self.session.receive(acknowledged, &self.snapshot)?;
        }
        Ok(sent)
    }

    fn receive(&mut self, response: &[u8]) -> anyhow::Result<()> {
        let response = DeltaDiscoveryResponse::decode(response)?;
        let reply = self.client.receive(response, &mut self.mesh);
        anyhow::ensure!(reply.rejected.is_empty(), "refused: {:?}", reply.rejected);
        Ok(())
    }

    /// The mean time from an event to the proxy's next look finding it.
    fn change(
        &mut self,
        times: usize,
        object: impl Fn(usize) -> anyhow::Result<Object>,
    ) -> anyhow::Result<Duration> {
        let mut took = Duration::ZERO;
        for i in 0..times {
            let object = object(i)?;
            let began = Instant::now();
            let changes = self.index.handle(Event::Applied(object));
            let (index, snapshot) = (&self.index, &mut self.snapshot);
            let put =
                |key| snapshot.put(Type::Address, &index.resource_name(key), index.resource(key).as_ref());
            let names: Vec<_> = changes.keys.iter().filter_map(put).collect();
            anyhow::ensure!(!names.is_empty(), "the event changed nothing: {:?}", changes.keys);
            self.session.changed(Type::Address, names, &self.snapshot);
            for response in self.responses(false)? {
                self.receive(&response)?;
            }
            std::hint::black_box(self.known.size());
            took += began.elapsed();
        }
        Ok(took / u32::try_from(times.max(1))?)
    }
}

/// A cluster with so many pods.
fn objects(pods: usize) -> impl Iterator<Item = anyhow::Result<Object>> {
    let services = pods.div_ceil(PODS_OF_SERVICE);
    let per_service = (0..services).flat_map(move |i| {
        let left = pods - i * PODS_OF_SERVICE;
        [service(i), slice(i, left.min(PODS_OF_SERVICE), true)]
    });
    (0..pods).map(|i| pod(i, "v1")).chain(per_service)
}

fn pod(i: usize, revision: &str) -> anyhow::Result<Object> {
    let (application, node) = (i / PODS_OF_SERVICE, i / PODS_OF_NODE);
    let ip = address(10, i);
    Ok(Object::Pod(decode(json!({
        "metadata": {
            "namespace": namespace(i), "name": name(i), "uid": format!("6f1b1c9e-0000-4000-8000-{i:012}"),
            "labels": {
                "app": format!("app-{application}"), "version": revision, "pod-template-hash": "7d9c5b6f4",
            },
            "annotations": {"ambient.istio.io/redirection": "enabled"},
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("app-{application}-7d9c5b6f4"),
                "uid": "1", "controller": true,
            }],
        },
        "spec": {
            "nodeName": format!("node-{node}"), "serviceAccountName": format!("app-{application}"),
            "containers": [{"name": "app"}],
        },
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }))?))
}

fn service(i: usize) -> anyhow::Result<Object> {
    let vip = address(11, i);
    Ok(Object::Service(decode(json!({
        "metadata": {"namespace": namespace(i * PODS_OF_SERVICE), "name": format!("app-{i}")},
        "spec": {
            "clusterIP": vip, "clusterIPs": [vip], "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
        },
    }))?))
}

/// The endpoints of a service, the first one ready or not.
fn slice(i: usize, endpoints: usize, ready: bool) -> anyhow::Result<Object> {
    let endpoint = |at: usize| {
        let pod = i * PODS_OF_SERVICE + at;
        json!({
            "addresses": [address(10, pod)], "conditions": {"ready": ready || at > 0},
            "targetRef": {"kind": "Pod", "name": name(pod), "namespace": namespace(pod)},
        })
    };
    Ok(Object::EndpointSlice(decode(json!({
        "metadata": {
            "namespace": namespace(i * PODS_OF_SERVICE), "name": format!("app-{i}-x2x4z"),
            "labels": {"kubernetes.io/service-name": format!("app-{i}")},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>(),
    }))?))
}

/// Ten services have one.
fn namespace(pod: usize) -> String {
    format!("team-{}", pod / (10 * PODS_OF_SERVICE))
}

fn name(pod: usize) -> String {
    format!("app-{}-7d9c5b6f4-{pod:05x}", pod / PODS_OF_SERVICE)
}

fn address(first: u8, i: usize) -> String {
    let [.., a, b, c] = i.to_be_bytes();
    format!("{first}.{a}.{b}.{c}")
}

fn decode<T: serde::de::DeserializeOwned>(value: Value) -> anyhow::Result<Box<T>> {
    Ok(Box::new(serde_json::from_value(value)?))
}

/// Bytes that this thread's allocations have in use, with what the allocator adds (mallinfo(3)).
#[allow(unsafe_code, reason = "libc's statistics")]
fn in_use() -> usize {
    // SAFETY: it reads counters of the allocator and returns them by value.
    let now = unsafe { libc::mallinfo2() };
    now.uordblks + now.hblkhd
}
