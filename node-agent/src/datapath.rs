//! The eBPF datapath as the rest of the agent sees it: load once, enrol pods, let them go.
//!
//! A pod is enrolled in two steps, so that it is never half captured: `prepare` makes everything its proxy needs and
//! changes nothing for the pod's traffic, `capture` switches the kernel hooks on. Everything is pinned in bpffs, so
//! capture outlives the agent, and the next agent finds its pods by `surviving`.
//!
//! **Invariant:** a failed step undoes itself; a pod is either untouched or captured (fail closed), nothing between.
//! All calls are synchronous: run them on one blocking thread.

mod attach;
mod bpf;
mod canary;
mod cgroup;
mod clsact;
mod error;
mod foreign;
mod guards;
mod held;
mod hook;
mod kubelet;
mod leaving;
mod listeners;
mod load;
mod logs;
mod maps;
mod netns;
mod older;
mod pins;
mod pod;
mod probes;
mod proof;
mod repair;
mod resets;
mod rules;
mod sysctls;
mod upkeep;
mod versions;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mesh_ebpf_abi::event::{Counter, DropEvent};
use mesh_ebpf_abi::program;
use tracing::{info, warn};

pub use error::{DatapathError, PodError};
pub use foreign::Foreign;
use guards::Guards;
use held::Held;
use hook::Chosen;
pub use hook::GuardHook;
pub use kubelet::Config as KubeletConfig;
pub use load::OBJECT;
use load::{Programs, Steers};
use maps::Maps;
pub use netns::has_cookie;
use pins::Pins;
use pod::{Failed, Pod};
use probes::Probes;
pub use proof::{Flaw, Part, Proof};
pub use resets::{Denies, Reset};
pub use rules::Numbers;
use versions::Others;

/// Where the datapath lives on this node, and the numbers it uses inside the pods.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// Mount point of the bpf file system that pins are kept in.
    #[arg(long, env = "AMBIT_BPFFS", default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,
    /// Cgroup (version 2) whose processes' connections are captured; by default kubepods, or the root.
    #[arg(long, env = "AMBIT_CGROUP_ROOT")]
    pub cgroup_root: Option<PathBuf>,
    /// How the programs on pods' interfaces are attached.
    #[arg(long, env = "AMBIT_GUARD_HOOK", value_enum, default_value = "auto")]
    pub guard_hook: GuardHook,
    /// Where the kubelet is.
    #[command(flatten)]
    pub kubelet: KubeletConfig,
    /// A /proc with a writable sys; the agent's own setting of this name is meant to be put here.
    #[arg(skip = PathBuf::from("/proc"))]
    pub proc: PathBuf,
    /// Routing table and rule priority.
    #[command(flatten)]
    pub numbers: Numbers,
}

/// A pod to enrol.
#[derive(Debug)]
pub struct PodSpec {
    /// Kubernetes pod UID; also the name of the directory of its pins.
    pub uid: String,
    /// The pod's network namespace.
    pub netns: OwnedFd,
    /// Its addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// The ports that the kubelet may reach directly.
    pub probe_ports: BTreeSet<u16>,
    /// Whether its DNS queries are captured, too.
    pub dns: bool,
}

/// A pod that an earlier agent enrolled and that still has its pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survivor {
    /// Kubernetes pod UID.
    pub uid: String,
    /// The addresses it was enrolled with; none where that was by an agent with other layouts.
    pub addresses: Vec<IpAddr>,
    /// Cookie of its network namespace; none as above.
    pub netns_cookie: Option<u64>,
}

/// The sockets that the kernel steers a pod's connections to, opened inside its network namespace.
#[derive(Debug)]
pub struct Listeners {
    /// Connections that the pod opens.
    pub outbound_v4: OwnedFd,
    /// Connections to the pod that are not HBONE.
    pub inbound_v4: OwnedFd,
    /// Connections to the pod on port 15008.
    pub hbone_v4: OwnedFd,
    /// Like `outbound_v4`; absent where the pod has no IPv6.
    pub outbound_v6: Option<OwnedFd>,
    /// Like `inbound_v4`; absent where the pod has no IPv6.
    pub inbound_v6: Option<OwnedFd>,
    /// Like `hbone_v4`; absent where the pod has no IPv6.
    pub hbone_v6: Option<OwnedFd>,
    /// DNS queries over UDP; absent where they are not captured.
    pub dns_v4: Option<OwnedFd>,
    /// Like `dns_v4`; absent where the pod has no IPv6, too.
    pub dns_v6: Option<OwnedFd>,
}

