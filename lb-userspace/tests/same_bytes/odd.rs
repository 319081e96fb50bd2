//! Odd packets through the programs in the kernel: one that goes on is, byte for byte, the packet that its sender would have made for
//! the endpoint; every other is left as it is, or dropped. The host's half does the same.

use std::net::SocketAddr;

use crate::{
    DROP, Halves, NEXT, Way,
    frames::{Ends, NODE_V4, NODE_V6, TCP, UDP, checksum, ends_of, fragment, pseudo_header, v4, v6},
    in_a_namespace,
};

/// Makes a frame for two ends.
type Make = Box<dyn Fn(&Ends) -> Vec<u8>>;

/// What becomes of a client's packet to a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It goes to an endpoint, and the endpoint's, made likewise, to the client.
    Forwarded,
    /// It goes to an endpoint, which would not answer with the like.
    OneWay,
    /// It stays as it is.
    Passed,
    /// Nobody knows whose it is: at an address that only a Service has it is dropped, elsewhere it stays as it is.
    Orphan,
}
use Fate::{Forwarded, OneWay, Orphan, Passed};

/// A transport header with its checksum, and data behind it.
pub fn segment(ends: &Ends, flags: u8, options: usize, data: usize) -> Vec<u8> {
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

pub fn packet(ends: &Ends, segment: &[u8]) -> Vec<u8> {
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
        add("a later fragment alone", proto, Orphan, Box::new(later));
        let last = |ends: &Ends| fragment(ends, 77, 65_528, true, &[7; 24]);
        add("a fragment beyond every packet's end", proto, Orphan, Box::new(last));
        // Too short for the ports: nobody knows whose it is.
        let tiny = |ends: &Ends| fragment(ends, 78, 0, true, &segment(ends, 0x02, 0, 0)[..2]);
        add("a first fragment without ports", proto, Passed, Box::new(tiny));
    }
    table
}

/// Who asks whom by what.
struct Route {
    client: SocketAddr,
    service: SocketAddr,
    endpoints: Vec<SocketAddr>,
    /// A ClusterIP, which nobody else has; else an address of a load balancer, where the endpoint sees the node.
    is_cluster_ip: bool,
}

/// A pod that asks a ClusterIP, and a client outside that asks a load balancer's address.
fn routes(is_v4: bool) -> [Route; 2] {
    let [pod, cluster_ip, outside, load_balancer, one, other] = if is_v4 {
        ["10.244.1.7", "10.96.0.10", "198.51.100.9", "10.99.1.10", "10.244.1.11", "10.244.2.11"]
    } else {
        ["fd00:10:244:1::7", "fd00:10:96::a", "2001:db8:9::9", "fd00:99:1::a", "fd00:10:244:1::11", "fd00:10:244:2::11"]
    };
    let at = |text: &str, port| SocketAddr::new(text.parse().unwrap(), port);
    [(pod, cluster_ip, true), (outside, load_balancer, false)].map(|(client, service, is_cluster_ip)| Route {
        client: at(client, 40_000),
        service: at(service, 80),
        endpoints: vec![at(one, 8080), at(other, 8080)],
        is_cluster_ip,
    })
}

impl Route {
    /// The endpoint whose packet this is, made likewise.
    fn chosen(
        &self,
        client: SocketAddr,
        proto: u8,
        make: &dyn Fn(&Ends) -> Vec<u8>,
        after: &[u8],
    ) -> Option<SocketAddr> {
        let is_for = |to: &SocketAddr| make(&Ends { from: client, to: *to, proto })[14..] == after[14..];
        self.endpoints.iter().copied().find(is_for)
    }

    /// The client as the endpoint knows it, by the packet that left.
    fn source(&self, client: SocketAddr, left: &[u8]) -> SocketAddr {
        if self.is_cluster_ip {
            return client;
        }
        let source = ends_of(left).unwrap().from;
        assert_eq!(source.ip(), if client.is_ipv4() { NODE_V4 } else { NODE_V6 });
        source
    }
}

