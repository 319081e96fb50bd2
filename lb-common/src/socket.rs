//! What sockets of the node itself have been told: the pairs by which answers become the frontend's again.

use crate::{
    addr::{Addr, Port},
    affinity::{AffinityKey, node_client},
    count,
    decide::{Choice, Decision, Question, decide, find},
    layout::{Frontend, frontend_flags},
    reason::Reason,
    tables::{State, Tables},
};

/// How many frontends an unconnected socket can talk to at once before the oldest pair is overwritten.
pub const PAIRS: usize = 16;

/// A frontend that a socket talks to, and the endpoint that stands for it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    /// What the process said.
    pub frontend: Addr,
    /// Where its packets go.
    pub endpoint: Addr,
    /// What the process said.
    pub frontend_port: Port,
    /// Where its packets go.
    pub endpoint_port: Port,
    /// Id of the endpoint.
    pub endpoint_id: u32,
    /// Generation of that id.
    pub generation: u32,
    /// When it was used last, by the count of the socket's [`Pairs::uses`]; 0: never.
    pub used: u32,
}

impl Pair {
    /// Nobody is talked to.
    pub const NONE: Self = Self {
        frontend: Addr::UNSPECIFIED_V6,
        endpoint: Addr::UNSPECIFIED_V6,
        frontend_port: Port::ZERO,
        endpoint_port: Port::ZERO,
        endpoint_id: 0,
        generation: 0,
        used: 0,
    };
}

/// The storage of one socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pairs {
    /// The pairs; which is next to be overwritten is `next`.
    pub pairs: [Pair; PAIRS],
    /// Counts up with every use of any.
    pub uses: u32,
    /// Counts up with every new pair.
    pub next: u32,
}

/// Where a socket wants to send to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// The address.
    pub addr: Addr,
    /// The port.
    pub port: Port,
    /// IP protocol number.
    pub proto: u8,
}

/// Whether a frontend may be meant: asked before the socket gets storage. `is_node`: the socket is in the node's own network
/// namespace; localhost is another in every other.
#[inline(always)]
pub fn may_be_translated<T: Tables>(ends: &Ends, is_node: bool, tables: &T) -> bool {
    if !is_node && ends.addr.is_loopback() {
        return false;
    }
    tables.may_be_frontend(&ends.addr, ends.port)
        || tables.may_be_frontend(&ends.addr.unspecified(), ends.port)
        || tables.may_be_frontend(&ends.addr, Port::ZERO)
        || tables.in_service_cidr(&ends.addr)
}

/// Whether it depends on a client's address where its connections go.
#[inline(always)]
const fn asks_for_source(frontend: &Frontend) -> bool {
    frontend.affinity != 0 || frontend.flags & (frontend_flags::SOURCE_RANGES | frontend_flags::EXTERNAL_LOCAL) != 0
}

/// Where a socket sends to instead of a frontend: `ends` become the endpoint where the reason's verdict is
/// [`Verdict::Translate`](crate::reason::Verdict::Translate); a refusal is ECONNREFUSED.
///
/// `connects`: every connect chooses anew by `hash`. A datagram of an unconnected socket stays with the endpoint of the last
/// one to that frontend, as long as it serves. `bound` is the address that the socket is bound to, or unspecified. `is_node`: the
/// socket is in the node's own network namespace; what depends on the address of one elsewhere is left to its packets.
#[inline(always)]
pub fn translate<S: State>(
    ends: &mut Ends,
    bound: &Addr,
    is_node: bool,
    hash: u32,
    connects: bool,
    pairs: &mut Pairs,
    tables: &mut S,
) -> Reason {
    if !connects && let Some((addr, port)) = remembered(ends, pairs, tables) {
        (ends.addr, ends.port) = (addr, port);
        return Reason::Established;
    }
    if !is_node && find(&ends.addr, ends.port, ends.proto, tables).is_some_and(asks_for_source) {
        return Reason::LeftToPackets;
    }
    let client = node_client(&ends.addr);
    let src = if bound.same(&bound.unspecified()) { client } else { *bound };
    let question = Question { src, dst: ends.addr, dport: ends.port, proto: ends.proto, from_node: true, device: 0 };
    match decide(&question, &client, hash, tables) {
        Decision::Forward(choice) => {
            if choice.affinity {
                note_client(&client, &choice, tables);
            }
            let pair = Pair {
                frontend: ends.addr,
                endpoint: choice.endpoint.addr,
                frontend_port: ends.port,
                endpoint_port: choice.endpoint.port,
                endpoint_id: choice.id,
                generation: choice.endpoint.generation,
                used: 0,
            };
            remember(pair, pairs);
            count::connection(choice.service, tables);
            (ends.addr, ends.port) = (choice.endpoint.addr, choice.endpoint.port);
            Reason::NewFlow
        }
        Decision::Reject(reason) | Decision::Drop(reason) | Decision::Pass(reason) => reason,
    }
}

