//! Labels and selectors in compact form: a sorted slice that many objects share.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Deserializer};

/// A pair of key and value.
pub type Label = (Arc<str>, Arc<str>);

/// A map of labels, or the pairs that a selector asks for.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels(Arc<[Label]>);

impl Labels {
    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(candidate, _)| (**candidate).cmp(key)).ok()?;
        Some(&self.0[at].1)
    }

    /// Whether there is such a key, with any value.
    #[must_use]
    pub fn contains_key(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// The pairs in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = &Label> {
        self.0.iter()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all pairs of a selector stand among these labels.
    #[must_use]
    pub fn match_all(&self, selector: &Self) -> bool {
        selector.iter().all(|(key, value)| self.get(key) == Some(value))
    }

    /// The labels with these keys.
    #[must_use]
    pub fn only(&self, keys: &[&str]) -> Self {
        self.iter().filter(|(key, _)| keys.contains(&&**key)).cloned().collect()
    }

    /// Whether someone else holds the same slice.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter().map(|(key, value)| (key, value))).finish()
    }
}

impl FromIterator<Label> for Labels {
    fn from_iter<I: IntoIterator<Item = Label>>(pairs: I) -> Self {
        // The map sorts, and the last of equal keys wins, as in any JSON object.
        Self(pairs.into_iter().collect::<BTreeMap<_, _>>().into_iter().collect())
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Labels {
    fn from(pairs: [(&str, &str); N]) -> Self {
        pairs.into_iter().map(|(key, value)| (key.into(), value.into())).collect()
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // `null` is the empty text, as it is to the API server.
        let pairs: BTreeMap<String, Option<String>> = BTreeMap::deserialize(deserializer)?;
        Ok(pairs.into_iter().map(|(key, value)| (key.into(), value.unwrap_or_default().into())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_matches_when_all_its_pairs_stand_among_the_labels() {
        let labels = Labels::from([("tier", "front"), ("app", "web")]);
        for (selector, expected) in [
            (Labels::from([("app", "web")]), true),
            (Labels::from([("app", "web"), ("tier", "front")]), true),
            (Labels::from([("app", "api")]), false),
            (Labels::from([("app", "web"), ("zone", "a")]), false),
        ] {
            assert_eq!(labels.match_all(&selector), expected, "{selector:?}");
        }
    }
}
