//! The server over real TLS with a certificate of a real CA, against an API server in memory: who is told what.

use std::path::PathBuf;
use std::time::SystemTime;

use mesh_core::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_core::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_core::proto::security::Authorization;
use mesh_core::proto::workload::{Address as Resource, Workload, address};
use mesh_core::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use mesh_core::readiness::Readiness;
use mesh_core::tls::revocation::Revocations;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tonic::{Request, Streaming};

use super::*;
use crate::ca::attest::Pod;
use crate::ca::fakes::{Fake, pod};
use crate::ca::keeper::Keeper;
use crate::ca::metrics::Metrics;
use crate::ca::server::CertificateService;
use crate::xds::server::{Publisher, feed};

const NAME: &str = "node-agent.ambit-system.svc";

struct World {
    directory: PathBuf,
    address: SocketAddr,
    roots: String,
    fake: Fake,
    publisher: Publisher,
    feed: Feed,
    shutdown: CancellationToken,
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A CA, and the agent of node n1, which has its certificate from there.
async fn world(name: &str) -> World {
    world_of(name, true).await
}

/// The same; whether the agent knows the mesh.
async fn world_of(name: &str, complete: bool) -> World {
    let (fake, shutdown) = (Fake::default(), CancellationToken::new());
    for (token, account, node) in [
        ("agent", "ambit-system:node-agent", "n1"),
        ("ztunnel", "ambit-system:ztunnel", "n1"),
        ("gateway", "edge:gateway", "n1"),
        ("gateway-n2", "edge:gateway", "n2"),
        ("shop", "shop:default", "n2"),
    ] {
        fake.token(token, account, &[("node-name", node)]);
    }
    fake.token("gateway-old", "edge:gateway", &[("pod-name", "gateway-1"), ("pod-uid", "u1")]);
    fake.token("gateway-gone", "edge:gateway", &[("pod-name", "gateway-1"), ("pod-uid", "u0")]);
    fake.pod("edge", "gateway-1", Pod { uid: "u1".into(), ..pod("gateway", "n1") });
    let (ca, roots) = certificate_authority(&fake, &shutdown).await;
    let directory = std::env::temp_dir().join(format!("ambit-remote-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let (root, token) = (directory.join("root.pem"), directory.join("token"));
    std::fs::write(&root, &roots).unwrap();
    std::fs::write(&token, "agent").unwrap();
    let client = CaConfig {
        ca_address: format!("https://localhost:{}", ca.port()),
        ca_root: root,
        mesh_roots: None,
        token,
    };
    let certificates = Certificates::new(
        Arc::new(CaClient::new(client, "c".into())),
        Revocations::default(),
        Roots::default(),
    );
    let identity: Identity = "spiffe://cluster.local/ns/ambit-system/sa/node-agent".parse().unwrap();
    certificates.get(&identity).await.unwrap();

    let proxies = ["ambit-system/ztunnel", "edge/gateway"].map(|account| account.parse().unwrap()).into();
    let rules = Rules { node: "n1".into(), root_namespace: "istio-system".into(), proxies };
    let admission = Strangers::new(rules, fake.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (publisher, feed) = feed();
    let (served, stop) = (feed.clone(), shutdown.clone());
    tokio::spawn(
        async move { serve(listener, certificates, identity, admission, served, stop).await.unwrap() },
    );
    let world = World { directory, address, roots, fake, publisher, feed, shutdown };
    for namespace in ["shop", "edge", "bank"] {
        world.publish(namespace, "1");
    }
    if complete {
        world.publisher.complete();
    }
    world
}

async fn certificate_authority(fake: &Fake, shutdown: &CancellationToken) -> (SocketAddr, String) {
    let metrics = Metrics::new(&mut Registry::default());
    let gate = Readiness::new().gate("ca secret");
    let keeper =
        Keeper::new(fake.clone(), "cluster.local".into(), vec!["localhost".into()], gate, metrics.clone());
    keeper.round(SystemTime::now()).await.unwrap();
    let roots = fake.state().maps.values().next().unwrap().clone();
    let account = |name: &str| ServiceAccount { namespace: "ambit-system".into(), name: name.into() };
    let rules = attest::Rules {
        trust_domain: "cluster.local".parse().unwrap(),
        ztunnel: account("ztunnel"),
        agent: account("node-agent"),
        agent_names: vec![NAME.to_owned()],
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let bounds = Bounds::default();
    let tls = listen::tls_config(Arc::new(listen::Own(keeper.watch()))).unwrap();
    let incoming = listen::accept(listener, tls, bounds);
    let service = CertificateService::new(fake.clone(), rules, keeper.watch(), metrics);
    let stop = shutdown.clone();
    tokio::spawn(async move {
        // Holds the keeper, whose end would close the watch.
        let _keeper = keeper;
        crate::ca::serve(service, incoming, bounds.age, stop).await
    });
    (address, roots)
}

impl World {
    /// A workload of this namespace, of the same name.
    fn publish(&self, namespace: &str, content: &str) {
        let workload = Workload {
            uid: namespace.to_owned(),
            name: content.to_owned(),
            namespace: namespace.to_owned(),
            ..Default::default()
        };
        let resource =
            (!content.is_empty()).then_some(Resource { r#type: Some(address::Type::Workload(workload)) });
        self.publisher.publish([(namespace.to_owned(), resource)], []);
    }

    async fn client(&self, token: &str) -> Result<Client, Status> {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.roots)).domain_name(NAME);
        let endpoint = Endpoint::from_shared(format!("https://{}", self.address)).unwrap();
        let channel = endpoint.tls_config(tls).unwrap().connect().await.unwrap();
        let (requests, stream) = mpsc::channel(4);
        let mut request = Request::new(ReceiverStream::new(stream));
        if !token.is_empty() {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = client.delta_aggregated_resources(request).await?.into_inner();
        Ok(Client { requests, responses })
    }
}

struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Client {
    async fn send(&self, nonce: &str) {
        self.send_of(ADDRESS_TYPE, nonce).await;
    }

    async fn send_of(&self, type_url: &str, nonce: &str) {
        let request = DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            response_nonce: nonce.to_owned(),
            ..Default::default()
        };
        self.requests.send(request).await.unwrap();
    }

    /// Names of the next response, and of what it removes, acknowledged.
    async fn receive(&mut self) -> (Vec<String>, Vec<String>) {
        let response = self.responses.message().await.unwrap().expect("the stream goes on");
        self.send_of(&response.type_url, &response.nonce).await;
        let mut names: Vec<String> = response.resources.into_iter().map(|resource| resource.name).collect();
        names.sort();
        (names, response.removed_resources)
    }
}

#[tokio::test]
async fn each_is_told_what_is_its_business() {
    let world = world("scope").await;
    let all = ["bank", "edge", "shop"].as_slice();
    for (token, expected) in [("ztunnel", all), ("gateway", all), ("gateway-old", all), ("shop", &["shop"])] {
        let mut client = world.client(token).await.unwrap();
        client.send("").await;
        assert_eq!(client.receive().await.0, expected, "{token}");
    }
}

#[tokio::test]
async fn changes_elsewhere_are_not_told() {
    let world = world("changes").await;
    let mut client = world.client("shop").await.unwrap();
    client.send("").await;
    client.receive().await;
    for (namespace, content) in [("bank", "2"), ("bank", ""), ("new", "1"), ("shop", "2")] {
        world.publish(namespace, content);
    }
    assert_eq!(client.receive().await, (vec!["shop".to_owned()], vec![]));
    world.publish("edge", "");
    world.publish("shop", "");
    assert_eq!(client.receive().await, (vec![], vec!["shop".to_owned()]));
}

/// Of policies it is those of a client's own namespace, and of the root namespace, which may be about it, too.
#[tokio::test]
async fn policies_of_others_are_not_told() {
    let world = world("policies").await;
    let publish = |key: &str, exists: bool| {
        let (namespace, name) = key.split_once('/').unwrap();
        let policy = Authorization { namespace: namespace.into(), name: name.into(), ..Default::default() };
        world.publisher.publish([], [(key.to_owned(), exists.then(|| Arc::new(policy)))]);
    };
    let all = ["bank/p", "istio-system/p", "shop/p"];
    all.iter().for_each(|key| publish(key, true));
    let (mut shop, mut gateway) =
        (world.client("shop").await.unwrap(), world.client("gateway").await.unwrap());
    for (client, expected) in [(&mut shop, &all[1..]), (&mut gateway, &all[..])] {
        client.send_of(AUTHORIZATION_TYPE, "").await;
        assert_eq!(client.receive().await.0, expected);
    }
    for key in ["bank/q", "istio-system/q"] {
        publish(key, true);
    }
    assert_eq!(shop.receive().await.0, ["istio-system/q"]);
    publish("bank/p", false);
    publish("istio-system/p", false);
    assert_eq!(shop.receive().await, (vec![], vec!["istio-system/p".to_owned()]));
}

/// Whatever a stranger says it holds, nothing of it stays with the agent.
#[tokio::test]
async fn a_stranger_that_says_much() {
    let world = world("much").await;
    let names = |count: usize, length: usize| {
        let names = (0..count).map(|number| (format!("{number:0length$}"), "0".to_owned()));
        DeltaDiscoveryRequest {
            type_url: ADDRESS_TYPE.to_owned(),
            initial_resource_versions: names.collect(),
            ..Default::default()
        }
    };
    let (many, long, whole) = (names(60_000, 1), names(8000, 200), names(8000, 110));
    let mut ended = Vec::new();
    for request in [many, long] {
        let mut client = world.client("shop").await.unwrap();
        client.requests.send(request).await.unwrap();
        ended.push(client.responses.message().await.unwrap_err().code());
    }
    assert_eq!(ended, [Code::InvalidArgument, Code::OutOfRange], "more names, more bytes than one may say");
    let mut client = world.client("shop").await.unwrap();
    client.requests.send(whole).await.unwrap();
    let (told, removed) = client.receive().await;
    assert_eq!((told, removed.len()), (vec!["shop".to_owned()], 8000));
}

/// Before that everything that it has would seem to be gone.
#[tokio::test]
async fn a_stranger_waits_for_the_mesh_to_be_known() {
    let world = world_of("early", false).await;
    let mut client = world.client("shop").await.unwrap();
    client.send("").await;
    assert_eq!(client.responses.message().await.unwrap_err().code(), Code::Unavailable);
    world.publisher.complete();
    let mut client = world.client("shop").await.unwrap();
    client.send("").await;
    assert_eq!(client.receive().await.0, ["shop"]);
}

#[tokio::test]
async fn whoever_proves_nothing_or_asks_elsewhere_is_refused_with_the_reason() {
    let world = world("refused").await;
    world.fake.token("audience", "shop:default", &[("node-name", "n1")]);
    world.fake.state().reviews.get_mut("audience").unwrap().audiences = vec!["api".into()];
    for (token, code, words) in [
        ("", Code::Unauthenticated, "no token"),
        ("nonsense", Code::Unauthenticated, "does not accept"),
        ("audience", Code::Unauthenticated, "istio-ca"),
        ("gateway-n2", Code::PermissionDenied, "pod is on n2"),
        ("gateway-gone", Code::PermissionDenied, "no node"),
    ] {
        let status = world.client(token).await.err().unwrap();
        assert_eq!(status.code(), code, "{token}: {status}");
        assert!(status.message().contains(words), "{token}: {status}");
    }
    world.fake.state().away = true;
    let status = world.client("shop").await.err().unwrap();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert_eq!(world.feed.counts().clients, 0);
}

#[tokio::test]
async fn one_account_does_not_take_all_streams() {
    let world = world("many").await;
    let mut clients = Vec::new();
    let status = loop {
        match world.client("shop").await {
            Ok(client) => clients.push(client),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!((2..100).contains(&clients.len()), "{}", clients.len());
    world.client("gateway").await.unwrap();
    // A seat is free again once its stream is gone.
    clients.clear();
    let again = async {
        // Each try is a round trip.
        while world.client("shop").await.is_err() {}
    };
    tokio::time::timeout(Duration::from_secs(10), again).await.unwrap();
}

#[test]
fn accounts_are_read_and_none_is_none() {
    let account =
        |namespace: &str, name: &str| ServiceAccount { namespace: namespace.into(), name: name.into() };
    assert_eq!("".parse(), Ok(Accounts(BTreeSet::new())));
    let two = BTreeSet::from([account("edge", "gateway"), account("shop", "web")]);
    assert_eq!("edge/gateway, shop/web,".parse(), Ok(Accounts(two)));
    assert!("edge/gateway,shop".parse::<Accounts>().unwrap_err().contains("\"shop\""));
}
