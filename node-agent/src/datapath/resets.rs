//! Resets connections that are older than a pod's enrolment (sock_diag(7), inet_diag's SOCK_DESTROY).
//!
//! They never met the proxy, so policy was not asked about them. Which ones they are, their flag in SKPROXY says, which
//! the kernel tells with each socket of a dump. Needs CONFIG_INET_DIAG_DESTROY, CAP_NET_ADMIN and CAP_BPF.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use mesh_ebpf_abi::SOCKET_OLDER;
use socket2::{Domain, Protocol, Socket, Type};

use super::pod::step;
use super::{Datapath, PodError, netns};

/// Says whether a connection may not be, given the application's address and the client's.
pub type Denies<'a> = dyn Fn(SocketAddr, SocketAddr) -> bool + Sync + 'a;

/// What became of a pod's older connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// So many are gone.
    pub count: usize,
    /// There may be others: handshakes that were under way when the pod was enrolled may still become older connections,
    /// or the pod is not prepared yet.
    pub more: bool,
}

/// NETLINK_SOCK_DIAG and its messages (linux/sock_diag.h, linux/inet_diag.h).
const SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const REQ_SK_BPF_STORAGES: u16 = 2;
const STORAGE_REQ_MAP_FD: u16 = 1;
const SK_BPF_STORAGES: u16 = 20;
const STORAGE: u16 = 1;
const STORAGE_MAP_VALUE: u16 = 3;

/// linux/netlink.h
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
const MESSAGE_ERROR: u16 = 2;
const MESSAGE_DONE: u16 = 3;
const HEADER: usize = 16;

/// `struct inet_diag_sockid`, whose last eight bytes are the socket's cookie, and `struct inet_diag_msg` around it.
const ID: usize = 48;
const DIAG: usize = 72;

const TCP_LISTEN: u8 = 10;
/// All states of a connection that can still carry something, and listeners.
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << TCP_LISTEN | 1 << 11;

/// A socket of the calling thread's network namespace.
struct Found {
    family: u8,
    state: u8,
    id: [u8; ID],
    local: SocketAddr,
    remote: SocketAddr,
    older: bool,
}

impl Datapath {
    /// Resets connections to a captured pod's applications that are older than its enrolment: those that `denies` says
    /// so of, given the application's address and the client's. Connections that the pod opened itself are left, and so
    /// is what stays inside of it.
    ///
    /// # Errors
    /// When the kernel cannot do this (CONFIG_INET_DIAG_DESTROY).
    pub fn reset_older(&self, uid: &str, denies: &Denies<'_>) -> Result<Reset, PodError> {
        let captured = self.pods.get(uid).filter(|pod| pod.captured());
        let Some((netns, pod)) = captured.and_then(|pod| Some((pod.netns.as_ref()?, pod))) else {
            // An earlier agent captured it, and this one has yet to take it over.
            return Ok(Reset { count: 0, more: true });
        };
        let (flags, proc) = (self.maps.skproxy(), &*self.config.proc);
        let more = pod.pending.handshakes.is_some();
        let reset = netns::within(netns.as_fd(), || older(flags, proc, denies));
        let reset = reset.map(|count| Reset { count, more });
        step("reset its older connections", reset).map_err(|failed| failed.of(uid))
    }
}

/// In the calling thread's network namespace.
fn older(flags: BorrowedFd<'_>, proc: &Path, denies: &Denies<'_>) -> io::Result<usize> {
    let mut netlink =
        Socket::new(Domain::from(libc::AF_NETLINK), Type::DGRAM, Some(Protocol::from(SOCK_DIAG)))?;
    let mut sockets = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        list(&mut netlink, family as u8, flags, &mut sockets)?;
    }
    let listening = |socket: &&Found| socket.state == TCP_LISTEN;
    let listeners: HashSet<u16> =
        sockets.iter().filter(listening).map(|socket| socket.local.port()).collect();
    let ephemeral = ephemeral_ports(proc);
    let pairs: HashSet<_> = sockets.iter().map(|socket| (socket.local, socket.remote)).collect();
    let mut count = 0;
    for socket in sockets.iter().filter(|socket| socket.older && socket.state != TCP_LISTEN) {
        let own_port = ephemeral.contains(&socket.local.port()) && !listeners.contains(&socket.local.port());
        let inside = pairs.contains(&(socket.remote, socket.local));
        if own_port || inside || !denies(socket.local, socket.remote) {
            continue;
        }
        count += usize::from(destroy(&mut netlink, socket)?);
    }
    Ok(count)
}

