//! Connections that should work, and what is told about them.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::account;
use crate::world::{APP, CLIENT, SERVER, World, eventually, line};

#[tokio::test]
async fn a_service_is_reached_over_mutual_tls() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert_eq!(line(&mut stream).await, world.pod_ip(CLIENT).to_string(), "the client's address is kept");
    stream.write_all(b"hello").await.unwrap();
    let mut echo = [0; 5];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"hello");
    let dump = world.dump().await;
    assert_eq!(dump["connections"].as_array().unwrap().len(), 2, "{dump:#}");
    assert_eq!(dump["certificates"].as_array().unwrap().len(), 2, "{dump:#}");
    assert_eq!(world.metric("istio_tcp_sockets_open", &["reporter=\"source\""]).await, 1);

    // Half-close: the application answers after our end.
    stream.write_all(b"bye").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"bye");

    account::of_one(&world, "mutual_tls", 8, "dst.hbone_addr").await;
}

#[tokio::test]
async fn connections_share_a_tunnel() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    for _ in 0..20 {
        let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        assert!(!line(&mut stream).await.is_empty());
    }
    assert_eq!(world.ca.fetches(), 2, "one certificate an identity");
}

#[tokio::test]
async fn a_pod_reaches_itself_through_its_service() {
    let world = World::new().await;
    let _application = world.application(CLIENT).await;
    let mut stream = world.dial(CLIENT, world.vip(CLIENT)).await.unwrap();
    assert_eq!(line(&mut stream).await, world.pod_ip(CLIENT).to_string());
    let labels = [
        "reporter=\"source\"",
        "destination_service=\"client.local\"",
        "connection_security_policy=\"unknown\"",
    ];
    assert_eq!(world.metric("istio_tcp_connections_opened_total", &labels).await, 1);
    assert_eq!(world.metric("istio_tcp_connections_opened_total", &["mutual_tls"]).await, 0);
    drop(stream);
    world.logged(&["direction=\"outbound\"", "connection complete", "dst.service=\"client.local\""]).await;
}

#[tokio::test]
async fn the_applications_own_address_pair_is_never_taken() {
    let world = World::new().await;
    let listener = TcpListener::bind((world.pod_ip(CLIENT), APP)).await.unwrap();
    for _ in 0..20 {
        let own = world.dial(CLIENT, world.vip(CLIENT)).await.unwrap();
        let (_, passed_on) = listener.accept().await.unwrap();
        assert_eq!(passed_on.ip(), world.pod_ip(CLIENT));
        let port = passed_on.port();
        assert!((10_000..32_768).contains(&port), "passed on in the clear from port {port}");
        assert_ne!(port, own.local_addr().unwrap().port());
    }
}

#[tokio::test]
async fn an_application_that_does_not_listen_is_a_reset() {
    let world = World::new().await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    let error = stream.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let failed = async |reporter: &str| {
        world.metric("istio_tcp_connections_failed_total", &[reporter, "response_flags=\"CONNECT\""]).await
    };
    eventually("both sides count it", async || {
        failed("reporter=\"source\"").await == 1 && failed("reporter=\"destination\"").await == 1
    })
    .await;
    world.logged(&["direction=\"outbound\"", "connection failed", "503", "refused"]).await;
    world.logged(&["direction=\"inbound\"", "connecting to the application"]).await;
}

#[tokio::test]
async fn a_reset_on_one_side_is_a_reset_on_the_other() {
    let world = World::new().await;
    let listener = TcpListener::bind((world.pod_ip(SERVER), APP)).await.unwrap();
    for (by_client, half_closed) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut client = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        client.write_all(b"?").await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), b'?');
        server.write_all(b"!").await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), b'!');
        let (mut breaks, mut hears) = if by_client { (client, server) } else { (server, client) };
        if half_closed {
            // The one that breaks then is in the middle of its answer.
            hears.shutdown().await.unwrap();
            assert_eq!(breaks.read(&mut [0; 1]).await.unwrap(), 0);
        }
        breaks.set_zero_linger().unwrap();
        drop(breaks);
        let heard = hears.read(&mut [0; 1]).await.map_err(|error| error.kind());
        let reset = Err(std::io::ErrorKind::ConnectionReset);
        assert_eq!(heard, reset, "by client: {by_client}, after a half-close: {half_closed}");
    }
    let broken = async |reporter: &str| {
        world.metric("istio_tcp_connections_failed_total", &[reporter, "response_flags=\"BROKEN\""]).await
    };
    eventually("both sides count each", async || {
        broken("reporter=\"source\"").await == 4 && broken("reporter=\"destination\"").await == 4
    })
    .await;
    world.logged(&["direction=\"outbound\"", "connection failed", "the connection broke", "BROKEN"]).await;
}

#[tokio::test]
async fn an_application_that_comes_later_is_reached() {
    let world = World::new().await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    stream.read(&mut [0; 1]).await.unwrap_err();
    let listener = TcpListener::bind((world.pod_ip(SERVER), APP)).await.unwrap();
    let _stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    let (_, client) = listener.accept().await.unwrap();
    assert_eq!(client.ip(), world.pod_ip(CLIENT));
    assert!((10_000..32_768).contains(&client.port()), "the proxy chose port {}", client.port());
}
