//! Where in the array of slots ranges lie: a buddy allocator.
//!
//! A range occupies the next power of two, aligned to its size, and free neighbours become one again. So the array is never
//! more than a few times larger than what is in it, however long ranges come and go.

use std::collections::{BTreeSet, VecDeque};

use super::ids::GRACE;

/// Larger offsets come from a table that isn't ours.
const MAX_END: u32 = 1 << 28;

/// A block of slots: its order (it has `1 << order` slots) and its offset, a multiple of its size.
type Block = (u32, u32);

/// Which slots are free.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    end: u32,
    free: BTreeSet<Block>,
    resting: VecDeque<(u64, Block)>,
}

impl Slots {
    /// The allocator of an array in which these ranges, as offset and length in this order, are in use; and those of them that can't
    /// have come from it: they overlap others or lie where no range begins.
    #[must_use]
    pub fn restore(used: impl IntoIterator<Item = (u32, u32)>) -> (Self, BTreeSet<(u32, u32)>) {
        let mut slots = Self::default();
        let mut strange = BTreeSet::new();
        for (offset, len) in used {
            let size = 1_u64 << order(len);
            if offset < slots.end || u64::from(offset) % size != 0 || u64::from(offset) + size > u64::from(MAX_END) {
                strange.insert((offset, len));
                continue;
            }
            slots.extend_to(offset);
            slots.end = offset + size as u32;
        }
        (slots, strange)
    }

    /// Slots for a range of this length, which isn't 0.
    pub fn take(&mut self, len: u32) -> u32 {
        let order = order(len);
        if let Some(&(mut larger, offset)) = self.free.range((order, 0)..).next() {
            self.free.remove(&(larger, offset));
            while larger > order {
                larger -= 1;
                self.free.insert((larger, offset + (1 << larger)));
            }
            return offset;
        }
        let offset = self.end.next_multiple_of(1 << order);
        self.extend_to(offset);
        self.end = offset + (1 << order);
        offset
    }

    /// A range that nothing names any more: its slots are used again after the grace period.
    pub fn rest(&mut self, offset: u32, len: u32, now: u64) {
        self.resting.push_back((now + GRACE, (order(len), offset)));
    }

    /// Notices that time has passed.
    pub fn release(&mut self, now: u64) {
        while let Some((_, block)) = self.resting.pop_front_if(|(ready, _)| *ready <= now) {
            self.put(block);
        }
    }

    /// How long the array has to be.
    #[must_use]
    pub const fn end(&self) -> u32 {
        self.end
    }

    /// Makes the slots up to this offset free blocks of the array.
    fn extend_to(&mut self, offset: u32) {
        while self.end < offset {
            let room = (offset - self.end).ilog2();
            let order = if self.end == 0 { room } else { room.min(self.end.trailing_zeros()) };
            self.free.insert((order, self.end));
            self.end += 1 << order;
        }
    }

    fn put(&mut self, (mut order, mut offset): Block) {
        while self.free.remove(&(order, offset ^ (1 << order))) {
            offset &= !(1 << order);
            order += 1;
        }
        self.free.insert((order, offset));
        // What is free at the end needs no room.
        while let Some(last) = (0..=MAX_END.ilog2())
            .filter_map(|order| Some((order, self.end.checked_sub(1 << order)?)))
            .find(|block| self.free.contains(block))
        {
            self.free.remove(&last);
            self.end = last.1;
        }
    }
}

const fn order(len: u32) -> u32 {
    if len > MAX_END { MAX_END.ilog2() } else { len.next_power_of_two().ilog2() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn freed_slots_are_used_again_after_the_grace_period() {
        let mut slots = Slots::default();
        assert_eq!([slots.take(3), slots.take(1), slots.take(2), slots.take(1)], [0, 4, 6, 5]);
        slots.rest(0, 3, 10);
        slots.release(10 + GRACE - 1);
        assert_eq!(slots.take(4), 8);
        slots.release(10 + GRACE);
        assert_eq!(slots.take(4), 0);
    }

    #[test]
    fn ranges_of_another_allocator_are_named() {
        let used = [(0, 4), (2, 2), (5, 2), (8, 3), (8, 9), (MAX_END, 1), (u32::MAX, 1)];
        let (mut slots, strange) = Slots::restore(used);
        assert_eq!(strange, [(2, 2), (5, 2), (8, 9), (u32::MAX, 1), (MAX_END, 1)].into());
        assert_eq!([slots.end(), slots.take(4), slots.take(1)], [12, 4, 12]);
    }

    proptest! {
        #[test]
        fn blocks_never_overlap_and_the_array_stays_small(steps in prop::collection::vec((any::<bool>(), 1_u32..40), 1..300)) {
            let mut slots = Slots::default();
            let mut used: Vec<(u32, u32)> = Vec::new();
            let mut most = 0;
            for (now, (free, len)) in steps.into_iter().enumerate() {
                let now = now as u64 * GRACE;
                slots.release(now);
                if free && !used.is_empty() {
                    let (offset, len) = used.swap_remove(len as usize % used.len());
                    slots.rest(offset, len, now);
                } else {
                    let offset = slots.take(len);
                    prop_assert!(used.iter().all(|(other, size)| offset + len <= *other || other + size <= offset));
                    prop_assert!(offset + len <= slots.end());
                    used.push((offset, len));
                }
                most = most.max(used.iter().map(|(_, len)| len.next_power_of_two()).sum::<u32>());
                // The largest block may be missing once for alignment, and one freed block may be at rest.
                prop_assert!(slots.end() <= 4 * most + 128, "{} slots for {most}", slots.end());
                let (restored, strange) = Slots::restore(used.iter().copied().collect::<BTreeSet<_>>());
                prop_assert!(strange.is_empty() && restored.end() <= slots.end());
            }
            for (offset, len) in used {
                slots.rest(offset, len, u64::MAX - GRACE);
            }
            slots.release(u64::MAX);
            prop_assert_eq!((slots.end(), slots.free.len()), (0, 0), "all is one again");
        }
    }
}
