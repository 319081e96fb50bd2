//! Addresses and ports in the one form in which every table and every comparison has them.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv4 or IPv6 address in 16 bytes, in network order; IPv4 is `::ffff:a.b.c.d` (RFC 4291 §2.5.5.2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Addr {
    /// Four words as they stand in memory: each holds four bytes in network order.
    pub words: [u32; 4],
}

/// The third word of every IPv4 address.
const V4_PREFIX: u32 = 0xffff_u32.to_be();

impl Addr {
    /// `0.0.0.0`, the address that NodePort frontends of IPv4 have.
    pub const UNSPECIFIED_V4: Self = Self::from_v4_word(0);
    /// `::`, the address that NodePort frontends of IPv6 have.
    pub const UNSPECIFIED_V6: Self = Self { words: [0; 4] };

    /// `127.0.0.0`, which stands for all of `127.0.0.0/8` in the table of the node's addresses.
    pub const LOOPBACK_NET_V4: Self = Self::from_v4_word(0x7f00_0000_u32.to_be());

    /// An IPv4 address from its header field as it stands in memory.
    #[must_use]
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self { words: [0, 0, V4_PREFIX, word] }
    }

    /// Whether this is an IPv4 address.
    #[must_use]
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] | self.words[1] | (self.words[2] ^ V4_PREFIX) == 0
    }

    /// Whether this is `127.0.0.0/8` or `::1`.
    #[must_use]
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        let [a, b, c, d] = self.words;
        if self.is_v4() { u32::from_be(d) >> 24 == 127 } else { a | b | c | (d ^ 1_u32.to_be()) == 0 }
    }

    /// The IPv4 header field; meaningless for IPv6.
    #[must_use]
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.words[3]
    }

    /// The unspecified address of the same family.
    #[must_use]
    #[inline(always)]
    pub const fn unspecified(&self) -> Self {
        if self.is_v4() { Self::UNSPECIFIED_V4 } else { Self::UNSPECIFIED_V6 }
    }

    /// Equality without a call to `memcmp`, which the kernel programs would have to carry.
    #[must_use]
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        (self.words[0] ^ other.words[0])
            | (self.words[1] ^ other.words[1])
            | (self.words[2] ^ other.words[2])
            | (self.words[3] ^ other.words[3])
            == 0
    }

    /// Whether the leading bits that `mask` has set are those of `network`.
    #[must_use]
    #[inline(always)]
    pub const fn within(&self, network: &Self, mask: &Self) -> bool {
        ((self.words[0] ^ network.words[0]) & mask.words[0])
            | ((self.words[1] ^ network.words[1]) & mask.words[1])
            | ((self.words[2] ^ network.words[2]) & mask.words[2])
            | ((self.words[3] ^ network.words[3]) & mask.words[3])
            == 0
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(addr: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(addr.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(addr: Ipv6Addr) -> Self {
        let bits = addr.to_bits();
        let word = |shift: u32| ((bits >> shift) as u32).to_be();
        Self { words: [word(96), word(64), word(32), word(0)] }
    }
}

impl From<IpAddr> for Addr {
    fn from(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(addr) => addr.into(),
            IpAddr::V6(addr) => addr.into(),
        }
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        let [a, b, c, d] = addr.words.map(|word| u128::from(u32::from_be(word)));
        Ipv6Addr::from(a << 96 | b << 64 | c << 32 | d).to_canonical()
    }
}

/// A port as it stands in a header: two bytes in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Port {
    /// The field as it stands in memory.
    pub be: u16,
}

impl Port {
    /// No port: frontends of "every other port", flows of protocols without ports.
    pub const ZERO: Self = Self { be: 0 };

    /// The port with this number.
    #[must_use]
    #[inline(always)]
    pub const fn new(number: u16) -> Self {
        Self { be: number.to_be() }
    }

    /// The port's number.
    #[must_use]
    #[inline(always)]
    pub const fn number(self) -> u16 {
        u16::from_be(self.be)
    }
}

impl PartialOrd for Port {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Port {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.number().cmp(&other.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_there_and_back() {
        for text in ["0.0.0.0", "10.1.2.3", "255.255.255.255", "::", "::1", "2001:db8::7:8"] {
            let addr: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Addr::from(addr)), addr);
            assert_eq!(Addr::from(addr).is_v4(), addr.is_ipv4());
        }
    }

    #[test]
    fn loopback_is_told_from_other_addresses() {
        for text in ["127.0.0.1", "127.255.0.9", "126.0.0.1", "0.0.0.127", "::1", "::", "::2", "1::1", "128.0.0.1"] {
            let addr: IpAddr = text.parse().unwrap();
            assert_eq!(Addr::from(addr).is_loopback(), addr.is_loopback(), "{text}");
        }
    }
}
