//! One pod's way in and out, step by step.
//!
//! In: record, settings, routes, listeners (`furnish`), then inbound steering, capture of connect(), the flags on
//! older connections and the guard (`capture`). That order is what makes it safe: when the guard comes, every
//! connection is either the proxy's, bound to lo, or flagged as older. Out is the reverse.
//! **Invariant:** undoing is idempotent and works on what a crash left half done.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use mesh_ebpf_abi::{
    Address, FAMILY_V4, FAMILY_V6, KEEP_DESTINATION, MAX_ADDRESSES, MAX_PROBE_PORTS, MAX_UID, PodRecord,
};
use tracing::warn;

use super::bpf::{Hook, Target};
use super::guards::{End, Guards};
use super::load::Programs;
use super::maps::{self, Maps};
use super::pins::Pins;
use super::rules::{self, Numbers};
use super::upkeep::Pending;
use super::{Config, Listeners, PodSpec, attach, bpf, clsact, listeners, netns, older, sysctls};

/// Name of the pin of a pod's sk_lookup link.
pub(super) const STEER: &str = mesh_ebpf_abi::program::STEER;

/// The step without which no pod is let go.
pub(super) const FILTERS: &str = "remove the guard's filters";

/// A step that failed.
#[derive(Debug)]
pub(super) struct Failed {
    /// What was being done.
    pub step: &'static str,
    /// Why it failed.
    pub source: io::Error,
}

/// Names the step that a failure belongs to.
pub(super) fn step<T>(step: &'static str, result: io::Result<T>) -> Result<T, Failed> {
    result.map_err(|source| Failed { step, source })
}

/// A pod in the maps.
#[derive(Debug)]
pub(super) struct Pod {
    /// Its number.
    pub slot: u32,
    /// What the maps say of it.
    pub record: PodRecord,
    /// Its network namespace; none for a pod of an earlier agent that was not prepared again yet.
    pub netns: Option<OwnedFd>,
    /// Of a pod of an earlier agent, whether no process of it is left: its network namespace is gone, or may be.
    pub gone: bool,
    /// Another version captures it, and has set what there is to set inside of it.
    pub taken_over: bool,
    /// This agent guards it by filters, which only netlink takes off.
    pub filtered: bool,
    /// The other ends of its links, on the node.
    pub ends: Vec<End>,
    /// What is left to do after its capture.
    pub pending: Pending,
    /// Where the connections that it opens come from, at most one address of each family; empty until `furnish`.
    pub sources: Vec<IpAddr>,
    /// Others have programs on connect(), so where its calls want to go is noted.
    pub keeps_destinations: bool,
    /// What its probes name; empty for a pod of an earlier agent that was not prepared again yet.
    pub probe_ports: BTreeSet<u16>,
    /// Whether its DNS queries are captured.
    pub dns: bool,
}

