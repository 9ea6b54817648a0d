//! Addresses as the kernel's contexts and our maps hold them: always 16 bytes, IPv4 as ::ffff:a.b.c.d.
//!
//! **Invariant:** one address has one form, so that a v4-mapped socket and a plain IPv4 one find the same entry.

use core::mem::{align_of, size_of};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address in network byte order, in the four words that the kernel's contexts use.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    words: [u32; 4],
}

const _: () = assert!(size_of::<Address>() == 16 && align_of::<Address>() == 4);

/// The third word of every IPv4 address.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Address {
    /// From the word of a context's IPv4 field, network byte order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// From the words of a context's IPv6 field, network byte order.
    #[inline(always)]
    pub const fn from_v6_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The four words, network byte order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.words
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// 127.0.0.0/8 or ::1.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.words[3]) >> 24 == 127;
        }
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && self.words[3] == 1_u32.to_be()
    }

    /// 0.0.0.0 or ::, by which connect() means the own host.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] == 0
            && self.words[1] == 0
            && (self.words[2] == 0 || self.words[2] == MAPPED)
            && self.words[3] == 0
    }

    /// fe80::/10, which means something on one link only. Not IPv4's 169.254.0.0/16: node-local services have addresses
    /// of it.
    #[inline(always)]
    pub const fn is_link_local(&self) -> bool {
        u32::from_be(self.words[0]) >> 22 == 0xfe80 >> 6
    }

    /// ff00::/8 or 224.0.0.0/4, to which the kernel opens no TCP connection.
    #[inline(always)]
    pub const fn is_multicast(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.words[3]) >> 28 == 0xe;
        }
        u32::from_be(self.words[0]) >> 24 == 0xff
    }

    /// The address for people and for user space's own types.
    pub const fn to_ip(self) -> IpAddr {
        let [a, b, c, d] = self.words;
        if self.is_v4() {
            return IpAddr::V4(Ipv4Addr::from_bits(u32::from_be(d)));
        }
        let high = ((u32::from_be(a) as u128) << 96) | ((u32::from_be(b) as u128) << 64);
        let low = ((u32::from_be(c) as u128) << 32) | (u32::from_be(d) as u128);
        IpAddr::V6(Ipv6Addr::from_bits(high | low))
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => Self::from_v4_word(v4.to_bits().to_be()),
            IpAddr::V6(v6) => {
                let bits = v6.to_bits();
                let word = |shift: u32| ((bits >> shift) as u32).to_be();
                Self { words: [word(96), word(64), word(32), word(0)] }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        Address::from(text.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn one_form_for_both_ways_to_write_an_ipv4_address() {
        assert_eq!(address("10.1.2.3"), address("::ffff:10.1.2.3"));
        assert_eq!(address("10.1.2.3"), Address::from_v4_word(u32::from_ne_bytes([10, 1, 2, 3])));
    }

    #[test]
    fn prints_what_was_parsed() {
        for text in ["10.1.2.3", "0.0.0.0", "::", "::1", "fd00:1:2:3:4:5:6:7"] {
            assert_eq!(address(text).to_ip(), text.parse::<IpAddr>().unwrap(), "{text}");
        }
    }

    #[test]
    fn classes() {
        let check = |text, v4, loopback, unspecified| {
            let a = address(text);
            assert_eq!(
                (a.is_v4(), a.is_loopback(), a.is_unspecified()),
                (v4, loopback, unspecified),
                "{text}"
            );
        };
        check("10.1.2.3", true, false, false);
        check("127.0.0.1", true, true, false);
        check("127.255.0.9", true, true, false);
        check("1.0.0.127", true, false, false);
        check("0.0.0.0", true, false, true);
        check("::ffff:127.0.0.1", true, true, false);
        check("::1", false, true, false);
        check("::", false, false, true);
        check("::2", false, false, false);
        check("1::1", false, false, false);
        check("fe80::1", false, false, false);
    }

    #[test]
    fn what_needs_no_route() {
        for (text, link_local, multicast) in [
            ("fe80::1", true, false),
            ("febf:ffff::1", true, false),
            ("fec0::1", false, false),
            ("fe7f::1", false, false),
            ("169.254.20.10", false, false),
            ("ff02::1", false, true),
            ("ff0e::1", false, true),
            ("fe80:ff00::", true, false),
            ("224.0.0.1", false, true),
            ("239.255.255.250", false, true),
            ("::ffff:224.0.0.1", false, true),
            ("223.0.0.1", false, false),
            ("240.0.0.1", false, false),
            ("::", false, false),
            ("fd00::1", false, false),
        ] {
            let a = address(text);
            assert_eq!((a.is_link_local(), a.is_multicast()), (link_local, multicast), "{text}");
        }
    }
}
