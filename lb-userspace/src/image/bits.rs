//! Who uses which bit of "may be a frontend" or "may be an endpoint".
//!
//! Several addresses share a bit, so users are counted. A bit outlives its last user by the longest life of a flow: a
//! connection may still name what is gone, and a packet without its bit would never be looked up.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use lb_common::memory::BitSet;

/// Seconds after which no flow names what is gone: the idle time of an established TCP connection.
pub const FLOW_LIFE: u64 = 24 * 60 * 60;

/// The users of one array of bits.
#[derive(Clone, Debug, Default)]
pub struct Bits {
    used: BitSet,
    /// How many users a bit has beside its first, where it has any: few do.
    more: BTreeMap<u32, u32>,
    /// When bits without a user may be cleared.
    idle: BTreeMap<u32, u64>,
    queue: VecDeque<(u64, u32)>,
}

impl Bits {
    /// One more user.
    pub fn add(&mut self, bit: u32) {
        if !self.used.insert(bit) {
            *self.more.entry(bit).or_default() += 1;
        }
        self.idle.remove(&bit);
    }

    /// One user less.
    pub fn remove(&mut self, bit: u32, now: u64) {
        if let Some(more) = self.more.get_mut(&bit) {
            *more -= 1;
            if *more == 0 {
                self.more.remove(&bit);
            }
        } else if self.used.remove(&bit) {
            self.leave(bit, now);
        }
    }

    /// A bit that was found set; if nobody comes to use it, it is cleared some day.
    pub fn found(&mut self, bit: u32, now: u64) {
        if !self.used.contains(&bit) {
            self.leave(bit, now);
        }
    }

    /// Whether some bit's time has come.
    pub fn has_expired(&self, now: u64) -> bool {
        self.queue.front().is_some_and(|(until, _)| *until <= now)
    }

    /// Bits that nothing can name any more. Those that flows still name get another life.
    pub fn expire(&mut self, now: u64, named: &BTreeSet<u32>) -> Vec<u32> {
        let mut expired = Vec::new();
        while let Some((until, bit)) = self.queue.pop_front_if(|(until, _)| *until <= now) {
            if self.idle.get(&bit) == Some(&until) {
                self.idle.remove(&bit);
                if named.contains(&bit) {
                    self.leave(bit, now);
                } else {
                    expired.push(bit);
                }
            }
        }
        expired
    }

    fn leave(&mut self, bit: u32, now: u64) {
        let until = now + FLOW_LIFE;
        self.idle.insert(bit, until);
        self.queue.push_back((until, bit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_is_cleared_a_flows_life_after_its_last_user() {
        let mut bits = Bits::default();
        bits.add(7);
        bits.add(7);
        bits.remove(7, 0);
        assert!(bits.expire(FLOW_LIFE, &BTreeSet::new()).is_empty(), "one user is left");
        bits.remove(7, 10);
        bits.add(7);
        bits.remove(7, 20);
        bits.found(8, 20);
        assert!(bits.expire(FLOW_LIFE + 19, &BTreeSet::new()).is_empty());
        assert_eq!(bits.expire(FLOW_LIFE + 20, &BTreeSet::new()), [7, 8]);
        assert!(bits.expire(u64::MAX, &BTreeSet::new()).is_empty());
    }

    #[test]
    fn a_bit_that_a_flow_names_gets_another_life() {
        let mut bits = Bits::default();
        bits.add(7);
        bits.remove(7, 0);
        assert!(bits.has_expired(FLOW_LIFE));
        assert!(bits.expire(FLOW_LIFE, &[7].into()).is_empty());
        assert!(!bits.has_expired(2 * FLOW_LIFE - 1));
        assert_eq!(bits.expire(2 * FLOW_LIFE, &BTreeSet::new()), [7]);
    }
}
