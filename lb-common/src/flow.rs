//! What is remembered about a connection.
//!
//! A connection has two entries, and a third if it is masqueraded; each holds all of it, so that each can restore the
//! others, and each is found by what a packet of one leg shows:
//!
//! | kind | near end | far end | found by |
//! |---|---|---|---|
//! | [`Kind::Request`] | client | frontend | requests on the way in; ICMP errors about answers |
//! | [`Kind::Forwarded`] | client | endpoint | requests and answers on the way out; ICMP errors about requests |
//! | [`Kind::Masqueraded`] | node's address and port | endpoint | answers on the way in |
//!
//! (A fourth kind, [`Kind::Foreign`], is no connection of ours: it keeps answers to the node from being taken for requests.
//! Neither is a masqueraded one with [`flow_flags::FOREIGN`]: it keeps its tuple from being taken.)
//!
//! Keys are whole tuples. (`docs/decisions.md` says why not one entry keyed by the client's end.)

use crate::{
    addr::{Addr, Port},
    layout::protocol,
};

/// Which leg of a connection an entry is found by.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Client to frontend.
    Request = 0,
    /// Client to endpoint.
    Forwarded = 1,
    /// Node to endpoint.
    Masqueraded = 2,
    /// A flow of the node itself from a port that is also a NodePort: its answers are not requests.
    Foreign = 3,
    /// No connection either: there while one CPU puts an entry in the place of another of these ends, so that no second does.
    Turn = 4,
}

/// Key of a flow entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowKey {
    /// Address of the end that opened the connection.
    pub near: Addr,
    /// Address of the end that was opened to.
    pub far: Addr,
    /// Port of the near end.
    pub near_port: Port,
    /// Port of the far end.
    pub far_port: Port,
    /// IP protocol number.
    pub proto: u8,
    /// A [`Kind`].
    pub kind: u8,
    /// Always 0.
    pub pad: u16,
}

impl FlowKey {
    /// The key of this kind and these ends.
    #[must_use]
    #[inline(always)]
    pub const fn new(kind: Kind, near: Addr, near_port: Port, far: Addr, far_port: Port, proto: u8) -> Self {
        Self { near, far, near_port, far_port, proto, kind: kind as u8, pad: 0 }
    }
}

/// A flow entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The client.
    pub client: Addr,
    /// The address that it connected to.
    pub frontend: Addr,
    /// The endpoint that was chosen.
    pub endpoint: Addr,
    /// The node's address, once the source is masqueraded.
    pub node: Addr,
    /// The client's port.
    pub client_port: Port,
    /// The port that it connected to.
    pub frontend_port: Port,
    /// The endpoint's port.
    pub endpoint_port: Port,
    /// The client's port as the host sees it behind the ingress hook: another than `client_port` only where a connection of
    /// the same client port has the same endpoint, through another frontend or through one at all.
    pub forwarded_port: Port,
    /// The node's port; 0 until the source is masqueraded.
    pub node_port: Port,
    /// Bits of [`state`].
    pub state: u8,
    /// Bits of [`flow_flags`].
    pub flags: u8,
    /// Id of the endpoint.
    pub endpoint_id: u32,
    /// Generation of that id.
    pub generation: u32,
    /// Id of the Service port.
    pub service: u32,
    /// When a packet was last noticed, in the programs' seconds.
    pub seen: u32,
    /// With [`flow_flags::MASQUERADE`] the device by which requests leave. Otherwise the bridge that requests are handed to by
    /// `bpf_redirect_neigh`, or 0: both ends are ports of it, and answers don't pass the host's stack either.
    pub device: u32,
}

/// Bits of [`Flow::state`].
pub mod state {
    /// The client sent FIN.
    pub const CLIENT_FIN: u8 = 1 << 0;
    /// The endpoint sent FIN.
    pub const ENDPOINT_FIN: u8 = 1 << 1;
    /// Either sent RST.
    pub const RESET: u8 = 1 << 2;
    /// The endpoint has answered.
    pub const REPLIED: u8 = 1 << 3;
    /// It is closed, and its ends are those of a connection straight to the endpoint: answers are that one's.
    pub const OUTLIVED: u8 = 1 << 4;
    /// Any sign that the connection ends.
    pub const CLOSING: u8 = CLIENT_FIN | ENDPOINT_FIN | RESET;
}

