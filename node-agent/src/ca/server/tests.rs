//! The service over real TLS, against an API server in memory: who gets what, and what the others are told.

use std::net::SocketAddr;

use mesh_core::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_core::readiness::Readiness;
use prometheus_client::registry::Registry;
use prost_types::{Struct, Value};
use rcgen::{PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, SignatureAlgorithm};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::*;
use crate::ca::attest::{Freshness, ServiceAccount};
use crate::ca::fakes::{Fake, csr, pod};
use crate::ca::keeper::Keeper;
use crate::ca::lifetime::Bounds;
use crate::ca::listen;

const PAYMENT: &str = "spiffe://cluster.local/ns/payments/sa/payment";
const ACCOUNT: &str = "spiffe://cluster.local/ns/payments/sa/account";
const FINISHED: &str = "spiffe://cluster.local/ns/payments/sa/batch";
const FRESH: &str = "spiffe://cluster.local/ns/payments/sa/fresh";

struct World {
    fake: Fake,
    address: SocketAddr,
    roots: String,
    registry: Registry,
    shutdown: CancellationToken,
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// A CA with its root, tokens of a few callers, and pods on two nodes.
async fn world() -> World {
    world_with(Bounds::default()).await
}

async fn world_with(bounds: Bounds) -> World {
    let (fake, shutdown, mut registry) = (Fake::default(), CancellationToken::new(), Registry::default());
    let metrics = Metrics::new(&mut registry);
    let gate = Readiness::new().gate("ca secret");
    let names = vec!["ambit-ca.ambit-system.svc".to_owned(), "localhost".to_owned()];
    let keeper = Keeper::new(fake.clone(), "cluster.local".into(), names, gate, metrics.clone());
    keeper.round(SystemTime::now()).await.unwrap();
    let roots = fake.state().maps.values().next().unwrap().clone();

    fake.token("payment", "payments:payment", &[]);
    fake.token("agent", "ambit-system:node-agent", &[("node-name", "n1")]);
    fake.token("ztunnel-n1", "ambit-system:ztunnel", &[("node-name", "n1")]);
    fake.token("ztunnel-old", "ambit-system:ztunnel", &[("pod-name", "ztunnel-1"), ("pod-uid", "u1")]);
    fake.token("ztunnel-unbound", "ambit-system:ztunnel", &[]);
    fake.token("other-audience", "ambit-system:ztunnel", &[("node-name", "n1")]);
    fake.state().reviews.get_mut("other-audience").unwrap().audiences = vec!["api".into()];
    fake.pod("ambit-system", "ztunnel-1", pod("ztunnel", "n1"));
    fake.pod("payments", "payment-1", pod("payment", "n1"));
    fake.pod("payments", "account-1", pod("account", "n2"));
    fake.pod("payments", "batch-1", crate::ca::attest::Pod { ended: true, ..pod("batch", "n1") });
    fake.pod("payments", "fresh-1", pod("fresh", "n1"));
    fake.state().uncached.push("fresh-1".into());

    let rules = Rules {
        trust_domain: "cluster.local".parse().unwrap(),
        ztunnel: ServiceAccount { namespace: "ambit-system".into(), name: "ztunnel".into() },
        agent: ServiceAccount { namespace: "ambit-system".into(), name: "node-agent".into() },
        agent_names: vec!["node-agent.ambit-system.svc".into()],
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = CertificateService::new(fake.clone(), rules, keeper.watch(), metrics);
    let incoming =
        listen::accept(listener, listen::tls_config(Arc::new(listen::Own(keeper.watch()))).unwrap(), bounds);
    let stop = shutdown.clone();
    tokio::spawn(async move {
        // Holds the keeper, whose end would close the watch.
        let _keeper = keeper;
        crate::ca::serve(service, incoming, bounds.age, stop).await
    });
    World { fake, address, roots, registry, shutdown }
}

impl World {
    fn metrics_text(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    async fn channel(&self, name: &str) -> Result<Channel, tonic::transport::Error> {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.roots)).domain_name(name);
        Endpoint::from_shared(format!("https://{}", self.address))?.tls_config(tls)?.connect().await
    }

    /// A client of HTTP/2 that says no more than its preface: no request, no answer to a ping.
    async fn silent(&self) -> TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.roots.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider);
        let config = config.with_safe_default_protocol_versions().unwrap();
        let mut config = config.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let mut tls = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        tls
    }

    async fn ask(&self, token: &str, asked: Option<&str>, csr: String) -> Result<Vec<String>, Status> {
        let mut client = IstioCertificateServiceClient::new(self.channel("localhost").await.unwrap());
        let metadata = asked.map(|asked| Struct {
            fields: [(IMPERSONATED.to_owned(), Value { kind: Some(Kind::StringValue(asked.to_owned())) })]
                .into(),
        });
        let mut request = Request::new(IstioCertificateRequest { csr, validity_duration: 3600, metadata });
        if !token.is_empty() {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        Ok(client.create_certificate(request).await?.into_inner().cert_chain)
    }

    async fn check(&self, token: &str, asked: Option<&str>, csr: String, expect: Result<&str, (Code, &str)>) {
        let what = format!("{token} asks for {asked:?}");
        match (self.ask(token, asked, csr).await, expect) {
            (Ok(chain), Ok(identity)) => {
                assert_eq!(chain.last(), Some(&self.roots), "{what}");
                let leaf = pem::parse(&chain[0]).unwrap();
                let (_, leaf) = X509Certificate::from_der(leaf.contents()).unwrap();
                let names = leaf.subject_alternative_name().unwrap().unwrap();
                assert_eq!(names.value.general_names, [GeneralName::URI(identity)], "{what}");
            }
            (Err(status), Err((code, part))) => {
                assert_eq!(status.code(), code, "{what}: {status}");
                assert!(status.message().contains(part), "{what}: {status}");
            }
            (found, _) => panic!("{what}: {found:?}"),
        }
    }
}

