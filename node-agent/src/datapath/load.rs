//! From the embedded object to programs in the kernel, over maps that are pinned.
//!
//! Maps are opened from their pins where they have been, so a new agent's programs work on the old agent's state.
//! **Invariant:** loading attaches nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::{io, thread};

use aya::programs::{Program, ProgramError};
use aya::{Btf, Ebpf, EbpfLoader};
use mesh_ebpf_abi::{MAX_PODS, constant, map, program};

use super::DatapathError;
use super::maps::Maps;
use super::pins::{Pins, replace};
use super::{attach, bpf, logs, netns};

/// What `cargo xtask ebpf` built; empty when it had not been run.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf"));

/// Maps that are kept in bpffs.
const PINNED: [&str; 12] = [
    map::NSCFG,
    map::PODIP,
    map::LISTEN,
    map::SKPROXY,
    map::PROBE,
    map::PROBEPORT,
    map::ASKED,
    map::PODS,
    map::HANDSHAKES,
    map::DIALLED,
    map::COUNTS,
    map::DROPS,
];

/// The programs that all pods share.
#[derive(Debug)]
pub(super) struct Programs {
    /// cgroup/connect4.
    pub connect4: OwnedFd,
    /// cgroup/connect6.
    pub connect6: OwnedFd,
    /// cgroup/connect4, after others' programs.
    pub restore4: OwnedFd,
    /// cgroup/connect6, after others' programs.
    pub restore6: OwnedFd,
    /// Egress of Ethernet devices.
    pub guard: OwnedFd,
    /// Egress of other devices.
    pub guard_l3: OwnedFd,
    /// Ingress of the other ends of pods' links, on the node.
    pub guard_node: OwnedFd,
    /// Ingress of Ethernet devices.
    pub refuse: OwnedFd,
    /// Ingress of other devices.
    pub refuse_l3: OwnedFd,
    /// TCP socket iterator, the first look.
    pub older: OwnedFd,
    /// TCP socket iterator, the first look at a pod of another version.
    pub inherit: OwnedFd,
    /// TCP socket iterator, later looks.
    pub grown: OwnedFd,
    /// sockops, the kubelet's cgroup.
    pub probes: OwnedFd,
    /// sockops, the pods' cgroup.
    pub bystanders: OwnedFd,
}

/// Loads the programs and opens or makes the maps.
///
/// # Errors
/// When there is no object, or the kernel refuses something in it.
pub(super) fn load(pins: &Pins) -> Result<(Programs, Maps), DatapathError> {
    let mut object = open(pins)?;
    let programs = Programs {
        connect4: shared(&mut object, pins, program::CONNECT4)?,
        connect6: shared(&mut object, pins, program::CONNECT6)?,
        restore4: shared(&mut object, pins, program::RESTORE4)?,
        restore6: shared(&mut object, pins, program::RESTORE6)?,
        guard: shared(&mut object, pins, program::GUARD)?,
        guard_l3: shared(&mut object, pins, program::GUARD_L3)?,
        guard_node: shared(&mut object, pins, program::GUARD_NODE)?,
        refuse: shared(&mut object, pins, program::REFUSE)?,
        refuse_l3: shared(&mut object, pins, program::REFUSE_L3)?,
        older: shared(&mut object, pins, program::OLDER)?,
        inherit: shared(&mut object, pins, program::INHERIT)?,
        grown: shared(&mut object, pins, program::GROWN)?,
        probes: shared(&mut object, pins, program::PROBES)?,
        bystanders: shared(&mut object, pins, program::BYSTANDERS)?,
    };
    logs::forward(&mut object).map_err(DatapathError::Log)?;
    Ok((programs, Maps::take(&mut object, pins)?))
}

/// The sk_lookup programs, each of which has its pod's slot as a constant. They are loaded by a thread of their own, ahead
/// of a pod's capture: that takes as long as much of what is done for a pod, and the thread that does it for one pod after
/// the other mostly waits for the kernel.
#[derive(Debug)]
pub(super) struct Steers {
    /// Slots, to the thread, which ends with this.
    wanted: Sender<u32>,
    /// Never locked: a receiver by itself may not be seen by two threads.
    loaded: Mutex<Loaded>,
    /// By slot; none of what was asked for.
    known: HashMap<u32, Option<OwnedFd>>,
}

/// The constants live as long as the loader.
static SLOTS: [u32; MAX_PODS as usize] = {
    let mut slots = [0; MAX_PODS as usize];
    let mut slot = 0;
    while slot < slots.len() {
        slots[slot] = slot as u32;
        slot += 1;
    }
    slots
};

