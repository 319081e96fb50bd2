//! The maps. Sizes here are only defaults: the agent computes them from what there is before it creates a map.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage},
    macros::btf_map,
};
use lb_common::{
    addr::Addr,
    affinity::{Affinity, AffinityKey},
    count::ServiceCounters,
    flow::{Flow, FlowKey, FragmentKey, FragmentPorts},
    layout::{BIT_WORDS, Device, Endpoint, Frontend, FrontendKey, NodeAddress, Settings},
    path::Scratch,
    reason::REASONS,
    socket::Pairs,
};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// Service id and address of a [`lb_common::layout::PrefixKey`], behind the prefix length.
pub type Prefix = [u32; 5];

#[btf_map]
pub static FRONTENDS: HashMap<FrontendKey, Frontend, 1024, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static SLOTS: Array<u32, 1024> = Array::new();
#[btf_map]
pub static ENDPOINTS: Array<Endpoint, 1024> = Array::new();
#[btf_map]
pub static SOURCE_RANGES: LpmTrie<Prefix, u32, 1024> = LpmTrie::new();
#[btf_map]
pub static LOCAL_CIDRS: LpmTrie<Prefix, u32, 1024> = LpmTrie::new();
#[btf_map]
pub static SERVICE_CIDRS: LpmTrie<Prefix, u32, 1024> = LpmTrie::new();
#[btf_map]
pub static NODE_ADDRESSES: HashMap<Addr, NodeAddress, 1024, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static DEVICES: HashMap<u32, Device, 1024, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static SETTINGS: Array<Settings, 1> = Array::new();
#[btf_map]
pub static FRONTEND_BITS: Array<u64, BIT_WORDS> = Array::new();
#[btf_map]
pub static ENDPOINT_BITS: Array<u64, BIT_WORDS> = Array::new();

/// Connections that the endpoint has answered.
#[btf_map]
pub static FLOWS: LruHashMap<FlowKey, Flow, 65536> = LruHashMap::new();
/// Connections without an answer so far: a flood of them evicts only its own kind.
#[btf_map]
pub static NEW_FLOWS: LruHashMap<FlowKey, Flow, 16384> = LruHashMap::new();
/// How many entries were made in [`FLOWS`] and [`NEW_FLOWS`], less those that were removed: what is not there was evicted.
#[btf_map]
pub static ENTRIES: PerCpuArray<u64, 2> = PerCpuArray::new();
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, 4096> = LruHashMap::new();
/// Clients that stay with an endpoint.
#[btf_map]
pub static AFFINITIES: LruHashMap<AffinityKey, Affinity, 65536> = LruHashMap::new();
/// By [`lb_common::reason::Reason`].
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, REASONS> = PerCpuArray::new();
/// By id of the Service port. Grows with the tables.
#[btf_map]
pub static SERVICE_COUNTERS: PerCpuArray<ServiceCounters, 1024> = PerCpuArray::new();
/// When a connection without a frontend was noticed last; 0: never.
#[btf_map]
pub static STRAIGHT: Array<u32, 1> = Array::new();
/// Memory to work in.
#[btf_map]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();
/// Second and count of refusals within it.
#[btf_map]
pub static REFUSALS: PerCpuArray<[u32; 2], 1> = PerCpuArray::new();
/// What sockets of the node have been told; dies with the socket.
#[btf_map]
pub static SOCKETS: SkStorage<Pairs> = SkStorage::new();

/// Bytes before the IP header: 14, or 0 on devices without Ethernet header. The object is loaded once for each.
#[unsafe(no_mangle)]
pub static LINK_HEADER: Global<u32> = Global::new(14);
/// First port that masquerading may take.
#[unsafe(no_mangle)]
pub static MASQUERADE_FIRST: Global<u32> = Global::new(61000);
/// How many ports from there on.
#[unsafe(no_mangle)]
pub static MASQUERADE_PORTS: Global<u32> = Global::new(4096);
/// Cookie of the agent's network namespace; sockets of others are left alone unless `SOCKET_LB_ALL`.
#[unsafe(no_mangle)]
pub static NETNS_COOKIE: Global<u64> = Global::new(0);
/// 1: sockets of every network namespace are translated.
#[unsafe(no_mangle)]
pub static SOCKET_LB_ALL: Global<u32> = Global::new(0);
/// Flags that IPv6 pseudo-header differences need: BPF_F_IPV6 from Linux 6.16, 0 where the kernel doesn't know it.
#[unsafe(no_mangle)]
pub static IPV6_CHECKSUM_FLAG: Global<u64> = Global::new(0);
/// Bits of the mark that answers to clients outside get as they enter the host; 0: none get one.
#[unsafe(no_mangle)]
pub static REPLY_MARK_MASK: Global<u32> = Global::new(0);
/// What these bits become.
#[unsafe(no_mangle)]
pub static REPLY_MARK: Global<u32> = Global::new(0);
/// 1: what passes is counted by Service port.
#[unsafe(no_mangle)]
pub static COUNT_SERVICES: Global<u32> = Global::new(1);
