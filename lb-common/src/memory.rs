//! Tables in ordinary memory: what `image` believes to be in the kernel, and what tests and `explain --manifests` decide
//! against.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    addr::{Addr, Port},
    layout::{
        Device, Endpoint, Frontend, FrontendKey, NodeAddress, PrefixKey, ServiceName, Settings, bit_index, device_flags,
    },
    tables::Tables,
};

/// Every table that the agent writes. Bits are kept as sets of indices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Frontends by address, port and protocol.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// Endpoint ids by slot.
    pub slots: BTreeMap<u32, u32>,
    /// Endpoints by id, the gone ones too.
    pub endpoints: BTreeMap<u32, Endpoint>,
    /// Names by id of the Service port.
    pub services: BTreeMap<u32, ServiceName>,
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
    pub frontend_bits: BTreeSet<u32>,
    /// Set bits of "may be an endpoint".
    pub endpoint_bits: BTreeSet<u32>,
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
}
