//! Events become changes.
//!
//! In: what kube's watchers tell of each kind. Out: [`Change`]s, and what is wrong with objects. Of an object only the name is
//! kept, with the number of the list that had it last: what a complete list doesn't have is gone. An object that can't be read
//! keeps what it said before, and counts as there.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::Mutex,
};

use kube::runtime::watcher::Event;

use super::raw::Raw;
use crate::{
    model::{
        Change, FieldError, Interner, Kind, Labels, Node, Object, ObjectName,
        address::{parse_cidr, parse_ip},
    },
    source::{Problem, parse},
};

/// What is known of all kinds.
#[derive(Default)]
pub(super) struct Fold {
    interner: Mutex<Interner>,
    kinds: BTreeMap<Kind, Names>,
    problems: BTreeMap<(Kind, ObjectName), Vec<Problem>>,
    changes: Vec<Change>,
    own_name: String,
    own_node: OwnNode,
}

/// The names of a kind's objects.
#[derive(Default)]
struct Names {
    /// Looked up for each event, and never told in their order.
    seen: HashMap<ObjectName, u32>,
    /// Lists begun so far.
    list: u32,
    listed: bool,
}

/// What matters of the node's own Node before anything is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OwnNode {
    /// Whether there is one.
    pub exists: bool,
    /// Whether it has an address that kube-proxy would take.
    pub has_address: bool,
    /// Whether it has networks for its pods.
    pub has_networks: bool,
}

impl Fold {
    /// Nothing is known yet on the node of this name.
    pub(super) fn new(own_name: &str) -> Self {
        Self { own_name: own_name.to_owned(), ..Self::default() }
    }

    /// Takes an event in.
    pub(super) fn take(&mut self, kind: Kind, event: Event<Raw>) {
        match event {
            Event::Init => self.kinds.entry(kind).or_default().list += 1,
            Event::InitApply(raw) | Event::Apply(raw) => self.upsert(kind, &raw),
            Event::Delete(raw) => self.delete(kind, raw.name(kind)),
            Event::InitDone => self.sweep(kind),
        }
    }

    /// Whether a kind has been listed to its end once.
    pub(super) fn is_listed(&self, kind: Kind) -> bool {
        self.kinds.get(&kind).is_some_and(|names| names.listed)
    }

    /// The node's own Node.
    pub(super) const fn own_node(&self) -> OwnNode {
        self.own_node
    }

    /// The changes since the last call.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        mem::take(&mut self.changes)
    }

    /// What is wrong with objects now.
    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    fn upsert(&mut self, kind: Kind, raw: &Raw) {
        let name = raw.name(kind);
        let names = self.kinds.entry(kind).or_default();
        names.seen.insert(name.clone(), names.list);
        let errors = match parse::read_json(&raw.text, kind, &self.interner) {
            Ok((mut object, errors)) => {
                self.look_at(&mut object);
                self.changes.push(Change::Upsert(object));
                errors
            }
            Err(errors) => errors,
        };
        if errors.is_empty() {
            self.problems.remove(&(kind, name));
        } else {
            let problems = errors.into_iter().map(|error| problem(kind, &name, error)).collect();
            self.problems.insert((kind, name), problems);
        }
    }

    fn look_at(&mut self, object: &mut Object) {
        match object {
            // Hidden ones are not sent at all, so no label has a meaning any more.
            Object::Service(service) => service.metadata.labels = Labels::default(),
            Object::Node(node) if node.metadata.name.name() == self.own_name => self.own_node = OwnNode::new(node),
            Object::Node(_) | Object::EndpointSlice(_) | Object::Pod(_) | Object::ServiceCidr(_) => {}
        }
    }

    fn delete(&mut self, kind: Kind, name: ObjectName) {
        self.kinds.entry(kind).or_default().seen.remove(&name);
        self.forget(kind, name);
    }

    fn sweep(&mut self, kind: Kind) {
        let names = self.kinds.entry(kind).or_default();
        names.listed = true;
        let list = names.list;
        let mut gone: Vec<ObjectName> = names.seen.extract_if(|_, seen| *seen != list).map(|(name, _)| name).collect();
        gone.sort();
        for name in gone {
            self.forget(kind, name);
        }
    }

    fn forget(&mut self, kind: Kind, name: ObjectName) {
        if kind == Kind::Node && name.name() == self.own_name {
            self.own_node = OwnNode::default();
        }
        let key = (kind, name);
        self.problems.remove(&key);
        self.changes.push(Change::Delete(key.0, key.1));
    }
}

impl OwnNode {
    fn new(node: &Node) -> Self {
        let mut addresses = node.status.addresses.iter();
        let networks = node.spec.pod_cidrs.iter().chain(&node.spec.pod_cidr);
        Self {
            exists: true,
            has_address: addresses.any(|address| {
                matches!(&*address.type_, "InternalIP" | "ExternalIP") && parse_ip(&address.address).is_some()
            }),
            has_networks: networks.into_iter().any(|text| parse_cidr(text).is_some()),
        }
    }
}

fn problem(kind: Kind, name: &ObjectName, error: FieldError) -> Problem {
    Problem {
        object: Some(format!("{kind} {name}")),
        field: (!error.field.is_empty()).then_some(error.field),
        message: error.message,
        ..Problem::default()
    }
}
