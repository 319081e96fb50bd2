//! Tables in ordinary memory: what `image` believes to be in the kernel, and what tests and `explain --manifests` decide
//! against.

mod bit_set;
mod dense;

use std::collections::{BTreeMap, BTreeSet};

pub use self::{bit_set::BitSet, dense::Dense};

use crate::{
    addr::{Addr, Port},
    affinity::{Affinity, AffinityKey, ticks_of_nanoseconds},
    count::ServiceCounters,
    flow::{Flow, FlowKey, FragmentKey, FragmentPorts, IDLE_TCP, NO_ID},
    layout::{
        Device, Endpoint, Frontend, FrontendKey, NodeAddress, PrefixKey, ServiceName, Settings, bit_index, device_flags,
    },
    packet::Packet,
    tables::{State, Tables},
};

/// Every table that the agent writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Frontends by address, port and protocol.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// Endpoint ids by slot.
    pub slots: Dense<u32>,
    /// Endpoints by id, the gone ones too.
    pub endpoints: Dense<Endpoint>,
    /// Names by id of the Service port.
    pub services: Dense<ServiceName>,
    /// Source ranges by Service port.
    pub source_ranges: BTreeSet<PrefixKey>,
    /// What the local detector takes as local, with `service` 0.
    pub local_cidrs: BTreeSet<PrefixKey>,
    /// ServiceCIDRs, with `service` 0.
    pub service_cidrs: BTreeSet<PrefixKey>,
    /// Addresses of this node.
    pub node_addresses: BTreeMap<Addr, NodeAddress>,
    /// Devices by ifindex.
    pub devices: BTreeMap<u32, Device>,
    /// What may change while the programs run.
    pub settings: Settings,
    /// Set bits of "may be a frontend".
    pub frontend_bits: BitSet,
    /// Set bits of "may be an endpoint".
    pub endpoint_bits: BitSet,
}

/// Whether some prefix of the set holds the address, for one Service port.
fn holds(prefixes: &BTreeSet<PrefixKey>, service: u32, addr: &Addr) -> bool {
    let bits = |addr: &Addr| addr.words.iter().fold(0, |bits, word| bits << 32 | u128::from(u32::from_be(*word)));
    prefixes.iter().filter(|prefix| prefix.service == service).any(|prefix| {
        let free = 160_u32.saturating_sub(prefix.prefix_len);
        (bits(addr) ^ bits(&prefix.addr)).checked_shr(free).unwrap_or(0) == 0
    })
}

impl Tables for Memory {
    fn may_be_frontend(&self, addr: &Addr, port: Port) -> bool {
        self.frontend_bits.contains(&bit_index(addr, port))
    }

    fn may_be_endpoint(&self, addr: &Addr, port: Port) -> bool {
        self.endpoint_bits.contains(&bit_index(addr, port))
    }

    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
        self.frontends.get(key)
    }

    fn slot(&self, index: u32) -> Option<u32> {
        self.slots.get(&index).copied()
    }

    fn endpoint(&self, id: u32) -> Option<&Endpoint> {
        self.endpoints.get(&id)
    }

    fn node_address(&self, addr: &Addr) -> NodeAddress {
        self.node_addresses.get(addr).copied().unwrap_or(0)
    }

    fn is_local_source(&self, addr: &Addr, device: u32) -> bool {
        holds(&self.local_cidrs, 0, addr)
            || self.devices.get(&device).is_some_and(|device| device.flags & device_flags::LOCAL_SOURCES != 0)
    }

    fn in_source_ranges(&self, service: u32, addr: &Addr) -> bool {
        holds(&self.source_ranges, service, addr)
    }

    fn in_service_cidr(&self, addr: &Addr) -> bool {
        let Settings { cidrs_v4, cidrs_v6, .. } = self.settings;
        (cidrs_v4.holds(addr) || cidrs_v6.holds(addr)) && holds(&self.service_cidrs, 0, addr)
    }

    /// Clients are remembered by the programs only.
    fn affinity(&self, _: &AffinityKey) -> Option<&Affinity> {
        None
    }

    fn ticks(&self) -> u32 {
        0
    }
}

/// [`Memory`] and what the programs remember: a whole machine for tests and simulations. Its tables are never full, and its
/// clock is set by hand.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// What the agent has written.
    pub tables: Memory,
    /// Connections, and whether they are confirmed.
    pub flows: BTreeMap<FlowKey, (Flow, bool)>,
    /// Fragmented packets.
    pub fragments: BTreeMap<FragmentKey, FragmentPorts>,
    /// Clients that stay with an endpoint.
    pub affinities: BTreeMap<AffinityKey, Affinity>,
    /// Counters by id of the Service port.
    pub service_counters: BTreeMap<u32, ServiceCounters>,
    /// When a connection without a frontend was noticed last.
    pub straight: Option<u32>,
    /// The time in seconds.
    pub now: u32,
    /// Copies of frames that are to enter once more, and by which device.
    pub entered: Vec<(u32, Vec<u8>)>,
    /// So many of the next claims of a connection's entry come second to another CPU's.
    pub second: u32,
    /// Another CPU moves this entry: the next look for it misses it.
    pub moving: Option<FlowKey>,
    /// No entry of a connection fits any more.
    pub full: bool,
    /// So many packets were refused in this second that the next ones are dropped.
    pub refused_enough: bool,
}