impl Steers {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the process can have no more threads.
    pub(super) fn start(pins: &Pins) -> io::Result<Self> {
        let (wanted, slots) = mpsc::channel();
        let (programs, loaded) = mpsc::channel();
        let mut loader = EbpfLoader::new();
        PINNED.iter().for_each(|name| {
            loader.map_pin_path(name, pins.map(name));
        });
        thread::Builder::new().name("steers".to_owned()).spawn(move || {
            while let Ok(slot) = slots.recv()
                && programs.send((slot, steer(&mut loader, slot))).is_ok()
            {}
        })?;
        Ok(Self { wanted, loaded: Mutex::new(loaded), known: HashMap::new() })
    }

    /// Has the program of the pod in `slot` loaded, unless it is.
    pub(super) fn begin(&mut self, slot: u32) {
        if let Entry::Vacant(entry) = self.known.entry(slot) {
            entry.insert(None);
            // A thread that has died is told of by `load`.
            let _ = self.wanted.send(slot);
        }
    }

    /// The program of the pod in `slot`, until `forget`; of none where there is no such slot.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub(super) fn load(&mut self, slot: u32) -> io::Result<OwnedFd> {
        self.begin(slot);
        loop {
            if let Some(program) = self.known.get(&slot).and_then(Option::as_ref) {
                return program.try_clone();
            }
            let (of, program) = self.loaded().recv().map_err(|_| io::Error::other("its thread has died"))?;
            if let Err(error) = self.take(of, program)
                && of == slot
            {
                return Err(io::Error::other(error));
            }
        }
    }

    /// Drops the program of a slot that is nobody's any more.
    pub(super) fn forget(&mut self, slot: u32) {
        self.known.remove(&slot);
        while let Ok((of, program)) = self.loaded().try_recv() {
            // Who wants it tries again.
            let _ = self.take(of, program);
        }
    }

    fn loaded(&mut self) -> &mut Loaded {
        self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of a slot that was forgotten meanwhile nothing is kept.
    fn take(&mut self, slot: u32, program: Result<OwnedFd, DatapathError>) -> Result<(), DatapathError> {
        match program {
            Ok(program) => {
                self.known.entry(slot).and_modify(|known| *known = Some(program));
                Ok(())
            }
            Err(error) => {
                self.known.remove(&slot);
                Err(error)
            }
        }
    }
}

type Loaded = Receiver<(u32, Result<OwnedFd, DatapathError>)>;

fn steer(loader: &mut EbpfLoader<'static>, slot: u32) -> Result<OwnedFd, DatapathError> {
    let slot = SLOTS.get(slot as usize).unwrap_or(&u32::MAX);
    let object = loader.override_global(constant::SLOT, slot, true).load(OBJECT);
    program_fd(&mut object.map_err(|error| DatapathError::Object(Box::new(error)))?, program::STEER)
}

fn open(pins: &Pins) -> Result<Ebpf, DatapathError> {
    if OBJECT.is_empty() {
        return Err(DatapathError::NoObject);
    }
    let node_netns = netns::cookie().map_err(DatapathError::Cookie)?;
    let mut loader = EbpfLoader::new();
    loader.override_global(constant::NODE_NETNS, &node_netns, true);
    PINNED.iter().for_each(|name| {
        loader.map_pin_path(name, pins.map(name));
    });
    loader.load(OBJECT).map_err(|error| DatapathError::Object(Box::new(error)))
}

/// Loads a program that all pods share. A pinned one with the same instructions is taken over; else the new one
/// takes its place, and the links are moved to it when they are next looked at.
fn shared(object: &mut Ebpf, pins: &Pins, name: &'static str) -> Result<OwnedFd, DatapathError> {
    let new = program_fd(object, name)?;
    take_over(new.as_fd(), pins, name).map_err(|source| DatapathError::Pin { name, source })
}

fn take_over(new: BorrowedFd<'_>, pins: &Pins, name: &str) -> io::Result<OwnedFd> {
    let path = pins.program(name);
    match bpf::open(&path) {
        Ok(old) if attach::same_program(old.as_fd(), new)? => return Ok(old),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    replace(new, &path)?;
    new.try_clone_to_owned()
}

fn program_fd(object: &mut Ebpf, name: &'static str) -> Result<OwnedFd, DatapathError> {
    let program = object.program_mut(name).ok_or(DatapathError::NoProgram { name })?;
    load_program(program)
        .and_then(|()| program.fd()?.as_fd().try_clone_to_owned().map_err(ProgramError::IOError))
        .map_err(|source| DatapathError::Program { name, source: Box::new(source) })
}

fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::Iter(program) => program.load("tcp", &Btf::from_sys_fs()?),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}
