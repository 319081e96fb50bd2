//! ICMP through the programs in the kernel. An error about a connection through a Service becomes, byte for byte, the error that its
//! maker would have made about the packet as its receiver knows it; what is no error of ours is refused, dropped or left alone.

use std::net::{IpAddr, SocketAddr};

use crate::{
    ANSWER, DROP, Halves, NEXT, Way,
    frames::{Ends, NODE_V4, NODE_V6, TCP, UDP, checksum, ends_of, pseudo_header},
    in_a_namespace,
    odd::{packet, segment},
};

const GRE: u8 = 47;

/// An ICMP message of one address to another.
fn message(from: IpAddr, to: IpAddr, kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
    let ends = Ends { from: (from, 0).into(), to: (to, 0).into(), proto: if from.is_ipv4() { 1 } else { 58 } };
    let mut message = [&[kind, code, 0, 0, 0, 0, 5, 0x14], body].concat();
    let pseudo = if from.is_ipv4() { Vec::new() } else { pseudo_header(&ends, message.len()) };
    let sum = checksum(&[&pseudo, &message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    packet(&ends, &message)
}

/// A packet of a connection, as the ends that a place knows make it.
fn seen(ends: &Ends) -> Vec<u8> {
    packet(ends, &segment(ends, 0x10, 2, 40))
}

/// An error about it that quotes so many bytes behind the IP header.
fn error(maker: IpAddr, about: &Ends, (kind, code): (u8, u8), quoted: usize) -> Vec<u8> {
    let header = if maker.is_ipv4() { 20 } else { 40 };
    let packet = &seen(about)[14..];
    message(maker, about.from.ip(), kind, code, &packet[..packet.len().min(header + quoted)])
}

/// Type and code of every error (RFC 792, 1122, 1812, 4443, 7112, 8883).
fn kinds(is_v4: bool) -> Vec<(u8, u8)> {
    let with_codes: &[(u8, u8)] = if is_v4 { &[(3, 15), (11, 1), (12, 2)] } else { &[(1, 8), (2, 0), (3, 1), (4, 10)] };
    with_codes.iter().flat_map(|&(kind, last)| (0..=last).map(move |code| (kind, code))).collect()
}

/// A connection that both sides have spoken on.
struct Connection {
    client: SocketAddr,
    frontend: SocketAddr,
    endpoint: SocketAddr,
    /// The client as the endpoint knows it.
    source: SocketAddr,
    proto: u8,
}

impl Connection {
    fn open(halves: &mut Halves, client: SocketAddr, frontend: SocketAddr, proto: u8) -> Self {
        let request = Ends { from: client, to: frontend, proto };
        let (verdict, entered) = halves.run("opening", Way::In, &packet(&request, &segment(&request, 0x02, 0, 8)));
        assert_eq!(verdict, NEXT);
        let (verdict, left) = halves.run("opening", Way::Out, &entered);
        assert_eq!(verdict, NEXT);
        let Ends { from: source, to: endpoint, .. } = ends_of(&left).unwrap();
        let answer = Ends { from: endpoint, to: source, proto };
        let (verdict, entered) = halves.run("answering", Way::In, &packet(&answer, &segment(&answer, 0x12, 0, 8)));
        assert_eq!(verdict, NEXT);
        let (verdict, left) = halves.run("answering", Way::Out, &entered);
        assert_eq!(verdict, NEXT);
        let Ends { from, to, .. } = ends_of(&left).unwrap();
        assert_eq!((from, to), (frontend, client));
        Self { client, frontend, endpoint, source, proto }
    }

    const fn between(&self, from: SocketAddr, to: SocketAddr) -> Ends {
        Ends { from, to, proto: self.proto }
    }
}

/// Every kind of connection: from a pod to a ClusterIP, and from outside to a NodePort, which is masqueraded.
fn connections(halves: &mut Halves, is_v4: bool) -> Vec<Connection> {
    let texts = if is_v4 {
        [["10.244.1.7:0", "10.96.0.10:80"], ["198.51.100.9:0", "10.99.0.11:30080"]]
    } else {
        [["[fd00:10:244:1::7]:0", "[fd00:10:96::a]:80"], ["[2001:db8:9::9]:0", "[fd00:99::11]:30080"]]
    };
    let mut connections = Vec::new();
    for (proto, [client, frontend]) in [TCP, UDP].into_iter().flat_map(|proto| texts.map(|texts| (proto, texts))) {
        let (mut client, frontend): (SocketAddr, SocketAddr) = (client.parse().unwrap(), frontend.parse().unwrap());
        client.set_port(50_000);
        connections.push(Connection::open(halves, client, frontend, proto));
    }
    let masqueraded = connections.iter().filter(|it| it.source != it.client);
    let node = if is_v4 { NODE_V4 } else { NODE_V6 };
    assert_eq!(masqueraded.filter(|it| it.source.ip() == node).count(), 2);
    connections
}

fn router(is_v4: bool) -> IpAddr {
    if is_v4 { "203.0.113.1" } else { "2001:db8:ff::1" }.parse().unwrap()
}

#[test]
fn an_error_reaches_who_it_is_for_as_if_there_were_no_service() {
    in_a_namespace(|| {
        for is_v4 in [true, false] {
            let mut halves = Halves::new();
            for connection in connections(&mut halves, is_v4) {
                let Connection { client, frontend, endpoint, source, .. } = connection;
                let between = |from, to| connection.between(from, to);
                // Who made it, about what, what it is inside the node, what it is for its receiver.
                let (at, node) = (endpoint.ip(), source.ip());
                let stages = [
                    (
                        at,
                        between(source, endpoint),
                        at,
                        between(client, endpoint),
                        frontend.ip(),
                        between(client, frontend),
                    ),
                    (
                        router(is_v4),
                        between(source, endpoint),
                        router(is_v4),
                        between(client, endpoint),
                        router(is_v4),
                        between(client, frontend),
                    ),
                    (
                        client.ip(),
                        between(frontend, client),
                        client.ip(),
                        between(endpoint, client),
                        node,
                        between(endpoint, source),
                    ),
                    (
                        router(is_v4),
                        between(frontend, client),
                        router(is_v4),
                        between(endpoint, client),
                        router(is_v4),
                        between(endpoint, source),
                    ),
                ];
                for (maker, about, inside, known_inside, from, known) in stages {
                    for (kind, quoted) in
                        kinds(is_v4).into_iter().flat_map(|kind| [8, 20, 28, 500].map(|it| (kind, it)))
                    {
                        let what = format!("{kind:?} of {maker} about {about:?}, quoting {quoted}");
                        let (verdict, entered) = halves.run(&what, Way::In, &error(maker, &about, kind, quoted));
                        let want = error(inside, &known_inside, kind, quoted);
                        assert_eq!((verdict, &entered[14..]), (NEXT, &want[14..]), "{what}, inside");
                        let (verdict, left) = halves.run(&what, Way::Out, &entered);
                        let want = error(from, &known, kind, quoted);
                        assert_eq!((verdict, &left[14..]), (NEXT, &want[14..]), "{what}");
                    }
                    // Whoever believed a redirect would go around the hooks that the connection needs. IPv6's belong to neighbour
                    // discovery.
                    if is_v4 {
                        for code in 0..4 {
                            let frame = error(maker, &about, (5, code), 8);
                            let entered = halves.run("redirect", Way::In, &frame);
                            let left = (entered.0 == NEXT).then(|| halves.run("redirect", Way::Out, &entered.1).0);
                            assert!(entered.0 == DROP || left == Some(DROP), "redirect {code} about {about:?}");
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn what_is_no_error_of_ours_is_refused_or_dropped_or_left_alone() {
    in_a_namespace(|| {
        for is_v4 in [true, false] {
            let mut halves = Halves::new();
            let connections = connections(&mut halves, is_v4);
            let parse = |v4: &str, v6: &str| -> IpAddr { if is_v4 { v4 } else { v6 }.parse().unwrap() };
            let cluster_ip = parse("10.96.0.10", "fd00:10:96::a");
            let free = parse("10.96.0.77", "fd00:10:96::4d");
            let load_balancer = parse("10.99.1.10", "fd00:99:1::a");
            let node = if is_v4 { NODE_V4 } else { NODE_V6 };
            let pod = parse("10.244.1.11", "fd00:10:244:1::11");
            let stranger = parse("192.0.2.1", "2001:db8::1");
            let client = connections[0].client.ip();
            let echo = if is_v4 { 8 } else { 128 };
            let unknown = |to: IpAddr| {
                let ends = Ends { from: (to, 999).into(), to: (client, 998).into(), proto: UDP };
                error(router(is_v4), &ends, if is_v4 { (3, 3) } else { (1, 4) }, 28)
            };
            let gre = |to: IpAddr| packet(&Ends { from: (client, 0).into(), to: (to, 0).into(), proto: GRE }, &[0; 12]);
            let mut table = vec![
                ("echo to a ClusterIP".to_owned(), message(client, cluster_ip, echo, 0, &[7; 9]), ANSWER, DROP),
                (
                    "echo to an address that no Service has".to_owned(),
                    message(client, free, echo, 0, &[7; 9]),
                    DROP,
                    DROP,
                ),
                ("GRE to a ClusterIP".to_owned(), gre(cluster_ip), ANSWER, DROP),
                ("GRE to an address that no Service has".to_owned(), gre(free), DROP, DROP),
                // Never is an error answered by an error (RFC 1122 §3.2.2, RFC 4443 §2.4).
                ("an error about nothing to a ClusterIP".to_owned(), unknown(cluster_ip), DROP, DROP),
                ("an error about nothing to an address that no Service has".to_owned(), unknown(free), DROP, DROP),
            ];
            for to in [load_balancer, node, pod, stranger] {
                table.push((format!("echo to {to}"), message(client, to, echo, 0, &[7; 9]), NEXT, NEXT));
                table.push((format!("GRE to {to}"), gre(to), NEXT, NEXT));
                table.push((format!("an error about nothing to {to}"), unknown(to), NEXT, NEXT));
            }
            if !is_v4 {
                for (kind, to) in
                    (133..=137).flat_map(|kind| [cluster_ip, free, load_balancer, node].map(|to| (kind, to)))
                {
                    let name = format!("neighbour discovery {kind} to {to}");
                    table.push((name, message(client, to, kind, 0, &[0; 16]), NEXT, NEXT));
                }
            }
            for (name, frame, enters, leaves) in table {
                for (way, want) in [(Way::In, enters), (Way::Out, leaves)] {
                    let (verdict, after) = halves.run(&name, way, &frame);
                    assert_eq!(verdict, want, "{name}, {way:?}");
                    assert!(want != NEXT || after[14..] == frame[14..], "{name}, {way:?}: {after:02x?}");
                }
            }
        }
    });
}
