//! The maps as `lb-common`'s tables.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS, BPF_NOEXIST, bpf_fib_lookup as FibLookup, bpf_sock_addr},
    btf_maps::{LruHashMap, lpm_trie::Key},
    helpers::generated::{bpf_clone_redirect, bpf_fib_lookup, bpf_ktime_get_coarse_ns},
};
use lb_common::{
    addr::{Addr, Port},
    affinity::{Affinity, AffinityKey, ticks_of_nanoseconds},
    count::ServiceCounters,
    flow::{Flow, FlowKey, FragmentKey, FragmentPorts, IDLE_TCP},
    layout::{BIT_WORDS, Device, Endpoint, Frontend, FrontendKey, NodeAddress, Settings, bit_index, device_flags},
    packet::Packet,
    reason::Reason,
    tables::{State, Tables},
};

use crate::maps::{
    AFFINITIES, COUNT_SERVICES, COUNTERS, DEVICES, ENDPOINT_BITS, ENDPOINTS, ENTRIES, FLOWS, FRAGMENTS, FRONTEND_BITS,
    FRONTENDS, LOCAL_CIDRS, MASQUERADE_FIRST, MASQUERADE_PORTS, NEW_FLOWS, NODE_ADDRESSES, Prefix, REFUSALS,
    REPLY_MARK_MASK, SERVICE_CIDRS, SERVICE_COUNTERS, SETTINGS, SLOTS, SOURCE_RANGES, STRAIGHT,
};

/// So many refusals a second on each CPU; more are dropped.
const REFUSALS_PER_SECOND: u32 = 10_000;

/// The maps, seen from a packet (`skb` is its context) or from a socket (null).
pub struct Maps {
    skb: *mut __sk_buff,
}

impl Maps {
    /// The maps for a packet.
    #[inline(always)]
    pub fn of_packet(skb: *mut __sk_buff) -> Self {
        Self { skb }
    }

    /// The maps for a socket.
    #[inline(always)]
    pub fn of_socket(_: *mut bpf_sock_addr) -> Self {
        Self { skb: core::ptr::null_mut() }
    }

    /// Counts a cause.
    #[inline(always)]
    pub fn count(reason: Reason) {
        if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
            // SAFETY: the map's value, of this CPU alone.
            unsafe { *counter += 1 };
        }
    }
}

#[inline(always)]
fn bit(words: &aya_ebpf::btf_maps::Array<u64, BIT_WORDS>, addr: &Addr, port: Port) -> bool {
    let index = bit_index(addr, port);
    match words.get(index >> 6) {
        Some(word) => *word >> (index & 63) & 1 != 0,
        None => true,
    }
}

/// Whether a prefix of the map holds the address. Functions of their own, for the stack's sake.
macro_rules! holds {
    ($($name:ident: $map:ident),*) => {$(
        #[inline(never)]
        fn $name(service: u32, addr: &Addr) -> bool {
            let [a, b, c, d] = addr.words;
            let key: Key<Prefix> = Key::new(160, [service, a, b, c, d]);
            $map.get(&key).is_some()
        }
    )*};
}
holds!(source_range: SOURCE_RANGES, local_cidr: LOCAL_CIDRS, service_cidr: SERVICE_CIDRS);

impl Tables for Maps {
    #[inline(always)]
    fn may_be_frontend(&self, addr: &Addr, port: Port) -> bool {
        bit(&FRONTEND_BITS, addr, port)
    }

