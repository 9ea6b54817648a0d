//! One packet at a time over a unix `SOCK_SEQPACKET` socket, with file descriptors beside the bytes (`SCM_RIGHTS`).
//!
//! Carries the pod protocol (`proto/pods.proto`) and the CNI plugin's questions; it knows neither's meaning.
//!
//! **Invariant:** every descriptor that arrives is owned (and close-on-exec) before anything else can fail, so a
//! refused message closes its descriptors and none leaks into a child process.

#![allow(unsafe_code, reason = "the kernel hands descriptors over as bare integers")]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Largest message, in bytes (`pods.proto`). One more is received as [`LinkError::Truncated`].
pub const MAX_MESSAGE: usize = 16 * 1024;

/// Descriptors that one packet may carry; the kernel's own limit (`SCM_MAX_FD`) is 253.
pub const MAX_DESCRIPTORS: usize = 16;

/// Why a packet was not exchanged.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer closed the socket.
    #[error("the peer closed the socket")]
    Closed,
    /// The packet was longer than [`MAX_MESSAGE`]; its rest and its descriptors are gone.
    #[error("the peer sent a packet longer than {MAX_MESSAGE} bytes")]
    Truncated,
    /// A message to send has a size that no packet may have.
    #[error("a message of {0} bytes cannot be sent: 1 to {MAX_MESSAGE} are allowed")]
    Size(usize),
    /// The packet carries another number of descriptors than it should.
    #[error("the packet carries {actual} descriptors, expected {expected}")]
    Descriptors {
        /// What the message asks for, or the limit.
        expected: usize,
        /// What came.
        actual: usize,
    },
    /// The bytes are not a message of the expected type.
    #[error("the packet is not a message of the expected type: {0}")]
    Decode(#[from] prost::DecodeError),
    /// The socket failed.
    #[error("unix socket: {0}")]
    Io(#[from] io::Error),
}

/// One connected socket. Both directions may be used at once.
#[derive(Debug)]
pub struct Link {
    socket: AsyncFd<OwnedFd>,
}

impl Link {
    /// Connects to the listener at `path`.
    ///
    /// # Errors
    /// When nobody listens there, or its queue of connections is full.
    pub async fn connect(path: &Path) -> Result<Self, LinkError> {
        let socket = new_socket()?;
        let address = UnixAddr::new(path).map_err(io::Error::from)?;
        // A unix connect completes at once or not at all (unix(7)): there is nothing to wait for.
        socket::connect(socket.as_raw_fd(), &address).map_err(io::Error::from)?;
        Self::new(socket)
    }

    /// Two ends of one socket, for tests of protocols that run over it.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn pair() -> Result<(Self, Self), LinkError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (a, b) = socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(io::Error::from)?;
        Ok((Self::new(a)?, Self::new(b)?))
    }

    fn new(socket: OwnedFd) -> Result<Self, LinkError> {
        Ok(Self { socket: register(socket, Interest::READABLE | Interest::WRITABLE)? })
    }

    /// Sends `message` as one packet with copies of `descriptors`.
    ///
    /// # Errors
    /// [`LinkError::Size`] or [`LinkError::Descriptors`] before anything is sent, [`LinkError::Closed`] when the peer
    /// has gone.
    pub async fn send(
        &self,
        message: &impl prost::Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        let bytes = message.encode_to_vec();
        // An empty packet could not be told from the end of the conversation.
        if bytes.is_empty() || bytes.len() > MAX_MESSAGE {
            return Err(LinkError::Size(bytes.len()));
        }
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(LinkError::Descriptors { expected: MAX_DESCRIPTORS, actual: descriptors.len() });
        }
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let send = |socket: &OwnedFd| send_packet(socket, &bytes, &raw);
        match self.socket.async_io(Interest::WRITABLE, send).await {
            Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                Err(LinkError::Closed)
            }
            other => Ok(other?),
        }
    }

    /// Waits for one packet: its message, and the descriptors in the order in which the peer listed them.
    /// May be dropped while waiting; no packet is lost by that.
    ///
    /// # Errors
    /// [`LinkError::Closed`] at the end; any other error says that this packet is unusable, and its descriptors are
    /// closed.
    pub async fn receive<M: prost::Message + Default>(&self) -> Result<(M, Vec<OwnedFd>), LinkError> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let receive = |socket: &OwnedFd| receive_packet(socket, &mut bytes);
        let packet = match self.socket.async_io(Interest::READABLE, receive).await {
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(LinkError::Closed),
            other => other?,
        };
        if packet.truncated {
            return Err(LinkError::Truncated);
        }
        if packet.length == 0 {
            return Err(LinkError::Closed);
        }
        if packet.descriptors.len() > MAX_DESCRIPTORS {
            let actual = packet.descriptors.len();
            return Err(LinkError::Descriptors { expected: MAX_DESCRIPTORS, actual });
        }
        Ok((M::decode(&bytes[..packet.length])?, packet.descriptors))
    }

    /// User and process that connected, as the kernel saw them at that time (`SO_PEERCRED`).
    ///
    /// # Errors
    /// When the kernel refuses, which it does not for a connected socket.
    pub fn peer(&self) -> Result<Peer, LinkError> {
        let credentials = socket::getsockopt(self.socket.get_ref(), socket::sockopt::PeerCredentials)
            .map_err(io::Error::from)?;
        Ok(Peer { uid: credentials.uid(), pid: credentials.pid() })
    }
}

