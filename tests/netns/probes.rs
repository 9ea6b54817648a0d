//! The kubelet's connections: past the proxy where its own probes go, by the proxy everywhere else. The router is the
//! node: its address is the node's.
#![allow(unsafe_code, reason = "an address of family AF_UNSPEC has no safe constructor")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_ebpf_abi::event::Counter;
use mesh_ebpf_abi::probe::Tuple;
use mesh_ebpf_abi::{ABI_VERSION, map, program};
use mesh_tests::{kernel, raw_bpf, shell};
use node_agent::datapath::{Config, Datapath, KubeletConfig, Listeners};
use socket2::{Domain, Protocol, Socket, Type};

use crate::family::over_both;
use crate::packets::{ACK, FIN, SYN, Sniffer, segment, send_raw};
use crate::world::{PATIENCE, PORT, REFUSAL, World, accept, converse, enrol, idle, into_stream};

/// The address that whoever is on the node has to pod `a`.
fn node(world: &World) -> IpAddr {
    world.family.pick(IpAddr::from([10, 98, 1, 1]), IpAddr::from([0xfd98, 1, 0, 0, 0, 0, 0, 1]))
}

/// A connection from the node, by whoever this process is now.
fn dial_from_node(world: &World, to: SocketAddr) -> Result<TcpStream> {
    world.router.run(|| Ok(TcpStream::connect_timeout(&to, PATIENCE)?))
}

/// A connection of the kubelet.
fn probe(world: &World, to: SocketAddr) -> Result<TcpStream> {
    world.within(&world.kubelet, || dial_from_node(world, to))
}

/// The app meets the connection as it was made.
fn meets_directly(app: &TcpListener, probe: &TcpStream) -> Result<TcpStream> {
    let (served, peer) = app.accept()?;
    let (own, seen) = (probe.local_addr()?, SocketAddr::new(peer.ip().to_canonical(), peer.port()));
    ensure!(seen == SocketAddr::new(own.ip().to_canonical(), own.port()), "{own} looks like {peer}");
    converse(probe, &served)?;
    Ok(served)
}

/// How many connections are recorded.
fn recorded(world: &World) -> Result<usize> {
    let pin = world.bpffs.join("ambit").join(format!("v{ABI_VERSION}")).join("maps").join(map::PROBE);
    let map = aya::maps::Map::LruHashMap(aya::maps::MapData::from_pin(pin)?);
    let map = aya::maps::HashMap::<_, Tuple, u32>::try_from(map)?;
    Ok(map.keys().count())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_probe_reaches_the_app_with_the_nodes_own_address() -> Result<()> {
    over_both(|world| {
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        let places = [world.family.anywhere(PORT), world.a.at(PORT), "[::]:7000".parse()?];
        for at in places {
            let app = world.a.listen(&at.to_string())?;
            let client = probe(world, world.a.at(PORT))?;
            ensure!(client.local_addr()?.ip() == node(world));
            meets_directly(&app, &client)?;
        }
        ensure!(idle(world.family.inbound(&listeners[0]))?, "the proxy met a probe");
        ensure!(datapath.count(Counter::Probed)? == 3 && datapath.count(Counter::GuardApp)? == 0);
        Ok(())
    })
}

/// As one socket for both families makes them.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_v4_mapped_probe_is_the_same() -> Result<()> {
    let world = World::new()?;
    let (datapath, _listeners) = world.enrolled(&[&world.a])?;
    let app = world.a.listen("0.0.0.0:7000")?;
    meets_directly(&app, &probe(&world, "[::ffff:10.98.1.2]:7000".parse()?)?)?;
    ensure!(datapath.count(Counter::Probed)? == 1);
    Ok(())
}

/// A TCP probe asks whether somebody listens: the proxy would say yes.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_closed_port_is_refused_to_the_kubelet() -> Result<()> {
    over_both(|world| {
        let (_datapath, _listeners) = world.enrolled(&[&world.a])?;
        let error = probe(world, world.a.at(PORT)).expect_err("nobody listens");
        let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        ensure!(kind == Some(ErrorKind::ConnectionRefused), "{error:#}");
        ensure!(recorded(world)? == 0, "its record stays");
        Ok(())
    })
}

