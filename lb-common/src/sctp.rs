//! SCTP's checksum, when ports change.
//!
//! In: the checksum that a packet has, the words that differ, how long the packet is. Out: the checksum that it must have.
//! The payload is never read: a CRC is linear, so the checksum changes by the CRC of the difference alone, which is
//! nothing but the ports followed by zeros (RFC 9260 §6.8 and appendix A; CRC32c covers the whole packet, and no address).

/// The polynomial of CRC32c, lowest power in the highest bit, without x^32.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// The polynomial 1.
const ONE: u32 = 1 << 31;

/// How many values four bits have.
const NIBBLES: usize = 16;

/// x^(8 n 16^i) at index `16 i + n`: what `n 16^i` bytes behind a difference multiply it by. A length has four digits.
static POWERS: [u32; 4 * NIBBLES] = powers();

/// `a x` modulo the polynomial.
#[inline(always)]
const fn times_x(a: u32) -> u32 {
    a >> 1 ^ POLYNOMIAL & 0_u32.wrapping_sub(a & 1)
}

/// `a b` modulo the polynomial.
#[inline(always)]
const fn times(mut a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 0;
    while bit < u32::BITS {
        product ^= a & 0_u32.wrapping_sub(b >> 31);
        a = times_x(a);
        b <<= 1;
        bit += 1;
    }
    product
}

const fn powers() -> [u32; 4 * NIBBLES] {
    let mut powers = [ONE; 4 * NIBBLES];
    // x^8, then x^(8 16), …
    let mut base = ONE >> 8;
    let mut at = 0;
    while at < powers.len() {
        if at % NIBBLES != 0 {
            powers[at] = times(powers[at - 1], base);
        }
        if at % NIBBLES == NIBBLES - 1 {
            base = times(powers[at], base);
        }
        at += 1;
    }
    powers
}

/// A difference moved to its place in the checksum of so many bytes: multiplied by x^(8 length).
///
/// In the kernel a global function: verified once and by itself (since Linux 5.6), not with all that its callers may have done.
// SAFETY: nothing else in the object has this name; BPF's global functions keep theirs.
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
#[inline(never)]
pub extern "C" fn sctp_shift(mut difference: u32, length: u32) -> u32 {
    let mut digit = 0;
    while digit < 4 {
        // The mask is for the verifier, which doesn't know what the compiler knows of the sum.
        let at = core::hint::black_box((length >> (4 * digit) & 0xf) as usize + NIBBLES * digit);
        let Some(power) = POWERS.get(at) else { return 0 };
        difference = times(difference, *power);
        digit += 1;
    }
    difference
}

/// The checksum of an SCTP packet of so many bytes whose ports have changed; ports and checksums as they stand in memory.
///
/// Zero stays zero: so looks a checksum that the sender left to the device, which adds it up where it stands. One in 2^32
/// complete ones looks the same, and its packet is lost.
#[must_use]
#[inline(always)]
pub fn updated(checksum: u32, old_ports: u32, new_ports: u32, length: u16) -> u32 {
    if checksum == 0 {
        return 0;
    }
    // Both are little-endian: the first byte on the wire is the first into the CRC, and the lowest of its result.
    let difference = sctp_shift(u32::from_le(old_ports ^ new_ports), length.into());
    checksum ^ difference.to_le()
}

#[cfg(test)]
mod tests {
    use crc::{CRC_32_ISCSI, Crc};
    use proptest::prelude::*;

    use super::*;

    const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// The packet with the checksum that another implementation computes.
    fn summed(mut packet: Vec<u8>) -> Vec<u8> {
        packet[8..12].fill(0);
        let sum = CRC32C.checksum(&packet);
        packet[8..12].copy_from_slice(&sum.to_le_bytes());
        packet
    }

    fn changed(packet: &[u8], ports: [u8; 4]) -> Vec<u8> {
        let mut packet = packet.to_vec();
        packet[..4].copy_from_slice(&ports);
        packet
    }

    fn agrees(packet: Vec<u8>, ports: [u8; 4]) {
        let before = summed(packet);
        let after = summed(changed(&before, ports));
        let length = u16::try_from(before.len()).unwrap();
        let sum = updated(word(&before, 8), word(&before, 0), word(&after, 0), length);
        assert_eq!(sum, word(&after, 8), "{} bytes", before.len());
    }

    #[test]
    fn an_updated_checksum_is_the_one_computed_anew_at_every_length() {
        let bytes: Vec<u8> = (0..=u16::MAX).map(|i| (i.wrapping_mul(40_503) >> 7) as u8).collect();
        for length in (12..1600).chain((12..65_535).step_by(997)).chain([65_535]) {
            agrees(bytes[..length].to_vec(), [0x1f, 0x90, 0, 80]);
        }
    }

    proptest! {
        #[test]
        fn an_updated_checksum_is_the_one_computed_anew(
            packet in proptest::collection::vec(any::<u8>(), 12..3000), ports: [u8; 4],
        ) {
            agrees(packet, ports);
        }
    }

    #[test]
    fn a_checksum_that_the_sender_left_to_the_device_is_left_to_it() {
        assert_eq!(updated(0, 1, 2, 12), 0);
    }
}
