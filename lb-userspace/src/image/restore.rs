//! From tables that an earlier agent left back to the image of them.
//!
//! In: what was read from pinned maps, perhaps half a change, perhaps damaged. Out: an image that knows which of it makes
//! sense. The rest stays in its memory, so that the sweep or a plan can write over it; nothing here fails.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::{
    layout::{Endpoint, FrontendKey, Range, bit_index},
    memory::Memory,
};

use super::{Image, PortState, Write, Writes, ids::MOST_IDS, name, put, slots::Slots};
use crate::plan::PortName;

impl Image {
    /// The image of these tables.
    #[must_use]
    pub fn restore(mut memory: Memory, now: u64) -> Self {
        // Arrays read from the kernel are full of zeros.
        memory.slots.retain(|_, id| *id != 0);
        memory.endpoints.retain(|_, endpoint| *endpoint != Endpoint::default());
        let mut image = Self { memory, ..Self::default() };
        let mut ports = image.named_ports();
        image.restore_endpoints(&mut ports);
        image.restore_frontends(&mut ports);
        for key in &image.memory.source_ranges {
            if let Some((_, state)) = ports.get_mut(&key.service) {
                state.source_ranges.insert(*key);
            }
        }
        for bit in image.memory.frontend_bits.iter() {
            image.frontend_bits.found(bit, now);
        }
        for bit in image.memory.endpoint_bits.iter() {
            image.endpoint_bits.found(bit, now);
        }
        let memory = &image.memory;
        let mentioned = memory.frontends.values().map(|frontend| frontend.service);
        let mentioned = mentioned.chain(memory.endpoints.values().map(|endpoint| endpoint.service));
        let mentioned = mentioned.chain(memory.source_ranges.iter().map(|key| key.service));
        image.strays = mentioned.filter(|id| !ports.contains_key(id)).collect();
        image.ports = ports.into_values().collect();
        image
    }

    /// Service ports by id; of two ids with one name, the first. What counts by id is as long as the largest one that is used,
    /// so absurd ones are not.
    fn named_ports(&self) -> BTreeMap<u32, (PortName, PortState)> {
        let mut names = BTreeSet::new();
        let decoded = self.memory.services.iter().filter(|(id, _)| (1..MOST_IDS).contains(id));
        let decoded = decoded.filter_map(|(id, bytes)| Some((id, name::decode(bytes)?)));
        let first = decoded.filter(|(_, name)| names.insert(name.clone()));
        first.map(|(id, name)| (id, (name, PortState { id, ..PortState::default() }))).collect()
    }

    fn restore_endpoints(&mut self, ports: &mut BTreeMap<u32, (PortName, PortState)>) {
        for (id, endpoint) in self.memory.endpoints.iter() {
            if endpoint.flags == 0 {
                self.endpoint_ids.put(id);
                continue;
            }
            self.endpoint_bits.add(bit_index(&endpoint.addr, endpoint.port));
            if let Some((_, state)) = ports.get_mut(&endpoint.service).filter(|_| id != 0) {
                state.endpoints.push(id);
            }
        }
        let key = |id: &mut u32| self.memory.endpoints.get(id).map(|endpoint| (endpoint.addr, endpoint.port));
        for (_, state) in ports.values_mut() {
            // Of two ids with one address and port, the first: sorting leaves them in their order.
            state.endpoints.sort_by_key(|id| key(&mut id.clone()));
            state.endpoints.dedup_by_key(key);
        }
    }

    fn restore_frontends(&mut self, ports: &mut BTreeMap<u32, (PortName, PortState)>) {
        let runs = self.runs(ports);
        let mut named = BTreeSet::new();
        for (key, frontend) in &self.memory.frontends {
            self.frontend_bits.add(bit_index(&key.addr, key.port));
            let Some((_, state)) = ports.get_mut(&frontend.service) else { continue };
            state.frontends.insert(*key);
            let ranges = [frontend.internal, frontend.external].into_iter().filter(|range| range.len != 0);
            named.extend(ranges.filter(|range| runs.hold(range, state.id)).map(|it| (it.offset, it.len, state.id)));
        }
        // Ranges of damaged entries are not held: what a plan writes for those frontends is elsewhere. What is left doesn't
        // overlap, so that reading it takes no longer than there are slots.
        let (_, strange) = Slots::restore(named.iter().map(|(offset, len, _)| (*offset, *len)));
        let mut contents = BTreeSet::new();
        for (offset, len, service) in named.into_iter().filter(|(offset, len, _)| !strange.contains(&(*offset, *len))) {
            let ids: Vec<u32> =
                (offset..offset + len).filter_map(|slot| self.memory.slots.get(&slot).copied()).collect();
            if let Some((_, state)) = ports.get_mut(&service)
                && contents.insert((service, ids))
            {
                state.ranges.push(Range { offset, len });
            }
        }
        let held = ports.values().flat_map(|(_, state)| &state.ranges).map(|range| (range.offset, range.len));
        self.slots = Slots::restore(held.collect::<BTreeSet<_>>()).0;
    }