#[inline(never)]
fn note_client<S: State>(client: &Addr, choice: &Choice, state: &mut S) {
    let key = AffinityKey { client: *client, service: choice.service };
    state.insert_affinity(&key, choice.id, choice.endpoint.generation);
}

#[inline(always)]
fn remembered<T: Tables>(ends: &Ends, pairs: &mut Pairs, tables: &T) -> Option<(Addr, Port)> {
    // No two pairs have one frontend.
    let mut i = 0;
    while i < PAIRS {
        let pair = &pairs.pairs[i];
        if pair.used != 0 && pair.frontend_port.be == ends.port.be && pair.frontend.same(&ends.addr) {
            break;
        }
        i += 1;
    }
    let pair = pairs.pairs.get_mut(core::hint::black_box(i))?;
    if !holds(pair, ends.proto, tables) {
        return None;
    }
    pairs.uses = pairs.uses.wrapping_add(1);
    pair.used = pairs.uses;
    Some((pair.endpoint, pair.endpoint_port))
}

/// Whether what a socket was told is still so: the endpoint serves, and the frontend is that of its Service port. An external
/// address may have become another's.
#[must_use]
#[inline(never)]
pub fn holds<T: Tables>(pair: &Pair, proto: u8, tables: &T) -> bool {
    let Some(endpoint) = tables.endpoint(pair.endpoint_id) else { return false };
    endpoint.serves(pair.generation)
        && find(&pair.frontend, pair.frontend_port, proto, tables)
            .is_some_and(|frontend| frontend.service == endpoint.service)
}

/// Takes the place of the same frontend, else of the oldest pair.
#[inline(always)]
fn remember(pair: Pair, pairs: &mut Pairs) {
    pairs.uses = pairs.uses.wrapping_add(1);
    let pair = Pair { used: pairs.uses, ..pair };
    let mut i = 0;
    while i < PAIRS {
        let old = &mut pairs.pairs[i];
        if old.used != 0 && old.frontend_port.be == pair.frontend_port.be && old.frontend.same(&pair.frontend) {
            *old = pair;
            return;
        }
        i += 1;
    }
    if let Some(oldest) = pairs.pairs.get_mut(pairs.next as usize & (PAIRS - 1)) {
        *oldest = pair;
    }
    pairs.next = pairs.next.wrapping_add(1);
}

/// The frontend that an endpoint stands for, to this socket: where two have the same endpoint, the one used last.
#[inline(always)]
#[must_use]
pub fn restore(addr: &Addr, port: Port, pairs: &Pairs) -> Option<(Addr, Port)> {
    let mut found = None;
    let mut latest = 0;
    let mut i = 0;
    while i < PAIRS {
        let pair = &pairs.pairs[i];
        if pair.used > latest && pair.endpoint_port.be == port.be && pair.endpoint.same(addr) {
            latest = pair.used;
            found = Some((pair.frontend, pair.frontend_port));
        }
        i += 1;
    }
    found
}

