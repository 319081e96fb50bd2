//! Bytes become frames that cross a node, one after another.
//!
//! In: any bytes. Each frame is taken from them as it is, or made of choices that they make, so that most have headers that can be
//! read and addresses that matter. Panics where a frame comes out with a checksum that is wrong by more than it was, with other
//! bytes changed than an address and a port, or where the answer to it does not find the way back.

use std::{
    net::{IpAddr, SocketAddr},
    sync::LazyLock,
};

use crc::{CRC_32_ISCSI, Crc};
use lb_common::{
    addr::{Addr, Port},
    flow::tcp_flags,
    layout::{
        Cover, Device, Endpoint, Frontend, FrontendKey, PrefixKey, Range, bit_index, endpoint_flags, frontend_flags,
        node_flags, protocol,
    },
    memory::Machine,
    parse::{Headers, Part, parse},
    path::{Action, Hook, Scratch, egress, ingress},
    reason::{Reason, Verdict},
};

use crate::input::Input;

const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

const INSIDE: u32 = 3;
const UPLINK: u32 = 7;

/// Clients, then endpoints, then addresses of Services, of the node, of nobody.
const ADDRESSES: [[&str; 9]; 2] = [
    [
        "10.244.1.7",
        "203.0.113.7",
        "10.244.2.9",
        "10.244.1.8",
        "10.96.0.10",
        "10.96.0.11",
        "192.0.2.1",
        "10.99.0.11",
        "10.96.9.9",
    ],
    [
        "fd00:1::7",
        "2001:db8::7",
        "fd00:2::9",
        "fd00:1::8",
        "fd00:96::10",
        "fd00:96::11",
        "fd00:aa::1",
        "fd00:99::11",
        "fd00:96::9999",
    ],
];
const CLIENTS: usize = 4;
const PORTS: [u16; 8] = [40000, 8080, 80, 30080, 61007, 0, 443, 53];
const PROTOCOLS: [u8; 6] = [protocol::TCP, protocol::UDP, protocol::SCTP, protocol::ICMP, protocol::ICMPV6, 47];
/// Seconds between frames: enough for entries to become idle.
const WAITS: [u32; 4] = [0, 1, 40, 90_000];

/// A frame and where its IP header is.
#[derive(Clone)]
struct Frame {
    bytes: Vec<u8>,
    l3: usize,
    v6: bool,
}

/// One of everything, in both families.
static MACHINE: LazyLock<Machine> = LazyLock::new(|| {
    let mut machine = Machine::default();
    for (family, cidr) in [(0, "10.96.0.0"), (1, "fd00:96::")] {
        let addr = |index: usize| Addr::from(ADDRESSES[family][index].parse::<IpAddr>().unwrap());
        let base = if family == 0 { 100 } else { 200 };
        let endpoints = [(2, 8080), (3, 80)];
        for (id, (endpoint, port)) in (base..).zip(endpoints) {
            let flags = endpoint_flags::SERVING | endpoint_flags::IN_CLUSTER;
            let (addr, port) = (addr(endpoint), Port::new(port));
            machine.tables.endpoints.insert(id, Endpoint { addr, port, flags, service: base, generation: 1 });
            machine.tables.slots.insert(id, id);
            machine.tables.endpoint_bits.insert(bit_index(&addr, port));
        }
        let all = Range { offset: base, len: 2 };
        let one = Range { offset: base + 1, len: 1 };
        let node_port = addr(0).unspecified();
        for (addr, port, internal, flags) in [
            (addr(4), 80, all, frontend_flags::CLUSTER_IP),
            (addr(4), 443, all, frontend_flags::CLUSTER_IP | frontend_flags::MASQUERADE),
            (addr(5), 80, Range::default(), frontend_flags::CLUSTER_IP),
            (addr(6), 80, all, frontend_flags::EXTERNAL_LOCAL | frontend_flags::EXTERNAL_DROP),
            (addr(6), 53, one, frontend_flags::SOURCE_RANGES | frontend_flags::MASQUERADE),
            (node_port, 30080, one, frontend_flags::NODE_PORT | frontend_flags::MASQUERADE),
        ] {
            for proto in [protocol::TCP, protocol::UDP, protocol::SCTP] {
                add(&mut machine, FrontendKey::new(addr, Port::new(port), proto), internal, base, flags);
            }
        }
        for addr in [addr(4), addr(5)] {
            add(&mut machine, FrontendKey::any_port(addr), Range::default(), 0, frontend_flags::ANY_PORT);
        }
        machine.tables.source_ranges.insert(PrefixKey::host(base, addr(0)));
        machine.tables.local_cidrs.insert(PrefixKey::host(0, addr(0)));
        machine.tables.service_cidrs.insert(PrefixKey {
            prefix_len: if family == 0 { 160 - 16 } else { 32 + 32 },
            service: 0,
            addr: cidr.parse::<IpAddr>().unwrap().into(),
        });
        machine.tables.node_addresses.insert(addr(7), node_flags::LOCAL | node_flags::NODE_PORTS);
        let mut device = machine.tables.devices.get(&UPLINK).copied().unwrap_or_default();
        if family == 0 {
            device.masquerade_v4 = addr(7)
        } else {
            device.masquerade_v6 = addr(7)
        }
        machine.tables.devices.extend([(UPLINK, device), (INSIDE, Device { bridge: 0, ..device })]);
    }
    machine.tables.settings.cidrs_v4 = Cover::EVERYTHING;
    machine.tables.settings.cidrs_v6 = Cover::EVERYTHING;
    machine
});

