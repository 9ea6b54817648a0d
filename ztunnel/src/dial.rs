//! Connects from inside a pod, mostly from ports of the proxy's own choice (`tuples` says why).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::addr::{ClientAddr, NextHop, Target};
use mesh_core::hbone::pool::{Dial, Key};
use mesh_core::tcp;
use socket2::Socket;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::reason::{Cause, Phase, ProxyError, Side};
use crate::sockets::Sockets;
use crate::tuples::{Tuple, Tuples};

/// Time for a TCP handshake.
const DEADLINE: Duration = Duration::from_secs(10);

/// Source ports tried that turn out to be in use; the kernel may know of connections that are older than the proxy.
const PORT_TRIES: usize = 8;

/// Time for one port towards an application. On lo it answers at once or, with a full queue, not at all. But while
/// another ztunnel drains, the same two addresses and ports may be those of a connection that *it* accepted: that socket
/// swallows the SYN, and only another port helps. For a full queue that is what the kernel's second SYN would be.
const PORT_PATIENCE: Duration = Duration::from_secs(1);

/// How to connect from a port of our choice.
pub struct Way<Make> {
    make: Make,
    /// Time for one port, and for all.
    patience: Duration,
    deadline: Duration,
    what: &'static str,
}

/// Towards the pod's application, as the client.
pub fn to_application(
    sockets: &dyn Sockets,
    target: Target,
) -> Way<impl Fn(ClientAddr) -> io::Result<Socket>> {
    let make = move |from| sockets.to_application(from, target);
    Way { make, patience: PORT_PATIENCE, deadline: DEADLINE, what: "connecting to the application" }
}

/// Towards the network in the clear, from the pod's address.
pub fn to_network(sockets: &dyn Sockets, target: Target) -> Way<impl Fn(ClientAddr) -> io::Result<Socket>> {
    let make = move |from| sockets.to_network(Some(from), NextHop::from(target.get()));
    // A SYN may well be lost there, and sent again by the kernel.
    Way { make, patience: DEADLINE, deadline: DEADLINE, what: "connecting to the destination" }
}

impl<Make: Fn(ClientAddr) -> io::Result<Socket>> Way<Make> {
    /// Connects from `client`'s address and a free port.
    ///
    /// # Errors
    /// When the target does not answer or no port is free.
    pub async fn connect(
        &self,
        tuples: &Tuples,
        client: ClientAddr,
        target: Target,
    ) -> Result<(TcpStream, Tuple), ProxyError> {
        let failed = |error| {
            Err(ProxyError::new(Phase::Connect, Side::Upstream, Cause::Io { what: self.what, error }))
        };
        let deadline = Instant::now() + self.deadline;
        let mut taken = 0;
        while taken < PORT_TRIES {
            let Some((from, tuple)) = tuples.choose(client, target, rand::random()) else { break };
            let socket = match (self.make)(from) {
                Ok(socket) => socket,
                Err(error) if is_taken(&error) => {
                    taken += 1;
                    continue;
                }
                Err(error) => {
                    return Err(ProxyError::local(Phase::Connect, "opening a socket in the pod", error));
                }
            };
            let until = deadline.min(Instant::now() + self.patience);
            match timeout_at(until, tcp::connect(socket, target.get())).await {
                Ok(Ok(stream)) => return Ok((stream, tuple)),
                Ok(Err(error)) if is_taken(&error) => taken += 1,
                Ok(Err(error)) => return failed(error),
                Err(_) if until < deadline => {
                    tracing::debug!(%from, %target, "no answer, trying another port");
                }
                Err(_) => {
                    let text = format!("no answer within {:?}", self.deadline);
                    return failed(io::Error::new(io::ErrorKind::TimedOut, text));
                }
            }
        }
        Err(ProxyError::new(Phase::Connect, Side::Local, Cause::NoPort))
    }
}

/// The pair of addresses is in use by a connection that the proxy does not know, or waits in TIME-WAIT.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// Opens a pod's tunnels.
pub struct Dialer {
    sockets: Arc<dyn Sockets>,
}

impl Dialer {
    /// From inside the pod that these sockets are of.
    pub fn new(sockets: Arc<dyn Sockets>) -> Self {
        Self { sockets }
    }
}

impl Dial for Dialer {
    type Io = TcpStream;

    /// The kernel chooses the port. It does not look at sockets that are bound to lo, so a connection that the pod's own
    /// application has opened to the same address and port 15008 may have the same one. That is harmless: what arrives
    /// from the network finds our socket only (theirs is bound to another device), and the connection that could suffer
    /// is theirs, which leads nowhere anyway, because a CONNECT to port 15008 is refused.
    async fn dial(&self, key: &Key) -> io::Result<TcpStream> {
        let socket = self.sockets.to_network(None, NextHop::from(key.destination))?;
        tcp::connect(socket, key.destination).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use std::net::{IpAddr, SocketAddr};

    use socket2::{Domain, SockFilter, Type};
    use tokio::net::TcpListener;

    use super::*;
    use crate::sockets::Datagrams;

    /// The first sockets hear no answer, like those whose SYN another connection swallows.
    struct Deaf {
        first: usize,
        made: AtomicUsize,
    }

    impl Sockets for Deaf {
        fn to_network(&self, _from: Option<ClientAddr>, _next_hop: NextHop) -> io::Result<Socket> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn to_application(&self, from: ClientAddr, _target: Target) -> io::Result<Socket> {
            let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
            socket.bind(&from.get().into())?;
            if self.made.fetch_add(1, Ordering::Relaxed) < self.first {
                // BPF_RET | BPF_K, 0 bytes: takes no segment (linux/filter.h).
                socket.attach_filter(&[SockFilter::new(0x06, 0, 0, 0)])?;
            }
            Ok(socket)
        }

        fn to_nameserver(&self, _server: SocketAddr) -> io::Result<Socket> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn datagrams(&self, _ip: IpAddr) -> io::Result<Box<dyn Datagrams>> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    #[tokio::test]
    async fn a_port_that_gets_no_answer_is_given_up_for_another() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (target, tuples) = (Target::from(listener.local_addr().unwrap()), Tuples::default());
        let sockets = Deaf { first: 1, made: AtomicUsize::new(0) };
        let way = to_application(&sockets, target);
        let (stream, _tuple) = way.connect(&tuples, client(), target).await.unwrap();
        assert!((10_000..32_768).contains(&stream.local_addr().unwrap().port()));
        assert_eq!(sockets.made.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn an_application_that_never_answers_gets_the_whole_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (target, tuples) = (Target::from(listener.local_addr().unwrap()), Tuples::default());
        let sockets = Deaf { first: usize::MAX, made: AtomicUsize::new(0) };
        let (patience, deadline) = (Duration::from_millis(20), Duration::from_millis(400));
        let started = Instant::now();
        let result = Way { patience, deadline, ..to_application(&sockets, target) }
            .connect(&tuples, client(), target)
            .await;
        assert!(started.elapsed() >= deadline);
        assert!(result.unwrap_err().to_string().contains("no answer within 400ms"));
        assert!(
            sockets.made.load(Ordering::Relaxed) > PORT_TRIES,
            "ports without an answer are not ports in use"
        );
    }

    fn client() -> ClientAddr {
        std::net::SocketAddr::from(([127, 0, 0, 1], 9)).into()
    }
}
