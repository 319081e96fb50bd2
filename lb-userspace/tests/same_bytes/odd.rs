//! Odd packets through the programs in the kernel: one that goes on is, byte for byte, the packet that its sender would have made for
//! the endpoint; every other is left as it is, or dropped. The host's half does the same.

use std::net::SocketAddr;

use lb_common::memory::Machine;

use crate::{
    Loaded, Way,
    frames::{Ends, TCP, UDP, checksum, fragment, pseudo_header, v4, v6},
    in_a_namespace, run_here,
};

/// What the programs answer.
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const ANSWER: u32 = 7;

/// Makes a frame for two ends.
type Make = Box<dyn Fn(&Ends) -> Vec<u8>>;

/// What becomes of a client's packet to a ClusterIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It goes to an endpoint, and the endpoint's, made likewise, to the client.
    Forwarded,
    /// It goes to an endpoint, which would not answer with the like.
    OneWay,
    /// It stays as it is.
    Passed,
    /// It is dropped, or refused.
    Ended,
}
use Fate::{Ended, Forwarded, OneWay, Passed};

/// A transport header with its checksum, and data behind it.
fn segment(ends: &Ends, flags: u8, options: usize, data: usize) -> Vec<u8> {
    let ports = [ends.from.port(), ends.to.port()].map(u16::to_be_bytes).concat();
    let (mut segment, at) = if ends.proto == TCP {
        let header =
            [&ports[..], &[1, 2, 3, 4, 5, 6, 7, 8, (5 + options as u8) << 4, flags, 0xff, 0, 0, 0, 0, 9]].concat();
        ([header, vec![1; 4 * options]].concat(), 16)
    } else {
        ([&ports[..], &(8 + data as u16).to_be_bytes(), &[0, 0]].concat(), 6)
    };
    segment.extend((0..data).map(|byte| byte as u8));
    let sum = match checksum(&[&pseudo_header(ends, segment.len()), &segment]) {
        0 if ends.proto == UDP => 0xffff,
        sum => sum,
    };
    segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    segment
}

fn packet(ends: &Ends, segment: &[u8]) -> Vec<u8> {
    if ends.from.is_ipv4() { v4(ends, 0x4000, 7, 0, segment) } else { v6(ends, ends.proto, segment) }
}

/// IPv6 with extension headers: kind, and 8-byte units behind the first.
fn extended(ends: &Ends, kinds: &[(u8, u8)], segment: &[u8]) -> Vec<u8> {
    let mut payload = segment.to_vec();
    let mut next = ends.proto;
    for &(kind, units) in kinds.iter().rev() {
        let mut header = match kind {
            // Of these the length is in units of four bytes, less two.
            51 => vec![next, units * 2, 0, 0, 0, 0, 0, 0],
            44 => vec![next, 0, 0, 0, 0, 0, 0, 9],
            // Padding; a routing header without segments left.
            _ => vec![next, units, 0, 0, 0, 0, 0, 0],
        };
        header.extend(vec![0; 8 * usize::from(units)]);
        payload = [header, payload].concat();
        next = kind;
    }
    v6(ends, next, &payload)
}

