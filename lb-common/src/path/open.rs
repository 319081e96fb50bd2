//! The first packet of a connection.

use super::{Action, Hook, is_mid_flow};
use crate::{
    addr::{Addr, Port},
    affinity::AffinityKey,
    decide::{Choice, Decision, Question, decide},
    flow::{Flow, FlowKey, Kind, flow_flags, state},
    hash,
    layout::{frontend_flags, protocol},
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
        bridge: 0,
    };
    if headers.proto == protocol::TCP {
        flow.note(headers.tcp, state::CLIENT_FIN);
    }
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
        flow.bridge = state.bridge_between(hook.device, &flow.endpoint);
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
    if flow.bridge == 0 { Action::Next(reason) } else { Action::Bridge(flow.bridge, reason) }
}

/// Keeps in mind which endpoint the client has.
#[inline(never)]
fn note_client<S: State>(flow: &Flow, state: &mut S) {
    let key = AffinityKey { client: flow.client, service: flow.service };
    state.insert_affinity(&key, flow.endpoint_id, flow.generation);
}

/// Makes the entries of a connection, from another source port where the client's is taken: a live connection of the same
/// client end to the same endpoint through another frontend has the same answers.
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
    state.flow(&flow.forwarded_key(proto)).is_some_and(|other| {
        let same = other.frontend.same(&flow.frontend)
            && other.frontend_port.be == flow.frontend_port.be
            && other.client_port.be == flow.client_port.be;
        !same && !other.is_idle(proto, now) && other.state & state::CLOSING == 0
    })
}
