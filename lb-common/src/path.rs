//! The way of a packet through the hooks: destinations are rewritten on the way in, sources on the way out.
//!
//! [`ingress`] and [`egress`] are what the TC programs run. Between the two the host routes, so every other part of it
//! sees one consistent connection, client to endpoint. The picture and the table of verdicts: `docs/packet-path.md`.

/// Another CPU may move the entry of a connection to the other table, with its first answer, between the two looks of
/// [`State::flow`]: looks once more. Where a miss would make a packet go wrong, or put an entry in the place of one that is there. No
/// function, as the borrow checker refuses what returns one of two borrows of `$state`.
macro_rules! find_flow {
    ($key:expr, $state:expr) => {
        match $state.flow($key) {
            Some(flow) => Some(flow),
            None => $state.moved_flow($key),
        }
    };
}

mod egress;
mod glance;
mod ingress;
mod open;

pub use self::{
    egress::egress,
    ingress::{answers_outside, ingress},
};
use crate::{
    addr::Port,
    decide::Question,
    flow::{CARE_INTERVAL, Flow, FlowKey, FragmentKey, flow_flags, state, tcp_flags},
    layout::protocol,
    packet::Packet,
    parse::{Headers, Part},
    reason::{Reason, Verdict},
    rewrite::settle_sctp,
    tables::State,
};

/// Where a packet is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// ifindex of the device.
    pub device: u32,
    /// Offset of the IP header: 14, or 0 on devices without Ethernet header.
    pub link_header: usize,
    /// Whether the packet is IPv6.
    pub v6: bool,
    /// Whether an earlier hook says that it has translated the packet on its way through this host: a port of a bridge
    /// hands its packets to the bridge, which is a device too. A hint that others may have lost or forged.
    pub translated: bool,
    /// At egress: whether an earlier hook says that it has made the packet what leaves, an answer or a request of a connection of ours, or
    /// an error about one: there is nothing left to do. A hint as well.
    pub finished: bool,
    /// Whether the packet entered by no device: a process of the node sends it.
    pub from_node: bool,
}

/// Memory to work in, of which the stack of a kernel program (512 bytes) has too little. Nothing in it outlives a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    /// The packet's headers.
    pub headers: Headers,
    /// Those that an ICMP error quotes.
    pub quoted: Headers,
    /// What is asked about a new connection.
    pub question: Question,
    /// A flow entry that is being made. Behind a hook its `service` is that of the packet's connection, for
    /// [`crate::count::packet`].
    pub flow: Flow,
}

impl Scratch {
    /// Nothing in it.
    pub const NEW: Self =
        Self { headers: Headers::NONE, quoted: Headers::NONE, question: Question::NONE, flow: Flow::NONE };
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It goes on, changed or not; programs behind us see it.
    Next(Reason),
    /// It ends here.
    Drop(Reason),
    /// It has become its own refusal, and goes back out of the device that it came by.
    Answer(Reason),
    /// It has been changed, and goes to this bridge by `bpf_redirect_neigh`.
    Bridge(u32, Reason),
}

impl Action {
    /// The cause, which is also the counter.
    #[must_use]
    #[inline(always)]
    pub const fn reason(self) -> Reason {
        match self {
            Self::Next(reason) | Self::Drop(reason) | Self::Answer(reason) | Self::Bridge(_, reason) => reason,
        }
    }
}

/// Which hook a fragment was seen at; its addresses differ between the two.
#[derive(Clone, Copy)]
enum At {
    Ingress = 0,
    Egress = 1,
}

const fn fragment_key(headers: &Headers, at: At) -> FragmentKey {
    FragmentKey { src: headers.src, dst: headers.dst, id: headers.id, proto: headers.proto, hook: at as u8, pad: 0 }
}

/// Remembers the ports of a first fragment, or completes a later one. False: its first was never seen. `again`: those of the first are not
/// what they were, and later ones have yet to come as they are.
#[inline(never)]
fn complete_fragment<S: State>(headers: &mut Headers, at: At, again: bool, state: &mut S) -> bool {
    let key = fragment_key(headers, at);
    if matches!(headers.part, Part::First) {
        let ports = crate::flow::FragmentPorts { sport: headers.sport, dport: headers.dport };
        if !again {
            state.insert_fragment(&key, &ports);
        }
        return true;
    }
    let Some(ports) = state.fragment(&key) else { return false };
    (headers.sport, headers.dport) = (ports.sport, ports.dport);
    true
}

/// What becomes of a packet with ports after all changes.
#[inline(always)]
fn settled<P: Packet>(packet: &mut P, headers: &Headers, action: Action) -> Action {
    let translated = action.reason().verdict() == Verdict::Translate;
    if headers.proto == protocol::SCTP && translated && settle_sctp(packet, headers).is_none() {
        return Action::Drop(Reason::Internal);
    }
    action
}

/// Whether a packet must belong to a connection that already exists.
#[inline(always)]
const fn is_mid_flow(headers: &Headers) -> bool {
    headers.proto == protocol::TCP && headers.tcp & (tcp_flags::SYN | tcp_flags::ACK) != tcp_flags::SYN
}

