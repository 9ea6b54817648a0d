//! Sockets inside a pod's network namespace: the only place where the process changes namespaces.
//!
//! **Invariant:** a thread that entered a pod's namespace is back in its own before any other code runs on it (no
//! await, no allocation that could fail in between); every socket is flagged for the pod's guard before it connects.

mod datagram;
mod flag;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mesh_core::addr::{ClientAddr, NextHop, Target};
use mesh_core::tcp;
use mesh_ebpf_abi::{MARK_PROXY, MARK_UPSTREAM};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;

pub use flag::FlagMap;

/// Makes unconnected, nonblocking sockets; the kernel's part of a pod, replaced in tests that have no namespaces.
pub trait Sockets: Send + Sync + 'static {
    /// For connections to the network, from the pod's own address; `from` is one of them with a port, without it the
    /// kernel chooses both.
    ///
    /// # Errors
    /// When the namespace cannot be entered, the socket not be made or the port is taken (`AddrInUse`).
    fn to_network(&self, from: Option<ClientAddr>, next_hop: NextHop) -> io::Result<Socket>;

    /// For connections to the pod's application, from an address that is not ours.
    ///
    /// # Errors
    /// When the namespace cannot be entered, the socket not be made or the address is taken (`AddrInUse`).
    fn to_application(&self, from: ClientAddr, target: Target) -> io::Result<Socket>;

    /// A UDP socket connected to a DNS server, from a port that the kernel draws.
    ///
    /// # Errors
    /// When the namespace cannot be entered, the socket not be made, or the server not be reached.
    fn to_nameserver(&self, server: SocketAddr) -> io::Result<Socket>;

    /// Sends datagrams to the pod's application that come from wherever they should; for addresses of the family of `ip`.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the socket not be made (CAP_NET_RAW).
    fn datagrams(&self, ip: IpAddr) -> io::Result<Box<dyn Datagrams>>;
}

/// See [`Sockets::datagrams`].
pub trait Datagrams: Send + Sync {
    /// Sends one datagram.
    ///
    /// # Errors
    /// When it is too long, or the kernel has no room for it.
    fn send(&self, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> io::Result<()>;
}

/// Sockets of one pod.
#[derive(Debug)]
pub struct PodSockets {
    netns: OwnedFd,
    own_netns: Arc<OwnedFd>,
    flags: FlagMap,
}

impl PodSockets {
    /// `own_netns` is where the process belongs ([`own_netns`]).
    pub fn new(netns: OwnedFd, own_netns: Arc<OwnedFd>, flags: FlagMap) -> Self {
        Self { netns, own_netns, flags }
    }

    fn open(&self, addr: SocketAddr) -> io::Result<Socket> {
        let socket = self.make(addr.ip(), Type::STREAM, Protocol::TCP)?;
        self.flags.flag(socket.as_fd())?;
        tcp::tune(&socket)?;
        Ok(socket)
    }

    fn make(&self, ip: IpAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
        let domain = Domain::for_address(SocketAddr::new(ip, 0));
        inside(&self.netns, &self.own_netns, || Socket::new(domain, kind.nonblocking(), Some(protocol)))
    }
}

impl Sockets for PodSockets {
    fn to_network(&self, from: Option<ClientAddr>, next_hop: NextHop) -> io::Result<Socket> {
        let socket = self.open(next_hop.get())?;
        socket.set_mark(MARK_PROXY)?;
        if let Some(from) = from {
            // As towards the application: the port is free for this target.
            socket.set_reuse_address(true)?;
            socket.bind(&from.get().into())?;
        }
        Ok(socket)
    }

    fn to_application(&self, from: ClientAddr, target: Target) -> io::Result<Socket> {
        let socket = self.open(target.get())?;
        // The mark routes the application's replies back to lo; without the device, steering would take the SYN for
        // one of the network's and give it to us again.
        socket.set_mark(MARK_UPSTREAM)?;
        socket.bind_device(Some(b"lo"))?;
        match from.ip().is_ipv4() {
            true => socket.set_ip_transparent_v4(true)?,
            false => socket.set_ip_transparent_v6(true)?,
        }
        // The port is free for this target; that others use it for theirs is no conflict.
        socket.set_reuse_address(true)?;
        // Without the scope of a link-local client, which would bind the socket to that link instead of lo.
        socket.bind(&SocketAddr::new(from.ip(), from.port()).into())?;
        Ok(socket)
    }

    fn to_nameserver(&self, server: SocketAddr) -> io::Result<Socket> {
        let socket = self.make(server.ip(), Type::DGRAM, Protocol::UDP)?;
        self.flags.flag(socket.as_fd())?;
        // Else it would come back to us, as what the application sends to port 53 does.
        socket.set_mark(MARK_PROXY)?;
        socket.connect(&server.into())?;
        Ok(socket)
    }

    fn datagrams(&self, ip: IpAddr) -> io::Result<Box<dyn Datagrams>> {
        // IPPROTO_RAW: it receives nothing, and the IP header is ours as well (raw(7), ipv6(7)).
        let socket = self.make(ip, Type::RAW, Protocol::from(libc::IPPROTO_RAW))?;
        Ok(Box::new(Raw(socket)))
    }
}

/// A raw socket, for which the headers are written here. An ordinary one would have to be bound to the address that the
/// datagrams come from, and so take the port from an application of the pod that wants it, as a DNS server does.
struct Raw(Socket);

impl Datagrams for Raw {
    fn send(&self, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
        let packet = datagram::packet(from, to, payload)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut to = to;
        // Of a raw socket's address it is a protocol, or nothing.
        to.set_port(0);
        self.0.send_to(&packet, &to.into()).map(drop)
    }
}

/// The namespace that this process was started in.
///
/// # Errors
/// When /proc is not mounted.
pub fn own_netns() -> io::Result<Arc<OwnedFd>> {
    Ok(Arc::new(std::fs::File::open("/proc/thread-self/ns/net")?.into()))
}

/// From now on, closing it resets the connection: the peer learns that its bytes were not taken.
pub fn reset_on_close(stream: &TcpStream) {
    // Fails only on a closed socket, which needs no reset.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Runs `make` with this thread in `netns`.
fn inside<T>(netns: &OwnedFd, own: &OwnedFd, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
    let made = make();
    if let Err(error) = setns(own.as_fd(), CloneFlags::CLONE_NEWNET) {
        // This thread would go on to open other pods' sockets in this pod.
        eprintln!("cannot return from a pod's network namespace: {error}; this needs CAP_SYS_ADMIN");
        std::process::abort();
    }
    made
}
