//! Clients that begin something and do not go on with it.

use crate::test_http2::{self as http2, kind};

use super::*;

const SOON: Duration = Duration::from_millis(100);

fn keep_alive(timeout: Duration) -> server::Config {
    let keep_alive = KeepAlive { interval: SOON, timeout };
    server::Config { keep_alive, ..server::Config::default() }
}

#[tokio::test]
async fn a_handshake_byte_by_byte_is_no_progress() {
    let ca = TestCa::new();
    let config = server::Config { handshake_timeout: 2 * SOON, ..server::Config::default() };
    let mut server = Server::start(&ca, config, echo).await;
    let mut slow = TcpStream::connect(server.address).await.unwrap();
    // A record of TLS with a message of many bytes, and then byte after byte of it.
    slow.write_all(&[22, 3, 1, 0x10, 0, 1, 0, 0x0F, 0xFC]).await.unwrap();
    let mut bytes = tokio::time::interval(Duration::from_millis(10));
    let ended = loop {
        tokio::select! {
            ended = server.ends.recv() => break ended.unwrap(),
            _ = bytes.tick() => drop(slow.write_all(&[3]).await),
        }
    };
    assert_eq!(ended.unwrap_err(), HandshakeError::Timeout(2 * SOON));
}

#[tokio::test]
async fn a_request_that_is_not_finished_ends_the_tunnel() {
    let ca = TestCa::new();
    let mut server = Server::start(&ca, keep_alive(2 * SOON), echo).await;
    let mut slow = tls_to(&server, &ca.issue(CLIENT)).await;
    // A head that promises thousands of bytes: nothing else may come in between, so no ping is answered.
    let settled = http2::frame(kind::SETTINGS, 1, 0, &[]);
    let unfinished = http2::frame(kind::HEADERS, 0, 1, &[0; 8000]);
    slow.write_all(&[http2::preface(&[]), settled, unfinished[..9].to_vec()].concat()).await.unwrap();
    let mut pieces = tokio::time::interval(Duration::from_millis(10));
    let ended = loop {
        tokio::select! {
            ended = server.ends.recv() => break ended.unwrap(),
            _ = pieces.tick() => {
                let _ = slow.write_all(&[0]).await;
                let _ = slow.flush().await;
            }
        }
    };
    assert_eq!(ended.unwrap(), Err(TunnelError::Dead(2 * SOON)));
}

#[tokio::test]
async fn who_answers_pings_but_never_settings_is_given_up() {
    let ca = TestCa::new();
    let mut server = Server::start(&ca, keep_alive(Duration::from_secs(60)), echo).await;
    let mut odd = tls_to(&server, &ca.issue(CLIENT)).await;
    odd.write_all(&http2::preface(&[])).await.unwrap();
    odd.flush().await.unwrap();
    let ended = loop {
        tokio::select! {
            ended = server.ends.recv() => break ended.unwrap(),
            heard = http2::next(&mut odd) => if let Ok((kind::PING, 0, _, payload)) = heard {
                odd.write_all(&http2::frame(kind::PING, 1, 0, &payload)).await.unwrap();
                odd.flush().await.unwrap();
            }
        }
    };
    let text = "it does not acknowledge settings".to_owned();
    assert_eq!(ended.unwrap(), Err(TunnelError::Broken(text)));
}

#[tokio::test]
async fn a_tunnel_without_connections_is_closed_and_one_with_is_not() {
    let ca = Arc::new(TestCa::new());
    let config = server::Config { idle: SOON, ..server::Config::default() };
    let mut server = Server::start(&ca, config, echo).await;
    let pool = pool(&ca);
    let key = key(server.address);
    let mut used = pool.connect(&key, &request()).await.unwrap();
    // The other one is closed after as long a time: this one had as much.
    let stream = tls_to(&server, &ca.issue(CLIENT)).await;
    let (requests, connection): (h2::client::SendRequest<bytes::Bytes>, _) =
        h2::client::handshake(stream).await.unwrap();
    let _ended = connection.await;
    drop(requests);
    assert_eq!(server.ends.recv().await.unwrap().unwrap(), Ok(()));
    assert_eq!(ask(&mut used.stream, b"x").await.unwrap(), b"x");
    used.stream.shutdown().await.unwrap();
    drop(used);
    assert_eq!(server.ends.recv().await.unwrap().unwrap(), Ok(()));
}
