//! Pods of uncommon kinds: with users of their own (`hostUsers: false`), with several interfaces.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_ebpf_abi::event::Counter;
use mesh_tests::netns::Netns;
use mesh_tests::{eventually, shell};
use node_agent::datapath::{Datapath, Listeners, Part};

use crate::captured::wrong;
use crate::lifecycle::Traces;
use crate::packets::{SYN, Segment, Sniffer, segment, send_raw};
use crate::world::{PATIENCE, PORT, Pod, World, accept, converse};

/// A process that keeps a user namespace, and a network namespace that it owns.
struct Owner(Child);

impl Owner {
    fn start() -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "sleep", "600"]);
        let owner = Self(command.spawn().context("unshare")?);
        let namespace = owner.netns();
        eventually("it has namespaces of its own", PATIENCE, || {
            let (own, its) = (fs::read_link("/proc/self/ns/net")?, fs::read_link(&namespace)?);
            ensure!(own != its, "it is in {}", its.display());
            Ok(())
        })?;
        Ok(owner)
    }

    fn netns(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.0.id()))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Its network namespace belongs to another user namespace, in which the agent is nobody's root.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_with_users_of_its_own_joins_and_leaves() -> Result<()> {
    let mut world = World::new()?;
    let owner = Owner::start()?;
    let name = world.a.netns.name().to_owned();
    mesh_tests::netns::remove(&name);
    shell::run("ip", ["netns", "attach", &name, &owner.0.id().to_string()])?;
    world.a.netns = Netns::open(&name, &owner.netns())?;
    world.a.netns.ip("link set lo up\n")?;
    world.wire(&world.a, 1)?;
    let before = Traces::of(&world.a)?;
    let (mut datapath, listeners) = world.enrolled(&[&world.a])?;
    let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
    converse(&client, &accept(&listeners[0].outbound_v4)?)?;
    let app = world.a.serve()?;
    let client = world.b.dial(world.a.at(PORT), PATIENCE)?;
    converse(&client, &accept(&listeners[0].inbound_v4)?)?;
    drop((client, listeners, app));
    datapath.leave(&world.a.uid)?;
    ensure!(Traces::of(&world.a)? == before);
    Ok(())
}

/// Who administers a pod's network can make any number of interfaces, again and again: that is told of, costs others
/// nothing, and leaves nothing behind. A pod that has them before is not enrolled.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_with_many_interfaces_is_told_of_and_costs_no_more_than_others() -> Result<()> {
    const MANY: usize = 30;
    let world = World::new()?;
    let pins = || -> Result<usize> { Ok(fs::read_dir(world.pod_pins(&world.a))?.count()) };
    make(&world.b, 0, MANY)?;
    let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
    datapath.prepare(&world.b.spec()?, None)?;
    let error = datapath.capture(&world.b.uid).expect_err("captured");
    ensure!(error.source.to_string().contains("more than 16 interfaces"), "{error:?}");
    ensure!(!world.pod_pins(&world.b).exists(), "something of it is attached");
    let few = pins()?;
    for round in 0..2 {
        make(&world.a, round * MANY, MANY)?;
        datapath.upkeep();
        let now = pins()?;
        ensure!(now > few && now <= few + 2 * 16, "{now} pins in round {round}, {few} before");
        ensure!(wrong(&datapath, &world.a, false)? == [Part::Guard].into());
        unmake(&world.a)?;
        eventually("all of it is gone", PATIENCE, || {
            datapath.upkeep();
            ensure!(pins()? == few, "{} pins, {few} before", pins()?);
            Ok(())
        })?;
        ensure!(wrong(&datapath, &world.a, false)?.is_empty());
    }
    unmake(&world.b)?;
    datapath.capture(&world.b.uid)?;
    Ok(())
}

/// Interfaces that come and go all the while, also while they are looked at, are no failure and leave nothing behind.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_is_kept_for_interfaces_goes_with_them() -> Result<()> {
    const MANY: usize = 15;
    const LONG: Duration = Duration::from_secs(6);
    let world = World::new()?;
    let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
    let pins = || -> Result<usize> { Ok(fs::read_dir(world.pod_pins(&world.a))?.count()) };
    let links = || -> Result<usize> {
        let all = fs::read_dir("/proc/self/fd")?.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
        // As a new link is called, and one that was opened by its pin.
        let names = ["anon_inode:bpf_link", "anon_inode:bpf-link"].map(Path::new);
        Ok(all.filter(|to| names.contains(&to.as_path())).count())
    };
    let (few, held, begin) = (pins()?, links()?, Instant::now());
    ensure!(held > 0);
    let come_and_go = || -> Result<()> {
        while begin.elapsed() < LONG {
            make(&world.a, 0, MANY)?;
            unmake(&world.a)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let others = scope.spawn(come_and_go);
        while !others.is_finished() {
            datapath.upkeep();
            let now = (pins()?, links()?);
            let bounded = now.0 <= few + 2 * MANY && now.1 <= held + 2 * MANY;
            ensure!(bounded, "{now:?} pins and links, {:?} before", (few, held));
        }
        others.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
    })?;
    make(&world.a, 0, MANY)?;
    eventually("those that stay are guarded", PATIENCE, || {
        datapath.upkeep();
        ensure!(pins()? == few + 2 * MANY, "{} pins, {few} before", pins()?);
        Ok(())
    })?;
    unmake(&world.a)?;
    eventually("nothing is kept", PATIENCE, || {
        datapath.upkeep();
        ensure!((pins()?, links()?) == (few, held), "{:?}, {:?} before", (pins()?, links()?), (few, held));
        Ok(())
    })
}

