//! One's complement arithmetic (RFC 1071, RFC 1624), on words as they stand in memory: byte order does not matter.

use crate::addr::{Addr, Port};

/// Folds a sum to 16 bits.
#[must_use]
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// What must be added to the sum that a checksum covers, since some words have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    sum: u64,
}

impl Difference {
    /// Nothing has changed.
    pub const NONE: Self = Self { sum: 0 };

    /// A 16-bit word has changed.
    #[must_use]
    #[inline(always)]
    pub const fn word16(self, old: u16, new: u16) -> Self {
        Self { sum: self.sum.wrapping_add(!old as u64).wrapping_add(new as u64) }
    }

    /// A 32-bit word has changed.
    #[must_use]
    #[inline(always)]
    pub const fn word32(self, old: u32, new: u32) -> Self {
        Self { sum: self.sum.wrapping_add(!old as u64).wrapping_add(new as u64) }
    }

    /// An address has changed to another of its family.
    #[must_use]
    #[inline(always)]
    pub const fn addr(self, old: &Addr, new: &Addr) -> Self {
        self.word32(old.words[0], new.words[0])
            .word32(old.words[1], new.words[1])
            .word32(old.words[2], new.words[2])
            .word32(old.words[3], new.words[3])
    }

    /// A port has changed.
    #[must_use]
    #[inline(always)]
    pub const fn port(self, old: Port, new: Port) -> Self {
        self.word16(old.be, new.be)
    }

    /// Both have happened.
    #[must_use]
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        Self { sum: self.wsum() as u64 + other.wsum() as u64 }
    }

    /// The sum folded to 32 bits: the kernel's `__wsum`, as `bpf_l4_csum_replace` takes it.
    #[must_use]
    #[inline(always)]
    pub const fn wsum(self) -> u32 {
        let sum = (self.sum & 0xffff_ffff) + (self.sum >> 32);
        let sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum as u32
    }

    /// The checksum after the change (RFC 1624, equation 3).
    #[must_use]
    #[inline(always)]
    pub const fn apply(self, checksum: u16) -> u16 {
        !fold(!checksum as u64 + self.wsum() as u64)
    }

    /// The same for UDP, whose zero means "no checksum" and stays, and which never becomes zero (RFC 768).
    #[must_use]
    #[inline(always)]
    pub const fn apply_udp(self, checksum: u16) -> u16 {
        match (checksum, self.apply(checksum)) {
            (0, _) => 0,
            (_, 0) => 0xffff,
            (_, sum) => sum,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn full(words: &[u16]) -> u16 {
        !fold(words.iter().map(|word| u64::from(*word)).sum())
    }

    proptest! {
        #[test]
        fn an_updated_checksum_is_the_checksum_computed_anew(
            words in proptest::collection::vec(any::<u16>(), 4..40), at in any::<prop::sample::Index>(), new in any::<u32>(),
        ) {
            let at = at.index(words.len() / 2 - 1) * 2;
            let mut changed = words.clone();
            let [low, high] = [new as u16, (new >> 16) as u16];
            let old = u32::from(words[at]) | u32::from(words[at + 1]) << 16;
            (changed[at], changed[at + 1]) = (low, high);
            let updated = Difference::NONE.word32(old, new).apply(full(&words));
            // 0 and 0xffff are the same number; only a sum of nothing but zeros can tell them apart.
            prop_assert!(updated == full(&changed) || (updated ^ full(&changed)) == 0xffff && [0, 0xffff].contains(&updated));
            let halves = Difference::NONE.word16(words[at], low).word16(words[at + 1], high).apply(full(&words));
            prop_assert!(updated == halves || [0, 0xffff].contains(&updated));
        }

        #[test]
        fn a_change_and_its_reverse_cancel_out(checksum in 1..0xffff_u16, old in any::<[u32; 4]>(), new in any::<[u32; 4]>()) {
            let (old, new) = (Addr { words: old }, Addr { words: new });
            let there = Difference::NONE.addr(&old, &new).apply_udp(checksum);
            prop_assert_eq!(Difference::NONE.addr(&new, &old).apply_udp(there), checksum);
        }
    }

    #[test]
    fn a_udp_packet_without_checksum_stays_without() {
        assert_eq!(Difference::NONE.word16(1, 2).apply_udp(0), 0);
    }
}
