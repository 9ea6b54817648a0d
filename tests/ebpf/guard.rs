//! The guard on packets of a socket that nobody flagged: the test run makes one for each packet.

use anyhow::{Result, anyhow};
use aya::maps::RingBuf;
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use mesh_ebpf_abi::event::Counter;
use mesh_ebpf_abi::{canary, map, program};

use crate::object;

const NEXT: u32 = -1_i32 as u32;
const SHOT: u32 = 2;

const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Ethernet, IPv4 with `options` bytes of options, and what follows.
fn ipv4(protocol: u8, options: usize, fragment: u16, rest: &[u8]) -> Vec<u8> {
    let header = 20 + options;
    let mut ip = vec![0; 20];
    ip[0] = 0x40 | (header / 4) as u8;
    ip[2..4].copy_from_slice(&((header + rest.len()) as u16).to_be_bytes());
    ip[6..8].copy_from_slice(&fragment.to_be_bytes());
    (ip[8], ip[9]) = (64, protocol);
    ip[12..20].copy_from_slice(&[10, 1, 0, 3, 10, 2, 0, 9]);
    ip.resize(header, 1);
    [&[0; 12][..], &[0x08, 0x00], &ip, rest].concat()
}

/// The same to a canary's address.
fn to_canary(rest: &[u8]) -> Vec<u8> {
    let mut frame = ipv4(6, 0, 0, rest);
    frame[30..34].copy_from_slice(&canary::V4.octets());
    frame
}

fn ipv6(next: u8, rest: &[u8]) -> Vec<u8> {
    ipv6_between([0xfd, 0], [0xfd, 0], next, rest)
}

/// Between addresses that begin like this.
fn ipv6_between(from: [u8; 2], to: [u8; 2], next: u8, rest: &[u8]) -> Vec<u8> {
    let mut ip = vec![0; 40];
    (ip[0], ip[6], ip[7]) = (0x60, next, 64);
    ip[4..6].copy_from_slice(&(rest.len() as u16).to_be_bytes());
    ip[8..10].copy_from_slice(&from);
    ip[24..26].copy_from_slice(&to);
    [&[0; 12][..], &[0x86, 0xdd], &ip, rest].concat()
}

fn tcp(flags: u8, data: &[u8]) -> Vec<u8> {
    let mut header = [0; 20];
    header[..4].copy_from_slice(&[0x1f, 0x90, 0, 80]);
    (header[12], header[13]) = (5 << 4, flags);
    [&header[..], data].concat()
}

/// A frame with an 802.1Q tag.
fn tagged(frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x81, 0x00, 0, 0], &frame[12..]].concat()
}

/// More tags than are followed. Taken for an IPv6 header, the Ethernet header is one between link-local addresses.
fn tags_with_addresses() -> Vec<u8> {
    let mut frame = ipv6(6, &tcp(ACK, b"data"));
    for _ in 0..3 {
        frame = tagged(&frame);
    }
    frame[0] = 0x62;
    for at in [8, 24] {
        frame[at..at + 2].copy_from_slice(&[0xfe, 0x80]);
    }
    frame
}

