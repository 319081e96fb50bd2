//! A map from small numbers that mostly follow one another, as ids and slots do.
//!
//! In: numbers with values. Out: the same in the order of the numbers. A tree holds pages of them, so that a number far from the
//! others takes no more than a page.

use std::{collections::BTreeMap, fmt, ops::Index};

/// Numbers on a page.
const PAGE: u32 = 64;

/// A map in the order of its keys, with the names of `BTreeMap`'s methods.
#[derive(Clone, PartialEq, Eq)]
pub struct Dense<V> {
    /// Pages by number, none of them empty.
    pages: BTreeMap<u32, Box<[Option<V>; PAGE as usize]>>,
    len: usize,
}

/// The keys of a page. The last one's end is no number any more.
fn keys(number: u32) -> impl Iterator<Item = u32> {
    (0..PAGE).map(move |at| number * PAGE + at)
}

const fn place(key: u32) -> (u32, usize) {
    (key / PAGE, (key % PAGE) as usize)
}

impl<V> Default for Dense<V> {
    fn default() -> Self {
        Self { pages: BTreeMap::new(), len: 0 }
    }
}

impl<V: fmt::Debug> fmt::Debug for Dense<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<V> Dense<V> {
    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &u32) -> Option<&V> {
        let (page, at) = place(*key);
        self.pages.get(&page)?[at].as_ref()
    }

    /// The value of a key, to be changed.
    pub fn get_mut(&mut self, key: &u32) -> Option<&mut V> {
        let (page, at) = place(*key);
        self.pages.get_mut(&page)?[at].as_mut()
    }

    /// Whether the key has a value.
    #[must_use]
    pub fn contains_key(&self, key: &u32) -> bool {
        self.get(key).is_some()
    }

    /// Gives the key a value; returns the one that it had.
    pub fn insert(&mut self, key: u32, value: V) -> Option<V> {
        let (page, at) = place(key);
        let page = self.pages.entry(page).or_insert_with(|| Box::new([const { None }; PAGE as usize]));
        let old = page[at].replace(value);
        self.len += usize::from(old.is_none());
        old
    }

    /// Takes the key's value away.
    pub fn remove(&mut self, key: &u32) -> Option<V> {
        let (number, at) = place(*key);
        let page = self.pages.get_mut(&number)?;
        let old = page[at].take();
        self.len -= usize::from(old.is_some());
        if page.iter().all(Option::is_none) {
            self.pages.remove(&number);
        }
        old
    }

    /// Keeps what a predicate says.
    pub fn retain(&mut self, mut keeps: impl FnMut(u32, &V) -> bool) {
        let mut len = 0;
        self.pages.retain(|number, page| {
            let before = len;
            for (key, value) in keys(*number).zip(page.iter_mut()) {
                *value = value.take().filter(|value| keeps(key, value));
                len += usize::from(value.is_some());
            }
            len > before
        });
        self.len = len;
    }

    /// How many keys have a value.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether no key has a value.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keys with their values.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &V)> {
        self.pages.iter().flat_map(|(number, page)| {
            keys(*number).zip(page.iter()).filter_map(|(key, value)| Some((key, value.as_ref()?)))
        })
    }

    /// Keys with their values, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut V)> {
        self.pages.iter_mut().flat_map(|(number, page)| {
            keys(*number).zip(page.iter_mut()).filter_map(|(key, value)| Some((key, value.as_mut()?)))
        })
    }

    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = u32> {
        self.iter().map(|(key, _)| key)
    }

    /// The values.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// The values, to be changed.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.iter_mut().map(|(_, value)| value)
    }

    /// The largest key.
    #[must_use]
    pub fn last_key(&self) -> Option<u32> {
        let (number, page) = self.pages.last_key_value()?;
        keys(*number).zip(page.iter()).filter(|(_, value)| value.is_some()).last().map(|(key, _)| key)
    }
}

impl<V> Index<&u32> for Dense<V> {
    type Output = V;

    /// # Panics
    ///
    /// If the key has no value.
    fn index(&self, key: &u32) -> &V {
        self.get(key).expect("the key has a value")
    }
}

impl<V> Extend<(u32, V)> for Dense<V> {
    fn extend<I: IntoIterator<Item = (u32, V)>>(&mut self, entries: I) {
        entries.into_iter().for_each(|(key, value)| _ = self.insert(key, value));
    }
}

impl<V> FromIterator<(u32, V)> for Dense<V> {
    fn from_iter<I: IntoIterator<Item = (u32, V)>>(entries: I) -> Self {
        let mut dense = Self::default();
        dense.extend(entries);
        dense
    }
}

impl<V, const N: usize> From<[(u32, V); N]> for Dense<V> {
    fn from(entries: [(u32, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_what_a_tree_would() {
        let (mut dense, mut tree) = (Dense::default(), BTreeMap::new());
        for step in 0..4000_u32 {
            let key = step.wrapping_mul(2_654_435_761) % 200 + if step % 7 == 0 { u32::MAX - 199 } else { 0 };
            if step % 3 == 0 {
                assert_eq!(dense.remove(&key), tree.remove(&key));
            } else {
                assert_eq!(dense.insert(key, step), tree.insert(key, step));
            }
            assert_eq!(dense.get(&key), tree.get(&key));
            assert_eq!((dense.len(), dense.last_key()), (tree.len(), tree.keys().last().copied()));
        }
        assert!(dense.iter().eq(tree.iter().map(|(key, value)| (*key, value))));
        dense.retain(|key, _| key % 2 == 0);
        tree.retain(|key, _| key % 2 == 0);
        assert_eq!(dense, tree.iter().map(|(key, value)| (*key, *value)).collect());
        tree.keys().for_each(|key| _ = dense.remove(key));
        assert_eq!(dense, Dense::default(), "nothing is left of what is empty");
    }
}
