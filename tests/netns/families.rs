//! Pods with addresses of one family or of many networks, and what IPv6 has beside global addresses.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_ebpf_abi::event::Counter;
use mesh_tests::netns::Netns;
use mesh_tests::shell;
use node_agent::datapath::{Datapath, Listeners};
use socket2::{Protocol, Socket, Type};

use crate::family::Family;
use crate::lifecycle::{Traces, nothing_pinned};
use crate::packets::Sniffer;
use crate::world::{PATIENCE, PORT, Pod, REFUSAL, World, accept, converse, idle, into_stream};

/// An address of the network that nobody answers for.
const FAR_V4: &str = "203.0.113.10:80";
const FAR_V4_MAPPED: &str = "[::ffff:203.0.113.10]:80";
const FAR_V6: &str = "[2001:db8:9::10]:80";

fn enrol(datapath: &mut Datapath, pod: &Pod, addresses: &[IpAddr]) -> Result<Listeners> {
    let listeners = datapath.prepare(&pod.spec_with(addresses.to_vec())?, None)?;
    datapath.capture(&pod.uid)?;
    Ok(listeners)
}

/// A pod with these addresses of its own, enrolled for a test and let go after it: nothing of it is left.
fn enrolled_with(
    world: &World,
    addresses: &[IpAddr],
    test: impl FnOnce(&Datapath, &Listeners) -> Result<()>,
) -> Result<()> {
    let before = Traces::of(&world.a)?;
    let mut datapath = world.open()?;
    let listeners = enrol(&mut datapath, &world.a, addresses)?;
    test(&datapath, &listeners)?;
    drop(listeners);
    datapath.leave(&world.a.uid)?;
    let after = Traces::of(&world.a)?;
    ensure!(after == before, "{after:?} instead of {before:?}");
    nothing_pinned(world)
}

/// connect() fails without waiting for anything, and says that there is no way.
fn unreachable_at_once(pod: &Pod, to: &str) -> Result<()> {
    let began = Instant::now();
    let error = pod.dial(to.parse()?, PATIENCE).err().context("connected")?;
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    ensure!(kind == Some(ErrorKind::NetworkUnreachable), "{to}: {error}");
    ensure!(began.elapsed() < Duration::from_secs(1), "{to}: after {:?}", began.elapsed());
    Ok(())
}

/// The pod has an IPv6 route and address, but none that the mesh knows.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_of_ipv4_opens_no_connection_over_ipv6() -> Result<()> {
    let world = World::of(Family::V6)?;
    let app = world.b.serve()?;
    app.set_nonblocking(true)?;
    enrolled_with(&world, &[world.a.v4.into()], |datapath, listeners| {
        ensure!(
            listeners.outbound_v6.is_none() && listeners.inbound_v6.is_none() && listeners.hbone_v6.is_none()
        );
        let mut sniffer = Sniffer::new(&world)?;
        unreachable_at_once(&world.a, &world.b.at(PORT).to_string())?;
        unreachable_at_once(&world.a, FAR_V6)?;
        let seen = sniffer.tcp_from(&world.a, world.b.address)?;
        ensure!(seen.is_empty() && app.accept().is_err(), "{seen:?}");
        ensure!(datapath.count(Counter::Unreachable)? == 2);
        // Nor does anybody get in by it.
        let _own = world.a.serve()?;
        ensure!(world.b.dial(world.a.at(PORT), REFUSAL).is_err());
        v4_works(&world, listeners)
    })
}

/// The node, or the pod, has no IPv6 at all; what Kubernetes says of the pod's addresses makes no difference.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_without_ipv6() -> Result<()> {
    for named in [false, true] {
        let world = World::new()?;
        world.a.netns.sysctl("ipv6/conf/all/disable_ipv6", "1")?;
        let mut addresses = vec![IpAddr::V4(world.a.v4)];
        addresses.extend(named.then_some(IpAddr::V6(world.a.v6)));
        enrolled_with(&world, &addresses, |_, listeners| {
            ensure!(listeners.outbound_v6.is_none());
            unreachable_at_once(&world.a, FAR_V6)?;
            v4_works(&world, listeners)
        })?;
    }
    Ok(())
}

/// IPv6 that is off for lo alone leaves no way to the proxy: fail closed, not open.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_without_ipv6_on_lo() -> Result<()> {
    let world = World::of(Family::V6)?;
    world.a.netns.sysctl("ipv6/conf/lo/disable_ipv6", "1")?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    ensure!(listeners[0].outbound_v6.is_none());
    let _app = world.b.serve()?;
    let mut sniffer = Sniffer::new(&world)?;
    unreachable_at_once(&world.a, &world.b.at(PORT).to_string())?;
    let seen = sniffer.tcp_from(&world.a, world.b.address)?;
    ensure!(seen.is_empty(), "{seen:?}");
    v4_works(&world, &listeners[0])
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_of_ipv6_only() -> Result<()> {
    let world = World::of(Family::V6)?;
    enrolled_with(&world, &[world.a.v6.into()], |_, listeners| {
        for to in [FAR_V4, FAR_V4_MAPPED] {
            unreachable_at_once(&world.a, to)?;
        }
        let client = world.a.dial(FAR_V6.parse()?, PATIENCE)?;
        let accepted = accept(world.family.outbound(listeners))?;
        ensure!(accepted.peer_addr()?.ip() == world.a.address);
        converse(&client, &accepted)
    })
}

