//! Enrolling a running pod, restarting the agent, letting pods go.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use mesh_ebpf_abi::event::Counter;
use mesh_ebpf_abi::{Address, PodAddress};
use mesh_tests::shell;
use node_agent::datapath::{Config, Datapath};

use crate::family::over_both;
use crate::packets::{SYN, Sniffer, segment, send_raw};
use crate::world::{PATIENCE, PORT, Pod, REFUSAL, World, accept, converse, enrol, idle};

/// Capture goes on while no agent runs, and the next agent takes the pod over without a gap.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn capture_survives_the_agent() -> Result<()> {
    over_both(|world| {
        let before = Traces::of(&world.a)?;
        let (datapath, mut listeners) = world.enrolled(&[&world.a])?;
        let kept = listeners.remove(0);
        let established = world.a.dial(world.b.at(PORT), PATIENCE)?;
        let accepted = accept(world.family.outbound(&kept))?;
        drop(datapath);
        let meanwhile = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&meanwhile, &accept(world.family.outbound(&kept))?)?;

        let mut datapath = world.open()?;
        let survivors = datapath.surviving();
        ensure!(survivors.len() == 1 && survivors[0].uid == world.a.uid, "{survivors:?}");
        ensure!(survivors[0].addresses == world.a.spec()?.addresses);
        converse(&established, &accepted)?;
        let listeners = datapath.prepare(&world.a.spec()?, Some(kept))?;
        datapath.capture(&world.a.uid)?;
        let after = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&after, &accept(world.family.outbound(&listeners))?)?;
        let mut sniffer = Sniffer::new(world)?;
        converse(&established, &accepted)?;
        ensure!(sniffer.tcp_from(&world.a, world.b.address)?.is_empty());

        drop((listeners, established, accepted));
        datapath.leave(&world.a.uid)?;
        ensure!(Traces::of(&world.a)? == before);
        nothing_pinned(world)
    })
}

/// A pod that is enrolled a second time without its listeners gets new ones, in the same slots.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn new_listeners_take_over_at_once() -> Result<()> {
    over_both(|world| {
        let (mut datapath, listeners) = world.enrolled(&[&world.a])?;
        let again = enrol(&mut datapath, &world.a)?;
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&client, &accept(world.family.outbound(&again))?)?;
        ensure!(idle(world.family.outbound(&listeners[0]))?);
        ensure!(datapath.surviving().len() == 1);
        Ok(())
    })
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn leaving_restores_everything() -> Result<()> {
    over_both(|world| {
        world.a.netns.sysctl(&world.family.sysctl("fwmark_reflect"), "1")?;
        let before = Traces::of(&world.a)?;
        let (mut datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
        ensure!(Traces::of(&world.a)? != before);
        drop(listeners);
        datapath.leave(&world.a.uid)?;
        datapath.leave(&world.b.uid)?;
        datapath.leave("a-pod-that-never-was")?;
        ensure!(Traces::of(&world.a)? == before);
        ensure!(datapath.surviving().is_empty());
        nothing_pinned(world)?;
        let app = world.b.serve()?;
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&client, &app.accept()?.0)
    })
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_died_can_leave() -> Result<()> {
    let mut world = World::new()?;
    let (mut datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    drop(listeners);
    world.forget_a()?;
    datapath.leave(&world.a.uid)?;
    ensure!(!world.pod_pins(&world.a).exists() && world.pod_pins(&world.b).exists());
    Ok(())
}

/// Pods that died while no agent ran are cleared away by the next one.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_died_meanwhile_is_swept() -> Result<()> {
    let mut world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    drop((datapath, listeners));
    world.forget_a()?;
    mesh_tests::eventually("the network namespace is gone", PATIENCE, || {
        let datapath = world.open()?;
        let uids: Vec<_> = datapath.surviving().into_iter().map(|pod| pod.uid).collect();
        ensure!(uids == [world.b.uid.clone()], "{uids:?}");
        ensure!(!world.pod_pins(&world.a).exists());
        Ok(())
    })
}

/// An address that a pod has no more may be another's soon, which would be taken for this pod.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_prepared_with_fewer_addresses_is_not_known_by_the_others() -> Result<()> {
    let world = World::new()?;
    let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
    let known = || -> Result<Vec<IpAddr>> {
        let pin = world.version().join("maps").join(mesh_ebpf_abi::map::PODIP);
        let map = aya::maps::Map::HashMap(aya::maps::MapData::from_pin(pin)?);
        let map = aya::maps::HashMap::<_, Address, PodAddress>::try_from(map)?;
        let mut known = map.keys().map(|address| Ok(address?.to_ip())).collect::<Result<Vec<_>>>()?;
        known.sort();
        Ok(known)
    };
    ensure!(known()? == [IpAddr::V4(world.a.v4), IpAddr::V6(world.a.v6)]);
    datapath.prepare(&world.a.spec_with(vec![world.a.v4.into()])?, None)?;
    ensure!(known()? == [IpAddr::V4(world.a.v4)]);
    datapath.leave(&world.a.uid)?;
    ensure!(known()?.is_empty());
    Ok(())
}

