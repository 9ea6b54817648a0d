//! Links: each is made once, pinned, and later found by its pin and moved to a newer program.
//!
//! Where the kernel has no tcx the programs on interfaces are filters instead (`clsact`), and what is pinned is a program:
//! it says that there may be a filter.
//! **Invariant:** the pins are the attach state; what is held open beside them (`held`) is pinned, so nothing is detached
//! when the agent ends.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fs, io};

use super::bpf::{self, Extent, Hook, Target};
use super::clsact::{self, Side};
use super::guards;
use super::hook::Chosen;
use super::load::Programs;
use super::pins::{Pins, remove, replace};
use super::rules::{self, Interface};

/// Makes sure that a link on `target` is pinned at `path` and runs `program`. Returns whether it had to be made: a
/// link that is there is updated in place, one whose target is gone or another is replaced.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn ensure(
    path: &Path,
    program: BorrowedFd<'_>,
    target: Target<'_>,
    hook: Hook,
) -> io::Result<bool> {
    match bpf::open(path) {
        Ok(link) if bpf::link_info(link.as_fd())?.target == identity(target)? => {
            refresh(link.as_fd(), program)?;
            return Ok(false);
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let link = bpf::attach(program, target, hook)?;
    replace(link.as_fd(), path)?;
    Ok(true)
}

/// Makes sure that the connect hooks are on the cgroup. Whether one had to be made.
///
/// # Errors
/// When it is not there, or the kernel refuses.
pub(super) fn connect(pins: &Pins, programs: &Programs, root: &Path) -> io::Result<bool> {
    let root = fs::File::open(root)?;
    let target = Target::Fd(root.as_fd());
    let mut made = false;
    for (name, program, hook) in [
        (mesh_ebpf_abi::program::CONNECT4, &programs.connect4, Hook::Connect4),
        (mesh_ebpf_abi::program::CONNECT6, &programs.connect6, Hook::Connect6),
    ] {
        made |= ensure(&pins.link(name), program.as_fd(), target, hook)?;
    }
    Ok(made)
}

/// Attaches the guard, and what refuses, to each of these interfaces of the calling thread's network namespace that has
/// none; pins are in `directory`. One that has gone meanwhile needs none.
///
/// # Errors
/// When the kernel refuses: the first one, with what it was about. The others are attached.
pub(super) fn guard(
    directory: &Path,
    programs: &Programs,
    hook: Chosen,
    interfaces: &[Interface],
) -> io::Result<()> {
    let mut result = Ok(());
    for interface in interfaces.iter().copied() {
        let sides = [(refuse_program(interface), Side::Ingress), (guard_program(interface), Side::Egress)];
        for (name, side) in sides {
            let program = programs.on_interface(name).ok_or(io::ErrorKind::NotFound)?;
            let attached = on_interface(directory, program.as_fd(), name, interface, side, hook);
            let attached = rules::unless(attached, libc::ENODEV);
            let attached = attached.map_err(|error| {
                io::Error::new(error.kind(), format!("{name} on interface {}: {error}", interface.index))
            });
            result = result.and(attached);
        }
    }
    result
}

/// One program on one interface. What the other hook has of it, from an agent that could not or would not use this one,
/// is taken off afterwards.
fn on_interface(
    directory: &Path,
    program: BorrowedFd<'_>,
    name: &str,
    interface: Interface,
    side: Side,
    hook: Chosen,
) -> io::Result<()> {
    let (link, filter) = (interface_pin(name, interface.index), filter_pin(name, interface.index));
    let (link, filter) = (directory.join(link), directory.join(filter));
    match hook {
        Chosen::Tcx => {
            let tcx = if side == Side::Ingress { Hook::TcxIngress } else { Hook::TcxEgress };
            ensure(&link, program, Target::Interface(interface.index), tcx)?;
            if filter.exists() {
                clsact::detach(interface.index, side)?;
                remove(&filter)?;
            }
            Ok(())
        }
        Chosen::Clsact => {
            // First: a filter that no pin tells of would not be looked for.
            if !bpf::open(&filter).is_ok_and(|pinned| same_program(pinned.as_fd(), program).unwrap_or(false))
            {
                replace(program, &filter)?;
            }
            clsact::attach(interface.index, side, program, name)?;
            detach(&link)
        }
    }
}

/// Puts the programs on every interface of the calling thread's network namespace before all others that came since. Filters
/// have their place already, see [`clsact`]. The kernel has a program on an interface only once: it is off for a moment,
/// in which those before it go on to decide.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn first(directory: &Path, programs: &Programs) -> io::Result<()> {
    rules::interfaces()?.seen.into_iter().try_for_each(|interface| {
        let sides =
            [(refuse_program(interface), Hook::TcxIngress), (guard_program(interface), Hook::TcxEgress)];
        sides.into_iter().try_for_each(|(name, hook)| {
            let program = programs.on_interface(name).ok_or(io::ErrorKind::NotFound)?;
            make_first(&directory.join(interface_pin(name, interface.index)), program, interface.index, hook)
        })
    })
}

/// The same of one program that is pinned.
///
/// # Errors
/// As there.
pub(super) fn make_first(pin: &Path, program: &OwnedFd, interface: u32, hook: Hook) -> io::Result<()> {
    let target = Target::Interface(interface);
    let runs = bpf::link_info(bpf::open(pin)?.as_fd())?.program;
    if bpf::query(target, hook, Extent::Attached)?.first() == Some(&runs) {
        return Ok(());
    }
    detach(pin)?;
    ensure(pin, program.as_fd(), target, hook).map(drop)
}

/// Moves a link to `program` if it runs other instructions.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn refresh(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let running = bpf::program(bpf::link_info(link)?.program)?;
    if same_program(running.as_fd(), program)? { Ok(()) } else { bpf::update(link, program) }
}

