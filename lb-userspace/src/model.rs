//! The state of the cluster, joined: what a Service is, and which endpoints it has.
//!
//! In: [`Change`]s as the source read them. Out: what each of them [`Affected`], and for a Service its [`Backend`]s. Never here:
//! what this node does with them. A change costs the work of what it concerns, never a walk over everything.

pub mod address;
mod change;
pub mod intern;
pub mod labels;
pub mod object;
mod pod;
mod problem;
mod selection;
mod slice;
mod small_set;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
};

pub(crate) use self::small_set::SmallSet;
pub use self::{
    change::{Affected, Change, Kind, Object},
    intern::Interner,
    labels::Labels,
    object::{EndpointSlice, Node, ObjectName, Pod, Service, ServiceCidr},
    pod::{NamedPort, PodState},
    problem::{FieldError, is_name, printable},
    slice::{EndpointState, Hints, SliceState},
};
use self::{object::Protocol, selection::Selection};
use crate::plan::Backend;

/// The state of the cluster.
#[derive(Debug)]
pub struct Model {
    own_node: String,
    services: BTreeMap<ObjectName, Box<Service>>,
    slices: BTreeMap<ObjectName, Box<SliceState>>,
    /// Names of the slices of a Service, which may be yet to come.
    slices_of: BTreeMap<ObjectName, SmallSet<ObjectName>>,
    selection: Selection,
    node: Option<Node>,
    nodes: BTreeSet<ObjectName>,
    service_cidrs: BTreeMap<ObjectName, ServiceCidr>,
}

impl Model {
    /// An empty cluster, seen from the node of this name (which is trimmed and taken in lower case, as kube-proxy does).
    #[must_use]
    pub fn new(own_node: &str) -> Self {
        Self {
            own_node: own_node.trim().to_lowercase(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            slices_of: BTreeMap::new(),
            selection: Selection::default(),
            node: None,
            nodes: BTreeSet::new(),
            service_cidrs: BTreeMap::new(),
        }
    }

    /// Takes a change in and says what it affects; nothing, if it changes nothing.
    pub fn apply(&mut self, change: Change) -> Affected {
        match change {
            Change::Upsert(Object::Service(service)) => self.upsert_service(service),
            Change::Upsert(Object::EndpointSlice(slice)) => self.replace_slice(&slice.name.clone(), Some(slice)),
            Change::Upsert(Object::Pod(pod)) => self.upsert_pod(pod),
            Change::Upsert(Object::Node(node)) => self.upsert_node(*node),
            Change::Upsert(Object::ServiceCidr(cidr)) => {
                let spec = cidr.spec.clone();
                let old = self.service_cidrs.insert(cidr.metadata.cluster_wide(), *cidr);
                Affected { service_cidrs: old.is_none_or(|old| old.spec != spec), ..Affected::default() }
            }
            Change::Delete(Kind::Service, name) => self.delete_service(name),
            Change::Delete(Kind::EndpointSlice, name) => self.replace_slice(&name, None),
            Change::Delete(Kind::Pod, name) => self.delete_pod(&name),
            Change::Delete(Kind::Node, name) => {
                self.nodes.remove(&name);
                let own = name.name() == self.own_node && self.node.take().is_some();
                Affected { node: own, ..Affected::default() }
            }
            Change::Delete(Kind::ServiceCidr, name) => {
                Affected { service_cidrs: self.service_cidrs.remove(&name).is_some(), ..Affected::default() }
            }
        }
    }

    /// The Service of this name.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name).map(|service| &**service)
    }

    /// All Services in the order of their names, hidden ones too ([`Service::is_hidden`]).
    pub fn services(&self) -> impl Iterator<Item = (&ObjectName, &Service)> {
        self.services.iter().map(|(name, service)| (name, &**service))
    }

    /// The endpoints of a Service, each once, in the order of port name, protocol, address and port.
    #[must_use]
    pub fn backends(&self, name: &ObjectName) -> Vec<Backend> {
        let Some(service) = self.services.get(name) else { return Vec::new() };
        if service.spec.type_ == object::ServiceType::ExternalName {
            return Vec::new();
        }
        let mut union = Union::default();
        if let Some(slices) = self.slices_of.get(name) {
            for slice in slices.iter().filter_map(|slice| self.slices.get(slice)) {
                slice.backends().for_each(|backend| union.add(backend));
            }
        } else {
            for pod in self.selection.selected(name) {
                pod.backends(service).for_each(|backend| union.add(backend));
            }
        }
        union.into_backends()
    }

    /// How many endpoints a Service has at most: those that stand in several slices count in each.
    #[must_use]
    pub fn most_backends(&self, name: &ObjectName) -> usize {
        let Some(service) = self.services.get(name) else { return 0 };
        if let Some(slices) = self.slices_of.get(name) {
            return slices
                .iter()
                .filter_map(|slice| self.slices.get(slice))
                .map(|slice| slice.backends().count())
                .sum();
        }
        self.selection.selected(name).map(|pod| pod.backends(service).count()).sum()
    }

