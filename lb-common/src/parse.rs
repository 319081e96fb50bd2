//! Reading the headers of a packet: never past its end, never wrongly, and `None` for what can't be read.

use crate::{
    addr::{Addr, Port},
    layout::protocol,
    packet::{Packet, word},
};

/// How much of a packet its transport header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The packet is whole.
    Whole,
    /// The first of several fragments: has the ports.
    First,
    /// A later fragment: has none.
    Later,
}

/// What the headers of a packet say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port; 0 in protocols without ports and in later fragments.
    pub sport: Port,
    /// Destination port, likewise.
    pub dport: Port,
    /// IP protocol number of the transport.
    pub proto: u8,
    /// TCP flags, 0 for others.
    pub tcp: u8,
    /// Whether this is IPv6.
    pub v6: bool,
    /// Whether it is a fragment.
    pub part: Part,
    /// Identification of the fragmented packet, as it stands in memory.
    pub id: u32,
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of the transport header.
    pub l4: usize,
    /// Offset behind the packet, as its IP header has it; what follows there in the frame is padding.
    pub end: usize,
}

impl Headers {
    /// Nothing read so far.
    pub const NONE: Self = Self {
        src: Addr::UNSPECIFIED_V6,
        dst: Addr::UNSPECIFIED_V6,
        sport: Port::ZERO,
        dport: Port::ZERO,
        proto: 0,
        tcp: 0,
        v6: false,
        part: Part::Whole,
        id: 0,
        l3: 0,
        l4: 0,
        end: 0,
    };

    /// Whether the transport is one that Services have.
    #[must_use]
    #[inline(always)]
    pub const fn has_ports(&self) -> bool {
        matches!(self.proto, protocol::TCP | protocol::UDP | protocol::SCTP)
    }
}

/// IPv6 extension headers (RFC 8200 §4).
mod extension {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const DESTINATION: u8 = 60;
}

/// So many extension headers are read; more are not ours.
const EXTENSIONS: usize = 6;

/// Beyond this offset no transport header is read.
const L4_LIMIT: usize = 400;

/// Reads the headers of a packet whose IP header is at `l3`.
///
/// They are written to memory that the caller owns: the kernel programs have it in a map, where the verifier forgets what it
/// knew of each value, so that it doesn't follow every way through the headers to the end of the program.
#[inline(always)]
pub fn parse<P: Packet>(packet: &P, l3: usize, v6: bool, headers: &mut Headers) -> Option<()> {
    network(packet, l3, v6, headers)?;
    if matches!(headers.part, Part::Later) {
        return Some(());
    }
    transport(packet, headers)?;
    // What stands behind the packet's end, as Ethernet's padding does, is not the packet's.
    let needed = if headers.proto == protocol::TCP { 14 } else { 4 };
    if headers.has_ports() && headers.l4.wrapping_add(needed) > headers.end {
        return None;
    }
    if headers.proto == protocol::TCP {
        let [_, flags] = packet.read::<u16>(headers.l4.wrapping_add(12))?.to_ne_bytes();
        headers.tcp = flags;
    }
    Some(())
}

/// Reads the headers of a packet that an ICMP error quotes: its first bytes, with nothing behind the ports to rely on.
#[inline(always)]
pub fn parse_quoted<P: Packet>(packet: &P, l3: usize, v6: bool, headers: &mut Headers) -> Option<()> {
    network(packet, l3, v6, headers)?;
    if matches!(headers.part, Part::Later) || !headers.has_ports() {
        return None;
    }
    transport(packet, headers)
}

#[inline(always)]
fn transport<P: Packet>(packet: &P, headers: &mut Headers) -> Option<()> {
    if headers.has_ports() {
        let [sport, dport] = packet.read::<[u16; 2]>(headers.l4)?;
        (headers.sport, headers.dport) = (Port { be: sport }, Port { be: dport });
    }
    Some(())
}

#[inline(always)]
fn network<P: Packet>(packet: &P, l3: usize, v6: bool, headers: &mut Headers) -> Option<()> {
    if v6 { network_v6(packet, l3, headers) } else { network_v4(packet, l3, headers) }
}

