//! eBPF programs of others on the same hooks.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use mesh_ebpf_abi::event::Counter;
use mesh_tests::foreign::{self, Foreign};
use mesh_tests::kernel;
use node_agent::datapath::{Config, Datapath};
use socket2::{Domain, Protocol, Socket, Type};

use crate::families::{index, link_local};
use crate::family::{Family, over_both, transparent};
use crate::lifecycle::nothing_pinned;
use crate::world::{PATIENCE, PORT, Pod, REFUSAL, World, accept, enrol};

const UID: &str = "6f1c2b8e-0d3a-4b57-9c1e-3f5a7b9d1e2f";

/// An address that nobody has, as a service's.
fn service(world: &World) -> SocketAddr {
    let (v4, v6): (IpAddr, IpAddr) = ([10, 96, 0, 1].into(), [0xfd96, 0, 0, 0, 0, 0, 0, 1].into());
    SocketAddr::new(world.family.pick(v4, v6), PORT)
}

/// Like a replacement of kube-proxy: every connection goes to pod b.
pub(crate) fn load_balancer(world: &World, cgroup: &Path) -> Result<Foreign> {
    Ok(foreign::redirect(&File::open(cgroup)?, "cil_lb", world.b.address)?)
}

/// Where the proxy hears that a connection wants to go, when a process of this cgroup dials the service.
fn heard(world: &World, outbound: &OwnedFd, cgroup: &Path) -> Result<SocketAddr> {
    world.within(cgroup, || {
        let _client = world.a.dial(service(world), PATIENCE)?;
        Ok(accept(outbound)?.local_addr()?)
    })
}

/// What is told of the pod's hooks: `hook name id harmless`.
fn told(datapath: &mut Datapath, pod: &Pod) -> Result<Vec<String>> {
    let mut all: BTreeMap<_, _> = datapath.foreign()?;
    let own = all.remove(&pod.uid).unwrap_or_default();
    ensure!(all.is_empty(), "of other pods: {all:?}");
    let tell = |one: &node_agent::datapath::Foreign| {
        format!(
            "{} {} {} {}",
            one.hook,
            one.name,
            one.id,
            if one.harmless { "harmless" } else { "not harmless" }
        )
    };
    Ok(own.iter().map(tell).collect())
}

/// On the cgroup of all pods, above it, and on the pod's own; there before the agent, and after it. A kernel that gives
/// nobody a place before others' programs leaves it to the order of attachment and, from the inside to the outside, of
/// cgroups.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_proxy_hears_the_service_although_another_program_chose_an_endpoint() -> Result<()> {
    for family in [Family::V4, Family::V6] {
        let mut world = World::of(family)?;
        world.a.uid = UID.to_owned();
        let pods = world.cgroup.join("kubepods");
        let pod = pods.join("burstable").join(format!("pod{UID}"));
        let own = pod.join("container");
        fs::create_dir_all(&own)?;
        let ordered = foreign::places_are_given(&File::open(&own)?)?;
        for place in [&world.cgroup, &pods, &pod, &own] {
            for first in [true, false] {
                let what = || format!("{family:?}, {}, first: {first}, {ordered}", place.display());
                let later = *place == world.cgroup || (*place == pods && !first);
                let scene = Scene { world: &world, pods: &pods, own: &own, place, first };
                scene.hears_the_service(ordered || later).with_context(what)?;
                world.unmount_bpffs()?;
                world.mount_bpffs()?;
            }
        }
    }
    Ok(())
}

/// Where a program of somebody else is, and the process that dials.
struct Scene<'a> {
    world: &'a World,
    pods: &'a Path,
    own: &'a Path,
    place: &'a Path,
    first: bool,
}