#[test]
fn odd_packets_are_forwarded_right_or_left_alone() {
    in_a_namespace(|| {
        for (is_v4, route) in [true, false].into_iter().flat_map(|is_v4| routes(is_v4).map(|route| (is_v4, route))) {
            let mut halves = Halves::new();
            let mut wrong = Vec::new();
            for (port, (name, proto, fate, make)) in (10_000..).zip(odd(is_v4)) {
                let what = format!("{} to {}, {name}", if proto == TCP { "TCP" } else { "UDP" }, route.service.ip());
                let client = SocketAddr::new(route.client.ip(), port);
                let before = make(&Ends { from: client, to: route.service, proto });
                let (verdict, after) = halves.run(&what, Way::In, &before);
                let chosen = route.chosen(client, proto, &make, &after);
                let is = match (verdict, chosen) {
                    (NEXT, Some(_)) if fate == OneWay => Some(OneWay),
                    (NEXT, Some(_)) => Some(Forwarded),
                    (NEXT, None) if after[14..] == before[14..] => {
                        Some(if fate == Orphan && !route.is_cluster_ip { Orphan } else { Passed })
                    }
                    (DROP, _) if route.is_cluster_ip => Some(Orphan),
                    _ => None,
                };
                if is != Some(fate) {
                    wrong.push(format!("{what}: {is:?}, not {fate:?}: {verdict}\n  {before:02x?}\n  {after:02x?}"));
                    continue;
                }
                let Some(endpoint) = chosen else { continue };
                let (verdict, left) = halves.run(&what, Way::Out, &after);
                let source = route.source(client, &left);
                let want = make(&Ends { from: source, to: endpoint, proto });
                if verdict != NEXT || left[14..] != want[14..] {
                    wrong.push(format!("{what}: on its way out: {verdict}\n  {want:02x?}\n  {left:02x?}"));
                }
                if fate == OneWay {
                    continue;
                }
                // The endpoint's like it comes from the Service.
                let (verdict, answer) = halves.run(&what, Way::In, &make(&Ends { from: endpoint, to: source, proto }));
                let want = make(&Ends { from: endpoint, to: client, proto });
                if verdict != NEXT || answer[14..] != want[14..] {
                    wrong.push(format!("{what}: the answer inside: {verdict}\n  {want:02x?}\n  {answer:02x?}"));
                }
                let (verdict, answer) = halves.run(&what, Way::Out, &answer);
                let want = make(&Ends { from: route.service, to: client, proto });
                if verdict != NEXT || answer[14..] != want[14..] {
                    wrong.push(format!("{what}: the answer: {verdict}\n  {want:02x?}\n  {answer:02x?}"));
                }
            }
            assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
        }
    });
}

/// The fragments of a packet of 20 + 8 * 25 bytes behind the IP header, in their order.
fn fragments(ends: &Ends, id: u32) -> Vec<Vec<u8>> {
    let data = if ends.proto == TCP { 200 } else { 212 };
    let parts = segment(ends, 0x18, 0, data);
    let places = [(0, 80), (80, 160), (160, 220)];
    places.map(|(from, to)| fragment(ends, id, from as u16, to < 220, &parts[from..to])).to_vec()
}