/// The kubelet closes first, as after a TCP probe: the record is gone then, and the app still says goodbye.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_record_goes_with_the_kubelets_socket_and_the_apps_end_lives_on() -> Result<()> {
    over_both(|world| {
        let (datapath, _listeners) = world.enrolled(&[&world.a])?;
        let app = world.a.serve()?;
        let client = probe(world, world.a.at(PORT))?;
        let (mut served, _) = app.accept()?;
        served.set_read_timeout(Some(PATIENCE))?;
        ensure!(recorded(world)? == 1);
        let from = client.local_addr()?;
        drop(client);
        ensure!(served.read(&mut [0; 1])? == 0, "not the end");
        mesh_tests::eventually("the record is gone", PATIENCE, || {
            let left = recorded(world)?;
            ensure!(left == 0, "{left} left");
            Ok(())
        })?;
        drop(served);
        // Unanswered, the app's FIN would keep its socket in LAST_ACK.
        mesh_tests::eventually("the app's end is closed", PATIENCE, || {
            let sockets = shell::run("ip", ["netns", "exec", world.a.netns.name(), "ss", "-tanH"])?;
            let left = sockets.lines().find(|line| line.contains(&format!(":{}", from.port())));
            ensure!(left.is_none(), "{left:?}");
            Ok(())
        })?;
        ensure!(datapath.count(Counter::GuardApp)? == 0);
        Ok(())
    })
}

/// The second look of a SYN cookie's ACK finds the record, too.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn probes_survive_syn_cookies() -> Result<()> {
    let world = World::new()?;
    let (_datapath, _listeners) = world.enrolled(&[&world.a])?;
    world.a.netns.sysctl("ipv4/tcp_syncookies", "2")?;
    let app = world.a.listen("0.0.0.0:7000")?;
    meets_directly(&app, &probe(&world, world.a.at(PORT))?)?;
    Ok(())
}

/// Identity is where a connection was made, not the address that it comes from.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn another_process_of_the_node_meets_the_proxy() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let _app = world.a.listen("0.0.0.0:7000")?;
    let client = world.outside(|| dial_from_node(&world, world.a.at(PORT)))?;
    ensure!(client.local_addr()?.ip() == node(&world));
    converse(&client, &accept(&listeners[0].inbound_v4)?)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_the_kubelet_does_inside_a_pod_is_no_probe() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let _app = world.a.listen("0.0.0.0:7000")?;
    let client = world.within(&world.kubelet, || world.b.dial(world.a.at(PORT), PATIENCE))?;
    converse(&client, &accept(&listeners[0].inbound_v4)?)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_port_that_no_probe_names_is_the_proxys() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let _app = world.a.listen("0.0.0.0:7001")?;
    let client = probe(&world, world.a.at(7001))?;
    converse(&client, &accept(&listeners[0].inbound_v4)?)
}

/// A pod's probe may name a `host`: whoever can make pods could have the kubelet open any port of another pod.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_probe_aimed_at_another_pod_opens_nothing_there() -> Result<()> {
    let world = World::new()?;
    ensure!(world.a.probe_ports.contains(&PORT) && !world.b.probe_ports.contains(&PORT));
    let (_datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    let _victim = world.b.listen("0.0.0.0:7000")?;
    let client = probe(&world, world.b.at(PORT))?;
    converse(&client, &accept(&listeners[1].inbound_v4)?)
}

/// When a pod is prepared again, what its probes no longer name is closed.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn ports_are_those_of_the_last_preparation() -> Result<()> {
    let world = World::new()?;
    let (mut datapath, _old) = world.enrolled(&[&world.a])?;
    let mut spec = world.a.spec()?;
    spec.probe_ports = BTreeSet::from([7001]);
    let listeners = datapath.prepare(&spec, None)?;
    let app = world.a.listen("0.0.0.0:7001")?;
    meets_directly(&app, &probe(&world, world.a.at(7001))?)?;
    let _app = world.a.serve()?;
    let client = probe(&world, world.a.at(PORT))?;
    converse(&client, &accept(&listeners.inbound_v4)?)
}