impl Listeners {
    /// The same sockets once more, for another process.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let optional = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Self {
            outbound_v4: self.outbound_v4.try_clone()?,
            inbound_v4: self.inbound_v4.try_clone()?,
            hbone_v4: self.hbone_v4.try_clone()?,
            outbound_v6: optional(&self.outbound_v6)?,
            inbound_v6: optional(&self.inbound_v6)?,
            hbone_v6: optional(&self.hbone_v6)?,
            dns_v4: optional(&self.dns_v4)?,
            dns_v6: optional(&self.dns_v6)?,
        })
    }
}

/// The loaded programs and the pods they capture.
pub struct Datapath {
    config: Config,
    pins: Pins,
    programs: Programs,
    steers: Steers,
    maps: Maps,
    pods: HashMap<String, Pod>,
    held: Held,
    versions: Others,
    others: foreign::Others,
    /// How pods' interfaces are guarded; why they cannot be where there is no way.
    hook: Result<Chosen, String>,
    /// The cgroup in which connections are captured.
    root: PathBuf,
    /// The node's network namespace, as of the thread that opened the datapath.
    node: OwnedFd,
    probes: Probes,
    /// Whether a connect() of this process has ever been captured.
    hooked: Arc<AtomicBool>,
}

impl Datapath {
    /// Loads the programs, or takes over what an earlier agent pinned: nothing captured is disturbed by this. Where the
    /// kernel has no hook for the guard `prepare` refuses each pod.
    ///
    /// # Errors
    /// When the kernel lacks a feature, bpffs or the cgroup is not there, or a program is refused.
    pub fn open(config: &Config) -> Result<Self, DatapathError> {
        let bpffs = |source| DatapathError::Bpffs { path: config.bpffs.clone(), source };
        let pins = Pins::create(&config.bpffs).map_err(bpffs)?;
        pins::remove_new(pins.root()).map_err(bpffs)?;
        let (programs, maps) = load::load(&pins)?;
        let hook = hook::choose(config.guard_hook, programs.guard.as_fd());
        let root = cgroup::root(config)?;
        let node = netns::own().map_err(DatapathError::Cookie)?;
        attach::connect(&pins, &programs, &root)
            .map_err(|source| DatapathError::Cgroup { path: root.clone(), source })?;
        info!(cgroup = %root.display(), bpffs = %config.bpffs.display(), "datapath open");
        let take_over = |source| DatapathError::TakeOver { path: config.bpffs.clone(), source };
        let versions = Others::find(pins.root()).map_err(take_over)?;
        let (config, pods, held) = (config.clone(), HashMap::new(), Held::default());
        let steers = Steers::start(&pins).map_err(DatapathError::Thread)?;
        let others = foreign::Others::of(&pins);
        let (probes, hooked) = (Probes::default(), Arc::default());
        let mut datapath = Self {
            config,
            pins,
            programs,
            steers,
            maps,
            pods,
            held,
            versions,
            others,
            hook,
            root,
            node,
            probes,
            hooked,
        };
        datapath.take_over()?;
        let pinned = datapath.held.refresh(datapath.pins.root());
        pinned.map_err(|source| DatapathError::TakeOver { path: datapath.config.bpffs.clone(), source })?;
        foreign::told(datapath.foreign().map(drop));
        datapath.follow_kubelet();
        Ok(datapath)
    }

    /// Makes sure that the kubelet's connections are recorded, wherever its cgroup is now; to be called every few
    /// seconds.
    pub fn follow_kubelet(&mut self) {
        let attached = self.probes.follow(&self.config, &self.pins, &self.programs, &self.root);
        let pins = [program::PROBES, program::BYSTANDERS].map(|name| self.pins.link(name));
        if attached && let Err(error) = pins.iter().try_for_each(|pin| self.held.hold(pin)) {
            warn!(%error, "cannot hold what records the kubelet's connections");
        }
    }