#[test]
fn fragments_go_where_their_first_goes_in_any_order() {
    const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0]];
    in_a_namespace(|| {
        for (is_v4, proto) in [(true, TCP), (true, UDP), (false, TCP), (false, UDP)] {
            for route in routes(is_v4) {
                let mut halves = Halves::new();
                for (number, order) in (0..).zip(ORDERS) {
                    let what = format!("{proto} to {}, {order:?}", route.service.ip());
                    let client = SocketAddr::new(route.client.ip(), 10_000 + number);
                    // The connection is there.
                    let make = |ends: &Ends| packet(ends, &segment(ends, 0x02, 0, 0));
                    let (_, entered) =
                        halves.run(&what, Way::In, &make(&Ends { from: client, to: route.service, proto }));
                    let endpoint = route.chosen(client, proto, &make, &entered).unwrap();
                    let (_, left) = halves.run(&what, Way::Out, &entered);
                    let source = route.source(client, &left);
                    let id = 100 + u32::from(number);
                    // There and back: as it comes, inside, as it leaves.
                    for [before, inside, after] in [
                        [(client, route.service), (client, endpoint), (source, endpoint)],
                        [(endpoint, source), (endpoint, client), (route.service, client)],
                    ] {
                        let all = [before, inside, after].map(|(from, to)| fragments(&Ends { from, to, proto }, id));
                        let mut is_known = false;
                        for at in order {
                            is_known |= at == 0;
                            let (verdict, entered) = halves.run(&what, Way::In, &all[0][at]);
                            let is_orphan = !is_known && before != inside;
                            if is_orphan && before.1 == route.service && route.is_cluster_ip {
                                assert_eq!(verdict, DROP, "{what}, {at} of {before:?}");
                                continue;
                            }
                            let want = if is_orphan { &all[0][at] } else { &all[1][at] };
                            assert_eq!(
                                (verdict, &entered[14..]),
                                (NEXT, &want[14..]),
                                "{what}, {at} of {before:?}, in"
                            );
                            if is_orphan {
                                continue;
                            }
                            let (verdict, left) = halves.run(&what, Way::Out, &entered);
                            let want = &all[if !is_known && inside != after { 1 } else { 2 }][at];
                            assert_eq!((verdict, &left[14..]), (NEXT, &want[14..]), "{what}, {at} of {before:?}, out");
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn a_packet_that_is_cut_off_at_any_length_is_forwarded_right_or_left_alone_or_dropped() {
    in_a_namespace(|| {
        for (is_v4, proto) in [(true, TCP), (true, UDP), (false, TCP), (false, UDP)] {
            for route in routes(is_v4) {
                let mut halves = Halves::new();
                let make = |ends: &Ends| {
                    let segment = segment(ends, 0x02, 3, 12);
                    if is_v4 { v4(ends, 0x4000, 7, 12, &segment) } else { extended(ends, &[(0, 0), (60, 1)], &segment) }
                };
                let frame = |from, to| make(&Ends { from, to, proto });
                let whole = frame(route.client, route.service).len();
                // What went on: the first of its connection, one more of it in and out, the answer in and out.
                let mut forwarded = [0; 5];
                // BPF_PROG_TEST_RUN wants an IP header at least.
                for length in if is_v4 { 34 } else { 54 }..=whole {
                    let [new, client] =
                        [20_000, 30_000].map(|port| SocketAddr::new(route.client.ip(), port + length as u16));
                    let (_, entered) = halves.run("opening", Way::In, &frame(client, route.service));
                    let endpoint = route.chosen(client, proto, &make, &entered).unwrap();
                    let (_, left) = halves.run("opening", Way::Out, &entered);
                    let source = route.source(client, &left);
                    let steps = [
                        (Way::In, (new, route.service), route.endpoints.iter().map(|to| (new, *to)).collect()),
                        (Way::In, (client, route.service), vec![(client, endpoint)]),
                        (Way::Out, (client, endpoint), vec![(source, endpoint)]),
                        (Way::In, (endpoint, source), vec![(endpoint, client)]),
                        (Way::Out, (endpoint, client), vec![(route.service, client)]),
                    ];
                    for (step, (way, (from, to), right)) in steps.into_iter().enumerate() {
                        let what = format!("{proto} {client}, step {step}, {length} bytes of {whole}");
                        let before = &frame(from, to)[..length];
                        let (verdict, after) = halves.run(&what, way, before);
                        let is_right = verdict == NEXT
                            && right.iter().any(|(from, to)| frame(*from, *to)[14..length] == after[14..]);
                        forwarded[step] += u32::from(is_right);
                        let is_left = verdict == DROP || verdict == NEXT && after[14..] == before[14..];
                        assert!(is_right || is_left, "{what}: {verdict}\n{before:02x?}\n{after:02x?}");
                    }
                }
                // Data may be missing, and options of TCP.
                assert!(forwarded.iter().all(|it| *it > 10), "{forwarded:?}");
            }
        }
    });
}
