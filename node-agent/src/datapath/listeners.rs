//! The proxy's listening sockets inside a pod.
//!
//! The agent opens them and keeps a copy, so a proxy can go and another come while connections wait in the queue.
//! **Invariant:** nothing reaches them but by sk_lookup: they are bound to an address that no packet has.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;

use socket2::{Domain, Protocol, Socket, Type};

use super::{Listeners, netns};

/// TEST-NET-1 of RFC 5737. sk_lookup's choice does not look at the bound address, everything else does; 127.0.0.1
/// would let the pod's own processes dial the proxy.
const NOWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Connections that may wait for accept(); the kernel's limit `net.core.somaxconn` is 4096 by default.
const BACKLOG: i32 = 4096;

/// Opens a pod's listeners in the calling thread's network namespace; `flag` marks each as the proxy's before it
/// listens, so that its very first handshake passes the guard.
///
/// # Errors
/// When a socket option is refused (CAP_NET_ADMIN) or `flag` fails.
pub(super) fn open(flag: &mut dyn FnMut(&Socket) -> io::Result<()>) -> io::Result<Listeners> {
    Ok(Listeners {
        // Its connections come over lo, and their SYN-ACKs must go back that way.
        outbound_v4: listener(Some(b"lo"), flag)?,
        inbound_v4: listener(None, flag)?,
        hbone_v4: listener(None, flag)?,
        outbound_v6: None,
        inbound_v6: None,
        hbone_v6: None,
    })
}

/// Whether the listeners are of this network namespace.
pub(super) fn belong(listeners: &Listeners, cookie: u64) -> bool {
    [&listeners.outbound_v4, &listeners.inbound_v4, &listeners.hbone_v4]
        .into_iter()
        .all(|socket| netns::cookie_of(socket).is_ok_and(|of| of == cookie))
}

fn listener(device: Option<&[u8]>, flag: &mut dyn FnMut(&Socket) -> io::Result<()>) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    // Accepted sockets have addresses that are not the pod's: the original destination.
    socket.set_ip_transparent_v4(true)?;
    socket.bind_device(device)?;
    bind(&socket)?;
    flag(&socket)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Binds to any port. Nobody can dial it, but the pod's apps cannot have it either: so from the top, where neither
/// apps nor the kernel (`net.ipv4.ip_local_port_range`) usually look.
fn bind(socket: &Socket) -> io::Result<()> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for port in (61_000..=u16::MAX).rev() {
        match socket.bind(&SocketAddr::from((NOWHERE, port)).into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            other => return other,
        }
    }
    Err(last)
}
