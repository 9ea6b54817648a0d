//! Capture is proved from inside the pod: what is whole is found whole and nobody notices, what is taken away is found,
//! shut meanwhile, and put back.

use std::any::Any;
use std::collections::BTreeSet;
use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use mesh_ebpf_abi::event::Counter;
use mesh_ebpf_abi::{Address, NetnsConfig, PodAddress, canary};
use mesh_tests::raw_bpf::{self, Kind};
use mesh_tests::{kernel, shell};
use node_agent::datapath::{Datapath, GuardHook, Listeners, Part};
use socket2::SockRef;

use crate::packets::Sniffer;
use crate::proxy::Proxy;
use crate::world::{PATIENCE, PORT, Pod, World, idle};

/// The parts of a pod's capture that are found wrong.
pub(crate) fn wrong(datapath: &Datapath, pod: &Pod, answers: bool) -> Result<BTreeSet<Part>> {
    let mut proofs = datapath.survey(&[pod.uid.clone()].into());
    let flaws = proofs.remove(&pod.uid).context("no proof")?(answers)?;
    if !flaws.is_empty() {
        println!("{flaws:?}");
    }
    Ok(flaws.into_iter().map(|flaw| flaw.part).collect())
}

pub(crate) fn repair(datapath: &mut Datapath, pod: &Pod, kept: &Listeners) -> Result<Listeners> {
    let spec = datapath.spec(&pod.uid)?;
    let listeners = datapath.prepare(&spec, Some(kept.try_clone()?))?;
    datapath.capture(&pod.uid)?;
    datapath.guard_again(&pod.uid)?;
    Ok(listeners)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_captured_pod_is_proved_and_nothing_is_counted_or_told() -> Result<()> {
    let world = World::new()?;
    let (mut datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    let _proxy = Proxy::start(&world, &datapath, &listeners)?;
    let counts = |datapath: &Datapath| -> Result<Vec<u64>> {
        Counter::ALL.iter().map(|counter| Ok(datapath.count(*counter)?)).collect()
    };
    while datapath.next_drop().is_some() {}
    let before = counts(&datapath)?;
    for pod in [&world.a, &world.b] {
        for answers in [true, false] {
            let wrong = wrong(&datapath, pod, answers)?;
            ensure!(wrong.is_empty(), "{wrong:?}");
        }
    }
    let after = counts(&datapath)?;
    ensure!(after == before, "{:?}: {before:?}, then {after:?}", Counter::ALL);
    ensure!(datapath.next_drop().is_none(), "a canary is told of");
    let sockets = shell::run("ip", ["netns", "exec", world.a.netns.name(), "cat", "/proc/net/tcp"])?;
    // The proxy's listeners are bound there.
    let left = |line: &str| line.contains("010200C0") && !line.contains(" 0A ");
    ensure!(!sockets.lines().any(left), "something of a canary is left:\n{sockets}");
    Ok(())
}

/// Whoever dials there gets the word, and no further.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_app_that_plays_the_canary_is_answered_and_nothing_opens() -> Result<()> {
    let world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    let _proxy = Proxy::start(&world, &datapath, &listeners)?;
    let mut sniffer = Sniffer::new(&world)?;
    let to = SocketAddr::from((canary::V4, canary::PORT));
    let mut answer = Vec::new();
    world.a.dial(to, PATIENCE)?.read_to_end(&mut answer)?;
    ensure!(answer == canary::ANSWER, "{answer:?}");
    // On another port it is an address as any other.
    met(world.a.dial(SocketAddr::from((canary::V4, 80)), PATIENCE))?;
    let raw = crate::packets::segment(world.a.at(5000), to, crate::packets::SYN);
    crate::packets::send_raw(&world.a, &raw, 0)?;
    let seen = sniffer.all_until(&world.a, world.b.address)?;
    ensure!(!seen.iter().any(|one| one.to == to), "{seen:?}");
    Ok(())
}

/// Without them the answer to what came in has a way out.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn nothing_of_a_canary_leaves_a_pod_without_its_rules() -> Result<()> {
    let world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a])?;
    let _proxy = Proxy::start(&world, &datapath, &listeners)?;
    for words in ["-4 rule del priority 100", "-4 rule del priority 101"] {
        ip(&world, words)?;
    }
    let mut sniffer = Sniffer::new(&world)?;
    ensure!(wrong(&datapath, &world.a, true)?.contains(&Part::Rules));
    let seen = sniffer.all_until(&world.a, world.b.address)?;
    ensure!(!seen.iter().any(|one| one.to.ip() == canary::V4), "{seen:?}");
    Ok(())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_a_proxy_nothing_waits_for_it_and_the_rest_is_proved() -> Result<()> {
    let world = World::new()?;
    let (datapath, listeners) = world.enrolled(&[&world.a])?;
    ensure!(wrong(&datapath, &world.a, false)?.is_empty());
    for listener in crate::family::all(&listeners[0]) {
        ensure!(idle(listener)?, "a canary is in the proxy's way");
    }
    ensure!(wrong(&datapath, &world.a, true)? == [Part::Proxy].into());
    // An agent elsewhere proves the rest of the way.
    world.outside(|| {
        ensure!(wrong(&datapath, &world.a, true)? == [Part::Connect, Part::Proxy].into());
        Ok(())
    })?;
    let datapath = {
        drop(datapath);
        let mut datapath = world.outside(|| world.open())?;
        datapath.prepare(&world.a.spec()?, Some(listeners[0].try_clone()?))?;
        datapath.capture(&world.a.uid)?;
        datapath
    };
    world.outside(|| {
        ensure!(wrong(&datapath, &world.a, true)? == [Part::Proxy].into());
        Ok(())
    })
}

