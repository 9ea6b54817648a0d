//! The few bpf(2) calls that aya has no way to make: links on a network namespace or cgroup that can be updated,
//! placed and asked what they are attached to; what runs on a hook; programs' tags and names; socket iterators.
//!
//! **Invariant:** the only file of the datapath that calls the kernel by hand.
#![allow(unsafe_code, reason = "bpf(2) takes pointers to attribute structures")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Hooks, by their number in `enum bpf_attach_type`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    /// cgroup: what happens to TCP sockets.
    SockOps = 3,
    /// cgroup: IPv4 connect().
    Connect4 = 10,
    /// cgroup: IPv6 connect().
    Connect6 = 11,
    /// An iterator; no target.
    Iterator = 28,
    /// Network namespace: socket lookup.
    SkLookup = 36,
    /// Interface: ingress.
    TcxIngress = 46,
    /// Interface: egress.
    TcxEgress = 47,
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target<'fd> {
    /// A cgroup or network namespace.
    Fd(BorrowedFd<'fd>),
    /// An interface of the calling thread's network namespace.
    Interface(u32),
    /// Nothing (iterators).
    None,
}

/// What the kernel says of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkInfo {
    /// Id of the program it runs.
    pub program: u32,
    /// Cgroup id, inode of the network namespace, or interface index; 0 when that is gone.
    pub target: u64,
}

/// First eight bytes of the hash of a program's instructions; equal for equal programs.
pub(super) type Tag = [u8; 8];

/// Pins an object in bpffs.
///
/// # Errors
/// As of BPF_OBJ_PIN.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = ObjectAttr { path: path.as_ptr() as u64, fd: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the path outlives the call.
    unsafe { call(Command::ObjPin, attr) }.map(|_| ())
}

/// Opens what is pinned at a path.
///
/// # Errors
/// `NotFound`, or as of BPF_OBJ_GET.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path outlives the call.
    let fd = unsafe { call(Command::ObjGet, ObjectAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 }) }?;
    Ok(owned(fd))
}

/// Attaches a program. On an interface it runs before what is there already: a program whose verdict ends the chain
/// must not decide without ours. Elsewhere it comes after what the same target has.
///
/// # Errors
/// As of BPF_LINK_CREATE.
pub(super) fn attach(program: BorrowedFd<'_>, target: Target<'_>, hook: Hook) -> io::Result<OwnedFd> {
    let (target, flags) = match target {
        Target::Fd(fd) => (fd.as_raw_fd() as u32, 0),
        Target::Interface(index) => (index, BPF_F_BEFORE),
        Target::None => (0, 0),
    };
    link_create(program, target, hook, flags)
}

/// Attaches a program to a cgroup as early as the kernel can: before the programs of all cgroups below and of its own
/// (Linux 6.15 has the first, 6.17 the second), before those of its own, or after them.
///
/// # Errors
/// As of BPF_LINK_CREATE.
pub(super) fn attach_first(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: Hook,
) -> io::Result<OwnedFd> {
    const BPF_F_PREORDER: u32 = 1 << 6;
    let places = [BPF_F_PREORDER | BPF_F_BEFORE, BPF_F_PREORDER, BPF_F_BEFORE, 0];
    let mut result = Err(io::ErrorKind::InvalidInput.into());
    for flags in places {
        result = link_create(program, cgroup.as_raw_fd() as u32, hook, flags);
        // Flags that a kernel does not know are an invalid argument to it.
        if !matches!(&result, Err(error) if error.raw_os_error() == Some(libc::EINVAL)) {
            break;
        }
    }
    result
}

const BPF_F_BEFORE: u32 = 1 << 3;

fn link_create(program: BorrowedFd<'_>, target: u32, hook: Hook, flags: u32) -> io::Result<OwnedFd> {
    let attr =
        LinkCreate { program: program.as_raw_fd() as u32, target, hook: hook as u32, flags, rest: [0; 4] };
    // SAFETY: no pointers inside.
    unsafe { call(Command::LinkCreate, attr) }.map(owned)
}

/// What of a cgroup's programs is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// Those that are attached to it.
    Attached,
    /// All that run for its processes, also those of other cgroups, in their order.
    Effective,
}

/// Ids of the programs on a target, in the order in which they run; so many of them at most.
///
/// # Errors
/// As of BPF_PROG_QUERY.
pub(super) fn query(target: Target<'_>, hook: Hook, extent: Extent) -> io::Result<Vec<u32>> {
    const MOST: usize = 256;
    let mut ids = [0_u32; MOST];
    let mut attr = QueryAttr {
        target: match target {
            Target::Fd(fd) => fd.as_raw_fd() as u32,
            Target::Interface(index) => index,
            Target::None => 0,
        },
        hook: hook as u32,
        flags: u32::from(extent == Extent::Effective),
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: MOST as u32,
        rest: [0; 9],
    };
    // SAFETY: the ids outlive the call, and their number goes with them.
    match unsafe { call_with(Command::ProgQuery, &mut attr) } {
        Err(error) if error.raw_os_error() != Some(libc::ENOSPC) => return Err(error),
        _ => {}
    }
    Ok(ids.into_iter().take(attr.count as usize).collect())
}

/// Makes a link run another program, at once and without a gap.
///
/// # Errors
/// `ENOLINK` when its target is gone, or as of BPF_LINK_UPDATE.
pub(super) fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attr = [link.as_raw_fd() as u32, program.as_raw_fd() as u32, 0, 0];
    // SAFETY: no pointers inside.
    unsafe { call(Command::LinkUpdate, attr) }.map(|_| ())
}