/// Has eth0 of pod a made again, so that there are numbers free before its own.
pub(crate) fn eth0_behind(world: &World) -> Result<()> {
    let used: String = (0..BEFORE).map(|one| format!("link add d{one} group 7 type bridge\n")).collect();
    world.a.netns.ip(&format!("{used}link del eth0\n"))?;
    world.wire(&world.a, 1)?;
    unmake(&world.a)
}

/// Makes interfaces that the kernel tells of before eth0, more than are looked at.
pub(crate) fn before_eth0(pod: &Pod) -> Result<()> {
    let line = shell::run("ip", ["-n", pod.netns.name(), "-o", "link", "show", "eth0"])?;
    let eth0: usize = line.split_once(':').context("ip link show")?.0.parse()?;
    let add = (1..=BEFORE).map(|one| format!("link add d{one} index {} group 7 type bridge\n", eth0 - one));
    pod.netns.ip(&add.collect::<String>())
}

const BEFORE: usize = 17;

/// Makes so many interfaces, whose names begin with this number.
fn make(pod: &Pod, begin: usize, many: usize) -> Result<()> {
    let lines = (begin..begin + many).map(|number| format!("link add d{number} group 7 type bridge\n"));
    pod.netns.ip(&lines.collect::<String>())
}

fn unmake(pod: &Pod) -> Result<()> {
    shell::run("ip", ["-n", pod.netns.name(), "link", "del", "group", "7"]).map(drop)
}

/// What another version guards stays guarded by it, while this one could not guard all.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_with_many_interfaces_is_not_taken_over() -> Result<()> {
    let world = World::new()?;
    eth0_behind(&world)?;
    let (datapath, mut listeners) = world.enrolled(&[&world.a])?;
    drop(datapath);
    fs::rename(world.version(), world.version().with_file_name("v0"))?;
    before_eth0(&world.a)?;
    let mut datapath = world.open()?;
    let mut sniffer = Sniffer::new(&world)?;
    let mut guarded = |when: &str| -> Result<()> {
        send_raw(&world.a, &segment(world.a.at(5000), world.b.at(PORT), SYN), 0)?;
        let seen = sniffer.tcp_from(&world.a, world.b.address)?;
        ensure!(seen.is_empty(), "{when}: {seen:?}");
        Ok(())
    };
    let kept = datapath.prepare(&world.a.spec()?, listeners.pop())?;
    for _ in 0..2 {
        let error = datapath.capture(&world.a.uid).expect_err("taken over");
        ensure!(error.source.to_string().contains("more than 16 interfaces"), "{error:?}");
        guarded("not taken over")?;
        ensure!(datapath.surviving().len() == 1, "{:?}", datapath.surviving());
    }
    unmake(&world.a)?;
    datapath.capture(&world.a.uid)?;
    ensure!(!world.version().with_file_name("v0").exists(), "the other version is still there");
    guarded("taken over")?;
    converse(&world.a.dial(world.b.at(PORT), PATIENCE)?, &accept(&kept.outbound_v4)?)
}

/// Connections by any of them are captured, and none lets out what is not the proxy's; also one that came later, once
/// the pod is looked at again.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn every_interface_of_a_pod_is_captured_and_guarded() -> Result<()> {
    let world = World::new()?;
    world.second_network(&world.a, "eth1", 4)?;
    let (mut datapath, mut listeners) = world.enrolled(&[&world.a])?;
    let kept = listeners.remove(0);
    let mut sniffer = Sniffer::new(&world)?;
    let mut guarded = |datapath: &Datapath, listeners: &Listeners, net: u8, guards: u64| -> Result<()> {
        let there = format!("10.97.{net}.1:{PORT}").parse::<SocketAddr>()?;
        let client = world.a.dial(there, PATIENCE)?;
        converse(&client, &accept(&listeners.outbound_v4)?)?;
        send_raw(&world.a, &segment(format!("10.97.{net}.2:5000").parse()?, there, SYN), 0)?;
        // What comes from its other addresses would be among these, too.
        let from = |segment: &Segment| segment.to.ip() == there.ip();
        let seen: Vec<_> = sniffer.all_until(&world.a, world.b.address)?.into_iter().filter(from).collect();
        ensure!(seen.is_empty(), "out by the interface to {there}: {seen:?}");
        ensure!(datapath.count(Counter::GuardApp)? == guards, "not by the guard");
        Ok(())
    };
    guarded(&datapath, &kept, 4, 1)?;
    world.second_network(&world.a, "eth2", 5)?;
    let kept = datapath.prepare(&world.a.spec()?, Some(kept))?;
    datapath.capture(&world.a.uid)?;
    guarded(&datapath, &kept, 5, 2)
}
