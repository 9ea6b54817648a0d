//! The few bpf(2) calls that tests need: another program under a pinned link or beside it (`foreign`), one that lets
//! everything pass, and what a program has cost until now.
#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// What a link is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Connect4,
    Connect6,
    SkLookup,
    Tcx,
    Xdp,
}

/// A link, and what it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    pub id: u32,
    /// The beginning of the hash of the program's instructions.
    pub tag: [u8; 8],
}

/// The link pinned at a path.
pub fn link(path: &Path) -> io::Result<Link> {
    let link: LinkInfo = info(&open(path)?)?;
    Ok(Link { id: link.id, tag: program(&link)?.tag })
}

/// What a link's program has run since statistics are kept (BPF_ENABLE_STATS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spent {
    /// How often.
    pub runs: u64,
    /// All together.
    pub nanoseconds: u64,
}

/// Of the link pinned at a path.
pub fn spent(path: &Path) -> io::Result<Spent> {
    let program = program(&info::<LinkInfo>(&open(path)?)?)?;
    Ok(Spent { runs: program.runs, nanoseconds: program.nanoseconds })
}

fn program(link: &LinkInfo) -> io::Result<ProgramInfo> {
    info(&owned(call(PROG_GET_FD_BY_ID, [link.program, 0, 0])?))
}

/// Makes the link pinned at a path run a program whose verdict is always to let it pass.
pub fn replace_by_one_that_passes_all(path: &Path, kind: Kind) -> io::Result<()> {
    let program = passes_all(kind)?;
    call(LINK_UPDATE, [open(path)?.as_raw_fd(), program.as_raw_fd(), 0, 0]).map(drop)
}

/// Pins such a program.
pub fn pin_one_that_passes_all(path: &Path, kind: Kind) -> io::Result<()> {
    let program = passes_all(kind)?;
    let path = CString::new(path.as_os_str().as_bytes())?;
    // The path, then the descriptor and flags in one word.
    call(OBJ_PIN, [path.as_ptr() as u64, program.as_raw_fd() as u64]).map(drop)
}

fn passes_all(kind: Kind) -> io::Result<OwnedFd> {
    let verdict = if kind == Kind::Tcx { 0 } else { 1 };
    // r0 = verdict; exit
    load(kind, "", &[0xb7 | verdict << 32, 0x95])
}

/// Loads a program, whose name has 15 bytes at most.
pub fn load(kind: Kind, name: &str, instructions: &[u64]) -> io::Result<OwnedFd> {
    // enum bpf_prog_type
    let program_type = match kind {
        Kind::Connect4 | Kind::Connect6 => 18,
        Kind::SkLookup => 30,
        Kind::Tcx => 3,
        Kind::Xdp => 6,
    };
    let licence = c"Apache-2.0";
    let mut padded = [0; 16];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    let attr = ProgramLoad {
        program_type,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        licence: licence.as_ptr() as u64,
        rest: [0; 6],
        name: padded,
        interface: 0,
        attach_type: kind.attach_type(),
    };
    Ok(owned(call(PROG_LOAD, attr)?))
}

/// Attaches a program behind what is there.
pub fn attach(program: &OwnedFd, target: BorrowedFd<'_>, kind: Kind) -> io::Result<OwnedFd> {
    attach_as(program, target, kind, 0)
}

/// The same with flags of its link.
pub fn attach_as(program: &OwnedFd, target: BorrowedFd<'_>, kind: Kind, flags: u32) -> io::Result<OwnedFd> {
    let attr = [program.as_raw_fd() as u32, target.as_raw_fd() as u32, kind.attach_type(), flags];
    Ok(owned(call(LINK_CREATE, attr)?))
}

/// Takes a pinned link's program off its target; the pin stays.
pub fn detach(path: &Path) -> io::Result<()> {
    call(LINK_DETACH, [open(path)?.as_raw_fd() as u32]).map(drop)
}