impl Scene<'_> {
    fn open(&self) -> Result<Datapath> {
        let config = Config { cgroup_root: Some(self.pods.to_owned()), ..self.world.config() };
        self.world.router.run(|| Ok(Datapath::open(&config)?))
    }

    /// The proxy hears of the service, or of the endpoint that the program chose, and either is told.
    fn hears(&self, outbound: &OwnedFd, undone: bool) -> Result<()> {
        let world = self.world;
        let expect = if undone { service(world) } else { world.b.at(PORT) };
        let heard = heard(world, outbound, self.own)?;
        ensure!(heard == expect, "{heard}");
        Ok(())
    }

    fn hears_the_service(&self, undone: bool) -> Result<()> {
        let world = self.world;
        let before = self.first.then(|| load_balancer(world, self.place)).transpose()?;
        let mut datapath = self.open()?;
        let listeners = enrol(&mut datapath, &world.a)?;
        let outbound = world.family.outbound(&listeners);
        let foreign = match before {
            // Found as the pod is enrolled.
            Some(foreign) => foreign,
            None => {
                let foreign = load_balancer(world, self.place)?;
                self.hears(outbound, false).context("a test that proves nothing")?;
                datapath.foreign()?;
                foreign
            }
        };
        self.hears(outbound, undone).context("enrolled")?;
        let hook = world.family.pick("connect4", "connect6");
        let expect =
            format!("{hook} cil_lb {} {}", foreign.id, if undone { "harmless" } else { "not harmless" });
        ensure!(told(&mut datapath, &world.a)? == std::slice::from_ref(&expect));
        // The next agent takes over without a gap.
        drop(datapath);
        self.hears(outbound, undone).context("without an agent")?;
        let mut datapath = self.open()?;
        self.hears(outbound, undone).context("a new agent")?;
        datapath.prepare(&world.a.spec()?, Some(listeners.try_clone()?))?;
        datapath.capture(&world.a.uid)?;
        self.hears(outbound, undone).context("taken over")?;
        ensure!(told(&mut datapath, &world.a)? == [expect]);
        drop(foreign);
        ensure!(told(&mut datapath, &world.a)?.is_empty(), "it is gone");
        self.hears(outbound, true).context("it is gone")?;
        datapath.leave(&world.a.uid)?;
        nothing_pinned(world)
    }
}

/// An agent of another version leaves the first and the last place to this one's, not to others'.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn ours_surround_others_also_once_those_of_another_version_are_gone() -> Result<()> {
    let world = World::new()?;
    if !foreign::places_are_given(&File::open(&world.cgroup)?)? {
        let name = "ours_surround_others_also_once_those_of_another_version_are_gone";
        kernel::skipped(name, "places before others' programs (Linux 6.17)");
        return Ok(());
    }
    let first = load_balancer(&world, &world.cgroup)?;
    let (datapath, mut listeners) = world.enrolled(&[&world.a])?;
    drop((datapath, first));
    fs::rename(world.version(), world.version().with_file_name("v0"))?;
    let foreign = load_balancer(&world, &world.cgroup)?;
    let mut datapath = world.open()?;
    let listeners = datapath.prepare(&world.a.spec()?, Some(listeners.remove(0)))?;
    datapath.capture(&world.a.uid)?;
    let cgroup = world.cgroup.clone();
    ensure!(heard(&world, &listeners.outbound_v4, &cgroup)? == service(&world));
    ensure!(told(&mut datapath, &world.a)? == [format!("connect4 cil_lb {} harmless", foreign.id)]);
    Ok(())
}

/// What could not be done about a program at the first look is done at the next.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_look_that_failed_is_made_good_by_the_next() -> Result<()> {
    let mut world = World::new()?;
    world.a.uid = UID.to_owned();
    let pods = world.cgroup.join("kubepods");
    let own = pods.join(format!("pod{UID}"));
    fs::create_dir_all(&own)?;
    if !foreign::places_are_given(&File::open(&own)?)? {
        let name = "a_look_that_failed_is_made_good_by_the_next";
        kernel::skipped(name, "places before others' programs (Linux 6.17)");
        return Ok(());
    }
    let config = Config { cgroup_root: Some(pods), ..world.config() };
    let mut datapath = world.router.run(|| Ok(Datapath::open(&config)?))?;
    let listeners = enrol(&mut datapath, &world.a)?;
    world.unmount_bpffs()?;
    let foreign = load_balancer(&world, &own)?;
    ensure!(datapath.foreign().is_err(), "nothing was to be done");
    world.mount_bpffs()?;
    datapath.keep_pins()?;
    let told = told(&mut datapath, &world.a)?;
    ensure!(told == [format!("connect4 cil_lb {} harmless", foreign.id)], "{told:?}");
    ensure!(heard(&world, &listeners.outbound_v4, &own)? == service(&world));
    Ok(())
}