/// Says another length in the IP header.
fn with_length(mut frame: Vec<u8>, length: u16) -> Vec<u8> {
    if frame[12] == 0x08 {
        frame[16..18].copy_from_slice(&length.to_be_bytes());
        frame[24..26].fill(0);
        let header = 14 + 4 * usize::from(frame[14] & 0xf);
        let sum = checksum(&[&frame[14..header.max(34)]]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        frame[18..20].copy_from_slice(&length.to_be_bytes());
    }
    frame
}

/// Name, protocol, fate, frame.
fn odd(is_v4: bool) -> Vec<(String, u8, Fate, Make)> {
    let mut table: Vec<(String, u8, Fate, Make)> = Vec::new();
    let mut add = |name: &str, proto: u8, fate: Fate, make: Make| table.push((name.to_owned(), proto, fate, make));

    // Whatever is between the IP header and the ports.
    for proto in [TCP, UDP] {
        let first = move |ends: &Ends| segment(ends, 0x02, 2, 20);
        if is_v4 {
            for options in (4..=40).step_by(4) {
                let name = format!("{options} bytes of options");
                add(&name, proto, Forwarded, Box::new(move |ends| v4(ends, 0x4000, 7, options, &first(ends))));
            }
            for (name, fragment) in [("may be fragmented", 0), ("the evil bit (RFC 3514)", 0x8000)] {
                add(name, proto, Forwarded, Box::new(move |ends| v4(ends, fragment, 7, 0, &first(ends))));
            }
            for length in 0..5 {
                let make = move |ends: &Ends| {
                    let mut frame = packet(ends, &first(ends));
                    frame[14] = 0x40 + length;
                    frame
                };
                add(&format!("an IP header of {length} words"), proto, Passed, Box::new(make));
            }
        } else {
            let kinds: [&[(u8, u8)]; 9] = [
                &[(0, 0)],
                &[(60, 0)],
                &[(60, 3)],
                &[(43, 0)],
                &[(51, 2)],
                &[(44, 0)],
                &[(0, 1), (60, 0), (43, 1), (44, 0), (51, 1), (60, 2)],
                &[(60, 9), (60, 9), (60, 9)],
                &[(0, 0), (44, 0)],
            ];
            for kinds in kinds {
                let name = format!("extension headers {kinds:?}");
                add(&name, proto, Forwarded, Box::new(move |ends| extended(ends, kinds, &first(ends))));
            }
            let too_many: [&[(u8, u8)]; 3] = [&[(60, 0); 7], &[(60, 30), (60, 30)], &[(60, 255)]];
            for kinds in too_many {
                let name = format!("too many extension headers {kinds:?}");
                add(&name, proto, Passed, Box::new(move |ends| extended(ends, kinds, &first(ends))));
            }
            let to_go = move |ends: &Ends| {
                let mut frame = extended(ends, &[(43, 2)], &first(ends));
                frame[57] = 1;
                frame
            };
            add("a routing header with a segment left", proto, Passed, Box::new(to_go));
            let class = move |ends: &Ends| {
                let mut frame = packet(ends, &first(ends));
                frame[14..18].copy_from_slice(&[0x6f, 0xff, 0xff, 0xff]);
                frame
            };
            add("a traffic class and a flow label", proto, Forwarded, Box::new(class));
        }
        let other = move |ends: &Ends| {
            let mut frame = packet(ends, &first(ends));
            frame[14] ^= 0x20;
            frame
        };
        add("the other family's version", proto, Passed, Box::new(other));
        let padded = move |ends: &Ends| [packet(ends, &segment(ends, 0x02, 0, 0)), vec![0xee; 18]].concat();
        add("padding behind the packet", proto, Forwarded, Box::new(padded));
        // The ports stand there, but they are not the packet's.
        let ip = if is_v4 { 20 } else { 0 };
        let least = if proto == TCP { 14 } else { 4 };
        for inside in [1, 3, least - 1] {
            let make = move |ends: &Ends| with_length(packet(ends, &first(ends)), ip + inside);
            add(&format!("{inside} bytes behind the IP header, and padding"), proto, Passed, Box::new(make));
        }
    }

    // What a transport header may say.
    for flags in 0..=255_u8 {
        // Only a SYN opens a connection; the middle of one that is not known goes where a new one would.
        let make = move |ends: &Ends| packet(ends, &segment(ends, flags, 0, 3));
        let fate = if flags & 2 != 0 && flags & 5 != 0 { OneWay } else { Forwarded };
        add(&format!("TCP flags {flags:#04x}"), TCP, fate, Box::new(make));
    }
    for offset in [0_u8, 4, 15] {
        let make = move |ends: &Ends| {
            let mut segment = segment(ends, 0x02, 0, 0);
            segment[12] = offset << 4;
            segment[16..18].fill(0);
            let sum = checksum(&[&pseudo_header(ends, segment.len()), &segment]);
            segment[16..18].copy_from_slice(&sum.to_be_bytes());
            packet(ends, &segment)
        };
        add(&format!("a TCP header of {offset} words"), TCP, Forwarded, Box::new(make));
    }
    let silent = |ends: &Ends| {
        let mut segment = segment(ends, 0, 0, 9);
        segment[6..8].fill(0);
        packet(ends, &segment)
    };
    add("UDP without checksum", UDP, Forwarded, Box::new(silent));
    add("UDP without data", UDP, Forwarded, Box::new(|ends| packet(ends, &segment(ends, 0, 0, 0))));
    // Sums where zero is near.
    for word in [0_u16, 1, 0xfffe, 0xffff] {
        let make = move |ends: &Ends| {
            let mut segment = segment(ends, 0, 0, 2);
            segment[6..8].fill(0);
            segment[8..10].copy_from_slice(&word.to_be_bytes());
            let sum = checksum(&[&pseudo_header(ends, segment.len()), &segment]);
            let sum = if sum == 0 { 0xffff } else { sum };
            segment[6..8].copy_from_slice(&sum.to_be_bytes());
            packet(ends, &segment)
        };
        add(&format!("UDP with the data {word:#06x}"), UDP, Forwarded, Box::new(make));
    }
    // As long as a test run may be.
    for proto in [TCP, UDP] {
        add("a long packet", proto, Forwarded, Box::new(|ends| packet(ends, &segment(ends, 0x02, 0, 3000))));
    }
    // Fragments of which the first was not seen.
    for proto in [TCP, UDP] {
        let later = |ends: &Ends| fragment(ends, 77, 1480, false, &[7; 24]);
        add("a later fragment alone", proto, Ended, Box::new(later));
        let last = |ends: &Ends| fragment(ends, 77, 65_528, true, &[7; 24]);
        add("a fragment beyond every packet's end", proto, Ended, Box::new(last));
        // Too short for the ports: nobody knows whose it is.
        let tiny = |ends: &Ends| fragment(ends, 78, 0, true, &segment(ends, 0x02, 0, 0)[..2]);
        add("a first fragment without ports", proto, Passed, Box::new(tiny));
    }
    table
}

/// Both halves, one after the other.
struct Halves {
    kernel: Loaded,
    here: Machine,
}

impl Halves {
    fn new() -> Self {
        let kernel = Loaded::new();
        let here = Machine { tables: kernel.pinned.memory().unwrap(), ..Machine::default() };
        Self { kernel, here }
    }

    fn run(&mut self, what: &str, way: Way, frame: &[u8]) -> (u32, Vec<u8>) {
        let mut frame = frame.to_vec();
        frame[..6].fill(0);
        let here = run_here(&mut self.here, way, &frame);
        let there = self.kernel.run(way, &frame);
        let is_same = here.0 == there.0 && here.1 == there.1 && (here.0 == DROP || here.2 == there.2);
        assert!(is_same, "{what}, {way:?}:\n  {frame:02x?}\nhere   {here:02x?}\nkernel {there:02x?}");
        (there.0, there.2)
    }
}

/// A client, the ClusterIP, the endpoints.
fn places(is_v4: bool) -> (SocketAddr, SocketAddr, Vec<SocketAddr>) {
    let [client, service, one, other] = if is_v4 {
        ["10.244.1.7:40000", "10.96.0.10:80", "10.244.1.11:8080", "10.244.2.11:8080"]
    } else {
        ["[fd00:10:244:1::7]:40000", "[fd00:10:96::a]:80", "[fd00:10:244:1::11]:8080", "[fd00:10:244:2::11]:8080"]
    };
    (client.parse().unwrap(), service.parse().unwrap(), vec![one.parse().unwrap(), other.parse().unwrap()])
}

#[test]
fn odd_packets_are_forwarded_right_or_left_alone() {
    in_a_namespace(|| {
        for is_v4 in [true, false] {
            let mut halves = Halves::new();
            let (client, service, endpoints) = places(is_v4);
            let mut wrong = Vec::new();
            for (port, (name, proto, fate, make)) in (10_000..).zip(odd(is_v4)) {
                let what = format!(
                    "{} over {}, {name}",
                    if proto == TCP { "TCP" } else { "UDP" },
                    if is_v4 { "IPv4" } else { "IPv6" }
                );
                let client = SocketAddr::new(client.ip(), port);
                let before = make(&Ends { from: client, to: service, proto });
                let (verdict, after) = halves.run(&what, Way::In, &before);
                let chosen = endpoints.iter().find(|&&to| make(&Ends { from: client, to, proto })[14..] == after[14..]);
                let is = match (verdict, chosen) {
                    (NEXT, Some(_)) if fate == OneWay => Some(OneWay),
                    (NEXT, Some(_)) => Some(Forwarded),
                    (NEXT, None) if after[14..] == before[14..] => Some(Passed),
                    (DROP | ANSWER, _) => Some(Ended),
                    _ => None,
                };
                if is != Some(fate) {
                    wrong.push(format!("{what}: {is:?}, not {fate:?}: {verdict}\n  {before:02x?}\n  {after:02x?}"));
                    continue;
                }
                let Some(&endpoint) = chosen else { continue };
                // On its way out it stays as it is, and the endpoint's like it comes from the Service.
                assert_eq!(halves.run(&what, Way::Out, &after), (NEXT, after.clone()), "{what}");
                if fate == OneWay {
                    continue;
                }
                let answer = make(&Ends { from: endpoint, to: client, proto });
                let (verdict, answer) = halves.run(&what, Way::Out, &answer);
                let want = make(&Ends { from: service, to: client, proto });
                if verdict != NEXT || answer[14..] != want[14..] {
                    wrong.push(format!("{what}: the answer: {verdict}\n  {want:02x?}\n  {answer:02x?}"));
                }
            }
            assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
        }
    });
}

#[test]
fn a_packet_that_is_cut_off_at_any_length_is_forwarded_right_or_left_alone_or_dropped() {
    in_a_namespace(|| {
        for is_v4 in [true, false] {
            let mut halves = Halves::new();
            let (client, service, endpoints) = places(is_v4);
            let mut forwarded = 0;
            for proto in [TCP, UDP] {
                let make = |ends: &Ends| {
                    let segment = segment(ends, 0x02, 3, 12);
                    if is_v4 { v4(ends, 0x4000, 7, 12, &segment) } else { extended(ends, &[(0, 0), (60, 1)], &segment) }
                };
                let whole = make(&Ends { from: client, to: service, proto });
                // BPF_PROG_TEST_RUN wants an IP header at least.
                for length in if is_v4 { 34 } else { 54 }..=whole.len() {
                    let client = SocketAddr::new(client.ip(), 20_000 + length as u16);
                    let before = &make(&Ends { from: client, to: service, proto })[..length];
                    let what = format!("{proto}, {length} bytes of {}", whole.len());
                    let (verdict, after) = halves.run(&what, Way::In, before);
                    let is_right =
                        endpoints.iter().any(|&to| make(&Ends { from: client, to, proto })[14..length] == after[14..]);
                    forwarded += u32::from(verdict == NEXT && is_right);
                    let is_left = verdict == DROP || verdict == NEXT && after[14..] == before[14..];
                    assert!(is_left || verdict == NEXT && is_right, "{what}: {verdict}\n{before:02x?}\n{after:02x?}");
                }
            }
            // Data may be missing, and options of TCP.
            assert!(forwarded > 20, "{forwarded}");
        }
    });
}
