//! Ways out of a pod past the guard inside it: the one on the node meets what takes them.
#![allow(unsafe_code, reason = "sockaddr_ll has no safe wrapper")]

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use mesh_ebpf_abi::event::Counter;
use mesh_tests::netns::Netns;
use mesh_tests::raw_bpf::{self, Kind};
use mesh_tests::{kernel, shell};
use node_agent::datapath::{Datapath, GuardHook, Part};
use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

use crate::captured::{repair, wrong};
use crate::family::{Family, over_both};
use crate::lifecycle::{Traces, nothing_pinned};
use crate::packets::{FIN, SYN, Sniffer, segment};
use crate::world::{PATIENCE, PORT, World, accept, converse, enrol, into_stream, proxy_socket};
use crate::xdp_socket;

/// Whether the node's ends of links are guarded here; said where they are not.
fn guarded(world: &World, test: &str) -> Result<bool> {
    let tcx = kernel::names("tcx_link_attach")?;
    if !tcx {
        kernel::skipped(test, "tcx (Linux 6.6)");
    }
    Ok(tcx && world.guard_hook != GuardHook::Clsact)
}

/// An interface's index and hardware address.
fn interface(netns: &Netns, name: &str) -> Result<(u32, [u8; 6])> {
    let line = shell::run("ip", ["-n", netns.name(), "-o", "link", "show", name])?;
    let (index, rest) = line.split_once(':').context("ip link show")?;
    let address =
        rest.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).context(line.clone())?;
    let bytes: Vec<u8> =
        address.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    Ok((index.trim().parse()?, bytes.try_into().ok().context("six bytes")?))
}

/// A SYN from pod a to pod b.
fn syn(world: &World) -> Vec<u8> {
    segment(world.a.at(5000), world.b.at(PORT), SYN)
}

/// By a packet socket that leaves traffic control out, from pod a by this interface to its end on the router.
fn past_traffic_control(world: &World, by: &str, end: &str) -> Result<()> {
    let ((index, _), (_, to)) = (interface(&world.a.netns, by)?, interface(&world.router, end)?);
    let packet = syn(world);
    world.a.run(|| {
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
        let on: libc::c_int = 1;
        // SAFETY: the kernel reads an int.
        let set = unsafe {
            let (option, size) = (libc::PACKET_QDISC_BYPASS, size_of_val(&on) as libc::socklen_t);
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, (&raw const on).cast(), size)
        };
        ensure!(set == 0, "{}", std::io::Error::last_os_error());
        let mut storage = SockAddrStorage::zeroed();
        // SAFETY: the structure is plain integers and fits.
        let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ether_type(world.family).to_be();
        (address.sll_ifindex, address.sll_halen) = (index as i32, 6);
        address.sll_addr[..6].copy_from_slice(&to);
        // SAFETY: the family is the structure's, the length its own.
        let to = unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) };
        socket.send_to(&packet, &to).context("send past traffic control")?;
        Ok(())
    })
}

/// By a socket of the family AF_XDP.
fn by_xdp(world: &World) -> Result<()> {
    let ((index, from), (_, to)) = (interface(&world.a.netns, "eth0")?, interface(&world.router, "v1")?);
    let frame = [&to[..], &from, &ether_type(world.family).to_be_bytes(), &syn(world)].concat();
    world.a.run(|| xdp_socket::send(index, &frame).context("send by AF_XDP"))
}