/// What takes connections to any address, as the proxy's does.
fn listener(family: Family) -> Result<OwnedFd> {
    let socket = Socket::new(family.domain(), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    transparent(&socket, family.domain())?;
    socket.bind_device(Some(b"lo"))?;
    socket.bind(&family.anywhere(7777).into())?;
    socket.listen(8)?;
    Ok(socket.into())
}

/// The last one that chooses a socket has its way.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_proxy_gets_the_connections_although_another_program_takes_them() -> Result<()> {
    over_both(|world| {
        let thief = world.a.run(|| listener(world.family))?;
        let netns = world.a.netns.descriptor()?;
        let before = foreign::take_all(&netns, "thief", &thief)?;
        let (mut datapath, listeners) = world.enrolled(&[&world.a])?;
        let outbound = world.family.outbound(&listeners[0]);
        let cgroup = world.cgroup.clone();
        ensure!(heard(world, outbound, &cgroup)? == service(world), "it was there first");
        let earlier = format!("sk_lookup thief {} harmless", before.id);
        ensure!(told(&mut datapath, &world.a)? == std::slice::from_ref(&earlier));

        let mut after = foreign::take_all(&netns, "later", &thief)?;
        world.a.dial(service(world), PATIENCE).context("dial")?;
        accept(&thief).context("a test that proves nothing: it takes no connections")?;
        let both = [earlier.clone(), format!("sk_lookup later {} harmless", after.id)];
        ensure!(told(&mut datapath, &world.a)? == both);
        ensure!(heard(world, outbound, &cgroup)? == service(world), "ours went behind it");
        // Nobody is fought over the place.
        after.go_last(&netns)?;
        let last = format!("sk_lookup later {} not harmless", after.id);
        for _ in 0..2 {
            let told = told(&mut datapath, &world.a)?;
            ensure!(told.contains(&last) && told.contains(&earlier), "{told:?}");
        }
        drop((before, after));
        ensure!(told(&mut datapath, &world.a)?.is_empty());
        ensure!(heard(world, outbound, &cgroup)? == service(world), "they are gone");
        datapath.leave(&world.a.uid)?;
        nothing_pinned(world)
    })
}

/// The guard lets pass what stays on the link, and a program that chooses a socket wins over ours that refuses: so what
/// others begin there does not come so far.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn nobody_is_reached_at_a_link_local_address_although_another_program_takes_connections() -> Result<()> {
    let world = World::of(Family::V6)?;
    let thief = world.a.run(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.bind(&world.family.anywhere(7777).into())?;
        socket.listen(8)?;
        Ok(OwnedFd::from(socket))
    })?;
    let own = link_local(&world.a.netns, "eth0")?;
    let to = SocketAddr::V6(SocketAddrV6::new(own, PORT, 0, index(&world.router, "v1")?));
    let _foreign = foreign::take_all(&world.a.netns.descriptor()?, "thief", &thief)?;
    let dial = || world.router.run(|| Ok(TcpStream::connect_timeout(&to, REFUSAL)?));
    mesh_tests::eventually("the link is up, and it takes connections", PATIENCE, dial)?;
    let (datapath, _listeners) = world.enrolled(&[&world.a])?;
    ensure!(dial().is_err(), "it is reached");
    ensure!(datapath.count(Counter::SteerForeign)? >= 1);
    Ok(())
}
