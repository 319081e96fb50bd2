//! The way out.

use super::{
    Action, At, Hook, Scratch, care, close, complete_fragment, confirm, forget, glance::may_leave, is_mid_flow, keep,
    keep_port, note_closing, note_port, open::make_straight, settled, wants_care,
};
use crate::{
    addr::{Addr, Port},
    decide::{Class, Question, classify},
    flow::{Flow, FlowKey, Kind, flow_flags, state, tcp_flags},
    hash, icmp,
    layout::{node_flags, protocol},
    packet::Packet,
    parse::{Headers, Part, parse},
    reason::Reason,
    rewrite::{Side, rewrite, rewrite_port},
    tables::State,
};

/// So many ports are tried for a masqueraded connection before one is taken that its holder may lend.
const PROBES: u32 = 32;
/// So many after that: two CPUs may want the same one, and only one gets it.
const MORE: u32 = 8;

/// Looks at a packet that leaves the host by a device.
#[inline(always)]
pub fn egress<P: Packet, S: State>(packet: &mut P, hook: &Hook, scratch: &mut Scratch, state: &mut S) -> Action {
    if !may_leave(packet, hook, state) {
        return Action::Next(Reason::NotService);
    }
    let Scratch { headers, quoted, question, flow } = scratch;
    if parse(packet, hook.link_header, hook.v6, headers).is_none() {
        return Action::Next(Reason::Unreadable);
    }
    let headers = core::hint::black_box(headers);
    if !headers.has_ports() {
        return match icmp::egress(packet, headers, quoted, state) {
            Some(action) => action,
            None if hook.from_node => other(packet, headers, question, state),
            None => Action::Next(Reason::NotService),
        };
    }
    if !matches!(headers.part, Part::Whole) && !complete_fragment(headers, At::Egress, false, state) {
        return Action::Next(Reason::NotService);
    }
    if hook.from_node
        && let Some(reason) = dropped(headers, question, state)
    {
        return Action::Drop(reason);
    }
    let action = transport(packet, hook, headers, flow, state);
    settled(packet, headers, action)
}

/// Why a packet of the node itself that no socket hook has translated must not get out, if so. What else it may be is the
/// host's.
#[inline(never)]
fn dropped<S: State>(headers: &Headers, question: &mut Question, state: &S) -> Option<Reason> {
    let opens = headers.proto != protocol::TCP || headers.tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
    if !opens || !(state.may_be_frontend(&headers.dst, headers.dport) || state.in_service_cidr(&headers.dst)) {
        return None;
    }
    *question = Question {
        src: headers.src,
        dst: headers.dst,
        dport: headers.dport,
        proto: headers.proto,
        from_node: true,
        device: 0,
    };
    match classify(core::hint::black_box(question), state) {
        Class::Drop(reason) => Some(reason),
        Class::Forward(_) | Class::Reject(_) | Class::Pass(_) => None,
    }
}

/// Protocols without ports that the node itself sends to a ClusterIP, or to an address that no Service has: they must not get out.
#[inline(never)]
fn other<P: Packet, S: State>(packet: &P, headers: &Headers, question: &mut Question, state: &S) -> Action {
    let may_be_ours = state.may_be_frontend(&headers.dst, Port::ZERO) || state.in_service_cidr(&headers.dst);
    if !may_be_ours || headers.proto == protocol::ICMPV6 && icmp::is_neighbour_discovery(packet, headers) {
        return Action::Next(Reason::NotService);
    }
    *question = Question {
        src: headers.src,
        dst: headers.dst,
        dport: Port::ZERO,
        proto: headers.proto,
        from_node: true,
        device: 0,
    };
    match classify(core::hint::black_box(question), state) {
        Class::Reject(reason) | Class::Drop(reason) => Action::Drop(reason),
        Class::Forward(_) | Class::Pass(_) => Action::Next(Reason::NotService),
    }
}

