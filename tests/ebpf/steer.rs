//! sk_lookup on packets from the network.
#![allow(unsafe_code, reason = "aya has no test run for sk_lookup programs")]

use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Result, anyhow, ensure};
use aya::maps::{HashMap, SockMap};
use aya::programs::SkLookup;
use mesh_ebpf_abi::event::Counter;
use mesh_ebpf_abi::probe::{ProbePort, Tuple};
use mesh_ebpf_abi::{HBONE_PORT, SocketKind, map, program};
use socket2::SockRef;

use crate::object;

const SLOT: u32 = 5;
const PASS: u32 = 1;
const DROP: u32 = 0;

/// `struct bpf_sk_lookup`; after the run the first field is the chosen socket's cookie.
#[repr(C)]
#[derive(Default)]
struct Context {
    cookie: u64,
    family: u32,
    protocol: u32,
    remote_ip4: u32,
    remote_ip6: [u32; 4],
    remote_port: u16,
    _padding: u16,
    local_ip4: u32,
    local_ip6: [u32; 4],
    local_port: u32,
    ingress_ifindex: u32,
    /// The kernel wants zeroes here.
    _tail: u32,
}

/// `union bpf_attr` of BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    result: u32,
    data: [u64; 3],
    repeat: u32,
    duration: u32,
    context_in_length: u32,
    context_out_length: u32,
    context_in: u64,
    context_out: u64,
    rest: [u64; 2],
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn packets_from_the_network() -> Result<()> {
    let mut object = object::open(SLOT)?;
    for (slot, address) in
        [(SLOT, "10.1.0.3"), (SLOT, "fd00:1::3"), (SLOT + 1, "10.1.0.4"), (SLOT + 1, "fd00:1::4")]
    {
        object::enrol(&mut object, slot, address)?;
    }
    let (plain, hbone) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    let mut listen = SockMap::try_from(object.take_map(map::LISTEN).ok_or_else(|| anyhow!("no LISTEN"))?)?;
    listen.set(SocketKind::Inbound4.index(SLOT), &plain, 0)?;
    listen.set(SocketKind::Hbone4.index(SLOT), &hbone, 0)?;
    let (plain6, hbone6) = (TcpListener::bind("[::1]:0")?, TcpListener::bind("[::1]:0")?);
    listen.set(SocketKind::Inbound6.index(SLOT), &plain6, 0)?;
    listen.set(SocketKind::Hbone6.index(SLOT), &hbone6, 0)?;
    let (plain, hbone) = (cookie(&plain)?, cookie(&hbone)?);
    let (plain6, hbone6) = (cookie(&plain6)?, cookie(&hbone6)?);
    let mut take = |name| object.take_map(name).ok_or_else(|| anyhow!("no {name}"));
    let maps = (take(map::PROBE)?, take(map::PROBEPORT)?);
    let steer: &mut SkLookup =
        object.program_mut(program::STEER).ok_or_else(|| anyhow!("no steer"))?.try_into()?;
    steer.load()?;
    let tcp = |from: &str, to: &str, port| run(steer, 6, from, to, port);
    for (why, (verdict, chosen), expected) in [
        ("plaintext", tcp("10.2.0.9", "10.1.0.3", 80)?, (PASS, plain)),
        ("from a pod of the node", tcp("10.1.0.4", "10.1.0.3", 80)?, (PASS, plain)),
        ("HBONE", tcp("10.2.0.9", "10.1.0.3", HBONE_PORT)?, (PASS, hbone)),
        ("the pod dials itself", tcp("10.1.0.3", "10.1.0.3", 80)?, (PASS, 0)),
        ("localhost", tcp("127.0.0.1", "127.0.0.1", 80)?, (PASS, 0)),
        ("another pod's address", tcp("10.2.0.9", "10.1.0.4", 80)?, (DROP, 0)),
        ("nobody's address", tcp("10.2.0.9", "10.1.0.9", 80)?, (DROP, 0)),
        ("plaintext, IPv6", tcp("fd00:2::9", "fd00:1::3", 80)?, (PASS, plain6)),
        ("from a pod of the node, IPv6", tcp("fd00:1::4", "fd00:1::3", 80)?, (PASS, plain6)),
        ("from the link, IPv6", tcp("fe80::1", "fd00:1::3", 80)?, (PASS, plain6)),
        ("HBONE, IPv6", tcp("fd00:2::9", "fd00:1::3", HBONE_PORT)?, (PASS, hbone6)),
        ("the pod dials itself, IPv6", tcp("fd00:1::3", "fd00:1::3", 80)?, (PASS, 0)),
        ("another pod's address, IPv6", tcp("fd00:2::9", "fd00:1::4", 80)?, (DROP, 0)),
        ("IPv6 that is not enrolled", tcp("fd00::9", "fd00::3", 80)?, (DROP, 0)),
        ("link-local", tcp("fe80::9", "fe80::3", 80)?, (DROP, 0)),
        ("the pod dials itself, link-local", tcp("fe80::3", "fe80::3", 80)?, (PASS, 0)),
        ("IPv6 localhost", tcp("::1", "::1", 80)?, (PASS, 0)),
        ("UDP, IPv6", run(steer, 17, "fd00:2::9", "fd00:1::3", 53)?, (PASS, 0)),
        ("UDP", run(steer, 17, "10.2.0.9", "10.1.0.3", 53)?, (PASS, 0)),
    ] {
        assert_eq!((verdict, chosen), expected, "{why}");
    }
    let ends = |from: &str, port| -> Result<Tuple> {
        Ok(Tuple {
            source: from.parse::<IpAddr>()?.into(),
            destination: "10.1.0.3".parse::<IpAddr>()?.into(),
            source_port: 40_000,
            destination_port: port,
        })
    };
    let mut probes = HashMap::<_, Tuple, u32>::try_from(maps.0)?;
    let mut ports = HashMap::<_, ProbePort, u32>::try_from(maps.1)?;
    ports.insert(ProbePort::new(SLOT, 80), 1, 0)?;
    ports.insert(ProbePort::new(SLOT + 1, 81), 1, 0)?;
    for (from, port, slot) in [("10.2.0.1", 80, SLOT), ("10.2.0.1", 81, SLOT), ("10.2.0.2", 80, SLOT + 1)] {
        probes.insert(ends(from, port)?, slot, 0)?;
    }
    for (why, (verdict, chosen), expected) in [
        ("the kubelet", tcp("10.2.0.1", "10.1.0.3", 80)?, (PASS, 0)),
        ("to a port that only another pod's probes name", tcp("10.2.0.1", "10.1.0.3", 81)?, (PASS, plain)),
        ("recorded for the address's last pod", tcp("10.2.0.2", "10.1.0.3", 80)?, (PASS, plain)),
        ("not recorded", tcp("10.2.0.3", "10.1.0.3", 80)?, (PASS, plain)),
        ("at another port of the pod", tcp("10.2.0.1", "10.1.0.3", 82)?, (PASS, plain)),
    ] {
        assert_eq!((verdict, chosen), expected, "{why}");
    }
    listen.clear_index(&SocketKind::Inbound4.index(SLOT))?;
    assert_eq!(tcp("10.2.0.9", "10.1.0.3", 80)?, (DROP, 0), "no listener");
    assert_eq!(object::count(&object, Counter::SteerNoListener)?, 1);
    assert_eq!(object::count(&object, Counter::Probed)?, 1);
    Ok(())
}