    /// This node's own Node object, if the cluster has it.
    #[must_use]
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// All ServiceCIDRs in the order of their names.
    pub fn service_cidrs(&self) -> impl Iterator<Item = &ServiceCidr> {
        self.service_cidrs.values()
    }

    /// Gives spare room back, once a first list is taken in: a tree that grew in the order of its keys is half empty, one that is
    /// made anew is full.
    pub fn compact(&mut self) {
        repack(&mut self.services);
        repack(&mut self.slices);
        repack(&mut self.slices_of);
        self.selection.compact();
    }

    /// How many objects of a kind there are.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            Kind::Pod => self.selection.pod_count(),
            Kind::Node => self.nodes.len(),
            Kind::ServiceCidr => self.service_cidrs.len(),
        }
    }

    fn upsert_service(&mut self, service: Box<Service>) -> Affected {
        let name = service.metadata.namespaced();
        if self.services.get(&name) == Some(&service) {
            return Affected::default();
        }
        self.selection.set_selector(&name, &service.spec.selector);
        self.services.insert(name.clone(), service);
        affect(Some(name))
    }

    fn delete_service(&mut self, name: ObjectName) -> Affected {
        self.selection.remove_selector(&name);
        affect(self.services.remove(&name).map(|_| name))
    }

    fn replace_slice(&mut self, name: &ObjectName, new: Option<Box<SliceState>>) -> Affected {
        if self.slices.get(name) == new.as_ref() {
            return Affected::default();
        }
        let v4 = |new: &SliceState| new.endpoints.first().is_none_or(|endpoint| endpoint.addr.is_ipv4());
        let changed = new.as_ref().and_then(|new| new.changed.map(|changed| (v4(new), changed)));
        let new_service = new.as_ref().and_then(|new| new.service.clone());
        let old = match new {
            // Its own copy of the name, or there would be two.
            Some(new) => self.slices.insert(new.name.clone(), new),
            None => self.slices.remove(name),
        };
        let (old, new) = (old.and_then(|old| old.service), new_service);
        if old != new {
            if let Some(Entry::Occupied(mut of)) = old.clone().map(|old| self.slices_of.entry(old)) {
                of.get_mut().remove(name);
                if of.get().is_empty() {
                    of.remove();
                }
            }
            if let Some(new) = &new {
                self.slices_of.entry(new.clone()).or_default().insert(name.clone());
            }
        }
        // A Service that is yet to come is affected when it comes.
        let services = old.into_iter().chain(new).filter(|service| self.services.contains_key(service)).collect();
        Affected { services, endpoints_changed: changed.into_iter().collect(), ..Affected::default() }
    }

    fn upsert_pod(&mut self, pod: Arc<PodState>) -> Affected {
        if self.selection.pod(&pod.name) == Some(&*pod) {
            return Affected::default();
        }
        let mut services = self.selection.services(&pod);
        if let Some(old) = self.selection.insert_pod(pod) {
            services.extend(self.selection.services(&old));
        }
        self.affect_selecting(services)
    }

    fn delete_pod(&mut self, name: &ObjectName) -> Affected {
        let Some(old) = self.selection.remove_pod(name) else { return Affected::default() };
        let services = self.selection.services(&old);
        self.affect_selecting(services)
    }

    fn upsert_node(&mut self, node: Node) -> Affected {
        let name = node.metadata.cluster_wide();
        let own = name.name() == self.own_node;
        self.nodes.insert(name);
        let changed = own && self.node.as_ref() != Some(&node);
        if changed {
            self.node = Some(node);
        }
        Affected { node: changed, ..Affected::default() }
    }

    /// Pods matter only to Services that no slice names.
    fn affect_selecting(&self, services: Vec<ObjectName>) -> Affected {
        affect(services.into_iter().filter(|service| !self.slices_of.contains_key(service)))
    }
}

/// Makes a tree anew, with full nodes.
pub(crate) fn repack<K: Ord, V>(tree: &mut BTreeMap<K, V>) {
    *tree = std::mem::take(tree).into_iter().collect();
}

fn affect(services: impl IntoIterator<Item = ObjectName>) -> Affected {
    Affected { services: services.into_iter().collect(), ..Affected::default() }
}

/// Endpoints from several slices or Pods, each once.
#[derive(Default)]
struct Union(BTreeMap<(Arc<str>, Protocol, IpAddr, u16), Backend>);

impl Union {
    fn add(&mut self, backend: Backend) {
        match self.0.entry((backend.port_name.clone(), backend.protocol, backend.addr, backend.port)) {
            Entry::Vacant(vacant) => {
                vacant.insert(backend);
            }
            // A Pod that goes while another has got its address already: the address is alive.
            Entry::Occupied(mut other) if other.get().terminating && !backend.terminating => {
                other.insert(backend);
            }
            Entry::Occupied(_) => {}
        }
    }

    fn into_backends(self) -> Vec<Backend> {
        self.0.into_values().collect()
    }
}
