//! One copy of each text: namespaces, node names, labels and port names stand in thousands of objects.
//!
//! In: texts as they were parsed. Out: shared ones. Never here: a meaning of any of them.

use std::{collections::HashSet, sync::Arc};

use super::{labels::Labels, pod::NamedPort};

/// Fewer texts than this are never worth a sweep.
const SWEEP_FROM: usize = 4096;

/// The texts and label sets that are in use. They are looked up for every object that is read, and never listed, so that the
/// order of a hash table shows nowhere.
#[derive(Debug, Default)]
pub struct Interner {
    texts: HashSet<Arc<str>>,
    labels: HashSet<Labels>,
    ports: HashSet<Arc<[NamedPort]>>,
    sweep_at: usize,
}

impl Interner {
    /// The shared copy of a text.
    pub fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(shared) = self.texts.get(text) {
            return shared.clone();
        }
        self.sweep();
        let shared: Arc<str> = text.into();
        self.texts.insert(shared.clone());
        shared
    }

    /// The shared copy of a set of labels.
    pub fn labels(&mut self, labels: &Labels) -> Labels {
        if let Some(shared) = self.labels.get(labels) {
            return shared.clone();
        }
        let shared: Labels = labels.iter().map(|(key, value)| (self.text(key), self.text(value))).collect();
        self.labels.insert(shared.clone());
        shared
    }

    /// The shared copy of a list of ports: all Pods of a Deployment have the same.
    pub fn ports(&mut self, ports: &[NamedPort]) -> Arc<[NamedPort]> {
        if let Some(shared) = self.ports.get(ports) {
            return shared.clone();
        }
        let shared: Arc<[NamedPort]> = ports.into();
        self.ports.insert(shared.clone());
        shared
    }

    /// Forgets what nobody else holds, once there is twice as much as after the last sweep: the cost of a sweep is
    /// spread over the insertions that led to it.
    fn sweep(&mut self) {
        if self.texts.len() + self.labels.len() < self.sweep_at.max(SWEEP_FROM) {
            return;
        }
        self.labels.retain(Labels::is_shared);
        self.ports.retain(|ports| Arc::strong_count(ports) > 1);
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        self.sweep_at = 2 * (self.texts.len() + self.labels.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_and_labels_are_one() {
        let mut interner = Interner::default();
        assert!(Arc::ptr_eq(&interner.text("a"), &interner.text("a")));
        let labels = Labels::from([("app", "web"), ("tier", "front")]);
        let first = interner.labels(&labels);
        assert!(first.is_shared());
        assert_eq!(first, labels);
    }

    #[test]
    fn what_nobody_holds_is_forgotten() {
        let mut interner = Interner::default();
        let kept = interner.text("kept");
        for n in 0..10 * SWEEP_FROM {
            interner.text(&n.to_string());
        }
        assert!(interner.texts.len() <= SWEEP_FROM);
        assert!(Arc::ptr_eq(&kept, &interner.text("kept")));
    }
}
