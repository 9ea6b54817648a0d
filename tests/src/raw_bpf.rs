//! The few bpf(2) calls that tests need: another program under a pinned link, one that lets everything pass, and what a
//! program has cost until now.
#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// What a link is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Connect4,
    Connect6,
    SkLookup,
    Tcx,
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

fn passes_all(kind: Kind) -> io::Result<OwnedFd> {
    // enum bpf_prog_type, enum bpf_attach_type, and the verdict.
    let (program_type, attach_type, verdict) = match kind {
        Kind::Connect4 => (18, 10, 1),
        Kind::Connect6 => (18, 11, 1),
        Kind::SkLookup => (30, 36, 1),
        Kind::Tcx => (3, 0, 0),
    };
    // r0 = verdict; exit
    let instructions: [u64; 2] = [0xb7 | verdict << 32, 0x95];
    let licence = c"Apache-2.0";
    let attr = ProgramLoad {
        program_type,
        count: 2,
        instructions: instructions.as_ptr() as u64,
        licence: licence.as_ptr() as u64,
        rest: [0; 11],
        attach_type,
    };
    Ok(owned(call(PROG_LOAD, attr)?))
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    Ok(owned(call(OBJ_GET, [path.as_ptr() as u64, 0])?))
}

const PROG_LOAD: i32 = 5;
const OBJ_GET: i32 = 7;
const PROG_GET_FD_BY_ID: i32 = 13;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const LINK_UPDATE: i32 = 29;

#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    /// Log (level, size, buffer), kernel version, flags, name, interface.
    rest: [u32; 11],
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