fn add(machine: &mut Machine, key: FrontendKey, range: Range, service: u32, flags: u32) {
    let frontend = Frontend { internal: range, external: range, service, flags, affinity: 0 };
    machine.tables.frontends.insert(key, frontend);
    machine.tables.frontend_bits.insert(bit_index(&key.addr, key.port));
}

/// Lets every frame that the bytes stand for cross a node.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut machine = MACHINE.clone();
    machine.now = 1000;
    let extra = u32::from(input.u16()) & !frontend_flags::ANY_PORT;
    let affinity = u32::from(input.byte());
    for frontend in machine.tables.frontends.values_mut().filter(|it| it.flags & frontend_flags::CLUSTER_IP != 0) {
        frontend.flags ^= extra;
        frontend.affinity = affinity;
    }
    while !input.0.is_empty() {
        let how = input.byte();
        machine.now += WAITS[usize::from(how >> 6)];
        if how & 0x20 != 0 {
            change_endpoint(&mut machine, input.byte());
        }
        let mut frame = if how & 1 == 0 { made(&mut input) } else { raw(&mut input) };
        match how >> 1 & 3 {
            0 => _ = leave(&mut machine, UPLINK, &mut frame, true),
            1 => _ = enter(&mut machine, INSIDE, &mut frame),
            _ => cross(&mut machine, frame),
        }
    }
}

/// An endpoint goes, or another comes in its place.
fn change_endpoint(machine: &mut Machine, which: u8) {
    let id = [100, 101, 200, 201][usize::from(which & 3)];
    let Some(endpoint) = machine.tables.endpoints.get_mut(&id) else { return };
    endpoint.flags ^= endpoint_flags::SERVING;
    endpoint.generation = endpoint.generation.wrapping_add(u32::from(which >> 2 & 1));
}

fn raw(input: &mut Input<'_>) -> Frame {
    let how = input.byte();
    let length = usize::from(input.u16() % 1600);
    Frame { bytes: input.take(length).to_vec(), l3: if how & 1 == 0 { 14 } else { 0 }, v6: how & 2 != 0 }
}

/// A frame with right checksums, of which then some bytes may be changed, or the end cut off.
fn made(input: &mut Input<'_>) -> Frame {
    let how = input.byte();
    let v6 = how & 1 != 0;
    let l3 = if how & 2 == 0 { 14 } else { 0 };
    let mut bytes = vec![0x02; l3];
    let packet = ip_packet(input, v6, 0);
    bytes.extend(packet);
    for _ in 0..how >> 2 & 3 {
        let (at, byte) = (usize::from(input.u16()), input.byte());
        let at = at % bytes.len();
        bytes[at] = byte;
    }
    if how & 0x10 != 0 {
        bytes.truncate(usize::from(input.u16()) % bytes.len());
    }
    Frame { bytes, l3, v6 }
}