/// Attaches a program to the egress of an interface of the calling thread's network namespace, before what is there.
pub fn attach_before_all(program: &OwnedFd, interface: u32) -> io::Result<OwnedFd> {
    attach_tcx(program, interface, TCX_EGRESS, BPF_F_BEFORE)
}

/// The same after what is there.
pub fn attach_after_all(program: &OwnedFd, interface: u32) -> io::Result<OwnedFd> {
    attach_tcx(program, interface, TCX_EGRESS, 0)
}

/// Attaches a program to the ingress of an interface of the calling thread's network namespace, before what is there.
pub fn attach_to_ingress_before_all(program: &OwnedFd, interface: u32) -> io::Result<OwnedFd> {
    attach_tcx(program, interface, TCX_INGRESS, BPF_F_BEFORE)
}

/// Attaches a program to an interface of the calling thread's network namespace, where the kernel runs it for each packet
/// that the driver has given it (generic XDP).
pub fn attach_xdp(program: &OwnedFd, interface: u32) -> io::Result<OwnedFd> {
    const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
    Ok(owned(call(LINK_CREATE, [program.as_raw_fd() as u32, interface, XDP, XDP_FLAGS_SKB_MODE])?))
}

const XDP: u32 = 37;
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;
const BPF_F_BEFORE: u32 = 1 << 3;

fn attach_tcx(program: &OwnedFd, interface: u32, hook: u32, flags: u32) -> io::Result<OwnedFd> {
    Ok(owned(call(LINK_CREATE, [program.as_raw_fd() as u32, interface, hook, flags])?))
}

/// The kernel's number of a program.
pub fn program_id(program: &OwnedFd) -> io::Result<u32> {
    info::<ProgramInfo>(program).map(|info| info.id)
}

/// A map of sockets with this one in it, at 0.
pub fn socket_map(socket: &impl AsFd) -> io::Result<OwnedFd> {
    const SOCKMAP: u32 = 15;
    // Type, sizes of key and value, entries.
    let map = owned(call(MAP_CREATE, [SOCKMAP, 4, 8, 1])?);
    let (key, value) = (0_u32, socket.as_fd().as_raw_fd() as u64);
    let attr = [map.as_raw_fd() as u64, &raw const key as u64, &raw const value as u64, 0];
    call(MAP_UPDATE_ELEM, attr)?;
    Ok(map)
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    Ok(owned(call(OBJ_GET, [path.as_ptr() as u64, 0])?))
}

impl Kind {
    /// In enum bpf_attach_type.
    fn attach_type(self) -> u32 {
        match self {
            Self::Connect4 => 10,
            Self::Connect6 => 11,
            Self::SkLookup => 36,
            Self::Tcx => 0,
            Self::Xdp => XDP,
        }
    }
}

const MAP_CREATE: i32 = 0;
const MAP_UPDATE_ELEM: i32 = 2;
const PROG_LOAD: i32 = 5;
const OBJ_PIN: i32 = 6;
const OBJ_GET: i32 = 7;
const PROG_GET_FD_BY_ID: i32 = 13;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const LINK_CREATE: i32 = 28;
const LINK_UPDATE: i32 = 29;
const LINK_DETACH: i32 = 34;

#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    /// Log (level, size, buffer), kernel version, flags.
    rest: [u32; 6],
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// The beginning of `struct bpf_link_info`.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
}

/// The beginning of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    /// Up to `prog_tags`; zero where it would be a buffer to fill.
    rest: [u64; 22],
    nanoseconds: u64,
    runs: u64,
}

fn info<T: Default>(object: &OwnedFd) -> io::Result<T> {
    let mut found = T::default();
    let size = size_of::<T>() as u64;
    // The descriptor and the size are one word each.
    let head = object.as_raw_fd() as u64 | size << 32;
    call(OBJ_GET_INFO_BY_FD, [head, &raw mut found as u64])?;
    Ok(found)
}

/// `attr` is the beginning of `union bpf_attr` for the command, and what it points to outlives the call.
fn call<T>(command: i32, mut attr: T) -> io::Result<i32> {
    // SAFETY: the attributes live on this stack frame, their size goes with them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
