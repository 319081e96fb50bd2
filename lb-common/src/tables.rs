//! The state that decisions read, as a trait.
//!
//! Implemented by BPF maps in the kernel, by ordered maps in [`crate::memory`] (tests, `explain --manifests`), and by the
//! pinned maps read from outside (`explain` beside a running agent).

use crate::{
    addr::{Addr, Port},
    affinity::{Affinity, AffinityKey},
    count::ServiceCounters,
    flow::{Flow, FlowKey, FragmentKey, FragmentPorts},
    layout::{Device, Endpoint, Frontend, FrontendKey, NodeAddress},
    packet::Packet,
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
    /// The endpoint that a client was given last.
    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity>;
    /// The clock of [`Affinity::seen`]; wraps around.
    fn ticks(&self) -> u32;
}

/// What the programs remember, beside the [`Tables`] that they are given.
pub trait State: Tables {
    /// Seconds since some moment; wraps around.
    fn now(&self) -> u32;
    /// The entry with this key, confirmed or not.
    fn flow(&mut self, key: &FlowKey) -> Option<&mut Flow>;
    /// Another look for an entry that [`State::flow`] has just missed: another CPU may have moved it between the two tables.
    fn moved_flow(&mut self, key: &FlowKey) -> Option<&mut Flow>;
    /// Makes an entry that is not confirmed, in place of any that there is. False: the table took none.
    fn insert_flow(&mut self, key: &FlowKey, flow: &Flow) -> bool;
    /// Makes an entry that is not confirmed, unless there is one. False: there is, or the table took none.
    fn claim_flow(&mut self, key: &FlowKey, flow: &Flow) -> bool;
    /// Moves an entry to where a flood of new ones can't evict it.
    fn confirm_flow(&mut self, key: &FlowKey, flow: &Flow);
    /// Forgets an entry.
    fn remove_flow(&mut self, key: &FlowKey);
    /// Remembers which endpoint a client was given, now.
    fn insert_affinity(&mut self, key: &AffinityKey, endpoint_id: u32, generation: u32);
    /// The ports of a fragmented packet whose first fragment was seen.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    /// Remembers the ports of a first fragment.
    fn insert_fragment(&mut self, key: &FragmentKey, ports: &FragmentPorts);
    /// What the agent said about a device.
    fn device(&self, ifindex: u32) -> Option<&Device>;
    /// The bridge to hand a request to: where it entered by a port of that bridge, its endpoint is routed to the same
    /// bridge, and answers won't pass the host's stack. Else 0.
    fn bridge_between(&self, ifindex: u32, endpoint: &Addr) -> u32;
    /// First port and number of ports that masquerading may take.
    fn masquerade_ports(&self) -> (u16, u16);
    /// Whether some connection with [`crate::flow::flow_flags::STRAIGHT`] may be alive.
    fn has_straight_flows(&self) -> bool;
    /// Says that one is, from now on for [`crate::flow::IDLE_TCP`].
    fn note_straight_flow(&mut self);
    /// Whether packets in the middle of an unknown connection are left to the host's stack.
    fn leaves_mid_flow(&self) -> bool;
    /// Whether answers to clients outside are marked (`--reply-mark`), so that connections must remember who is.
    fn marks_replies(&self) -> bool;
    /// Whether TCP connections are reset when their endpoint is gone.
    fn terminates(&self) -> bool;
    /// Lets a copy of the packet enter the host by a device, as if it came once more.
    fn enter_again<P: Packet>(&mut self, packet: &P, device: u32);
    /// Whether one more refusal is within the limit.
    fn may_refuse(&mut self) -> bool;
    /// The counters of a Service port. `None`: nothing is counted.
    fn service_counters(&mut self, service: u32) -> Option<&mut ServiceCounters>;
}