#[inline(always)]
fn transport<P: Packet, S: State>(
    packet: &mut P,
    hook: &Hook,
    headers: &Headers,
    flow: &mut Flow,
    state: &mut S,
) -> Action {
    if state.may_be_endpoint(&headers.src, headers.sport)
        && let Some(action) = reply(packet, headers, flow, state)
    {
        return action;
    }
    if state.may_be_endpoint(&headers.dst, headers.dport) {
        note_in_use(hook.device, headers, flow, state);
        if let Some(action) = request(packet, hook, headers, flow, state) {
            return action;
        }
    }
    if headers.proto == protocol::UDP && state.may_be_frontend(&headers.src.unspecified(), headers.sport) {
        note_foreign(headers, flow, state);
    }
    Action::Next(Reason::NotService)
}

/// Whether a packet needn't be looked for once more (`find_flow`), as most are that endpoints and their clients send each other straight.
/// None of TCP's passes while another of its connection is the first answer, but for a SYN that is sent again, the data of Fast Open, and
/// connections whose middle was seen first.
#[inline(always)]
const fn is_segment(headers: &Headers) -> bool {
    headers.proto == protocol::TCP && headers.tcp & tcp_flags::SYN == 0
}

/// An answer of an endpoint: its source becomes the frontend again.
#[inline(always)]
fn reply<P: Packet, S: State>(packet: &mut P, headers: &Headers, scratch: &mut Flow, state: &mut S) -> Option<Action> {
    let key = FlowKey::new(Kind::Forwarded, headers.dst, headers.dport, headers.src, headers.sport, headers.proto);
    let now = state.now();
    let flow = match state.flow(&key) {
        Some(flow) => flow,
        None if is_segment(headers) => return None,
        None => state.moved_flow(&key)?,
    };
    scratch.service = flow.service;
    // A new connection straight to the endpoint may reuse the ports of a closed one through a frontend. Where its request had
    // entered by a device of the host, nothing would be left of the other.
    if headers.tcp & tcp_flags::SYN != 0 && flow.is_closed() {
        flow.state |= state::OUTLIVED;
    }
    if flow.state & state::OUTLIVED != 0 {
        return None;
    }
    let (frontend, port, client_port, replied, seen) =
        (flow.frontend, flow.frontend_port, flow.client_port, flow.state & state::REPLIED != 0, flow.seen);
    if seen != now {
        flow.seen = now;
    }
    let closes = headers.tcp & (tcp_flags::FIN | tcp_flags::RST) != 0 && flow.note(headers.tcp, state::ENDPOINT_FIN);
    if closes {
        close(&key, 0, scratch, state);
    }
    if !replied {
        confirm(&key, scratch, state);
    } else if wants_care(seen, now) {
        care(&key, now, scratch, state);
    }
    let shifted =
        client_port.be == headers.dport.be || rewrite_port(packet, headers, Side::Destination, client_port).is_some();
    Some(if shifted && rewrite(packet, headers, Side::Source, &frontend, port).is_some() {
        Action::Next(Reason::Reply)
    } else {
        Action::Drop(Reason::Internal)
    })
}

/// A request on its way to an endpoint: its source becomes the node's if it must.
#[inline(always)]
fn request<P: Packet, S: State>(
    packet: &mut P,
    hook: &Hook,
    headers: &Headers,
    taken: &mut Flow,
    state: &mut S,
) -> Option<Action> {
    let key = FlowKey::new(Kind::Forwarded, headers.src, headers.sport, headers.dst, headers.dport, headers.proto);
    let flow = match state.flow(&key) {
        Some(flow) => flow,
        None if is_segment(headers) => return None,
        None => state.moved_flow(&key)?,
    };
    if flow.flags & flow_flags::MASQUERADE == 0 {
        return None;
    }
    // The connection that has had the port for longer looks the same once it is masqueraded.
    if flow.flags & flow_flags::STRAIGHT != 0 && flow.device != hook.device {
        return None;
    }
    let (mut node, mut port) = (flow.node, flow.node_port);
    // The entry of a closed connection must not lend its port to a new one.
    let again = flow.state & state::CLOSING != 0
        && headers.tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
        && headers.proto == protocol::TCP;
    if port.be == 0 || again {
        if let Err(reason) = take_port(&key, hook.device, taken, state) {
            return Some(Action::Drop(reason));
        }
        (node, port) = (taken.node, taken.node_port);
    }
    Some(match rewrite(packet, headers, Side::Source, &node, port) {
        Some(()) => Action::Next(Reason::Masqueraded),
        None => Action::Drop(Reason::Internal),
    })
}