/// Why, the frame, and what becomes of it.
fn frames() -> Vec<(&'static str, Vec<u8>, u32)> {
    const LINK: [u8; 2] = [0xfe, 0x80];
    const GLOBAL: [u8; 2] = [0x20, 0x01];
    const MULTICAST: [u8; 2] = [0xff, 0x02];
    let router_alert = [58, 0, 5, 2, 0, 0, 1, 0];
    let options = [&[60, 0][..], &[0; 6], &[6, 0], &[0; 6]].concat();
    vec![
        ("TCP data", ipv4(6, 0, 0, &tcp(ACK, b"data")), SHOT),
        ("a bare ACK", ipv4(6, 0, 0, &tcp(ACK, b"")), SHOT),
        ("IP options", ipv4(6, 12, 0, &tcp(ACK, b"data")), SHOT),
        ("first fragment", ipv4(6, 0, 0x2000, &tcp(RST, b"")), SHOT),
        ("later fragment", ipv4(6, 0, 0x00b9, &tcp(RST, b"")), SHOT),
        ("VLAN 0", tagged(&ipv4(6, 0, 0, &tcp(ACK, b"data"))), SHOT),
        ("IPv6", ipv6(6, &tcp(ACK, b"data")), SHOT),
        ("IPv6 with extension headers", ipv6(0, &[&options[..], &tcp(ACK, b"data")].concat()), SHOT),
        ("IPv6 fragment", ipv6(44, &[&[6, 0, 0, 0x48, 0, 0, 0, 1][..], b"data"].concat()), SHOT),
        ("a reset", ipv4(6, 0, 0, &tcp(RST, b"")), NEXT),
        ("a reset to a canary", to_canary(&tcp(RST, b"")), SHOT),
        ("a reset with data", ipv4(6, 0, 0, &tcp(RST, b"data")), SHOT),
        ("UDP", ipv4(17, 0, 0, &[0; 8]), NEXT),
        ("UDP fragment", ipv4(17, 0, 0x00b9, &[0; 8]), NEXT),
        ("ICMP", ipv4(1, 0, 0, &[0; 8]), NEXT),
        ("IPv6 UDP", ipv6(17, &[0; 8]), NEXT),
        ("IPv6 reset", ipv6(6, &tcp(RST, b"")), NEXT),
        ("IPv6 reset with data", ipv6(6, &tcp(RST, b"data")), SHOT),
        ("IPv6 with a tag", tagged(&ipv6(6, &tcp(ACK, b"data"))), SHOT),
        ("addresses of the link where no IP header is", tags_with_addresses(), SHOT),
        ("on the link", ipv6_between(LINK, LINK, 6, &tcp(ACK, b"data")), NEXT),
        ("from the link to the world", ipv6_between(LINK, GLOBAL, 6, &tcp(ACK, b"data")), SHOT),
        ("from the world to the link", ipv6_between(GLOBAL, LINK, 6, &tcp(ACK, b"data")), SHOT),
        ("neighbour solicitation", ipv6_between(LINK, MULTICAST, 58, &[135; 24]), NEXT),
        (
            "multicast listener report",
            ipv6_between(LINK, MULTICAST, 0, &[&router_alert[..], &[143; 8]].concat()),
            NEXT,
        ),
        ("multicast UDP", ipv6_between(LINK, MULTICAST, 17, &[0; 8]), NEXT),
        ("ARP", [&[0; 12][..], &[0x08, 0x06], &[0; 28]].concat(), NEXT),
    ]
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn packets() -> Result<()> {
    let mut object = object::open(0)?;
    for (name, ethernet) in [(program::GUARD, true), (program::GUARD_L3, false), (program::GUARD_NODE, true)]
    {
        let guard: &mut SchedClassifier =
            object.program_mut(name).ok_or_else(|| anyhow!("no {name}"))?.try_into()?;
        guard.load()?;
        for (why, frame, expected) in frames() {
            // The test run has an Ethernet header in any case, before the one that a device without them begins with.
            if !ethernet && !matches!(frame[12..14], [0x08, 0x00] | [0x86, 0xdd]) {
                continue;
            }
            let run = guard.test_run(TestRunOptions { data_in: Some(&frame), ..Default::default() })?;
            assert_eq!(run.return_value, expected, "{name}: {why}");
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_drop_is_counted_and_reported() -> Result<()> {
    let mut object = object::open(0)?;
    let guard: &mut SchedClassifier =
        object.program_mut(program::GUARD).ok_or_else(|| anyhow!("no guard"))?.try_into()?;
    guard.load()?;
    for frame in [ipv4(6, 0, 0, &tcp(ACK, b"data")), ipv6(6, &tcp(ACK, b"data"))] {
        guard.test_run(TestRunOptions { data_in: Some(&frame), ..Default::default() })?;
    }
    assert_eq!(object::count(&object, Counter::GuardApp)?, 2);
    let mut drops = RingBuf::try_from(object.take_map(map::DROPS).ok_or_else(|| anyhow!("no DROPS"))?)?;
    let event = drops.next().ok_or_else(|| anyhow!("no event"))?;
    assert_eq!(event.len(), 48);
    assert_eq!(event[12..16], [10, 1, 0, 3], "source, v4-mapped");
    assert_eq!(event[32..36], [8080_u16.to_ne_bytes(), 80_u16.to_ne_bytes()].concat());
    assert_eq!(event[36..40], (Counter::GuardApp as u32).to_ne_bytes());
    drop(event);
    let event = drops.next().ok_or_else(|| anyhow!("no event of IPv6"))?;
    assert_eq!((&event[..3], &event[16..18]), (&[0xfd, 0, 0][..], &[0xfd, 0][..]));
    assert_eq!(event[32..36], [8080_u16.to_ne_bytes(), 80_u16.to_ne_bytes()].concat());
    Ok(())
}

/// When nobody drains the events, packets are dropped all the same.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_full_ring_changes_no_verdict() -> Result<()> {
    let mut object = object::open(0)?;
    let guard: &mut SchedClassifier =
        object.program_mut(program::GUARD).ok_or_else(|| anyhow!("no guard"))?.try_into()?;
    guard.load()?;
    let frame = ipv4(6, 0, 0, &tcp(ACK, b"data"));
    let run =
        guard.test_run(TestRunOptions { data_in: Some(&frame), repeat: 10_000, ..Default::default() })?;
    assert_eq!(run.return_value, SHOT);
    assert_eq!(object::count(&object, Counter::GuardApp)?, 10_000);
    Ok(())
}
