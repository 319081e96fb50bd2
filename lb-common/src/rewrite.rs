//! Writing addresses and ports, with every checksum that covers them.

use crate::{
    addr::{Addr, Port},
    checksum::Difference,
    layout::protocol,
    packet::{Covers, Packet, halves, word, word_halves},
    parse::{Headers, Part},
    sctp,
};

/// Which end of a packet is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// Replaces the address and port of one side. `None`: the packet can't be rewritten, and may be half done.
///
/// Checksums are updated by differences, which is right for complete ones and for those that the sender left to the
/// device (`lab.md` §1). A later fragment has no port and no checksum. SCTP's checksum covers its ports but no addresses, and
/// is left to [`settle_sctp`].
#[inline(always)]
pub fn rewrite<P: Packet>(packet: &mut P, headers: &Headers, side: Side, addr: &Addr, port: Port) -> Option<()> {
    let old = match side {
        Side::Source => headers.src,
        Side::Destination => headers.dst,
    };
    write_addr(packet, headers.l3, headers.v6, side, &old, addr)?;
    if matches!(headers.part, Part::Later) {
        return Some(());
    }
    if let Some((checksum, udp)) = checksum_of(headers) {
        let covers = Covers::PseudoHeader { v6: headers.v6 };
        packet.update_checksum(checksum, Difference::NONE.addr(&old, addr), covers, udp)?;
    }
    rewrite_port(packet, headers, side, port)
}

/// Replaces the port of one side, but for SCTP's checksum ([`settle_sctp`]).
#[inline(always)]
pub fn rewrite_port<P: Packet>(packet: &mut P, headers: &Headers, side: Side, port: Port) -> Option<()> {
    let (old, offset) = match side {
        Side::Source => (headers.sport, 0),
        Side::Destination => (headers.dport, 2),
    };
    if old.be == port.be || matches!(headers.part, Part::Later) {
        return Some(());
    }
    packet.write(headers.l4.wrapping_add(offset), port.be)?;
    let Some((checksum, udp)) = checksum_of(headers) else { return Some(()) };
    packet.update_checksum(checksum, Difference::NONE.port(old, port), Covers::Segment, udp)
}

/// Makes SCTP's checksum that of the ports which the packet has now, after every [`rewrite_port`]. `headers` are still those
/// from before. `None` for a fragment whose ports differ: the checksum's change depends on the length of the whole packet.
///
/// Once at the end of a packet's way, since the verifier would follow it behind each change of a port.
#[inline(never)]
pub fn settle_sctp<P: Packet>(packet: &mut P, headers: &Headers) -> Option<()> {
    if matches!(headers.part, Part::Later) {
        return Some(());
    }
    let [sport, dport, _, _, first, second] = packet.read::<[u16; 6]>(headers.l4)?;
    let (old, new) = (word(headers.sport.be, headers.dport.be), word(sport, dport));
    if old == new {
        return Some(());
    }
    if !matches!(headers.part, Part::Whole) {
        return None;
    }
    let total = if headers.v6 {
        u16::from_be(packet.read(headers.l3.wrapping_add(4))?).wrapping_add(40)
    } else {
        u16::from_be(packet.read(headers.l3.wrapping_add(2))?)
    };
    let length = total.wrapping_sub(headers.l4.wrapping_sub(headers.l3) as u16);
    let checksum = sctp::updated(word(first, second), old, new, length);
    packet.write(headers.l4.wrapping_add(8), word_halves(checksum))
}

/// Offset of the transport checksum and whether it is UDP's; `None` for transports that have no Internet checksum.
#[inline(always)]
fn checksum_of(headers: &Headers) -> Option<(usize, bool)> {
    match headers.proto {
        protocol::TCP => Some((headers.l4.wrapping_add(16), false)),
        protocol::UDP => Some((headers.l4.wrapping_add(6), true)),
        _ => None,
    }
}

