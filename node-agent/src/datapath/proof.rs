//! Whether a pod is captured: what the kernel says of each part, and what becomes of canaries inside the pod.
//!
//! The kernel says which programs run for which cgroup and what the maps hold; that what is there also works, together
//! and with the proxy, only canaries tell. Where one does not come back the parts are looked at to say why.
//! **Invariant:** nothing is changed here.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mesh_ebpf_abi::program;

use super::bpf::{self, Extent, Hook, Target};
use super::canary::{self, Landed, Outcome, Way};
use super::pod::{Pod, STEER};
use super::rules::{self, Interfaces, MAX_INTERFACES, Numbers, There};
use super::{Datapath, cgroup, foreign, maps, netns, sysctls};

/// What capture is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The pod's addresses, in its network namespace.
    Addresses,
    /// The programs on connect(), and the entry that switches them on for the pod.
    Connect,
    /// Rules and routes inside the pod.
    Rules,
    /// sysctls inside the pod.
    Settings,
    /// The program that chooses the proxy's sockets.
    SkLookup,
    /// The proxy's sockets inside the pod.
    Listeners,
    /// Capture of DNS queries.
    Dns,
    /// The programs that drop what is not the proxy's.
    Guard,
    /// ztunnel, which has to answer.
    Proxy,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Addresses,
        Self::Connect,
        Self::Rules,
        Self::Settings,
        Self::SkLookup,
        Self::Listeners,
        Self::Dns,
        Self::Guard,
        Self::Proxy,
    ];

    /// For a metric's label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Addresses => "addresses",
            Self::Connect => "connect",
            Self::Rules => "rules",
            Self::Settings => "settings",
            Self::SkLookup => "sk_lookup",
            Self::Listeners => "listeners",
            Self::Dns => "dns",
            Self::Guard => "guard",
            Self::Proxy => "proxy",
        }
    }

    /// Whether the agent can put it back.
    pub const fn repairable(self) -> bool {
        !matches!(self, Self::Addresses | Self::Proxy)
    }
}

/// A part that is not as it has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// Which.
    pub part: Part,
    /// What is wrong, for people.
    pub detail: String,
    /// The kernel says so; else it was concluded from a canary that did not come back, as one may on a busy node.
    pub certain: bool,
}

impl Flaw {
    fn certain(part: Part, detail: impl Into<String>) -> Self {
        Self { part, detail: detail.into(), certain: true }
    }
}

/// Finds out what of a pod's capture is not as it has to be; to be run where it may block for a second. The argument says
/// whether a proxy is there to answer: without one no canary is sent that it would have to, which would be in its way
/// when it comes.
///
/// It fails when the pod cannot be looked into.
pub type Proof = Box<dyn FnOnce(bool) -> io::Result<Vec<Flaw>> + Send>;

/// What a proof starts from.
struct Subject {
    netns: OwnedFd,
    sources: Vec<IpAddr>,
    dns: bool,
    numbers: Numbers,
    proc: PathBuf,
    hooked: Arc<AtomicBool>,
    flaws: Vec<Flaw>,
}

impl Datapath {
    /// Proofs of those of these pods that are captured, by UID.
    pub fn survey(&self, uids: &BTreeSet<String>) -> BTreeMap<String, Proof> {
        let mut cgroups = BTreeMap::<_, Vec<_>>::new();
        for (uid, path) in cgroup::of_pods(&self.root, |uid| uids.contains(uid)) {
            cgroups.entry(uid).or_default().push(path);
        }
        let ends = self.wrong_ends(uids);
        let proofs = uids.iter().filter_map(|uid| {
            let pod = self.pods.get(uid).filter(|pod| pod.captured() && !pod.sources.is_empty())?;
            let mut flaws = self.flaws(uid, pod, cgroups.get(uid).map_or(&[], Vec::as_slice));
            if !pod.ends.is_empty() {
                flaws.extend(on_the_node(uid, &ends));
            }
            let subject = Subject {
                netns: pod.netns().ok()?,
                sources: pod.sources.clone(),
                dns: pod.dns,
                numbers: self.config.numbers,
                proc: self.config.proc.clone(),
                hooked: Arc::clone(&self.hooked),
                flaws,
            };
            let proof: Proof = Box::new(move |answers| subject.prove(answers));
            Some((uid.clone(), proof))
        });
        proofs.collect()
    }

