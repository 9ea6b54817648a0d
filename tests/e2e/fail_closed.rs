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
    mesh: bool,
    service: bool,
    outside: bool,
    udp: bool,
    icmp: bool,
}

impl Broken<'_> {
    fn start<'a>(lab: &'a Lab, name: &str, rules: bool, listeners: bool) -> anyhow::Result<Broken<'a>> {
        let pod = Workload::new("mesh", name).on_node(1).start(lab)?;
        pod.captured()?;
        Ok(Broken { pod, rules, listeners })
    }

    /// Take away what it has to lack; what is gone already stays gone.
    fn break_it(&self, lab: &Lab) -> anyhow::Result<()> {
        let left = || self.pod.exec_from_node(["ip", "rule", "list"])?.ok("ip");
        if self.rules {
            for priority in ["100", "101"] {
                // Of several of one priority one goes at a time.
                while left()?.contains(&format!("{priority}:\t")) {
                    self.pod.exec_from_node(["ip", "rule", "del", "pref", priority])?.ok("ip")?;
                }
            }
        } else {
            anyhow::ensure!(left()?.contains("100:"), "the rules are gone: {}", left()?);
        }
        if self.listeners {
            take_listeners(lab, self.pod.address()?)?;
        }
        Ok(())
    }

    /// Whether somebody is there to carry its connections.
    fn is_served(&self, ztunnel: bool) -> bool {
        ztunnel && !self.listeners
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
fn attempt(pod: &PodRef<'_>, mesh: SocketAddr, service: IpAddr) -> anyhow::Result<Attempts> {
    let outside = fabric::outside(Family::V4);
    let get = |url: String| format!("curl -s -o /dev/null --max-time 2 http://{url}/ & ");
    let script = format!(
        "{}m=$!; {}s=$!; {}o=$!; \
         ambit-example datagram {outside}:7 word >/dev/null; u=$?; ambit-example ping {outside} >/dev/null; i=$?; \
         wait $m; m=$?; wait $s; s=$?; wait $o; echo $m $s $? $u $i",
        get(mesh.to_string()),
        get(service.to_string()),
        get(outside.to_string()),
    );
    let output = pod.exec_ok(["bash", "-c", &script])?;
    let codes: Vec<bool> = output.split_whitespace().map(|code| code == "0").collect();
    let [mesh, service, outside, udp, icmp] = codes[..] else { anyhow::bail!("it says {output:?}") };
    Ok(Attempts { mesh, service, outside, udp, icmp })
}

/// All pods try everything while this much of the mesh is there.
fn round(lab: &Lab, state: &str, ztunnel: bool, broken: &[Broken<'_>]) -> anyhow::Result<()> {
    let mesh = SocketAddr::new(lab.pod("mesh/far").address()?, HTTP);
    let service = lab.service_address("mesh", "web")?;
    broken.iter().try_for_each(|broken| broken.break_it(lab))?;
    let plain = lab.pod("plain/client");
    let capture = lab.capture("fail-closed")?;
    let (control, attempts) = std::thread::scope(|scope| {
        let control = scope.spawn(|| attempt(&plain, mesh, service));
        let all: Vec<_> =
            broken.iter().map(|broken| scope.spawn(move || attempt(&broken.pod, mesh, service))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, anyhow::Result<Attempts>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
        };
        Ok::<_, anyhow::Error>((
            join(control)?,
            all.into_iter().map(join).collect::<anyhow::Result<Vec<_>>>()?,
        ))
    })?;
    let captured = capture.stop()?;
    let seen = |from: IpAddr, wanted: &dyn Fn(&Packet<'_>) -> bool| {
        captured
            .count(|packet| packet.protocol == Protocol::Tcp && packet.source.ip() == from && wanted(packet))
    };
    let outside = SocketAddr::from((fabric::outside(Family::V4), 80));
    // The same calls of a pod outside the mesh are on the fabric, so what is not seen was not sent.
    let of_plain = plain.address()?;
    for destination in [mesh, outside] {
        let sent = seen(of_plain, &|packet| packet.destination == destination);
        anyhow::ensure!(sent > 0, "{state}: the control's call to {destination} is not on the fabric");
    }
    anyhow::ensure!(
        control.mesh && control.outside && control.udp && control.icmp,
        "{state}: the control got {control:?}"
    );
    let mut known = BTreeSet::from([of_plain]);
    for (broken, attempts) in broken.iter().zip(attempts) {
        let (from, served) = (broken.pod.address()?, broken.is_served(ztunnel));
        let what = format!("{state}, rules gone: {}, listeners gone: {}", broken.rules, broken.listeners);
        let clear = seen(from, &|packet| {
            packet.destination.port() != HBONE && (!served || packet.destination != outside)
        });
        anyhow::ensure!(clear == 0, "{what}: {clear} packets in the clear");
        anyhow::ensure!(attempts.udp && attempts.icmp, "{what}: what is not captured stopped: {attempts:?}");
        if served {
            let tunnelled =
                seen(from, &|packet| packet.destination.port() == HBONE && !packet.payload.is_empty());
            anyhow::ensure!(attempts.mesh && attempts.service && attempts.outside, "{what}: {attempts:?}");
            anyhow::ensure!(tunnelled > 0, "{what}: nothing went through the tunnel");
        } else {
            let none = !(attempts.mesh || attempts.service || attempts.outside);
            anyhow::ensure!(none, "{what}: somebody answered: {attempts:?}");
        }
        known.insert(from);
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
        round(lab, "all there", true, &broken)?;
        let no_agent = agent.kill_and_hold()?;
        round(lab, "agent gone", true, &broken)?;
        let no_ztunnel = ztunnel.kill_and_hold()?;
        round(lab, "agent and ztunnel gone", false, &broken)?;
        no_agent.release()?;
        round(lab, "ztunnel gone", false, &broken)?;
        no_ztunnel.release()?;
        // What is whole is served again.
        mesh_tests::eventually("the mesh is back", mesh_tests::lab::PATIENCE, || {
            service_of(&broken[0].pod, &format!("http://{}:{HTTP}/", lab.pod("mesh/far").address()?))
                .map(drop)
        })
    });
}