/// Ports that the kernel chooses for connections that the pod opens.
fn ephemeral_ports(proc: &Path) -> std::ops::RangeInclusive<u16> {
    let text = fs::read_to_string(proc.join("sys/net/ipv4/ip_local_port_range")).unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(first), Some(last)) => first..=last,
        _ => 32768..=60999,
    }
}

fn list(netlink: &mut Socket, family: u8, flags: BorrowedFd<'_>, found: &mut Vec<Found>) -> io::Result<()> {
    let map = u32::try_from(flags.as_raw_fd()).map_err(io::Error::other)?;
    let storages =
        attribute(REQ_SK_BPF_STORAGES | NESTED, &attribute(STORAGE_REQ_MAP_FD, &map.to_ne_bytes()));
    let body = [request(family, STATES, &[0; ID]), storages].concat();
    netlink.write_all(&message(SOCK_DIAG_BY_FAMILY, REQUEST | DUMP, &body))?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = netlink.read(&mut buffer)?;
        for (kind, body) in messages(&buffer[..length]) {
            match kind {
                MESSAGE_DONE => return ended(body),
                MESSAGE_ERROR => return Err(error(body)),
                _ => found.extend(parse(body)),
            }
        }
    }
}

/// Whether it was still there.
fn destroy(netlink: &mut Socket, socket: &Found) -> io::Result<bool> {
    let body = request(socket.family, 1 << socket.state, &socket.id);
    netlink.write_all(&message(SOCK_DESTROY, REQUEST | ACK, &body))?;
    let mut buffer = [0; 4096];
    let length = netlink.read(&mut buffer)?;
    let answer = messages(&buffer[..length]).next().map(|(_, body)| error(body));
    match answer.as_ref().and_then(io::Error::raw_os_error) {
        Some(0) => Ok(true),
        Some(libc::ENOENT) => Ok(false),
        _ => Err(answer.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into())),
    }
}

/// `struct nlmsghdr` and a body.
fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = (HEADER + body.len()) as u32;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut bytes = vec![family, libc::IPPROTO_TCP as u8, 0, 0];
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// `struct nlattr` and its value, padded.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (4 + value.len()) as u16;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Type and body of each message of a datagram.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Type and value of each attribute.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The end of a dump says whether it is whole: a number as in `struct nlmsgerr`, none from older kernels.
fn ended(body: &[u8]) -> io::Result<()> {
    match error(body).raw_os_error() {
        Some(0) => Ok(()),
        _ if body.is_empty() => Ok(()),
        _ => Err(error(body)),
    }
}

/// `struct nlmsgerr`: 0 for an acknowledgement.
fn error(body: &[u8]) -> io::Error {
    let code = body.first_chunk().map_or(-libc::EBADMSG, |bytes| i32::from_ne_bytes(*bytes));
    io::Error::from_raw_os_error(-code)
}

fn parse(body: &[u8]) -> Option<Found> {
    let (diag, rest) = body.split_at_checked(DIAG)?;
    let id: [u8; ID] = diag.get(4..4 + ID)?.try_into().ok()?;
    let (family, state) = (diag[0], diag[1]);
    let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
    let ip = |at: usize| {
        let bytes: [u8; 16] = std::array::from_fn(|i| id[at + i]);
        match i32::from(family) {
            libc::AF_INET => IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]),
            _ => Ipv6Addr::from(bytes).to_canonical(),
        }
    };
    let values = attributes(rest)
        .filter(|(kind, _)| *kind == SK_BPF_STORAGES)
        .flat_map(|(_, storages)| attributes(storages).filter(|(kind, _)| *kind == STORAGE))
        .flat_map(|(_, storage)| attributes(storage).filter(|(kind, _)| *kind == STORAGE_MAP_VALUE));
    let older = values.map(|(_, value)| value).any(|value| *value == SOCKET_OLDER.to_ne_bytes());
    let (local, remote) = (SocketAddr::new(ip(4), port(0)), SocketAddr::new(ip(20), port(2)));
    Some(Found { family, state, id, local, remote, older })
}
