//! Ids, slots and bytes: the difference between what is in the kernel and what a plan asks for.
//!
//! In: a [`Step`] of the plan, or facts about the node. Out: [`Write`]s, in the order in which they must be done. Pure.
//! An observer who reads the tables after any single write sees of each frontend the old endpoints or the new ones.

mod bits;
mod difference;
mod ids;
mod name;
mod node;
mod restore;
mod slots;
#[cfg(test)]
mod tests;
mod write;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use lb_common::{
    addr::{Addr, Port},
    layout::{Endpoint, Frontend, FrontendKey, PrefixKey, Range, bit_index, endpoint_flags, frontend_flags},
    memory::Memory,
};

use self::{bits::Bits, ids::Ids, slots::Slots};
pub use self::{
    bits::FLOW_LIFE,
    difference::difference,
    ids::{GRACE, MOST_IDS},
    name::decode as port_name,
    name::text as service_name,
    node::prefix_key,
    write::Write,
};
use crate::{
    model::{SmallSet, repack},
    plan::{PortName, PortPlan, Step},
};

/// What is in the kernel's tables, and who uses what of it.
#[derive(Clone, Debug, Default)]
pub struct Image {
    memory: Memory,
    ports: BTreeMap<PortName, PortState>,
    /// Ids of Service ports that tables mention and nobody has: not given out before the sweep.
    strays: BTreeSet<u32>,
    service_ids: Ids,
    endpoint_ids: Ids,
    slots: Slots,
    frontend_bits: Bits,
    endpoint_bits: Bits,
    most_frontends: usize,
    most_source_ranges: usize,
    /// Whether nobody asks for the writes.
    silent: bool,
}

/// What of the tables belongs to a Service port.
#[derive(Clone, Debug, Default)]
struct PortState {
    id: u32,
    /// Ids of its endpoints, in the order of address and port.
    endpoints: Vec<u32>,
    /// Ranges that frontends name; they hold different lists of endpoint ids.
    ranges: Vec<Range>,
    frontends: SmallSet<FrontendKey>,
    source_ranges: SmallSet<PrefixKey>,
}

/// How many entries the tables have to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Frontends.
    pub frontends: usize,
    /// Length of the array of slots.
    pub slots: usize,
    /// Length of the array of endpoints.
    pub endpoints: usize,
    /// Names of Service ports.
    pub services: usize,
    /// Source ranges.
    pub source_ranges: usize,
    /// Prefixes that the local detector takes as local.
    pub local_cidrs: usize,
    /// ServiceCIDRs.
    pub service_cidrs: usize,
    /// Addresses of this node.
    pub node_addresses: usize,
    /// Devices.
    pub devices: usize,
}

/// Writes of a step by kind, in the order in which they are done: first everything new, then what switches packets over, then
/// what nobody asks for any more. Neighbours of one kind make a batch.
struct Writes {
    endpoints: List,
    slots: List,
    services: List,
    source_ranges: List,
    endpoint_bits: List,
    frontend_bits: List,
    frontends: List,
    removed_frontends: List,
    removed: List,
}

/// Writes in order, or nothing where nobody asks for them.
#[derive(Clone, Default)]
struct List {
    silent: bool,
    writes: Vec<Write>,
}

impl Writes {
    fn into_list(self) -> Vec<Write> {
        let mut list = self.endpoints.writes;
        for more in [
            self.slots,
            self.services,
            self.source_ranges,
            self.endpoint_bits,
            self.frontend_bits,
            self.frontends,
            self.removed_frontends,
            self.removed,
        ] {
            list.extend(more.writes);
        }
        list
    }
}

/// Does a write to the memory and lists it.
fn put(memory: &mut Memory, list: &mut List, write: Write) {
    write.apply(memory);
    if !list.silent {
        list.writes.push(write);
    }
}

impl Image {
    /// What is in the kernel.
    #[must_use]
    pub const fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What is in the kernel, for whoever needs nothing else any more.
    #[must_use]
    pub fn into_memory(self) -> Memory {
        self.memory
    }

    /// Stops to list writes, or begins again. A first list leads to hundreds of thousands, which [`difference`] finds afterwards,
    /// one by one.
    pub const fn set_silent(&mut self, silent: bool) {
        self.silent = silent;
    }

    /// Whether nobody asks for the writes.
    #[must_use]
    pub const fn is_silent(&self) -> bool {
        self.silent
    }

    fn list(&self) -> List {
        List { silent: self.silent, writes: Vec::new() }
    }

