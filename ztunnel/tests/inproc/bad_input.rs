//! What strangers and confused peers send: each is refused, counted, and told why.

use std::io;
use std::sync::Arc;

use mesh_core::certs::{Certificates, FetchCert, FetchError, Roots, WorkloadCert};
use mesh_core::hbone::pool::{Config, Dial, Key, Pool};
use mesh_core::hbone::{ConnectError, ConnectRequest};
use mesh_core::identity::Identity;
use mesh_core::test_ca::TestCa;
use mesh_core::tls::revocation::Revocations;
use mesh_core::workload::WorkloadType;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::world::{APP, CLIENT, SERVER, World, eventually};

/// Dials like a peer's proxy would.
struct Peer;

impl Dial for Peer {
    type Io = TcpStream;

    async fn dial(&self, key: &Key) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((key.source_address, 0).into())?;
        socket.connect(key.destination).await
    }
}

/// Always the same certificate.
struct Given(fn(&TestCa) -> WorkloadCert, Arc<TestCa>);

impl FetchCert for Given {
    fn fetch<'a>(
        &'a self,
        _identity: &'a Identity,
    ) -> futures_util::future::BoxFuture<'a, Result<WorkloadCert, FetchError>> {
        Box::pin(async move { Ok((self.0)(&self.1)) })
    }
}

/// A CONNECT to the server pod with a certificate of the caller's making.
async fn connect(
    world: &World,
    certificate: fn(&TestCa) -> WorkloadCert,
    authority: &str,
    workload_uid: Option<&str>,
) -> Result<(), ConnectError> {
    let mut request = ConnectRequest::new(authority.parse().unwrap());
    request.workload_uid = workload_uid.map(str::to_owned);
    open(world, certificate, request).await
}

async fn open(
    world: &World,
    certificate: fn(&TestCa) -> WorkloadCert,
    request: ConnectRequest,
) -> Result<(), ConnectError> {
    let fetch = Given(certificate, world.ca.clone());
    let pool = Pool::new(
        Peer,
        Certificates::new(Arc::new(fetch), Revocations::default(), Roots::default()),
        Config::default(),
    );
    let key = Key {
        source: CLIENT.identity().parse().unwrap(),
        source_address: world.pod_ip(CLIENT),
        destination: world.tunnel_address(SERVER),
        expected: vec![SERVER.identity().parse().unwrap()],
        workload_uid: None,
    };
    pool.connect(&key, &request).await.map(drop)
}

fn good(ca: &TestCa) -> WorkloadCert {
    ca.issue(&CLIENT.identity())
}

async fn failed(world: &World, flag: &str, count: u64) {
    let flag = format!("response_flags=\"{flag}\"");
    eventually(&format!("{count} failures with {flag}"), async || {
        world.metric("istio_tcp_connections_failed_total", &["reporter=\"destination\"", &flag]).await
            == count
    })
    .await;
}

#[tokio::test]
async fn requests_that_are_refused() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    let own = format!("{}:{APP}", world.pod_ip(SERVER));
    for (authority, uid) in [
        (own.as_str(), None),
        (own.as_str(), Some("Kubernetes//Pod/shop/server")),
        ("server.local:8000", None),
    ] {
        connect(&world, good, authority, uid).await.unwrap_or_else(|e| panic!("{authority} {uid:?}: {e}"));
    }
    let loops = format!("{}:15008", world.pod_ip(SERVER));
    for (authority, uid, status, why) in [
        (own.as_str(), Some("Kubernetes//Pod/shop/old"), 421, "the caller means workload"),
        ("10.9.9.9:8080", None, 400, "names another address"),
        ("unknown.local:8000", None, 503, "no service of this pod"),
        (loops.as_str(), None, 503, "port 15008 is the tunnel's own"),
    ] {
        match connect(&world, good, authority, uid).await {
            Err(ConnectError::Refused { status: actual, reason, .. }) => {
                assert_eq!(actual, status, "{authority}");
                assert!(
                    reason.as_ref().is_some_and(|reason| reason.contains(why)),
                    "{authority}: {reason:?}"
                );
            }
            other => panic!("{authority}: {other:?}"),
        }
        world.logged(&["connection failed", "direction=\"inbound\"", why]).await;
    }
    failed(&world, "WRONG_WORKLOAD", 1).await;
    failed(&world, "BAD_REQUEST", 3).await;
}