fn cookie(socket: &TcpListener) -> Result<u64> {
    Ok(SockRef::from(socket).cookie()?)
}

/// Runs the program on one packet: its verdict, and the cookie of the socket it chose.
fn run(steer: &SkLookup, protocol: u32, from: &str, to: &str, port: u16) -> Result<(u32, u64)> {
    const BPF_PROG_TEST_RUN: i32 = 10;
    let mut context = context(protocol, from.parse()?, to.parse()?, port);
    let length = size_of::<Context>() as u32;
    let place = (&raw mut context) as u64;
    let mut attr = TestRun {
        program: steer.fd()?.as_fd().as_raw_fd() as u32,
        repeat: 1,
        context_in_length: length,
        context_out_length: length,
        context_in: place,
        context_out: place,
        ..TestRun::default()
    };
    // SAFETY: both contexts are `context`, of the length given, and live through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attr, size_of::<TestRun>()) };
    ensure!(result == 0, "BPF_PROG_TEST_RUN: {}", io::Error::last_os_error());
    Ok((attr.result, context.cookie))
}

fn context(protocol: u32, from: IpAddr, to: IpAddr, port: u16) -> Context {
    let mut context =
        Context { protocol, remote_port: 40_000_u16.to_be(), local_port: port.into(), ..Context::default() };
    let words = |octets: [u8; 16]| {
        [0, 4, 8, 12].map(|at| u32::from_ne_bytes(octets[at..at + 4].try_into().expect("four bytes")))
    };
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            context.family = libc::AF_INET as u32;
            context.remote_ip4 = u32::from_ne_bytes(from.octets());
            context.local_ip4 = u32::from_ne_bytes(to.octets());
        }
        (from, to) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            context.family = libc::AF_INET6 as u32;
            context.remote_ip6 = words(octets(from));
            context.local_ip6 = words(octets(to));
        }
    }
    context
}
