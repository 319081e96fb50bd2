//! Which Pods a Service's selector takes, and which Services take a Pod, each without a walk over all.
//!
//! In: Pods and selectors as they come and go. Out: the two relations. Pods of one namespace with equal labels form a group
//! (the Pods of a Deployment do), and selectors are held against groups.

use std::{
    borrow::Borrow,
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    labels::{Label, Labels},
    object::ObjectName,
    pod::PodState,
    repack,
    small_set::SmallSet,
};

/// The Pods and the selectors.
#[derive(Debug, Default)]
pub(super) struct Selection {
    namespaces: BTreeMap<Box<str>, Namespace>,
    pod_count: usize,
}

/// Those of one namespace.
#[derive(Debug, Default)]
struct Namespace {
    pods: BTreeSet<ByName>,
    groups: BTreeMap<Labels, SmallSet<ByName>>,
    /// Groups that have a label.
    groups_by_label: BTreeMap<Label, SmallSet<Labels>>,
    selectors: BTreeMap<ObjectName, Selector>,
    by_label: BTreeMap<Label, Selecting>,
}

/// A Pod in the order of names.
#[derive(Clone, Debug)]
struct ByName(Arc<PodState>);

impl Borrow<ObjectName> for ByName {
    fn borrow(&self) -> &ObjectName {
        &self.0.name
    }
}

impl Ord for ByName {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.name.cmp(&other.0.name)
    }
}

impl PartialOrd for ByName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for ByName {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for ByName {}

/// The selector of a Service.
#[derive(Debug)]
struct Selector {
    labels: Labels,
    /// The label under which it is found.
    home: Label,
}

/// Services whose selectors ask for a label.
#[derive(Debug, Default)]
struct Selecting {
    /// How many do.
    count: usize,
    /// Those which are found here.
    home: SmallSet<ObjectName>,
}

impl Selection {
    pub(super) const fn pod_count(&self) -> usize {
        self.pod_count
    }

    pub(super) fn pod(&self, name: &ObjectName) -> Option<&PodState> {
        Some(&self.namespaces.get(name.namespace())?.pods.get(name)?.0)
    }

    /// Services that select a Pod.
    pub(super) fn services(&self, pod: &PodState) -> Vec<ObjectName> {
        let namespace = self.namespaces.get(pod.name.namespace());
        namespace.map(|namespace| namespace.services(&pod.labels)).unwrap_or_default()
    }

    /// Pods that a Service selects, by name within each group.
    pub(super) fn selected(&self, service: &ObjectName) -> impl Iterator<Item = &PodState> {
        let namespace = self.namespaces.get(service.namespace());
        namespace.into_iter().flat_map(move |namespace| namespace.selected(service))
    }

    /// Puts a Pod in place of the one of this name, which is handed back.
    pub(super) fn insert_pod(&mut self, pod: Arc<PodState>) -> Option<Arc<PodState>> {
        let old = self.remove_pod(&pod.name);
        self.namespace(&pod.name).insert_pod(ByName(pod));
        self.pod_count += 1;
        old
    }

    pub(super) fn remove_pod(&mut self, name: &ObjectName) -> Option<Arc<PodState>> {
        let pod = self.namespaces.get_mut(name.namespace())?.remove_pod(name)?;
        self.pod_count -= 1;
        self.forget_if_empty(name);
        Some(pod)
    }

    /// Sets a Service's selector; an empty one selects nothing.
    pub(super) fn set_selector(&mut self, service: &ObjectName, labels: &Labels) {
        self.namespace(service).set_selector(service, labels);
        self.forget_if_empty(service);
    }

    pub(super) fn remove_selector(&mut self, service: &ObjectName) {
        if let Some(namespace) = self.namespaces.get_mut(service.namespace()) {
            namespace.remove_selector(service);
            self.forget_if_empty(service);
        }
    }