impl Pod {
    /// A pod that nothing was done for yet.
    ///
    /// # Errors
    /// When it has too many addresses or its network namespace cannot be entered.
    pub(super) fn new(spec: &PodSpec, slot: u32) -> io::Result<Self> {
        let mut record = PodRecord {
            netns_cookie: netns::within(spec.netns.as_fd(), netns::cookie)?,
            addresses: [Address::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED)); MAX_ADDRESSES],
            address_count: spec.addresses.len() as u32,
            captured: 0,
            sysctls: [-1; 4],
            uid: [0; MAX_UID + 1],
        };
        if spec.addresses.is_empty() || spec.addresses.len() > MAX_ADDRESSES {
            return Err(invalid(format!(
                "{} addresses, 1 to {MAX_ADDRESSES} are possible",
                spec.addresses.len()
            )));
        }
        for (place, ip) in record.addresses.iter_mut().zip(&spec.addresses) {
            *place = Address::from(*ip);
        }
        record.uid[..spec.uid.len()].copy_from_slice(spec.uid.as_bytes());
        let mut probe_ports = spec.probe_ports.clone();
        if let Some(first_not) = probe_ports.iter().nth(MAX_PROBE_PORTS).copied() {
            warn!(
                pod = spec.uid,
                "probes name more than {MAX_PROBE_PORTS} ports; those from {first_not} on meet the proxy"
            );
            probe_ports.split_off(&first_not);
        }
        let netns = Some(spec.netns.try_clone()?);
        Ok(Self { netns, probe_ports, dns: spec.dns, ..Self::known(slot, record) })
    }

    /// A pod as its record has it.
    pub(super) fn known(slot: u32, record: PodRecord) -> Self {
        Self {
            slot,
            record,
            netns: None,
            gone: false,
            taken_over: false,
            filtered: false,
            ends: Vec::new(),
            pending: Pending::default(),
            sources: Vec::new(),
            keeps_destinations: false,
            probe_ports: BTreeSet::new(),
            dns: false,
        }
    }

    /// Whether the record says that it is captured.
    pub(super) fn captured(&self) -> bool {
        self.record.captured != 0
    }

    /// Its first address of each family.
    fn primaries(&self) -> Vec<IpAddr> {
        let ips = maps::ips(&self.record);
        let first = |v4: bool| ips.iter().copied().find(|ip| ip.is_ipv4() == v4);
        [first(true), first(false)].into_iter().flatten().collect()
    }

    /// Those of them that connections can come from, in the calling thread's network namespace. Without IPv6 there the
    /// pod is one of IPv4; a missing IPv4 address is told by the kernel when it gets its route.
    fn sources(&self, proc: &Path) -> io::Result<Vec<IpAddr>> {
        let mut sources = Vec::new();
        for ip in self.primaries() {
            if ip.is_ipv4() || (sysctls::has_ipv6(proc) && rules::has(ip)?) {
                sources.push(ip);
            } else {
                warn!(pod = maps::uid(&self.record), %ip, "the pod's network namespace has no such address: its IPv6 stays shut");
            }
        }
        if sources.is_empty() { Err(invalid("it has none of its addresses".to_owned())) } else { Ok(sources) }
    }

    /// Families of its sources, and whether destinations are noted, for the connect hook.
    pub(super) fn families(&self) -> u32 {
        let keep = if self.keeps_destinations { KEEP_DESTINATION } else { 0 };
        self.sources.iter().fold(keep, |all, ip| all | if ip.is_ipv4() { FAMILY_V4 } else { FAMILY_V6 })
    }

    /// Record, settings, routes and listeners. `kept` are used if they are of this network namespace.
    ///
    /// # Errors
    /// When a step fails; `dismantle` undoes those before it.
    pub(super) fn furnish(
        &mut self,
        config: &Config,
        maps: &mut Maps,
        kept: Option<Listeners>,
    ) -> Result<Listeners, Failed> {
        let netns = step("enter its network namespace", self.netns())?;
        // All in one: on a busy node each thread has to wait for a processor.
        let furnished = netns::within(netns.as_fd(), || Ok(self.furnish_inside(config, maps, kept)));
        step("enter its network namespace", furnished)?
    }

    fn furnish_inside(
        &mut self,
        config: &Config,
        maps: &mut Maps,
        kept: Option<Listeners>,
    ) -> Result<Listeners, Failed> {
        self.sources = step("read its addresses", self.sources(&config.proc))?;
        if self.record.sysctls[0] < 0 {
            // What they were before another version set them only that one knows.
            let defaults = self.taken_over.then(|| sysctls::defaults(&config.proc));
            let before = defaults.map_or_else(|| sysctls::current(&config.proc), Ok);
            self.record.sysctls = step("read its sysctls", before)?;
        }
        // Before anything is changed: an agent that dies from now on leaves word of what there is to undo.
        step("write its record", maps.remember(self.slot, &self.record))?;
        step("set its sysctls", sysctls::set(&config.proc))?;
        step("add its rules and routes", rules::add(config.numbers, &self.sources))?;
        step("open its ports to probes", maps.open_to_probes(self.slot, &self.probe_ports))?;
        let kept = kept.filter(|kept| listeners::belong(kept, self.record.netns_cookie));
        let v6 = self.families() & FAMILY_V6 != 0;
        let listeners = listeners::open(kept, v6, self.dns, &mut |socket| maps.flag(socket));
        let listeners = step("open its listeners", listeners)?;
        step("publish its listeners", maps.publish(self.slot, &listeners))?;
        Ok(listeners)
    }

    /// Hooks on. A pod that is captured already gets what is missing; its connections are not flagged again, or one
    /// that got past the hooks would be let out for good.
    ///
    /// # Errors
    /// When a step fails; `release` undoes those before it.
    pub(super) fn capture(
        &mut self,
        guards: &Guards<'_>,
        steer: &OwnedFd,
        maps: &mut Maps,
        numbers: Numbers,
    ) -> Result<(), Failed> {
        let netns = step("enter its network namespace", self.netns())?;
        let directory = guards.pins.pod(&maps::uid(&self.record));
        step("make its pin directory", fs::create_dir_all(&directory))?;
        let target = Target::Fd(netns.as_fd());
        step(
            "attach sk_lookup",
            attach::ensure(&directory.join(STEER), steer.as_fd(), target, Hook::SkLookup),
        )?;
        let capture = maps.capture(self.record.netns_cookie, self.slot, self.families());
        step("capture its connections", capture)?;
        let inside = || {
            let dns = rules::capture_dns(numbers, &self.sources, self.dns);
            let flagged =
                step("capture its DNS queries", dns).and_then(|()| self.flag_inside(guards.programs));
            Ok(flagged.map(|()| self.guard_inside(guards)))
        };
        let inside = step("enter its network namespace", netns::within(netns.as_fd(), inside))?;
        let (interfaces, guarded) = inside?;
        self.guard_ends(guards, &interfaces).and(guarded)?;
        self.record.captured = 1;
        step("write its record", maps.remember(self.slot, &self.record))
    }

    fn flag_inside(&mut self, programs: &Programs) -> Result<(), Failed> {
        if !self.captured() {
            let under_way = step("flag its older connections", older::flag(programs, self.taken_over))?;
            self.pending.handshakes = under_way.then(|| Instant::now() + older::PATIENCE);
        }
        Ok(())
    }

    /// Hooks off, the guard first: what it would drop is what leaves uncaptured next. Where its filters cannot be taken
    /// off nothing is: the pod stays captured, since without the rest they would drop what its apps send.
    ///
    /// # Errors
    /// The first one; the other steps are done, but for that one.
    pub(super) fn release(&mut self, pins: &Pins, maps: &mut Maps, numbers: Numbers) -> Result<(), Failed> {
        let uid = maps::uid(&self.record);
        let links = step("list its pins", pins.pod_links(&uid))?;
        let (filters, links): (Vec<_>, Vec<_>) = links.into_iter().partition(|name| attach::is_filter(name));
        let (guards, others): (Vec<_>, Vec<_>) = links.into_iter().partition(|name| attach::is_guard(name));
        let directory = pins.pod(&uid);
        if self.filtered || !filters.is_empty() {
            let gone = || matches!(attach::alive(&directory.join(STEER)), Ok(false));
            step(FILTERS, self.detach_filters(&attach::filtered(&filters), gone))?;
        }
        (self.filtered, self.record.captured) = (false, 0);
        let dns = step("stop capturing its DNS queries", self.release_dns(numbers));
        let filters = step("remove the guard's pins", attach::remove_all(&directory, &filters));
        let guard = step("remove the guard", attach::remove_all(&directory, &guards));
        let connect = step("stop capturing", maps.release(self.record.netns_cookie));
        let steer = step("remove sk_lookup", attach::remove_all(&directory, &others));
        let directory = step("remove its pin directory", gone(fs::remove_dir(&directory)));
        filters.and(guard).and(connect).and(dns).and(steer).and(directory)
    }

    /// Before sk_lookup goes: what is turned back then would meet nobody.
    fn release_dns(&self, numbers: Numbers) -> io::Result<()> {
        let Some(netns) = &self.netns else { return Ok(()) };
        netns::within(netns.as_fd(), || rules::capture_dns(numbers, &self.primaries(), false))
    }

    /// Takes the filters off its interfaces, of which pins tell. They go with their network namespace; else it has to be known, and the pins
    /// that tell of them stay for whoever knows it.
    ///
    /// # Errors
    /// When its network namespace is not known, or as of RTM_DELTFILTER.
    pub(super) fn detach_filters(&self, pinned: &BTreeSet<u32>, gone: impl Fn() -> bool) -> io::Result<()> {
        match &self.netns {
            Some(netns) => {
                // Once more, since no pin that is removed takes them off.
                let detach = || netns::within(netns.as_fd(), || clsact::detach_all(pinned));
                detach().or_else(|_| detach())
            }
            None if self.gone || gone() => Ok(()),
            None => Err(invalid("its network namespace is not known".to_owned())),
        }
    }

    /// The rest: rules, routes and settings, listeners' slots, record. A network namespace that is gone, or not
    /// known, took the first three with it.
    ///
    /// # Errors
    /// The first one; the other steps are done.
    pub(super) fn dismantle(&self, config: &Config, maps: &mut Maps) -> Result<(), Failed> {
        let inside = |netns: &OwnedFd| {
            netns::within(netns.as_fd(), || {
                let routes = rules::remove(config.numbers, &self.primaries());
                routes.and(sysctls::restore(&config.proc, self.record.sysctls))
            })
        };
        // Once more: the record goes, and what is left would pass for the pod's own settings when it comes back.
        let inside = self.netns.as_ref().map_or(Ok(()), |netns| inside(netns).or_else(|_| inside(netns)));
        // Last: it is what an agent that dies meanwhile leaves to the next.
        let forgotten = step("remove its record", maps.forget(self.slot, &self.record));
        step("restore its routes and sysctls", inside).and(forgotten)
    }

    pub(super) fn netns(&self) -> io::Result<OwnedFd> {
        let missing = || invalid("not known: prepare the pod first".to_owned());
        self.netns.as_ref().ok_or_else(missing)?.try_clone()
    }
}

