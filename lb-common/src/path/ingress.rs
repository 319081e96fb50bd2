//! The way in.
#![expect(clippy::wildcard_enum_match_arm, reason = "most reasons end a packet's way alike")]

use super::{
    Action, At, Hook, Scratch, care, close, complete_fragment, confirm,
    glance::may_enter,
    is_mid_flow,
    open::{establish, is_seen_again, open, open_straight},
    settled, wants_care,
};
use crate::{
    addr::Port,
    checksum::Difference,
    decide::{Class, Question, classify, find},
    flow::{Flow, FlowKey, Kind, flow_flags, state, tcp_flags},
    icmp,
    layout::{FrontendKey, protocol},
    packet::{Covers, Packet},
    parse::{Headers, Part, parse},
    reason::Reason,
    refuse::refuse,
    rewrite::{Side, rewrite, rewrite_port},
    tables::State,
};

/// Looks at a packet that enters the host by a device.
#[inline(always)]
pub fn ingress<P: Packet, S: State>(packet: &mut P, hook: &Hook, scratch: &mut Scratch, state: &mut S) -> Action {
    if !may_enter(packet, hook, state) {
        return Action::Next(Reason::NotService);
    }
    let Scratch { headers, quoted, question, flow } = scratch;
    if parse(packet, hook.link_header, hook.v6, headers).is_none() {
        return Action::Next(Reason::Unreadable);
    }
    let headers = core::hint::black_box(headers);
    let whole = matches!(headers.part, Part::Whole);
    let action = if !headers.has_ports() {
        // A bridge shows again what one of its ports has translated, and that looks like an error about a straight connection.
        let error = if hook.translated { None } else { icmp::ingress(packet, headers, quoted, state) };
        // Not within `other`: Linux before 6.7 rounds each frame of a call chain up to 32 bytes, and this is the longest.
        error.unwrap_or_else(|| other(packet, hook, headers, state))
    } else if whole || complete_fragment(headers, At::Ingress, has_entered(hook.translated, hook.device, state), state)
    {
        let action = transport(packet, hook, headers, question, flow, state);
        settled(packet, headers, action)
    } else {
        lost_fragment(headers, state)
    };
    if let Action::Answer(reason) = action { answer(packet, headers, reason, state) } else { action }
}

/// Whether a packet that enters the host is an endpoint's answer to a client outside, and goes straight back to that client: where
/// the host's routes don't know by which device the client came, a mark can tell them.
#[inline(never)]
pub fn answers_outside<P: Packet, S: State>(packet: &P, hook: &Hook, scratch: &mut Scratch, state: &mut S) -> bool {
    let headers = &mut scratch.headers;
    if parse(packet, hook.link_header, hook.v6, headers).is_none() || !headers.has_ports() {
        return false;
    }
    let headers = core::hint::black_box(headers);
    let again = has_entered(hook.translated, hook.device, state);
    if !matches!(headers.part, Part::Whole) && !complete_fragment(headers, At::Ingress, again, state) {
        return false;
    }
    if !state.may_be_endpoint(&headers.src, headers.sport) {
        return false;
    }
    let key = FlowKey::new(Kind::Forwarded, headers.dst, headers.dport, headers.src, headers.sport, headers.proto);
    // Masqueraded connections are answered to the node itself.
    let flags = flow_flags::OUTSIDE | flow_flags::MASQUERADE;
    find_flow!(&key, state).is_some_and(|flow| flow.flags & flags == flow_flags::OUTSIDE)
}

#[inline(always)]
fn transport<P: Packet, S: State>(
    packet: &mut P,
    hook: &Hook,
    headers: &Headers,
    question: &mut Question,
    flow: &mut Flow,
    state: &mut S,
) -> Action {
    // Before anything else: the port may also be a NodePort. What a port of a bridge has made the node's may look like an answer still.
    let (first, ports) = state.masquerade_ports();
    if !has_entered(hook.translated, hook.device, state)
        && (headers.proto == protocol::SCTP || headers.dport.number().wrapping_sub(first) < ports)
        && let Some(action) = masquerade_reply(packet, headers, flow, state)
    {
        return action;
    }
    let may_be_ours = state.may_be_frontend(&headers.dst, headers.dport)
        || state.may_be_frontend(&headers.dst.unspecified(), headers.dport)
        || state.may_be_frontend(&headers.dst, Port::ZERO);
    let may_be_straight = !hook.translated && state.may_be_endpoint(&headers.dst, headers.dport);
    if (may_be_ours || may_be_straight && state.has_straight_flows())
        && let Some(action) = known(packet, hook, headers, flow, state)
    {
        return action;
    }
    let mut action = Action::Next(Reason::NotService);
    if may_be_ours {
        action = open(hook, headers, question, flow, state);
    } else if state.in_service_cidr(&headers.dst) {
        return if is_mid_flow(headers) && state.leaves_mid_flow() {
            Action::Next(Reason::MidFlowForeign)
        } else {
            Action::Drop(Reason::Unallocated)
        };
    }
    if may_be_straight
        && matches!(action.reason(), Reason::NotService)
        && !is_mid_flow(headers)
        && open_straight(hook, headers, flow, state)
    {
        action = Action::Next(Reason::NewFlow);
    }
    match action.reason() {
        Reason::NewFlow | Reason::MidFlow => establish(packet, hook, headers, flow, state),
        _ => action,
    }
}

