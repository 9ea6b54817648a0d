//! eBPF programs of somebody else, made of single instructions: what a replacement of kube-proxy, or another mesh, may
//! have on the hooks that Ambit uses.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use crate::raw_bpf::{self, Kind};

/// A program of somebody else, attached until it is dropped.
#[derive(Debug)]
pub struct Foreign {
    pub id: u32,
    kind: Kind,
    program: OwnedFd,
    link: OwnedFd,
}

impl Foreign {
    /// Goes behind what came after it.
    pub fn go_last(&mut self, target: &impl AsFd) -> io::Result<()> {
        self.link = raw_bpf::attach(&self.program, target.as_fd(), self.kind)?;
        Ok(())
    }
}

/// Sends all connections of this cgroup's processes elsewhere, to the same port.
pub fn redirect(cgroup: &impl AsFd, name: &str, to: IpAddr) -> io::Result<Foreign> {
    // struct bpf_sock_addr: user_ip4 is at 4, user_ip6 at 8.
    let (kind, words) = match to {
        IpAddr::V4(to) => (Kind::Connect4, vec![(4, word(to.octets()))]),
        IpAddr::V6(to) => (Kind::Connect6, words_of(to)),
    };
    let mut program: Vec<u64> = Vec::new();
    for (offset, word) in words {
        program.extend([mov(2, word), store_word(1, 2, offset)]);
    }
    program.extend([mov(0, 1), EXIT]);
    attach(kind, name, &program, cgroup)
}

/// Gives all new connections of this network namespace to a listener, whatever a program before it chose.
pub fn take_all(netns: &impl AsFd, name: &str, listener: &impl AsFd) -> io::Result<Foreign> {
    let map = raw_bpf::socket_map(listener)?;
    let [low, high] = load_map(1, map.as_raw_fd());
    const REPLACE: i32 = 1;
    let program = [
        copy(6, 1),
        mov(2, 0),
        store_word(10, 2, -4),
        copy(2, 10),
        add(2, -4),
        low,
        high,
        call(MAP_LOOKUP_ELEM),
        skip_if_zero(0, 7),
        copy(7, 0),
        copy(1, 6),
        copy(2, 7),
        mov(3, REPLACE),
        call(SK_ASSIGN),
        copy(1, 7),
        call(SK_RELEASE),
        mov(0, 1),
        EXIT,
    ];
    // The program keeps the map.
    attach(Kind::SkLookup, name, &program, netns)
}

/// Whether the kernel runs a program before others on request (BPF_F_PREORDER, 6.15): the order could not be helped else.
pub fn places_are_given(cgroup: &impl AsFd) -> io::Result<bool> {
    const BPF_F_PREORDER: u32 = 1 << 6;
    let program = raw_bpf::load(Kind::Connect4, "", &[mov(0, 1), EXIT])?;
    match raw_bpf::attach_as(&program, cgroup.as_fd(), Kind::Connect4, BPF_F_PREORDER) {
        Ok(_link) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(false),
        Err(error) => Err(error),
    }
}

fn attach(kind: Kind, name: &str, program: &[u64], target: &impl AsFd) -> io::Result<Foreign> {
    let program = raw_bpf::load(kind, name, program)?;
    let link = raw_bpf::attach(&program, target.as_fd(), kind)?;
    Ok(Foreign { id: raw_bpf::program_id(&program)?, kind, program, link })
}

fn words_of(address: Ipv6Addr) -> Vec<(i16, i32)> {
    let octets = address.octets();
    let words = octets.chunks_exact(4).zip([8, 12, 16, 20]);
    words.map(|(octets, offset)| (offset, word([octets[0], octets[1], octets[2], octets[3]]))).collect()
}

/// As it is in memory.
fn word(octets: [u8; 4]) -> i32 {
    i32::from_ne_bytes(octets)
}

const EXIT: u64 = 0x95;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// `struct bpf_insn`: opcode, registers, offset, number.
const fn instruction(opcode: u8, to: u8, from: u8, offset: i16, number: i32) -> u64 {
    opcode as u64
        | (to as u64 | (from as u64) << 4) << 8
        | (offset as u16 as u64) << 16
        | (number as u32 as u64) << 32
}

const fn mov(register: u8, number: i32) -> u64 {
    instruction(0xb7, register, 0, 0, number)
}

const fn copy(to: u8, from: u8) -> u64 {
    instruction(0xbf, to, from, 0, 0)
}

const fn add(register: u8, number: i32) -> u64 {
    instruction(0x07, register, 0, 0, number)
}

const fn store_word(at: u8, from: u8, offset: i16) -> u64 {
    instruction(0x63, at, from, offset, 0)
}

const fn call(helper: i32) -> u64 {
    instruction(0x85, 0, 0, 0, helper)
}

const fn skip_if_zero(register: u8, instructions: i16) -> u64 {
    instruction(0x15, register, 0, instructions, 0)
}

/// Two instructions long.
const fn load_map(register: u8, map: i32) -> [u64; 2] {
    const PSEUDO_MAP_FD: u8 = 1;
    [instruction(0x18, register, PSEUDO_MAP_FD, 0, map), 0]
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn addresses_as_in_memory() {
        assert_eq!(word(Ipv4Addr::new(1, 2, 3, 4).octets()).to_ne_bytes(), [1, 2, 3, 4]);
        let words = words_of("1:2:3:4:5:6:7:8".parse().unwrap());
        let octets: Vec<u8> = words.iter().flat_map(|(_, word)| word.to_ne_bytes()).collect();
        assert_eq!(octets, [0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8]);
    }
}
