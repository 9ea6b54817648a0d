//! eBPF programs of others on the hooks that capture uses: found, named, and kept from having the last word.
//!
//! On connect() ours run first and note where a call wants to go, and two more run last and put it back: a replacement of
//! kube-proxy would else hide the service from the proxy. In sk_lookup the last program that chooses a socket has its way,
//! so ours goes behind the others'. Where the kernel does not give that order, it is told.
//! **Invariant:** others' programs are not touched, and ours are never missing while they change places. Nobody is fought
//! over a place: what comes behind ours a second time stays there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use mesh_ebpf_abi::program;
use tracing::warn;

use super::bpf::{self, Extent, Hook, Target};
use super::load::Programs;
use super::pins::{Pins, replace};
use super::pod::{Pod, STEER};
use super::{Datapath, attach, cgroup};

/// A program of somebody else.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Foreign {
    /// Where it is: `connect4`, `connect6` or `sk_lookup`.
    pub hook: &'static str,
    /// The kernel's number of it, as `bpftool prog show id` takes it.
    pub id: u32,
    /// Its name, which the kernel cuts to 15 bytes.
    pub name: String,
    /// Whether ours have the last word all the same.
    pub harmless: bool,
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hook, id, name, harmless } = self;
        let name = if name.is_empty() { "without a name" } else { name };
        write!(f, "{hook} program {name} (id {id})")?;
        f.write_str(match (*hook == SK_LOOKUP, *harmless) {
            (true, true) => ", which Ambit's overrules",
            (true, false) => ", which may give the pod's connections to another socket than the proxy's",
            (false, true) => ", whose changes of a destination are undone",
            (false, false) => ", which may hide from the proxy which service is meant",
        })
    }
}

const SK_LOOKUP: &str = "sk_lookup";

/// What is known of others' programs.
#[derive(Debug)]
pub(super) struct Others {
    /// Those that were seen at the last look, by the hook of all pods or the pod's UID.
    seen: BTreeMap<String, BTreeSet<u32>>,
    /// Destinations are noted, and put back.
    pub(super) keeps_destinations: bool,
}

impl Others {
    /// As an earlier agent left it.
    pub(super) fn of(pins: &Pins) -> Self {
        let last = [program::RESTORE4, program::RESTORE6];
        let keeps_destinations = last.iter().any(|name| pins.link(name).exists());
        Self { seen: BTreeMap::new(), keeps_destinations }
    }

    /// Whether there is one that was not there at the last look.
    fn news(&mut self, place: &str, foreign: &[(u32, String)], keep: Keep) -> bool {
        let now: BTreeSet<u32> = foreign.iter().map(|(id, _)| *id).collect();
        let seen = self.seen.entry(place.to_owned()).or_default();
        let news = !now.is_subset(seen);
        match keep {
            Keep::AsNeeded => *seen = now,
            Keep::AtLeast => seen.extend(now),
        }
        news
    }
}

/// What follows where no program of others is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    /// There is none.
    AsNeeded,
    /// Nothing: not all was looked at.
    AtLeast,
}

/// The programs of one family on connect().
struct Connect<'a> {
    hook: Hook,
    name: &'static str,
    first: (&'static str, BorrowedFd<'a>),
    last: (&'static str, BorrowedFd<'a>),
}

impl Programs {
    fn on_connect(&self) -> [Connect<'_>; 2] {
        [
            Connect {
                hook: Hook::Connect4,
                name: "connect4",
                first: (program::CONNECT4, self.connect4.as_fd()),
                last: (program::RESTORE4, self.restore4.as_fd()),
            },
            Connect {
                hook: Hook::Connect6,
                name: "connect6",
                first: (program::CONNECT6, self.connect6.as_fd()),
                last: (program::RESTORE6, self.restore6.as_fd()),
            },
        ]
    }
}