/// A request of a connection that is known, and stays with its endpoint.
#[inline(always)]
fn known<P: Packet, S: State>(
    packet: &mut P,
    hook: &Hook,
    headers: &Headers,
    scratch: &mut Flow,
    state: &mut S,
) -> Option<Action> {
    let key = FlowKey::new(Kind::Request, headers.src, headers.sport, headers.dst, headers.dport, headers.proto);
    let now = state.now();
    let mut flow = find_flow!(&key, state)?;
    if flow.flags & flow_flags::STRAIGHT != 0 {
        // A bridge shows a request again that one of its ports has translated, and that looks like this.
        if hook.translated || is_seen_again(hook.device, state) {
            return None;
        }
        flow = state.flow(&key)?;
    }
    scratch.service = flow.service;
    if flow.is_idle(headers.proto, now) {
        return None;
    }
    // TCP and SCTP stay with an endpoint that is gone, as kube-proxy's do; only a new connection must not (`pitfalls.md` P1).
    let mut asks_endpoint = headers.proto == protocol::UDP || opens_association(packet, headers);
    let mut closes = false;
    if headers.proto == protocol::TCP {
        if headers.tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN {
            if flow.state & state::CLOSING != 0 {
                return None;
            }
            asks_endpoint = true;
        } else if headers.tcp & (tcp_flags::FIN | tcp_flags::RST) != 0 {
            closes = flow.note(headers.tcp, state::CLIENT_FIN);
        }
    }
    let (addr, port, forwarded, bridge, seen) =
        (flow.endpoint, flow.endpoint_port, flow.forwarded_port, flow.bridge(), flow.seen);
    // The rest is not kept on the stack, which is short.
    (scratch.endpoint_id, scratch.generation, scratch.state) = (flow.endpoint_id, flow.generation, flow.state);
    scratch.flags = flow.flags;
    flow.seen = now;
    if asks_endpoint {
        if !holds(headers, scratch, state) {
            return None;
        }
    } else if headers.proto == protocol::TCP && state.terminates() && is_cut_off(headers, scratch, state) {
        close(&key, state::RESET, scratch, state);
        return Some(terminate(packet, hook, headers, state));
    }
    if closes {
        close(&key, 0, scratch, state);
    }
    if wants_care(seen, now) {
        care(&key, now, scratch, state);
    }
    if forwarded.be != headers.sport.be && rewrite_port(packet, headers, Side::Source, forwarded).is_none() {
        return Some(Action::Drop(Reason::Internal));
    }
    if rewrite(packet, headers, Side::Destination, &addr, port).is_none() {
        return Some(Action::Drop(Reason::Internal));
    }
    Some(if bridge == 0 { Action::Next(Reason::Established) } else { Action::Bridge(bridge, Reason::Established) })
}

/// Whether a packet is the first of an SCTP association: the chunk INIT alone has the verification tag 0 (RFC 9260 §8.5.1).
#[inline(always)]
fn opens_association<P: Packet>(packet: &P, headers: &Headers) -> bool {
    headers.proto == protocol::SCTP && packet.read::<[u16; 2]>(headers.l4.wrapping_add(4)) == Some([0, 0])
}

/// Whether a flow goes on as it is: its endpoint serves, and the packet's destination is the same Service port's still. An
/// external address may have become another's, and an endpoint's a Service's.
#[inline(never)]
fn holds<S: State>(headers: &Headers, flow: &Flow, state: &S) -> bool {
    let frontend = find(&headers.dst, headers.dport, headers.proto, state);
    if flow.flags & flow_flags::STRAIGHT != 0 {
        return frontend.is_none();
    }
    serves(flow, state) && frontend.is_some_and(|frontend| frontend.service == flow.service)
}

/// Whether a TCP connection has lost its endpoint. Where both sides have said that they are done, it may end by itself.
#[inline(never)]
fn is_cut_off<S: State>(headers: &Headers, flow: &Flow, state: &S) -> bool {
    let goes_on = flow.state & state::RESET != 0 || !flow.is_closed();
    let has_frontend = flow.flags & flow_flags::STRAIGHT == 0;
    goes_on && has_frontend && headers.tcp & tcp_flags::RST == 0 && !serves(flow, state)
}