fn ip_packet(input: &mut Input<'_>, v6: bool, depth: u8) -> Vec<u8> {
    let addr = |input: &mut Input<'_>| input.one_of(&ADDRESSES[usize::from(v6)]).parse::<IpAddr>().unwrap();
    let (from, to) = (addr(input), addr(input));
    let proto = input.one_of(&PROTOCOLS);
    let words = usize::from(input.byte() & 3);
    let fragment = input.byte();
    let mut l4 = segment(input, v6, proto, depth);
    let pseudo = match proto {
        protocol::ICMP => Vec::new(),
        _ => [octets(from), octets(to), vec![0, proto], (l4.len() as u16).to_be_bytes().to_vec()].concat(),
    };
    if let Some(at) = checksum_at(proto).filter(|at| at + 2 <= l4.len()) {
        let sum = !sum(&[&pseudo, &l4]);
        let sum = if proto == protocol::UDP && sum == 0 { 0xffff } else { sum };
        // A datagram without a checksum, where the first byte of the payload says so.
        let sum = if proto == protocol::UDP && l4.get(8) == Some(&0) { 0 } else { sum };
        l4[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    // None, the first, a later one.
    let (offset, more) = [(0, 0), (0, 1), (8, 1), (0, 0)][usize::from(fragment & 3)];
    let id = fragment >> 2 & 1;
    if v6 {
        let mut next = proto;
        let mut extensions = Vec::new();
        if offset + more > 0 {
            extensions.splice(0..0, [next, 0, 0, offset | more, 0, 0, 0, id]);
            next = 44;
        }
        for _ in 0..words {
            extensions.splice(0..0, [next, 0, 1, 4, 0, 0, 0, 0]);
            next = 60;
        }
        let length = (extensions.len() + l4.len()) as u16;
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(length.to_be_bytes());
        header.extend([next, 64]);
        [header, octets(from), octets(to), extensions, l4].concat()
    } else {
        let options = words * 4;
        let length = (20 + options + l4.len()) as u16;
        let mut header = vec![0x45 + words as u8, 0];
        header.extend(length.to_be_bytes());
        header.extend([0, id, more << 5, offset >> 3, 64, proto, 0, 0]);
        header.extend([octets(from), octets(to), vec![1; options]].concat());
        let sum = !sum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        [header, l4].concat()
    }
}

fn segment(input: &mut Input<'_>, v6: bool, proto: u8, depth: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    match proto {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            bytes.extend(input.one_of(&PORTS).to_be_bytes());
            bytes.extend(input.one_of(&PORTS).to_be_bytes());
            match proto {
                protocol::TCP => bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, input.byte(), 0x20, 0, 0, 0, 0, 0]),
                protocol::UDP => bytes.extend([0, 12, 0, 0]),
                _ => bytes.extend([0; 8]),
            }
        }
        protocol::ICMP | protocol::ICMPV6 if depth == 0 => {
            let kind = if v6 { input.one_of(&[1, 2, 3, 4, 128, 135]) } else { input.one_of(&[3, 11, 12, 4, 5, 8]) };
            bytes.extend([kind, input.byte() & 7, 0, 0, 0, 0, 5, 0]);
            bytes.extend(ip_packet(input, v6, 1));
        }
        _ => {}
    }
    let length = usize::from(input.byte());
    bytes.extend(input.take(length));
    bytes
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

const fn checksum_at(proto: u8) -> Option<usize> {
    match proto {
        protocol::TCP => Some(16),
        protocol::UDP => Some(6),
        protocol::ICMP | protocol::ICMPV6 => Some(2),
        _ => None,
    }
}

