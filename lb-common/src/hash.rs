//! The hash by which flows choose endpoints and ports: murmur3's mixing (A. Appleby, public domain) over a tuple.

use crate::addr::{Addr, Port};

#[inline(always)]
const fn mix(hash: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}

/// A uniform 32-bit hash of a flow's ends.
#[must_use]
#[inline(always)]
pub const fn tuple(src: &Addr, sport: Port, dst: &Addr, dport: Port) -> u32 {
    let mut hash = mix(7, src.words[0] ^ src.words[1].rotate_left(11));
    hash = mix(hash, src.words[2]);
    hash = mix(hash, src.words[3]);
    hash = mix(hash, dst.words[0] ^ dst.words[1].rotate_left(11));
    hash = mix(hash, dst.words[2] ^ dst.words[3].rotate_left(7));
    hash = mix(hash, (sport.be as u32) << 16 | dport.be as u32);
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use core::net::Ipv4Addr;

    use super::*;

    #[test]
    fn consecutive_ports_spread_evenly() {
        let [client, service] = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 96, 0, 1)].map(Addr::from);
        for len in [2_u32, 3, 7, 10] {
            let mut counts = vec![0_u32; len as usize];
            for port in 30000..40000 {
                counts[(tuple(&client, Port::new(port), &service, Port::new(80)) % len) as usize] += 1;
            }
            let fair = 10000 / len;
            assert!(counts.iter().all(|count| count.abs_diff(fair) < fair / 5), "{counts:?}");
        }
    }
}
