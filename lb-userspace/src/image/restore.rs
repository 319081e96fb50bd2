//! From tables that an earlier agent left back to the image of them.
//!
//! In: what was read from pinned maps, perhaps half a change, perhaps damaged. Out: an image that knows which of it makes
//! sense. The rest stays in its memory, so that the sweep or a plan can write over it; nothing here fails.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::{
    layout::{Endpoint, FrontendKey, Range, bit_index},
    memory::Memory,
};

use super::{Image, PortState, Write, Writes, name, put, slots::Slots};
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

    /// Service ports by id; of two ids with one name, the first.
    fn named_ports(&self) -> BTreeMap<u32, (PortName, PortState)> {
        let mut names = BTreeSet::new();
        let decoded = self.memory.services.iter().filter(|(id, _)| *id != 0);
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
            if let Some((_, state)) = ports.get_mut(&endpoint.service).filter(|_| id != 0)
                && let Err(place) = state.find_endpoint(&self.memory, &(endpoint.addr, endpoint.port))
            {
                state.endpoints.insert(place, id);
            }
        }
    }

    fn restore_frontends(&mut self, ports: &mut BTreeMap<u32, (PortName, PortState)>) {
        for (key, frontend) in &self.memory.frontends {
            self.frontend_bits.add(bit_index(&key.addr, key.port));
            let Some((_, state)) = ports.get_mut(&frontend.service) else { continue };
            state.frontends.insert(*key);
            for range in [frontend.internal, frontend.external].into_iter().filter(|range| range.len != 0) {
                let ids = self.content(&range, state);
                if ids.is_some_and(|ids| state.find_range(&self.memory, &ids).is_none()) {
                    state.ranges.push(range);
                }
            }
        }
        // Ranges of damaged entries are not held: what a plan writes for those frontends is elsewhere.
        let used = ports.values().flat_map(|(_, state)| &state.ranges).map(|range| (range.offset, range.len));
        let (slots, strange) = Slots::restore(&used.collect());
        self.slots = slots;
        for (_, state) in ports.values_mut() {
            state.ranges.retain(|range| !strange.contains(&(range.offset, range.len)));
        }
    }

    /// The endpoint ids in a range, if all of them belong to the Service port.
    fn content(&self, range: &Range, state: &PortState) -> Option<Vec<u32>> {
        let own = |id: &u32| {
            let key = self.memory.endpoints.get(id).map(|endpoint| (endpoint.addr, endpoint.port));
            key.is_some_and(|key| state.find_endpoint(&self.memory, &key).is_ok_and(|at| state.endpoints[at] == *id))
        };
        (range.offset..range.offset.checked_add(range.len)?)
            .map(|slot| self.memory.slots.get(&slot).copied().filter(own))
            .collect()
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
            self.service_ids.rest(id, now);
        }
        for id in std::mem::take(&mut self.strays) {
            self.service_ids.rest(id, now);
        }
    }
}

/// A sorted list: a tree of that many numbers would take several times the room.
fn sorted<T: Ord>(elements: impl Iterator<Item = T>) -> Vec<T> {
    let mut elements: Vec<T> = elements.collect();
    elements.sort_unstable();
    elements
}