/// Whether a packet at `now` is the first for a while, so that the other entries of its connection want a look.
const fn wants_care(seen: u32, now: u32) -> bool {
    seen / CARE_INTERVAL != now / CARE_INTERVAL
}

/// Keeps the other entries of a connection alive, and restores what was evicted.
#[inline(never)]
fn care<S: State>(key: &FlowKey, now: u32, flow: &mut Flow, state: &mut S) {
    match state.flow(key) {
        Some(entry) => *flow = *entry,
        None => return,
    }
    let flow = core::hint::black_box(flow);
    flow.seen = now;
    keep(&flow.request_key(key.proto), flow, state);
    keep(&flow.forwarded_key(key.proto), flow, state);
    if flow.flags & (flow_flags::STRAIGHT | flow_flags::MASQUERADE) == flow_flags::STRAIGHT {
        state.note_straight_flow();
    }
    keep_port(key.proto, flow, state);
}

/// Keeps the entry of the port of the node that a connection has, if it has one.
#[inline(always)]
fn keep_port<S: State>(proto: u8, flow: &mut Flow, state: &mut S) {
    if flow.node_port.be != 0 && !keep(&flow.masqueraded_key(proto), flow, state) {
        // It was silent, and its port was wanted by another connection: it gets one anew.
        flow.node_port = Port::ZERO;
        note_port(proto, flow, state);
    }
}

/// False: another connection has this key.
#[inline(never)]
fn keep<S: State>(key: &FlowKey, flow: &Flow, state: &mut S) -> bool {
    if let Some(other) = find_flow!(key, state) {
        let is_ours = other.goes_with(flow) && other.client.same(&flow.client);
        if is_ours {
            other.seen = flow.seen;
        }
        return is_ours;
    }
    // Another connection may take it at this moment.
    let is_ours = state.claim_flow(key, flow);
    if is_ours && flow.state & state::REPLIED != 0 {
        state.confirm_flow(key, flow);
    }
    is_ours
}

/// Tells the entries that requests meet which port of the node the connection has.
#[inline(always)]
fn note_port<S: State>(proto: u8, taken: &Flow, state: &mut S) {
    if let Some(flow) = state.flow(&taken.forwarded_key(proto)) {
        (flow.node, flow.node_port) = (taken.node, taken.node_port);
    }
    if let Some(flow) = state.flow(&taken.request_key(proto)) {
        (flow.node, flow.node_port) = (taken.node, taken.node_port);
    }
}

/// Tells all entries of a connection that one side ends it. `also`: what the entry of this key doesn't say yet.
#[inline(never)]
fn close<S: State>(key: &FlowKey, also: u8, flow: &mut Flow, state: &mut S) {
    match state.flow(key) {
        Some(entry) => *flow = *entry,
        None => return,
    }
    let flow = core::hint::black_box(flow);
    flow.state |= also;
    note_closing(&flow.request_key(key.proto), flow, state);
    note_closing(&flow.forwarded_key(key.proto), flow, state);
    if flow.node_port.be != 0 {
        note_closing(&flow.masqueraded_key(key.proto), flow, state);
    }
}

#[inline(never)]
fn note_closing<S: State>(key: &FlowKey, flow: &Flow, state: &mut S) {
    if let Some(other) = state.flow(key)
        && other.goes_with(flow)
    {
        other.state |= flow.state & state::CLOSING;
    }
}

/// Removes all entries of the connection that has this one.
#[inline(never)]
fn forget<S: State>(key: &FlowKey, flow: &mut Flow, state: &mut S) {
    match state.flow(key) {
        Some(entry) => *flow = *entry,
        None => return,
    }
    let flow = core::hint::black_box(flow);
    remove(&flow.request_key(key.proto), flow, state);
    remove(&flow.forwarded_key(key.proto), flow, state);
    if flow.node_port.be != 0 {
        remove(&flow.masqueraded_key(key.proto), flow, state);
    }
}

/// Removes an entry, unless it is another connection's by now.
#[inline(never)]
fn remove<S: State>(key: &FlowKey, flow: &Flow, state: &mut S) {
    if state.flow(key).is_some_and(|other| other.goes_with(flow) && other.client.same(&flow.client)) {
        state.remove_flow(key);
    }
}

/// Moves all entries of a connection that has been answered to the large table.
#[inline(never)]
fn confirm<S: State>(key: &FlowKey, flow: &mut Flow, state: &mut S) {
    match state.flow(key) {
        Some(entry) => *flow = *entry,
        None => return,
    }
    let flow = core::hint::black_box(flow);
    flow.state |= state::REPLIED;
    let mut is_latest = true;
    if let Some(request) = state.flow(&flow.request_key(key.proto)) {
        is_latest = request.goes_with(flow);
        if is_latest {
            flow.state |= request.state;
        }
    }
    // A late answer of a former endpoint must not take the client back to it.
    if is_latest {
        state.confirm_flow(&flow.request_key(key.proto), flow);
    }
    state.confirm_flow(&flow.forwarded_key(key.proto), flow);
    if flow.node_port.be != 0 {
        state.confirm_flow(&flow.masqueraded_key(key.proto), flow);
    }
}

#[cfg(test)]
mod tests;
