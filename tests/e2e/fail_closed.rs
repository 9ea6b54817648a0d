//! What an enrolled pod sends when parts of the mesh are gone, in every combination: nothing in the clear that should
//! have gone through the mesh, and all that never does.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::Context as _;
use aya::maps::{HashMap, Map, MapData, SockMap};
use mesh_ebpf_abi::{ABI_VERSION, Address, PodAddress, SOCKETS_PER_POD, map};
use mesh_tests::Lab;
use mesh_tests::capture::{Packet, Protocol};
use mesh_tests::fabric;
use mesh_tests::lab::PodRef;
use mesh_tests::stack::Family;
use mesh_tests::workload::Workload;

use crate::fixture::{HBONE, HTTP, service_of};
use crate::shared::scenario;

/// A pod on node 1, and what of its own datapath is taken from it.
struct Broken<'a> {
    pod: PodRef<'a>,
    rules: bool,
    listeners: bool,
}

/// What a pod's attempts came to; `true` is an answer.
#[derive(Debug)]
struct Attempts {
    /// Over TCP, which is captured.
    tcp: Vec<(SocketAddr, bool)>,
    /// Over each family.
    udp: Vec<bool>,
    icmp: bool,
}

impl Attempts {
    /// What is not captured.
    fn rest_answered(&self) -> bool {
        self.udp.iter().all(|answered| *answered) && self.icmp
    }
}

/// What is dialled, over both families.
struct Destinations {
    /// A pod of the mesh on the other node.
    mesh: Vec<SocketAddr>,
    /// A Service, whose addresses are on no wire.
    service: Vec<SocketAddr>,
    outside: Vec<SocketAddr>,
}

impl Destinations {
    fn of(lab: &Lab) -> anyhow::Result<Self> {
        let at = |port: u16| move |ip: IpAddr| SocketAddr::new(ip, port);
        Ok(Self {
            mesh: lab.pod("mesh/far").addresses()?.into_iter().map(at(HTTP)).collect(),
            service: lab.service_addresses("mesh", "web")?.into_iter().map(at(80)).collect(),
            outside: Family::ALL.map(fabric::outside).map(at(80)).to_vec(),
        })
    }

    fn all(&self) -> Vec<SocketAddr> {
        [&self.mesh[..], &self.service, &self.outside].concat()
    }
}

impl Broken<'_> {
    fn start<'a>(lab: &'a Lab, name: &str, rules: bool, listeners: bool) -> anyhow::Result<Broken<'a>> {
        let pod = Workload::new("mesh", name).on_node(1).start(lab)?;
        pod.captured()?;
        Ok(Broken { pod, rules, listeners })
    }

    /// Take away what it has to lack; what is gone already stays gone.
    fn break_it(&self, lab: &Lab) -> anyhow::Result<()> {
        for family in ["-4", "-6"] {
            let rule = |words: &[&str]| {
                let line = ["ip", family, "rule"].into_iter().chain(words.iter().copied());
                self.pod.exec_from_node(line)?.ok("ip")
            };
            for priority in ["100", "101"] {
                let is_there =
                    || Ok::<_, anyhow::Error>(rule(&["list"])?.contains(&format!("{priority}:\t")));
                anyhow::ensure!(self.rules || is_there()?, "rule {priority} of ip {family} is gone");
                // Of several of one priority one goes at a time.
                while self.rules && is_there()? {
                    rule(&["del", "pref", priority])?;
                }
            }
        }
        if self.listeners {
            take_listeners(lab, self.pod.address()?)?;
        }
        Ok(())
    }

    /// Whether somebody is there to carry a connection. Without a route a socket on lo has its peer there over IPv4; over
    /// IPv6 it has no peer.
    fn is_served(&self, ztunnel: bool, to: SocketAddr) -> bool {
        ztunnel && !self.listeners && (to.is_ipv4() || !self.rules)
    }
}

/// Remove a pod's listeners from the map by which its connections find them.
fn take_listeners(lab: &Lab, address: IpAddr) -> anyhow::Result<()> {
    lab.node(1).inside(|| {
        let maps = format!("/sys/fs/bpf/ambit/v{ABI_VERSION}/maps");
        let open = |name: &str| MapData::from_pin(format!("{maps}/{name}")).with_context(|| name.to_owned());
        let addresses: HashMap<_, Address, PodAddress> = HashMap::try_from(Map::HashMap(open(map::PODIP)?))?;
        let slot = addresses.get(&Address::from(address), 0).context("the pod is not captured")?.slot;
        let mut listeners = SockMap::try_from(Map::SockMap(open(map::LISTEN)?))?;
        for index in 0..SOCKETS_PER_POD {
            // Not each place has a socket, least of all the second time.
            let _ = listeners.clear_index(&(slot * SOCKETS_PER_POD + index));
        }
        Ok(())
    })
}

/// Everything at once: what waits for nobody's answer waits at the same time.
fn attempt(pod: &PodRef<'_>, tcp: &[SocketAddr]) -> anyhow::Result<Attempts> {
    let mut script = String::new();
    for to in tcp {
        script += &format!("curl -s -o /dev/null --max-time 3 http://{to}/ & p=\"$p $!\"; ");
    }
    for to in Family::ALL.map(fabric::outside) {
        let echo = SocketAddr::new(to, 7);
        script += &format!("ambit-example datagram {echo} word >/dev/null; u=\"$u $?\"; ");
    }
    let echo = fabric::outside(Family::V4);
    script += &format!("ambit-example ping {echo} >/dev/null; i=$?; ");
    script += "for one in $p; do wait $one; echo $?; done; echo $u $i";
    let output = pod.exec_ok(["bash", "-c", &script])?;
    let answered: Vec<bool> = output.split_whitespace().map(|code| code == "0").collect();
    anyhow::ensure!(answered.len() == tcp.len() + 3, "it says {output:?}");
    let (of_tcp, rest) = answered.split_at(tcp.len());
    let tcp = tcp.iter().copied().zip(of_tcp.iter().copied()).collect();
    Ok(Attempts { tcp, udp: rest[..2].to_vec(), icmp: rest[2] })
}