    /// What the kernel says of a pod from outside.
    fn flaws(&self, uid: &str, pod: &Pod, cgroups: &[PathBuf]) -> Vec<Flaw> {
        let mut flaws = Vec::new();
        if !self.maps.captures(pod.record.netns_cookie, pod.slot, pod.families()) {
            let detail = "the entry that switches capture of connect() on is gone or another";
            flaws.push(Flaw::certain(Part::Connect, detail));
        }
        for (name, hook) in [(program::CONNECT4, Hook::Connect4), (program::CONNECT6, Hook::Connect6)] {
            let everywhere = std::slice::from_ref(&self.root);
            let cgroups = if cgroups.is_empty() { everywhere } else { cgroups };
            let missed = cgroups.iter().find(|cgroup| !self.runs_in(cgroup, name, hook));
            if let Some(cgroup) = missed {
                let detail = format!("the program {name} does not run in the cgroup {}", cgroup.display());
                flaws.push(Flaw::certain(Part::Connect, detail));
            }
        }
        for address in maps::addresses(&pod.record).filter(|address| !self.maps.knows(address, pod.slot)) {
            let detail = format!("{} is not known to the programs as the pod's", address.to_ip());
            flaws.push(Flaw::certain(Part::SkLookup, detail));
        }
        let pin = self.pins.pod(uid).join(STEER);
        let steered = pod
            .netns()
            .and_then(|netns| bpf::query(Target::Fd(netns.as_fd()), Hook::SkLookup, Extent::Attached));
        if !steered.is_ok_and(|order| runs(&order, &pin, STEER)) {
            let detail = "the sk_lookup program is not attached to its network namespace";
            flaws.push(Flaw::certain(Part::SkLookup, detail));
        }
        flaws
    }

    /// Whether the program runs for sockets of a cgroup. One that has just gone has none.
    fn runs_in(&self, cgroup: &Path, name: &str, hook: Hook) -> bool {
        match foreign::effective(cgroup, hook) {
            Ok(order) => runs(&order, &self.pins.link(name), name),
            Err(_) => !cgroup.exists(),
        }
    }
}

/// Of a pod whose links end on the node, what was found wrong there: all, where that could not be looked at.
fn on_the_node(uid: &str, found: &io::Result<BTreeMap<&str, Vec<String>>>) -> Vec<Flaw> {
    let details = match found {
        Ok(wrong) => wrong.get(uid).cloned().unwrap_or_default(),
        Err(error) => vec![format!("it cannot be told whether it is guarded on the node: {error}")],
    };
    details.into_iter().map(|detail| Flaw::certain(Part::Guard, detail)).collect()
}

/// Whether ours is among these programs; by its name where its pin is gone.
fn runs(order: &[u32], pin: &Path, name: &str) -> bool {
    let named =
        |id: &u32| bpf::program(*id).and_then(|one| bpf::name(one.as_fd())).is_ok_and(|of| of == name);
    match foreign::runs(pin) {
        Ok(id) => order.contains(&id),
        Err(_) => order.iter().any(named),
    }
}

impl Subject {
    fn prove(self, answers: bool) -> io::Result<Vec<Flaw>> {
        netns::within(self.netns.as_fd(), || {
            let mut flaws = self.flaws.clone();
            for name in sysctls::changed(&self.proc)? {
                flaws.push(Flaw::certain(Part::Settings, format!("{name} is not 1")));
            }
            let (interfaces, there) = rules::look(self.numbers, &self.sources)?;
            flaws.extend(self.unguarded(&interfaces));
            flaws.extend(self.missing(&there));
            let failed = if answers { self.failed() } else { Vec::new() };
            for (way, source, outcome) in failed {
                conclude(&mut flaws, way, source, &outcome);
            }
            Ok(flaws)
        })
    }