const _: () = {
    assert!(size_of::<Pair>() == 48);
    assert!(size_of::<Pairs>() == 48 * PAIRS + 8);
};

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, and the size assertions above leave no room for padding.
unsafe impl aya::Pod for Pairs {}

#[cfg(test)]
mod tests {
    use core::net::SocketAddr;

    use super::*;
    use crate::{
        layout::{
            Endpoint, Frontend, FrontendKey, PrefixKey, Range, bit_index, endpoint_flags, frontend_flags, protocol,
        },
        memory::Machine,
    };

    const UNBOUND: Addr = Addr::UNSPECIFIED_V6;
    const NEW: Pairs = Pairs { pairs: [Pair::NONE; PAIRS], uses: 0, next: 0 };

    fn ends(text: &str) -> Ends {
        let addr: SocketAddr = text.parse().unwrap();
        Ends { addr: addr.ip().into(), port: Port::new(addr.port()), proto: protocol::UDP }
    }

    /// A frontend with endpoints of consecutive ids.
    fn add(machine: &mut Machine, id: u32, frontend: &str, endpoints: &[&str], flags: u32) {
        let Ends { addr, port, proto } = ends(frontend);
        for (i, endpoint) in (id..).zip(endpoints) {
            let Ends { addr, port, .. } = ends(endpoint);
            let value = Endpoint { addr, port, flags: endpoint_flags::SERVING, service: id, generation: 1 };
            machine.tables.endpoints.insert(i, value);
            machine.tables.slots.insert(i, i);
        }
        let range = Range { offset: id, len: endpoints.len() as u32 };
        let value = Frontend { internal: range, external: range, service: id, flags, ..Frontend::default() };
        machine.tables.frontends.insert(FrontendKey::new(addr, port, proto), value);
        machine.tables.frontend_bits.insert(bit_index(&addr, port));
    }

    fn send(machine: &mut Machine, pairs: &mut Pairs, to: &str, hash: u32) -> (Ends, Reason) {
        let mut ends = ends(to);
        let reason = translate(&mut ends, &UNBOUND, true, hash, false, pairs, machine);
        (ends, reason)
    }

    #[test]
    fn localhost_is_a_frontend_in_the_nodes_own_namespace_alone() {
        let ends =
            Ends { addr: Addr::from(core::net::Ipv4Addr::LOCALHOST), port: Port::new(30_080), proto: protocol::TCP };
        let mut tables = crate::memory::Memory::default();
        tables.frontend_bits.insert(bit_index(&ends.addr.unspecified(), ends.port));
        assert!(may_be_translated(&ends, true, &tables));
        assert!(!may_be_translated(&ends, false, &tables), "a pod's localhost is its own");
        let elsewhere = Ends { addr: Addr::from(core::net::Ipv4Addr::new(10, 99, 0, 11)), ..ends };
        assert!(may_be_translated(&elsewhere, false, &tables));
    }

    #[test]
    fn a_datagram_stays_with_its_endpoint_until_that_goes() {
        for [service, one, two] in
            [["10.96.0.10:53", "10.244.1.1:53", "10.244.1.2:53"], ["[fd00:96::10]:53", "[fd00::1]:53", "[fd00::2]:53"]]
        {
            let mut machine = Machine::default();
            add(&mut machine, 1, service, &[one, two], 0);
            let mut pairs = NEW;
            assert_eq!(send(&mut machine, &mut pairs, service, 0), (ends(one), Reason::NewFlow));
            assert_eq!(send(&mut machine, &mut pairs, service, 1), (ends(one), Reason::Established));
            machine.tables.endpoints.get_mut(&1).unwrap().flags = 0;
            assert_eq!(send(&mut machine, &mut pairs, service, 1), (ends(two), Reason::NewFlow));
            let frontend = ends(service);
            assert_eq!(restore(&ends(two).addr, ends(two).port, &pairs), Some((frontend.addr, frontend.port)));
            assert_eq!(restore(&ends(one).addr, ends(one).port, &pairs), None, "forgotten with its endpoint");
        }
    }