#[inline(always)]
fn network_v4<P: Packet>(packet: &P, l3: usize, headers: &mut Headers) -> Option<()> {
    let header = packet.read::<[u16; 10]>(l3)?;
    let [version, _] = header[0].to_ne_bytes();
    let [_, proto] = header[4].to_ne_bytes();
    let length = ((version & 0xf) as usize) << 2;
    if version >> 4 != 4 || length < 20 {
        return None;
    }
    let fragment = u16::from_be(header[3]);
    let part = match (fragment & 0x1fff, fragment & 0x2000) {
        (0, 0) => Part::Whole,
        (0, _) => Part::First,
        _ => Part::Later,
    };
    *headers = Headers {
        src: Addr::from_v4_word(word(header[6], header[7])),
        dst: Addr::from_v4_word(word(header[8], header[9])),
        sport: Port::ZERO,
        dport: Port::ZERO,
        proto,
        tcp: 0,
        v6: false,
        part,
        id: header[2] as u32,
        l3,
        l4: l3.wrapping_add(length),
        end: end(l3, header[1]),
    };
    Some(())
}

#[inline(always)]
fn network_v6<P: Packet>(packet: &P, l3: usize, headers: &mut Headers) -> Option<()> {
    let header = packet.read::<[u16; 20]>(l3)?;
    let [version, _] = header[0].to_ne_bytes();
    let [next, _] = header[3].to_ne_bytes();
    if version >> 4 != 6 {
        return None;
    }
    *headers = Headers {
        src: v6_addr(&header, 4),
        dst: v6_addr(&header, 12),
        sport: Port::ZERO,
        dport: Port::ZERO,
        proto: next,
        tcp: 0,
        v6: true,
        part: Part::Whole,
        id: 0,
        l3,
        l4: l3.wrapping_add(40),
        end: end(l3.wrapping_add(40), header[2]),
    };
    if is_extension(next) { skip_extensions(packet, headers) } else { Some(()) }
}

/// Where a packet ends by its length field, in network order, which counts from an offset. Zero stands for more than the field can
/// say: jumbograms, and what large offloads hand around within a host (IPv6 since 5.19, IPv4 since 6.3).
#[inline(always)]
const fn end(from: usize, length: u16) -> usize {
    match u16::from_be(length) {
        0 => usize::MAX,
        length => from.wrapping_add(length as usize),
    }
}

/// The address that begins at this word of an IPv6 header.
#[inline(always)]
pub(crate) const fn v6_addr(header: &[u16; 20], at: usize) -> Addr {
    Addr {
        words: [
            word(header[at], header[at + 1]),
            word(header[at + 2], header[at + 3]),
            word(header[at + 4], header[at + 5]),
            word(header[at + 6], header[at + 7]),
        ],
    }
}

#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(
        next,
        extension::HOP_BY_HOP
            | extension::ROUTING
            | extension::FRAGMENT
            | extension::AUTHENTICATION
            | extension::DESTINATION
    )
}

