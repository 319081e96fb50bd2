//! What a lab looks like: how many nodes and pods, how pods are wired, what else runs on the host. Plain data.
//!
//! Addresses follow from the numbers, so that manifests can be written by hand: node N is 10.99.0.1N and fd00:99::1N, its pod I is
//! 10.244.N.1I and fd00:10:244:N::1I (counted from 1), the outside client is 10.99.0.200 and fd00:99::200, and everything to
//! 10.99.1.0/24 and fd00:99:1::/64 (LoadBalancer addresses) goes from there to node 1.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

/// How pods reach their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// One veth pair a pod with host routes, as most CNIs make them.
    Ptp,
    /// Pods are ports of a bridge `cni0`.
    Bridge {
        /// Whether a port may send a frame back to the port it came by.
        hairpin_mode: bool,
        /// Whether bridged packets pass the host's netfilter (br_netfilter).
        netfilter: bool,
    },
}

/// A cluster to build.
#[derive(Clone, Debug)]
pub struct Topology {
    /// Number of nodes, 1 to 9.
    pub nodes: u8,
    /// Number of pods on each node, 0 to 80.
    pub pods_per_node: u8,
    /// How pods are wired.
    pub wiring: Wiring,
    /// A CNI's rules on every node: INVALID packets dropped and counted, masquerade for what leaves the cluster, strict rp_filter.
    pub cni_rules: bool,
    /// The agent's binary; without it `FAIRLEAD_BIN`, then the target folder.
    pub binary: Option<PathBuf>,
}

impl Default for Topology {
    fn default() -> Self {
        Self { nodes: 2, pods_per_node: 2, wiring: Wiring::Ptp, cni_rules: false, binary: None }
    }
}

/// The node's IPv4 address.
pub fn node_v4(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, 10 + node)
}

/// The node's IPv6 address.
pub fn node_v6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, decimal_digits(10 + node))
}

/// A pod's IPv4 address.
pub fn pod_v4(node: u8, pod: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, 10 + pod)
}

/// A pod's IPv6 address.
pub fn pod_v6(node: u8, pod: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, u16::from(node), 0, 0, 0, decimal_digits(10 + pod))
}

/// The gateway of a node's pods, IPv4.
pub fn gateway_v4(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, 1)
}

/// The gateway of a node's pods, IPv6.
pub fn gateway_v6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, u16::from(node), 0, 0, 0, 1)
}

/// The outside client's IPv4 address.
pub const OUTSIDE_V4: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 200);

/// The outside client's IPv6 address.
pub const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 0x200);

/// The switch, default gateway of nodes and outside client: packets for nowhere end there in silence.
pub const SWITCH_V4: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);

/// The switch's IPv6 address.
pub const SWITCH_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 1);

/// The group that reads as the number does in decimal: 12 becomes 0x12.
fn decimal_digits(number: u8) -> u16 {
    let number = u16::from(number);
    number / 100 * 0x100 + number / 10 % 10 * 0x10 + number % 10
}
