//! A map in a sorted vector: there are several for every Service port, with a handful of entries each, and trees of that
//! size are mostly room.

use std::borrow::Borrow;

/// Keys with values that are copied.
#[derive(Clone, Debug)]
pub struct Sorted<K, V>(Vec<(K, V)>);

impl<K, V> Default for Sorted<K, V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: Ord, V: Copy> Sorted<K, V> {
    /// The value of a key.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let place = self.0.binary_search_by(|(there, _)| there.borrow().cmp(key)).ok()?;
        Some(self.0[place].1)
    }

    /// The value of a key, which is made if there is none.
    pub fn get_or_insert_with(&mut self, key: K, make: impl FnOnce() -> V) -> V {
        match self.0.binary_search_by(|(there, _)| there.cmp(&key)) {
            Ok(place) => self.0[place].1,
            Err(place) => {
                let value = make();
                if self.0.len() < 8 {
                    self.0.reserve_exact(1);
                }
                self.0.insert(place, (key, value));
                value
            }
        }
    }

    /// Takes out what a predicate picks.
    pub fn extract(&mut self, mut picks: impl FnMut(&K, V) -> bool) -> Vec<(K, V)> {
        self.0.extract_if(.., |(key, value)| picks(key, *value)).collect()
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// The keys in order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.0.iter().map(|(key, _)| key)
    }

    /// The values in the order of their keys.
    pub fn values(&self) -> impl Iterator<Item = V> {
        self.0.iter().map(|(_, value)| *value)
    }
}