/// Who is at the other end of a [`Link`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Process id in our pid namespace, 0 if it is not visible there.
    pub pid: i32,
}

/// A socket in the file system that [`Link`]s connect to. The file stays on drop: by then it may be a successor's.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
}

impl Listener {
    /// Listens at `path`, for the owner of this process only (mode 0600). A socket file left there by a predecessor
    /// is replaced.
    ///
    /// # Errors
    /// When the directory is missing or not writable, or something that is no socket is at `path`.
    pub fn bind(path: &Path) -> Result<Self, LinkError> {
        let socket = new_socket()?;
        if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            std::fs::remove_file(path)?;
        }
        let address = UnixAddr::new(path).map_err(io::Error::from)?;
        socket::bind(socket.as_raw_fd(), &address).map_err(io::Error::from)?;
        // Before listen: until then nobody can connect.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        socket::listen(&socket, Backlog::new(16).map_err(io::Error::from)?).map_err(io::Error::from)?;
        Ok(Self { socket: register(socket, Interest::READABLE)? })
    }

    /// Waits for the next connection. May be dropped while waiting.
    ///
    /// # Errors
    /// When the process is out of descriptors; the listener stays usable.
    pub async fn accept(&self) -> Result<Link, LinkError> {
        let accept = |socket: &OwnedFd| accept_one(socket);
        Link::new(self.socket.async_io(Interest::READABLE, accept).await?)
    }
}

struct Packet {
    length: usize,
    truncated: bool,
    descriptors: Vec<OwnedFd>,
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

fn register(socket: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and keeps its number until the AsyncFd, which takes it over, drops it.
    Ok(unsafe { AsyncFd::register_with_interest(socket, interest) }?)
}

fn accept_one(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let accepted = socket::accept4(socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: accept4 just made this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(accepted) })
}

fn send_packet(socket: &OwnedFd, bytes: &[u8], descriptors: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
    let io = [IoSlice::new(bytes)];
    socket::sendmsg::<()>(socket.as_raw_fd(), &io, control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn receive_packet(socket: &OwnedFd, bytes: &mut [u8]) -> io::Result<Packet> {
    // Room for all that the kernel can deliver in one packet: with less, it would deliver a part and nix would not
    // tell which.
    let mut control = nix::cmsg_space!([RawFd; 253]);
    let mut io = [IoSliceMut::new(bytes)];
    let received = loop {
        match socket::recvmsg::<()>(
            socket.as_raw_fd(),
            &mut io,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel just installed these descriptors for this call alone.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let truncated = received.flags.contains(MsgFlags::MSG_TRUNC);
    Ok(Packet { length: received.bytes, truncated, descriptors })
}

#[cfg(test)]
mod tests;
