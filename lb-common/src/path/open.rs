//! The first packet of a connection.

use super::{Action, Hook, forget, is_mid_flow};
use crate::{
    addr::{Addr, Port},
    affinity::AffinityKey,
    decide::{Choice, Decision, Question, decide},
    flow::{Flow, FlowKey, Kind, NO_ID, flow_flags, state},
    hash,
    layout::{device_flags, frontend_flags, protocol},
    packet::Packet,
    parse::{Headers, Part},
    reason::Reason,
    rewrite::{Side, rewrite, rewrite_port},
    tables::State,
};

/// So many other source ports are tried for a second connection between one client end and one endpoint.
const SHIFTS: u32 = 16;

/// Decides where a packet goes that belongs to no known connection.
///
/// [`Action::Next`] for [`Reason::NewFlow`] and [`Reason::MidFlow`]: `flow` is the entry to [`establish`].
/// [`Action::Answer`] is the decision to refuse. The packet is still as it came.
#[inline(never)]
pub(super) fn open<S: State>(
    hook: &Hook,
    headers: &Headers,
    question: &mut Question,
    flow: &mut Flow,
    state: &mut S,
) -> Action {
    *question = Question {
        src: headers.src,
        dst: headers.dst,
        dport: headers.dport,
        proto: headers.proto,
        from_node: false,
        device: hook.device,
    };
    let hash = hash::tuple(&headers.src, headers.sport, &headers.dst, headers.dport);
    // From here on the headers are read anew: what was read for the hash would be kept on the stack, which is short.
    let headers = core::hint::black_box(headers);
    let mid_flow = is_mid_flow(headers);
    let question = core::hint::black_box(question);
    match decide(question, &question.src, hash, state) {
        Decision::Forward(choice) => {
            if matches!(headers.part, Part::Later) {
                return Action::Drop(Reason::FragmentWithoutFirst);
            }
            if mid_flow && (choice.flags & frontend_flags::NODE_PORT != 0 || state.leaves_mid_flow()) {
                return Action::Next(Reason::MidFlowForeign);
            }
            make(flow, headers, &choice, state.now());
            if state.marks_replies() && !state.is_local_source(&flow.client, hook.device) {
                flow.flags |= flow_flags::OUTSIDE;
            }
            Action::Next(if mid_flow { Reason::MidFlow } else { Reason::NewFlow })
        }
        // Rules of kube-proxy judge only the first packet of a connection.
        Decision::Reject(_) | Decision::Drop(_) if mid_flow && state.leaves_mid_flow() => {
            Action::Next(Reason::MidFlowForeign)
        }
        // A reset would kill what kube-proxy lets drain.
        Decision::Reject(_) if mid_flow => Action::Drop(Reason::MidFlowNoEndpoints),
        Decision::Reject(reason) => Action::Answer(reason),
        Decision::Drop(reason) => Action::Drop(reason),
        Decision::Pass(reason) => Action::Next(reason),
    }
}

/// Whether the packet answers one that the node sent from a port that is also a NodePort.
#[inline(never)]
fn is_foreign<S: State>(headers: &Headers, state: &mut S) -> bool {
    let key = FlowKey::new(Kind::Foreign, headers.dst, headers.dport, headers.src, headers.sport, headers.proto);
    let now = state.now();
    headers.proto != protocol::TCP && state.flow(&key).is_some_and(|flow| !flow.is_idle(headers.proto, now))
}

/// The entry of a new connection.
#[inline(always)]
fn make(flow: &mut Flow, headers: &Headers, choice: &Choice, now: u32) {
    let Choice { id, endpoint, service, masquerade, affinity, .. } = choice;
    *flow = Flow {
        client: headers.src,
        frontend: headers.dst,
        endpoint: endpoint.addr,
        node: Addr::UNSPECIFIED_V6,
        client_port: headers.sport,
        frontend_port: headers.dport,
        endpoint_port: endpoint.port,
        forwarded_port: headers.sport,
        node_port: Port::ZERO,
        state: 0,
        flags: if *masquerade { flow_flags::MASQUERADE } else { 0 }
            | if choice.flags & frontend_flags::NODE_PORT != 0 { flow_flags::NODE_PORT } else { 0 }
            | if *affinity { flow_flags::AFFINITY } else { 0 },
        endpoint_id: *id,
        generation: endpoint.generation,
        service: *service,
        seen: now,
        device: 0,
    };
    if headers.proto == protocol::TCP {
        flow.note(headers.tcp, state::CLIENT_FIN);
    }
}

