//! Turning a packet into its own refusal, to be sent back out of the device that it came by.
//!
//! The packet may be one whose checksum its sender left to the device (CHECKSUM_PARTIAL): then the kernel or the device
//! still adds up everything from the transport header on and writes the result where the *old* protocol had its checksum, if the
//! packet ever needs it. Nothing here can ask or unset that. So each refusal is made such that its checksum is right as it
//! stands, and that this write changes nothing: a RST's free field (the window) is chosen so that the right checksum is
//! also the pseudo-header's sum; in an ICMP error, the field of UDP's checksum is the unused one, which gets the
//! pseudo-header's sum. Receivers ignore both (RFC 9293 §3.10.7, RFC 792, RFC 4443 §3.1).

use crate::{
    checksum::fold,
    flow::tcp_flags,
    layout::protocol,
    packet::{Packet, halves},
    parse::{Headers, Part},
};

/// Turns the packet into a TCP RST (RFC 9293 §3.10.7.1) or an ICMP port unreachable (RFC 792, RFC 4443 §3.1).
///
/// `None`: it can't be refused (a later fragment, a reset, odd headers), and may be half done.
#[inline(always)]
pub fn refuse<P: Packet>(packet: &mut P, headers: &Headers) -> Option<()> {
    if matches!(headers.part, Part::Later) {
        return None;
    }
    match (headers.proto, headers.v6) {
        (protocol::TCP, _) => reset(packet, headers),
        (_, false) => unreachable_v4(packet, headers),
        (_, true) => unreachable_v6(packet, headers),
    }
}

fn sum<const N: usize>(words: &[u16; N]) -> u64 {
    let mut sum = 0;
    let mut i = 0;
    while i < N {
        sum += words[i] as u64;
        i += 1;
    }
    sum
}

#[inline(never)]
fn reset<P: Packet>(packet: &mut P, headers: &Headers) -> Option<()> {
    if headers.tcp & tcp_flags::RST != 0 {
        return None;
    }
    let l3 = headers.l3;
    let total = if headers.v6 {
        u16::from_be(packet.read(l3.wrapping_add(4))?) as usize + 40
    } else {
        u16::from_be(packet.read(l3.wrapping_add(2))?) as usize
    };
    let [sport, dport, seq_high, seq_low, ack_high, ack_low, offset, ..] = packet.read::<[u16; 8]>(headers.l4)?;
    let header = ((offset.to_ne_bytes()[0] >> 4) as usize) << 2;
    let data = total.saturating_sub(headers.l4 - l3).saturating_sub(header) as u32;
    let mut segment = [0; 10];
    (segment[0], segment[1]) = (dport, sport);
    if headers.tcp & tcp_flags::ACK != 0 {
        (segment[2], segment[3]) = (ack_high, ack_low);
        segment[6] = u16::from_ne_bytes([5 << 4, tcp_flags::RST]);
    } else {
        let syn = (headers.tcp & (tcp_flags::SYN | tcp_flags::FIN)).count_ones();
        let seq = u32::from(u16::from_be(seq_high)) << 16 | u32::from(u16::from_be(seq_low));
        let ack = seq.wrapping_add(data).wrapping_add(syn);
        (segment[4], segment[5]) = (((ack >> 16) as u16).to_be(), (ack as u16).to_be());
        segment[6] = u16::from_ne_bytes([5 << 4, tcp_flags::RST | tcp_flags::ACK]);
    }
    let pseudo = fold(pseudo_header(headers, 20, protocol::TCP));
    // The checksum is to be `pseudo`, so all other words must add up to its complement, and the pseudo-header once more.
    segment[7] = fold(u64::from(!pseudo) + u64::from(!pseudo) + u64::from(!fold(sum(&segment))));
    segment[8] = pseudo;
    let l4 = l3.wrapping_add(if headers.v6 { 40 } else { 20 });
    packet.resize(l4.wrapping_add(20))?;
    write_headers(packet, headers, 20, protocol::TCP)?;
    packet.write(l4, segment)
}

#[inline(never)]
fn unreachable_v4<P: Packet>(packet: &mut P, headers: &Headers) -> Option<()> {
    let l3 = headers.l3;
    // A header with options would need a longer quotation than can be read at once.
    if headers.l4 != l3.wrapping_add(20) {
        return None;
    }
    let quoted = packet.read::<[u16; 14]>(l3)?;
    let icmp = [u16::from_ne_bytes([3, 3]), 0, 0, 0];
    let checksum = !fold(sum(&icmp) + sum(&quoted));
    packet.resize(l3.wrapping_add(56))?;
    write_headers(packet, headers, 36, protocol::ICMP)?;
    packet.write(l3.wrapping_add(20), [icmp[0], checksum, 0, 0])?;
    packet.write(l3.wrapping_add(28), quoted)
}

#[inline(never)]
fn unreachable_v6<P: Packet>(packet: &mut P, headers: &Headers) -> Option<()> {
    let l3 = headers.l3;
    if headers.l4 != l3.wrapping_add(40) {
        return None;
    }
    let quoted = packet.read::<[u16; 24]>(l3)?;
    let pseudo = fold(pseudo_header(headers, 56, protocol::ICMPV6));
    let icmp = [u16::from_ne_bytes([1, 4]), 0, 0, pseudo];
    let checksum = !fold(sum(&icmp) + sum(&quoted) + u64::from(pseudo));
    packet.resize(l3.wrapping_add(96))?;
    write_headers(packet, headers, 56, protocol::ICMPV6)?;
    packet.write(l3.wrapping_add(40), [icmp[0], checksum, 0, pseudo])?;
    packet.write(l3.wrapping_add(48), quoted)
}

/// The sum of the pseudo-header of an answer; swapping the addresses doesn't change it.
#[inline(always)]
fn pseudo_header(headers: &Headers, length: u16, proto: u8) -> u64 {
    let [a, b, c, d] = headers.src.words;
    let [e, f, g, h] = headers.dst.words;
    let mut sum = length.to_be() as u64 + (proto as u16).to_be() as u64 + d as u64 + h as u64;
    if headers.v6 {
        sum += a as u64 + b as u64 + c as u64 + e as u64 + f as u64 + g as u64;
    }
    sum
}

/// Writes link and network headers of an answer with `length` bytes behind them.
#[inline(always)]
fn write_headers<P: Packet>(packet: &mut P, headers: &Headers, length: u16, proto: u8) -> Option<()> {
    let l3 = headers.l3;
    if l3 >= 14 {
        let [a, b, c, d, e, f] = packet.read::<[u16; 6]>(0)?;
        packet.write(0, [d, e, f, a, b, c])?;
    }
    let (from, to) = (halves(&headers.dst), halves(&headers.src));
    if headers.v6 {
        let mut header = [0; 20];
        header[0] = u16::from_ne_bytes([0x60, 0]);
        header[2] = length.to_be();
        header[3] = u16::from_ne_bytes([proto, 64]);
        [header[4], header[5], header[6], header[7], header[8], header[9], header[10], header[11]] = from;
        [header[12], header[13], header[14], header[15], header[16], header[17], header[18], header[19]] = to;
        packet.write(l3, header)
    } else {
        let mut header = [
            u16::from_ne_bytes([0x45, 0]),
            (length + 20).to_be(),
            0,
            0x4000_u16.to_be(),
            u16::from_ne_bytes([64, proto]),
            0,
            from[6],
            from[7],
            to[6],
            to[7],
        ];
        header[5] = !fold(sum(&header));
        packet.write(l3, header)
    }
}
