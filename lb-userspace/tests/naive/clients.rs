//! What is remembered of clients: as the programs do, and as the specification says it.

use std::collections::BTreeMap;

use lb_common::{
    addr::{Addr, Port},
    affinity::{Affinity, AffinityKey, ticks_of_nanoseconds},
    layout::{Endpoint, Frontend, FrontendKey, NodeAddress},
    memory::Memory,
    tables::Tables,
};

use crate::specification;

/// The same twice.
#[derive(Clone, Debug, Default)]
pub struct Remembered {
    /// By names and addresses.
    pub noted: specification::Clients,
    /// By numbers, as the kernel's map has it.
    pub last: BTreeMap<AffinityKey, Affinity>,
}

impl Remembered {
    /// What the programs note of a connection in this second.
    pub const fn now(endpoint_id: u32, endpoint: &Endpoint, second: u64) -> Affinity {
        let seen = ticks_of_nanoseconds(second * 1_000_000_000);
        Affinity { endpoint_id, generation: endpoint.generation, seen }
    }

    /// The programs' clock when this second's packets are judged: before its end, so that no rounding matters.
    pub const fn judged(second: u64) -> u32 {
        ticks_of_nanoseconds(second * 1_000_000_000 + 300_000_000)
    }
}

/// The agent's tables, and the programs' memory of clients.
#[derive(Clone, Copy)]
pub struct Clients<'a> {
    pub tables: &'a Memory,
    pub last: &'a BTreeMap<AffinityKey, Affinity>,
    pub ticks: u32,
}

impl Tables for Clients<'_> {
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
        self.last.get(key)
    }

    fn ticks(&self) -> u32 {
        self.ticks
    }
}