fn good() -> String {
    csr(&PKCS_ECDSA_P256_SHA256, &[])
}

#[tokio::test]
async fn who_gets_which_identity() {
    use Code::{PermissionDenied, Unauthenticated};
    let world = world().await;
    for (token, asked, expect) in [
        ("payment", None, Ok(PAYMENT)),
        ("payment", Some(PAYMENT), Ok(PAYMENT)),
        ("payment", Some(ACCOUNT), Err((PermissionDenied, "may only have its own"))),
        ("ztunnel-n1", None, Ok("spiffe://cluster.local/ns/ambit-system/sa/ztunnel")),
        ("ztunnel-n1", Some(PAYMENT), Ok(PAYMENT)),
        ("ztunnel-old", Some(PAYMENT), Ok(PAYMENT)),
        ("ztunnel-n1", Some(ACCOUNT), Err((PermissionDenied, "no running pod on node n1"))),
        ("ztunnel-n1", Some(FINISHED), Err((PermissionDenied, "has ended"))),
        ("ztunnel-n1", Some("spiffe://x/ns/payments/sa/payment"), Err((PermissionDenied, "trust domain"))),
        ("ztunnel-n1", Some("payment"), Err((Code::InvalidArgument, "malformed"))),
        ("ztunnel-n1", Some(""), Err((Code::InvalidArgument, "malformed"))),
        ("ztunnel-unbound", Some(PAYMENT), Err((PermissionDenied, "not bound to a running pod"))),
        ("other-audience", Some(PAYMENT), Err((Unauthenticated, "istio-ca"))),
        ("unknown", None, Err((Unauthenticated, "does not accept the token"))),
        ("", None, Err((Unauthenticated, "no token"))),
    ] {
        world.check(token, asked, good(), expect).await;
    }
    let text = world.metrics_text();
    for line in [
        "ambit_ca_certificates_issued_total 5",
        "ambit_ca_requests_refused_total{reason=\"wrong_audience\"} 1",
        "ambit_ca_requests_refused_total{reason=\"no_pod_on_node\"} 2",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}

#[tokio::test]
async fn a_pod_that_the_cache_has_not_seen_is_looked_up_once_more() {
    let world = world().await;
    world.check("ztunnel-n1", Some(FRESH), good(), Ok(FRESH)).await;
    assert_eq!(world.fake.state().lists, [Freshness::Cached, Freshness::Latest]);
}

#[tokio::test]
async fn bad_requests_are_told_why() {
    let world = world().await;
    let of = |kind: &'static SignatureAlgorithm, names: &[&str]| csr(kind, names);
    for (request, part) in [
        (String::new(), "not PEM"),
        ("garbage".into(), "not PEM"),
        (of(&PKCS_RSA_SHA256, &[]), "EC P-256"),
        (of(&PKCS_ECDSA_P256_SHA256, &[ACCOUNT]), ACCOUNT),
        ("x".repeat(crate::ca::csr::MAX_CSR + 1), "the limit is"),
    ] {
        world.check("payment", None, request, Err((Code::InvalidArgument, part))).await;
    }
    let oversize = world.ask("payment", None, "x".repeat(MAX_MESSAGE)).await.unwrap_err();
    assert_eq!(oversize.code(), Code::OutOfRange, "{oversize}");
    world.check("payment", None, good(), Ok(PAYMENT)).await;
}

#[tokio::test]
async fn without_the_api_server_nobody_is_certified() {
    let world = world().await;
    world.fake.state().away = true;
    world.check("payment", None, good(), Err((Code::Unavailable, "cannot be checked now"))).await;
}

#[tokio::test]
async fn tls_names_the_ca_and_a_plain_client_harms_nobody() {
    let world = world().await;
    let mut plain = tokio::net::TcpStream::connect(world.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let silent = tokio::net::TcpStream::connect(world.address).await.unwrap();
    assert!(world.channel("ambit-ca.ambit-system.svc").await.is_ok());
    assert!(world.channel("ambit-ca.other.svc").await.is_err());
    drop((plain, silent));
}

#[tokio::test]
async fn one_address_cannot_take_all_places() {
    let world = world().await;
    let mut held = Vec::new();
    for _ in 0..listen::MAX_CONNECTIONS_OF_PEER {
        held.push(TcpStream::connect(world.address).await.unwrap());
    }
    let mut refused = TcpStream::connect(world.address).await.unwrap();
    let mut byte = [0];
    // The others end by the handshake's deadline, which is longer.
    let ended = tokio::time::timeout(Duration::from_secs(5), refused.read(&mut byte)).await;
    assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
    // A place is free again once one of them is gone.
    drop(held);
    let free = async { while world.channel("localhost").await.is_err() {} };
    tokio::time::timeout(Duration::from_secs(5), free).await.unwrap();
}

/// Types of the frames (RFC 9113, section 6) that a server sends until it closes.
async fn frames(mut tls: TlsStream<TcpStream>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(10), tls.read_to_end(&mut bytes)).await;
    closed.expect("the server closes").expect("with an end of the stream");
    let mut types = Vec::new();
    let mut rest = bytes.as_slice();
    while let [a, b, c, kind, ..] = rest {
        types.push(*kind);
        rest = &rest[9 + u32::from_be_bytes([0, *a, *b, *c]) as usize..];
    }
    types
}

const HOUR: Duration = Duration::from_secs(3600);
const GOAWAY: u8 = 7;

#[tokio::test]
async fn an_idle_connection_is_closed_and_one_with_a_request_in_work_is_not() {
    let world = world_with(Bounds { idle: Duration::from_millis(300), age: HOUR, grace: HOUR }).await;
    let (held, hold) = tokio::sync::watch::channel(true);
    world.fake.state().holds_reviews = Some(hold);
    let asked = world.ask("payment", None, good());
    let meanwhile = async {
        while world.fake.state().reviews_held == 0 {
            tokio::task::yield_now().await;
        }
        // It begins to be idle after the request began to be in work.
        frames(world.silent().await).await;
        held.send(false).unwrap();
    };
    let (answer, ()) = tokio::join!(asked, meanwhile);
    assert_eq!(answer.unwrap().last(), Some(&world.roots));
}

#[tokio::test]
async fn an_old_connection_is_asked_to_go_and_then_cut() {
    let bounds = Bounds { idle: HOUR, age: Duration::from_millis(100), grace: Duration::from_millis(100) };
    let world = world_with(bounds).await;
    let sent = frames(world.silent().await).await;
    assert!(sent.contains(&GOAWAY), "frames of types {sent:?}");
}