/// Bits of [`Flow::flags`].
pub mod flow_flags {
    /// The source is rewritten on the way out.
    pub const MASQUERADE: u8 = 1 << 0;
    /// The frontend is a NodePort.
    pub const NODE_PORT: u8 = 1 << 1;
    /// No connection of ours, but one by which the node itself uses a tuple that masquerading could take.
    pub const FOREIGN: u8 = 1 << 2;
    /// The client stays with the endpoint beyond this connection.
    pub const AFFINITY: u8 = 1 << 3;
    /// The client is none that the local detector takes for a pod, nor the node itself.
    pub const OUTSIDE: u8 = 1 << 4;
    /// Through no frontend: the client speaks to the endpoint straight, from a port by which it has a connection through one. With
    /// [`MASQUERADE`] the client is the node, whose port one of ours has been masqueraded by.
    pub const STRAIGHT: u8 = 1 << 5;
}

/// What [`Flow::service`] and [`Flow::endpoint_id`] are with [`flow_flags::STRAIGHT`]. No id is as large.
pub const NO_ID: u32 = u32::MAX;

/// TCP flags, the 14th byte of the header (RFC 9293 §3.1).
pub mod tcp_flags {
    /// No more data.
    pub const FIN: u8 = 1 << 0;
    /// Synchronise.
    pub const SYN: u8 = 1 << 1;
    /// Reset.
    pub const RST: u8 = 1 << 2;
    /// The acknowledgement counts.
    pub const ACK: u8 = 1 << 4;
}

/// Seconds after which a UDP flow without an answer is over (nf_conntrack_udp_timeout).
pub const IDLE_UDP: u32 = 30;
/// The same, once there was an answer (nf_conntrack_udp_timeout_stream).
pub const IDLE_UDP_REPLIED: u32 = 120;
/// Seconds after which an established TCP connection is over (conntrack.tcpEstablishedTimeout).
pub const IDLE_TCP: u32 = 24 * 3600;
/// The same, where the endpoint has not answered (nf_conntrack_tcp_timeout_syn_sent).
pub const IDLE_TCP_UNANSWERED: u32 = 120;
/// The same, once one side has ended it (conntrack.tcpCloseWaitTimeout).
pub const IDLE_TCP_HALF_CLOSED: u32 = 3600;
/// The same, once both sides have, or one has reset it.
pub const IDLE_TCP_CLOSED: u32 = 60;
/// The other entries of a connection are looked after when this many seconds have passed, a power of two.
pub const CARE_INTERVAL: u32 = 2;

/// Seconds of silence after which a UDP flow lends its masqueraded port to a flow that finds no free one. Entries are looked after
/// every [`CARE_INTERVAL`].
pub const SILENT_UDP: u32 = CARE_INTERVAL + 2;

impl Flow {
    /// No connection.
    pub const NONE: Self = Self {
        client: Addr::UNSPECIFIED_V6,
        frontend: Addr::UNSPECIFIED_V6,
        endpoint: Addr::UNSPECIFIED_V6,
        node: Addr::UNSPECIFIED_V6,
        client_port: Port::ZERO,
        frontend_port: Port::ZERO,
        endpoint_port: Port::ZERO,
        forwarded_port: Port::ZERO,
        node_port: Port::ZERO,
        state: 0,
        flags: 0,
        endpoint_id: 0,
        generation: 0,
        service: 0,
        seen: 0,
        device: 0,
    };

