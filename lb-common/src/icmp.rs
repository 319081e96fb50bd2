//! ICMP errors about connections of ours: outside and inside, so that path MTU discovery works through a Service.
//!
//! An error quotes the packet that provoked it, as that packet looked where the error was made. On the way in, errors about
//! answers and about masqueraded requests get the addresses that the host knows; on the way out, errors about requests and
//! about masqueraded answers get those that their receivers know.

use crate::{
    addr::{Addr, Port},
    checksum::Difference,
    flow::{Flow, FlowKey, Kind, flow_flags},
    layout::protocol,
    packet::{Covers, Packet},
    parse::{Headers, Part, parse_quoted},
    path::Action,
    reason::Reason,
    rewrite::{Side, write_addr},
    tables::State,
};

/// So many bytes are made readable for an ICMP error: link, IP and ICMP headers, and the quoted packet's headers.
const PULL: usize = 14 + 60 + 8 + 60 + 20;

/// What an ICMP packet is to us.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Type {
    Error,
    Redirect,
    NeighbourDiscovery,
    Other,
}

#[inline(always)]
fn type_of<P: Packet>(packet: &P, headers: &Headers) -> Type {
    let Some(first) = packet.read::<u16>(headers.l4) else { return Type::Other };
    let [kind, _] = first.to_ne_bytes();
    match (headers.proto, headers.v6, kind) {
        // Destination unreachable, time exceeded, parameter problem (RFC 792).
        (protocol::ICMP, false, 3 | 11 | 12) => Type::Error,
        (protocol::ICMP, false, 5) => Type::Redirect,
        // Unreachable, too big, time exceeded, parameter problem (RFC 4443 §2.1).
        (protocol::ICMPV6, true, 1..=4) => Type::Error,
        (protocol::ICMPV6, true, 133..=137) => Type::NeighbourDiscovery,
        _ => Type::Other,
    }
}

/// Whether the packet is an ICMP error or redirect, which is never answered by an error (RFC 1122 §3.2.2).
#[inline(always)]
pub fn is_error<P: Packet>(packet: &P, headers: &Headers) -> bool {
    matches!(type_of(packet, headers), Type::Error | Type::Redirect)
}

/// Whether the packet belongs to IPv6 neighbour discovery (RFC 4861).
#[inline(always)]
pub fn is_neighbour_discovery<P: Packet>(packet: &P, headers: &Headers) -> bool {
    matches!(type_of(packet, headers), Type::NeighbourDiscovery)
}

/// An error on its way in. `None`: not about a connection of ours.
#[inline(never)]
pub fn ingress<P: Packet, S: State>(
    packet: &mut P,
    headers: &Headers,
    quoted: &mut Headers,
    state: &mut S,
) -> Option<Action> {
    let kind = read_quoted(packet, headers, quoted)?;
    let quoted = core::hint::black_box(quoted);
    let answers = FlowKey::new(Kind::Request, quoted.dst, quoted.dport, quoted.src, quoted.sport, quoted.proto);
    let requests = FlowKey::new(Kind::Masqueraded, quoted.src, quoted.sport, quoted.dst, quoted.dport, quoted.proto);
    let change = if let Some(flow) = state.flow(&answers) {
        // The endpoint's answer left as the frontend's; the error goes to the endpoint.
        Change {
            src: flow.endpoint,
            sport: flow.endpoint_port,
            dst: quoted.dst,
            dport: flow.forwarded_port,
            outer: Side::Destination,
            outer_addr: flow.endpoint,
        }
    } else if let Some(flow) = state.flow(&requests)
        && flow.flags & flow_flags::FOREIGN == 0
    {
        // The client's request left as the node's; the error goes to the client.
        Change {
            src: flow.client,
            sport: flow.forwarded_port,
            dst: quoted.dst,
            dport: quoted.dport,
            outer: Side::Destination,
            outer_addr: flow.client,
        }
    } else {
        return None;
    };
    Some(finish(packet, headers, quoted, kind, &change))
}

/// An error on its way out. `None`: not about a connection of ours.
#[inline(never)]
pub fn egress<P: Packet, S: State>(
    packet: &mut P,
    headers: &Headers,
    quoted: &mut Headers,
    state: &mut S,
) -> Option<Action> {
    let kind = read_quoted(packet, headers, quoted)?;
    let quoted = core::hint::black_box(quoted);
    let requests = FlowKey::new(Kind::Forwarded, quoted.src, quoted.sport, quoted.dst, quoted.dport, quoted.proto);
    let answers = FlowKey::new(Kind::Forwarded, quoted.dst, quoted.dport, quoted.src, quoted.sport, quoted.proto);
    let change = if let Some(flow) = state.flow(&requests) {
        about_request(flow, headers, quoted)
    } else if let Some(flow) = state.flow(&answers) {
        if flow.flags & flow_flags::MASQUERADE == 0 || flow.node_port.be == 0 {
            return None;
        }
        // The endpoint knows the client as the node.
        Change {
            src: quoted.src,
            sport: quoted.sport,
            dst: flow.node,
            dport: flow.node_port,
            outer: Side::Source,
            outer_addr: if headers.src.same(&flow.client) { flow.node } else { headers.src },
        }
    } else {
        return None;
    };
    Some(finish(packet, headers, quoted, kind, &change))
}