/// Moves `l4` behind the extension headers.
#[inline(never)]
fn skip_extensions<P: Packet>(packet: &P, headers: &mut Headers) -> Option<()> {
    for _ in 0..EXTENSIONS {
        if headers.l4 > L4_LIMIT {
            return None;
        }
        let [first, second] = packet.read::<[u16; 2]>(headers.l4)?;
        let [next, length] = first.to_ne_bytes();
        let size = match headers.proto {
            extension::HOP_BY_HOP | extension::DESTINATION => (length as usize + 1) << 3,
            // With segments left the destination is not the last one (RFC 8200 §4.4).
            extension::ROUTING => match second.to_ne_bytes() {
                [_, 0] => (length as usize + 1) << 3,
                _ => return None,
            },
            extension::AUTHENTICATION => (length as usize + 2) << 2,
            extension::FRAGMENT => {
                let [high, low] = packet.read::<[u16; 2]>(headers.l4.wrapping_add(4))?;
                headers.id = word(high, low);
                headers.part = match (u16::from_be(second) & 0xfff8, u16::from_be(second) & 1) {
                    (0, 0) => Part::Whole,
                    (0, _) => Part::First,
                    _ => Part::Later,
                };
                8
            }
            _ => return Some(()),
        };
        headers.proto = next;
        headers.l4 = headers.l4.wrapping_add(size);
        if matches!(headers.part, Part::Later) {
            break;
        }
    }
    if is_extension(headers.proto) && !matches!(headers.part, Part::Later) || headers.l4 > L4_LIMIT {
        return None;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::{parse as read, *};

    fn parse(packet: &Vec<u8>, l3: usize, v6: bool) -> Option<Headers> {
        let mut headers = Headers::NONE;
        read(packet, l3, v6, &mut headers).map(|()| headers)
    }

    proptest! {
        #[test]
        fn no_bytes_are_read_past_the_end(bytes in proptest::collection::vec(any::<u8>(), 0..200), l3 in 0..40_usize, v6: bool) {
            let mut bytes = bytes;
            if let Some(version) = bytes.get_mut(l3) {
                *version = if v6 { 0x60 } else { 0x40 | *version & 0xf };
            }
            if let Some(headers) = parse(&bytes, l3, v6) {
                prop_assert!(headers.l4 <= L4_LIMIT + 60);
                if headers.part != Part::Later && headers.has_ports() {
                    prop_assert!(headers.l4 + 4 <= bytes.len());
                }
            }
            let _ = parse_quoted(&bytes, l3, v6, &mut Headers::NONE.clone());
        }

        #[test]
        fn what_another_library_wrote_is_read(src: [u8; 4], dst: [u8; 4], sport: u16, dport: u16, cut in 0..60_usize) {
            let mut frame = Vec::new();
            PacketBuilder::ethernet2([1; 6], [2; 6]).ipv4(src, dst, 64).tcp(sport, dport, 1, 100).syn()
                .write(&mut frame, &[]).unwrap();
            let headers = parse(&frame, 14, false).unwrap();
            prop_assert_eq!((headers.src, headers.dst), (Addr::from(core::net::Ipv4Addr::from(src)), core::net::Ipv4Addr::from(dst).into()));
            prop_assert_eq!((headers.sport.number(), headers.dport.number()), (sport, dport));
            prop_assert_eq!((headers.proto, headers.tcp, headers.part), (protocol::TCP, 2, Part::Whole));
            frame.truncate(cut.min(47));
            prop_assert_eq!(parse(&frame, 14, false), None);
        }
    }

    #[test]
    fn extension_headers_are_skipped_and_fragments_noticed() {
        let base = |next: u8| {
            let mut frame = vec![0; 14];
            frame.extend([0x60, 0, 0, 0, 0, 0, next, 64]);
            frame.extend([0xfd; 32]);
            frame
        };
        let mut destination = base(extension::DESTINATION);
        destination.extend([protocol::UDP, 0, 0, 0, 0, 0, 0, 0]);
        destination.extend([0, 53, 0, 54, 0, 8, 0, 0]);
        let headers = parse(&destination, 14, true).unwrap();
        assert_eq!(
            (headers.proto, headers.l4, headers.sport.number(), headers.dport.number()),
            (protocol::UDP, 62, 53, 54)
        );

        for (field, part) in [([0, 0], Part::Whole), ([0, 1], Part::First), ([0, 0x10], Part::Later)] {
            let mut fragment = base(extension::FRAGMENT);
            fragment.extend([protocol::UDP, 0, field[0], field[1], 1, 2, 3, 4]);
            fragment.extend([0, 53, 0, 54, 0, 8, 0, 0]);
            let headers = parse(&fragment, 14, true).unwrap();
            assert_eq!((headers.part, headers.id), (part, u32::from_ne_bytes([1, 2, 3, 4])));
            assert_eq!(headers.dport.number(), if part == Part::Later { 0 } else { 54 });
        }
        let mut routing = base(extension::ROUTING);
        routing.extend([protocol::UDP, 0, 0, 1, 0, 0, 0, 0, 0, 53, 0, 54, 0, 8, 0, 0]);
        assert_eq!(parse(&routing, 14, true), None, "segments left");
    }
}
