//! A socket of the family AF_XDP that sends one frame in copy mode, which takes CAP_NET_RAW only.
#![allow(unsafe_code, reason = "its rings are shared memory")]

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

const PAGE: usize = 4096;
const ENTRIES: u32 = 8;

/// Sends a frame by an interface of the calling thread's network namespace. It is on its way when this returns.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn send(interface: u32, frame: &[u8]) -> io::Result<()> {
    assert!(frame.len() <= PAGE);
    // SAFETY: a new descriptor, or -1.
    let socket = unsafe {
        let fd = checked(libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0).into())?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    let fd = socket.as_raw_fd();
    // SAFETY: anonymous memory of one page, which the kernel chooses a place for.
    let memory = unsafe {
        map(PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0).inspect(|page| {
            page.copy_from_nonoverlapping(frame.as_ptr(), frame.len());
        })?
    };
    let area = libc::xdp_umem_reg {
        addr: memory as u64,
        len: PAGE as u64,
        chunk_size: PAGE as u32,
        headroom: 0,
        flags: 0,
        tx_metadata_len: 0,
    };
    set(fd, libc::XDP_UMEM_REG, &area)?;
    for ring in [libc::XDP_UMEM_FILL_RING, libc::XDP_UMEM_COMPLETION_RING, libc::XDP_TX_RING] {
        set(fd, ring, &ENTRIES)?;
    }
    // SAFETY: plain integers, which the kernel fills.
    let offsets = unsafe {
        let mut offsets = std::mem::zeroed::<libc::xdp_mmap_offsets>();
        let mut length = size_of_val(&offsets) as libc::socklen_t;
        let place = (&raw mut offsets).cast();
        checked(libc::getsockopt(fd, libc::SOL_XDP, libc::XDP_MMAP_OFFSETS, place, &raw mut length).into())?;
        offsets
    };
    let size = offsets.tx.desc as usize + ENTRIES as usize * size_of::<libc::xdp_desc>();
    // SAFETY: the transmit ring of this socket, of the size that it was given.
    let ring = unsafe { map(size, libc::MAP_SHARED, fd, libc::XDP_PGOFF_TX_RING)? };
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        sxdp_flags: libc::XDP_COPY,
        sxdp_ifindex: interface,
        sxdp_queue_id: 0,
        sxdp_shared_umem_fd: 0,
    };
    // SAFETY: the offsets are the kernel's, within the mapping; nobody else has the socket.
    unsafe {
        let length = size_of_val(&address) as libc::socklen_t;
        checked(libc::bind(fd, (&raw const address).cast(), length).into())?;
        let descriptor = libc::xdp_desc { addr: 0, len: frame.len() as u32, options: 0 };
        ring.add(offsets.tx.desc as usize).cast::<libc::xdp_desc>().write_unaligned(descriptor);
        let producer = AtomicU32::from_ptr(ring.add(offsets.tx.producer as usize).cast());
        producer.store(1, Ordering::Release);
        let sent = libc::sendto(fd, std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0);
        let sent = checked(sent as i64);
        libc::munmap(ring.cast(), size);
        drop(socket);
        libc::munmap(memory.cast(), PAGE);
        sent.map(drop)
    }
}

/// # Safety
/// As of mmap(2).
unsafe fn map(size: usize, flags: i32, fd: i32, offset: libc::off_t) -> io::Result<*mut u8> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the caller's promise.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, fd, offset) };
    if place == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(place.cast()) }
}

fn set<T>(fd: i32, option: i32, value: &T) -> io::Result<()> {
    let (place, length) = (std::ptr::from_ref(value).cast(), size_of::<T>() as libc::socklen_t);
    // SAFETY: the kernel reads as many bytes as the value has.
    checked(unsafe { libc::setsockopt(fd, libc::SOL_XDP, option, place, length) }.into()).map(drop)
}

fn checked(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
