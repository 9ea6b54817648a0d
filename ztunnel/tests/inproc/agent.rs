//! The node agent's side of the pod protocol and of xDS, as a script.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_core::pod_link::{Link, Listener};
use mesh_core::proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_core::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use mesh_core::proto::pods::{self as wire, from_agent::Message, from_ztunnel};
use mesh_core::proto::workload::{self, address::Type};
use mesh_core::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, pods::Fd, security};
use prost::Message as _;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// One accepted ztunnel.
pub(crate) struct Talk {
    link: Link,
    sequence: u64,
    /// Of the protocol, which a Welcome chooses.
    pub(crate) version: u32,
    /// Connections that policy denied, as they were told between other messages.
    pub(crate) denied: Vec<wire::Denied>,
}

/// What a ztunnel says that it holds: the pod's uid and its descriptors.
pub(crate) type Held = HashMap<String, HashMap<Fd, OwnedFd>>;

impl Talk {
    /// Waits for a ztunnel and its Hello.
    pub(crate) async fn accept(listener: &Listener) -> (Self, wire::Hello) {
        let link = listener.accept().await.unwrap();
        let mut talk = Self { link, sequence: 0, version: 2, denied: Vec::new() };
        let (message, _) = talk.receive().await;
        let from_ztunnel::Message::Hello(hello) = message else { panic!("{message:?}") };
        (talk, hello)
    }

    /// Welcomes it and waits for all that it holds.
    pub(crate) async fn welcome(&mut self) -> Held {
        self.welcome_with(None).await
    }

    /// The same with a map to flag sockets in.
    pub(crate) async fn welcome_with(&mut self, flag_map: Option<OwnedFd>) -> Held {
        let map: Vec<OwnedFd> = flag_map.into_iter().collect();
        let fds = map.iter().map(|_| Fd::SocketFlagMap as i32).collect();
        let welcome = wire::Welcome { version: self.version, fds, ..Default::default() };
        self.send(Message::Welcome(welcome), &map).await;
        let mut held = Held::new();
        loop {
            match self.receive().await {
                (from_ztunnel::Message::Held(message), fds) => {
                    let kinds = message.fds.iter().map(|kind| Fd::try_from(*kind).unwrap());
                    held.insert(message.pod.unwrap().uid, kinds.zip(fds).collect());
                }
                (from_ztunnel::Message::HeldEnd(_), _) => return held,
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) async fn send(&self, message: Message, fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.link.send(&wire::FromAgent { message: Some(message) }, &fds).await.unwrap();
    }

    /// The Ack's error.
    pub(crate) async fn add(&mut self, pod: wire::Pod, fds: Vec<(Fd, OwnedFd)>) -> String {
        self.sequence += 1;
        let (kinds, fds): (Vec<i32>, Vec<OwnedFd>) =
            fds.into_iter().map(|(kind, fd)| (kind as i32, fd)).unzip();
        let add = wire::AddPod { sequence: self.sequence, pod: Some(pod), fds: kinds };
        self.send(Message::Add(add), &fds).await;
        self.ack().await
    }

    pub(crate) async fn keep(&mut self, pod: wire::Pod) -> String {
        self.sequence += 1;
        self.send(Message::Keep(wire::KeepPod { sequence: self.sequence, pod: Some(pod) }), &[]).await;
        self.ack().await
    }

    pub(crate) async fn remove(&mut self, uid: &str) -> String {
        self.sequence += 1;
        self.send(Message::Remove(wire::RemovePod { sequence: self.sequence, uid: uid.into() }), &[]).await;
        self.ack().await
    }

    pub(crate) async fn snapshot_end(&mut self) {
        self.sequence += 1;
        self.send(Message::SnapshotEnd(wire::SnapshotEnd { sequence: self.sequence }), &[]).await;
        assert_eq!(self.ack().await, "");
    }

    /// Tells it of its successor.
    pub(crate) async fn superseded(&mut self) -> String {
        self.sequence += 1;
        self.send(Message::Superseded(wire::Superseded { sequence: self.sequence }), &[]).await;
        self.ack().await
    }

    /// Waits for it to say that it drains.
    pub(crate) async fn draining(&mut self) {
        let (message, _) = self.receive().await;
        assert!(matches!(message, from_ztunnel::Message::Draining(_)), "{message:?}");
    }

    async fn ack(&mut self) -> String {
        match self.receive().await {
            (from_ztunnel::Message::Ack(ack), _) if ack.sequence == self.sequence => ack.error,
            other => panic!("expected an Ack of {}, got {other:?}", self.sequence),
        }
    }

    /// The next message that is no Denied.
    async fn receive(&mut self) -> (from_ztunnel::Message, Vec<OwnedFd>) {
        loop {
            let receive = self.link.receive::<wire::FromZtunnel>();
            let (message, fds) =
                tokio::time::timeout(Duration::from_secs(10), receive).await.unwrap().unwrap();
            match message.message.unwrap() {
                from_ztunnel::Message::Denied(denied) => self.denied.push(denied),
                message => return (message, fds),
            }
        }
    }
}

/// What the agent tells over xDS; clones are the same.
#[derive(Clone)]
pub(crate) struct Xds(Arc<Told>);

struct Told {
    resources: Mutex<HashMap<String, Vec<Resource>>>,
    changes: broadcast::Sender<DeltaDiscoveryResponse>,
    nacks: Mutex<Vec<String>>,
}

impl Xds {
    pub(crate) fn new() -> Self {
        let (resources, nacks) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Told { resources, changes: broadcast::Sender::new(64), nacks }))
    }

