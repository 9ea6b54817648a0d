//! Canaries: connections, a query and packets inside a pod that prove where such things end up.
//!
//! Outbound ones go where nobody is, and the proxy answers if they are captured. Inbound ones come from there, over lo
//! by their mark, but for sk_lookup on the interface that has the pod's address. A packet of a raw socket has to be
//! dropped where it would leave. All calls are about the calling thread's network namespace.
//! **Invariant:** what a canary sends goes no further than the pod's link if it escapes: its time to live is one hop.
#![allow(unsafe_code, reason = "sockaddr_ll has no safe wrapper")]

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesh_ebpf_abi::canary::{self, ANSWER, PORT};
use mesh_ebpf_abi::{DNS_PORT, HBONE_PORT};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use super::rules::Interface;

/// What a canary takes the way of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// A connection that the pod opens.
    Outbound,
    /// One to the pod in the clear.
    Inbound,
    /// One to the pod's HBONE port.
    Hbone,
    /// A DNS query.
    Dns,
}

/// What became of a canary.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The proxy has answered.
    Answered,
    /// The connection stands, nobody answers.
    Silent,
    /// No connection, or no answer to the query.
    Lost,
    /// The kernel says no.
    Refused(io::Error),
    /// The connect hook left it alone.
    Escaped,
}

/// A canary's way, the pod's address of its family, and what became of it.
pub(super) type Landed = (Way, IpAddr, Outcome);

/// Patience with the proxy, and with a kernel that repeats a SYN in vain.
const PATIENCE: Duration = Duration::from_secs(1);
/// The header of a DNS query that asks nothing.
const QUESTION: [u8; 12] = [0xa6, 0xb1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Sends all canaries at once and waits until each is answered or given up. `hooked` is whether a connect() of this
/// process has ever been captured: it may be in a cgroup where none is.
pub(super) fn fly(sources: &[IpAddr], dns: bool, mark: u32, hooked: &AtomicBool) -> Vec<Landed> {
    let ways = [Way::Outbound, Way::Inbound, Way::Hbone, Way::Dns];
    let wanted = ways.into_iter().filter(|way| dns || *way != Way::Dns);
    let all = wanted.flat_map(|way| sources.iter().map(move |source| (way, *source)));
    let mut flying = Vec::new();
    let mut landed = Vec::new();
    for (way, source) in all {
        match launch(way, source, mark, hooked) {
            Ok(socket) => flying.push((way, source, socket)),
            Err(outcome) => landed.push((way, source, outcome)),
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while !flying.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        wait(&flying, left);
        let mut rest = Vec::new();
        for (way, source, socket) in flying {
            match look(way, &socket, left.is_zero()) {
                Some(outcome) => landed.push((way, source, outcome)),
                None => rest.push((way, source, socket)),
            }
        }
        flying = rest;
    }
    landed
}

fn wait(flying: &[(Way, IpAddr, Socket)], left: Duration) {
    let mut all: Vec<_> =
        flying.iter().map(|(.., socket)| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
    // Rounded up: no spinning in the last millisecond. What fails, a signal for example, is a look too early.
    let milliseconds = left.as_micros().div_ceil(1000);
    let _ = poll(&mut all, PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::ZERO));
}

fn look(way: Way, mut socket: &Socket, given_up: bool) -> Option<Outcome> {
    let mut answer = [0; QUESTION.len()];
    let expected: &[u8] = if way == Way::Dns { &QUESTION } else { &ANSWER };
    match socket.read(&mut answer) {
        Ok(length) if answer.get(..length) == Some(expected) => Some(Outcome::Answered),
        Ok(_) => Some(Outcome::Silent),
        Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::NotConnected].contains(&error.kind()) => {
            let stands = || way != Way::Dns && socket.peer_addr().is_ok();
            given_up.then(|| if stands() { Outcome::Silent } else { Outcome::Lost })
        }
        Err(error) => Some(Outcome::Refused(error)),
    }
}

fn launch(way: Way, source: IpAddr, mark: u32, hooked: &AtomicBool) -> Result<Socket, Outcome> {
    let nobody = canary::ip(source.is_ipv4());
    match way {
        Way::Outbound => outbound(SocketAddr::new(nobody, PORT), hooked),
        Way::Inbound => inbound(nobody, SocketAddr::new(source, PORT), mark).map_err(Outcome::Refused),
        Way::Hbone => inbound(nobody, SocketAddr::new(source, HBONE_PORT), mark).map_err(Outcome::Refused),
        Way::Dns => query(SocketAddr::new(nobody, DNS_PORT)).map_err(Outcome::Refused),
    }
}

/// As an app does it. Where this process is not among those whose connections are captured, it binds to lo by itself:
/// then only the rest of the way is proved.
fn outbound(to: SocketAddr, hooked: &AtomicBool) -> Result<Socket, Outcome> {
    let (socket, begun) = dial(to, |_| Ok(()))?;
    if socket.device().map_err(Outcome::Refused)?.is_some() {
        hooked.store(true, Ordering::Relaxed);
        return begun.map(|()| socket).map_err(Outcome::Refused);
    }
    if hooked.load(Ordering::Relaxed) {
        return Err(begun.err().map_or(Outcome::Escaped, Outcome::Refused));
    }
    let (socket, begun) = dial(to, |socket| socket.bind_device(Some(b"lo")))?;
    begun.map(|()| socket).map_err(Outcome::Refused)
}

fn dial(
    to: SocketAddr,
    prepare: impl FnOnce(&Socket) -> io::Result<()>,
) -> Result<(Socket, io::Result<()>), Outcome> {
    let socket = socket(to, Type::STREAM, Protocol::TCP).map_err(Outcome::Refused)?;
    prepare(&socket).map_err(Outcome::Refused)?;
    let begun = connect(&socket, to);
    Ok((socket, begun))
}

fn inbound(from: IpAddr, to: SocketAddr, mark: u32) -> io::Result<Socket> {
    let socket = socket(to, Type::STREAM, Protocol::TCP)?;
    if from.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
    }
    socket.set_mark(mark)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    connect(&socket, to)?;
    Ok(socket)
}

