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
use super::held::Held;
use super::load::Programs;
use super::pins::{Pins, replace};
use super::pod::{Pod, STEER};
use super::{Datapath, attach, cgroup};

/// A program of somebody else.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Foreign {
    /// Where it is: `connect4`, `connect6`, `sk_lookup`, or `xdp` at the node's end of the pod's link.
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
        f.write_str(match (*hook, *harmless) {
            (XDP, _) => {
                " at the node's end of the pod's link, which leaves no guard there: who has CAP_NET_RAW in the pod can \
                 send past the proxy"
            }
            (SK_LOOKUP, true) => ", which Ambit's overrules while a proxy listens",
            (SK_LOOKUP, false) => ", which may give the pod's connections to another socket than the proxy's",
            (_, true) => ", whose changes of a destination are undone",
            (_, false) => ", which may hide from the proxy which service is meant",
        })
    }
}

const SK_LOOKUP: &str = "sk_lookup";
const XDP: &str = "xdp";

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

    /// Whether there is one that was not there at the last look that came to its end.
    fn news(&self, place: &str, foreign: &BTreeMap<u32, String>) -> bool {
        let seen = self.seen.get(place);
        foreign.keys().any(|id| !seen.is_some_and(|seen| seen.contains(id)))
    }

    /// What there is to do about these is done.
    fn saw(&mut self, place: &str, foreign: &BTreeMap<u32, String>, keep: Keep) {
        let seen = self.seen.entry(place.to_owned()).or_default();
        if keep == Keep::AsNeeded {
            seen.clear();
        }
        seen.extend(foreign.keys());
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
        let mut names = Names::default();
        let orders = self.surround(&cgroups, Keep::AsNeeded, &mut names)?;
        let (mut everywhere, mut own) = (BTreeSet::new(), BTreeMap::<_, BTreeSet<_>>::new());
        for (connect, orders) in self.programs.on_connect().iter().zip(&orders) {
            let ends = connect.ends(&self.pins);
            everywhere.extend(connect.tell(&orders.everywhere, ends, &mut names));
            for (uid, order) in &orders.own {
                own.entry(uid.clone()).or_default().extend(connect.tell(order, ends, &mut names));
            }
        }
        let mut found = BTreeMap::new();
        let captured = self.pods.iter().filter(|(_, pod)| pod.captured());
        let captured: Vec<_> = captured
            .filter_map(|(uid, pod)| Some((uid.clone(), pod.netns().ok()?, pod.ends.clone())))
            .collect();
        for (uid, netns, ends) in captured {
            let mut all = everywhere.clone();
            all.extend(ends.iter().filter_map(|end| end.xdp).map(|id| Foreign {
                hook: XDP,
                id,
                name: names.of(id).unwrap_or_default(),
                harmless: false,
            }));
            all.extend(own.remove(&uid).unwrap_or_default());
            match self.overrule(&uid, netns.as_fd(), &mut names) {
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
        self.surround(&cgroups, Keep::AtLeast, &mut Names::default()).map(drop)
    }

    /// Puts our connect programs around those that others have for all pods, or for the pods of these cgroups. What runs
    /// then, of each family.
    fn surround(
        &mut self,
        cgroups: &[(String, PathBuf)],
        keep: Keep,
        names: &mut Names,
    ) -> io::Result<Vec<Orders>> {
        let (mut all, mut alone) = (Vec::new(), true);
        for connect in self.programs.on_connect() {
            let mut orders = Orders::read(&self.root, cgroups, connect.hook)?;
            let foreign = names.foreign(orders.each().flatten(), &connect.ends(&self.pins));
            if !foreign.is_empty() {
                alone = false;
                let news = self.others.news(connect.name, &foreign);
                if connect.surround(&self.root, &orders, &foreign, news, &self.pins, &mut self.held)? {
                    orders = Orders::read(&self.root, cgroups, connect.hook)?;
                }
            }
            self.others.saw(connect.name, &foreign, keep);
            all.push(orders);
        }
        if keep == Keep::AsNeeded || !alone {
            self.keep_destinations(!alone)?;
        }
        Ok(all)
    }

    /// Has destinations noted once there is what puts them back, and the other way round.
    fn keep_destinations(&mut self, keep: bool) -> io::Result<()> {
        if self.others.keeps_destinations == keep {
            return Ok(());
        }
        for pod in self.pods.values_mut().filter(|pod| pod.captured() && !pod.sources.is_empty()) {
            pod.keeps_destinations = keep;
            self.maps.capture(pod.record.netns_cookie, pod.slot, pod.families())?;
        }
        if !keep {
            for connect in self.programs.on_connect() {
                let pin = self.pins.link(connect.last.0);
                attach::detach(&pin)?;
                // One whose pin is gone.
                self.held.detach(&pin);
            }
        }
        self.others.keeps_destinations = keep;
        Ok(())
    }

    /// Puts our sk_lookup behind others' in a pod, and says which these are.
    fn overrule(&mut self, uid: &str, netns: BorrowedFd<'_>, names: &mut Names) -> io::Result<Vec<Foreign>> {
        let path = self.pins.pod(uid).join(STEER);
        let mut order = bpf::query(Target::Fd(netns), Hook::SkLookup, Extent::Attached)?;
        let ours = runs(&path)?;
        let foreign = names.foreign(&order, &[Some(ours)]);
        if self.others.news(uid, &foreign) && order.last() != Some(&ours) {
            let link = bpf::attach(bpf::program(ours)?.as_fd(), Target::Fd(netns), Hook::SkLookup)?;
            replace(link.as_fd(), &path)?;
            self.held.hold(&path)?;
            order = bpf::query(Target::Fd(netns), Hook::SkLookup, Extent::Attached)?;
        }
        self.others.saw(uid, &foreign, Keep::AsNeeded);
        let place = |id| order.iter().rposition(|one| *one == id);
        let tell = |(id, name)| Foreign { hook: SK_LOOKUP, id, name, harmless: place(id) < place(ours) };
        Ok(foreign.into_iter().map(tell).collect())
    }
}

/// Ids of our first and last program, as pinned.
type Ends = [Option<u32>; 2];

impl Connect<'_> {
    fn ends(&self, pins: &Pins) -> Ends {
        [self.first.0, self.last.0].map(|name| runs(&pins.link(name)).ok())
    }

    /// Others' programs in this order.
    fn tell(&self, order: &[u32], [first, last]: Ends, names: &mut Names) -> Vec<Foreign> {
        let foreign = names.foreign(order, &[first, last]);
        let all = foreign.into_iter().map(|(id, name)| {
            let harmless = runs_before(order, first, id) && runs_after(order, last, id);
            Foreign { hook: self.name, id, name, harmless }
        });
        all.collect()
    }

    /// Puts ours around these; whether something changed. Places that ours have are changed for `news` only: an old
    /// version's programs beside ours are nobody's concern.
    fn surround(
        &self,
        root: &Path,
        orders: &Orders,
        foreign: &BTreeMap<u32, String>,
        news: bool,
        pins: &Pins,
        held: &mut Held,
    ) -> io::Result<bool> {
        let mut changed = false;
        let (first, last) = (pins.link(self.first.0), pins.link(self.last.0));
        let surrounded = |end: Option<u32>, runs: fn(&[u32], Option<u32>, u32) -> bool| {
            let met = |order: &&Vec<u32>| {
                foreign.keys().filter(|id| order.contains(*id)).all(|id| runs(order, end, *id))
            };
            orders.each().all(|order| met(&order))
        };
        if news && !surrounded(Some(runs(&first)?), runs_before) {
            let root = File::open(root)?;
            let link = bpf::attach_first(self.first.1, root.as_fd(), self.hook)?;
            replace(link.as_fd(), &first)?;
            held.hold(&first)?;
            changed = true;
        }
        let outermost = File::open(outermost(root, self.hook, |id| foreign.contains_key(id)))?;
        let target = Target::Fd(outermost.as_fd());
        let made = attach::ensure(&last, self.last.1, target, self.hook)?;
        if !made && news && !surrounded(Some(runs(&last)?), runs_after) {
            replace(bpf::attach(self.last.1, target, self.hook)?.as_fd(), &last)?;
            changed = true;
        }
        if made || changed {
            held.hold(&last)?;
        }
        Ok(made || changed)
    }
}

