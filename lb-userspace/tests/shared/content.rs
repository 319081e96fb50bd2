//! What tables say, without the numbers that they say it by.
//!
//! Left out, because it depends on the way there by design: ids of Service ports and endpoints and their generations, where
//! ranges lie, what is in slots that no range has, endpoints that are gone (flags 0) and wait for their id to be used again, and
//! bits that outlive their last user by the life of a flow. Of the bits, those that are needed must be there.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use fairlead::image::service_name;
use lb_common::{
    addr::Addr,
    layout::{Device, Frontend, FrontendKey, NodeAddress, PrefixKey, Range, Settings, bit_index},
    memory::Memory,
};

/// An endpoint with its flags.
type Target = (SocketAddr, u16);

/// What a frontend says: its ranges in their order, the name of its Service port, its flags and the seconds of its affinity.
type Saying = (Vec<Target>, Vec<Target>, Option<String>, (u32, u32));

/// The content of tables.
#[derive(Debug, PartialEq, Eq)]
pub struct Content {
    frontends: BTreeMap<FrontendKey, Saying>,
    endpoints: BTreeSet<(String, SocketAddr, u16)>,
    services: BTreeSet<String>,
    source_ranges: BTreeSet<(String, u32, Addr)>,
    local_cidrs: BTreeSet<PrefixKey>,
    service_cidrs: BTreeSet<PrefixKey>,
    node_addresses: BTreeMap<Addr, NodeAddress>,
    devices: BTreeMap<u32, Device>,
    settings: Settings,
}

impl Content {
    /// The content of tables; panics where they are not consistent in themselves.
    pub fn of(memory: &Memory) -> Self {
        let name = |id: &u32| service_name(&memory.services[id]).unwrap().to_owned();
        let live = || memory.endpoints.values().filter(|endpoint| endpoint.flags != 0);
        let socket = |addr: Addr, port: u16| SocketAddr::new(IpAddr::from(addr), port);
        for endpoint in live() {
            assert!(
                memory.endpoint_bits.contains(&bit_index(&endpoint.addr, endpoint.port)),
                "{endpoint:?} has no bit"
            );
        }
        for key in memory.frontends.keys() {
            assert!(memory.frontend_bits.contains(&bit_index(&key.addr, key.port)), "{key:?} has no bit");
        }
        let targets = |range: &Range, service: u32| -> Vec<Target> {
            let ids = (range.offset..range.offset + range.len).map(|slot| memory.slots[&slot]);
            let endpoints = ids.map(|id| memory.endpoints[&id]);
            let target = |endpoint: lb_common::layout::Endpoint| {
                assert!(endpoint.flags != 0 && endpoint.service == service, "{endpoint:?} in a range of {service}");
                (socket(endpoint.addr, endpoint.port.number()), endpoint.flags)
            };
            endpoints.map(target).collect()
        };
        let frontend = |(key, frontend): (&FrontendKey, &Frontend)| {
            let Frontend { internal, external, service, flags, affinity } = frontend;
            let owner = (*key != FrontendKey::any_port(key.addr)).then(|| name(service));
            (*key, (targets(internal, *service), targets(external, *service), owner, (*flags, *affinity)))
        };
        Self {
            frontends: memory.frontends.iter().map(frontend).collect(),
            endpoints: live().map(|it| (name(&it.service), socket(it.addr, it.port.number()), it.flags)).collect(),
            services: memory.services.keys().map(|id| name(&id)).collect(),
            source_ranges: memory.source_ranges.iter().map(|it| (name(&it.service), it.prefix_len, it.addr)).collect(),
            local_cidrs: memory.local_cidrs.iter().copied().collect(),
            service_cidrs: memory.service_cidrs.iter().copied().collect(),
            node_addresses: memory.node_addresses.iter().map(|(addr, flags)| (*addr, *flags)).collect(),
            devices: memory.devices.iter().map(|(ifindex, device)| (*ifindex, *device)).collect(),
            settings: memory.settings,
        }
    }
}
