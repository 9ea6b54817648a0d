//! The proxy's listening sockets inside a pod, and those that its DNS queries come in by.
//!
//! The agent opens them and keeps a copy, so a proxy can go and another come while connections and queries wait in the
//! queue.
//! **Invariant:** nothing reaches them but by sk_lookup: they are bound to an address that no packet has.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{Listeners, netns};

/// TEST-NET-1 of RFC 5737. sk_lookup's choice does not look at the bound address, everything else does; 127.0.0.1
/// would let the pod's own processes dial the proxy.
const NOWHERE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
/// The same of RFC 3849.
const NOWHERE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

/// Connections that may wait for accept(); the kernel's limit `net.core.somaxconn` is 4096 by default.
const BACKLOG: i32 = 4096;

/// Its connections come over lo, and their SYN-ACKs must go back that way.
const OUTBOUND: Option<&[u8]> = Some(b"lo");
const INBOUND: Option<&[u8]> = None;

/// Bytes of DNS queries that may wait for a proxy, as the kernel accounts for them: about 1,500 queries.
const QUERIES: usize = 1 << 20;

/// Opens what is missing of a pod's listeners in the calling thread's network namespace; `flag` marks each as the
/// proxy's before it listens, so that its very first handshake passes the guard. IPv6 ones are there after it if the
/// pod's connections can be captured over IPv6 (`v6`), and only then; likewise the DNS ones (`dns`).
///
/// # Errors
/// When a socket option is refused (CAP_NET_ADMIN) or `flag` fails.
pub(super) fn open(
    kept: Option<Listeners>,
    v6: bool,
    dns: bool,
    flag: &mut dyn FnMut(&Socket) -> io::Result<()>,
) -> io::Result<Listeners> {
    let mut listeners = match kept {
        Some(kept) => kept,
        None => Listeners {
            outbound_v4: listener(NOWHERE_V4, OUTBOUND, flag)?,
            inbound_v4: listener(NOWHERE_V4, INBOUND, flag)?,
            hbone_v4: listener(NOWHERE_V4, INBOUND, flag)?,
            outbound_v6: None,
            inbound_v6: None,
            hbone_v6: None,
            dns_v4: None,
            dns_v6: None,
        },
    };
    for (place, device) in [
        (&mut listeners.outbound_v6, OUTBOUND),
        (&mut listeners.inbound_v6, INBOUND),
        (&mut listeners.hbone_v6, INBOUND),
    ] {
        match v6 {
            true if place.is_none() => *place = Some(listener(NOWHERE_V6, device, flag)?),
            true => {}
            false => *place = None,
        }
    }
    for (place, at, wanted) in
        [(&mut listeners.dns_v4, NOWHERE_V4, dns), (&mut listeners.dns_v6, NOWHERE_V6, dns && v6)]
    {
        match wanted {
            true if place.is_none() => *place = Some(queries(at)?),
            true => {}
            false => *place = None,
        }
    }
    Ok(listeners)
}

/// Whether the listeners are of this network namespace, and listen.
pub(super) fn belong(listeners: &Listeners, cookie: u64) -> bool {
    let needed = [&listeners.outbound_v4, &listeners.inbound_v4, &listeners.hbone_v4];
    let Listeners { outbound_v6, inbound_v6, hbone_v6, dns_v4, dns_v6, .. } = listeners;
    let optional = [outbound_v6, inbound_v6, hbone_v6, dns_v4, dns_v6];
    let listens = |socket: &OwnedFd| {
        let socket = SockRef::from(socket);
        socket.r#type().is_ok_and(|kind| kind == Type::DGRAM) || socket.is_listener().unwrap_or(false)
    };
    needed
        .into_iter()
        .chain(optional.into_iter().flatten())
        .all(|socket| netns::cookie_of(socket).is_ok_and(|of| of == cookie) && listens(socket))
}

fn listener(
    at: IpAddr,
    device: Option<&[u8]>,
    flag: &mut dyn FnMut(&Socket) -> io::Result<()>,
) -> io::Result<OwnedFd> {
    let domain = Domain::for_address(SocketAddr::new(at, 0));
    let socket = Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    // Accepted sockets have addresses that are not the pod's: the original destination.
    if at.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
        // IPv4 has listeners of its own.
        socket.set_only_v6(true)?;
    }
    socket.bind_device(device)?;
    bind(&socket, at)?;
    // Inherited by accepted sockets, whose port is the app's: without it an app that starts again could not have its
    // port while the proxy has a connection to it, also a closed one.
    socket.set_reuse_address(true)?;
    // Inherited as well, so that a connection that waits for its proxy has what the proxy would have set.
    mesh_core::tcp::tune(&socket)?;
    flag(&socket)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A UDP socket for DNS queries. Nothing is sent from it.
fn queries(at: IpAddr) -> io::Result<OwnedFd> {
    let domain = Domain::for_address(SocketAddr::new(at, 0));
    let socket = Socket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    if at.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
        socket.set_only_v6(true)?;
    }
    // Past the limit `net.core.rmem_max`, which is for applications.
    setsockopt(&socket, RcvBufForce, &QUERIES)?;
    bind(&socket, at)?;
    Ok(socket.into())
}

/// Binds to any port. Nobody can dial it, but the pod's apps cannot have it either: so from the top, where neither
/// apps nor the kernel (`net.ipv4.ip_local_port_range`) usually look.
fn bind(socket: &Socket, at: IpAddr) -> io::Result<()> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for port in (61_000..=u16::MAX).rev() {
        match socket.bind(&SocketAddr::new(at, port).into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            other => return other,
        }
    }
    Err(last)
}
