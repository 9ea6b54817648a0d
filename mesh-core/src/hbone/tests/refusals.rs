//! Those who are not let in, and what they are told.

use super::*;
use crate::hbone::window::Window;

async fn refuse(incoming: Incoming) {
    match incoming.request().authority.port {
        401 => {
            let (why, policy) = ("policy payments/deny-all, rule 1\u{1b}[31m\n", "payments/deny-all\r\n");
            incoming.refuse(StatusCode::UNAUTHORIZED, why, Some(policy));
        }
        503 => incoming.refuse(StatusCode::SERVICE_UNAVAILABLE, "", None),
        402 => incoming.refuse(StatusCode::UNAUTHORIZED, &longest_reason(), Some(&longest_name())),
        1 => drop(incoming),
        _ => echo(incoming).await,
    }
}

/// Of a policy.
fn longest_name() -> String {
    format!("{}/{}", "n".repeat(253), "p".repeat(253))
}

fn longest_reason() -> String {
    let name = longest_name();
    format!("policy {name} denies it by its rule 4294967295; the client did not use mutual TLS")
}

#[tokio::test]
async fn the_longest_names_are_told_whole() {
    let ca = Arc::new(TestCa::new());
    let server = Server::start(&ca, server::Config::default(), refuse).await;
    let to = ConnectRequest::new(Authority { port: 402, ..request().authority });
    let error = pool(&ca).connect(&key(server.address), &to).await.unwrap_err();
    let ConnectError::Refused { reason, policy, .. } = error else { unreachable!() };
    assert_eq!((reason, policy), (Some(longest_reason()), Some(longest_name())));
}

#[tokio::test]
async fn a_refusal_says_why_and_leaves_the_tunnel_alone() {
    let ca = Arc::new(TestCa::new());
    let server = Server::start(&ca, server::Config::default(), refuse).await;
    let pool = pool(&ca);
    let key = key(server.address);
    let mut open = pool.connect(&key, &request()).await.unwrap();
    let to = |port: u16| ConnectRequest::new(Authority { port, ..request().authority });
    for (port, expected, named) in [
        (
            401,
            "the peer answers 401 Unauthorized: policy payments/deny-all, rule 1[31m",
            Some("payments/deny-all"),
        ),
        (503, "the peer answers 503 Service Unavailable", None),
    ] {
        let error = pool.connect(&key, &to(port)).await.unwrap_err();
        assert_eq!(error.to_string(), expected);
        let ConnectError::Refused { policy, .. } = error else { unreachable!() };
        assert_eq!(policy.as_deref(), named);
    }
    let dropped = pool.connect(&key, &to(1)).await;
    assert!(matches!(dropped, Err(ConnectError::Broken(_))), "{dropped:?}");
    assert_eq!(ask(&mut open.stream, b"still here").await.unwrap(), b"still here");
}

#[tokio::test]
async fn malformed_requests_get_400() {
    let ca = TestCa::new();
    let server = Server::echo(&ca).await;
    let stream = tls_to(&server, &ca.issue(CLIENT)).await;
    let (requests, connection) = h2::client::handshake(stream).await.unwrap();
    let driver = tokio::spawn(connection);
    for (method, uri) in [
        ("GET", "https://10.2.0.9:8080/"),
        ("CONNECT", "10.2.0.9"),
        ("CONNECT", "10.2.0.999:80"),
        ("CONNECT", "user@reviews:80"),
        ("CONNECT", "reviews:0"),
    ] {
        let request = http::Request::builder().method(method).uri(uri).body(()).unwrap();
        let mut requests = requests.clone().ready().await.unwrap();
        let (answer, _) = requests.send_request(request, false).unwrap();
        let answer = answer.await.unwrap();
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{method} {uri}");
        assert!(answer.headers().contains_key("ambit-reason"), "{method} {uri}");
    }
    driver.abort();
}

