//! Queries over UDP: one socket of each IP family in the pod, which the agent opened and keeps a copy of. While no proxy
//! reads it, queries wait in it.
//!
//! **Invariant:** what one pod has under way is bounded; a client that asks for more hears of it at once. Who asks faster
//! than a pod may is not read.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use mesh_core::drain::Watch;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt::Ipv4OrigDstAddr,
    sockopt::Ipv6OrigDstAddr,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::answer::Answer;
use super::message::{self, Transport};
use super::metrics::Labels;
use super::{forward, judge};
use crate::canary::is_canary;
use crate::proxy::Pod;
use crate::sockets::Datagrams;

/// Queries of one pod and IP family that may wait for their server; each has a descriptor.
const MOST_UNDER_WAY: usize = 256;

/// Room for the longest datagram.
const LONGEST: usize = 65_535;

/// Where a pod's queries come in.
pub struct Listener {
    pod: Arc<Pod>,
    socket: UdpSocket,
    datagrams: Arc<dyn Datagrams>,
}

/// A query, and both of its ends.
struct Received {
    length: usize,
    client: SocketAddr,
    server: SocketAddr,
}

impl Listener {
    /// Reads from the agent's socket.
    ///
    /// # Errors
    /// When it is no UDP socket, or answers could not be sent (CAP_NET_RAW).
    pub fn new(pod: Arc<Pod>, socket: OwnedFd) -> io::Result<Self> {
        let socket = std::net::UdpSocket::from(socket);
        socket.set_nonblocking(true)?;
        let ip = socket.local_addr()?.ip();
        match ip {
            IpAddr::V4(_) => setsockopt(&socket, Ipv4OrigDstAddr, &true)?,
            IpAddr::V6(_) => setsockopt(&socket, Ipv6OrigDstAddr, &true)?,
        }
        let datagrams = pod.sockets.datagrams(ip)?.into();
        Ok(Self { pod, socket: UdpSocket::from_std(socket)?, datagrams })
    }

    /// Answers until `drain` starts; what is under way then has its time.
    pub async fn serve(self, drain: Watch) {
        let Self { pod, socket, datagrams } = self;
        let mut under_way = JoinSet::new();
        let (mut buffer, mut has_turn) = (vec![0; LONGEST], false);
        let mut draining = std::pin::pin!(drain.draining());
        loop {
            tokio::select! {
                () = &mut draining => break,
                Some(ended) = under_way.join_next() => log_panic(ended),
                received = next(&pod, &socket, &mut buffer, &mut has_turn) => {
                    match received {
                        Ok(received) => {
                            let query = &buffer[..received.length];
                            meet(&pod, &datagrams, query, &received, &mut under_way);
                        }
                        // Of the socket itself nothing can fail for long; what did was one datagram.
                        Err(error) => {
                            tracing::warn!(%error, uid = %pod.uid, "cannot receive a DNS query");
                            tokio::task::yield_now().await;
                        }
                    }
                }
            }
        }
        drop(socket);
        let all_over = async {
            while let Some(ended) = under_way.join_next().await {
                log_panic(ended);
            }
        };
        tokio::select! {
            () = all_over => {}
            () = drain.closing() => {}
        }
        under_way.shutdown().await;
    }
}

/// The next query, when it is the pod's turn, which is kept if nobody waits for it any more.
async fn next(pod: &Pod, socket: &UdpSocket, buffer: &mut [u8], has_turn: &mut bool) -> io::Result<Received> {
    if !*has_turn {
        super::turn(pod).await;
        *has_turn = true;
    }
    let received = socket.async_io(Interest::READABLE, || receive(socket, buffer)).await?;
    *has_turn = false;
    Ok(received)
}

fn meet(
    pod: &Arc<Pod>,
    datagrams: &Arc<dyn Datagrams>,
    query: &[u8],
    received: &Received,
    under_way: &mut JoinSet<()>,
) {
    let Received { client, server, .. } = *received;
    if is_canary(server) {
        return send(&**datagrams, server, client, query);
    }
    let (answer, labels) = judge(pod, query, Transport::Udp);
    match answer {
        Answer::Drop => {}
        Answer::Reply(reply) => send(&**datagrams, server, client, &reply),
        Answer::Forward if under_way.len() < MOST_UNDER_WAY => {
            let (pod, datagrams, query) = (pod.clone(), datagrams.clone(), query.to_vec());
            under_way.spawn(async move {
                if let Some(reply) = ask(&pod, &query, server, &labels).await {
                    send(&*datagrams, server, client, &reply);
                }
            });
        }
        Answer::Forward => {
            tracing::debug!(uid = %pod.uid, "{MOST_UNDER_WAY} queries wait for DNS servers; one more is not forwarded");
            pod.proxy.metrics.dns.forwarded(&labels, None);
            if let Some(failure) = message::failure(query) {
                send(&**datagrams, server, client, &failure);
            }
        }
    }
}

/// The server's answer, or that there is none.
async fn ask(pod: &Pod, query: &[u8], server: SocketAddr, labels: &Labels) -> Option<Vec<u8>> {
    let begun = Instant::now();
    let result = forward::exchange(&*pod.sockets, query, server).await;
    let took = result.is_ok().then(|| begun.elapsed());
    pod.proxy.metrics.dns.forwarded(labels, took);
    result
        .inspect_err(|error| tracing::debug!(%error, %server, uid = %pod.uid, "no answer of the DNS server"))
        .map_or_else(|_| message::failure(query), Some)
}

/// Sends an answer from where the client expects it.
fn send(datagrams: &dyn Datagrams, server: SocketAddr, client: SocketAddr, answer: &[u8]) {
    // As on any network it may be lost: the client asks again.
    if let Err(error) = datagrams.send(server, client, answer) {
        tracing::debug!(%error, %client, %server, "cannot send a DNS answer");
    }
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = nix::cmsg_space!(libc::sockaddr_in6);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let received = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let server = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4OrigDstAddr(at) => {
            let ip = Ipv4Addr::from(u32::from_be(at.sin_addr.s_addr));
            Some(SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(at.sin_port))))
        }
        ControlMessageOwned::Ipv6OrigDstAddr(at) => {
            let ip = Ipv6Addr::from(at.sin6_addr.s6_addr);
            Some(SocketAddr::V6(SocketAddrV6::new(ip, u16::from_be(at.sin6_port), 0, 0)))
        }
        _ => None,
    });
    let client = received.address.as_ref().and_then(address);
    let unknown = || io::Error::other("the kernel does not tell both ends of a datagram");
    let (client, server) = client.zip(server).ok_or_else(unknown)?;
    Ok(Received { length: received.bytes, client, server })
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|at| SocketAddr::V4((*at).into()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|at| SocketAddr::V6((*at).into())))
}

fn log_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a DNS query's task failed; please report this with the lines before it");
    }
}