    /// Adds resources or replaces those of the same name.
    pub(crate) fn put(&self, resources: impl IntoIterator<Item = Resource>) {
        for resource in resources {
            let type_url = resource.resource.as_ref().unwrap().type_url.clone();
            let mut all = self.0.resources.lock().unwrap();
            let known = all.entry(type_url.clone()).or_default();
            known.retain(|other| other.name != resource.name);
            known.push(resource.clone());
            self.tell(DeltaDiscoveryResponse { type_url, resources: vec![resource], ..Default::default() });
        }
    }

    pub(crate) fn remove(&self, type_url: &str, name: &str) {
        let mut all = self.0.resources.lock().unwrap();
        all.entry(type_url.into()).or_default().retain(|other| other.name != name);
        let removed_resources = vec![name.to_owned()];
        self.tell(DeltaDiscoveryResponse {
            type_url: type_url.into(),
            removed_resources,
            ..Default::default()
        });
    }

    fn tell(&self, response: DeltaDiscoveryResponse) {
        // Nobody may be there yet.
        let _ = self.0.changes.send(DeltaDiscoveryResponse { nonce: "change".into(), ..response });
    }

    /// What ztunnel did not like.
    pub(crate) fn nacks(&self) -> Vec<String> {
        self.0.nacks.lock().unwrap().clone()
    }

    /// Serves at `path` until the runtime ends.
    pub(crate) fn serve(&self, path: &Path) {
        let listener = tokio::net::UnixListener::bind(path).unwrap();
        let service = AggregatedDiscoveryServiceServer::new(self.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Xds {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (sender, responses) = mpsc::channel(4);
        let mut requests = request.into_inner();
        let told = self.0.clone();
        tokio::spawn(async move {
            let mut changes = told.changes.subscribe();
            loop {
                let response = tokio::select! {
                    Ok(change) = changes.recv() => change,
                    Some(Ok(request)) = requests.next() => {
                        told.nacks.lock().unwrap().extend(request.error_detail.map(|error| error.message));
                        if !request.response_nonce.is_empty() {
                            continue;
                        }
                        let type_url = request.type_url;
                        let known = told.resources.lock().unwrap().get(&type_url).cloned();
                        let (resources, nonce) = (known.unwrap_or_default(), "first".to_owned());
                        DeltaDiscoveryResponse { type_url, nonce, resources, ..Default::default() }
                    }
                    else => return,
                };
                if sender.send(Ok(response)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }
}

/// A workload or service as a resource.
pub(crate) fn address(address: Type) -> Resource {
    let name = match &address {
        Type::Workload(workload) => workload.uid.clone(),
        Type::Service(service) => format!("{}/{}", service.namespace, service.hostname),
    };
    let value = workload::Address { r#type: Some(address) }.encode_to_vec();
    let body = prost_types::Any { type_url: ADDRESS_TYPE.to_owned(), value };
    Resource { version: "1".into(), resource: Some(body), name, aliases: Vec::new() }
}

/// A policy as a resource.
pub(crate) fn authorization(policy: &security::Authorization) -> Resource {
    let name = format!("{}/{}", policy.namespace, policy.name);
    let body = prost_types::Any { type_url: AUTHORIZATION_TYPE.to_owned(), value: policy.encode_to_vec() };
    Resource { version: "1".into(), resource: Some(body), name, aliases: Vec::new() }
}
