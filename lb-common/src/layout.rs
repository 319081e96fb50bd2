//! Keys and values of the maps that the agent writes and the programs read (flow state: [`crate::flow`]).
//!
//! Every structure is made of integers, without padding, and its size is asserted: a pinned map outlives the program that
//! made it, so a change here is a new [`LAYOUT_VERSION`].

use crate::addr::{Addr, Port};

/// Stands in the path of every pin. A program of another version never opens these maps.
pub const LAYOUT_VERSION: u32 = 1;

/// IP protocol numbers (IANA).
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// Where clients connect to.
///
/// A NodePort has the unspecified address of its family. Port 0 with protocol 0 stands for every port and protocol of
/// the address that has no frontend of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// The address that packets are sent to.
    pub addr: Addr,
    /// The port that packets are sent to.
    pub port: Port,
    /// IP protocol number.
    pub proto: u8,
    /// Always 0.
    pub pad: u8,
}

impl FrontendKey {
    /// The frontend at an address and port.
    #[must_use]
    #[inline(always)]
    pub const fn new(addr: Addr, port: Port, proto: u8) -> Self {
        Self { addr, port, proto, pad: 0 }
    }

    /// The frontend that stands for every other port of an address.
    #[must_use]
    #[inline(always)]
    pub const fn any_port(addr: Addr) -> Self {
        Self::new(addr, Port::ZERO, 0)
    }
}

/// Consecutive slots, each the id of an endpoint that may be chosen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    /// Index of the first slot.
    pub offset: u32,
    /// How many slots. 0: nothing to choose from.
    pub len: u32,
}

/// What a frontend does with its packets. Policies have become ranges and flags in the agent's `plan`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frontend {
    /// For clients inside: everyone for a ClusterIP, pods and the node itself for the others.
    pub internal: Range,
    /// For clients outside.
    pub external: Range,
    /// Id of the Service port.
    pub service: u32,
    /// Bits of [`frontend_flags`].
    pub flags: u32,
    /// Seconds for which a client stays with its endpoint (`sessionAffinity: ClientIP`); 0: it doesn't.
    pub affinity: u32,
}

/// Bits of [`Frontend::flags`].
pub mod frontend_flags {
    /// The source is always rewritten.
    pub const MASQUERADE: u32 = 1 << 0;
    /// The source is rewritten unless the local detector knows it (`kube-proxy.md` M2).
    pub const MASQUERADE_UNDETECTED: u32 = 1 << 1;
    /// externalTrafficPolicy Local: the range depends on the client, and only the node itself is masqueraded (M5–M7).
    pub const EXTERNAL_LOCAL: u32 = 1 << 2;
    /// An empty internal range drops instead of refusing: endpoints exist elsewhere.
    pub const INTERNAL_DROP: u32 = 1 << 3;
    /// An empty external range drops instead of refusing.
    pub const EXTERNAL_DROP: u32 = 1 << 4;
    /// Only sources in the Service's ranges may connect.
    pub const SOURCE_RANGES: u32 = 1 << 5;
    /// A NodePort: the address belongs to the node, so packets in the middle of a connection may be someone else's.
    pub const NODE_PORT: u32 = 1 << 6;
    /// Stands for every other port of the address.
    pub const ANY_PORT: u32 = 1 << 7;
    /// A ClusterIP: left to the host where the address is the node's own.
    pub const CLUSTER_IP: u32 = 1 << 9;
    /// The source is kept where the endpoint is on this node (`--preserve-client-ip`).
    pub const PRESERVE_LOCAL: u32 = 1 << 8;
    /// The internal range holds the endpoints of this node only (internalTrafficPolicy Local).
    pub const INTERNAL_LOCAL: u32 = 1 << 10;
}

/// One endpoint of one Service port: the same address in two Services is two endpoints.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// The pod's address.
    pub addr: Addr,
    /// The target port.
    pub port: Port,
    /// Bits of [`endpoint_flags`]; 0 once the endpoint is gone.
    pub flags: u16,
    /// Id of the Service port.
    pub service: u32,
    /// Counts the uses of this id, so that a flow notices when its id belongs to another endpoint.
    pub generation: u32,
}

impl Endpoint {
    /// Whether the id still stands for the endpoint of this generation, and it serves.
    #[must_use]
    #[inline(always)]
    pub const fn serves(&self, generation: u32) -> bool {
        self.generation == generation && self.flags & endpoint_flags::SERVING != 0
    }
}

/// Bits of [`Endpoint::flags`].
pub mod endpoint_flags {
    /// Serving in some slice of the Service: flows stay with it, whether or not new ones may choose it.
    pub const SERVING: u16 = 1 << 0;
    /// On this node.
    pub const LOCAL: u16 = 1 << 1;
    /// In the set that policy Cluster chooses from. Said only where the Service has session affinity.
    pub const IN_CLUSTER: u16 = 1 << 2;
    /// In the set that policy Local chooses from. Said only where the Service has session affinity.
    pub const IN_LOCAL: u16 = 1 << 3;
}

/// An address of this node: the value of the map keyed by [`Addr`], bits of [`node_flags`].
pub type NodeAddress = u32;

/// Bits of [`NodeAddress`].
pub mod node_flags {
    /// On an interface of the node, or loopback.
    pub const LOCAL: u32 = 1 << 0;
    /// NodePorts answer here.
    pub const NODE_PORTS: u32 = 1 << 1;
}