    fn writes(&self) -> Writes {
        let list = self.list();
        Writes {
            endpoints: list.clone(),
            slots: list.clone(),
            services: list.clone(),
            source_ranges: list.clone(),
            endpoint_bits: list.clone(),
            frontend_bits: list.clone(),
            frontends: list.clone(),
            removed_frontends: list.clone(),
            removed: list,
        }
    }

    /// Gives spare room back, once a first list is compiled.
    pub fn compact(&mut self) {
        repack(&mut self.memory.frontends);
        repack(&mut self.ports);
    }

    /// The id of a Service port.
    #[must_use]
    pub fn service_id(&self, name: &PortName) -> Option<u32> {
        self.ports.get(name).map(|state| state.id)
    }

    /// How large the tables must be before the last step's writes are done: additions come before removals.
    #[must_use]
    pub fn required(&self) -> Capacity {
        let memory = &self.memory;
        Capacity {
            frontends: self.most_frontends.max(memory.frontends.len()),
            slots: self.slots.end() as usize,
            endpoints: memory.endpoints.last_key().map_or(0, |id| id as usize + 1),
            services: memory.services.len(),
            source_ranges: self.most_source_ranges.max(memory.source_ranges.len()),
            local_cidrs: memory.local_cidrs.len(),
            service_cidrs: memory.service_cidrs.len(),
            node_addresses: memory.node_addresses.len(),
            devices: memory.devices.len(),
        }
    }

    /// Makes the tables follow a step of the plan. `now` is in seconds of a clock that doesn't go back.
    pub fn apply(&mut self, step: &Step, now: u64) -> Vec<Write> {
        self.release(now);
        let mut writes = self.writes();
        for plan in step.ports.values().flatten() {
            self.add(plan, &mut writes);
        }
        let refused = |there: bool| step.any_port.iter().filter(move |(_, any)| **any == there).map(|(addr, _)| *addr);
        for addr in refused(true) {
            let frontend = Frontend { flags: frontend_flags::ANY_PORT, ..Frontend::default() };
            self.write_frontend(FrontendKey::any_port(addr), frontend, &mut writes);
        }
        self.most_frontends = self.memory.frontends.len();
        self.most_source_ranges = self.memory.source_ranges.len();
        // Before the frontends, so that no packet to a Service that goes is refused in between.
        for addr in refused(false) {
            self.remove_frontend(FrontendKey::any_port(addr), now, &mut writes);
        }
        for (name, plan) in &step.ports {
            self.leave(name, plan.as_deref(), now, &mut writes);
        }
        writes.into_list()
    }

    /// Makes the tables follow the plan of one Service port, or its absence.
    pub fn set_port(&mut self, name: &PortName, plan: Option<&PortPlan>, now: u64) -> Vec<Write> {
        self.apply(&Step { ports: [(name.clone(), plan.cloned().map(Arc::new))].into(), ..Step::default() }, now)
    }

    /// Makes other ports of an address refused, or not.
    pub fn set_any_port(&mut self, addr: Addr, refused: bool, now: u64) -> Vec<Write> {
        self.apply(&Step { any_port: [(addr, refused)].into(), ..Step::default() }, now)
    }

    /// Removes what is in the tables and in no plan: called after the first full list has been planned.
    pub fn sweep(
        &mut self,
        has_port: impl Fn(&PortName) -> bool,
        has_any_port: impl Fn(&Addr) -> bool,
        now: u64,
    ) -> Vec<Write> {
        let gone = self.ports.keys().filter(|name| !has_port(name)).map(|name| (name.clone(), None));
        let refusing = self.memory.frontends.keys().filter(|key| **key == FrontendKey::any_port(key.addr));
        let unplanned = refusing.map(|key| key.addr).filter(|addr| !has_any_port(addr));
        let step = Step { ports: gone.collect(), any_port: unplanned.map(|addr| (addr, false)).collect() };
        let mut list = self.apply(&step, now);
        let mut writes = self.writes();
        self.remove_strays(now, &mut writes);
        list.extend(writes.into_list());
        list
    }

    /// Whether there are bits that nobody has used for the usual life of a flow.
    #[must_use]
    pub fn has_expired(&self, now: u64) -> bool {
        self.frontend_bits.has_expired(now) || self.endpoint_bits.has_expired(now)
    }

    /// Clears the bits that nobody has used for the usual life of a flow, and that no flow names now.
    pub fn expire(&mut self, now: u64, frontends: &BTreeSet<u32>, endpoints: &BTreeSet<u32>) -> Vec<Write> {
        let mut list = self.list();
        for bit in self.frontend_bits.expire(now, frontends) {
            put(&mut self.memory, &mut list, Write::ClearFrontendBit(bit));
        }
        for bit in self.endpoint_bits.expire(now, endpoints) {
            put(&mut self.memory, &mut list, Write::ClearEndpointBit(bit));
        }
        list.writes
    }