/// Takes a port of the node for a connection, and notes it in the entries. `flow` becomes the entry with it.
#[inline(never)]
fn take_port<S: State>(key: &FlowKey, device: u32, flow: &mut Flow, state: &mut S) -> Result<(), Reason> {
    match state.flow(key) {
        Some(entry) => *flow = *entry,
        None => return Err(Reason::Internal),
    }
    let v4 = flow.client.is_v4();
    let node = match state.device(device) {
        Some(device) if v4 => device.masquerade_v4,
        Some(device) => device.masquerade_v6,
        None => Addr::UNSPECIFIED_V6,
    };
    if node.same(&node.unspecified()) || node.is_v4() != v4 {
        return Err(Reason::NoMasqueradeAddress);
    }
    let seed = hash::tuple(&flow.client, flow.forwarded_port, &flow.endpoint, flow.endpoint_port);
    (flow.node, flow.node_port, flow.device) = (node, Port::ZERO, device);
    // An odd step visits every port of a range of a power of two, and two that start alike part at once.
    let step = seed >> 16 | 1;
    let mut probe = 0;
    while probe < PROBES + MORE {
        // The best port so far is kept where the verifier forgets its value, or it would follow every combination.
        let flow = core::hint::black_box(&mut *flow);
        // As netfilter does: peers of SCTP that expect a fixed port are common.
        let port = if probe == 0 && key.proto == protocol::SCTP {
            flow.forwarded_port
        } else {
            port_at(seed.wrapping_add(probe.wrapping_mul(step)), state)
        };
        let is_free = is_free(flow, port, key.proto, state);
        if is_free {
            flow.node_port = port;
        }
        probe += 1;
        let lends = probe >= PROBES && flow.node_port.be != 0;
        if is_free || lends {
            flow.seen = state.now();
            if take(flow, key.proto, state) {
                note_port(key.proto, flow, state);
                return Ok(());
            }
            flow.node_port = Port::ZERO;
        }
    }
    Err(Reason::NoMasqueradePort)
}

/// Makes the entry of a masqueraded tuple, in place of one that may go. False: another CPU was first.
///
/// Of several CPUs that want the place of one entry, the table itself lets one have a turn.
#[inline(never)]
fn take<S: State>(flow: &Flow, proto: u8, state: &mut S) -> bool {
    let mut key = flow.masqueraded_key(proto);
    if find_flow!(&key, state).is_none() {
        return state.claim_flow(&key, flow);
    }
    key.kind = Kind::Turn as u8;
    if !state.claim_flow(&key, flow) {
        return false;
    }
    key.kind = Kind::Masqueraded as u8;
    // Who had a turn before may have it by now.
    let may_go = find_flow!(&key, state).is_none_or(|holder| goes_for(holder, flow, proto));
    if may_go {
        state.remove_flow(&key);
    }
    let taken = may_go && state.claim_flow(&key, flow);
    key.kind = Kind::Turn as u8;
    state.remove_flow(&key);
    taken
}

/// Whether the holder of a masqueraded tuple goes where `flow` wants it.
#[inline(always)]
fn goes_for(holder: &Flow, flow: &Flow, proto: u8) -> bool {
    holder.is_idle(proto, flow.seen) || holder.lends_port(proto, flow.seen) || is_own(holder, flow)
}

/// Whether the client's end of both is the same.
#[inline(always)]
fn is_own(holder: &Flow, flow: &Flow) -> bool {
    holder.client.same(&flow.client) && holder.forwarded_port.be == flow.forwarded_port.be
}

#[inline(always)]
fn port_at<S: State>(number: u32, state: &S) -> Port {
    let (first, ports) = state.masquerade_ports();
    Port::new(first.wrapping_add(number.checked_rem(u32::from(ports)).unwrap_or(0) as u16))
}