    /// The canaries that the proxy has not answered.
    fn failed(&self) -> Vec<Landed> {
        let mut landed = canary::fly(&self.sources, self.dns, self.numbers.mark, &self.hooked);
        landed.retain(|(.., outcome)| !matches!(outcome, Outcome::Answered));
        landed
    }

    fn unguarded(&self, interfaces: &Interfaces) -> Vec<Flaw> {
        let mut flaws = Vec::new();
        let socket = canary::packet_socket();
        if interfaces.more {
            let detail =
                format!("it has more than {MAX_INTERFACES} interfaces, and the others are not guarded");
            flaws.push(Flaw::certain(Part::Guard, detail));
        }
        for interface in interfaces.seen.iter().copied() {
            for source in &self.sources {
                let leaks = match &socket {
                    Ok(socket) => canary::leaks(socket, interface, *source),
                    Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
                };
                let detail = match leaks {
                    Ok(false) => continue,
                    Ok(true) => format!("a packet past the proxy left by its interface {}", interface.index),
                    Err(error) => format!("its guard cannot be tried: {error}"),
                };
                flaws.push(Flaw::certain(Part::Guard, detail));
            }
        }
        flaws
    }

    /// What is not there of the addresses, rules and routes, in words. A connection may find its way without some of them,
    /// but not each one.
    fn missing(&self, there: &[There]) -> Vec<Flaw> {
        let mut flaws = Vec::new();
        for (source, there) in self.sources.iter().zip(there) {
            if !there.address {
                let detail = format!(
                    "{source} is on no interface of its network namespace; a sandboxed runtime, such as gVisor, takes it \
                     away, since it has a network stack of its own"
                );
                flaws.push(Flaw::certain(Part::Addresses, detail));
                continue;
            }
            let family = family(*source);
            for name in &there.missing {
                flaws.push(Flaw::certain(Part::Rules, format!("its {family} {name} is gone")));
            }
            if self.dns && !there.dns {
                flaws.push(Flaw::certain(Part::Dns, format!("its {family} rule for DNS queries is gone")));
            }
        }
        flaws
    }
}

fn family(source: IpAddr) -> &'static str {
    if source.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// What a canary that did not come back says where nothing else does.
fn conclude(flaws: &mut Vec<Flaw>, way: Way, source: IpAddr, outcome: &Outcome) {
    let family = family(source);
    if matches!(outcome, Outcome::Escaped) {
        let detail = format!("an {family} connection from inside it was not captured");
        return flaws.push(Flaw::certain(Part::Connect, detail));
    }
    let explains = |flaw: &Flaw| match flaw.part {
        Part::Dns => way == Way::Dns,
        Part::Connect => way == Way::Outbound,
        Part::Guard => false,
        _ => true,
    };
    if flaws.iter().any(explains) {
        return;
    }
    let what = match way {
        Way::Outbound => "connection that it opens",
        Way::Inbound => "connection to it in the clear",
        Way::Hbone => "connection to its HBONE port",
        Way::Dns => "DNS query",
    };
    let (part, how) = match outcome {
        Outcome::Silent => (Part::Proxy, "is not answered by ztunnel".to_owned()),
        Outcome::Refused(error) => (Part::Listeners, format!("does not reach ztunnel: {error}")),
        _ => (Part::Listeners, "does not reach ztunnel".to_owned()),
    };
    let part = if way == Way::Dns { Part::Dns } else { part };
    flaws.push(Flaw { part, detail: format!("an {family} {what} {how}"), certain: false });
}

#[cfg(test)]
mod tests;
