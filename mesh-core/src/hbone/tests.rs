use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::pool::{Config, Dial, Key, Pool};
use super::server::{HandshakeError, Incoming, TunnelError};
use super::settings::KeepAlive;
use super::*;
use crate::certs::{Certificates, Roots, WorkloadCert};
use crate::drain::{self, Drain};
use crate::test_ca::TestCa;
use crate::tls::revocation::Revocations;
use crate::tls::{CertificateFault, TlsError};

mod refusals;
mod slow;
mod transfer;
mod tunnels;
mod waste;
mod windows;

const CLIENT: &str = "spiffe://cluster.local/ns/payments/sa/api-gateway";
const SERVER: &str = "spiffe://cluster.local/ns/payments/sa/payment-service";

type Served = Result<Result<(), TunnelError>, HandshakeError>;

/// A server on loopback TCP; each tunnel's end is reported.
struct Server {
    address: SocketAddr,
    drain: Drain,
    ends: mpsc::UnboundedReceiver<Served>,
    accepted: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(ca: &TestCa, config: server::Config, handler: impl server::Handler) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let certificate = ca.issue(SERVER);
        let (drain, watch) = drain::new();
        let (ended, ends) = mpsc::unbounded_channel();
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = accepted.clone();
        let task = tokio::spawn(async move {
            let mut tunnels = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                let (certificate, handler, config) = (certificate.clone(), handler.clone(), config.clone());
                let (watch, ended) = (watch.clone(), ended.clone());
                tunnels.spawn(async move {
                    let served = match server::handshake(stream, &certificate, config).await {
                        Ok(tunnel) => Ok(tunnel.serve(handler, watch).await),
                        Err(error) => Err(error),
                    };
                    let _ = ended.send(served);
                });
            }
        });
        Self { address, drain, ends, accepted, task }
    }

    async fn echo(ca: &TestCa) -> Self {
        Self::start(ca, server::Config::default(), echo).await
    }

    fn tunnels(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn echo(incoming: Incoming) {
    let stream = incoming.accept(&Baggage::default()).unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let _ = tokio::io::copy(&mut reader, &mut writer).await;
    let _ = writer.shutdown().await;
}

struct Tcp;

impl Dial for Tcp {
    type Io = TcpStream;

    async fn dial(&self, key: &Key) -> std::io::Result<TcpStream> {
        TcpStream::connect(key.destination).await
    }
}

/// TLS to the server, without HTTP/2.
async fn tls_to(server: &Server, certificate: &WorkloadCert) -> crate::tls::Stream<TcpStream> {
    let stream = TcpStream::connect(server.address).await.unwrap();
    let expected = [SERVER.parse().unwrap()];
    crate::tls::client::connect(stream, certificate, &expected).await.unwrap().0
}

fn key(address: SocketAddr) -> Key {
    Key {
        source: CLIENT.parse().unwrap(),
        source_address: "127.0.0.1".parse().unwrap(),
        destination: address,
        expected: vec![SERVER.parse().unwrap()],
        workload_uid: None,
    }
}

fn pool(ca: &Arc<TestCa>) -> Pool<Tcp> {
    pool_with(ca, Config::default())
}

fn pool_with(ca: &Arc<TestCa>, config: Config) -> Pool<Tcp> {
    Pool::new(Tcp, Certificates::new(ca.clone(), Revocations::default(), Roots::default()), config)
}

fn request() -> ConnectRequest {
    ConnectRequest::new("10.2.0.9:8080".parse().unwrap())
}

async fn ask(stream: &mut HboneStream, text: &[u8]) -> std::io::Result<Vec<u8>> {
    stream.write_all(text).await?;
    stream.flush().await?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