type Held = Box<dyn Any>;
type Loss = (&'static str, Part, fn(&World) -> Result<Held>);

/// What somebody does to pod a, and the part that is to be found wrong.
const LOSSES: [Loss; 13] = [
    ("the rule for lo", Part::Rules, |world| ip(world, "-4 rule del priority 100")),
    ("the IPv6 rule for lo", Part::Rules, |world| ip(world, "-6 rule del priority 100")),
    ("the rule for the mark", Part::Rules, |world| ip(world, "-4 rule del priority 101")),
    ("the IPv6 route", Part::Rules, |world| ip(world, "-6 route flush table 1337")),
    ("the rule for DNS", Part::Dns, |world| ip(world, "-4 rule del priority 102")),
    ("a sysctl", Part::Settings, |world| {
        world.a.netns.sysctl("ipv4/fwmark_reflect", "0")?;
        held(())
    }),
    ("sk_lookup", Part::SkLookup, |world| held(raw_bpf::detach(&world.pod_pins(&world.a).join("steer"))?)),
    ("an address in the map", Part::SkLookup, |world| {
        let mut map = map::<Address, PodAddress>(world, "PODIP")?;
        held(map.remove(&Address::from(IpAddr::V6(world.a.v6)))?)
    }),
    ("the entry for connect()", Part::Connect, |world| {
        let mut map = map::<u64, NetnsConfig>(world, "NSCFG")?;
        let all = map.keys().collect::<Result<Vec<_>, _>>()?;
        held(all.iter().try_for_each(|key| map.remove(key))?)
    }),
    ("the IPv4 program on connect()", Part::Connect, |world| {
        held(raw_bpf::detach(&world.version().join("links/capture4"))?)
    }),
    ("the IPv6 program on connect()", Part::Connect, |world| {
        held(raw_bpf::detach(&world.version().join("links/capture6"))?)
    }),
    ("a socket in the map", Part::Listeners, |world| {
        let map = MapData::from_pin(world.version().join("maps/LISTEN"))?;
        let mut map = aya::maps::SockMap::try_from(Map::SockMap(map))?;
        held((0..16).try_for_each(|index| map.clear_index(&index))?)
    }),
    ("another guard that lets all pass", Part::Guard, |world| {
        let hook = world.guard_hook;
        if hook == GuardHook::Clsact || !kernel::names("tcx_link_attach")? {
            shell::run("tc", ["-n", world.a.netns.name(), "qdisc", "del", "dev", "eth0", "clsact"])?;
            return held(());
        }
        let pin = world.guard_pin(&world.a, GuardHook::Tcx)?;
        held(raw_bpf::replace_by_one_that_passes_all(&pin, Kind::Tcx)?)
    }),
];

fn held(guard: impl Any) -> Result<Held> {
    Ok(Box::new(guard))
}

fn ip(world: &World, words: &str) -> Result<Held> {
    let words = ["-n", world.a.netns.name()].into_iter().chain(words.split(' '));
    held(shell::run("ip", words)?)
}

fn map<K: aya::Pod, V: aya::Pod>(world: &World, name: &str) -> Result<HashMap<MapData, K, V>> {
    Ok(HashMap::try_from(Map::HashMap(MapData::from_pin(world.version().join("maps").join(name))?))?)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn whatever_is_taken_away_is_found_and_put_back() -> Result<()> {
    let world = World::new()?;
    let _app = world.b.serve()?;
    let (mut datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    let _proxy = Proxy::start(&world, &datapath, &listeners)?;
    for (what, part, take) in LOSSES {
        lose(&world, &mut datapath, &listeners[0], part, take).with_context(|| what)?;
    }
    Ok(())
}

fn lose(
    world: &World,
    datapath: &mut Datapath,
    listeners: &Listeners,
    part: Part,
    take: fn(&World) -> Result<Held>,
) -> Result<()> {
    const SHORT: Duration = Duration::from_millis(300);
    ensure!(wrong(datapath, &world.a, true)?.is_empty(), "before");
    let mut sniffer = Sniffer::new(world)?;
    let _taken = take(world)?;
    let found = wrong(datapath, &world.a, true)?;
    ensure!(found.contains(&part), "found {found:?}");
    let silent = wrong(datapath, &world.a, false)?;
    ensure!(silent.contains(&part) || part == Part::Listeners, "without a proxy: {silent:?}");
    let _ = world.a.dial(world.b.at(PORT), SHORT);
    let seen = sniffer.tcp_from(&world.a, world.b.address)?;
    ensure!(!seen.iter().any(|one| one.to.port() == PORT), "in the clear: {seen:?}");
    repair(datapath, &world.a, listeners)?;
    let left = wrong(datapath, &world.a, true)?;
    ensure!(left.is_empty(), "not put back: {left:?}");
    world.a.dial(world.b.at(PORT), PATIENCE).map(drop)
}

/// It ends the chain with a verdict of its own.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_program_before_the_guard_is_found_and_comes_after_it() -> Result<()> {
    let world = World::new()?;
    if world.guard_hook == GuardHook::Clsact || !kernel::names("tcx_link_attach")? {
        // Filters: tests of clsact.
        return Ok(());
    }
    let (mut datapath, listeners) = world.enrolled(&[&world.a])?;
    // r0 = TC_ACT_OK; exit
    let passes = raw_bpf::load(Kind::Tcx, "passes_all", &[0xb7, 0x95])?;
    let index = shell::run("ip", ["-n", world.a.netns.name(), "-o", "link", "show", "eth0"])?;
    let index: u32 = index.split_once(':').context("ip link show")?.0.trim().parse()?;
    let _first = world.a.run(|| Ok(raw_bpf::attach_before_all(&passes, index)?))?;
    ensure!(wrong(&datapath, &world.a, false)? == [Part::Guard].into());
    repair(&mut datapath, &world.a, &listeners[0])?;
    ensure!(wrong(&datapath, &world.a, false)?.is_empty());
    Ok(())
}

/// A socket that was shut down listens no more, whoever holds it.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn listeners_that_were_shut_down_are_replaced() -> Result<()> {
    let world = World::new()?;
    let (mut datapath, listeners) = world.enrolled(&[&world.a])?;
    SockRef::from(&listeners[0].hbone_v4).shutdown(std::net::Shutdown::Both)?;
    let found = wrong(&datapath, &world.a, true)?;
    ensure!(found.contains(&Part::Listeners), "{found:?}");
    let new = repair(&mut datapath, &world.a, &listeners[0])?;
    drop(listeners);
    let found = wrong(&datapath, &world.a, true)?;
    ensure!(!found.contains(&Part::Listeners), "{found:?}");
    ensure!(crate::family::all(&new).all(|socket| SockRef::from(socket).is_listener().unwrap_or(false)));
    Ok(())
}

/// What a sandboxed runtime does, which has a network stack of its own: the pod stays shut, and is not called captured.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_whose_address_is_taken_away_is_not_captured() -> Result<()> {
    let world = World::new()?;
    let (mut datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    let _proxy = Proxy::start(&world, &datapath, &listeners)?;
    ip(&world, "addr del 10.98.1.2/24 dev eth0")?;
    let found = wrong(&datapath, &world.a, true)?;
    ensure!(found.contains(&Part::Addresses), "{found:?}");
    // Whatever comes of it, the address is not the agent's to put back.
    let _ = repair(&mut datapath, &world.a, &listeners[0]);
    ensure!(wrong(&datapath, &world.a, true)?.contains(&Part::Addresses));
    ip(&world, "addr add 10.98.1.2/24 dev eth0")?;
    ip(&world, "route add default via 10.98.1.1")?;
    repair(&mut datapath, &world.a, &listeners[0])?;
    let found = wrong(&datapath, &world.a, true)?;
    ensure!(found.is_empty(), "{found:?}");
    met(world.a.dial(world.b.at(PORT), PATIENCE))
}

/// A connection that the proxy has accepted, and may have reset by now, since it found nobody to connect it to.
fn met(dialled: Result<TcpStream>) -> Result<()> {
    match dialled {
        Err(error)
            if error.downcast_ref::<io::Error>().map(io::Error::kind)
                == Some(io::ErrorKind::ConnectionReset) =>
        {
            Ok(())
        }
        dialled => dialled.map(drop),
    }
}
