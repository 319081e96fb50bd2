//! The maps: names, shapes, and how large they must be.
//!
//! In: how much there is to store, a generation's folder. Out: shapes to make maps by, maps that are pinned. Nothing is written here.

use std::{collections::BTreeMap, io::ErrorKind, path::Path, thread};

use anyhow::{Context as _, Result, bail};
use lb_common::{
    addr::Addr,
    affinity::{Affinity, AffinityKey},
    count::ServiceCounters,
    flow::{Flow, FlowKey, FragmentKey, FragmentPorts},
    layout::{BIT_WORDS, Device, Endpoint, Frontend, FrontendKey, NodeAddress, PrefixKey, ServiceName, Settings},
    memory::Memory,
    reason::REASONS,
    socket::Pairs,
};

use super::sys::{Map, MapShape, NO_PREALLOC, map_type};
use crate::{image::MOST_IDS, plan::Expected};

/// A table that the agent writes and the programs read. Grows by generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Frontends.
    Frontends,
    /// Slots of ranges.
    Slots,
    /// Endpoints.
    Endpoints,
    /// Names of Service ports; for people, not for programs.
    Services,
    /// Source ranges.
    SourceRanges,
    /// What the local detector knows.
    LocalCidrs,
    /// ServiceCIDRs.
    ServiceCidrs,
    /// The node's addresses.
    NodeAddresses,
    /// Devices.
    Devices,
    /// Settings.
    Settings,
    /// Bits of frontends.
    FrontendBits,
    /// Bits of endpoints.
    EndpointBits,
    /// What the programs count of each Service port. The agent writes nothing but zeros.
    ServiceCounters,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Frontends,
        Self::Slots,
        Self::Endpoints,
        Self::Services,
        Self::SourceRanges,
        Self::LocalCidrs,
        Self::ServiceCidrs,
        Self::NodeAddresses,
        Self::Devices,
        Self::Settings,
        Self::FrontendBits,
        Self::EndpointBits,
        Self::ServiceCounters,
    ];

    /// The map's name in the object and among the pins.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Frontends => "FRONTENDS",
            Self::Slots => "SLOTS",
            Self::Endpoints => "ENDPOINTS",
            Self::Services => "SERVICES",
            Self::SourceRanges => "SOURCE_RANGES",
            Self::LocalCidrs => "LOCAL_CIDRS",
            Self::ServiceCidrs => "SERVICE_CIDRS",
            Self::NodeAddresses => "NODE_ADDRESSES",
            Self::Devices => "DEVICES",
            Self::Settings => "SETTINGS",
            Self::FrontendBits => "FRONTEND_BITS",
            Self::EndpointBits => "ENDPOINT_BITS",
            Self::ServiceCounters => "SERVICE_COUNTERS",
        }
    }

    /// The shape that its map must have, with this many entries.
    pub(super) const fn shape(self, max_entries: u32) -> MapShape {
        let hash = map_type::HASH;
        let array = map_type::ARRAY;
        let trie = map_type::LPM_TRIE;
        match self {
            Self::Frontends => shape::<FrontendKey, Frontend>(hash, max_entries),
            Self::Slots => shape::<u32, u32>(array, max_entries),
            Self::Endpoints => shape::<u32, Endpoint>(array, max_entries),
            Self::Services => shape::<u32, ServiceName>(hash, max_entries),
            Self::SourceRanges | Self::LocalCidrs | Self::ServiceCidrs => shape::<PrefixKey, u32>(trie, max_entries),
            Self::NodeAddresses => shape::<Addr, NodeAddress>(hash, max_entries),
            Self::Devices => shape::<u32, Device>(hash, max_entries),
            Self::Settings => shape::<u32, Settings>(array, max_entries),
            Self::FrontendBits | Self::EndpointBits => shape::<u32, u64>(array, max_entries),
            Self::ServiceCounters => shape::<u32, ServiceCounters>(map_type::PERCPU_ARRAY, max_entries),
        }
    }

    /// The fewest entries that its map is made with.
    pub(super) const fn floor(self) -> u32 {
        match self {
            Self::Frontends | Self::Endpoints | Self::Services | Self::ServiceCounters => 1024,
            Self::Slots => 4096,
            Self::SourceRanges | Self::NodeAddresses | Self::Devices => 256,
            Self::LocalCidrs | Self::ServiceCidrs => 64,
            Self::Settings => 1,
            Self::FrontendBits | Self::EndpointBits => BIT_WORDS as u32,
        }
    }
}

