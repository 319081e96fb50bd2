//! Packets byte by byte, for what no socket sends: fragments out of order, frames for someone else. In: ends, payload. Out: bytes with
//! right checksums. Never here: sending.

use std::net::{IpAddr, SocketAddr};

/// Source and destination of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// Source address.
    pub src: IpAddr,
    /// Destination address, of the same family.
    pub dst: IpAddr,
    /// IP protocol number.
    pub proto: u8,
}

/// The ends of a UDP packet.
pub fn ends(from: SocketAddr, to: SocketAddr) -> Ends {
    Ends { src: from.ip(), dst: to.ip(), proto: 17 }
}

/// The ends of a TCP packet.
pub fn tcp_ends(from: SocketAddr, to: SocketAddr) -> Ends {
    Ends { proto: 6, ..ends(from, to) }
}

/// A UDP header and its payload.
pub fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap_or(u16::MAX);
    let mut datagram = [from.port(), to.port(), length, 0].map(u16::to_be_bytes).concat();
    datagram.extend_from_slice(payload);
    let sum = checksum(&[&pseudo_header(ends(from, to), datagram.len()), &datagram]);
    let sum = if sum == 0 { 0xffff } else { sum };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    datagram
}

/// FIN, as a TCP header has it.
pub const FIN: u8 = 1;
/// SYN.
pub const SYN: u8 = 2;
/// RST.
pub const RST: u8 = 4;
/// ACK.
pub const ACK: u8 = 16;

/// A TCP segment without data.
pub fn tcp(from: SocketAddr, to: SocketAddr, flags: u8, sequence: u32, acknowledged: u32) -> Vec<u8> {
    let mut segment = [from.port(), to.port()].map(u16::to_be_bytes).concat();
    segment.extend_from_slice(&sequence.to_be_bytes());
    segment.extend_from_slice(&acknowledged.to_be_bytes());
    segment.extend_from_slice(&[5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    let sum = checksum(&[&pseudo_header(tcp_ends(from, to), segment.len()), &segment]);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// Whether the checksum of a TCP segment is right.
pub fn is_intact(from: SocketAddr, to: SocketAddr, segment: &[u8]) -> bool {
    checksum(&[&pseudo_header(tcp_ends(from, to), segment.len()), segment]) == 0
}

/// A whole IP packet.
pub fn ip_packet(ends: Ends, payload: &[u8]) -> Vec<u8> {
    match (ends.src, ends.dst) {
        (IpAddr::V4(_), _) => v4(ends, 0, 0, payload),
        (IpAddr::V6(_), _) => v6(ends, ends.proto, payload),
    }
}

/// One fragment of a packet; `offset` is in bytes, a multiple of 8.
pub fn ip_fragment(ends: Ends, id: u32, offset: u16, more: bool, part: &[u8]) -> Vec<u8> {
    if ends.src.is_ipv4() {
        let [_, _, high, low] = id.to_be_bytes();
        return v4(ends, u16::from_be_bytes([high, low]), (offset / 8) | (u16::from(more) << 13), part);
    }
    let mut payload = vec![ends.proto, 0];
    payload.extend_from_slice(&(offset | u16::from(more)).to_be_bytes());
    payload.extend_from_slice(&id.to_be_bytes());
    payload.extend_from_slice(part);
    v6(ends, 44, &payload)
}

/// The frame of an IP packet.
pub fn frame(from: [u8; 6], to: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let ethertype: u16 = if packet.first().is_some_and(|byte| byte >> 4 == 4) { 0x0800 } else { 0x86dd };
    [&to[..], &from, &ethertype.to_be_bytes(), packet].concat()
}

fn v4(ends: Ends, id: u16, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX);
    let mut packet = vec![0x45, 0];
    for word in [length, id, fragment] {
        packet.extend_from_slice(&word.to_be_bytes());
    }
    packet.extend_from_slice(&[64, ends.proto, 0, 0]);
    packet.extend(octets(ends.src));
    packet.extend(octets(ends.dst));
    let sum = checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend_from_slice(payload);
    packet
}

fn v6(ends: Ends, next_header: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap_or(u16::MAX);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&length.to_be_bytes());
    packet.extend_from_slice(&[next_header, 64]);
    packet.extend(octets(ends.src));
    packet.extend(octets(ends.dst));
    packet.extend_from_slice(payload);
    packet
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn pseudo_header(ends: Ends, length: usize) -> Vec<u8> {
    let mut header = octets(ends.src);
    header.extend(octets(ends.dst));
    header.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    header.extend_from_slice(&[0, 0, 0, ends.proto]);
    header
}

/// The Internet checksum (RFC 1071) over parts of even length, the last excepted.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum: u32 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
