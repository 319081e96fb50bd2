//! Small numbers that stand for things, used again some time after the thing is gone.
//!
//! Never here: what an id stands for.

use std::collections::{BTreeSet, VecDeque};

/// Seconds for which what is no longer named is left alone: a packet that read the old table is long done by then.
pub const GRACE: u64 = 2;

/// The smallest are given out first: nobody gets to this one.
pub const MOST_IDS: u32 = 1 << 20;

/// Gives out ids from 1 on; 0 is what tables hold where nothing was written.
#[derive(Clone, Debug)]
pub struct Ids {
    next: u32,
    free: BTreeSet<u32>,
    /// Ids from `next` on that are known, having come from restored tables.
    ahead: BTreeSet<u32>,
    resting: VecDeque<(u64, u32)>,
}

impl Default for Ids {
    fn default() -> Self {
        Self { next: 1, free: BTreeSet::new(), ahead: BTreeSet::new(), resting: VecDeque::new() }
    }
}

impl Ids {
    /// The smallest free id, passing over those that `taken` knows.
    pub fn take(&mut self, taken: impl Fn(u32) -> bool) -> u32 {
        if let Some(id) = self.free.pop_first() {
            return id;
        }
        while self.ahead.remove(&self.next) || taken(self.next) {
            self.next += 1;
        }
        self.next += 1;
        self.next - 1
    }

    /// An id that may be given out at once: nothing has named it for long.
    pub fn put(&mut self, id: u32) {
        if id != 0 {
            self.note(id);
            self.free.insert(id);
        }
    }

    /// An id that may be given out after the grace period.
    pub fn rest(&mut self, id: u32, now: u64) {
        self.note(id);
        self.resting.push_back((now + GRACE, id));
    }

    /// Notices that time has passed.
    pub fn release(&mut self, now: u64) {
        while let Some((_, id)) = self.resting.pop_front_if(|(ready, _)| *ready <= now) {
            self.put(id);
        }
    }

    fn note(&mut self, id: u32) {
        if id >= self.next {
            self.ahead.insert(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_used_again_after_the_grace_period() {
        let mut ids = Ids::default();
        assert_eq!([ids.take(|id| id == 2), ids.take(|id| id == 2)], [1, 3]);
        ids.rest(1, 10);
        ids.release(10 + GRACE - 1);
        assert_eq!(ids.take(|_| false), 4);
        ids.release(10 + GRACE);
        assert_eq!(ids.take(|_| false), 1);
    }

    #[test]
    fn a_restored_id_is_never_given_out_twice() {
        let mut ids = Ids::default();
        ids.rest(1, 0);
        ids.put(3);
        assert_eq!([ids.take(|_| false), ids.take(|_| false)], [3, 2]);
        ids.release(GRACE);
        assert_eq!([ids.take(|_| false), ids.take(|_| false)], [1, 4]);
    }
}
