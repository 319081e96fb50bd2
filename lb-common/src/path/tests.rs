//! The way there and back through both hooks, on a [`Machine`].
#![expect(clippy::wildcard_enum_match_arm, reason = "what else there is is a failure")]

mod affinity;
mod count;
mod drops;
mod frames;
mod masquerade;
mod moving;
mod node_ports;
mod straight;
mod tcp;

use core::net::{IpAddr, SocketAddr};

use etherparse::{SlicedPacket, TransportSlice};
use proptest::prelude::*;

use self::frames::{Segment, ends, fragments, frame, ping, port_unreachable};
use super::{Action, Hook, Scratch, egress, ingress};
use crate::{
    addr::{Addr, Port},
    flow::{Kind, tcp_flags},
    layout::{
        Cover, Device, Endpoint, Frontend, FrontendKey, PrefixKey, Range, bit_index, device_flags, endpoint_flags,
        frontend_flags, node_flags, protocol, settings_flags,
    },
    memory::Machine,
    packet::Packet as _,
    reason::{Reason, Verdict},
};

const UPLINK: u32 = 7;
const V4: Case =
    Case { client: "10.244.1.7:40000", service: "10.96.0.10:80", endpoint: "10.244.2.9:8080", node: "10.99.0.11" };
const V6: Case =
    Case { client: "[fd00::7]:40000", service: "[fd00:96::10]:80", endpoint: "[fd00:2::9]:8080", node: "fd00:99::11" };