impl Datapath {
    /// Programs of others that captured pods meet, by UID, after what can be done about their order was done.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn foreign(&mut self) -> io::Result<BTreeMap<String, Vec<Foreign>>> {
        let hooks = self.programs.on_connect().map(|connect| connect.name);
        self.others.seen.retain(|place, _| hooks.contains(&place.as_str()) || self.pods.contains_key(place));
        let captured = |uid: &str| self.pods.get(uid).is_some_and(Pod::captured);
        let cgroups = cgroup::of_pods(&self.root, captured);
        self.surround(&cgroups, Keep::AsNeeded)?;
        let ours = ours(&self.pins);
        let everywhere = self.on_connect(&self.root, &ours)?;
        let mut found = BTreeMap::new();
        let captured = self.pods.iter().filter(|(_, pod)| pod.captured());
        let captured: Vec<_> =
            captured.filter_map(|(uid, pod)| Some((uid.clone(), pod.netns().ok()?))).collect();
        for (uid, netns) in captured {
            let mut all = everywhere.clone();
            for (_, cgroup) in cgroups.iter().filter(|(of, _)| *of == uid) {
                // One that ends meanwhile has no processes left.
                all.extend(self.on_connect(cgroup, &ours).unwrap_or_default());
            }
            match self.overrule(&uid, netns.as_fd()) {
                Ok(foreign) => all.extend(foreign),
                Err(error) => warn!(pod = uid, %error, "cannot look for sk_lookup programs of others"),
            }
            if !all.is_empty() {
                found.insert(uid, all.into_iter().collect());
            }
        }
        Ok(found)
    }

    /// The same for connect() of one pod before its first connection.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn look_around(&mut self, uid: &str) -> io::Result<()> {
        let cgroups = cgroup::of_pods(&self.root, |one| one == uid);
        self.surround(&cgroups, Keep::AtLeast)
    }

    /// Puts our connect programs around those that others have for all pods, or for the pods of these cgroups.
    fn surround(&mut self, cgroups: &[(String, PathBuf)], keep: Keep) -> io::Result<()> {
        let (mut changed, mut alone) = (false, true);
        let ours = ours(&self.pins);
        for connect in self.programs.on_connect() {
            let orders = Orders { hook: connect.hook, root: &self.root, cgroups };
            let foreign = foreign(&orders.read()?.concat(), &ours);
            let news = self.others.news(connect.name, &foreign, keep);
            if !foreign.is_empty() {
                alone = false;
                changed |= surround(&self.pins, &connect, &orders, &foreign, news)?;
            }
        }
        match keep {
            Keep::AtLeast if alone => Ok(()),
            _ => self.keep_destinations(!alone, changed),
        }
    }

    /// Programs on connect() for the processes of a cgroup.
    fn on_connect(&self, cgroup: &Path, ours: &BTreeSet<u32>) -> io::Result<BTreeSet<Foreign>> {
        let mut all = BTreeSet::new();
        for connect in self.programs.on_connect() {
            let order = effective(cgroup, connect.hook)?;
            for (id, name) in foreign(&order, ours) {
                all.insert(connect.tell(&self.pins, &order, id, name)?);
            }
        }
        Ok(all)
    }

    /// Has destinations noted once there is what puts them back, and the other way round.
    fn keep_destinations(&mut self, keep: bool, changed: bool) -> io::Result<()> {
        let switched = std::mem::replace(&mut self.others.keeps_destinations, keep) != keep;
        if switched {
            for pod in self.pods.values_mut().filter(|pod| pod.captured() && !pod.sources.is_empty()) {
                pod.keeps_destinations = keep;
                self.maps.capture(pod.record.netns_cookie, pod.slot, pod.families())?;
            }
        }
        if !keep && switched {
            for connect in self.programs.on_connect() {
                let pin = self.pins.link(connect.last.0);
                attach::detach(&pin)?;
                // One whose pin is gone.
                self.held.detach(&pin);
            }
        }
        if changed || switched {
            let pins =
                |connect: Connect<'_>| [connect.first.0, connect.last.0].map(|name| self.pins.link(name));
            self.programs.on_connect().map(pins).iter().flatten().try_for_each(|pin| self.held.hold(pin))?;
        }
        Ok(())
    }

    /// Puts our sk_lookup behind others' in a pod, and says which these are.
    fn overrule(&mut self, uid: &str, netns: BorrowedFd<'_>) -> io::Result<Vec<Foreign>> {
        let path = self.pins.pod(uid).join(STEER);
        let mut order = bpf::query(netns, Hook::SkLookup, Extent::Attached)?;
        let ours = runs(&path)?;
        let foreign = foreign(&order, &[ours].into());
        let news = self.others.news(uid, &foreign, Keep::AsNeeded);
        if news && order.last() != Some(&ours) {
            let link = bpf::attach(bpf::program(ours)?.as_fd(), Target::Fd(netns), Hook::SkLookup)?;
            replace(link.as_fd(), &path)?;
            self.held.refresh(&self.pins.pod(uid))?;
            order = bpf::query(netns, Hook::SkLookup, Extent::Attached)?;
        }
        let place = |id| order.iter().rposition(|one| *one == id);
        let tell = |(id, name)| Foreign { hook: SK_LOOKUP, id, name, harmless: place(id) < place(ours) };
        Ok(foreign.into_iter().map(tell).collect())
    }
}