    #[test]
    fn a_datagram_goes_where_its_address_goes() {
        for [service, one, two] in
            [["192.0.2.1:53", "10.244.1.1:53", "10.244.1.2:53"], ["[2001:db8::1]:53", "[fd00::1]:53", "[fd00::2]:53"]]
        {
            let mut machine = Machine::default();
            add(&mut machine, 1, service, &[one], 0);
            let mut pairs = NEW;
            send(&mut machine, &mut pairs, service, 0);
            add(&mut machine, 2, service, &[two], 0);
            assert_eq!(send(&mut machine, &mut pairs, service, 0), (ends(two), Reason::NewFlow));
            machine.tables.frontends.clear();
            assert_eq!(send(&mut machine, &mut pairs, service, 0), (ends(service), Reason::NotService));
        }
    }

    #[test]
    fn every_connect_chooses_anew() {
        let mut machine = Machine::default();
        add(&mut machine, 1, "10.96.0.10:53", &["10.244.1.1:53", "10.244.1.2:53"], 0);
        let mut pairs = NEW;
        for (hash, endpoint) in [(0, "10.244.1.1:53"), (1, "10.244.1.2:53"), (2, "10.244.1.1:53")] {
            let mut found = ends("10.96.0.10:53");
            assert_eq!(translate(&mut found, &UNBOUND, true, hash, true, &mut pairs, &mut machine), Reason::NewFlow);
            assert_eq!(found, ends(endpoint));
        }
        assert_eq!(machine.service_counters[&1].connections, 3);
    }

    #[test]
    fn the_pair_used_last_names_the_frontend_and_the_oldest_is_overwritten() {
        let mut machine = Machine::default();
        add(&mut machine, 1, "10.96.0.1:53", &["10.244.1.1:53"], 0);
        add(&mut machine, 2, "10.96.0.2:53", &["10.244.1.1:53"], 0);
        let mut pairs = NEW;
        let endpoint = ends("10.244.1.1:53");
        for to in ["10.96.0.1:53", "10.96.0.2:53", "10.96.0.1:53"] {
            send(&mut machine, &mut pairs, to, 0);
            assert_eq!(restore(&endpoint.addr, endpoint.port, &pairs), Some((ends(to).addr, ends(to).port)));
        }
        for i in 10..10 + PAIRS as u32 {
            let to = format!("10.96.1.{i}:53");
            add(&mut machine, i, &to, &[&format!("10.244.2.{i}:53")], 0);
            send(&mut machine, &mut pairs, &to, 0);
        }
        assert_eq!(restore(&endpoint.addr, endpoint.port, &pairs), None);
        let first = ends("10.244.2.10:53");
        assert_eq!(restore(&first.addr, first.port, &pairs), Some((ends("10.96.1.10:53").addr, Port::new(53))));
    }

    #[test]
    fn a_socket_is_refused_left_alone_or_let_through_as_its_packet_would_be() {
        let ranges = frontend_flags::SOURCE_RANGES;
        for (service, endpoint, own) in
            [("1.2.3.4:53", "10.244.1.1:53", "192.0.2.7:0"), ("[fd00:1::4]:53", "[fd00::1]:53", "[2001:db8::7]:0")]
        {
            let (vip, own, endpoints) = (ends(service).addr, ends(own).addr, &[endpoint][..]);
            for (name, endpoints, flags, range, bound, expected) in [
                ("no endpoints", &[][..], 0, None, UNBOUND, Reason::NoEndpoints),
                ("none here", &[], frontend_flags::INTERNAL_DROP, None, UNBOUND, Reason::NoLocalEndpoints),
                ("not in the ranges", endpoints, ranges, None, UNBOUND, Reason::SourceRange),
                ("the ranges hold the Service", endpoints, ranges, Some(vip), UNBOUND, Reason::SourceRange),
                ("the node is", endpoints, ranges, Some(node_client(&vip)), UNBOUND, Reason::NewFlow),
                ("the node is, not this address", endpoints, ranges, Some(node_client(&vip)), own, Reason::SourceRange),
                ("this address is", endpoints, ranges, Some(own), own, Reason::NewFlow),
            ] {
                let mut machine = Machine::default();
                add(&mut machine, 1, service, endpoints, flags);
                machine.tables.source_ranges.extend(range.map(|addr| PrefixKey::host(1, addr)));
                let reason = translate(&mut ends(service), &bound, true, 0, true, &mut NEW.clone(), &mut machine);
                assert_eq!(reason, expected, "{service}, {name}");
            }
        }
        assert_eq!(send(&mut Machine::default(), &mut NEW.clone(), "1.2.3.4:53", 0).1, Reason::NotService);
    }