    /// Whether so much time has passed that the connection is over.
    #[must_use]
    #[inline(always)]
    pub const fn is_idle(&self, proto: u8, now: u32) -> bool {
        let replied = self.state & state::REPLIED != 0;
        let limit = if proto != protocol::TCP {
            if replied { IDLE_UDP_REPLIED } else { IDLE_UDP }
        } else if self.is_closed() {
            IDLE_TCP_CLOSED
        } else if self.state & state::CLOSING != 0 {
            IDLE_TCP_HALF_CLOSED
        } else if replied {
            IDLE_TCP
        } else {
            IDLE_TCP_UNANSWERED
        };
        // Another CPU may have seen a packet a moment after `now`.
        now.wrapping_sub(self.seen).cast_signed() > limit.cast_signed()
    }

    /// Whether its masqueraded port may go to another connection that finds no free one: it is closed, or UDP that has been silent for
    /// some time. If it goes on, it gets another port.
    #[must_use]
    #[inline(always)]
    pub const fn lends_port(&self, proto: u8, now: u32) -> bool {
        match proto {
            protocol::TCP => self.is_closed(),
            protocol::UDP => now.wrapping_sub(self.seen).cast_signed() > SILENT_UDP.cast_signed(),
            _ => false,
        }
    }

    /// The bridge that requests are handed to, or 0.
    #[must_use]
    #[inline(always)]
    pub const fn bridge(&self) -> u32 {
        if self.flags & flow_flags::MASQUERADE == 0 { self.device } else { 0 }
    }

    /// Whether two entries are of one connection: the same client end may have been sent to another endpoint meanwhile.
    #[must_use]
    #[inline(always)]
    pub const fn goes_with(&self, other: &Self) -> bool {
        self.endpoint_id == other.endpoint_id
            && self.generation == other.generation
            && self.forwarded_port.be == other.forwarded_port.be
    }

    /// Whether both sides have ended the connection.
    #[must_use]
    #[inline(always)]
    pub const fn is_closed(&self) -> bool {
        let both = state::CLIENT_FIN | state::ENDPOINT_FIN;
        self.state & state::RESET != 0 || self.state & both == both
    }

    /// Notes the flags of a TCP packet. Answers whether it is the first sign that this side ends the connection.
    #[inline(always)]
    pub const fn note(&mut self, flags: u8, fin: u8) -> bool {
        let before = self.state;
        if flags & tcp_flags::RST != 0 {
            self.state |= state::RESET;
        } else if flags & tcp_flags::FIN != 0 {
            self.state |= fin;
        }
        self.state != before
    }

    /// The key by which requests find it.
    #[must_use]
    #[inline(always)]
    pub const fn request_key(&self, proto: u8) -> FlowKey {
        FlowKey::new(Kind::Request, self.client, self.client_port, self.frontend, self.frontend_port, proto)
    }

    /// The key by which it is found on the way out.
    #[must_use]
    #[inline(always)]
    pub const fn forwarded_key(&self, proto: u8) -> FlowKey {
        FlowKey::new(Kind::Forwarded, self.client, self.forwarded_port, self.endpoint, self.endpoint_port, proto)
    }

    /// The key by which masqueraded answers find it.
    #[must_use]
    #[inline(always)]
    pub const fn masqueraded_key(&self, proto: u8) -> FlowKey {
        FlowKey::new(Kind::Masqueraded, self.node, self.node_port, self.endpoint, self.endpoint_port, proto)
    }
}

/// Key of what is remembered about a fragmented packet, as it looks at one hook.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FragmentKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Identification.
    pub id: u32,
    /// IP protocol number.
    pub proto: u8,
    /// 0 at ingress, 1 at egress.
    pub hook: u8,
    /// Always 0.
    pub pad: u16,
}

/// The ports that the first fragment showed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentPorts {
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
}

const _: () = {
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 96);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<FragmentPorts>() == 4);
};

#[cfg(feature = "user")]
mod pod {
    use super::{Flow, FlowKey, FragmentKey, FragmentPorts};

    // SAFETY: `repr(C)`, integers only, and the size assertions above leave no room for padding.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Flow {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FragmentKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FragmentPorts {}
}