    fn release(&mut self, now: u64) {
        self.service_ids.release(now);
        self.endpoint_ids.release(now);
        self.slots.release(now);
    }

    /// Writes everything that a plan has and the tables don't.
    fn add(&mut self, plan: &PortPlan, writes: &mut Writes) {
        let mut state = self.ports.remove(&plan.name).unwrap_or_else(|| {
            let Self { memory, strays, .. } = self;
            let taken = |id| memory.services.contains_key(&id) || strays.contains(&id);
            PortState { id: self.service_ids.take(taken), ..PortState::default() }
        });
        let ids: Vec<u32> = plan
            .endpoints
            .iter()
            .map(|planned| {
                let flag = |is: bool, flag: u16| if is { flag } else { 0 };
                let endpoint = Endpoint {
                    addr: planned.addr.into(),
                    port: Port::new(planned.port),
                    flags: endpoint_flags::SERVING
                        | flag(planned.local, endpoint_flags::LOCAL)
                        | flag(planned.eligible.cluster, endpoint_flags::IN_CLUSTER)
                        | flag(planned.eligible.local, endpoint_flags::IN_LOCAL),
                    service: state.id,
                    generation: 0,
                };
                self.write_endpoint(&mut state, endpoint, writes)
            })
            .collect();
        let name = name::encode(&plan.name);
        if self.memory.services.get(&state.id) != Some(&name) {
            put(&mut self.memory, &mut writes.services, Write::Service(state.id, Box::new(name)));
        }
        for net in &plan.source_ranges {
            let key = prefix_key(state.id, *net);
            state.source_ranges.insert(key);
            if !self.memory.source_ranges.contains(&key) {
                put(&mut self.memory, &mut writes.source_ranges, Write::SourceRange(key));
            }
        }
        for planned in &plan.frontends {
            let frontend = Frontend {
                internal: self.write_range(&mut state, &content(&planned.internal, &ids), writes),
                external: self.write_range(&mut state, &content(&planned.external, &ids), writes),
                service: state.id,
                flags: planned.flags,
                affinity: plan.affinity,
            };
            state.frontends.insert(planned.key);
            self.write_frontend(planned.key, frontend, writes);
        }
        self.ports.insert(plan.name.clone(), state);
    }

    fn write_endpoint(&mut self, state: &mut PortState, mut endpoint: Endpoint, writes: &mut Writes) -> u32 {
        let memory = &mut self.memory;
        let bit = bit_index(&endpoint.addr, endpoint.port);
        let id = match state.find_endpoint(memory, &(endpoint.addr, endpoint.port)) {
            Ok(place) => state.endpoints[place],
            Err(place) => {
                self.endpoint_bits.add(bit);
                let id = self.endpoint_ids.take(|id| memory.endpoints.contains_key(&id));
                endpoint.generation = memory.endpoints.get(&id).map_or(0, |old| old.generation.wrapping_add(1));
                put(memory, &mut writes.endpoints, Write::Endpoint(id, endpoint));
                state.endpoints.insert(place, id);
                id
            }
        };
        if let Some(there) = memory.endpoints.get(&id).copied() {
            endpoint.generation = there.generation;
            if there != endpoint {
                put(memory, &mut writes.endpoints, Write::Endpoint(id, endpoint));
            }
        }
        if !memory.endpoint_bits.contains(&bit) {
            put(memory, &mut writes.endpoint_bits, Write::EndpointBit(bit));
        }
        id
    }

    /// A range with these endpoint ids: one that is there already, or a new one.
    fn write_range(&mut self, state: &mut PortState, ids: &[u32], writes: &mut Writes) -> Range {
        let Some(len) = u32::try_from(ids.len()).ok().filter(|len| *len != 0) else { return Range::default() };
        if let Some(range) = state.find_range(&self.memory, ids) {
            return range;
        }
        let range = Range { offset: self.slots.take(len), len };
        put(&mut self.memory, &mut writes.slots, Write::Slots(range.offset, ids.to_vec()));
        state.ranges.push(range);
        range
    }

    fn write_frontend(&mut self, key: FrontendKey, frontend: Frontend, writes: &mut Writes) {
        let bit = bit_index(&key.addr, key.port);
        if !self.memory.frontend_bits.contains(&bit) {
            put(&mut self.memory, &mut writes.frontend_bits, Write::FrontendBit(bit));
        }
        let old = self.memory.frontends.get(&key);
        if old.is_none() {
            self.frontend_bits.add(bit);
        }
        if old != Some(&frontend) {
            put(&mut self.memory, &mut writes.frontends, Write::Frontend(key, frontend));
        }
    }