/// From the kubelet's address, and from its port while it probes and after: conntrack gives a live probe's four
/// numbers to nobody else, and a dead one's record is gone.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn masqueraded_traffic_meets_the_proxy() -> Result<()> {
    let world = World::new()?;
    let rules = "table ip nat { chain post { type nat hook postrouting priority 100; \
                 oifname \"v1\" ip saddr 10.98.2.0/24 masquerade; }; }";
    shell::run_with_input("ip", ["netns", "exec", world.router.name(), "nft", "-f", "-"], rules)?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let app = world.a.listen("0.0.0.0:7000")?;
    let live = probe(&world, world.a.at(PORT))?;
    let port = live.local_addr()?.port();
    let masqueraded = || -> Result<SocketAddr> {
        let client = world.b.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.bind(&world.b.at(port).into())?;
            socket.set_linger(Some(std::time::Duration::ZERO))?;
            socket.connect_timeout(&world.a.at(PORT).into(), PATIENCE)?;
            Ok(into_stream(socket))
        })?;
        let met = accept(&listeners[0].inbound_v4).context("not the proxy")?;
        converse(&client, &met)?;
        Ok(met.peer_addr()?)
    };
    let during = masqueraded()?;
    ensure!(during.ip() == node(&world) && during.port() != port, "{during} beside {port}");
    let served = meets_directly(&app, &live)?;
    drop((served, live));
    let after = masqueraded()?;
    ensure!(after.ip() == node(&world), "{after}");
    ensure!(recorded(&world)? == 0);
    Ok(())
}

/// CAP_NET_RAW can repeat the four numbers of a live probe, which makes no packet the app's.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_raw_socket_cannot_pass_for_a_probed_one() -> Result<()> {
    let world = World::new()?;
    let (datapath, _listeners) = world.enrolled(&[&world.a])?;
    let app = world.a.listen("0.0.0.0:7000")?;
    let client = probe(&world, world.a.at(PORT))?;
    let served = meets_directly(&app, &client)?;
    let mut sniffer = Sniffer::new(&world)?;
    for flags in [SYN, SYN | ACK, FIN | ACK] {
        send_raw(&world.a, &segment(world.a.at(PORT), client.local_addr()?, flags), 0)?;
    }
    let seen = sniffer.tcp_from(&world.a, world.b.address)?;
    ensure!(seen.iter().all(|segment| segment.flags & (SYN | FIN) == 0), "{seen:?}");
    ensure!(datapath.count(Counter::GuardApp)? == 3);
    converse(&client, &served)
}

/// The app's end of a probe is a socket like any other as soon as it connects elsewhere.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_probed_socket_that_is_used_again_is_captured() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let app = world.a.listen("0.0.0.0:7000")?;
    let client = probe(&world, world.a.at(PORT))?;
    let served = Socket::from(meets_directly(&app, &client)?);
    let mut sniffer = Sniffer::new(&world)?;
    world.a.run(|| {
        // An address of family AF_UNSPEC dissolves a TCP socket's association, see connect(2).
        // SAFETY: storage of all zeroes is such an address.
        let nowhere = unsafe { socket2::SockAddr::try_init(|_, _| Ok(()))?.1 };
        served.connect(&nowhere)?;
        Ok(served.connect_timeout(&world.b.at(PORT).into(), PATIENCE)?)
    })?;
    converse(&into_stream(served), &accept(&listeners[0].outbound_v4)?)?;
    let seen = sniffer.tcp_from(&world.a, world.b.address)?;
    ensure!(seen.iter().all(|segment| segment.to.ip() != world.b.address), "{seen:?}");
    Ok(())
}

/// Pods' cgroup, below the kubelet's, and pod a enrolled there.
fn below_the_kubelet(world: &World) -> Result<(PathBuf, Datapath, Listeners)> {
    let pods = world.kubelet.join("kubepods");
    fs::create_dir(&pods)?;
    let config = Config { cgroup_root: Some(pods.clone()), ..world.config() };
    let mut datapath = world.router.run(|| Ok(Datapath::open(&config)?))?;
    let listeners = enrol(&mut datapath, &world.a)?;
    Ok((pods, datapath, listeners))
}

/// Kubelet and pods below one cgroup: a pod on the node's network is not the kubelet.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_below_the_kubelets_cgroup_do_not_pass_for_it() -> Result<()> {
    let world = World::new()?;
    let (pods, _datapath, listeners) = below_the_kubelet(&world)?;
    let app = world.a.listen("0.0.0.0:7000")?;
    let client = world.within(&pods, || dial_from_node(&world, world.a.at(PORT)))?;
    converse(&client, &accept(&listeners.inbound_v4).context("not the proxy")?)?;
    meets_directly(&app, &probe(&world, world.a.at(PORT))?)?;
    Ok(())
}