/// Its address is the client's, its words are its own; its namespace is the one that it proved.
#[tokio::test]
async fn what_a_peer_is_called_is_what_it_proved_or_its_own_word() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    let mut request = ConnectRequest::new(format!("{}:{APP}", world.pod_ip(SERVER)).parse().unwrap());
    request.baggage.workload = Some((WorkloadType::Deployment, "said-so".into()));
    request.baggage.namespace = Some("elsewhere".into());
    open(&world, |ca| ca.issue("spiffe://cluster.local/ns/proved/sa/other"), request).await.unwrap();
    let proved = "src.identity=spiffe://cluster.local/ns/proved/sa/other";
    let called = ["src.workload=\"said-so\"", "src.namespace=\"proved\""];
    world.logged(&["direction=\"inbound\"", proved, called[0], called[1]]).await;
}

#[tokio::test]
async fn certificates_that_are_refused() {
    let world = World::new().await;
    let own = format!("{}:{APP}", world.pod_ip(SERVER));
    type Make = fn(&TestCa) -> WorkloadCert;
    // `Certificates` hands out no expired certificate of its own accord, so its dates are looked at only by the peer:
    // valid for us means not yet refused here.
    let cases: [(Make, &str); 3] = [
        (|ca| TestCa::new().leaf(&CLIENT.identity()).trusting(ca).issue(), "issuer is unknown"),
        (|ca| ca.leaf("spiffe://evil.example/ns/shop/sa/client").issue(), "wrong trust domain"),
        (|ca| ca.leaf(&CLIENT.identity()).valid(3600, 7200).issue(), "not valid yet"),
    ];
    for (index, (make, why)) in cases.into_iter().enumerate() {
        let error = connect(&world, make, &own, None).await.unwrap_err();
        assert!(matches!(error, ConnectError::Tls(_) | ConnectError::Dial(_)), "{why}: {error:?}");
        world.logged(&["connection failed", "direction=\"inbound\"", why]).await;
        failed(&world, "TLS_FAILURE", index as u64 + 1).await;
    }
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let world = World::new().await;
    let expired = world.ca.leaf(&CLIENT.identity()).valid(-7200, -3600).issue();
    let io = world.dial(CLIENT, world.tunnel_address(SERVER)).await.unwrap();
    let expected = [SERVER.identity().parse().unwrap()];
    // The client's half of the handshake ends before the server has looked at its certificate.
    if let Ok((mut stream, _)) = mesh_core::tls::client::connect(io, &expired, &expected).await {
        let result = stream.read(&mut [0; 1]).await;
        assert!(!matches!(result, Ok(1..)), "{result:?}");
        assert!(stream.broken().reason().is_some_and(|reason| reason.to_string().contains("expired")));
    }
    world.logged(&["connection failed", "direction=\"inbound\"", "it has expired"]).await;
    failed(&world, "TLS_FAILURE", 1).await;
}

#[tokio::test]
async fn what_is_no_tls_is_closed_and_counted() {
    let world = World::new().await;
    let mut stream = world.dial(CLIENT, world.tunnel_address(SERVER)).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let read =
        tokio::time::timeout(std::time::Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
    assert!(read.is_ok(), "still open after ten seconds");
    failed(&world, "TLS_FAILURE", 1).await;
    world.logged(&["connection failed", "does not speak TLS"]).await;
}

#[tokio::test]
async fn a_client_that_says_nothing_is_closed_and_counted() {
    let world = World::new().await;
    let mut stream = world.dial(CLIENT, world.tunnel_address(SERVER)).await.unwrap();
    let mut byte = [0; 1];
    let read = tokio::time::timeout(std::time::Duration::from_secs(20), stream.read(&mut byte)).await;
    assert!(matches!(read, Ok(Ok(0) | Err(_))), "{read:?}");
    failed(&world, "TLS_FAILURE", 1).await;
}