/// Replaces an address in an IP header, and updates that header's own checksum.
#[inline(always)]
pub fn write_addr<P: Packet>(packet: &mut P, l3: usize, v6: bool, side: Side, old: &Addr, new: &Addr) -> Option<()> {
    if v6 {
        return packet.write_v6(l3.wrapping_add(if matches!(side, Side::Source) { 8 } else { 24 }), new);
    }
    let [.., high, low] = halves(new);
    packet.write(l3.wrapping_add(if matches!(side, Side::Source) { 12 } else { 16 }), [high, low])?;
    let checksum = packet.read(l3.wrapping_add(10))?;
    packet.write(l3.wrapping_add(10), Difference::NONE.word32(old.v4_word(), new.v4_word()).apply(checksum))
}

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use etherparse::{IpNumber, PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    fn parse(packet: &Vec<u8>, l3: usize, v6: bool) -> Option<Headers> {
        let mut headers = Headers::NONE;
        crate::parse::parse(packet, l3, v6, &mut headers).map(|()| headers)
    }

    fn frame(src: IpAddr, dst: IpAddr, sport: u16, dport: u16, tcp: bool, payload: &[u8]) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2([1; 6], [2; 6]);
        let ip = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), 64),
            (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), 64),
            _ => unreachable!(),
        };
        let mut bytes = Vec::new();
        if tcp {
            ip.tcp(sport, dport, 7, 1000).ack(9).write(&mut bytes, payload).unwrap();
        } else {
            ip.udp(sport, dport).write(&mut bytes, payload).unwrap();
        }
        bytes
    }

    proptest! {
        #[test]
        fn a_rewritten_packet_is_the_packet_sent_from_there(
            v6: bool, tcp: bool, addrs: [u128; 3], ports: [u16; 3], source: bool,
            payload in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let [a, b, new] = addrs.map(|addr| if v6 {
                IpAddr::V6(Ipv6Addr::from(addr | 1 << 127))
            } else {
                IpAddr::V4(Ipv4Addr::from(addr as u32))
            });
            let [sport, dport, new_port] = ports;
            let before = frame(a, b, sport, dport, tcp, &payload);
            let mut packet = before.clone();
            let headers = parse(&packet, 14, v6).unwrap();
            let side = if source { Side::Source } else { Side::Destination };
            rewrite(&mut packet, &headers, side, &new.into(), Port::new(new_port)).unwrap();
            let expected = if source { frame(new, b, new_port, dport, tcp, &payload) } else { frame(a, new, sport, new_port, tcp, &payload) };
            prop_assert_eq!(without_zero_sums(&packet), without_zero_sums(&expected));
            // There and back again.
            let headers = parse(&packet, 14, v6).unwrap();
            let (old, old_port) = if source { (a, sport) } else { (b, dport) };
            rewrite(&mut packet, &headers, side, &old.into(), Port::new(old_port)).unwrap();
            prop_assert_eq!(without_zero_sums(&packet), without_zero_sums(&before));
        }
    }

    /// 0 and 0xffff are one number in one's complement: both are right where the sum comes out as either.
    fn without_zero_sums(frame: &[u8]) -> Vec<u8> {
        let mut frame = frame.to_vec();
        let v6 = frame[12..14] == [0x86, 0xdd];
        let l4 = if v6 { 54 } else { 34 };
        let at = match SlicedPacket::from_ethernet(&frame).unwrap().transport {
            Some(TransportSlice::Tcp(_)) => l4 + 16,
            _ => l4 + 6,
        };
        for at in [at, 24] {
            if frame[at..at + 2] == [0xff, 0xff] && (at != 24 || !v6) {
                frame[at..at + 2].fill(0);
            }
        }
        frame
    }

    const CRC32C: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);

    /// An SCTP packet, with the checksum that another implementation computes.
    fn sctp_frame(src: IpAddr, dst: IpAddr, sport: u16, dport: u16, chunks: &[u8]) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2([1; 6], [2; 6]);
        let ip = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), 64),
            (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), 64),
            _ => unreachable!(),
        };
        let ports = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
        let mut packet = [&ports[..], &[1, 2, 3, 4, 0, 0, 0, 0], chunks].concat();
        let sum = CRC32C.checksum(&packet);
        packet[8..12].copy_from_slice(&sum.to_le_bytes());
        let mut frame = Vec::new();
        ip.write(&mut frame, IpNumber::SCTP, &packet).unwrap();
        // What Ethernet pads is not the packet's.
        frame.resize(frame.len().max(60), 0xee);
        frame
    }

    proptest! {
        #[test]
        fn a_rewritten_sctp_packet_is_the_packet_sent_from_there(
            v6: bool, addrs: [u128; 3], ports: [u16; 4], both: bool,
            chunks in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let [a, b, new] = addrs.map(|addr| if v6 {
                IpAddr::V6(Ipv6Addr::from(addr | 1 << 127))
            } else {
                IpAddr::V4(Ipv4Addr::from(addr as u32))
            });
            let [sport, dport, new_port, other_port] = ports;
            let mut packet = sctp_frame(a, b, sport, dport, &chunks);
            let headers = parse(&packet, 14, v6).unwrap();
            let sport = if both { other_port } else { sport };
            rewrite_port(&mut packet, &headers, Side::Source, Port::new(sport)).unwrap();
            rewrite(&mut packet, &headers, Side::Destination, &new.into(), Port::new(new_port)).unwrap();
            settle_sctp(&mut packet, &headers).unwrap();
            let mut expected = sctp_frame(a, new, sport, new_port, &chunks);
            if !v6 && [&packet, &expected].iter().any(|frame| frame[24..26] == [0xff, 0xff]) {
                // 0 and 0xffff are one number in one's complement.
                for frame in [&mut packet, &mut expected] {
                    frame[24..26].fill(0);
                }
            }
            prop_assert_eq!(packet, expected);
        }
    }

    #[test]
    fn an_sctp_fragment_with_another_port_is_refused() {
        let [src, dst] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(|octets| IpAddr::V4(octets.into()));
        let mut bytes = sctp_frame(src, dst, 80, 80, &[0; 24]);
        bytes[20] |= 0x20;
        let headers = parse(&bytes, 14, false).unwrap();
        let addr = Ipv4Addr::new(10, 9, 9, 9).into();
        for (port, settled) in [(80, Some(())), (81, None)] {
            let mut bytes = bytes.clone();
            rewrite(&mut bytes, &headers, Side::Destination, &addr, Port::new(port)).unwrap();
            assert_eq!(settle_sctp(&mut bytes, &headers), settled);
        }
    }
}