/// By a program after the guard that makes TCP of UDP, as who administers the pod's network may have it.
fn changed_after_the_guard(world: &World) -> Result<()> {
    // Protocol or next header of the IP header, behind the Ethernet header.
    let place = world.family.pick(14 + 9, 14 + 6);
    let byte = [
        0xb7 | 2 << 8 | place << 32,       // r2 = place
        0xbf | 3 << 8 | 10 << 12,          // r3 = r10
        0x07 | 3 << 8 | 0xffff_ffff << 32, // r3 -= 1
        0xb7 | 4 << 8 | 1 << 32,           // r4 = 1
    ];
    let mut change = vec![
        0xbf | 1 << 8 | 6 << 12,                 // r1 = skb
        0x72 | 10 << 8 | 0xffff << 16 | 6 << 32, // *(u8 *)(r10 - 1) = IPPROTO_TCP
    ];
    change.extend(byte);
    change.extend([
        0xb7 | 5 << 8,  // r5 = 0
        0x85 | 9 << 32, // bpf_skb_store_bytes(skb, r2, r3, r4, r5)
    ]);
    if world.family == Family::V4 {
        change.extend([
            0xbf | 1 << 8 | 6 << 12,         // r1 = skb
            0xb7 | 2 << 8 | (14 + 10) << 32, // r2 = the header's checksum
            0xb7 | 3 << 8 | 0x1100 << 32,    // r3 = what was there, the time to live apart
            0xb7 | 4 << 8 | 0x0600 << 32,    // r4 = what is there now
            0xb7 | 5 << 8 | 2 << 32,         // r5 = their size
            0x85 | 10 << 32,                 // bpf_l3_csum_replace(skb, r2, r3, r4, r5)
        ]);
    }
    // Of UDP alone: what the kernel sends to find its neighbours would be counted, too.
    let mut program = vec![0xbf | 6 << 8 | 1 << 12]; // r6 = skb
    program.extend(byte);
    program.extend([
        0x85 | 26 << 32,                                        // bpf_skb_load_bytes(skb, r2, r3, r4)
        0x71 | 7 << 8 | 10 << 12 | 0xffff << 16,                // r7 = *(u8 *)(r10 - 1)
        0x55 | 7 << 8 | (change.len() as u64) << 16 | 17 << 32, // if r7 != IPPROTO_UDP goto the end
    ]);
    program.extend(change);
    program.extend([0xb7 | 0xffff_ffff << 32, 0x95]); // return TCX_NEXT
    let program = raw_bpf::load(Kind::Tcx, "makes_tcp", &program)?;
    let (index, _) = interface(&world.a.netns, "eth0")?;
    let link = world.a.run(|| Ok(raw_bpf::attach_after_all(&program, index)?))?;
    world.a.run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(world.a.address, 5000))?;
        // What TCP takes for the rest of a header without options.
        socket.send_to(&[0, 0, 0, 0, 5 << 4, SYN, 0, 1, 0, 0, 0, 0], world.b.at(PORT))?;
        Ok(())
    })?;
    drop(link);
    Ok(())
}

fn ether_type(family: Family) -> u16 {
    family.pick(0x0800, 0x86dd)
}

/// How many segments of pod a's get to pod b.
fn arrived(world: &World, send: impl FnOnce() -> Result<()>) -> Result<usize> {
    let mut sniffer = Sniffer::at(world, &world.b.netns)?;
    send()?;
    Ok(sniffer.tcp_from(&world.a, world.b.address)?.len())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_gets_past_the_guard_inside_is_dropped_on_the_node() -> Result<()> {
    over_both(|world| {
        if !guarded(world, "what_gets_past_the_guard_inside_is_dropped_on_the_node")? {
            return Ok(());
        }
        let before = Traces::of(&world.a)?;
        let ways: [(&str, &dyn Fn() -> Result<()>); 3] = [
            ("past traffic control", &|| past_traffic_control(world, "eth0", "v1")),
            ("by AF_XDP", &|| by_xdp(world)),
            ("changed after the guard", &|| changed_after_the_guard(world)),
        ];
        for (way, send) in ways {
            ensure!(arrived(world, send).context(way)? == 1, "{way}: not seen before enrolment");
        }
        let (mut datapath, listeners) = world.enrolled(&[&world.a])?;
        for (way, send) in ways {
            let dropped = datapath.count(Counter::GuardApp)?;
            ensure!(arrived(world, send).context(way)? == 0, "{way}: it left");
            ensure!(datapath.count(Counter::GuardApp)? == dropped + 1, "{way}: not counted");
            let event = datapath.next_drop().with_context(|| format!("{way}: no event"))?;
            ensure!(event.source.to_ip() == world.a.address && event.destination_port == PORT, "{event:?}");
        }
        drop(listeners);
        datapath.leave(&world.a.uid)?;
        ensure!(Traces::of(&world.a)? == before);
        nothing_pinned(world)?;
        for (way, send) in ways {
            ensure!(arrived(world, send).context(way)? == 1, "{way}: dropped after the pod has left");
        }
        Ok(())
    })
}

/// What passes inside passes on the node too, and is counted once.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn older_connections_live_on_and_are_counted_once() -> Result<()> {
    over_both(|world| {
        let app = world.b.serve()?;
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        let (served, _) = app.accept()?;
        let (datapath, _listeners) = world.enrolled(&[&world.a])?;
        let mut sniffer = Sniffer::new(world)?;
        converse(&client, &served)?;
        drop((client, served));
        let mut seen = Vec::new();
        mesh_tests::eventually("the client's FIN", PATIENCE, || {
            seen.extend(sniffer.tcp_from(&world.a, world.b.address)?);
            let passed = datapath.count(Counter::GuardOlder)?;
            ensure!(
                seen.iter().any(|one| one.flags & FIN != 0) && passed == seen.len() as u64,
                "{passed}: {seen:?}"
            );
            Ok(())
        })
    })
}