#[test]
fn answers_to_clients_outside_are_told_from_all_others() {
    for case in [V4, V6] {
        // (what the local detector holds, whether the frontend masquerades, whether the answer is one to outside)
        for (local, masquerades, expected) in [(false, false, true), (true, false, false), (false, true, false)] {
            let flags = if masquerades { frontend_flags::MASQUERADE } else { 0 };
            let mut machine = case.machine(flags);
            if local {
                let addr = Addr::from(case.client().ip());
                machine.tables.local_cidrs.insert(PrefixKey { prefix_len: 160, service: 0, addr });
            }
            let hook = Hook {
                device: UPLINK,
                link_header: 14,
                v6: case.client().is_ipv6(),
                translated: false,
                finished: false,
                from_node: false,
            };
            for segment in [Segment::Tcp(tcp_flags::SYN), Segment::Udp] {
                let mut request = frame(case.client(), case.service(), segment);
                let mut scratch = Scratch::NEW;
                let answer = frame(case.endpoint(), case.client(), segment);
                let is_marked = |answer: &Vec<u8>, machine: &mut Machine| {
                    let mut scratch = Scratch::NEW;
                    super::answers_outside(answer, &hook, &mut scratch, machine)
                };
                assert!(!is_marked(&answer, &mut machine), "{case:?}: a packet of no connection");
                ingress(&mut request, &hook, &mut scratch, &mut machine);
                egress(&mut request, &Hook { translated: true, ..hook }, &mut scratch, &mut machine);
                assert_eq!(is_marked(&answer, &mut machine), expected, "{case:?} {local} {masquerades}");
                let stranger = frame("10.9.9.9:1".parse().unwrap(), "10.9.9.8:2".parse().unwrap(), segment);
                assert!(!is_marked(&stranger, &mut machine));
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    client: &'static str,
    service: &'static str,
    endpoint: &'static str,
    node: &'static str,
}

impl Case {
    fn client(&self) -> SocketAddr {
        self.client.parse().unwrap()
    }

    fn service(&self) -> SocketAddr {
        self.service.parse().unwrap()
    }

    fn endpoint(&self) -> SocketAddr {
        self.endpoint.parse().unwrap()
    }

    fn node(&self) -> IpAddr {
        self.node.parse().unwrap()
    }

    /// A machine with the service, for both protocols, and flags for its frontend.
    fn machine(&self, flags: u32) -> Machine {
        let mut machine = Machine::default();
        add_service(&mut machine, 1, self.service(), &[self.endpoint()], flags);
        let node = Addr::from(self.node());
        machine.tables.node_addresses.insert(node, node_flags::LOCAL | node_flags::NODE_PORTS);
        let mut device = Device::default();
        if node.is_v4() {
            device.masquerade_v4 = node
        } else {
            device.masquerade_v6 = node
        }
        machine.tables.devices.insert(UPLINK, device);
        machine
    }
}

fn add_service(machine: &mut Machine, id: u32, service: SocketAddr, endpoints: &[SocketAddr], flags: u32) {
    let offset = id * 100;
    let tables = &mut machine.tables;
    for (i, endpoint) in (0..).zip(endpoints) {
        let (addr, port) = (endpoint.ip().into(), Port::new(endpoint.port()));
        let value = Endpoint { addr, port, flags: endpoint_flags::SERVING, service: id, generation: 1 };
        tables.endpoints.insert(offset + i, value);
        tables.slots.insert(offset + i, offset + i);
        tables.endpoint_bits.insert(bit_index(&addr, port));
    }
    let range = Range { offset, len: endpoints.len() as u32 };
    for proto in [protocol::TCP, protocol::UDP, protocol::SCTP] {
        let key = FrontendKey::new(service.ip().into(), Port::new(service.port()), proto);
        tables
            .frontends
            .insert(key, Frontend { internal: range, external: range, service: id, flags, ..Frontend::default() });
        tables.frontend_bits.insert(bit_index(&key.addr, key.port));
    }
}

/// A device where nothing has been done to the frame yet.
fn hook_of(device: u32, frame: &[u8]) -> Hook {
    Hook { device, link_header: 14, v6: frame[12] == 0x86, translated: false, finished: false, from_node: false }
}

fn enter(machine: &mut Machine, frame: &mut Vec<u8>) -> Action {
    let hook = hook_of(3, frame);
    ingress(frame, &hook, &mut Scratch::NEW.clone(), machine)
}

fn leave(machine: &mut Machine, frame: &mut Vec<u8>) -> Action {
    let hook = hook_of(UPLINK, frame);
    egress(frame, &hook, &mut Scratch::NEW.clone(), machine)
}

/// A frame through the host, in by one device and out by another: what leaves.
fn cross(machine: &mut Machine, from: SocketAddr, to: SocketAddr, segment: Segment) -> (SocketAddr, SocketAddr) {
    let mut frame = frame(from, to, segment);
    let action = enter(machine, &mut frame);
    assert!(matches!(action, Action::Next(_)), "{from} to {to} at ingress: {action:?}");
    let action = leave(machine, &mut frame);
    assert!(matches!(action, Action::Next(_)), "{from} to {to} at egress: {action:?}");
    ends(&frame)
}

const INIT: Segment = Segment::Sctp(0);
const DATA: Segment = Segment::Sctp(7);
const SYN: Segment = Segment::Tcp(tcp_flags::SYN);
const ACK: Segment = Segment::Tcp(tcp_flags::ACK);
const FIN: Segment = Segment::Tcp(tcp_flags::FIN | tcp_flags::ACK);
const SYN_ACK: Segment = Segment::Tcp(tcp_flags::SYN | tcp_flags::ACK);

/// What answers an opening segment, and what follows in the middle.
fn answer_and_middle(segment: Segment) -> (Segment, Segment) {
    match segment {
        Segment::Udp => (Segment::Udp, Segment::Udp),
        Segment::Tcp(_) => (SYN_ACK, ACK),
        Segment::Sctp(_) => (DATA, DATA),
    }
}

#[test]
fn a_request_reaches_the_endpoint_and_the_answer_comes_from_the_frontend() {
    for case in [V4, V6] {
        for segment in [SYN, Segment::Udp] {
            let mut machine = case.machine(0);
            assert_eq!(cross(&mut machine, case.client(), case.service(), segment), (case.client(), case.endpoint()));
            let answer = if matches!(segment, Segment::Udp) { Segment::Udp } else { SYN_ACK };
            assert_eq!(cross(&mut machine, case.endpoint(), case.client(), answer), (case.service(), case.client()));
            assert!(machine.flows.values().all(|(_, confirmed)| *confirmed), "an answer confirms both entries");
        }
    }
}

#[test]
fn a_udp_flow_moves_when_its_endpoint_goes() {
    for case in [V4, V6] {
        let mut machine = case.machine(0);
        cross(&mut machine, case.client(), case.service(), Segment::Udp);
        machine.tables.endpoints.get_mut(&100).unwrap().flags = 0;
        let new = SocketAddr::new(case.endpoint().ip(), 9999);
        add_service(&mut machine, 2, case.service(), &[new], 0);
        assert_eq!(cross(&mut machine, case.client(), case.service(), Segment::Udp), (case.client(), new));
        assert_eq!(cross(&mut machine, new, case.client(), Segment::Udp), (case.service(), case.client()));
    }
}

#[test]
fn an_association_stays_when_its_endpoint_or_its_service_goes_and_a_new_one_does_not() {
    for case in [V4, V6] {
        for terminates in [false, true] {
            let mut machine = case.machine(0);
            if terminates {
                machine.tables.settings.flags = settings_flags::TERMINATE;
            }
            cross(&mut machine, case.client(), case.service(), INIT);
            cross(&mut machine, case.endpoint(), case.client(), DATA);
            machine.tables.endpoints.get_mut(&100).unwrap().flags = 0;
            let new = SocketAddr::new(case.endpoint().ip(), 9999);
            add_service(&mut machine, 2, case.service(), &[new], 0);
            let stays = (case.client(), case.endpoint());
            assert_eq!(cross(&mut machine, case.client(), case.service(), DATA), stays);
            machine.tables.frontends.clear();
            assert_eq!(cross(&mut machine, case.client(), case.service(), DATA), stays);
            add_service(&mut machine, 2, case.service(), &[new], 0);
            assert_eq!(cross(&mut machine, case.client(), case.service(), INIT), (case.client(), new));
            assert_eq!(cross(&mut machine, case.client(), case.service(), DATA), (case.client(), new));
        }
    }
}

#[test]
fn a_flow_goes_where_its_address_goes_but_an_established_connection_stays() {
    for case in [V4, V6] {
        let new = SocketAddr::new(case.endpoint().ip(), 9999);
        for (segment, next, expected) in [
            (Segment::Udp, Segment::Udp, new),
            (SYN, SYN, new),
            (SYN, ACK, case.endpoint()),
            (INIT, INIT, new),
            (INIT, DATA, case.endpoint()),
        ] {
            let mut machine = case.machine(0);
            cross(&mut machine, case.client(), case.service(), segment);
            // The old endpoint serves on, by other addresses of its Service.
            add_service(&mut machine, 2, case.service(), &[new], 0);
            assert_eq!(cross(&mut machine, case.client(), case.service(), next), (case.client(), expected));
        }
        let mut machine = case.machine(0);
        cross(&mut machine, case.client(), case.service(), Segment::Udp);
        machine.tables.frontends.clear();
        let action = enter(&mut machine, &mut frame(case.client(), case.service(), Segment::Udp));
        assert_eq!(action, Action::Next(Reason::NotService), "the address is nobody's");
    }
}

#[test]
fn a_late_answer_of_a_former_endpoint_does_not_take_the_client_back() {
    for (segment, answer) in [(Segment::Udp, Segment::Udp), (SYN, SYN_ACK), (SYN, Segment::Tcp(tcp_flags::RST))] {
        let mut machine = V4.machine(0);
        cross(&mut machine, V4.client(), V4.service(), segment);
        machine.tables.endpoints.get_mut(&100).unwrap().flags = 0;
        let new = SocketAddr::new(V4.endpoint().ip(), 9999);
        add_service(&mut machine, 2, V4.service(), &[new], 0);
        assert_eq!(cross(&mut machine, V4.client(), V4.service(), segment).1, new);
        cross(&mut machine, V4.endpoint(), V4.client(), answer);
        let mut frame = frame(V4.client(), V4.service(), segment);
        assert_eq!(enter(&mut machine, &mut frame), Action::Next(Reason::Established));
        assert_eq!(ends(&frame).1, new);
    }
}

#[test]
fn one_socket_talks_to_forty_services() {
    let mut machine = V4.machine(0);
    let pairs: Vec<(SocketAddr, SocketAddr)> = (0..40)
        .map(|i| (format!("10.96.1.{i}:53").parse().unwrap(), format!("10.244.3.{i}:5353").parse().unwrap()))
        .collect();
    for (id, (service, endpoint)) in (2..).zip(&pairs) {
        add_service(&mut machine, id, *service, &[*endpoint], 0);
        assert_eq!(cross(&mut machine, V4.client(), *service, Segment::Udp), (V4.client(), *endpoint));
    }
    let first = machine.flows.keys().find(|key| key.kind == Kind::Request as u8).copied().unwrap();
    machine.flows.remove(&first);
    for (service, endpoint) in &pairs {
        assert_eq!(cross(&mut machine, *endpoint, V4.client(), Segment::Udp), (*service, V4.client()));
        assert_eq!(cross(&mut machine, V4.client(), *service, Segment::Udp), (V4.client(), *endpoint));
    }
}

#[test]
fn a_second_frontend_of_the_same_endpoint_gets_another_source_port() {
    for case in [V4, V6] {
        for segment in [SYN, Segment::Udp] {
            let mut machine = case.machine(0);
            let second = SocketAddr::new(case.service().ip(), 81);
            add_service(&mut machine, 2, second, &[case.endpoint()], 0);
            let one = cross(&mut machine, case.client(), case.service(), segment);
            let two = cross(&mut machine, case.client(), second, segment);
            assert_eq!(one, (case.client(), case.endpoint()));
            assert_eq!((two.0.ip(), two.1), (case.client().ip(), case.endpoint()));
            assert_ne!(one.0, two.0);
            let answer = if matches!(segment, Segment::Udp) { Segment::Udp } else { SYN_ACK };
            assert_eq!(cross(&mut machine, case.endpoint(), one.0, answer), (case.service(), case.client()));
            assert_eq!(cross(&mut machine, case.endpoint(), two.0, answer), (second, case.client()));
        }
    }
}

#[test]
fn while_older_connections_may_exist_the_middle_of_an_unknown_one_is_left_to_the_host() {
    for case in [V4, V6] {
        let mut machine = case.machine(0);
        let refusing = SocketAddr::new(case.service().ip(), 81);
        add_service(&mut machine, 2, refusing, &[], 0);
        machine.tables.settings.mid_flow_left_until = 100;
        let left = Action::Next(Reason::MidFlowForeign);
        for (now, to, expected) in [
            (0, case.service(), left),
            (99, case.service(), left),
            (100, case.service(), Action::Next(Reason::MidFlow)),
            (0, refusing, left),
            (100, refusing, Action::Drop(Reason::MidFlowNoEndpoints)),
        ] {
            machine.now = now;
            let mut machine = machine.clone();
            let mut middle = frame(case.client(), to, ACK);
            assert_eq!(enter(&mut machine, &mut middle), expected, "{to} at {now}");
            if expected == left {
                assert_eq!(ends(&middle), (case.client(), to));
                assert!(machine.flows.is_empty());
            }
        }
        machine.now = 0;
        assert_eq!(cross(&mut machine, case.client(), case.service(), SYN), (case.client(), case.endpoint()));
        assert_eq!(cross(&mut machine, case.client(), case.service(), ACK), (case.client(), case.endpoint()));
    }
}

#[test]
fn an_evicted_entry_is_restored_by_the_other_one() {
    for kind in [Kind::Request, Kind::Forwarded] {
        let mut machine = V4.machine(0);
        cross(&mut machine, V4.client(), V4.service(), SYN);
        cross(&mut machine, V4.endpoint(), V4.client(), SYN_ACK);
        machine.flows.retain(|key, _| key.kind != kind as u8);
        machine.now += 10;
        let (from, to) = match kind {
            Kind::Request => (V4.endpoint(), V4.client()),
            _ => (V4.client(), V4.service()),
        };
        cross(&mut machine, from, to, ACK);
        assert_eq!(machine.flows.len(), 2);
        assert_eq!(cross(&mut machine, V4.endpoint(), V4.client(), ACK), (V4.service(), V4.client()));
    }
}

#[test]
fn a_packet_that_another_cpu_saw_a_moment_later_ends_nothing() {
    let mut machine = V4.machine(0);
    machine.now = 100;
    cross(&mut machine, V4.client(), V4.service(), SYN);
    assert!(machine.flows.iter().all(|(key, (flow, _))| !flow.is_idle(key.proto, 99)));
}

/// What a device makes of a packet whose checksum its sender left to it (`skb_checksum_help`).
fn completed(frame: &[u8], segment: Segment) -> Vec<u8> {
    let start = if frame[12] == 0x86 { 54 } else { 34 };
    let field = start + if matches!(segment, Segment::Udp) { 6 } else { 16 };
    let words =
        frame[start..].chunks(2).map(|word| u64::from(u16::from_ne_bytes([word[0], *word.get(1).unwrap_or(&0)])));
    let mut frame = frame.to_vec();
    let sum = match !crate::checksum::fold(words.sum()) {
        0 => 0xffff,
        sum => sum,
    };
    frame.write(field, sum).unwrap();
    frame
}

#[test]
fn a_cluster_ip_that_is_the_nodes_own_address_is_left_to_the_host() {
    for (flags, own, passed) in [
        (frontend_flags::CLUSTER_IP, true, true),
        (frontend_flags::ANY_PORT, true, true),
        (frontend_flags::CLUSTER_IP, false, false),
        (0, true, false),
    ] {
        let mut machine = V4.machine(flags);
        if own {
            machine.tables.node_addresses.insert(V4.service().ip().into(), node_flags::LOCAL);
        }
        let action = enter(&mut machine, &mut frame(V4.client(), V4.service(), SYN));
        assert_eq!(action == Action::Next(Reason::OwnAddress), passed, "{flags:x} {own}");
    }
}

#[test]
fn what_the_policy_drops_does_not_leave_the_node_by_its_own_processes() {
    for case in [V4, V6] {
        let unallocated: SocketAddr = SocketAddr::new(case.client().ip(), 9);
        for (name, flags, to, expected) in [
            ("no endpoint here", frontend_flags::INTERNAL_DROP, case.service(), Some(Reason::NoLocalEndpoints)),
            ("no endpoint", 0, case.service(), None),
            ("not in the ranges", frontend_flags::SOURCE_RANGES, case.service(), Some(Reason::SourceRange)),
            ("unallocated", 0, unallocated, Some(Reason::Unallocated)),
        ] {
            let mut machine = case.machine(flags);
            for frontend in machine.tables.frontends.values_mut() {
                frontend.internal = Range::default();
            }
            machine.tables.service_cidrs.insert(PrefixKey {
                prefix_len: 160,
                service: 0,
                addr: unallocated.ip().into(),
            });
            let all = Cover::EVERYTHING;
            (machine.tables.settings.cidrs_v4, machine.tables.settings.cidrs_v6) = (all, all);
            let from = SocketAddr::new(case.node(), 40_000);
            for (segment, opens) in [
                (Segment::Tcp(tcp_flags::SYN), true),
                (Segment::Udp, true),
                // A connection that is older than the Service, or than the programs.
                (Segment::Tcp(tcp_flags::ACK), false),
                (Segment::Tcp(tcp_flags::SYN | tcp_flags::ACK), false),
            ] {
                for from_node in [true, false] {
                    let mut packet = frame(from, to, segment);
                    let before = packet.clone();
                    let v6 = packet[12] == 0x86;
                    let hook =
                        Hook { device: UPLINK, link_header: 14, v6, translated: false, finished: false, from_node };
                    let action = egress(&mut packet, &hook, &mut Scratch::NEW.clone(), &mut machine);
                    let wanted = match expected.filter(|_| opens && from_node) {
                        Some(reason) => Action::Drop(reason),
                        None => Action::Next(Reason::NotService),
                    };
                    assert_eq!((action, &packet), (wanted, &before), "{name}, from the node: {from_node}");
                }
            }
        }
    }
}

#[test]
fn pings_of_the_node_to_services_do_not_get_out_and_neighbour_discovery_does() {
    for case in [V4, V6] {
        let mut machine = case.machine(0);
        let unallocated = SocketAddr::new(case.client().ip(), 9);
        let key = PrefixKey { prefix_len: 160, service: 0, addr: unallocated.ip().into() };
        machine.tables.service_cidrs.insert(key);
        (machine.tables.settings.cidrs_v4, machine.tables.settings.cidrs_v6) = (Cover::EVERYTHING, Cover::EVERYTHING);
        let refusing = FrontendKey::any_port(case.service().ip().into());
        let flags = frontend_flags::ANY_PORT;
        machine.tables.frontends.insert(refusing, Frontend { flags, ..Frontend::default() });
        machine.tables.frontend_bits.insert(bit_index(&refusing.addr, Port::ZERO));
        let elsewhere = case.endpoint();
        // ICMP's types: echo, and a neighbour's solicitation.
        for (to, kind, expected) in [
            (case.service(), 128, Some(Reason::UnknownPort)),
            (unallocated, 128, Some(Reason::Unallocated)),
            (elsewhere, 128, None),
            (case.service(), 135, None),
            (unallocated, 135, None),
        ] {
            let v6 = to.is_ipv6();
            if !v6 && kind == 135 {
                continue;
            }
            for from_node in [true, false] {
                let mut packet = ping(case.node(), to.ip(), kind);
                let before = packet.clone();
                let hook = Hook { device: UPLINK, link_header: 14, v6, translated: false, finished: false, from_node };
                let action = egress(&mut packet, &hook, &mut Scratch::NEW.clone(), &mut machine);
                let wanted = match expected.filter(|_| from_node) {
                    Some(reason) => Action::Drop(reason),
                    None => Action::Next(Reason::NotService),
                };
                assert_eq!((action, &packet), (wanted, &before), "{to}, type {kind}, from the node: {from_node}");
            }
        }
    }
}

#[test]
fn refusals_go_back_to_who_asked() {
    let cases = [(SYN, true), (Segment::Udp, true), (ACK, false), (Segment::Tcp(tcp_flags::RST), false)];
    for (case, partial) in [(V4, false), (V6, false), (V4, true), (V6, true)] {
        for (segment, answered) in cases {
            let mut machine = case.machine(0);
            add_service(&mut machine, 1, case.service(), &[], 0);
            let mut frame = frame(case.client(), case.service(), segment);
            let action = enter(&mut machine, &mut frame);
            if !answered {
                assert_eq!(action, Action::Drop(Reason::MidFlowNoEndpoints));
                continue;
            }
            assert_eq!(action, Action::Answer(Reason::NoEndpoints));
            let frame = if partial { completed(&frame, segment) } else { frame };
            assert_eq!(action.reason().verdict(), Verdict::Refuse);
            assert_eq!(frame[..6], [2, 0, 0, 0, 0, 1]);
            if matches!(segment, Segment::Udp) {
                let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
                match sliced.transport.unwrap() {
                    TransportSlice::Icmpv4(icmp) => {
                        assert_eq!((icmp.type_u8(), icmp.code_u8()), (3, 3));
                        let words = frame[34..].chunks(2).map(|w| u64::from(u16::from_ne_bytes([w[0], w[1]])));
                        assert_eq!(crate::checksum::fold(words.sum()), 0xffff, "the checksum");
                    }
                    TransportSlice::Icmpv6(icmp) => {
                        assert_eq!((icmp.type_u8(), icmp.code_u8()), (1, 4));
                        let (from, to) = (case.service().ip(), case.client().ip());
                        let (IpAddr::V6(from), IpAddr::V6(to)) = (from, to) else { panic!("two families") };
                        assert!(icmp.is_checksum_valid(from.octets(), to.octets()));
                    }
                    _ => panic!("not ICMP"),
                }
            } else {
                assert_eq!(ends(&frame), (case.service(), case.client()));
            }
        }
    }
}

#[test]
fn fragments_follow_their_first() {
    let [mut first, mut later] = fragments(V4.client(), V4.service());
    let mut machine = V4.machine(0);
    let mut lost = later.clone();
    machine.tables.frontends.insert(
        FrontendKey::any_port(V4.service().ip().into()),
        Frontend { flags: frontend_flags::ANY_PORT, ..Frontend::default() },
    );
    machine.tables.frontend_bits.insert(bit_index(&V4.service().ip().into(), Port::ZERO));
    assert_eq!(enter(&mut machine, &mut lost), Action::Drop(Reason::FragmentWithoutFirst));
    assert_eq!(enter(&mut machine, &mut first), Action::Next(Reason::NewFlow));
    assert_eq!(enter(&mut machine, &mut later), Action::Next(Reason::Established));
    assert_eq!(later[30..34], first[30..34]);
}

proptest! {
    /// Whatever comes: nothing is read past the end, and what is passed is untouched.
    #[test]
    fn any_bytes_are_handled_and_what_is_not_ours_is_left_alone(
        bytes in proptest::collection::vec(any::<u8>(), 0..160), v6: bool, proto in prop::sample::select(vec![6_u8, 17, 1, 58, 132, 44, 0]),
        ours: bool, out: bool,
    ) {
        let case = if v6 { V6 } else { V4 };
        let mut machine = case.machine(frontend_flags::MASQUERADE);
        cross(&mut machine, case.client(), case.service(), Segment::Udp);
        let mut packet = if ours { frame(case.client(), case.service(), Segment::Udp) } else { Vec::new() };
        packet.truncate(if v6 { 54 } else { 34 });
        packet.extend(bytes);
        if let Some(field) = packet.get_mut(if v6 { 20 } else { 23 }) {
            *field = proto;
        }
        if let [_, _, _, _, _, _, _, _, _, _, _, _, high, low, version, ..] = packet.as_mut_slice() {
            [*high, *low] = if v6 { [0x86, 0xdd] } else { [8, 0] };
            *version = if v6 { 0x60 } else { 0x45 };
        }
        let before = packet.clone();
        let hook = Hook { device: UPLINK, link_header: 14, v6, translated: false, finished: false, from_node: false };
        let run = if out { egress::<Vec<u8>, Machine> } else { ingress };
        let action = run(&mut packet, &hook, &mut Scratch::NEW.clone(), &mut machine);
        if action.reason().verdict() == Verdict::Pass {
            prop_assert_eq!(packet, before);
        }
    }
}
