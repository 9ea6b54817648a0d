//! The guard where there is no tcx: filters of a clsact qdisc. `AMBIT_GUARD_HOOK=clsact` runs every other test so.

use std::fs;
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, ensure};
use mesh_ebpf_abi::event::Counter;
use mesh_tests::faulty::tripwire;
use mesh_tests::raw_bpf::{self, Kind};
use mesh_tests::{kernel, shell};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use node_agent::datapath::{Datapath, GuardHook};

use crate::family::Family;
use crate::kinds;
use crate::lifecycle::{Traces, nothing_pinned};
use crate::packets::{SYN, Sniffer, segment, send_raw};
use crate::world::{PATIENCE, PORT, Pod, World, accept, converse, enrol};

fn tc(pod: &Pod, words: &str) -> Result<String> {
    shell::run("tc", ["-n", pod.netns.name()].into_iter().chain(words.split(' ')))
}

/// The bpf filters on one side of eth0.
fn filters(pod: &Pod, side: &str) -> Result<Vec<String>> {
    let listing = tc(pod, &format!("filter show dev eth0 {side}"))?;
    Ok(listing.lines().filter(|line| line.contains("handle 0x616d6274")).map(str::to_owned).collect())
}

fn world(family: Family) -> Result<World> {
    let mut world = World::of(family)?;
    world.guard_hook = GuardHook::Clsact;
    Ok(world)
}

/// Both programs are filters then, no link is left of the guard, and nothing of either afterwards.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn filters_guard_a_pod_and_go_when_it_leaves() -> Result<()> {
    for family in [Family::V4, Family::V6] {
        let world = world(family)?;
        let before = Traces::of(&world.a)?;
        let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
        for (side, name) in [("ingress", "refuse"), ("egress", "guard")] {
            let filters = filters(&world.a, side)?;
            ensure!(filters.len() == 1 && filters[0].contains(name), "{side}: {filters:?}");
        }
        ensure!(!world.guard_pin(&world.a, GuardHook::Tcx)?.exists(), "a link as well");
        let mut sniffer = Sniffer::new(&world)?;
        send_raw(&world.a, &segment(world.a.at(5000), world.b.at(PORT), SYN), 0)?;
        ensure!(sniffer.tcp_from(&world.a, world.b.address)?.is_empty());
        ensure!(datapath.count(Counter::GuardApp)? == 1);
        datapath.leave(&world.a.uid)?;
        ensure!(Traces::of(&world.a)? == before);
        nothing_pinned(&world)?;
    }
    Ok(())
}

/// An agent that uses the other hook takes a pod over: guarded all the while, connections live on.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_goes_from_one_hook_to_the_other_and_back() -> Result<()> {
    if !kernel::names("tcx_link_attach")? {
        kernel::skipped("a_pod_goes_from_one_hook_to_the_other_and_back", "tcx (Linux 6.6)");
        return Ok(());
    }
    let mut world = World::new()?;
    let before = Traces::of(&world.a)?;
    world.guard_hook = GuardHook::Clsact;
    let (datapath, mut listeners) = world.enrolled(&[&world.a])?;
    let mut kept = listeners.remove(0);
    drop(datapath);
    let established = world.a.dial(world.b.at(PORT), PATIENCE)?;
    let accepted = accept(&kept.outbound_v4)?;
    let mut datapath = None;
    for hook in [GuardHook::Tcx, GuardHook::Clsact, GuardHook::Tcx] {
        world.guard_hook = hook;
        drop(datapath.take());
        let mut next = world.open()?;
        kept = next.prepare(&world.a.spec()?, Some(kept))?;
        next.capture(&world.a.uid)?;
        let expected = usize::from(hook == GuardHook::Clsact);
        for side in ["ingress", "egress"] {
            let filters = filters(&world.a, side)?;
            ensure!(filters.len() == expected, "{hook:?}, {side}: {filters:?}");
        }
        for pin in [GuardHook::Tcx, GuardHook::Clsact] {
            ensure!(world.guard_pin(&world.a, pin)?.exists() == (pin == hook), "{hook:?}, {pin:?}");
        }
        converse(&established, &accepted)?;
        let dropped = next.count(Counter::GuardApp)?;
        send_raw(&world.a, &segment(world.a.at(5000), world.b.at(PORT), SYN), 0)?;
        ensure!(next.count(Counter::GuardApp)? == dropped + 1, "{hook:?}: not guarded once");
        datapath = Some(next);
    }
    drop((kept, established, accepted));
    datapath.context("the last")?.leave(&world.a.uid)?;
    ensure!(Traces::of(&world.a)? == before);
    nothing_pinned(&world)
}