    /// Slots in a row whose endpoints belong to one Service port.
    fn runs(&self, ports: &BTreeMap<u32, (PortName, PortState)>) -> Runs {
        let mut runs: Vec<Run> = Vec::new();
        for (slot, id) in self.memory.slots.iter() {
            let owner = self.memory.endpoints.get(id).and_then(|endpoint| {
                let (_, state) = ports.get(&endpoint.service)?;
                let place = state.find_endpoint(&self.memory, &(endpoint.addr, endpoint.port)).ok()?;
                (state.endpoints[place] == *id).then_some(endpoint.service)
            });
            let slot = u64::from(slot);
            match (owner, runs.last_mut()) {
                (Some(owner), Some(run)) if run.owner == owner && run.end == slot => run.end += 1,
                (Some(owner), _) => runs.push(Run { start: slot, end: slot + 1, owner }),
                (None, _) => {}
            }
        }
        Runs(runs)
    }

    /// Removes what belongs to no Service port.
    pub(super) fn remove_strays(&mut self, now: u64, writes: &mut Writes) {
        let owned = sorted(self.ports.values().flat_map(|state| state.frontends.iter().copied()));
        let is_owned = |key: &FrontendKey| owned.binary_search(key).is_ok();
        let stray = |key: &&FrontendKey| **key != FrontendKey::any_port(key.addr) && !is_owned(key);
        for key in self.memory.frontends.keys().filter(stray).copied().collect::<Vec<_>>() {
            self.remove_frontend(key, now, writes);
        }
        let ids = sorted(self.ports.values().map(|state| state.id));
        let is_stray = |id: &u32| ids.binary_search(id).is_err();
        for key in self.memory.source_ranges.iter().filter(|key| is_stray(&key.service)).copied().collect::<Vec<_>>() {
            put(&mut self.memory, &mut writes.removed, Write::RemoveSourceRange(key));
        }
        let endpoints = sorted(self.ports.values().flat_map(|state| state.endpoints.iter().copied()));
        for id in self.memory.endpoints.keys().filter(|id| endpoints.binary_search(id).is_err()).collect::<Vec<_>>() {
            self.remove_endpoint(id, now, writes);
        }
        for id in self.memory.services.keys().filter(is_stray).collect::<Vec<_>>() {
            put(&mut self.memory, &mut writes.removed, Write::RemoveService(id));
            self.strays.insert(id);
        }
        for id in std::mem::take(&mut self.strays).into_iter().filter(|id| *id < MOST_IDS) {
            self.service_ids.rest(id, now);
        }
    }
}

/// Slots in a row whose endpoints belong to one Service port.
struct Run {
    start: u64,
    end: u64,
    owner: u32,
}

/// Runs in their order.
struct Runs(Vec<Run>);

impl Runs {
    /// Whether all of a range is a Service port's. Its length may be that of nothing sane, and costs nothing.
    fn hold(&self, range: &Range, owner: u32) -> bool {
        let (start, end) = (u64::from(range.offset), u64::from(range.offset) + u64::from(range.len));
        let before = self.0.partition_point(|run| run.start <= start);
        self.0[..before].last().is_some_and(|run| run.owner == owner && run.end >= end)
    }
}

/// A sorted list: a tree of that many numbers would take several times the room.
fn sorted<T: Ord>(elements: impl Iterator<Item = T>) -> Vec<T> {
    let mut elements: Vec<T> = elements.collect();
    elements.sort_unstable();
    elements
}