/// Duplicate address detection takes a second or two, in which an address is nobody's.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_address_under_detection_is_waited_for() -> Result<()> {
    let world = World::of(Family::V6)?;
    world.a.netns.sysctl("ipv6/conf/eth0/accept_dad", "1")?;
    world.a.netns.ip("addr add fd98:1::3/64 dev eth0\n")?;
    let address: Ipv6Addr = "fd98:1::3".parse()?;
    let mut datapath = world.open()?;
    let listeners = enrol(&mut datapath, &world.a, &[address.into()])?;
    let client = world.a.dial(FAR_V6.parse()?, PATIENCE)?;
    ensure!(client.local_addr()?.ip() == address);
    converse(&client, &accept(world.family.outbound(&listeners))?)
}

/// A second network: the pod's addresses there are its own too, and a connection keeps the one that it is bound to.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn several_interfaces() -> Result<()> {
    let world = World::new()?;
    world.second_network(&world.a, "net1", 1)?;
    for (family, second, port) in [(Family::V4, "10.97.1.2", 7000), (Family::V6, "fd97:1::2", 7001)] {
        let second: IpAddr = second.parse()?;
        let first = family.pick(IpAddr::V4(world.a.v4), world.a.v6.into());
        enrolled_with(&world, &[first, second], |_, listeners| {
            let app = world.a.listen(&family.anywhere(port).to_string())?;
            for own in [first, second] {
                converse(&world.a.dial(SocketAddr::new(own, port), PATIENCE)?, &app.accept()?.0)?;
            }
            for (bound, source) in [(None, first), (Some(second), second)] {
                let client = far_from(&world.a, family, bound)?;
                ensure!(client.local_addr()?.ip() == source);
                converse(&client, &accept(family.outbound(listeners))?)?;
            }
            let at = SocketAddr::new(second, port);
            let outside = world.router.run(|| Ok(TcpStream::connect_timeout(&at, PATIENCE)?))?;
            converse(&outside, &accept(family.inbound(listeners))?)
        })?;
    }
    Ok(())
}

/// A connection to somewhere far, from a certain address or any.
fn far_from(pod: &Pod, family: Family, bound: Option<IpAddr>) -> Result<TcpStream> {
    let far: SocketAddr = family.pick(FAR_V4, FAR_V6).parse()?;
    pod.run(|| {
        let socket = Socket::new(family.domain(), Type::STREAM, Some(Protocol::TCP))?;
        if let Some(ip) = bound {
            socket.bind(&SocketAddr::new(ip, 0).into())?;
        }
        socket.connect_timeout(&far.into(), PATIENCE)?;
        Ok(into_stream(socket))
    })
}

/// What stays on the pod's link is the kernel's, as far as the pod begins it.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn link_local_and_multicast_are_left_alone() -> Result<()> {
    let world = World::of(Family::V6)?;
    let (gateway, eth0) = (link_local(&world.router, "v1")?, index(&world.a.netns, "eth0")?);
    let own = link_local(&world.a.netns, "eth0")?;
    let (datapath, listeners) = world.enrolled(&[&world.a])?;
    let on_link = |ip, port| SocketAddr::V6(SocketAddrV6::new(ip, port, 0, eth0));

    let neighbour = world.router.run(|| Ok(std::net::TcpListener::bind("[::]:7000")?))?;
    converse(&world.a.dial(on_link(gateway, PORT), PATIENCE)?, &neighbour.accept()?.0)?;
    ensure!(datapath.count(Counter::GuardLinkLocal)? >= 2);

    let app = world.a.serve()?;
    converse(&world.a.dial(on_link(own, PORT), PATIENCE)?, &app.accept()?.0)?;

    let there = world.router.run(|| Ok(UdpSocket::bind("[::]:7001")?))?;
    there.set_read_timeout(Some(PATIENCE))?;
    world.a.run(|| Ok(UdpSocket::bind("[::]:0")?.send_to(b"word", on_link(gateway, 7001))?))?;
    ensure!(there.recv(&mut [0; 8])? == 4);
    shell::run("ip", ["-n", world.a.netns.name(), "-6", "neigh", "flush", "dev", "eth0"])?;
    // A multicast solicitation has to be answered for this.
    world.a.run(|| Ok(UdpSocket::bind("[::]:0")?.send_to(b"word", (world.b.address, 9)).map(drop)?))?;

    for nobody in [on_link("ff02::1".parse()?, PORT).to_string(), "224.0.0.1:7000".to_owned()] {
        unreachable_at_once(&world.a, &nobody)?;
    }
    for listener in crate::family::all(&listeners[0]) {
        ensure!(idle(listener)?);
    }

    // What others begin would come past the mesh.
    let back = SocketAddr::V6(SocketAddrV6::new(own, PORT, 0, index(&world.router, "v1")?));
    ensure!(world.router.run(|| Ok(TcpStream::connect_timeout(&back, REFUSAL).is_err()))?);
    Ok(())
}

/// An IPv4 connection, out and in.
fn v4_works(world: &World, listeners: &Listeners) -> Result<()> {
    for to in [FAR_V4, FAR_V4_MAPPED] {
        let client = world.a.dial(to.parse()?, PATIENCE)?;
        converse(&client, &accept(&listeners.outbound_v4)?)?;
    }
    let _app = world.a.listen("0.0.0.0:7001")?;
    let client = world.b.dial(SocketAddr::from((world.a.v4, 7001)), PATIENCE)?;
    converse(&client, &accept(&listeners.inbound_v4)?)
}

pub(crate) fn index(netns: &Netns, interface: &str) -> Result<u32> {
    netns.run(|| Ok(nix::net::if_::if_nametoindex(interface)?))
}

pub(crate) fn link_local(netns: &Netns, interface: &str) -> Result<Ipv6Addr> {
    let show = ["-n", netns.name(), "-6", "-o", "addr", "show", "dev", interface, "scope", "link"];
    let text = shell::run("ip", show)?;
    let address =
        text.split_whitespace().find_map(|word| word.split_once('/')).context("no link-local address")?;
    Ok(address.0.parse()?)
}