    /// The map in which a proxy flags its own sockets (`mesh_ebpf_abi::map::SKPROXY`).
    pub fn skproxy_map(&self) -> BorrowedFd<'_> {
        self.maps.skproxy()
    }

    /// The pods that are captured: after `open` the ones an earlier agent left. Each wants `prepare` and `capture`
    /// again, which disturb nothing, or `clear`; before `prepare`, `leave` cannot reach what is inside the pod's network
    /// namespace.
    pub fn surviving(&self) -> Vec<Survivor> {
        let captured = self.pods.iter().filter(|(_, pod)| pod.captured());
        let survivor = |(uid, pod): (&String, &Pod)| Survivor {
            uid: uid.clone(),
            addresses: maps::ips(&pod.record),
            netns_cookie: Some(pod.record.netns_cookie),
        };
        let mut survivors: Vec<_> = captured.map(survivor).collect();
        for uid in self.versions.pods().unwrap_or_default() {
            if !self.pods.get(&uid).is_some_and(Pod::captured) {
                survivors.push(Survivor { uid, addresses: Vec::new(), netns_cookie: None });
            }
        }
        survivors
    }

    /// Puts back what was pinned and is not any more, as after bpffs was unmounted: until then nothing would be left of
    /// capture without this process. How much that was.
    ///
    /// # Errors
    /// When there is no bpffs to pin in.
    pub fn keep_pins(&mut self) -> io::Result<usize> {
        Pins::create(&self.config.bpffs)?;
        self.held.restore(self.pins.root())
    }

    /// Makes routes, rules and listeners in the pod's network namespace; nothing is captured yet.
    /// `kept` are the pod's listeners where a proxy still has them; without, new ones are opened. For a pod that is
    /// already captured this only makes what is missing and fills its slots again, which takes effect at once.
    /// The network namespace is held until `leave`.
    ///
    /// # Errors
    /// When a step fails; the earlier ones are undone, unless the pod is captured already and needs them. When it is
    /// captured in another network namespace that is still there: that stays as it is.
    pub fn prepare(&mut self, spec: &PodSpec, kept: Option<Listeners>) -> Result<Listeners, PodError> {
        self.hook().map_err(|failed| failed.of(&spec.uid))?;
        let mut pod = self.pod(spec).map_err(|failed| failed.of(&spec.uid))?;
        self.steers.begin(pod.slot);
        let listeners = pod.furnish(&self.config, &mut self.maps, kept);
        if listeners.is_ok() || pod.captured() || pod.taken_over {
            self.pods.insert(spec.uid.clone(), pod);
        } else {
            self.steers.forget(pod.slot);
            undone(&spec.uid, pod.dismantle(&self.config, &mut self.maps));
        }
        listeners.map_err(|failed| failed.of(&spec.uid))
    }

    /// Switches capture on for a prepared pod: from now on its new TCP connections meet the proxy, its older ones
    /// live on, and everything else that is TCP is dropped.
    ///
    /// # Errors
    /// When a hook cannot be attached, or there is no bpffs to pin it in; a pod that was not captured is then as it was.
    pub fn capture(&mut self, uid: &str) -> Result<(), PodError> {
        let hook = self.hook().map_err(|failed| failed.of(uid))?;
        let whole = Pins::create(&self.config.bpffs).and_then(|pins| self.held.restore(&pins.pod(uid)));
        pod::step("pin its hooks", whole).map_err(|failed| failed.of(uid))?;
        pod::step("attach the connect hooks", self.connect()).map_err(|failed| failed.of(uid))?;
        // Before the pod's first connection.
        foreign::told(self.look_around(uid));
        let unknown = || Failed { step: "capture it", source: io::ErrorKind::NotFound.into() };
        let pod = self.pods.get_mut(uid).ok_or_else(unknown).map_err(|failed| failed.of(uid))?;
        // Rules, and filters in their place, are another version's as well.
        let before = pod.captured() || self.versions.has(uid);
        pod.keeps_destinations = self.others.keeps_destinations;
        let steer = pod::step("load sk_lookup", self.steers.load(pod.slot));
        let guards = Guards::of(&self.pins, &self.programs, hook, &self.node);
        let (maps, numbers) = (&mut self.maps, self.config.numbers);
        let result = steer.and_then(|steer| pod.capture(&guards, &steer, maps, numbers));
        if result.is_err() && !before {
            let released = pod.release(&self.pins, &mut self.maps, self.config.numbers);
            undone(uid, released);
        }
        let netns = pod.netns.as_ref().filter(|_| hook == Chosen::Tcx).map(OwnedFd::try_clone).transpose();
        let pinned = pod::step("hold its pins", self.held.refresh(&self.pins.pod(uid)));
        // Now that ours are there: those of another version would drop what they do not know. Where ours are filters,
        // they are in the place of theirs already.
        let result = result.and(pinned);
        let result = result
            .and(pod::step("keep its network namespace", netns))
            .and_then(|netns| netns.map_or(Ok(()), |netns| self.release_filters(uid, &netns)));
        let result =
            result.and_then(|()| pod::step("take it from another version", self.versions.release(uid)));
        result.map_err(|failed| failed.of(uid))
    }

    /// What the programs counted since the maps were made.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn count(&self, counter: Counter) -> io::Result<u64> {
        self.maps.count(counter)
    }

    /// The next packet or connection that was dropped, if one is waiting. Events are lost when nobody asks.
    pub fn next_drop(&mut self) -> Option<DropEvent> {
        self.maps.next_drop()
    }

    fn hook(&self) -> Result<Chosen, Failed> {
        let unsupported = |reason: String| io::Error::new(io::ErrorKind::Unsupported, reason);
        pod::step("guard its packets", self.hook.clone().map_err(unsupported))
    }

    /// The pod as the maps have it, in its network namespace as it is now.
    fn pod(&mut self, spec: &PodSpec) -> Result<Pod, Failed> {
        if !pins::valid_uid(&spec.uid) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "not a Kubernetes UID");
            return Err(Failed { step: "name its pins", source });
        }
        let slot = match self.pods.get(&spec.uid) {
            Some(known) => known.slot,
            None => pod::step("find a free slot", self.maps.free_slot())?,
        };
        let mut pod = pod::step("enter its network namespace", Pod::new(spec, slot))?;
        pod.taken_over = self.versions.has(&spec.uid);
        let Some(mut known) = self.pods.remove(&spec.uid) else { return Ok(pod) };
        if known.record.netns_cookie == pod.record.netns_cookie {
            pod.record.captured = known.record.captured;
            pod.record.sysctls = known.record.sysctls;
            pod.pending = known.pending;
            pod.ends = known.ends;
            pod.filtered = known.filtered;
            // An address that it no longer has may be another pod's soon.
            let lost = maps::addresses(&known.record)
                .filter(|old| !maps::addresses(&pod.record).any(|new| new == *old));
            pod::step("forget its old addresses", self.maps.forget_addresses(slot, lost))?;
        } else if known.captured()
            && attach::alive(&self.pins.pod(&spec.uid).join(pod::STEER)).unwrap_or(true)
        {
            // Only the runtime says that there is another sandbox, and then the pod was let go. A process of the pod
            // can make itself another network namespace, and be the only one that is found.
            self.pods.insert(spec.uid.clone(), known);
            let source = io::Error::other("its processes are in another one than it is captured in");
            return Err(Failed { step: "find its network namespace", source });
        } else {
            // The same pod in another sandbox: the old one is gone, or it was not captured there.
            known.gone = true;
            self.pods.insert(spec.uid.clone(), known);
            self.leave(&spec.uid).map_err(|error| Failed { step: error.step, source: error.source })?;
        }
        Ok(pod)
    }

    /// Finds the pods of an earlier agent, moves them to this agent's programs, and clears away what is not whole.
    fn take_over(&mut self) -> Result<(), DatapathError> {
        let take_over = |source| DatapathError::TakeOver { path: self.config.bpffs.clone(), source };
        let steer_tag = self.steers.load(u32::MAX).and_then(|steer| bpf::tag(steer.as_fd()));
        let steer_tag = steer_tag.map_err(take_over)?;
        for (slot, record) in self.maps.records().map_err(take_over)? {
            let uid = maps::uid(&record);
            let mut pod = Pod::known(slot, record);
            let steer = || self.steers.load(slot);
            let moved = pod.captured().then(|| {
                pod::take_over(&uid, &self.pins, &self.programs, steer, steer_tag).unwrap_or_else(|error| {
                    warn!(pod = uid, %error, "its hooks cannot be moved to this agent's programs: they stay as they are");
                    true
                })
            });
            if moved != Some(true) {
                pod.record.captured = 0;
                undone(&uid, pod.release(&self.pins, &mut self.maps, self.config.numbers));
            }
            // Its record is kept also then: it knows what is to be restored inside of the pod.
            self.pods.insert(uid, pod);
        }
        Ok(())
    }
}

impl Failed {
    fn of(self, uid: &str) -> PodError {
        PodError { uid: uid.to_owned(), step: self.step, source: self.source }
    }
}

/// A failure while undoing changes nothing for the caller; people should know.
fn undone(uid: &str, result: Result<(), Failed>) {
    if let Err(failed) = result {
        warn!(pod = uid, step = failed.step, error = %failed.source, "could not be undone");
    }
}
