//! A sorted list as a set: most sets of the model and of the image hold one element or four, and there are tens of thousands of them.

/// A set in the order of its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SmallSet<T>(Vec<T>);

impl<T> Default for SmallSet<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Ord> SmallSet<T> {
    pub(crate) fn insert(&mut self, element: T) {
        if let Err(at) = self.0.binary_search(&element) {
            // A vector's own first step is four elements.
            if self.0.len() < 4 {
                self.0.reserve_exact(1);
            }
            self.0.insert(at, element);
        }
    }

    pub(crate) fn remove(&mut self, element: &T) {
        if let Ok(at) = self.0.binary_search(element) {
            self.0.remove(at);
        }
    }

    /// Takes out what a predicate picks.
    pub(crate) fn extract(&mut self, mut picks: impl FnMut(&T) -> bool) -> Vec<T> {
        self.0.extract_if(.., |element| picks(element)).collect()
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, T> {
        self.0.iter()
    }

    pub(crate) const fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_sorted_and_stand_once() {
        let mut set = SmallSet::default();
        for element in [3, 1, 2, 1, 3] {
            set.insert(element);
        }
        set.remove(&2);
        set.remove(&7);
        set.insert(5);
        assert_eq!(set.extract(|element| *element > 3), [5]);
        assert_eq!(set.iter().copied().collect::<Vec<_>>(), [1, 3]);
        assert_eq!((set.len(), set.is_empty()), (2, false));
    }
}