/// An interface that came later, and one whose other end is not the node's, which is none of its business.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_link_to_the_node_is_guarded_there_and_no_other() -> Result<()> {
    let world = World::new()?;
    if !guarded(&world, "each_link_to_the_node_is_guarded_there_and_no_other")? {
        return Ok(());
    }
    let ends = || -> Result<Vec<String>> {
        let mut names: Vec<_> = fs::read_dir(world.pod_pins(&world.a))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        names.retain(|name| name.starts_with("guard_node"));
        names.sort();
        Ok(names)
    };
    let expected = |names: &[&str]| -> Result<Vec<String>> {
        let pin = |name: &&str| Ok(format!("guard_node-{}", interface(&world.router, name)?.0));
        let mut pins: Vec<_> = names.iter().map(pin).collect::<Result<_>>()?;
        pins.sort();
        Ok(pins)
    };
    let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
    ensure!(ends()? == expected(&["v1"])?, "{:?}", ends()?);
    let b = world.b.netns.name();
    world.a.netns.ip(&format!(
        "link add other type veth peer name other netns {b}\nlink set other up\nlink add bridge0 type bridge\n\
         link add inside type veth peer name within\n"
    ))?;
    world.second_network(&world.a, "eth1", 4)?;
    datapath.upkeep();
    ensure!(ends()? == expected(&["v1", "s4"])?, "{:?}", ends()?);
    ensure!(arrived(&world, || past_traffic_control(&world, "eth1", "s4"))? == 0);
    Ok(())
}

fn end_pin(world: &World) -> Result<std::path::PathBuf> {
    Ok(world.pod_pins(&world.a).join(format!("guard_node-{}", interface(&world.router, "v1")?.0)))
}

type Loss = (&'static str, fn(&World) -> Result<Option<OwnedFd>>);

/// What becomes of the guard on the node, and what has to be kept for that.
const LOSSES: [Loss; 3] = [
    ("taken off", |world| {
        raw_bpf::detach(&end_pin(world)?)?;
        Ok(None)
    }),
    ("another's", |world| {
        raw_bpf::replace_by_one_that_passes_all(&end_pin(world)?, Kind::Tcx)?;
        Ok(None)
    }),
    ("after another", |world| {
        let passes = raw_bpf::load(Kind::Tcx, "passes_all", &[0xb7, 0x95])?;
        let (v1, _) = interface(&world.router, "v1")?;
        world.router.run(|| Ok(Some(raw_bpf::attach_to_ingress_before_all(&passes, v1)?)))
    }),
];

/// It is missed, and comes back, whoever took it off or has come before it.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_guard_on_the_node_is_missed_and_put_back() -> Result<()> {
    let world = World::new()?;
    if !guarded(&world, "the_guard_on_the_node_is_missed_and_put_back")? {
        return Ok(());
    }
    let (mut datapath, listeners) = world.enrolled(&[&world.a])?;
    for (what, lose) in LOSSES {
        let check = |datapath: &Datapath, whole: bool| -> Result<()> {
            let found = wrong(datapath, &world.a, false)?;
            ensure!(found == if whole { [].into() } else { [Part::Guard].into() }, "{what}: {found:?}");
            let left = arrived(&world, || past_traffic_control(&world, "eth0", "v1"))?;
            ensure!(left == usize::from(!whole), "{what}: {left} left");
            Ok(())
        };
        check(&datapath, true)?;
        let _lost = lose(&world)?;
        check(&datapath, false)?;
        repair(&mut datapath, &world.a, &listeners[0])?;
        check(&datapath, true)?;
    }
    Ok(())
}