/// Whether nobody has a masqueraded tuple, or who asks for it, or a connection that is over. Where somebody has who may lend it, and was silent for longer than those
/// before, its port and when it was seen are noted in `flow`.
///
/// A tuple is left alone for a while after its connection ended, as TIME_WAIT asks, but given away before a new connection fails
/// (a new SYN may follow it, RFC 9293 §3.6.1).
#[inline(never)]
fn is_free<S: State>(flow: &mut Flow, port: Port, proto: u8, state: &mut S) -> bool {
    let key = FlowKey::new(Kind::Masqueraded, flow.node, port, flow.endpoint, flow.endpoint_port, proto);
    let now = state.now();
    let Some(holder) = state.flow(&key) else { return true };
    if holder.is_idle(proto, now) || is_own(holder, flow) {
        return true;
    }
    let is_first = flow.node_port.be == 0;
    if holder.lends_port(proto, now) && (is_first || holder.seen.wrapping_sub(flow.seen).cast_signed() < 0) {
        (flow.node_port, flow.seen) = (port, holder.seen);
    }
    false
}

/// A packet to an endpoint that leaves from a port of ours and is none of ours: of a process that asked for this port, or
/// masqueraded by netfilter, which respects no reservation. No connection of ours may take the same port to the same endpoint.
/// Where one has it, this one needs another: it gets entries of a connection straight to the endpoint that is masqueraded, and whose
/// client is the node.
///
/// What ours have sent looks the same at a second device on its way out (the port of a bridge, what is below a macvlan), so only the
/// device by which they leave can tell.
#[inline(never)]
fn note_in_use<S: State>(device: u32, headers: &Headers, flow: &mut Flow, state: &mut S) {
    let (first, ports) = state.masquerade_ports();
    let may_be_taken = headers.proto == protocol::SCTP || headers.sport.number().wrapping_sub(first) < ports;
    if !may_be_taken || state.node_address(&headers.src) & node_flags::LOCAL == 0 {
        return;
    }
    let (now, opens) = (state.now(), !is_mid_flow(headers));
    let mut key = FlowKey::new(Kind::Request, headers.src, headers.sport, headers.dst, headers.dport, headers.proto);
    if let Some(known) = state.flow(&key)
        && known.flags & flow_flags::STRAIGHT != 0
    {
        if known.device != device {
            return;
        }
        let is_over = known.is_idle(headers.proto, now) || known.state & state::CLOSING != 0;
        if !opens || !is_over {
            known.seen = now;
            known.note(headers.tcp, state::CLIENT_FIN);
            *flow = *known;
            tend(headers.proto, flow, state);
            return;
        }
        forget(&key, flow, state);
    }
    key.kind = Kind::Masqueraded as u8;
    if let Some(holder) = find_flow!(&key, state) {
        if holder.flags & flow_flags::FOREIGN != 0 {
            holder.seen = now;
            if opens {
                holder.state = state::REPLIED;
            }
            holder.note(headers.tcp, state::CLIENT_FIN);
            return;
        }
        if !opens || holder.device != device {
            return;
        }
        if !holder.is_idle(headers.proto, now) && !holder.is_closed() {
            make_straight(flow, headers, now);
            flow.flags |= flow_flags::MASQUERADE;
            flow.device = device;
            let _ = state.insert_flow(&flow.forwarded_key(headers.proto), flow)
                && state.insert_flow(&flow.request_key(headers.proto), flow);
            return;
        }
    }
    // Who answers is not seen before the tuple is wanted: it counts as established until a side ends it.
    *flow = Flow { flags: flow_flags::FOREIGN, state: state::REPLIED, seen: now, ..Flow::NONE };
    state.insert_flow(&key, flow);
}

/// Keeps the other entries of a connection that no way in looks after.
#[inline(never)]
fn tend<S: State>(proto: u8, flow: &mut Flow, state: &mut S) {
    keep(&flow.forwarded_key(proto), flow, state);
    note_closing(&flow.masqueraded_key(proto), flow, state);
    keep_port(proto, flow, state);
}

/// A packet of the node itself from a port that is also a NodePort: the answer will not be a request.
#[inline(never)]
fn note_foreign<S: State>(headers: &Headers, flow: &mut Flow, state: &mut S) {
    if state.node_address(&headers.src) & node_flags::NODE_PORTS == 0 {
        return;
    }
    let key = FlowKey::new(Kind::Foreign, headers.src, headers.sport, headers.dst, headers.dport, headers.proto);
    let now = state.now();
    if let Some(flow) = state.flow(&key) {
        flow.seen = now;
        return;
    }
    *flow = Flow { client: headers.src, endpoint: headers.dst, seen: now, ..Flow::NONE };
    state.insert_flow(&key, flow);
}