/// The next agent's program takes the place of the last one's in the same filter.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_filter_of_another_build_gets_this_ones_program() -> Result<()> {
    let world = world(Family::V4)?;
    let (datapath, mut listeners) = world.enrolled(&[&world.a])?;
    let kept = listeners.remove(0);
    drop(datapath);
    let ours = filters(&world.a, "egress")?;
    let other = world.bpffs.join("passes_all");
    raw_bpf::pin_one_that_passes_all(&other, Kind::Tcx)?;
    let place = "filter replace dev eth0 egress pref 1 protocol all handle 0x616d6274";
    tc(&world.a, &format!("{place} bpf da object-pinned {}", other.display()))?;
    fs::remove_file(&other)?;
    let mut sniffer = Sniffer::new(&world)?;
    let packet = segment(world.a.at(5000), world.b.at(PORT), SYN);
    send_raw(&world.a, &packet, 0)?;
    ensure!(sniffer.tcp_from(&world.a, world.b.address)?.len() == 1, "the other program drops");
    let mut datapath = world.open()?;
    datapath.prepare(&world.a.spec()?, Some(kept))?;
    datapath.capture(&world.a.uid)?;
    send_raw(&world.a, &packet, 0)?;
    ensure!(sniffer.tcp_from(&world.a, world.b.address)?.is_empty(), "not replaced");
    let now = filters(&world.a, "egress")?;
    let tag = |line: &str| line.split(" tag ").nth(1).map(str::to_owned);
    ensure!(now.len() == 1 && tag(&now[0]) == tag(&ours[0]), "{now:?} instead of {ours:?}");
    Ok(())
}

/// Others may take a filter off, or the qdisc with it: it is put back, once.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_filter_that_was_taken_off_comes_back() -> Result<()> {
    let world = world(Family::V4)?;
    let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
    let ids = || -> Result<Vec<String>> {
        Ok([filters(&world.a, "egress")?, filters(&world.a, "ingress")?].concat())
    };
    let before = ids()?;
    ensure!(before.len() == 2, "{before:?}");
    for removal in
        ["filter del dev eth0 egress pref 1 protocol all handle 0x616d6274 bpf", "qdisc del dev eth0 clsact"]
    {
        tc(&world.a, removal)?;
        ensure!(ids()?.len() < 2, "it is still there");
        datapath.upkeep();
        ensure!(ids()? == before, "{:?} instead of {before:?}", ids()?);
    }
    nothing_changes(&world, &mut datapath)
}

/// Of one priority the kernel asks the newest filter first, and one that decides ends the chain.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_filter_that_comes_before_ours_is_asked_after_it() -> Result<()> {
    let world = world(Family::V4)?;
    let pass = world.bpffs.join("passes_all");
    let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
    let mut sniffer = Sniffer::new(&world)?;
    let packet = segment(world.a.at(5000), world.b.at(PORT), SYN);
    raw_bpf::pin_one_that_passes_all(&pass, Kind::Tcx)?;
    for (side, count) in [("egress", 1), ("egress", 2), ("ingress", 1)] {
        let first = format!("filter add dev eth0 {side} pref 1 protocol all bpf da object-pinned");
        tc(&world.a, &format!("{first} {}", pass.display()))?;
        send_raw(&world.a, &packet, 0)?;
        let passed = sniffer.tcp_from(&world.a, world.b.address)?.len();
        ensure!(passed == usize::from(side == "egress"), "a test that proves nothing: {side} {passed}");
        datapath.upkeep();
        send_raw(&world.a, &packet, 0)?;
        ensure!(sniffer.tcp_from(&world.a, world.b.address)?.is_empty(), "it passed {side} {count}");
        let order = tc(&world.a, &format!("filter show dev eth0 {side}"))?;
        let order: Vec<_> = order.lines().filter(|line| line.contains(" handle 0x")).collect();
        let ours: Vec<_> = order.iter().map(|line| line.contains("handle 0x616d62")).collect();
        ensure!(ours.len() == count + 1 && ours[0] && !ours[1..].contains(&true), "{side}: {order:#?}");
    }
    nothing_changes(&world, &mut datapath)?;
    datapath.leave(&world.a.uid)?;
    ensure!(filters(&world.a, "egress")?.is_empty() && filters(&world.a, "ingress")?.is_empty());
    Ok(())
}

/// It hears of what it did itself, and finds all as it should be.
fn nothing_changes(world: &World, datapath: &mut Datapath) -> Result<()> {
    let monitor = world.a.run(|| {
        const RTMGRP_TC: u32 = 8;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, RTMGRP_TC))?;
        Ok(socket)
    })?;
    datapath.upkeep();
    let heard = recv(monitor.as_raw_fd(), &mut [0; 8192], MsgFlags::empty());
    ensure!(heard == Err(Errno::EAGAIN), "it goes on changing what is right: {heard:?}");
    Ok(())
}