/// A client speaks to an endpoint without a frontend, from a port by which it may have a connection through one. Where that one is
/// alive, this one needs another port, as netfilter would give it: `flow` is its entry to [`establish`]. Where it is over, nothing is
/// left of it, and answers keep the endpoint's address.
///
/// The packet opens a connection, if there is such a thing in its protocol, and belongs to none that is known.
#[inline(never)]
pub(super) fn open_straight<S: State>(hook: &Hook, headers: &Headers, flow: &mut Flow, state: &mut S) -> bool {
    let now = state.now();
    let seen_again = is_seen_again(hook.device, state);
    if !seen_again && state.has_straight_flows() {
        // What it may have been before is over.
        let key = FlowKey::new(Kind::Request, headers.src, headers.sport, headers.dst, headers.dport, headers.proto);
        let known = state.flow(&key).filter(|known| known.flags & flow_flags::STRAIGHT != 0);
        if let Some(forwarded) = known.map(|known| known.forwarded_key(headers.proto)) {
            state.remove_flow(&key);
            state.remove_flow(&forwarded);
        }
    }
    let key = FlowKey::new(Kind::Forwarded, headers.src, headers.sport, headers.dst, headers.dport, headers.proto);
    let Some(other) = find_flow!(&key, state) else { return false };
    if other.is_idle(headers.proto, now) || other.is_closed() {
        forget(&key, flow, state);
        return false;
    }
    if seen_again || matches!(headers.part, Part::Later) {
        return false;
    }
    make_straight(flow, headers, now);
    true
}

/// Whether a packet has entered the host by another device before: a bridge shows what came by its ports, where it may have been
/// translated, and [`Hook::translated`] may be lost on the way.
#[inline(never)]
pub(super) fn is_seen_again<S: State>(device: u32, state: &S) -> bool {
    state.device(device).is_some_and(|device| device.flags & device_flags::HAS_PORTS != 0)
}

/// The entry of a connection that has no frontend.
#[inline(always)]
pub(super) fn make_straight(flow: &mut Flow, headers: &Headers, now: u32) {
    *flow = Flow {
        client: headers.src,
        frontend: headers.dst,
        endpoint: headers.dst,
        client_port: headers.sport,
        frontend_port: headers.dport,
        endpoint_port: headers.dport,
        forwarded_port: headers.sport,
        flags: flow_flags::STRAIGHT,
        endpoint_id: NO_ID,
        service: NO_ID,
        seen: now,
        ..Flow::NONE
    };
}

/// Remembers a new connection and sends its first packet to the endpoint. What answers a packet of the node itself is
/// none, and passes.
#[inline(never)]
pub(super) fn establish<P: Packet, S: State>(
    packet: &mut P,
    hook: &Hook,
    headers: &Headers,
    flow: &mut Flow,
    state: &mut S,
) -> Action {
    if flow.flags & flow_flags::NODE_PORT != 0 && is_foreign(headers, state) {
        return Action::Next(Reason::MidFlowForeign);
    }
    if flow.flags & flow_flags::MASQUERADE == 0 {
        flow.device = state.bridge_between(hook.device, &flow.endpoint);
    }
    if flow.flags & flow_flags::STRAIGHT != 0 {
        state.note_straight_flow();
    }
    if !remember(flow, headers.proto, state) {
        return Action::Drop(Reason::FlowTableFull);
    }
    if flow.flags & flow_flags::AFFINITY != 0 && !is_mid_flow(headers) {
        note_client(flow, state);
    }
    let shifted = flow.forwarded_port.be == headers.sport.be
        || rewrite_port(packet, headers, Side::Source, flow.forwarded_port).is_some();
    if !shifted || rewrite(packet, headers, Side::Destination, &flow.endpoint, flow.endpoint_port).is_none() {
        return Action::Drop(Reason::Internal);
    }
    let reason = if is_mid_flow(headers) { Reason::MidFlow } else { Reason::NewFlow };
    match flow.bridge() {
        0 => Action::Next(reason),
        bridge => Action::Bridge(bridge, reason),
    }
}

/// Keeps in mind which endpoint the client has.
#[inline(never)]
fn note_client<S: State>(flow: &Flow, state: &mut S) {
    let key = AffinityKey { client: flow.client, service: flow.service };
    state.insert_affinity(&key, flow.endpoint_id, flow.generation);
}

/// Makes the entries of a connection, from another source port where the client's is taken: a live connection of the same
/// client end to the same endpoint, through another frontend or straight, has the same answers.
#[inline(never)]
fn remember<S: State>(flow: &mut Flow, proto: u8, state: &mut S) -> bool {
    let mut attempt = 0;
    while is_taken(flow, proto, state) {
        if attempt == SHIFTS {
            return false;
        }
        let seed = hash::tuple(&flow.client, flow.client_port, &flow.frontend, flow.frontend_port);
        flow.forwarded_port = Port::new(1024 | (seed.wrapping_add(attempt.wrapping_mul(0x9e37)) >> 3) as u16);
        attempt += 1;
    }
    state.insert_flow(&flow.forwarded_key(proto), flow) && state.insert_flow(&flow.request_key(proto), flow)
}

/// Whether another live connection has the answers that this one would get.
#[inline(always)]
fn is_taken<S: State>(flow: &Flow, proto: u8, state: &mut S) -> bool {
    let now = flow.seen;
    let key = flow.forwarded_key(proto);
    find_flow!(&key, state).is_some_and(|other| {
        let same = other.frontend.same(&flow.frontend)
            && other.frontend_port.be == flow.frontend_port.be
            && other.client_port.be == flow.client_port.be;
        !same && !other.is_idle(proto, now) && !other.is_closed()
    })
}