/// Flow state: maps that programs write, which keep their size and their content for life.
pub const FLOW_MAPS: [&str; 8] =
    ["FLOWS", "NEW_FLOWS", "ENTRIES", "FRAGMENTS", "AFFINITIES", "STRAIGHT", "COUNTERS", "SOCKETS"];

pub(super) const fn flow_shape(name: &str, flows: u32, affinities: u32) -> MapShape {
    let lru = map_type::LRU_HASH;
    match name.as_bytes() {
        b"FLOWS" => shape::<FlowKey, Flow>(lru, 2 * flows),
        b"NEW_FLOWS" => shape::<FlowKey, Flow>(lru, flows / 2),
        b"ENTRIES" => shape::<u32, u64>(map_type::PERCPU_ARRAY, 2),
        b"FRAGMENTS" => shape::<FragmentKey, FragmentPorts>(lru, 4096),
        b"AFFINITIES" => shape::<AffinityKey, Affinity>(lru, affinities),
        b"STRAIGHT" => shape::<u32, u32>(map_type::ARRAY, 1),
        b"COUNTERS" => shape::<u32, u64>(map_type::PERCPU_ARRAY, REASONS as u32),
        _ => shape::<u32, Pairs>(map_type::SK_STORAGE, 0),
    }
}

const fn shape<K, V>(map_type: u32, max_entries: u32) -> MapShape {
    let flags = match map_type {
        map_type::HASH | map_type::LPM_TRIE | map_type::SK_STORAGE => NO_PREALLOC,
        _ => 0,
    };
    MapShape { map_type, id: 0, key_size: size_of::<K>() as u32, value_size: size_of::<V>() as u32, max_entries, flags }
}

/// How many connections are remembered: as kube-proxy sizes conntrack (32,768 for each CPU, at least 131,072), at most
/// 524,288.
///
/// LRU maps are allocated in full. A flow needs two entries (three if masqueraded) of 40 + 92 bytes and 64 of the kernel's
/// own, so FLOWS, with twice as many entries, takes about 400 bytes a flow, and NEW_FLOWS a quarter of that: 65 MB at
/// 131,072 flows, 262 MB at 524,288.
pub fn default_flows() -> u32 {
    let cpus = thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX));
    cpus.saturating_mul(32_768).clamp(131_072, 524_288)
}

/// How many clients are remembered, each for each Service port that it uses: 104 bytes an entry, allocated in full, 7 MB.
pub const DEFAULT_AFFINITIES: u32 = 65_536;

/// How many entries each table must have room for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capacity(BTreeMap<Table, u32>);

impl Capacity {
    /// What a list of this much is expected to need.
    pub fn expected(expected: &Expected) -> Self {
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        Self(BTreeMap::from([
            (Table::Frontends, count(expected.frontends)),
            // A range takes the next power of two.
            (Table::Slots, count(2 * expected.endpoints)),
            (Table::Endpoints, count(expected.endpoints)),
            (Table::Services, count(expected.services)),
            // Ids begin with 1.
            (Table::ServiceCounters, count(expected.services.saturating_add(1))),
            (Table::SourceRanges, count(expected.source_ranges)),
        ]))
    }

