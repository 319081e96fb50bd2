//! The first look at a packet: most are none of ours, and shall pay for no more than this.

use crate::{
    addr::{Addr, Port},
    flow::tcp_flags,
    layout::protocol,
    packet::{Packet, word},
    parse::v6_addr,
    path::Hook,
    tables::State,
};

/// The ends of a whole TCP or UDP packet whose headers are where they mostly are. `None`: look closer.
#[inline(always)]
fn ends<P: Packet>(packet: &P, hook: &Hook) -> Option<Ends> {
    let l3 = hook.link_header;
    let (proto, l4, src, dst);
    if hook.v6 {
        let header = packet.read::<[u16; 20]>(l3)?;
        proto = header[3].to_ne_bytes()[0];
        l4 = 40;
        (src, dst) = (v6_addr(&header, 4), v6_addr(&header, 12));
    } else {
        let header = packet.read::<[u16; 10]>(l3)?;
        let first = header[0].to_ne_bytes()[0];
        // No options, and no fragment.
        if first != 0x45 || header[3] & 0x3fff_u16.to_be() != 0 {
            return None;
        }
        proto = header[4].to_ne_bytes()[1];
        l4 = 20;
        src = Addr::from_v4_word(word(header[6], header[7]));
        dst = Addr::from_v4_word(word(header[8], header[9]));
    }
    // Ports, and for TCP what follows up to the flags.
    let syn = match proto {
        protocol::TCP => {
            let [_, flags] = packet.read::<u16>(l3 + l4 + 12)?.to_ne_bytes();
            flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
        }
        protocol::UDP => true,
        _ => return None,
    };
    let [sport, dport] = packet.read::<[u16; 2]>(l3 + l4)?;
    Some(Ends {
        src,
        dst,
        sport: Port { be: sport },
        dport: Port { be: dport },
        opens: syn,
        udp: proto == protocol::UDP,
    })
}

struct Ends {
    src: Addr,
    dst: Addr,
    sport: Port,
    dport: Port,
    /// Whether it may be the first packet of a connection.
    opens: bool,
    udp: bool,
}

/// Whether a packet that enters may be ours: what [`super::ingress`] would answer with "no Service" for sure is false.
#[inline(never)]
pub fn may_enter<P: Packet, S: State>(packet: &P, hook: &Hook, state: &S) -> bool {
    let Some(Ends { dst, dport, opens, .. }) = ends(packet, hook) else { return true };
    let (first, ports) = state.masquerade_ports();
    state.may_be_frontend(&dst, dport)
        || state.may_be_frontend(&dst.unspecified(), dport)
        || state.may_be_frontend(&dst, Port::ZERO)
        || dport.number().wrapping_sub(first) < ports
        || !hook.translated && state.may_be_endpoint(&dst, dport) && (opens || state.has_straight_flows())
        || state.in_service_cidr(&dst)
}

/// Whether a packet that leaves may be ours: what [`super::egress`] would answer with "no Service" for sure is false.
#[inline(never)]
pub fn may_leave<P: Packet, S: State>(packet: &P, hook: &Hook, state: &S) -> bool {
    // Where a client speaks to an endpoint straight as well, the answer of one connection can look like the other's before it was
    // translated; and its later fragments would be taken for those.
    if hook.finished {
        return false;
    }
    let Some(Ends { src, dst, sport, dport, opens, udp }) = ends(packet, hook) else { return true };
    state.may_be_endpoint(&src, sport)
        || state.may_be_endpoint(&dst, dport)
        || udp && state.may_be_frontend(&src.unspecified(), sport)
        || hook.from_node && opens && (state.may_be_frontend(&dst, dport) || state.in_service_cidr(&dst))
}