fn query(to: SocketAddr) -> io::Result<Socket> {
    let socket = socket(to, Type::DGRAM, Protocol::UDP)?;
    socket.connect(&to.into())?;
    socket.send(&QUESTION)?;
    Ok(socket)
}

fn socket(to: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), kind.nonblocking().cloexec(), Some(protocol))?;
    if to.is_ipv4() {
        socket.set_ttl_v4(1)?;
    } else {
        socket.set_unicast_hops_v6(1)?;
    }
    if protocol == Protocol::TCP {
        // Nothing stays behind: neither end waits for the other's farewell.
        socket.set_linger(Some(Duration::ZERO))?;
    }
    Ok(socket)
}

fn connect(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        other => other,
    }
}

/// A socket for packets that are nobody's. One for all: when it is closed the kernel waits for its other processors.
///
/// # Errors
/// Without CAP_NET_RAW for example.
pub(super) fn packet_socket() -> io::Result<Socket> {
    Socket::new(Domain::PACKET, Type::DGRAM.cloexec(), None)
}

/// Whether a packet of such a socket may leave by the interface from this address of the pod.
///
/// # Errors
/// When that cannot be found out.
pub(super) fn leaks(socket: &Socket, interface: Interface, source: IpAddr) -> io::Result<bool> {
    match socket.send_to(&syn(source), &link_address(interface, source)?) {
        Ok(_) => Ok(true),
        // How a packet looks to its sender that was dropped on its way out.
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(false),
        // Down, or gone: nothing leaves by it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// A SYN that nobody could answer: its checksums are wrong.
fn syn(source: IpAddr) -> Vec<u8> {
    const TCP: u8 = 6;
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let header: &[u8] = match source {
        IpAddr::V4(_) => &[0x45, 0, 0, 40, 0, 0, 0, 0, 1, TCP, 0, 0],
        IpAddr::V6(_) => &[0x60, 0, 0, 0, 0, 20, TCP, 1],
    };
    let ports = [PORT.to_be_bytes(), PORT.to_be_bytes()].concat();
    let rest = [0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, 2, 0, 0, 0, 0, 0, 0];
    [header, &octets(source), &octets(canary::ip(source.is_ipv4())), &ports, &rest].concat()
}

/// Of an Ethernet device the group address that bridges do not forward (IEEE 802.1Q, table 8-1).
fn link_address(interface: Interface, source: IpAddr) -> io::Result<SockAddr> {
    const ETH_P_IP: u16 = 0x0800;
    const ETH_P_IPV6: u16 = 0x86dd;
    const NOBODY: [u8; 8] = [0x01, 0x80, 0xc2, 0, 0, 0x0f, 0, 0];
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: the structure is plain integers and fits.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = if source.is_ipv4() { ETH_P_IP } else { ETH_P_IPV6 }.to_be();
    address.sll_ifindex = i32::try_from(interface.index).map_err(|_| io::ErrorKind::InvalidInput)?;
    (address.sll_halen, address.sll_addr) = (if interface.ethernet { 6 } else { 0 }, NOBODY);
    // SAFETY: the family is the structure's, the length its own.
    Ok(unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) })
}