    /// A frontend whose clients stay with their endpoint.
    fn add_sticky(machine: &mut Machine, frontend: &str, endpoints: &[&str], timeout: u32) {
        add(machine, 1, frontend, endpoints, 0);
        machine.tables.endpoints.values_mut().for_each(|endpoint| endpoint.flags |= endpoint_flags::IN_CLUSTER);
        machine.tables.frontends.values_mut().for_each(|frontend| frontend.affinity = timeout);
    }

    #[test]
    fn sockets_of_the_node_are_one_client_and_datagrams_refresh_nothing() {
        let services = [
            ("10.96.0.10:53", ["10.244.1.1:53", "10.244.1.2:53"]),
            ("[fd00:96::10]:53", ["[fd00::1]:53", "[fd00::2]:53"]),
        ];
        for (service, endpoints) in services {
            let mut machine = Machine { now: 1000, ..Machine::default() };
            add_sticky(&mut machine, service, &endpoints, 100);
            let mut talker = NEW;
            assert_eq!(send(&mut machine, &mut talker, service, 1), (ends(endpoints[1]), Reason::NewFlow));
            // Another socket, another choice by chance: the same endpoint, and a new moment to count from.
            machine.now += 80;
            assert_eq!(send(&mut machine, &mut NEW.clone(), service, 0).0, ends(endpoints[1]));
            for _ in 0..3 {
                machine.now += 40;
                assert_eq!(send(&mut machine, &mut talker, service, 0), (ends(endpoints[1]), Reason::Established));
            }
            assert_eq!(
                send(&mut machine, &mut NEW.clone(), service, 0).0,
                ends(endpoints[0]),
                "{service}: the time is over"
            );
        }
    }

    #[test]
    fn a_pods_socket_is_left_to_its_packets_where_its_address_counts() {
        let flags = [frontend_flags::SOURCE_RANGES, frontend_flags::EXTERNAL_LOCAL, frontend_flags::MASQUERADE];
        for (service, endpoint) in [("192.0.2.1:53", "10.244.1.1:53"), ("[2001:db8::1]:53", "[fd00::1]:53")] {
            for (flags, affinity, expected) in [
                (flags[0], 0, Reason::LeftToPackets),
                (flags[1], 0, Reason::LeftToPackets),
                (flags[2], 100, Reason::LeftToPackets),
                (flags[2], 0, Reason::NewFlow),
            ] {
                let mut machine = Machine::default();
                add(&mut machine, 1, service, &[endpoint], flags);
                machine.tables.frontends.values_mut().for_each(|frontend| frontend.affinity = affinity);
                let mut pairs = NEW;
                let mut found = ends(service);
                let reason = translate(&mut found, &ends(endpoint).addr, false, 0, true, &mut pairs, &mut machine);
                assert_eq!(reason, expected, "{service}, {flags:#x}, {affinity}");
                let is_left = expected == Reason::LeftToPackets;
                assert_eq!(found, ends(if is_left { service } else { endpoint }));
                assert_eq!((pairs == NEW, machine.affinities.is_empty()), (is_left, true));
            }
        }
    }
}