    /// What the content needs.
    pub fn of(memory: &Memory) -> Self {
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let last = |key: Option<u32>| key.map_or(0, |key| key.saturating_add(1));
        Self(BTreeMap::from([
            (Table::Frontends, count(memory.frontends.len())),
            (Table::Slots, last(memory.slots.last_key())),
            (Table::Endpoints, last(memory.endpoints.last_key())),
            (Table::Services, count(memory.services.len())),
            (Table::ServiceCounters, last(memory.services.keys().filter(|id| *id < MOST_IDS).last())),
            (Table::SourceRanges, count(memory.source_ranges.len())),
            (Table::LocalCidrs, count(memory.local_cidrs.len())),
            (Table::ServiceCidrs, count(memory.service_cidrs.len())),
            (Table::NodeAddresses, count(memory.node_addresses.len())),
            (Table::Devices, count(memory.devices.len())),
        ]))
    }

    /// Makes it at least this large for a table.
    pub fn require(&mut self, table: Table, entries: u32) {
        let needs = self.0.entry(table).or_default();
        *needs = entries.max(*needs);
    }

    /// Entries that a table needs.
    pub fn needs(&self, table: Table) -> u32 {
        self.0.get(&table).copied().unwrap_or(0)
    }

    /// Entries that a table's map is made with: room for twice as many, a power of two, as updates pass through more than
    /// their end needs. Counters take their memory once for each CPU, and get a quarter more.
    pub fn entries(&self, table: Table) -> u32 {
        match table {
            Table::Settings | Table::FrontendBits | Table::EndpointBits => table.floor(),
            Table::ServiceCounters => {
                let needs = self.needs(table);
                needs.saturating_add(needs / 4).max(table.floor())
            }
            Table::Frontends
            | Table::Slots
            | Table::Endpoints
            | Table::Services
            | Table::SourceRanges
            | Table::LocalCidrs
            | Table::ServiceCidrs
            | Table::NodeAddresses
            | Table::Devices => {
                let twice = self.needs(table).saturating_mul(2).min(1 << 31);
                twice.next_power_of_two().max(table.floor())
            }
        }
    }
}

/// Opens a table of a generation, if it is there and has the shape that this program knows.
pub fn open_table(generation: &Path, table: Table) -> Result<Option<Map>> {
    open(&generation.join(table.name()), table.shape(0))
}

/// Opens a map of flow state, in the same way.
pub fn open_flow_map(flows: &Path, name: &str) -> Result<Option<Map>> {
    open(&flows.join(name), flow_shape(name, 0, 0))
}

fn open(path: &Path, wanted: MapShape) -> Result<Option<Map>> {
    let map = match Map::open(path) {
        Ok(map) => map,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot open the pinned map {}", path.display())),
    };
    let found = map.shape();
    if (MapShape { id: 0, max_entries: 0, ..found }) != (MapShape { max_entries: 0, ..wanted }) {
        bail!(
            "the pinned map {} has another shape than this version's (found type {}, {} + {} bytes, flags {:#x}; wanted \
             type {}, {} + {} bytes, flags {:#x}): run `fairlead cleanup` and start again, or give --bpffs another folder",
            path.display(),
            found.map_type,
            found.key_size,
            found.value_size,
            found.flags,
            wanted.map_type,
            wanted.key_size,
            wanted.value_size,
            wanted.flags,
        );
    }
    Ok(Some(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_have_room_for_twice_what_there_is() {
        for (needs, entries) in [(0, 1024), (512, 1024), (513, 2048), (100_000, 262_144)] {
            let capacity = Capacity(BTreeMap::from([(Table::Frontends, needs)]));
            assert_eq!(capacity.entries(Table::Frontends), entries, "{needs}");
        }
    }

    #[test]
    fn arrays_need_their_last_index() {
        let memory = Memory { slots: [(70_000, 1)].into(), ..Memory::default() };
        assert_eq!(Capacity::of(&memory).needs(Table::Slots), 70_001);
    }

    #[test]
    fn an_absurd_id_makes_no_large_table_of_counters() {
        let mut memory = Memory::default();
        memory.services.extend([1, 700, MOST_IDS, u32::MAX].map(|id| (id, [0; lb_common::layout::SERVICE_NAME_LEN])));
        let capacity = Capacity::of(&memory);
        assert_eq!([Table::ServiceCounters, Table::Services].map(|table| capacity.needs(table)), [701, 4]);
    }
}