    /// Gives spare room back.
    pub(super) fn compact(&mut self) {
        for namespace in self.namespaces.values_mut() {
            namespace.pods = std::mem::take(&mut namespace.pods).into_iter().collect();
            repack(&mut namespace.groups);
            repack(&mut namespace.groups_by_label);
            repack(&mut namespace.selectors);
            repack(&mut namespace.by_label);
        }
    }

    fn namespace(&mut self, name: &ObjectName) -> &mut Namespace {
        self.namespaces.entry(name.namespace().into()).or_default()
    }

    fn forget_if_empty(&mut self, name: &ObjectName) {
        let is_empty = |namespace: &Namespace| namespace.pods.is_empty() && namespace.selectors.is_empty();
        if self.namespaces.get(name.namespace()).is_some_and(is_empty) {
            self.namespaces.remove(name.namespace());
        }
    }
}

impl Namespace {
    fn services(&self, labels: &Labels) -> Vec<ObjectName> {
        let candidates = labels.iter().filter_map(|label| self.by_label.get(label)).flat_map(|it| it.home.iter());
        let selects = |service: &&ObjectName| {
            self.selectors.get(*service).is_some_and(|selector| labels.match_all(&selector.labels))
        };
        candidates.filter(selects).cloned().collect()
    }

    fn selected(&self, service: &ObjectName) -> impl Iterator<Item = &PodState> {
        let selecting = self.selectors.get(service).into_iter().flat_map(move |selector| {
            // The label that the fewest groups have leaves the fewest to look at.
            let groups = selector.labels.iter().map(|label| self.groups_by_label.get(label));
            let fewest = groups.min_by_key(|groups| groups.map_or(0, SmallSet::len)).flatten();
            fewest.into_iter().flat_map(SmallSet::iter).filter(|labels| labels.match_all(&selector.labels))
        });
        selecting.filter_map(|labels| self.groups.get(labels)).flat_map(SmallSet::iter).map(|pod| &*pod.0)
    }

    fn insert_pod(&mut self, pod: ByName) {
        let labels = &pod.0.labels;
        let group = self.groups.entry(labels.clone()).or_default();
        if group.is_empty() {
            for label in labels.iter() {
                self.groups_by_label.entry(label.clone()).or_default().insert(labels.clone());
            }
        }
        group.insert(pod.clone());
        self.pods.insert(pod);
    }

    fn remove_pod(&mut self, name: &ObjectName) -> Option<Arc<PodState>> {
        let pod = self.pods.take(name)?;
        let labels = &pod.0.labels;
        if let Some(group) = self.groups.get_mut(labels) {
            group.remove(&pod);
            if group.is_empty() {
                self.groups.remove(labels);
                for label in labels.iter() {
                    if let Some(groups) = self.groups_by_label.get_mut(label) {
                        groups.remove(labels);
                        if groups.is_empty() {
                            self.groups_by_label.remove(label);
                        }
                    }
                }
            }
        }
        Some(pod.0)
    }

    fn set_selector(&mut self, service: &ObjectName, labels: &Labels) {
        if self.selectors.get(service).is_some_and(|selector| selector.labels == *labels) {
            return;
        }
        self.remove_selector(service);
        for label in labels.iter() {
            self.by_label.entry(label.clone()).or_default().count += 1;
        }
        // Under the label that the fewest ask for, or a label that all Services have would find them all.
        let count = |label: &&Label| self.by_label.get(*label).map(|selecting| selecting.count);
        let Some(home) = labels.iter().min_by_key(count).cloned() else { return };
        self.by_label.entry(home.clone()).or_default().home.insert(service.clone());
        self.selectors.insert(service.clone(), Selector { labels: labels.clone(), home });
    }

    fn remove_selector(&mut self, service: &ObjectName) {
        let Some(Selector { labels, home }) = self.selectors.remove(service) else { return };
        if let Some(selecting) = self.by_label.get_mut(&home) {
            selecting.home.remove(service);
        }
        for label in labels.iter() {
            if let Some(selecting) = self.by_label.get_mut(label) {
                selecting.count -= 1;
                if selecting.count == 0 {
                    self.by_label.remove(label);
                }
            }
        }
    }
}
