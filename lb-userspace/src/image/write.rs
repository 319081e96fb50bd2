//! Changes as data: what the image asks of the kernel, and how it keeps book of it.

use lb_common::{
    addr::Addr,
    layout::{Device, Endpoint, Frontend, FrontendKey, NodeAddress, PrefixKey, ServiceName, Settings},
    memory::Memory,
};

/// One change to the kernel's tables. A list of them is applied in order; neighbours of one kind may be applied as a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// An endpoint, also one that is gone (flags 0).
    Endpoint(u32, Endpoint),
    /// Endpoint ids from this slot on.
    Slots(u32, Vec<u32>),
    /// The name of a Service port.
    Service(u32, Box<ServiceName>),
    /// A Service port is gone.
    RemoveService(u32),
    /// A source range.
    SourceRange(PrefixKey),
    /// A source range is gone.
    RemoveSourceRange(PrefixKey),
    /// A bit of "may be a frontend".
    FrontendBit(u32),
    /// A bit of "may be an endpoint".
    EndpointBit(u32),
    /// No flow names what this bit of "may be a frontend" stood for.
    ClearFrontendBit(u32),
    /// The same for "may be an endpoint".
    ClearEndpointBit(u32),
    /// A frontend.
    Frontend(FrontendKey, Frontend),
    /// A frontend is gone.
    RemoveFrontend(FrontendKey),
    /// A prefix that the local detector takes as local.
    LocalCidr(PrefixKey),
    /// Such a prefix is gone.
    RemoveLocalCidr(PrefixKey),
    /// A ServiceCIDR.
    ServiceCidr(PrefixKey),
    /// A ServiceCIDR is gone.
    RemoveServiceCidr(PrefixKey),
    /// An address of this node.
    NodeAddress(Addr, NodeAddress),
    /// An address of this node is gone.
    RemoveNodeAddress(Addr),
    /// A device, by ifindex.
    Device(u32, Device),
    /// A device is gone.
    RemoveDevice(u32),
    /// What may change while the programs run.
    Settings(Settings),
}

impl Write {
    /// Whose family's plan this writes: IPv4's, IPv6's. Entries that others lead to (slots, names, bits) are nobody's own.
    #[must_use]
    pub fn families(&self) -> (bool, bool) {
        let of = |addr: &Addr| (addr.is_v4(), !addr.is_v4());
        match self {
            Self::Endpoint(_, endpoint) => of(&endpoint.addr),
            Self::SourceRange(key)
            | Self::RemoveSourceRange(key)
            | Self::LocalCidr(key)
            | Self::RemoveLocalCidr(key)
            | Self::ServiceCidr(key)
            | Self::RemoveServiceCidr(key) => of(&key.addr),
            Self::Frontend(key, _) | Self::RemoveFrontend(key) => of(&key.addr),
            Self::NodeAddress(addr, _) | Self::RemoveNodeAddress(addr) => of(addr),
            Self::Device(..) | Self::RemoveDevice(_) | Self::Settings(_) => (true, true),
            Self::Slots(..)
            | Self::Service(..)
            | Self::RemoveService(_)
            | Self::FrontendBit(_)
            | Self::EndpointBit(_)
            | Self::ClearFrontendBit(_)
            | Self::ClearEndpointBit(_) => (false, false),
        }
    }

    /// Does to tables in memory what the kernel's tables get.
    pub fn apply(&self, memory: &mut Memory) {
        match self {
            Self::Endpoint(id, endpoint) => _ = memory.endpoints.insert(*id, *endpoint),
            Self::Slots(first, ids) => memory.slots.extend((*first..).zip(ids.iter().copied())),
            Self::Service(id, name) => _ = memory.services.insert(*id, **name),
            Self::RemoveService(id) => _ = memory.services.remove(id),
            Self::SourceRange(key) => _ = memory.source_ranges.insert(*key),
            Self::RemoveSourceRange(key) => _ = memory.source_ranges.remove(key),
            Self::FrontendBit(bit) => _ = memory.frontend_bits.insert(*bit),
            Self::EndpointBit(bit) => _ = memory.endpoint_bits.insert(*bit),
            Self::ClearFrontendBit(bit) => _ = memory.frontend_bits.remove(bit),
            Self::ClearEndpointBit(bit) => _ = memory.endpoint_bits.remove(bit),
            Self::Frontend(key, frontend) => _ = memory.frontends.insert(*key, *frontend),
            Self::RemoveFrontend(key) => _ = memory.frontends.remove(key),
            Self::LocalCidr(key) => _ = memory.local_cidrs.insert(*key),
            Self::RemoveLocalCidr(key) => _ = memory.local_cidrs.remove(key),
            Self::ServiceCidr(key) => _ = memory.service_cidrs.insert(*key),
            Self::RemoveServiceCidr(key) => _ = memory.service_cidrs.remove(key),
            Self::NodeAddress(addr, flags) => _ = memory.node_addresses.insert(*addr, *flags),
            Self::RemoveNodeAddress(addr) => _ = memory.node_addresses.remove(addr),
            Self::Device(ifindex, device) => _ = memory.devices.insert(*ifindex, *device),
            Self::RemoveDevice(ifindex) => _ = memory.devices.remove(ifindex),
            Self::Settings(settings) => memory.settings = *settings,
        }
    }
}