/// By an XDP program at the node's end packets lose their sockets: the proxy's pass all the same, and it is told of. Once it
/// is gone the guard is back.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_xdp_program_on_the_node_is_told_of_and_cuts_nothing() -> Result<()> {
    let world = World::new()?;
    if !guarded(&world, "an_xdp_program_on_the_node_is_told_of_and_cuts_nothing")? {
        return Ok(());
    }
    let passes = raw_bpf::load(Kind::Xdp, "passes_all", &[0xb7 | 2 << 32, 0x95])?;
    let v1 = interface(&world.router, "v1")?.0;
    let attach = || world.router.run(|| Ok(raw_bpf::attach_xdp(&passes, v1)?));
    let told = |datapath: &mut Datapath| -> Result<Vec<String>> {
        let mut foreign = datapath.foreign()?.remove(&world.a.uid).unwrap_or_default();
        foreign.retain(|one| one.hook == "xdp");
        Ok(foreign.into_iter().map(|one| one.name).collect())
    };
    let first = attach()?;
    let (mut datapath, listeners) = world.enrolled(&[&world.a])?;
    let app = world.b.serve()?;
    let proxied = world.a.run(|| {
        let socket = proxy_socket(&datapath, Domain::IPV4)?;
        socket.connect_timeout(&world.b.at(PORT).into(), PATIENCE)?;
        Ok(into_stream(socket))
    })?;
    let (served, _) = app.accept()?;
    let mut attached = Some(first);
    for round in 0..2 {
        let found = wrong(&datapath, &world.a, false)?;
        ensure!(found.is_empty() && !end_pin(&world)?.exists(), "{round}: {found:?}");
        ensure!(told(&mut datapath)? == ["passes_all"], "{round}: {:?}", told(&mut datapath)?);
        converse(&proxied, &served).context("with XDP")?;
        drop(attached.take());
        ensure!(wrong(&datapath, &world.a, false)? == [Part::Guard].into(), "{round}: not missed");
        repair(&mut datapath, &world.a, &listeners[0])?;
        ensure!(wrong(&datapath, &world.a, false)?.is_empty() && told(&mut datapath)?.is_empty());
        ensure!(arrived(&world, || past_traffic_control(&world, "eth0", "v1"))? == 0, "{round}");
        converse(&proxied, &served).context("without XDP")?;
        attached = Some(attach()?);
        ensure!(wrong(&datapath, &world.a, false)? == [Part::Guard].into(), "{round}: not noticed");
        repair(&mut datapath, &world.a, &listeners[0])?;
    }
    drop(attached);
    Ok(())
}

/// Agents of another version, and the next of this one, leave each pod guarded once.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_next_agent_guards_the_same_ends() -> Result<()> {
    for another_version in [false, true] {
        let world = World::new()?;
        if !guarded(&world, "the_next_agent_guards_the_same_ends")? {
            return Ok(());
        }
        let (datapath, mut listeners) = world.enrolled(&[&world.a])?;
        drop(datapath);
        if another_version {
            fs::rename(world.version(), world.version().with_file_name("v0"))?;
        }
        let past = || past_traffic_control(&world, "eth0", "v1");
        ensure!(arrived(&world, past)? == 0, "while no agent runs");
        let mut datapath = world.open()?;
        let _kept = datapath.prepare(&world.a.spec()?, listeners.pop())?;
        datapath.capture(&world.a.uid)?;
        ensure!(wrong(&datapath, &world.a, false)?.is_empty());
        let dropped = datapath.count(Counter::GuardApp)?;
        ensure!(arrived(&world, past)? == 0);
        ensure!(datapath.count(Counter::GuardApp)? == dropped + 1);
        datapath.leave(&world.a.uid)?;
        nothing_pinned(&world)?;
        ensure!(arrived(&world, past)? == 1, "another is left");
        let listeners = enrol(&mut datapath, &world.a)?;
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        converse(&client, &accept(&listeners.outbound_v4)?)?;
    }
    Ok(())
}