const LIMIT: &str = "core/optmem_max";
const LIMITED: &str = "a limit of sockets' own memory for each network namespace (Linux 6.9)";

/// What flags a socket is charged to it, and who owns it can use up what it may have.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_whose_socket_cannot_be_flagged_does_not_pass_for_the_kubelet() -> Result<()> {
    let world = World::new()?;
    if !world.router.run(|| Ok(Path::new("/proc/sys/net").join(LIMIT).exists()))? {
        kernel::skipped("a_pod_whose_socket_cannot_be_flagged_does_not_pass_for_the_kubelet", LIMITED);
        return Ok(());
    }
    let (pods, _datapath, listeners) = below_the_kubelet(&world)?;
    let app = world.a.listen("0.0.0.0:7000")?;
    world.router.sysctl(LIMIT, "0")?;
    for _ in 0..2 {
        let client = world.within(&pods, || dial_from_node(&world, world.a.at(PORT)))?;
        converse(&client, &accept(&listeners.inbound_v4).context("not the proxy")?)?;
        ensure!(recorded(&world)? == 1, "not noted");
        drop(client);
        mesh_tests::eventually("nothing is left of it", PATIENCE, || {
            ensure!(recorded(&world)? == 0);
            Ok(())
        })?;
    }
    meets_directly(&app, &probe(&world, world.a.at(PORT))?)?;
    Ok(())
}

/// That it is none is noted where probes are, and no app may answer what is noted so, even where it meets it.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_app_does_not_answer_who_is_noted_for_no_kubelet() -> Result<()> {
    let world = World::new()?;
    if !world.router.run(|| Ok(Path::new("/proc/sys/net").join(LIMIT).exists()))? {
        kernel::skipped("an_app_does_not_answer_who_is_noted_for_no_kubelet", LIMITED);
        return Ok(());
    }
    let (pods, datapath, _listeners) = below_the_kubelet(&world)?;
    let _app = world.a.listen("0.0.0.0:7000")?;
    world.router.sysctl(LIMIT, "0")?;
    // Nothing brings it to the proxy.
    raw_bpf::detach(&world.pod_pins(&world.a).join(program::STEER))?;
    let dial = || Ok(TcpStream::connect_timeout(&world.a.at(PORT), REFUSAL)?);
    ensure!(world.within(&pods, || world.router.run(dial)).is_err(), "answered");
    ensure!(datapath.count(Counter::GuardAppListener)? > 0, "not by the guard");
    Ok(())
}

/// A service manager makes a new cgroup when it starts the kubelet again.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_kubelet_that_was_restarted_is_found_again() -> Result<()> {
    let world = World::new()?;
    let (mut datapath, listeners) = world.enrolled(&[&world.a])?;
    let app = world.a.listen("0.0.0.0:7000")?;
    meets_directly(&app, &probe(&world, world.a.at(PORT))?)?;
    fs::remove_dir(&world.kubelet)?;
    datapath.follow_kubelet();
    fs::create_dir(&world.kubelet)?;
    let unknown = probe(&world, world.a.at(PORT))?;
    converse(&unknown, &accept(&listeners[0].inbound_v4)?)?;
    datapath.follow_kubelet();
    meets_directly(&app, &probe(&world, world.a.at(PORT))?)?;
    Ok(())
}

/// Found by its port, and recorded on while no agent runs.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_kubelet_is_found_by_its_port() -> Result<()> {
    let world = World::new()?;
    let kubelet = KubeletConfig { cgroup: None, port: 10250 };
    let config = Config { kubelet, ..world.config() };
    // This process is the kubelet while it is looked for.
    let (datapath, _listeners) = world.within(&world.kubelet, || {
        let listening = world.router.run(|| Ok(TcpListener::bind("0.0.0.0:10250")?))?;
        let mut datapath = world.router.run(|| Ok(Datapath::open(&config)?))?;
        drop(listening);
        let listeners = enrol(&mut datapath, &world.a)?;
        Ok((datapath, listeners))
    })?;
    let app = world.a.listen("0.0.0.0:7000")?;
    meets_directly(&app, &probe(&world, world.a.at(PORT))?)?;
    drop(datapath);
    meets_directly(&app, &probe(&world, world.a.at(PORT))?)?;
    if !world.bpffs.join("ambit").join(format!("v{ABI_VERSION}")).join("links/probes").exists() {
        bail!("not pinned");
    }
    Ok(())
}
