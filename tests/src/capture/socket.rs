//! A packet socket (packet(7)) that sees every frame of its namespace.
#![allow(unsafe_code, reason = "packet(7)'s loss counter has no safe wrapper among the kept dependencies")]

use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::sys::socket::sockopt::{RcvBufForce, ReceiveTimeout};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// Room for bursts while the reader is not scheduled.
const BUFFER: usize = 64 << 20;

#[derive(Debug)]
pub(super) struct PacketSocket(OwnedFd);

pub(super) fn open() -> anyhow::Result<PacketSocket> {
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .context("open a packet socket")?;
    setsockopt(&fd, RcvBufForce, &BUFFER)?;
    setsockopt(&fd, ReceiveTimeout, &TimeVal::milliseconds(50))?;
    Ok(PacketSocket(fd))
}

/// What a read brought.
pub(super) enum Received {
    /// A frame of this length.
    Frame(usize),
    /// A frame on its way out: a forwarded one was seen on its way in already.
    Outgoing,
    /// None came for a while.
    Nothing,
}

impl PacketSocket {
    pub(super) fn receive(&self, buffer: &mut [u8]) -> anyhow::Result<Received> {
        match recvfrom::<LinkAddr>(self.0.as_raw_fd(), buffer) {
            Ok((_, Some(from))) if from.pkttype() == libc::PACKET_OUTGOING => Ok(Received::Outgoing),
            Ok((length, _)) => Ok(Received::Frame(length)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Received::Nothing),
            Err(errno) => Err(errno).context("read the packet socket"),
        }
    }

    /// Frames that found the buffer full.
    pub(super) fn lost(&self) -> anyhow::Result<u32> {
        #[repr(C)]
        struct Statistics {
            packets: u32,
            drops: u32,
        }
        let mut statistics = Statistics { packets: 0, drops: 0 };
        let mut length = size_of::<Statistics>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes of a `tpacket_stats`, which this structure mirrors.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        Errno::result(result).context("read the packet socket's statistics")?;
        Ok(statistics.drops)
    }
}
