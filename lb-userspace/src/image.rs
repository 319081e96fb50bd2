//! Ids, slots and bytes: the difference between what is in the kernel and what a plan asks for.
//!
//! In: a [`ServicePlan`](crate::plan::ServicePlan), or its absence. Out: [`Write`]s, in the order in which they must be done. Pure.

use lb_common::{
    addr::Addr,
    layout::{Device, Endpoint, Frontend, FrontendKey, NodeAddress, PrefixKey, ServiceName, Settings},
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