/// A restarted agent lets pods go that it, or an agent of another version, did capture: without their network namespaces
/// it cannot, and they stay as they are; with them nothing is left.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_of_an_earlier_agent_is_let_go_where_it_is() -> Result<()> {
    for another_version in [false, true] {
        let world = world(Family::V4)?;
        let before = Traces::of(&world.a)?;
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        drop(datapath);
        if another_version {
            fs::rename(world.version(), world.version().with_file_name("v0"))?;
        }
        let mut datapath = world.open()?;
        let mut sniffer = Sniffer::new(&world)?;
        for _ in 0..2 {
            let error = datapath.leave(&world.a.uid).expect_err("its filters cannot be reached");
            ensure!(error.step.contains("filters"), "{error:?}");
            ensure!(datapath.surviving().len() == 1, "{:?}", datapath.surviving());
            let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
            converse(&client, &accept(&listeners[0].outbound_v4)?)?;
            send_raw(&world.a, &segment(world.a.at(5000), world.b.at(PORT), SYN), 0)?;
            ensure!(sniffer.tcp_from(&world.a, world.b.address)?.is_empty(), "in the clear");
            drop(datapath);
            datapath = world.open()?;
        }
        datapath.clear(&world.a.uid, Some(world.a.netns.descriptor()?))?;
        ensure!(filters(&world.a, "egress")?.is_empty(), "a filter is left");
        // What another version recorded of the settings inside is not read.
        ensure!(another_version || Traces::of(&world.a)? == before);
        nothing_pinned(&world)?;
    }
    Ok(())
}

/// Also from an interface that others come before: as many as are looked at.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn filters_go_from_behind_many_interfaces() -> Result<()> {
    for another_version in [false, true] {
        let world = world(Family::V4)?;
        kinds::eth0_behind(&world)?;
        let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
        if another_version {
            drop(datapath);
            fs::rename(world.version(), world.version().with_file_name("v0"))?;
            datapath = world.open()?;
        }
        kinds::before_eth0(&world.a)?;
        match another_version {
            false => datapath.leave(&world.a.uid)?,
            true => datapath.clear(&world.a.uid, Some(world.a.netns.descriptor()?))?,
        }
        let left = [filters(&world.a, "egress")?, filters(&world.a, "ingress")?].concat();
        ensure!(left.is_empty(), "of another version: {another_version}: {left:?}");
        nothing_pinned(&world)?;
        let app = world.b.serve()?;
        converse(&world.a.dial(world.b.at(PORT), PATIENCE)?, &app.accept()?.0)?;
    }
    Ok(())
}

/// What is another's on the same interface is left alone, and decides nothing before the guard has.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn another_filter_stays_and_does_not_decide_first() -> Result<()> {
    let world = world(Family::V4)?;
    tc(&world.a, "qdisc add dev eth0 clsact")?;
    let pass = world.bpffs.join("passes_all");
    raw_bpf::pin_one_that_passes_all(&pass, Kind::Tcx)?;
    let last = "filter add dev eth0 egress pref 2 protocol all bpf da object-pinned";
    tc(&world.a, &format!("{last} {}", pass.display()))?;
    let before = Traces::of(&world.a)?;
    let theirs = tc(&world.a, "filter show dev eth0 egress")?;
    let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
    let mut sniffer = Sniffer::new(&world)?;
    send_raw(&world.a, &segment(world.a.at(5000), world.b.at(PORT), SYN), 0)?;
    ensure!(sniffer.tcp_from(&world.a, world.b.address)?.is_empty(), "it passed");
    datapath.leave(&world.a.uid)?;
    ensure!(Traces::of(&world.a)? == before);
    ensure!(tc(&world.a, "filter show dev eth0 egress")? == theirs);
    Ok(())
}

/// An ingress qdisc is in the place of clsact, and would run the guard on what comes in.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn in_the_place_of_another_qdisc_there_is_no_guard() -> Result<()> {
    let world = world(Family::V4)?;
    tc(&world.a, "qdisc add dev eth0 ingress")?;
    let before = Traces::of(&world.a)?;
    let mut datapath = world.open()?;
    let _listeners = datapath.prepare(&world.a.spec()?, None)?;
    let error = datapath.capture(&world.a.uid).expect_err("captured");
    ensure!(error.source.to_string().contains("\"ingress\""), "{error:?}");
    datapath.leave(&world.a.uid)?;
    ensure!(Traces::of(&world.a)? == before);
    let app = world.b.serve()?;
    let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
    converse(&client, &app.accept()?.0)
}

/// A kernel with neither hook: the agent runs, and refuses each pod with the reason before it changes anything.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_a_hook_no_pod_is_enrolled() -> Result<()> {
    let mut world = World::new()?;
    world.guard_hook = GuardHook::Auto;
    let before = Traces::of(&world.a)?;
    let open = || {
        tripwire::without_interface_hooks()?;
        Ok(Datapath::open(&world.config())?)
    };
    let mut datapath = world.router.run(open)?;
    let error = datapath.prepare(&world.a.spec()?, None).expect_err("prepared");
    let reason = error.source.to_string();
    ensure!(reason.contains("tcx") && reason.contains("clsact"), "{reason}");
    ensure!(enrol(&mut datapath, &world.a).is_err());
    ensure!(Traces::of(&world.a)? == before);
    nothing_pinned(&world)
}
