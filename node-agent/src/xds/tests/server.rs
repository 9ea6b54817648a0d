//! The server, with a client of the generated kind.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use mesh_core::proto::discovery::DeltaDiscoveryRequest;
use mesh_core::proto::discovery::DeltaDiscoveryResponse;
use mesh_core::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_core::proto::security::{Authorization, Scope};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};

use super::{ADDRESS_TYPE, AUTHORIZATION_TYPE, ack, sent, subscribe, workload};
use crate::xds::server::{Publisher, bind, feed, serve};

struct World {
    directory: PathBuf,
    publisher: Publisher,
    shutdown: CancellationToken,
    server: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
}

impl World {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("ambit-xds-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (publisher, feed) = feed();
        let shutdown = CancellationToken::new();
        // Twice, as after a crash: the second one replaces the first one's socket.
        drop(bind(&directory.join("xds.sock")).unwrap());
        let socket = bind(&directory.join("xds.sock")).unwrap();
        let server = tokio::spawn(serve(socket, feed, shutdown.clone()));
        Self { directory, publisher, shutdown, server }
    }

    async fn client(&self) -> Client {
        Client::connect(&self.directory.join("xds.sock")).await
    }

    fn publish(&self, uid: &str, content: &str) {
        let resource = (!content.is_empty()).then(|| workload(uid, content));
        self.publisher.publish([(uid.to_owned(), resource)], []);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Client {
    async fn connect(path: &Path) -> Self {
        let path = path.to_owned();
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::try_from("http://localhost").unwrap();
        let channel: Channel = endpoint.connect_with_connector(connect).await.unwrap();
        let (requests, stream) = mpsc::channel(4);
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = client.delta_aggregated_resources(ReceiverStream::new(stream)).await.unwrap();
        Self { requests, responses: responses.into_inner() }
    }

    async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    async fn receive(&mut self) -> DeltaDiscoveryResponse {
        self.responses.message().await.unwrap().expect("the stream goes on")
    }
}

#[tokio::test]
async fn nothing_is_answered_before_everything_is_known() {
    let world = World::new("complete");
    world.publish("a", "1");
    let mut client = world.client().await;
    client.send(subscribe(ADDRESS_TYPE)).await;
    let early = tokio::time::timeout(Duration::from_millis(100), client.receive()).await;
    assert!(early.is_err(), "half of the mesh would be taken for all of it");
    world.publish("b", "1");
    world.publisher.complete();
    assert_eq!(sent(&client.receive().await), ["a", "b"].into());
}

#[tokio::test]
async fn a_change_reaches_every_client_within_milliseconds() {
    let world = World::new("push");
    world.publisher.complete();
    let mut clients = vec![world.client().await, world.client().await];
    for client in &mut clients {
        for r#type in [ADDRESS_TYPE, AUTHORIZATION_TYPE] {
            client.send(subscribe(r#type)).await;
            let response = client.receive().await;
            assert_eq!(response.type_url, r#type);
            client.send(ack(&response)).await;
        }
    }
    let mut fastest = Duration::MAX;
    for round in 0..20 {
        let started = Instant::now();
        world.publish("a", &round.to_string());
        for client in &mut clients {
            let response = client.receive().await;
            assert_eq!(sent(&response), ["a"].into());
            client.send(ack(&response)).await;
        }
        fastest = fastest.min(started.elapsed());
    }
    // A poll would take its period; a busy machine slows some rounds, not all of them.
    assert!(fastest < Duration::from_millis(20), "{fastest:?}");
}

/// A policy that is about fewer than before comes after the workloads that name it: in between it would be about nobody.
#[tokio::test]
async fn one_change_is_told_in_the_order_that_its_parts_need() {
    let world = World::new("order");
    let policy = |scope: Scope| {
        let policy = Authorization { scope: scope.into(), ..Default::default() };
        ("p".to_owned(), Some(Arc::new(policy)))
    };
    world.publisher.publish([], [policy(Scope::Namespace)]);
    world.publisher.complete();
    let mut client = world.client().await;
    for r#type in [ADDRESS_TYPE, AUTHORIZATION_TYPE] {
        client.send(subscribe(r#type)).await;
        let response = client.receive().await;
        client.send(ack(&response)).await;
    }
    for round in 0..50 {
        let names =
            |scope| (("a".to_owned(), Some(workload("a", &format!("{round} {scope:?}")))), policy(scope));
        for (scope, order) in [(Scope::WorkloadSelector, ["a", "p"]), (Scope::Namespace, ["p", "a"])] {
            let (address, policy) = names(scope);
            world.publisher.publish([address], [policy]);
            for expected in order {
                let response = client.receive().await;
                assert_eq!(sent(&response), [expected].into(), "{scope:?}");
                client.send(ack(&response)).await;
            }
        }
    }
}

#[tokio::test]
async fn a_bad_subscription_is_answered_and_others_go_on() {
    let world = World::new("bad");
    world.publisher.complete();
    let mut good = world.client().await;
    good.send(subscribe(ADDRESS_TYPE)).await;
    let response = good.receive().await;
    good.send(ack(&response)).await;
    let mut bad = world.client().await;
    let named = vec!["ns/host".to_owned()];
    bad.send(DeltaDiscoveryRequest { resource_names_subscribe: named, ..subscribe(ADDRESS_TYPE) }).await;
    let status = bad.responses.message().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("ns/host"), "{status}");
    world.publish("a", "1");
    assert_eq!(sent(&good.receive().await), ["a"].into());
}

#[tokio::test]
async fn shutdown_ends_the_streams_and_the_server() {
    let mut world = World::new("shutdown");
    world.publisher.complete();
    let mut client = world.client().await;
    client.send(subscribe(ADDRESS_TYPE)).await;
    client.receive().await;
    world.shutdown.cancel();
    // The end of the stream, or of its connection.
    let _ = client.responses.message().await;
    drop(client);
    let server = std::mem::replace(&mut world.server, tokio::spawn(std::future::ready(Ok(()))));
    tokio::time::timeout(Duration::from_secs(5), server).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn the_socket_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new("mode");
    let mode = std::fs::metadata(world.directory.join("xds.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