/// A step that fails undoes those before it: here the route, whose source is not an address of the pod.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_failed_preparation_leaves_no_trace() -> Result<()> {
    over_both(|world| {
        let before = Traces::of(&world.a)?;
        let mut datapath = world.open()?;
        let mut spec = world.a.spec()?;
        spec.addresses = vec!["10.77.0.1".parse()?, world.a.v6.into()];
        let error = datapath.prepare(&spec, None).err().ok_or_else(|| anyhow::anyhow!("prepared"))?;
        ensure!(error.to_string().contains("routes"), "{error}");
        ensure!(Traces::of(&world.a)? == before);
        let mut nowhere = Datapath::open(&Config { proc: "/nonexistent".into(), ..world.config() })?;
        let error =
            nowhere.prepare(&world.a.spec()?, None).err().ok_or_else(|| anyhow::anyhow!("prepared"))?;
        ensure!(error.to_string().contains("sysctls"), "{error}");
        ensure!(Traces::of(&world.a)? == before);
        nothing_pinned(world)
    })
}

/// The last hook cannot be pinned: the pod is as free as before, and captured when the obstacle is gone.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_failed_capture_captures_nothing() -> Result<()> {
    over_both(|world| {
        let mut datapath = world.open()?;
        let listeners = datapath.prepare(&world.a.spec()?, None)?;
        let obstacle = world.guard_pin(&world.a, world.guard_hook)?;
        fs::create_dir_all(obstacle.join("in-the-way"))?;
        ensure!(datapath.capture(&world.a.uid).is_err());
        let app = world.b.serve()?;
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&client, &app.accept()?.0)?;
        fs::remove_dir(obstacle.join("in-the-way"))?;
        fs::remove_dir(&obstacle)?;
        datapath.capture(&world.a.uid)?;
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&client, &accept(world.family.outbound(&listeners))?)
    })
}

/// Two agents on one kernel, as in a lab, know nothing of each other.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_a_setting_the_cgroup_is_found() -> Result<()> {
    let world = World::new()?;
    let mut datapath = Datapath::open(&Config { cgroup_root: None, ..world.config() })?;
    let listeners = enrol(&mut datapath, &world.a)?;
    let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
    converse(&client, &accept(world.family.outbound(&listeners))?)?;
    let _app = world.a.serve()?;
    ensure!(world.b.dial(world.a.at(PORT), REFUSAL).is_ok());
    Ok(())
}

/// As where a pod gets a second network while it runs.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_interface_that_comes_later_is_guarded() -> Result<()> {
    over_both(|world| {
        let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
        world.second_network(&world.a, "net1", 1)?;
        let (ours, theirs) = world.family.pick(("10.97.1.2", "10.97.1.1"), ("fd97:1::2", "fd97:1::1"));
        let mut sniffer = Sniffer::new(world)?;
        let packet =
            segment(SocketAddr::new(ours.parse()?, 5000), SocketAddr::new(theirs.parse()?, PORT), SYN);
        send_raw(&world.a, &packet, 0)?;
        sniffer.wait("a packet before the guard", |seen| seen.from.port() == 5000)?;
        datapath.upkeep();
        send_raw(&world.a, &packet, 0)?;
        mesh_tests::eventually("the guard is asked", PATIENCE, || {
            ensure!(datapath.count(Counter::GuardApp)? == 1);
            Ok(())
        })?;
        datapath.leave(&world.a.uid)?;
        nothing_pinned(world)
    })
}

/// What enrolment changes inside a pod.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Traces {
    rules: String,
    routes: String,
    sysctls: Vec<String>,
    qdiscs: String,
}

impl Traces {
    pub(crate) fn of(pod: &Pod) -> Result<Self> {
        let ip = |what: &[&str]| shell::run("ip", ["-n", pod.netns.name()].iter().chain(what));
        let sysctls = ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"];
        Ok(Self {
            rules: ip(&["rule", "list"])? + &ip(&["-6", "rule", "list"])?,
            routes: ip(&["route", "list", "table", "all"])? + &ip(&["-6", "route", "list", "table", "all"])?,
            qdiscs: shell::run("tc", ["-n", pod.netns.name(), "qdisc", "show"])?,
            sysctls: sysctls.iter().map(|name| pod.sysctl(name)).collect::<Result<_>>()?,
        })
    }
}

pub(crate) fn nothing_pinned(world: &World) -> Result<()> {
    let links = world.pod_pins(&world.a);
    let links = links.parent().unwrap_or(&links);
    let mut names: Vec<_> = fs::read_dir(links)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    // Of no pod, and not of every agent.
    names.retain(|name| name != "probes");
    ensure!(names == ["capture4", "capture6"], "{names:?}");
    Ok(())
}
