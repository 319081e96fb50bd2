//! Frames as others would send them, and the ends of those that come out.

use core::net::{IpAddr, SocketAddr};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};

use crate::{flow::tcp_flags, packet::Packet as _};

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Segment {
    Tcp(u8),
    Udp,
    /// With this verification tag, and a checksum that is left to the device.
    Sctp(u32),
}

pub(super) fn frame(from: SocketAddr, to: SocketAddr, segment: Segment) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        _ => panic!("two families"),
    };
    let mut bytes = Vec::new();
    match segment {
        Segment::Tcp(flags) => {
            let mut tcp = ip.tcp(from.port(), to.port(), 1000, 64000);
            if flags & tcp_flags::SYN != 0 {
                tcp = tcp.syn();
            }
            if flags & tcp_flags::ACK != 0 {
                tcp = tcp.ack(77);
            }
            if flags & tcp_flags::FIN != 0 {
                tcp = tcp.fin();
            }
            if flags & tcp_flags::RST != 0 {
                tcp = tcp.rst();
            }
            tcp.write(&mut bytes, b"data").unwrap();
        }
        Segment::Udp => ip.udp(from.port(), to.port()).write(&mut bytes, b"data").unwrap(),
        Segment::Sctp(tag) => {
            let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
            let packet = [&ports[..], &tag.to_be_bytes(), &[0; 4], b"data"].concat();
            ip.write(&mut bytes, etherparse::IpNumber::SCTP, &packet).unwrap();
        }
    }
    bytes
}

/// Both ends of a frame, whose checksums must be right.
pub(super) fn ends(frame: &[u8]) -> (SocketAddr, SocketAddr) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let (from, to): (IpAddr, IpAddr) = match sliced.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            (header.source.into(), header.destination.into())
        }
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => panic!("ARP"),
    };
    let Some(transport) = sliced.transport.as_ref() else {
        let bytes = sliced.net.as_ref().unwrap().ip_payload_ref().unwrap().payload;
        let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        return (SocketAddr::new(from, port(0)), SocketAddr::new(to, port(2)));
    };
    let (sport, dport) = match transport {
        TransportSlice::Tcp(tcp) => {
            let sum = match (from, to) {
                (IpAddr::V4(from), IpAddr::V4(to)) => tcp.calc_checksum_ipv4(from.octets(), to.octets()),
                (IpAddr::V6(from), IpAddr::V6(to)) => tcp.calc_checksum_ipv6(from.octets(), to.octets()),
                _ => panic!("two families"),
            };
            assert_eq!(tcp.checksum(), sum.unwrap());
            (tcp.source_port(), tcp.destination_port())
        }
        TransportSlice::Udp(udp) => {
            let header = udp.to_header();
            let sum = match (from, to) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    header.calc_checksum_ipv4_raw(from.octets(), to.octets(), udp.payload())
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => {
                    header.calc_checksum_ipv6_raw(from.octets(), to.octets(), udp.payload())
                }
                _ => panic!("two families"),
            };
            assert_eq!(udp.checksum(), sum.unwrap());
            (udp.source_port(), udp.destination_port())
        }
        _ => panic!("no ports"),
    };
    (SocketAddr::new(from, sport), SocketAddr::new(to, dport))
}

/// An ICMP message, of this type where it is ICMPv6; else an echo request.
pub(super) fn ping(from: IpAddr, to: IpAddr, kind: u8) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let mut bytes = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            ethernet.ipv4(from.octets(), to.octets(), 64).icmpv4_echo_request(1, 2).write(&mut bytes, b"data").unwrap();
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let ip = ethernet.ipv6(from.octets(), to.octets(), 255);
            ip.icmpv6_raw(kind, 0, [0; 4]).write(&mut bytes, &[0; 16]).unwrap();
        }
        _ => panic!("two families"),
    }
    bytes
}

/// The error that says so about a frame.
pub(super) fn port_unreachable(from: IpAddr, to: IpAddr, about: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let mut bytes = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let port = etherparse::icmpv4::DestUnreachableHeader::Port;
            let icmp = etherparse::Icmpv4Type::DestinationUnreachable(port);
            ethernet.ipv4(from.octets(), to.octets(), 64).icmpv4(icmp).write(&mut bytes, &about[14..14 + 28]).unwrap();
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let port = etherparse::icmpv6::DestUnreachableCode::Port;
            let icmp = etherparse::Icmpv6Type::DestinationUnreachable(port);
            ethernet.ipv6(from.octets(), to.octets(), 64).icmpv6(icmp).write(&mut bytes, &about[14..14 + 48]).unwrap();
        }
        _ => panic!("two families"),
    }
    bytes
}

/// A datagram over IPv4 in two fragments.
pub(super) fn fragments(from: SocketAddr, to: SocketAddr) -> [Vec<u8>; 2] {
    let whole = frame(from, to, Segment::Udp);
    let mut first = whole.clone();
    first[20] = 0x20;
    let mut later = whole[..34].to_vec();
    later.extend([1; 16]);
    later[21] = 1;
    for fragment in [&mut first, &mut later] {
        fragment[24..26].fill(0);
        let words: Vec<u64> = fragment[14..34].chunks(2).map(|w| u64::from(u16::from_ne_bytes([w[0], w[1]]))).collect();
        let sum = !crate::checksum::fold(words.iter().sum());
        fragment.write(24, sum);
    }
    [first, later]
}