    #[inline(always)]
    fn may_be_endpoint(&self, addr: &Addr, port: Port) -> bool {
        bit(&ENDPOINT_BITS, addr, port)
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
        // SAFETY: the agent replaces elements whole; an element in use is not freed before the program has ended.
        unsafe { FRONTENDS.get(key) }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<u32> {
        SLOTS.get(index).copied()
    }

    #[inline(always)]
    fn endpoint(&self, id: u32) -> Option<&Endpoint> {
        ENDPOINTS.get(id)
    }

    #[inline(always)]
    fn node_address(&self, addr: &Addr) -> NodeAddress {
        // SAFETY: as for frontends.
        unsafe { NODE_ADDRESSES.get(addr) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn is_local_source(&self, addr: &Addr, device: u32) -> bool {
        local_cidr(0, addr) || self.device(device).is_some_and(|device| device.flags & device_flags::LOCAL_SOURCES != 0)
    }

    #[inline(always)]
    fn in_source_ranges(&self, service: u32, addr: &Addr) -> bool {
        source_range(service, addr)
    }

    #[inline(always)]
    fn in_service_cidr(&self, addr: &Addr) -> bool {
        let Some(settings) = SETTINGS.get(0) else { return false };
        let cover = if addr.is_v4() { &settings.cidrs_v4 } else { &settings.cidrs_v6 };
        cover.holds(addr) && service_cidr(0, addr)
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity> {
        // SAFETY: three words, each true by itself: what they name together is checked before it is used.
        unsafe { AFFINITIES.get(key) }
    }

    #[inline(always)]
    fn ticks(&self) -> u32 {
        // SAFETY: a helper without arguments.
        ticks_of_nanoseconds(unsafe { bpf_ktime_get_coarse_ns() })
    }
}

/// Indices of [`ENTRIES`].
const ANSWERED: u32 = 0;
const UNANSWERED: u32 = 1;

/// Makes an entry where there is none. False: there is one, or the table took none.
#[inline(always)]
fn make<const N: usize>(map: &LruHashMap<FlowKey, Flow, N>, table: u32, key: &FlowKey, flow: &Flow) -> bool {
    let made = map.insert(key, flow, u64::from(BPF_NOEXIST)).is_ok();
    if made {
        count_entries(table, 1);
    }
    made
}

/// Makes an entry, in place of any that there is.
#[inline(always)]
fn put<const N: usize>(map: &LruHashMap<FlowKey, Flow, N>, table: u32, key: &FlowKey, flow: &Flow) -> bool {
    make(map, table, key, flow) || map.insert(key, flow, 0).is_ok()
}

#[inline(always)]
fn remove<const N: usize>(map: &LruHashMap<FlowKey, Flow, N>, table: u32, key: &FlowKey) {
    if map.remove(key).is_ok() {
        count_entries(table, u64::MAX);
    }
}

/// Adds to the entries that were made and not removed.
#[inline(always)]
fn count_entries(table: u32, by: u64) {
    if let Some(entries) = ENTRIES.get_ptr_mut(table) {
        // SAFETY: the map's value, of this CPU alone.
        unsafe { *entries = (*entries).wrapping_add(by) };
    }
}

impl State for Maps {
    #[inline(always)]
    fn now(&self) -> u32 {
        // Linux 5.11; a second is 2^30 ns here.
        // SAFETY: a helper without arguments.
        (unsafe { bpf_ktime_get_coarse_ns() } >> 30) as u32
    }

    #[inline(always)]
    fn flow(&mut self, key: &FlowKey) -> Option<&mut Flow> {
        let flow = match FLOWS.get_ptr_mut(key) {
            Some(flow) => flow,
            None => NEW_FLOWS.get_ptr_mut(key)?,
        };
        // SAFETY: a map value. Other CPUs may write it at the same time: its fields are words that are true one by one.
        Some(unsafe { &mut *flow })
    }

    #[inline(always)]
    fn moved_flow(&mut self, key: &FlowKey) -> Option<&mut Flow> {
        // SAFETY: as above.
        FLOWS.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
    }

    #[inline(always)]
    fn insert_flow(&mut self, key: &FlowKey, flow: &Flow) -> bool {
        remove(&FLOWS, ANSWERED, key);
        put(&NEW_FLOWS, UNANSWERED, key, flow)
    }

    #[inline(always)]
    fn claim_flow(&mut self, key: &FlowKey, flow: &Flow) -> bool {
        make(&NEW_FLOWS, UNANSWERED, key, flow)
    }

    #[inline(always)]
    fn confirm_flow(&mut self, key: &FlowKey, flow: &Flow) {
        if put(&FLOWS, ANSWERED, key, flow) {
            remove(&NEW_FLOWS, UNANSWERED, key);
        }
    }

    #[inline(always)]
    fn remove_flow(&mut self, key: &FlowKey) {
        remove(&FLOWS, ANSWERED, key);
        remove(&NEW_FLOWS, UNANSWERED, key);
    }

    #[inline(always)]
    fn insert_affinity(&mut self, key: &AffinityKey, endpoint_id: u32, generation: u32) {
        let affinity = Affinity { endpoint_id, generation, seen: self.ticks() };
        let _ = AFFINITIES.insert(key, &affinity, 0);
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        // SAFETY: four bytes, written at once.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn insert_fragment(&mut self, key: &FragmentKey, ports: &FragmentPorts) {
        let _ = FRAGMENTS.insert(key, ports, 0);
    }

    #[inline(always)]
    fn device(&self, ifindex: u32) -> Option<&Device> {
        // SAFETY: as for frontends.
        unsafe { DEVICES.get(&ifindex) }
    }

    #[inline(never)]
    fn bridge_between(&self, ifindex: u32, endpoint: &Addr) -> u32 {
        let Some(device) = self.device(ifindex) else { return 0 };
        let v4 = endpoint.is_v4();
        let wanted = if v4 { device_flags::NEIGH_V4 } else { device_flags::NEIGH_V6 };
        let bridge = device.bridge;
        if bridge == 0 || device.flags & wanted == 0 || self.skb.is_null() {
            return 0;
        }
        // SAFETY: all zero is a valid `bpf_fib_lookup`.
        let mut fib: FibLookup = unsafe { core::mem::zeroed() };
        fib.ifindex = bridge;
        if v4 {
            fib.family = 2;
            fib.__bindgen_anon_4.ipv4_dst = endpoint.v4_word();
        } else {
            fib.family = 10;
            fib.__bindgen_anon_4.ipv6_dst = endpoint.words;
        }
        // BPF_FIB_LOOKUP_SKIP_NEIGH would need 6.3: without a neighbour the device is still answered.
        // SAFETY: the context is the program's own, the structure is on the stack.
        let result = unsafe { bpf_fib_lookup(self.skb.cast(), &raw mut fib, size_of::<FibLookup>() as i32, 0) };
        const SUCCESS: i64 = 0;
        const NO_NEIGH: i64 = 7;
        if (result == SUCCESS || result == NO_NEIGH) && fib.ifindex == bridge { bridge } else { 0 }
    }

    #[inline(always)]
    fn marks_replies(&self) -> bool {
        REPLY_MARK_MASK.load() != 0
    }

    #[inline(always)]
    fn masquerade_ports(&self) -> (u16, u16) {
        (MASQUERADE_FIRST.load() as u16, MASQUERADE_PORTS.load() as u16)
    }

    #[inline(always)]
    fn has_straight_flows(&self) -> bool {
        // The clock is asked only where there is something to compare. Another CPU may have noted a moment after this one's.
        STRAIGHT
            .get(0)
            .is_some_and(|&last| last != 0 && self.now().wrapping_sub(last).cast_signed() <= IDLE_TCP.cast_signed())
    }

    #[inline(always)]
    fn note_straight_flow(&mut self) {
        if let Some(last) = STRAIGHT.get_ptr_mut(0) {
            // A second that reads as "never" is told as the one before.
            let now = self.now();
            // SAFETY: the map's value, a word that is written at once.
            unsafe { *last = if now == 0 { u32::MAX } else { now } };
        }
    }

    #[inline(always)]
    fn leaves_mid_flow(&self) -> bool {
        SETTINGS.get(0).is_some_and(|settings| settings.leaves_mid_flow(self.now()))
    }

    #[inline(always)]
    fn terminates(&self) -> bool {
        SETTINGS.get(0).is_some_and(Settings::terminates)
    }

    #[inline(always)]
    fn enter_again<P: Packet>(&mut self, _: &P, device: u32) {
        if !self.skb.is_null() {
            // SAFETY: the context is the program's own.
            let _ = unsafe { bpf_clone_redirect(self.skb, device, u64::from(BPF_F_INGRESS)) };
        }
    }

    #[inline(always)]
    fn may_refuse(&mut self) -> bool {
        let now = self.now();
        let Some(refusals) = REFUSALS.get_ptr_mut(0) else { return false };
        // SAFETY: the map's value, of this CPU alone.
        let [second, count] = unsafe { &mut *refusals };
        if *second != now {
            (*second, *count) = (now, 0);
        }
        *count += 1;
        *count <= REFUSALS_PER_SECOND
    }

    #[inline(always)]
    fn service_counters(&mut self, service: u32) -> Option<&mut ServiceCounters> {
        // The verifier takes the rest away where it is off.
        if COUNT_SERVICES.load() == 0 {
            return None;
        }
        // SAFETY: the map's value, of this CPU alone.
        SERVICE_COUNTERS.get_ptr_mut(service).map(|counters| unsafe { &mut *counters })
    }
}