impl Connect<'_> {
    /// What there is to say of a program that runs in this order.
    fn tell(&self, pins: &Pins, order: &[u32], id: u32, name: String) -> io::Result<Foreign> {
        let place = |id| order.iter().position(|one| *one == id);
        let (first, last) = (runs(&pins.link(self.first.0))?, runs(&pins.link(self.last.0)));
        // Where nothing puts destinations back, nothing is undone.
        let undone = last.is_ok_and(|last| place(last) > place(id));
        Ok(Foreign { hook: self.name, id, name, harmless: place(first) < place(id) && undone })
    }
}

/// The cgroup of all pods, and cgroups of some of them.
struct Orders<'a> {
    hook: Hook,
    root: &'a Path,
    cgroups: &'a [(String, PathBuf)],
}

impl Orders<'_> {
    /// Which programs run, in each of them.
    fn read(&self) -> io::Result<Vec<Vec<u32>>> {
        let mut orders = vec![effective(self.root, self.hook)?];
        // One that ends meanwhile has no processes left.
        orders.extend(self.cgroups.iter().filter_map(|(_, cgroup)| effective(cgroup, self.hook).ok()));
        Ok(orders)
    }
}

fn effective(cgroup: &Path, hook: Hook) -> io::Result<Vec<u32>> {
    bpf::query(File::open(cgroup)?.as_fd(), hook, Extent::Effective)
}

/// Puts ours around these of one family; whether something changed. Places that ours have are changed for `news` only.
fn surround(
    pins: &Pins,
    connect: &Connect<'_>,
    orders: &Orders<'_>,
    foreign: &[(u32, String)],
    news: bool,
) -> io::Result<bool> {
    let is_foreign = |id: &u32| foreign.iter().any(|(one, _)| one == id);
    let mut changed = false;
    if news && orders.read()?.iter().any(|order| order.first().is_some_and(is_foreign)) {
        let root = File::open(orders.root)?;
        let link = bpf::attach_first(connect.first.1, root.as_fd(), connect.hook)?;
        replace(link.as_fd(), &pins.link(connect.first.0))?;
        changed = true;
    }
    let outermost = File::open(outermost(orders.root, connect.hook, is_foreign))?;
    let (pin, target) = (pins.link(connect.last.0), Target::Fd(outermost.as_fd()));
    changed |= attach::ensure(&pin, connect.last.1, target, connect.hook)?;
    if news && orders.read()?.iter().any(|order| order.last().is_some_and(is_foreign)) {
        replace(bpf::attach(connect.last.1, target, connect.hook)?.as_fd(), &pin)?;
        changed = true;
    }
    Ok(changed)
}

/// The cgroup that has such a program and none such above it that can be seen; `root` where none has.
fn outermost(root: &Path, hook: Hook, such: impl Fn(&u32) -> bool) -> PathBuf {
    let attached = |path: &Path| bpf::query(File::open(path)?.as_fd(), hook, Extent::Attached);
    let visible = root.ancestors().map_while(|path| Some((path, attached(path).ok()?)));
    let with = visible.filter(|(_, programs)| programs.iter().any(&such));
    with.last().map_or(root, |(path, _)| path).to_owned()
}

/// The program that a pinned link runs.
fn runs(link: &Path) -> io::Result<u32> {
    Ok(bpf::link_info(bpf::open(link)?.as_fd())?.program)
}

/// Ids of ours, as pinned, so that only others' names are asked for.
fn ours(pins: &Pins) -> BTreeSet<u32> {
    let names = [program::CONNECT4, program::CONNECT6, program::RESTORE4, program::RESTORE6];
    names.iter().filter_map(|name| runs(&pins.link(name)).ok()).collect()
}

/// Those that are not ours, with their names; ours of another version are named like ours. One that goes meanwhile is
/// none.
fn foreign(order: &[u32], ours: &BTreeSet<u32>) -> Vec<(u32, String)> {
    const OURS: [&str; 5] =
        [program::CONNECT4, program::CONNECT6, program::RESTORE4, program::RESTORE6, program::STEER];
    let name = |id: &u32| Some((*id, bpf::name(bpf::program(*id).ok()?.as_fd()).ok()?));
    let others: BTreeSet<&u32> = order.iter().filter(|id| !ours.contains(id)).collect();
    others.into_iter().filter_map(name).filter(|(_, name)| !OURS.contains(&name.as_str())).collect()
}

/// What looking for others' programs came to, where nobody waits for it.
pub(super) fn told(result: io::Result<()>) {
    if let Err(error) = result {
        warn!(%error, "cannot look for eBPF programs of others on connect()");
    }
}