#[inline(always)]
fn serves<S: State>(flow: &Flow, state: &S) -> bool {
    state.endpoint(flow.endpoint_id).is_some_and(|endpoint| endpoint.serves(flow.generation))
}

/// Ends a connection on both sides: a copy of the packet goes on to the endpoint as a reset, itself it is refused.
#[inline(never)]
fn terminate<P: Packet, S: State>(packet: &mut P, hook: &Hook, headers: &Headers, state: &mut S) -> Action {
    if !matches!(headers.part, Part::Later) && set_reset(packet, headers).is_some() {
        state.enter_again(packet, hook.device);
    }
    Action::Answer(Reason::EndpointGone)
}

/// Makes a TCP segment a reset, in the middle of its sequence numbers as they are.
#[inline(always)]
fn set_reset<P: Packet>(packet: &mut P, headers: &Headers) -> Option<()> {
    let at = headers.l4.wrapping_add(12);
    let old = packet.read::<u16>(at)?;
    let new = old | u16::from_ne_bytes([0, tcp_flags::RST]);
    packet.write(at, new)?;
    let difference = Difference::NONE.port(Port { be: old }, Port { be: new });
    packet.update_checksum(headers.l4.wrapping_add(16), difference, Covers::Segment, false)
}

/// An answer to a request that left with the node's address.
#[inline(never)]
fn masquerade_reply<P: Packet, S: State>(
    packet: &mut P,
    headers: &Headers,
    scratch: &mut Flow,
    state: &mut S,
) -> Option<Action> {
    let key = FlowKey::new(Kind::Masqueraded, headers.dst, headers.dport, headers.src, headers.sport, headers.proto);
    let now = state.now();
    let flow = find_flow!(&key, state)?;
    if flow.flags & flow_flags::FOREIGN != 0 {
        flow.seen = now;
        flow.note(headers.tcp, state::ENDPOINT_FIN);
        return None;
    }
    if flow.state & state::CLOSING != 0 && headers.tcp & tcp_flags::SYN != 0 {
        return None;
    }
    let (client, port, replied, seen) = (flow.client, flow.forwarded_port, flow.state & state::REPLIED != 0, flow.seen);
    flow.seen = now;
    if headers.tcp & (tcp_flags::FIN | tcp_flags::RST) != 0 && flow.note(headers.tcp, state::ENDPOINT_FIN) {
        close(&key, 0, scratch, state);
    }
    if !replied {
        confirm(&key, scratch, state);
    } else if wants_care(seen, now) {
        care(&key, now, scratch, state);
    }
    Some(match rewrite(packet, headers, Side::Destination, &client, port) {
        Some(()) => Action::Next(Reason::MasqueradeReply),
        None => Action::Drop(Reason::Internal),
    })
}

/// Whether a port of this device has translated the packet.
#[inline(never)]
fn has_entered<S: State>(translated: bool, device: u32, state: &S) -> bool {
    translated && is_seen_again(device, state)
}

/// A later fragment whose first was never seen: to an address that only Services have it can't be anything else, elsewhere
/// it may be someone's.
#[inline(never)]
fn lost_fragment<S: State>(headers: &Headers, state: &S) -> Action {
    if state.may_be_frontend(&headers.dst, Port::ZERO) && state.frontend(&FrontendKey::any_port(headers.dst)).is_some()
    {
        return Action::Drop(Reason::FragmentWithoutFirst);
    }
    Action::Next(Reason::NotService)
}

/// Protocols without ports, but for ICMP errors about connections of ours: everything that a ClusterIP doesn't have.
#[inline(never)]
fn other<P: Packet, S: State>(packet: &P, hook: &Hook, headers: &Headers, state: &S) -> Action {
    if headers.v6 && headers.proto == protocol::ICMPV6 && icmp::is_neighbour_discovery(packet, headers) {
        return Action::Next(Reason::NotService);
    }
    let question = Question {
        src: headers.src,
        dst: headers.dst,
        dport: Port::ZERO,
        proto: headers.proto,
        from_node: false,
        device: hook.device,
    };
    match classify(&question, state) {
        Class::Reject(reason) => Action::Answer(reason),
        Class::Drop(reason) => Action::Drop(reason),
        Class::Forward(_) | Class::Pass(_) => Action::Next(Reason::NotService),
    }
}

/// Turns a packet that is to be refused into its refusal, within the limit.
#[inline(always)]
fn answer<P: Packet, S: State>(packet: &mut P, headers: &Headers, reason: Reason, state: &mut S) -> Action {
    if icmp::is_error(packet, headers) {
        return Action::Drop(reason);
    }
    if !state.may_refuse() {
        return Action::Drop(Reason::RefusalLimit);
    }
    match refuse(packet, headers) {
        Some(()) => Action::Answer(reason),
        None => Action::Drop(reason),
    }
}