/// The client knows the endpoint as the frontend.
#[inline(always)]
fn about_request(flow: &Flow, headers: &Headers, quoted: &Headers) -> Change {
    Change {
        src: quoted.src,
        sport: flow.client_port,
        dst: flow.frontend,
        dport: flow.frontend_port,
        outer: Side::Source,
        outer_addr: if headers.src.same(&flow.endpoint) { flow.frontend } else { headers.src },
    }
}

/// What becomes of an error: the quoted packet's ends, and one address of the error itself.
#[derive(Clone, Copy)]
struct Change {
    src: Addr,
    sport: Port,
    dst: Addr,
    dport: Port,
    outer: Side,
    outer_addr: Addr,
}

/// The headers that an error or a redirect quotes.
#[inline(always)]
fn read_quoted<P: Packet>(packet: &mut P, headers: &Headers, quoted: &mut Headers) -> Option<Type> {
    if !matches!(headers.part, Part::Whole) {
        return None;
    }
    let kind = type_of(packet, headers);
    if !matches!(kind, Type::Error | Type::Redirect) {
        return None;
    }
    packet.pull(PULL);
    parse_quoted(packet, headers.l4.wrapping_add(8), headers.v6, quoted)?;
    Some(kind)
}

#[inline(always)]
fn finish<P: Packet>(packet: &mut P, headers: &Headers, quoted: &Headers, kind: Type, change: &Change) -> Action {
    // A host that believed it would go around the hooks that its connection needs.
    if matches!(kind, Type::Redirect) {
        return Action::Drop(Reason::IcmpRedirect);
    }
    match translate(packet, headers, quoted, change) {
        Some(()) => Action::Next(Reason::IcmpError),
        None => Action::Drop(Reason::Internal),
    }
}

/// Writes the change. Every word of the quotation is covered by the ICMP checksum, and so are, in IPv6, the error's own
/// addresses.
#[inline(always)]
fn translate<P: Packet>(packet: &mut P, headers: &Headers, quoted: &Headers, change: &Change) -> Option<()> {
    let ends = Difference::NONE.addr(&quoted.src, &change.src).addr(&quoted.dst, &change.dst);
    let ports = Difference::NONE.port(quoted.sport, change.sport).port(quoted.dport, change.dport);
    let mut covered = ends.and(ports);

    if !quoted.v6 {
        let at = quoted.l3.wrapping_add(10);
        let before = packet.read::<u16>(at)?;
        write_addr(packet, quoted.l3, false, Side::Source, &quoted.src, &change.src)?;
        write_addr(packet, quoted.l3, false, Side::Destination, &quoted.dst, &change.dst)?;
        covered = covered.word16(before, packet.read(at)?);
    } else {
        write_addr(packet, quoted.l3, true, Side::Source, &quoted.src, &change.src)?;
        write_addr(packet, quoted.l3, true, Side::Destination, &quoted.dst, &change.dst)?;
    }
    packet.write(quoted.l4, [change.sport.be, change.dport.be])?;

    // The quoted transport checksum may lie behind the end of the quotation; nobody verifies it, but it should be true.
    let (at, udp) = match quoted.proto {
        protocol::UDP => (quoted.l4.wrapping_add(6), true),
        _ => (quoted.l4.wrapping_add(16), false),
    };
    if matches!(quoted.proto, protocol::UDP | protocol::TCP)
        && let Some(before) = packet.read::<u16>(at)
    {
        let difference = ends.and(ports);
        let after = if udp { difference.apply_udp(before) } else { difference.apply(before) };
        packet.write(at, after)?;
        covered = covered.word16(before, after);
    }

    let old = match change.outer {
        Side::Source => headers.src,
        Side::Destination => headers.dst,
    };
    write_addr(packet, headers.l3, headers.v6, change.outer, &old, &change.outer_addr)?;
    let checksum = headers.l4.wrapping_add(2);
    packet.update_checksum(checksum, covered, Covers::Segment, false)?;
    if headers.v6 {
        let outer = Difference::NONE.addr(&old, &change.outer_addr);
        packet.update_checksum(checksum, outer, Covers::PseudoHeader { v6: true }, false)?;
    }
    Some(())
}
