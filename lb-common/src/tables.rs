//! The state that decisions read, as a trait.
//!
//! Implemented by BPF maps in the kernel, by ordered maps in [`crate::memory`] (tests, `explain --manifests`), and by the
//! pinned maps read from outside (`explain` beside a running agent).

use crate::{
    addr::{Addr, Port},
    layout::{Endpoint, Frontend, FrontendKey, NodeAddress},
};

/// Tables that [`crate::decide`] reads.
pub trait Tables {
    /// Whether there may be a frontend at this address and port, or a flow that names one.
    fn may_be_frontend(&self, addr: &Addr, port: Port) -> bool;
    /// Whether there may be an endpoint at this address and port, or a flow that names one.
    fn may_be_endpoint(&self, addr: &Addr, port: Port) -> bool;
    /// The frontend with this very key.
    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend>;
    /// The endpoint id in a slot.
    fn slot(&self, index: u32) -> Option<u32>;
    /// The endpoint with this id.
    fn endpoint(&self, id: u32) -> Option<&Endpoint>;
    /// Flags of an address of this node; 0 for others.
    fn node_address(&self, addr: &Addr) -> NodeAddress;
    /// Whether the local detector takes the source as local. Always false without a detector.
    fn is_local_source(&self, addr: &Addr, device: u32) -> bool;
    /// Whether the source ranges of a Service port hold the address.
    fn in_source_ranges(&self, service: u32, addr: &Addr) -> bool;
    /// Whether the address is in a ServiceCIDR.
    fn in_service_cidr(&self, addr: &Addr) -> bool;
}