/// A prefix of addresses that belongs to a Service port (source ranges), or to `service` 0 (CIDRs of the node or cluster).
///
/// Key of longest-prefix-match maps: `prefix_len` counts the bits of `service` and `addr` that must match.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PrefixKey {
    /// 32 + the prefix length within the 128-bit form of the address.
    pub prefix_len: u32,
    /// Id of the Service port.
    pub service: u32,
    /// The network address.
    pub addr: Addr,
}

impl PrefixKey {
    /// The longest prefix, as look-ups use it.
    #[must_use]
    #[inline(always)]
    pub const fn host(service: u32, addr: Addr) -> Self {
        Self { prefix_len: 160, service, addr }
    }
}

/// What the programs know about a device, keyed by its ifindex.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Source of masqueraded IPv4 packets that leave by it; unspecified: none.
    pub masquerade_v4: Addr,
    /// Source of masqueraded IPv6 packets that leave by it; unspecified: none.
    pub masquerade_v6: Addr,
    /// The bridge that it is a port of, or 0.
    pub bridge: u32,
    /// Bits of [`device_flags`].
    pub flags: u32,
    /// The bridge's MAC address; two bytes of padding.
    pub bridge_mac: [u8; 8],
}

/// Bits of [`Device::flags`].
pub mod device_flags {
    /// The local detector takes everything that enters here as local (BridgeInterface, InterfaceNamePrefix).
    pub const LOCAL_SOURCES: u32 = 1 << 0;
    /// Between ports of the bridge, IPv4 requests are handed to it by `bpf_redirect_neigh` (br_netfilter is off).
    pub const NEIGH_V4: u32 = 1 << 1;
    /// The same for IPv6.
    pub const NEIGH_V6: u32 = 1 << 2;
    /// Others are its ports (a bridge, a bond): what enters by it has entered by one of them, and is seen again.
    pub const HAS_PORTS: u32 = 1 << 3;
}

/// What may change while the programs run; the only element of an array.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// A network that holds every IPv4 ServiceCIDR.
    pub cidrs_v4: Cover,
    /// A network that holds every IPv6 ServiceCIDR.
    pub cidrs_v6: Cover,
    /// Until this second of the programs' clock connections may exist that are older than the first start: packets in the
    /// middle of an unknown TCP connection are left to the stack, where conntrack knows them. 0: there are none.
    pub mid_flow_left_until: u32,
    /// Bits of [`settings_flags`].
    pub flags: u32,
}

/// Bits of [`Settings::flags`].
pub mod settings_flags {
    /// TCP connections are reset when their endpoint is gone (`--terminate-connections`).
    pub const TERMINATE: u32 = 1 << 0;
}

impl Settings {
    /// Whether TCP connections end with their endpoint.
    #[must_use]
    #[inline(always)]
    pub const fn terminates(&self) -> bool {
        self.flags & settings_flags::TERMINATE != 0
    }

    /// Whether packets in the middle of an unknown TCP connection are left to the host's stack.
    #[must_use]
    #[inline(always)]
    pub const fn leaves_mid_flow(&self, now: u32) -> bool {
        self.mid_flow_left_until != 0 && now.wrapping_sub(self.mid_flow_left_until).cast_signed() < 0
    }
}

/// A network as address and mask. The default holds nothing; [`Cover::EVERYTHING`] is the network of length 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cover {
    /// The network's address.
    pub network: Addr,
    /// Its mask.
    pub mask: Addr,
}

impl Cover {
    /// Every address: what two networks without a common bit are covered by. Told from nothing by a network address.
    pub const EVERYTHING: Self = Self { network: Addr { words: [1, 0, 0, 0] }, mask: Addr::UNSPECIFIED_V6 };

    /// Whether the network holds the address.
    #[must_use]
    #[inline(always)]
    pub const fn holds(&self, addr: &Addr) -> bool {
        self.mask.words[0] | self.network.words[0] != 0 && addr.within(&self.network, &self.mask)
    }
}

/// Length of [`ServiceName`]: three DNS labels (63), a protocol and separators.
pub const SERVICE_NAME_LEN: usize = 200;

/// `namespace/name:port/PROTO`, filled up with zeros: what the id of a Service port stands for.
pub type ServiceName = [u8; SERVICE_NAME_LEN];

/// How many 64-bit words a bit array has: 2^20 bits, 128 KiB.
///
/// A constant, not a limit: at 100,000 entries one in ten other destinations pays for a hash look-up.
pub const BIT_WORDS: usize = 1 << 14;

/// The bit that stands for an address and port in the arrays "may be a frontend" and "may be an endpoint".
#[must_use]
#[inline(always)]
pub const fn bit_index(addr: &Addr, port: Port) -> u32 {
    let [a, b, c, d] = addr.words;
    let folded = (a ^ b.rotate_left(9) ^ c.rotate_left(18) ^ d) as u64 | (port.be as u64) << 32;
    (folded.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 44) as u32
}

const _: () = {
    assert!(size_of::<Addr>() == 16);
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<Range>() == 8);
    assert!(size_of::<Frontend>() == 28);
    assert!(size_of::<Endpoint>() == 28);
    assert!(size_of::<PrefixKey>() == 24);
    assert!(size_of::<Device>() == 48);
    assert!(size_of::<Settings>() == 72);
    assert!(BIT_WORDS * 64 == 1 << 20);
};

#[cfg(feature = "user")]
mod pod {
    use super::{Addr, Device, Endpoint, Frontend, FrontendKey, PrefixKey, Settings};

    macro_rules! pod {
        ($($type:ty),*) => {$(
            // SAFETY: `repr(C)`, integers only, and the size assertions above leave no room for padding.
            unsafe impl aya::Pod for $type {}
        )*};
    }
    pod!(Addr, Device, Endpoint, Frontend, FrontendKey, PrefixKey, Settings);
}