/// The one's complement sum of parts, each of which begins at an even place.
fn sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u64 =
        words.map(|word| u64::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The headers of a frame, if they can be read.
fn headers(frame: &Frame) -> Option<Headers> {
    let mut headers = Headers::NONE;
    parse(&frame.bytes, frame.l3, frame.v6, &mut headers).map(|()| headers)
}

/// By how much the checksums of a packet are wrong: no translation may change that.
fn errors(bytes: &Vec<u8>, l3: usize, v6: bool) -> Vec<u32> {
    // 0 and 0xffff are one number.
    let wrong = |parts: &[&[u8]]| u32::from(sum(parts) % 0xffff);
    let mut headers = Headers::NONE;
    let readable = parse(bytes, l3, v6, &mut headers);
    let mut errors = Vec::new();
    if readable.is_none() || headers.l4 > bytes.len() {
        return errors;
    }
    let addresses = if v6 { &bytes[l3 + 8..l3 + 40] } else { &bytes[l3 + 12..l3 + 20] };
    if !v6 {
        errors.push(wrong(&[&bytes[l3..headers.l4]]));
    }
    if headers.part == Part::Later {
        return errors;
    }
    let l4 = &bytes[headers.l4..];
    let [high, low] = (l4.len() as u16).to_be_bytes();
    let pseudo = [addresses, &[0, headers.proto, high, low]].concat();
    match headers.proto {
        protocol::TCP if l4.len() >= 18 => errors.push(wrong(&[&pseudo, l4])),
        protocol::UDP if l4.len() >= 8 && l4[6..8] != [0, 0] => errors.push(wrong(&[&pseudo, l4])),
        protocol::ICMP if l4.len() >= 8 && !v6 => errors.push(wrong(&[l4])),
        protocol::ICMPV6 if l4.len() >= 8 && v6 => errors.push(wrong(&[&pseudo, l4])),
        protocol::SCTP if headers.part == Part::Whole => errors.extend(sctp_error(&bytes[l3..], headers.l4 - l3, v6)),
        _ => {}
    }
    errors
}

/// The bits of SCTP's checksum that are wrong; `None` for a packet that says it is longer than it is.
fn sctp_error(packet: &[u8], l4: usize, v6: bool) -> Option<u32> {
    let length = if v6 { [packet[4], packet[5]] } else { [packet[2], packet[3]] };
    let length = usize::from(u16::from_be_bytes(length)) + if v6 { 40 } else { 0 };
    let segment = packet.get(l4..length)?;
    let stored = u32::from_le_bytes(*segment.get(8..)?.first_chunk()?);
    // A sender that leaves it to the device writes 0, which stays.
    if stored == 0 {
        return Some(0);
    }
    let mut digest = CRC32C.digest();
    digest.update(&segment[..8]);
    digest.update(&[0; 4]);
    digest.update(&segment[12..]);
    Some(stored ^ digest.finalize())
}

/// What a hook may have done to a frame.
fn judge(before: &Frame, after: &Frame, action: Action, hook: &str) {
    let says = || format!("{hook}: {action:?}\nbefore {:02x?}\nafter  {:02x?}", before.bytes, after.bytes);
    match action {
        Action::Drop(_) => {}
        Action::Answer(reason) => {
            assert_eq!(reason.verdict(), Verdict::Refuse, "{}", says());
            let (asked, answer) = (headers(before).unwrap(), headers(after).unwrap());
            assert_eq!(answer.dst, asked.src, "{}", says());
            assert!(errors(&after.bytes, after.l3, after.v6).iter().all(|wrong| *wrong == 0), "{}", says());
            let length = if after.v6 {
                [after.bytes[after.l3 + 4], after.bytes[after.l3 + 5]]
            } else {
                [after.bytes[after.l3 + 2], after.bytes[after.l3 + 3]]
            };
            let length = usize::from(u16::from_be_bytes(length)) + if after.v6 { 40 } else { 0 };
            assert_eq!(after.l3 + length, after.bytes.len(), "{}", says());
        }
        Action::Next(reason) | Action::Bridge(_, reason) => {
            assert_eq!(before.bytes.len(), after.bytes.len(), "{}", says());
            if reason.verdict() != Verdict::Translate {
                assert_eq!(before.bytes, after.bytes, "{}", says());
                return;
            }
            let (old, new) = (headers(before).unwrap(), headers(after).unwrap());
            assert_eq!(
                (old.l4, old.proto, old.part, old.tcp, old.id),
                (new.l4, new.proto, new.part, new.tcp, new.id),
                "{}",
                says()
            );
            assert_eq!(
                errors(&before.bytes, before.l3, before.v6),
                errors(&after.bytes, after.l3, after.v6),
                "{}",
                says()
            );
            let untouched = match (old.part, old.proto) {
                (Part::Later, _) => old.l4,
                (_, protocol::UDP) => old.l4 + 8,
                (_, protocol::TCP) => old.l4 + 18,
                (_, protocol::SCTP) => old.l4 + 12,
                _ => after.bytes.len(),
            };
            let untouched = untouched.min(before.bytes.len());
            assert_eq!(before.bytes[untouched..], after.bytes[untouched..], "{}", says());
            assert_eq!(before.bytes[..before.l3], after.bytes[..before.l3], "{}", says());
        }
    }
}

fn enter(machine: &mut Machine, device: u32, frame: &mut Frame) -> Action {
    let before = frame.clone();
    let hook =
        Hook { device, link_header: frame.l3, v6: frame.v6, translated: false, finished: false, from_node: false };
    let action = ingress(&mut frame.bytes, &hook, &mut Scratch::NEW.clone(), machine);
    judge(&before, frame, action, "ingress");
    action
}

fn leave(machine: &mut Machine, device: u32, frame: &mut Frame, from_node: bool) -> Action {
    let before = frame.clone();
    let hook = Hook { device, link_header: frame.l3, v6: frame.v6, translated: false, finished: false, from_node };
    let action = egress(&mut frame.bytes, &hook, &mut Scratch::NEW.clone(), machine);
    judge(&before, frame, action, "egress");
    action
}

/// A frame in by one device and out by another, and what the endpoint answers to it the same way back.
fn cross(machine: &mut Machine, mut frame: Frame) {
    let sent = frame.clone();
    let entered = enter(machine, INSIDE, &mut frame);
    let (Action::Next(reason), Some(asked)) = (entered, headers(&sent)) else { return };
    if !matches!(leave(machine, UPLINK, &mut frame, false), Action::Next(_)) {
        return;
    }
    let translated = matches!(reason, Reason::NewFlow | Reason::Established | Reason::MidFlow);
    let with_checksum = match asked.proto {
        protocol::TCP => true,
        protocol::UDP => sent.bytes.get(asked.l4 + 6..asked.l4 + 8).is_some_and(|sum| sum != [0, 0]),
        _ => false,
    };
    let client = ADDRESSES[usize::from(sent.v6)][..CLIENTS]
        .iter()
        .any(|text| Addr::from(text.parse::<IpAddr>().unwrap()) == asked.src);
    if !translated || !with_checksum || !client || asked.part != Part::Whole {
        return;
    }
    let mut answer = turned(&frame);
    let there = headers(&frame).unwrap();
    let ends = |headers: &Headers| {
        (
            SocketAddr::new(headers.src.into(), headers.sport.number()),
            SocketAddr::new(headers.dst.into(), headers.dport.number()),
        )
    };
    let says = || format!("{:?} became {:?}", ends(&asked), ends(&there));
    assert!(matches!(enter(machine, UPLINK, &mut answer), Action::Next(_)), "{}", says());
    assert!(matches!(leave(machine, INSIDE, &mut answer, false), Action::Next(_)), "{}", says());
    let mut expected = turned(&sent);
    for frame in [&mut answer, &mut expected] {
        let at = asked.l4 + if asked.proto == protocol::TCP { 16 } else { 6 };
        if frame.bytes[at..at + 2] == [0xff, 0xff] {
            frame.bytes[at..at + 2].fill(0);
        }
        if !frame.v6 && frame.bytes[frame.l3 + 10..frame.l3 + 12] == [0xff, 0xff] {
            frame.bytes[frame.l3 + 10..frame.l3 + 12].fill(0);
        }
    }
    assert_eq!(answer.bytes, expected.bytes, "{}", says());
}

/// The same packet from the other end; what is TCP acknowledges.
fn turned(frame: &Frame) -> Frame {
    let mut turned = frame.clone();
    let headers = headers(frame).unwrap();
    let (at, length) = if frame.v6 { (frame.l3 + 8, 16) } else { (frame.l3 + 12, 4) };
    turned.bytes[at..at + 2 * length].rotate_left(length);
    turned.bytes[headers.l4..headers.l4 + 4].rotate_left(2);
    if headers.proto == protocol::TCP {
        let at = headers.l4 + 12;
        let old = u16::from_be_bytes([frame.bytes[at], frame.bytes[at + 1]]);
        let new = old & 0xff00 | u16::from(tcp_flags::ACK);
        turned.bytes[at..at + 2].copy_from_slice(&new.to_be_bytes());
        let sum_at = headers.l4 + 16;
        let checksum = u16::from_be_bytes([frame.bytes[sum_at], frame.bytes[sum_at + 1]]);
        let mut sum = u32::from(!checksum) + u32::from(!old) + u32::from(new);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        turned.bytes[sum_at..sum_at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    turned
}