impl Programs {
    /// A program of an interface, which all pods share, by its name.
    pub(super) fn on_interface(&self, name: &str) -> Option<&OwnedFd> {
        match name {
            mesh_ebpf_abi::program::GUARD => Some(&self.guard),
            mesh_ebpf_abi::program::GUARD_L3 => Some(&self.guard_l3),
            mesh_ebpf_abi::program::GUARD_NODE => Some(&self.guard_node),
            mesh_ebpf_abi::program::REFUSE => Some(&self.refuse),
            mesh_ebpf_abi::program::REFUSE_L3 => Some(&self.refuse_l3),
            _ => None,
        }
    }

    /// The program that the link of this name in a pod's directory should run, if all pods share it. Filters get theirs
    /// when the pod is captured again: only from inside of it can they be reached.
    fn shared(&self, link: &str) -> Option<&OwnedFd> {
        if attach::is_filter(link) { None } else { self.on_interface(link.split_once('-')?.0) }
    }
}

/// Takes over a pod that an earlier agent captured: moves its links to this agent's programs. False if it is not
/// whole any more, for example because its network namespace is gone.
///
/// # Errors
/// When a link cannot be moved.
pub(super) fn take_over(
    uid: &str,
    pins: &Pins,
    programs: &Programs,
    steer: impl FnOnce() -> io::Result<OwnedFd>,
    steer_tag: bpf::Tag,
) -> io::Result<bool> {
    let directory = pins.pod(uid);
    let steer_path = directory.join(STEER);
    match attach::alive(&steer_path) {
        Ok(true) => {}
        Ok(false) => return Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    }
    let link = bpf::open(&steer_path)?;
    let running = bpf::program(bpf::link_info(link.as_fd())?.program)?;
    if bpf::tag(running.as_fd())? != steer_tag {
        bpf::update(link.as_fd(), steer()?.as_fd())?;
    }
    for name in pins.pod_links(uid)? {
        let Some(program) = programs.shared(&name) else { continue };
        // A guard's interface may be gone while the pod is not.
        if attach::alive(&directory.join(&name))? {
            attach::refresh(bpf::open(&directory.join(&name))?.as_fd(), program.as_fd())?;
        }
    }
    Ok(true)
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}