/// Whether one of ours runs before this one.
fn runs_before(order: &[u32], ours: Option<u32>, id: u32) -> bool {
    order.iter().position(|one| Some(*one) == ours).is_some_and(|place| !order[..place].contains(&id))
}

/// Whether one of ours runs after it.
fn runs_after(order: &[u32], ours: Option<u32>, id: u32) -> bool {
    order.iter().rposition(|one| Some(*one) == ours).is_some_and(|place| !order[place..].contains(&id))
}

/// Which programs run on connect(), of one family: on the cgroup of all pods, and on those of some.
struct Orders {
    everywhere: Vec<u32>,
    /// With the pod's UID.
    own: Vec<(String, Vec<u32>)>,
}

impl Orders {
    fn read(root: &Path, cgroups: &[(String, PathBuf)], hook: Hook) -> io::Result<Self> {
        // One that ends meanwhile has no processes left.
        let own = |(uid, cgroup): &(String, PathBuf)| Some((uid.clone(), effective(cgroup, hook).ok()?));
        Ok(Self { everywhere: effective(root, hook)?, own: cgroups.iter().filter_map(own).collect() })
    }

    fn each(&self) -> impl Iterator<Item = &Vec<u32>> {
        std::iter::once(&self.everywhere).chain(self.own.iter().map(|(_, order)| order))
    }
}