/// All pods try everything while this much of the mesh is there. An agent mends what a pod lacks as soon as it notices:
/// then the pod's calls may be answered, and those to the outside go out.
fn round(
    lab: &Lab,
    state: &str,
    (agent, ztunnel): (bool, bool),
    broken: &[Broken<'_>],
) -> anyhow::Result<()> {
    let destinations = Destinations::of(lab)?;
    let all = destinations.all();
    broken.iter().try_for_each(|broken| broken.break_it(lab))?;
    let plain = lab.pod("plain/client");
    let capture = lab.capture("fail-closed")?;
    let (control, attempts) = std::thread::scope(|scope| {
        let control = scope.spawn(|| attempt(&plain, &all));
        let tcp = &all;
        let threads: Vec<_> =
            broken.iter().map(|broken| scope.spawn(move || attempt(&broken.pod, tcp))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, anyhow::Result<Attempts>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
        };
        Ok::<_, anyhow::Error>((
            join(control)?,
            threads.into_iter().map(join).collect::<anyhow::Result<Vec<_>>>()?,
        ))
    })?;
    let captured = capture.stop()?;
    let sent = |from: &[IpAddr], wanted: &dyn Fn(&Packet<'_>) -> bool| {
        let of_it = |packet: &Packet<'_>| from.contains(&packet.source.ip()) && wanted(packet);
        captured
            .packets()
            .filter(|packet| packet.protocol == Protocol::Tcp && of_it(packet))
            .collect::<Vec<_>>()
    };
    // The same calls of a pod outside the mesh are on the fabric, so what is not seen was not sent.
    let of_plain = plain.addresses()?;
    for destination in destinations.mesh.iter().chain(&destinations.outside) {
        let calls = sent(&of_plain, &|packet| packet.destination == *destination);
        anyhow::ensure!(
            !calls.is_empty(),
            "{state}: the control's call to {destination} is not on the fabric"
        );
    }
    // One of the Service's endpoints is behind the ztunnel that may be gone.
    let may_fail = |to: &SocketAddr| destinations.service.contains(to);
    let answered = control.tcp.iter().all(|(to, answered)| *answered || may_fail(to));
    anyhow::ensure!(answered && control.rest_answered(), "{state}: the control got {control:?}");
    let mut known: BTreeSet<IpAddr> = of_plain.into_iter().collect();
    for (broken, attempts) in broken.iter().zip(attempts) {
        let (from, served) = (broken.pod.addresses()?, |to| broken.is_served(ztunnel, to));
        let mended = agent && ztunnel && (broken.rules || broken.listeners);
        let what = format!("{state}, rules gone: {}, listeners gone: {}", broken.rules, broken.listeners);
        let clear = sent(&from, &|packet| {
            let goes_out =
                (mended || served(packet.destination)) && destinations.outside.contains(&packet.destination);
            packet.destination.port() != HBONE && !goes_out
        });
        anyhow::ensure!(clear.is_empty(), "{what}: in the clear: {clear:?}");
        anyhow::ensure!(attempts.rest_answered(), "{what}: what is not captured stopped: {attempts:?}");
        for (to, answered) in &attempts.tcp {
            let may_be = *answered == served(*to) || mended;
            anyhow::ensure!(may_be, "{what}: {to} answered: {answered}");
        }
        let tunnelled =
            sent(&from, &|packet| packet.destination.port() == HBONE && !packet.payload.is_empty());
        let some = all.iter().any(|to| served(*to));
        anyhow::ensure!(!some || !tunnelled.is_empty(), "{what}: nothing went through the tunnel");
        known.extend(from);
    }
    // Nor under another address.
    let stray = captured.packets().find(|packet| {
        packet.opens()
            && [80, HTTP].contains(&packet.destination.port())
            && !known.contains(&packet.source.ip())
    });
    anyhow::ensure!(stray.is_none(), "{state}: {stray:?}");
    Ok(())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nothing_of_an_enrolled_pod_leaves_in_the_clear_whatever_is_gone() {
    scenario(|lab| {
        let broken = [
            Broken::start(lab, "whole", false, false)?,
            Broken::start(lab, "no-rules", true, false)?,
            Broken::start(lab, "no-listeners", false, true)?,
            Broken::start(lab, "neither", true, true)?,
        ];
        let (agent, ztunnel) = (lab.daemon("node-agent", 1), lab.daemon("ztunnel", 1));
        round(lab, "all there", (true, true), &broken)?;
        let no_agent = agent.kill_and_hold()?;
        round(lab, "agent gone", (false, true), &broken)?;
        let no_ztunnel = ztunnel.kill_and_hold()?;
        round(lab, "agent and ztunnel gone", (false, false), &broken)?;
        no_agent.release()?;
        round(lab, "ztunnel gone", (true, false), &broken)?;
        no_ztunnel.release()?;
        // What is whole is served again.
        mesh_tests::eventually("the mesh is back", mesh_tests::lab::PATIENCE, || {
            service_of(&broken[0].pod, &format!("http://{}:{HTTP}/", lab.pod("mesh/far").address()?))
                .map(drop)
        })
    });
}