#[tokio::test]
async fn the_handler_sees_what_the_client_says() {
    let ca = Arc::new(TestCa::new());
    let (sender, mut seen) = mpsc::unbounded_channel();
    let handler = move |incoming: Incoming| {
        sender.send(incoming.request().clone()).unwrap();
        async move {
            let own = Baggage { namespace: Some("payments".into()), ..Baggage::default() };
            incoming.accept(&own).unwrap().shutdown().await.unwrap();
        }
    };
    let server = Server::start(&ca, server::Config::default(), handler).await;
    let mut said = request();
    said.workload_uid = Some("Kubernetes//Pod/payments/payment-service-1".into());
    said.traceparent = Some(TraceParent::random());
    said.baggage.cluster = Some("Kubernetes".into());
    let connected = pool(&ca).connect(&key(server.address), &said).await.unwrap();
    assert_eq!(seen.recv().await.unwrap(), said);
    assert_eq!(connected.baggage.namespace.as_deref(), Some("payments"));
}

#[tokio::test]
async fn a_client_of_another_root_is_told_by_the_first_request() {
    let (ours, theirs) = (TestCa::new(), TestCa::new());
    let mut server = Server::echo(&ours).await;
    // Their client trusts our root, so that the server is the one to refuse.
    let client = theirs.leaf(CLIENT).trusting(&ours).issue();
    for _ in 0..20 {
        let stream = TcpStream::connect(server.address).await.unwrap();
        let expected = [SERVER.parse().unwrap()];
        let (tunnel, driver) =
            client::handshake(stream, &client, &expected, KeepAlive::default(), Window::default())
                .await
                .unwrap();
        let driver = tokio::spawn(driver);
        let error = tunnel.connect(&request(), tunnel.lease(1).unwrap()).await.unwrap_err();
        let fault = TlsError::Ours(CertificateFault::UnknownIssuer);
        assert!(matches!(&error, ConnectError::Tls(told) if *told == fault), "{error:?}");
        driver.await.unwrap();
        let refused = server.ends.recv().await.unwrap().unwrap_err();
        assert_eq!(refused, HandshakeError::Tls(TlsError::Peer(CertificateFault::UnknownIssuer)));
    }
}

#[tokio::test]
async fn a_server_of_another_identity_gets_nothing() {
    let ca = Arc::new(TestCa::new());
    let server = Server::echo(&ca).await;
    let wrong = Key { expected: vec![CLIENT.parse().unwrap()], ..key(server.address) };
    let pool = pool(&ca);
    let dials = (0..5).map(|_| pool.connect(&wrong, &REQUEST));
    for refused in futures_util::future::join_all(dials).await {
        let error = refused.unwrap_err();
        let wrong = matches!(
            &error,
            ConnectError::Dial(DialError::Tls(TlsError::Peer(CertificateFault::WrongIdentity { .. })))
        );
        assert!(wrong, "{error:?}");
        assert!(error.to_string().contains(&format!("expected {CLIENT}, got {SERVER}")), "{error}");
    }
    assert_eq!(server.tunnels(), 1, "those who waited for the dial share its failure");
}

static REQUEST: std::sync::LazyLock<ConnectRequest> = std::sync::LazyLock::new(request);

#[tokio::test]
async fn whoever_does_nothing_or_speaks_something_else_is_closed() {
    let ca = TestCa::new();
    let handshake_timeout = Duration::from_millis(150);
    let config = server::Config { handshake_timeout, ..server::Config::default() };
    let mut server = Server::start(&ca, config, echo).await;

    let mut silent = TcpStream::connect(server.address).await.unwrap();
    assert_eq!(server.ends.recv().await.unwrap().unwrap_err(), HandshakeError::Timeout(handshake_timeout));
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap_or(0), 0);

    let mut plain = TcpStream::connect(server.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    plain.shutdown().await.unwrap();
    let error = server.ends.recv().await.unwrap().unwrap_err();
    assert!(matches!(error, HandshakeError::Tls(TlsError::NotTls(_))), "{error}");

    // TLS, but no HTTP/2 in it: silence, then garbage.
    let certificate = ca.issue(CLIENT);
    let _silent = tls_to(&server, &certificate).await;
    assert_eq!(server.ends.recv().await.unwrap().unwrap_err(), HandshakeError::Timeout(handshake_timeout));
    let mut stream = tls_to(&server, &certificate).await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    stream.flush().await.unwrap();
    let error = server.ends.recv().await.unwrap().unwrap_err();
    assert!(matches!(error, HandshakeError::Http2(_)), "{error}");
}