/// Which programs run for sockets of a cgroup, in that order.
///
/// # Errors
/// As of BPF_PROG_QUERY.
pub(super) fn effective(cgroup: &Path, hook: Hook) -> io::Result<Vec<u32>> {
    bpf::query(Target::Fd(File::open(cgroup)?.as_fd()), hook, Extent::Effective)
}

/// The cgroup that has such a program and none such above it that can be seen; `root` where none has.
fn outermost(root: &Path, hook: Hook, such: impl Fn(&u32) -> bool) -> PathBuf {
    let attached = |path: &Path| bpf::query(Target::Fd(File::open(path)?.as_fd()), hook, Extent::Attached);
    let visible = root.ancestors().map_while(|path| Some((path, attached(path).ok()?)));
    let with = visible.filter(|(_, programs)| programs.iter().any(&such));
    with.last().map_or(root, |(path, _)| path).to_owned()
}

/// The program that a pinned link runs.
///
/// # Errors
/// When it is not pinned.
pub(super) fn runs(link: &Path) -> io::Result<u32> {
    Ok(bpf::link_info(bpf::open(link)?.as_fd())?.program)
}

/// Programs' names, asked for once in a look; none for one that went meanwhile.
#[derive(Default)]
struct Names(BTreeMap<u32, Option<String>>);

impl Names {
    /// Those that are not ours, with their names; ours of another version are named like ours.
    fn foreign<'a>(
        &mut self,
        order: impl IntoIterator<Item = &'a u32>,
        ours: &[Option<u32>],
    ) -> BTreeMap<u32, String> {
        const OURS: [&str; 5] =
            [program::CONNECT4, program::CONNECT6, program::RESTORE4, program::RESTORE6, program::STEER];
        let ids: BTreeSet<u32> = order.into_iter().copied().filter(|id| !ours.contains(&Some(*id))).collect();
        let named = ids.into_iter().filter_map(|id| Some((id, self.of(id)?)));
        named.filter(|(_, name)| !OURS.contains(&name.as_str())).collect()
    }

    fn of(&mut self, id: u32) -> Option<String> {
        let ask = || bpf::name(bpf::program(id).ok()?.as_fd()).ok();
        self.0.entry(id).or_insert_with(ask).clone()
    }
}

/// What looking for others' programs came to, where nobody waits for it.
pub(super) fn told(result: io::Result<()>) {
    if let Err(error) = result {
        warn!(%error, "cannot look for eBPF programs of others on connect()");
    }
}