/// Ports that a [`Machine`] masquerades with: the first, and how many.
pub const MACHINE_PORTS: (u16, u16) = (61000, 4096);

impl Tables for Machine {
    fn may_be_frontend(&self, addr: &Addr, port: Port) -> bool {
        self.tables.may_be_frontend(addr, port)
    }

    fn may_be_endpoint(&self, addr: &Addr, port: Port) -> bool {
        self.tables.may_be_endpoint(addr, port)
    }

    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
        self.tables.frontend(key)
    }

    fn slot(&self, index: u32) -> Option<u32> {
        self.tables.slot(index)
    }

    fn endpoint(&self, id: u32) -> Option<&Endpoint> {
        self.tables.endpoint(id)
    }

    fn node_address(&self, addr: &Addr) -> NodeAddress {
        self.tables.node_address(addr)
    }

    fn is_local_source(&self, addr: &Addr, device: u32) -> bool {
        self.tables.is_local_source(addr, device)
    }

    fn in_source_ranges(&self, service: u32, addr: &Addr) -> bool {
        self.tables.in_source_ranges(service, addr)
    }

    fn in_service_cidr(&self, addr: &Addr) -> bool {
        self.tables.in_service_cidr(addr)
    }

    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity> {
        self.affinities.get(key)
    }

    fn ticks(&self) -> u32 {
        ticks_of_nanoseconds(u64::from(self.now) << 30)
    }
}

impl State for Machine {
    fn now(&self) -> u32 {
        self.now
    }

    fn flow(&mut self, key: &FlowKey) -> Option<&mut Flow> {
        if self.moving == Some(*key) {
            self.moving = None;
            return None;
        }
        self.flows.get_mut(key).map(|(flow, _)| flow)
    }

    fn moved_flow(&mut self, key: &FlowKey) -> Option<&mut Flow> {
        self.flows.get_mut(key).map(|(flow, _)| flow)
    }

    fn insert_flow(&mut self, key: &FlowKey, flow: &Flow) -> bool {
        if !self.full {
            self.flows.insert(*key, (*flow, false));
        }
        !self.full
    }

    fn claim_flow(&mut self, key: &FlowKey, flow: &Flow) -> bool {
        if let Some(left) = self.second.checked_sub(1) {
            self.second = left;
            return false;
        }
        !self.flows.contains_key(key) && self.insert_flow(key, flow)
    }

    fn confirm_flow(&mut self, key: &FlowKey, flow: &Flow) {
        self.flows.insert(*key, (*flow, true));
    }

    fn remove_flow(&mut self, key: &FlowKey) {
        self.flows.remove(key);
    }

    fn insert_affinity(&mut self, key: &AffinityKey, endpoint_id: u32, generation: u32) {
        self.affinities.insert(*key, Affinity { endpoint_id, generation, seen: self.ticks() });
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        self.fragments.get(key).copied()
    }

    fn insert_fragment(&mut self, key: &FragmentKey, ports: &FragmentPorts) {
        self.fragments.insert(*key, *ports);
    }

    fn device(&self, ifindex: u32) -> Option<&Device> {
        self.tables.devices.get(&ifindex)
    }

    /// A machine has no routes, and hands nothing to bridges.
    fn bridge_between(&self, _: u32, _: &Addr) -> u32 {
        0
    }

    fn masquerade_ports(&self) -> (u16, u16) {
        MACHINE_PORTS
    }

    fn has_straight_flows(&self) -> bool {
        self.straight.is_some_and(|last| self.now.wrapping_sub(last).cast_signed() <= IDLE_TCP.cast_signed())
    }

    fn note_straight_flow(&mut self) {
        self.straight = Some(self.now);
    }

    fn leaves_mid_flow(&self) -> bool {
        self.tables.settings.leaves_mid_flow(self.now)
    }

    fn marks_replies(&self) -> bool {
        true
    }

    fn terminates(&self) -> bool {
        self.tables.settings.terminates()
    }

    fn enter_again<P: Packet>(&mut self, packet: &P, device: u32) {
        let words = (0..packet.len() / 2).filter_map(|i| packet.read::<u16>(i * 2));
        let mut frame: Vec<u8> = words.flat_map(u16::to_ne_bytes).collect();
        if !packet.len().is_multiple_of(2) {
            frame.extend(packet.read::<u16>(packet.len() - 2).map(|last| last.to_ne_bytes()[1]));
        }
        self.entered.push((device, frame));
    }

    fn may_refuse(&mut self) -> bool {
        !self.refused_enough
    }

    fn service_counters(&mut self, service: u32) -> Option<&mut ServiceCounters> {
        (service != NO_ID).then(|| self.service_counters.entry(service).or_default())
    }
}
