//! A set of bits of an array that is mostly small: the kernel's bits of frontends and endpoints.
//!
//! In: numbers of bits. Out: the same in order.

use std::fmt;

/// A set of numbers, as long as the largest of them.
#[derive(Clone, Default)]
pub struct BitSet(Vec<u64>);

const fn place(bit: u32) -> (usize, u64) {
    ((bit / 64) as usize, 1 << (bit % 64))
}

impl BitSet {
    /// Whether the bit is set.
    #[must_use]
    pub fn contains(&self, bit: &u32) -> bool {
        let (word, mask) = place(*bit);
        self.0.get(word).is_some_and(|word| word & mask != 0)
    }

    /// Sets a bit; returns whether it was not.
    pub fn insert(&mut self, bit: u32) -> bool {
        let new = !self.contains(&bit);
        let (word, mask) = place(bit);
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= mask;
        new
    }

    /// Clears a bit; returns whether it was set.
    pub fn remove(&mut self, bit: &u32) -> bool {
        let there = self.contains(bit);
        let (word, mask) = place(*bit);
        if there {
            self.0[word] &= !mask;
        }
        there
    }

    /// The bits that are set.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        let words = (0_u32..).zip(&self.0).filter(|(_, word)| **word != 0);
        words.flat_map(|(number, word)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| number * 64 + bit)
        })
    }

    /// How many are set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether none is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
}

impl PartialEq for BitSet {
    fn eq(&self, other: &Self) -> bool {
        let (short, long) = if self.0.len() < other.0.len() { (self, other) } else { (other, self) };
        let (same, rest) = long.0.split_at(short.0.len());
        short.0 == same && rest.iter().all(|word| *word == 0)
    }
}

impl Eq for BitSet {}

impl fmt::Debug for BitSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl Extend<u32> for BitSet {
    fn extend<I: IntoIterator<Item = u32>>(&mut self, bits: I) {
        bits.into_iter().for_each(|bit| _ = self.insert(bit));
    }
}

impl FromIterator<u32> for BitSet {
    fn from_iter<I: IntoIterator<Item = u32>>(bits: I) -> Self {
        let mut set = Self::default();
        set.extend(bits);
        set
    }
}

impl<const N: usize> From<[u32; N]> for BitSet {
    fn from(bits: [u32; N]) -> Self {
        bits.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn it_holds_what_a_tree_would() {
        let (mut bits, mut tree) = (BitSet::default(), BTreeSet::new());
        for step in 0..4000_u32 {
            let bit = step.wrapping_mul(2_654_435_761) % 500;
            if step % 3 == 0 {
                assert_eq!(bits.remove(&bit), tree.remove(&bit));
            } else {
                assert_eq!(bits.insert(bit), tree.insert(bit));
            }
            assert_eq!(bits.contains(&bit), tree.contains(&bit));
        }
        assert!(bits.iter().eq(tree.iter().copied()));
        assert_eq!((bits.len(), bits.is_empty()), (tree.len(), false));
        assert_eq!(bits, tree.iter().copied().collect());
        tree.iter().for_each(|bit| _ = bits.remove(bit));
        assert!(bits.is_empty() && bits == BitSet::default());
    }
}