/// Takes a link's program off its target before this returns. Closing the last descriptor or removing the pin does
/// so too, but some time later.
///
/// # Errors
/// As of BPF_LINK_DETACH.
pub(super) fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers inside.
    unsafe { call(Command::LinkDetach, [link.as_raw_fd() as u32]) }.map(|_| ())
}

/// What a link runs, and where.
///
/// # Errors
/// As of BPF_OBJ_GET_INFO_BY_FD.
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    const CGROUP: u32 = 3; // enum bpf_link_type
    let mut info = RawLinkInfo::default();
    // SAFETY: the structure is plain integers that the kernel fills.
    unsafe { object_info(link, &mut info) }?;
    let target = if info.kind == CGROUP { info.target } else { info.target & u64::from(u32::MAX) };
    Ok(LinkInfo { program: info.program, target })
}

/// Tag of a loaded program.
///
/// # Errors
/// As of BPF_OBJ_GET_INFO_BY_FD.
pub(super) fn tag(program: BorrowedFd<'_>) -> io::Result<Tag> {
    let mut info = RawProgramInfo::default();
    // SAFETY: as above.
    unsafe { object_info(program, &mut info) }?;
    Ok(info.tag)
}

/// Name of a loaded program, which the kernel cuts to 15 bytes; empty where it was given none.
///
/// # Errors
/// As of BPF_OBJ_GET_INFO_BY_FD.
pub(super) fn name(program: BorrowedFd<'_>) -> io::Result<String> {
    let mut info = RawProgramInfo::default();
    // SAFETY: as above.
    unsafe { object_info(program, &mut info) }?;
    let name = info.name.iter().take_while(|byte| **byte != 0).copied().collect::<Vec<_>>();
    Ok(String::from_utf8_lossy(&name).into_owned())
}

/// Id of a loaded program.
///
/// # Errors
/// As of BPF_OBJ_GET_INFO_BY_FD.
pub(super) fn id(program: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = RawProgramInfo::default();
    // SAFETY: as above.
    unsafe { object_info(program, &mut info) }?;
    Ok(info.id)
}

/// Opens a program by its id.
///
/// # Errors
/// As of BPF_PROG_GET_FD_BY_ID.
pub(super) fn program(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers inside.
    unsafe { call(Command::ProgGetFdById, [id, 0, 0]) }.map(owned)
}

/// Runs an iterator program over the sockets of the calling thread's network namespace; reading drives it.
///
/// # Errors
/// As of BPF_LINK_CREATE and BPF_ITER_CREATE.
pub(super) fn iterate(program: BorrowedFd<'_>) -> io::Result<File> {
    let link = attach(program, Target::None, Hook::Iterator)?;
    // SAFETY: no pointers inside.
    let fd = unsafe { call(Command::IterCreate, [link.as_fd().as_raw_fd() as u32, 0]) }?;
    Ok(File::from(owned(fd)))
}

/// Whether the kernel has tcx (6.6): it then looks for the interface before anything else.
///
/// # Errors
/// `Unsupported` when it has not.
pub(super) fn probe_tcx(program: BorrowedFd<'_>) -> io::Result<()> {
    const NO_INTERFACE: u32 = i32::MAX as u32;
    match attach(program, Target::Interface(NO_INTERFACE), Hook::TcxEgress) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) => Err(io::Error::new(io::ErrorKind::Unsupported, error)),
        Ok(_) => Ok(()),
    }
}

/// `enum bpf_cmd`.
#[repr(i32)]
enum Command {
    ObjPin = 6,
    ObjGet = 7,
    ProgGetFdById = 13,
    ObjGetInfoByFd = 15,
    ProgQuery = 16,
    LinkCreate = 28,
    LinkUpdate = 29,
    IterCreate = 33,
    LinkDetach = 34,
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    hook: u32,
    flags: u32,
    rest: [u64; 4],
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

/// The beginning of `struct bpf_link_info`; cgroup links have an id of 8 bytes, the others a first word.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    target: u64,
    rest: [u64; 6],
}

/// The beginning of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct RawProgramInfo {
    kind: u32,
    id: u32,
    tag: Tag,
    /// Lengths, places and times of the code, and of its maps: nothing is asked for.
    code: [u64; 6],
    name: [u8; 16],
}

#[repr(C)]
struct QueryAttr {
    target: u32,
    hook: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    rest: [u32; 9],
}

/// # Safety
/// `T` is plain integers.
unsafe fn object_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let attr = InfoAttr {
        fd: object.as_raw_fd() as u32,
        length: size_of::<T>() as u32,
        info: std::ptr::from_mut(info) as u64,
    };
    // SAFETY: the pointer and its length are those of `info`.
    unsafe { call(Command::ObjGetInfoByFd, attr) }.map(|_| ())
}

/// # Safety
/// `T` is the beginning of `union bpf_attr` for the command, and pointers inside are valid for the call.
unsafe fn call<T>(command: Command, mut attr: T) -> io::Result<RawFd> {
    // SAFETY: the caller's promise.
    unsafe { call_with(command, &mut attr) }
}

/// The same for a command that answers in its attributes.
///
/// # Safety
/// As there.
unsafe fn call_with<T>(command: Command, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: the attributes are borrowed for the call, their size goes with them.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command as i32, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