    fn remove_frontend(&mut self, key: FrontendKey, now: u64, writes: &mut Writes) {
        if self.memory.frontends.contains_key(&key) {
            self.frontend_bits.remove(bit_index(&key.addr, key.port), now);
            put(&mut self.memory, &mut writes.removed_frontends, Write::RemoveFrontend(key));
        }
    }

    fn remove_endpoint(&mut self, id: u32, now: u64, writes: &mut Writes) {
        if let Some(endpoint) = self.memory.endpoints.get(&id).copied().filter(|endpoint| endpoint.flags != 0) {
            self.endpoint_bits.remove(bit_index(&endpoint.addr, endpoint.port), now);
            put(&mut self.memory, &mut writes.removed, Write::Endpoint(id, Endpoint { flags: 0, ..endpoint }));
            self.endpoint_ids.rest(id, now);
        }
    }

    /// Takes away what the tables have of a Service port and its plan doesn't.
    fn leave(&mut self, name: &PortName, plan: Option<&PortPlan>, now: u64, writes: &mut Writes) {
        let Some(mut state) = self.ports.remove(name) else { return };
        let planned: BTreeSet<FrontendKey> = frontends(plan).map(|frontend| frontend.key).collect();
        for key in state.frontends.extract(|key| !planned.contains(key)) {
            // Another Service may have taken it over in this very step.
            if self.memory.frontends.get(&key).is_some_and(|frontend| frontend.service == state.id) {
                self.remove_frontend(key, now, writes);
            }
        }
        let named: BTreeSet<Range> = state
            .frontends
            .iter()
            .filter_map(|key| self.memory.frontends.get(key))
            .flat_map(|frontend| [frontend.internal, frontend.external])
            .collect();
        for range in state.ranges.extract_if(.., |range| !named.contains(range)) {
            self.slots.rest(range.offset, range.len, now);
        }
        let wanted: BTreeSet<PrefixKey> =
            plan.iter().flat_map(|plan| &plan.source_ranges).map(|net| prefix_key(state.id, *net)).collect();
        for key in state.source_ranges.extract(|key| !wanted.contains(key)) {
            put(&mut self.memory, &mut writes.removed, Write::RemoveSourceRange(key));
        }
        let staying: BTreeSet<(Addr, Port)> = plan
            .iter()
            .flat_map(|plan| &plan.endpoints)
            .map(|endpoint| (endpoint.addr.into(), Port::new(endpoint.port)))
            .collect();
        let memory = &self.memory;
        let leaves = |id: &mut u32| !memory.endpoints.get(id).is_some_and(|it| staying.contains(&(it.addr, it.port)));
        let leaving: Vec<u32> = state.endpoints.extract_if(.., leaves).collect();
        for id in leaving {
            self.remove_endpoint(id, now, writes);
        }
        state.endpoints.shrink_to_fit();
        state.ranges.shrink_to_fit();
        if plan.is_some() {
            self.ports.insert(name.clone(), state);
        } else {
            put(&mut self.memory, &mut writes.removed, Write::RemoveService(state.id));
            self.service_ids.rest(state.id, now);
        }
    }
}

impl PortState {
    /// Where among the ids an endpoint's is, or would be.
    fn find_endpoint(&self, memory: &Memory, key: &(Addr, Port)) -> Result<usize, usize> {
        let key_of = |id: &u32| memory.endpoints.get(id).map(|endpoint| (endpoint.addr, endpoint.port));
        self.endpoints.binary_search_by(|id| key_of(id).as_ref().cmp(&Some(key)))
    }

    /// The range that holds these endpoint ids.
    fn find_range(&self, memory: &Memory, ids: &[u32]) -> Option<Range> {
        let holds = |range: &&Range| {
            range.len as usize == ids.len()
                && (range.offset..).zip(ids).all(|(slot, id)| memory.slots.get(&slot) == Some(id))
        };
        self.ranges.iter().find(holds).copied()
    }
}

fn frontends(plan: Option<&PortPlan>) -> impl Iterator<Item = &crate::plan::PlannedFrontend> {
    plan.into_iter().flat_map(|plan| &plan.frontends)
}

/// The endpoint ids that indices stand for.
fn content(indices: &[u32], ids: &[u32]) -> Vec<u32> {
    indices.iter().filter_map(|index| ids.get(usize::try_from(*index).ok()?).copied()).collect()
}
