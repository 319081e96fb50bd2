//! Which Pods a Service's selector takes, and which Services take a Pod, each without a walk over all.
//!
//! In: Pods and selectors as they come and go. Out: the two relations. Pods of one namespace with equal labels form a group
//! (the Pods of a Deployment do), and selectors are held against groups.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    labels::{Label, Labels},
    object::ObjectName,
    pod::PodState,
    small_set::SmallSet,
};

/// A label in a namespace.
type Pair = (Arc<str>, Arc<str>, Arc<str>);
/// Equal labels in a namespace.
type GroupKey = (Arc<str>, Labels);

/// The Pods and the selectors.
#[derive(Debug, Default)]
pub(super) struct Selection {
    pods: BTreeMap<ObjectName, Box<PodState>>,
    groups: BTreeMap<GroupKey, SmallSet<Arc<str>>>,
    /// Groups that have a label.
    groups_by_pair: BTreeMap<Pair, SmallSet<Labels>>,
    selectors: BTreeMap<ObjectName, Selector>,
    by_pair: BTreeMap<Pair, Selecting>,
}

/// The selector of a Service.
#[derive(Debug)]
struct Selector {
    labels: Labels,
    /// The pair under which it is found.
    home: Label,
}

/// Services whose selectors ask for a label.
#[derive(Debug, Default)]
struct Selecting {
    /// How many do.
    count: usize,
    /// Those which are found here.
    home: SmallSet<Arc<str>>,
}

impl Selection {
    pub(super) fn pod_count(&self) -> usize {
        self.pods.len()
    }

    pub(super) fn pod(&self, name: &ObjectName) -> Option<&PodState> {
        self.pods.get(name).map(|pod| &**pod)
    }

    /// Services that select Pods with these labels.
    pub(super) fn services(&self, namespace: &Arc<str>, labels: &Labels) -> Vec<ObjectName> {
        let mut found = Vec::new();
        for label in labels.iter() {
            let Some(selecting) = self.by_pair.get(&pair(namespace, label)) else { continue };
            for name in selecting.home.iter() {
                let service = ObjectName { namespace: namespace.clone(), name: name.clone() };
                if self.selectors.get(&service).is_some_and(|selector| labels.match_all(&selector.labels)) {
                    found.push(service);
                }
            }
        }
        found
    }

    /// Pods that a Service selects, by name within each group.
    pub(super) fn selected<'a>(&'a self, service: &'a ObjectName) -> impl Iterator<Item = &'a PodState> {
        let namespace = &service.namespace;
        self.selectors
            .get(service)
            .into_iter()
            .flat_map(move |selector| {
                // The label that the fewest groups have leaves the fewest to look at.
                let fewest = selector
                    .labels
                    .iter()
                    .map(|label| self.groups_by_pair.get(&pair(namespace, label)))
                    .min_by_key(|groups| groups.map_or(0, SmallSet::len))
                    .flatten();
                fewest.into_iter().flat_map(SmallSet::iter).filter(|labels| labels.match_all(&selector.labels))
            })
            .filter_map(move |labels| self.groups.get(&(namespace.clone(), labels.clone())))
            .flat_map(SmallSet::iter)
            .filter_map(move |name| self.pods.get(&ObjectName { namespace: namespace.clone(), name: name.clone() }))
            .map(|pod| &**pod)
    }

    /// Puts a Pod in place of the one of this name, which is handed back.
    pub(super) fn insert_pod(&mut self, pod: PodState) -> Option<PodState> {
        let old = self.remove_pod(&pod.name);
        let namespace = pod.name.namespace.clone();
        let group = self.groups.entry((namespace.clone(), pod.labels.clone())).or_default();
        if group.is_empty() {
            for label in pod.labels.iter() {
                self.groups_by_pair.entry(pair(&namespace, label)).or_default().insert(pod.labels.clone());
            }
        }
        group.insert(pod.name.name.clone());
        self.pods.insert(pod.name.clone(), Box::new(pod));
        old
    }

    pub(super) fn remove_pod(&mut self, name: &ObjectName) -> Option<PodState> {
        let pod = self.pods.remove(name)?;
        let namespace = name.namespace.clone();
        let key = (namespace.clone(), pod.labels.clone());
        if let Some(group) = self.groups.get_mut(&key) {
            group.remove(&name.name);
            if group.is_empty() {
                self.groups.remove(&key);
                for label in pod.labels.iter() {
                    let pair = pair(&namespace, label);
                    if let Some(groups) = self.groups_by_pair.get_mut(&pair) {
                        groups.remove(&pod.labels);
                        if groups.is_empty() {
                            self.groups_by_pair.remove(&pair);
                        }
                    }
                }
            }
        }
        Some(*pod)
    }

    /// Sets a Service's selector; an empty one selects nothing.
    pub(super) fn set_selector(&mut self, service: &ObjectName, labels: &Labels) {
        if self.selectors.get(service).is_some_and(|selector| selector.labels == *labels) {
            return;
        }
        self.remove_selector(service);
        let namespace = &service.namespace;
        for label in labels.iter() {
            self.by_pair.entry(pair(namespace, label)).or_default().count += 1;
        }
        // Under the label that the fewest ask for, or a label that all Services have would find them all.
        let count = |label: &&Label| self.by_pair.get(&pair(namespace, label)).map(|selecting| selecting.count);
        let Some(home) = labels.iter().min_by_key(count).cloned() else { return };
        self.by_pair.entry(pair(namespace, &home)).or_default().home.insert(service.name.clone());
        self.selectors.insert(service.clone(), Selector { labels: labels.clone(), home });
    }

    pub(super) fn remove_selector(&mut self, service: &ObjectName) {
        let Some(Selector { labels, home }) = self.selectors.remove(service) else { return };
        if let Some(selecting) = self.by_pair.get_mut(&pair(&service.namespace, &home)) {
            selecting.home.remove(&service.name);
        }
        for label in labels.iter() {
            let pair = pair(&service.namespace, label);
            if let Some(selecting) = self.by_pair.get_mut(&pair) {
                selecting.count -= 1;
                if selecting.count == 0 {
                    self.by_pair.remove(&pair);
                }
            }
        }
    }
}

fn pair(namespace: &Arc<str>, (key, value): &Label) -> Pair {
    (namespace.clone(), key.clone(), value.clone())
}