/// Whether two programs have the same instructions.
///
/// # Errors
/// When the kernel cannot say.
pub(super) fn same_program(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(bpf::tag(one)? == bpf::tag(other)?)
}

/// Whether the link pinned at `path` still has its target.
///
/// # Errors
/// When it cannot be opened.
pub(super) fn alive(path: &Path) -> io::Result<bool> {
    let link = bpf::open(path)?;
    Ok(bpf::link_info(link.as_fd())?.target != 0)
}

/// Removes the pins of interfaces that are gone; for those of filters in the calling thread's network namespace.
///
/// # Errors
/// When bpffs refuses, or netlink fails.
pub(super) fn prune(directory: &Path, links: &[String]) -> io::Result<()> {
    let filtered = filtered(links);
    let there = if filtered.is_empty() { BTreeMap::new() } else { guards::links(filtered)? };
    for name in links {
        let Some(index) = index(name) else { continue };
        let gone = if is_filter(name) {
            !there.contains_key(&index)
        } else {
            matches!(alive(&directory.join(name)), Ok(false))
        };
        if gone {
            remove(&directory.join(name))?;
        }
    }
    Ok(())
}

/// The interface that a pin is of.
pub(super) fn index(name: &str) -> Option<u32> {
    name.strip_suffix(FILTER).unwrap_or(name).split_once('-')?.1.parse().ok()
}

/// Detaches a pod's links and removes their pins.
///
/// # Errors
/// The first one; the others are removed.
pub(super) fn remove_all(directory: &Path, links: &[String]) -> io::Result<()> {
    let mut result = Ok(());
    for name in links {
        result = result.and(detach(&directory.join(name)));
    }
    result
}

/// Detaches a link and removes its pin. What is at `path` may be gone, or be no link: then it is only removed.
///
/// # Errors
/// When bpffs refuses.
pub(super) fn detach(path: &Path) -> io::Result<()> {
    if let Ok(link) = bpf::open(path) {
        // A link whose target is gone is detached already.
        let _ = bpf::detach(link.as_fd());
    }
    remove(path)
}

/// Name of a program's pin on an interface.
pub(super) fn interface_pin(program: &str, interface: u32) -> String {
    format!("{program}-{interface}")
}

/// The same where it is a filter.
fn filter_pin(program: &str, interface: u32) -> String {
    interface_pin(program, interface) + FILTER
}

/// End of the names of pins that stand for filters.
const FILTER: &str = "-clsact";

/// Whether the name is that of a pin that stands for a filter.
pub(super) fn is_filter(name: &str) -> bool {
    name.ends_with(FILTER)
}

/// The interfaces that have filters, as their pins among these tell.
pub(super) fn filtered(links: &[String]) -> BTreeSet<u32> {
    links.iter().filter(|name| is_filter(name)).filter_map(|name| index(name)).collect()
}

/// Which guard fits an interface.
pub(super) fn guard_program(interface: Interface) -> &'static str {
    if interface.ethernet { mesh_ebpf_abi::program::GUARD } else { mesh_ebpf_abi::program::GUARD_L3 }
}

/// Which of the programs that refuse fits an interface.
pub(super) fn refuse_program(interface: Interface) -> &'static str {
    if interface.ethernet { mesh_ebpf_abi::program::REFUSE } else { mesh_ebpf_abi::program::REFUSE_L3 }
}

/// Whether the name is that of a guard's link.
pub(super) fn is_guard(name: &str) -> bool {
    name.starts_with(mesh_ebpf_abi::program::GUARD) && !is_filter(name)
}

/// As the kernel names the target in the link's info: a namespace's inode, a cgroup's id (which is its directory's
/// inode on 64-bit machines), an interface's index.
fn identity(target: Target<'_>) -> io::Result<u64> {
    match target {
        Target::Fd(fd) => Ok(fs::File::from(fd.try_clone_to_owned()?).metadata()?.ino()),
        Target::Interface(index) => Ok(u64::from(index)),
        Target::None => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_by_device() {
        let ethernet = Interface { index: 2, ethernet: true, peer: None };
        let bare = Interface { index: 7, ethernet: false, peer: None };
        assert_eq!((guard_program(ethernet), refuse_program(ethernet)), ("guard", "refuse"));
        assert_eq!((guard_program(bare), refuse_program(bare)), ("guard_l3", "refuse_l3"));
        assert_eq!(interface_pin("guard_l3", bare.index), "guard_l3-7");
        assert_eq!(filter_pin("guard_l3", bare.index), "guard_l3-7-clsact");
        assert!(is_filter("guard_l3-7-clsact") && is_filter("refuse-2-clsact") && !is_filter("guard-2"));
        assert!(!is_guard("guard-2-clsact"));
        assert_eq!(
            ["guard-2-clsact", "guard_l3-7", "steer", "guard_node-x"].map(index),
            [Some(2), Some(7), None, None]
        );
        let pins = ["guard-2-clsact", "refuse-2-clsact", "guard-3", "guard-40-clsact", "steer"];
        assert_eq!(filtered(&pins.map(str::to_owned)), [2, 40].into());
        assert!(
            is_guard("guard_node-12")
                && is_guard("guard-2")
                && is_guard("guard_l3-7")
                && !is_guard("steer")
                && !is_guard("refuse-2")
        );
    }
}
