//! Flags sockets as the proxy's in the map that the pods' guard reads (socket storage `SKPROXY`).
//!
//! One `bpf(2)` call a socket; needs no eBPF library, only the map's descriptor, which the agent passes.

#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use arc_swap::ArcSwapOption;

/// `BPF_MAP_UPDATE_ELEM` of `enum bpf_cmd` (linux/bpf.h).
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;

/// The part of `union bpf_attr` for map elements.
#[repr(C)]
#[derive(Default)]
struct MapElement {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The current agent's map; replaced when the agent is. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct FlagMap {
    map: Arc<ArcSwapOption<OwnedFd>>,
}

impl FlagMap {
    /// Uses another map from now on; None when the agent has no guard.
    pub fn replace(&self, map: Option<OwnedFd>) {
        self.map.store(map.map(Arc::new));
    }

    /// Flags a socket; nothing to do without a map.
    ///
    /// # Errors
    /// When the descriptor is no such map or no socket.
    pub fn flag(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let map = self.map.load();
        let Some(map) = map.as_ref() else { return Ok(()) };
        let key: i32 = socket.as_raw_fd();
        let value: u32 = mesh_ebpf_abi::SOCKET_PROXY;
        let attr = MapElement {
            map_fd: u32::try_from(map.as_raw_fd()).map_err(io::Error::other)?,
            key: (&raw const key).expose_provenance() as u64,
            value: (&raw const value).expose_provenance() as u64,
            ..MapElement::default()
        };
        // SAFETY: the attribute and what it points to are live for the call, which only reads them; key and value
        // have the sizes of a socket storage map (int, u32).
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_MAP_UPDATE_ELEM, &raw const attr, size_of::<MapElement>())
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        Err(io::Error::new(error.kind(), format!("cannot flag a socket for the pod's guard: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_that_is_no_map_is_an_error() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let flags = FlagMap::default();
        flags.flag(socket.as_fd()).unwrap();
        flags.replace(Some(socket.try_clone().unwrap().into()));
        let error = flags.flag(socket.as_fd()).unwrap_err();
        assert!(error.to_string().contains("cannot flag a socket"), "{error}");
    }
}
