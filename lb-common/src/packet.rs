//! The bytes of a packet, as a trait: a kernel context and a byte slice read and write alike.
//!
//! Offsets count from the start of the frame. Reads and writes past the end answer `None`, whatever the offset.

use crate::{addr::Addr, checksum::Difference};

/// How far into a frame headers are read. Behind it a packet is not ours.
pub const READ_LIMIT: usize = 511;

/// Plain bytes that a header is read into.
///
/// # Safety
/// Any bytes are a valid value, and the alignment is at most 2.
pub unsafe trait Wire: Copy {}

// SAFETY: an integer, align 2. (Single bytes are left out: the verifier takes no bound from `start + 1 > end`.)
unsafe impl Wire for u16 {}
// SAFETY: as above.
unsafe impl<const N: usize> Wire for [u16; N] {}

/// What a checksum difference is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Covers {
    /// The pseudo-header: counts also where the sender left the checksum to the device (CHECKSUM_PARTIAL).
    PseudoHeader {
        /// Whether the pseudo-header is IPv6's: then the changed words are in the packet without a checksum of their own.
        v6: bool,
    },
    /// The segment itself.
    Segment,
}

/// A frame that can be read and rewritten.
pub trait Packet {
    /// The frame's length.
    fn len(&self) -> usize;

    /// Whether there are no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes the first `bytes` readable, as far as there are that many.
    fn pull(&mut self, bytes: usize);

    /// The value at an offset of at most [`READ_LIMIT`].
    fn read<T: Wire>(&self, offset: usize) -> Option<T>;

    /// Replaces the value at an offset of at most [`READ_LIMIT`].
    fn write<T: Wire>(&mut self, offset: usize, value: T) -> Option<()>;

    /// Updates a transport checksum at an offset; `udp` keeps a zero as it is.
    fn update_checksum(&mut self, offset: usize, difference: Difference, covers: Covers, udp: bool) -> Option<()>;

    /// Cuts or lengthens the frame. What is new is zero.
    fn resize(&mut self, len: usize) -> Option<()>;

    /// Replaces an IPv6 address. The kernel may need to note the change in the device's checksum.
    fn write_v6(&mut self, offset: usize, addr: &Addr) -> Option<()> {
        self.write(offset, halves(addr))
    }
}

/// An address as 16-bit halves, which is how packets align it.
#[must_use]
#[inline(always)]
pub const fn halves(addr: &Addr) -> [u16; 8] {
    let [a, b, c, d] = addr.words;
    if cfg!(target_endian = "little") {
        [a as u16, (a >> 16) as u16, b as u16, (b >> 16) as u16, c as u16, (c >> 16) as u16, d as u16, (d >> 16) as u16]
    } else {
        [(a >> 16) as u16, a as u16, (b >> 16) as u16, b as u16, (c >> 16) as u16, c as u16, (d >> 16) as u16, d as u16]
    }
}

/// Two halves as the word that they are in memory.
#[must_use]
#[inline(always)]
pub const fn word(first: u16, second: u16) -> u32 {
    if cfg!(target_endian = "little") {
        first as u32 | (second as u32) << 16
    } else {
        (first as u32) << 16 | second as u32
    }
}

/// A word as the two halves that it is in memory.
#[must_use]
#[inline(always)]
pub const fn word_halves(word: u32) -> [u16; 2] {
    if cfg!(target_endian = "little") { [word as u16, (word >> 16) as u16] } else { [(word >> 16) as u16, word as u16] }
}

#[cfg(any(test, feature = "user"))]
mod bytes {
    use super::{Covers, Difference, Packet, READ_LIMIT, Wire};

    /// A frame with complete checksums in ordinary memory.
    impl Packet for Vec<u8> {
        fn len(&self) -> usize {
            Self::len(self)
        }

        fn pull(&mut self, _: usize) {}

        fn read<T: Wire>(&self, offset: usize) -> Option<T> {
            let bytes = self.get(offset..offset.checked_add(size_of::<T>())?).filter(|_| offset <= READ_LIMIT)?;
            // SAFETY: `bytes` is as long as T, and any bytes are a valid T.
            Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
        }

        fn write<T: Wire>(&mut self, offset: usize, value: T) -> Option<()> {
            let bytes = self.get_mut(offset..offset.checked_add(size_of::<T>())?).filter(|_| offset <= READ_LIMIT)?;
            // SAFETY: `bytes` is as long as T.
            unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
            Some(())
        }

        fn update_checksum(&mut self, offset: usize, difference: Difference, _: Covers, udp: bool) -> Option<()> {
            let checksum = self.read(offset)?;
            self.write(offset, if udp { difference.apply_udp(checksum) } else { difference.apply(checksum) })
        }

        fn resize(&mut self, len: usize) -> Option<()> {
            Self::resize(self, len, 0);
            Some(())
        }
    }
}
