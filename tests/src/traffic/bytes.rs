//! Bytes that both ends can make for themselves, so that a stream of any size is compared without being kept.

use std::io::{self, Read, Write};

const BLOCK: usize = 64 * 1024;

/// Fills `block`, which starts at `offset` (a multiple of 8) of the stream that `seed` names.
pub fn fill(block: &mut [u8], seed: u64, offset: u64) {
    for (index, word) in block.chunks_mut(8).enumerate() {
        let value = mix(seed.wrapping_add(offset / 8).wrapping_add(index as u64)).to_le_bytes();
        let length = word.len();
        word.copy_from_slice(&value[..length]);
    }
}

/// Writes the first `length` bytes of a stream.
pub fn send(to: &mut impl Write, length: u64, seed: u64) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    let mut offset = 0;
    while offset < length {
        let part = block_length(length - offset);
        fill(&mut block[..part], seed, offset);
        to.write_all(&block[..part])?;
        offset += part as u64;
    }
    to.flush()
}

/// Reads `length` bytes; an error names the first block that isn't what was sent.
pub fn check(from: &mut impl Read, length: u64, seed: u64) -> io::Result<()> {
    let (mut block, mut expected) = (vec![0; BLOCK], vec![0; BLOCK]);
    let mut offset = 0;
    let mut broken = None;
    while offset < length {
        let part = block_length(length - offset);
        from.read_exact(&mut block[..part])?;
        fill(&mut expected[..part], seed, offset);
        if block[..part] != expected[..part] {
            broken = broken.or(Some(offset));
        }
        offset += part as u64;
    }
    match broken {
        None => Ok(()),
        Some(offset) => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the {BLOCK} bytes from offset {offset} are not what was sent"),
        )),
    }
}

fn block_length(left: u64) -> usize {
    usize::try_from(left).map_or(BLOCK, |left| left.min(BLOCK))
}

/// SplitMix64: cheap, and no two positions look alike.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_is_recognised_and_one_changed_bit_is_not() {
        for length in [0, 1, 8, 65_535, 65_536, 65_537, 200_003] {
            let mut stream = Vec::new();
            send(&mut stream, length, 7).unwrap();
            assert_eq!(stream.len() as u64, length);
            check(&mut stream.as_slice(), length, 7).unwrap();
            if let Some(last) = stream.last_mut() {
                *last ^= 1;
                assert_eq!(check(&mut stream.as_slice(), length, 7).unwrap_err().kind(), io::ErrorKind::InvalidData);
            }
        }
    }
}
