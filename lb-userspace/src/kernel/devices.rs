//! The devices and addresses of this network namespace, and what the programs are told about them.
//!
//! In: links and addresses as rtnetlink tells them ([`watch`]). Out: which devices get programs, rows of the tables DEVICES and
//! NODE_ADDRESSES. Pure, but for [`watch`]; nothing is attached or written here.

pub mod findings;
pub mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::{
    addr::Addr,
    layout::{Device, device_flags},
};

use super::links::Port;

/// Kinds of links as the kernel names them.
mod kind {
    pub const BRIDGE: &str = "bridge";
    pub const PAIRS: [&str; 2] = ["veth", "netkit"];
    /// They share a lower device's wire; a pod that has one enters the node by no device of its own.
    pub const SHARING: [&str; 4] = ["macvlan", "macvtap", "ipvlan", "ipvtap"];
}

/// What stands before the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// An Ethernet header.
    Ethernet,
    /// Nothing: tun, WireGuard, IP in IP.
    None,
    /// The loopback device, which gets no programs.
    Loopback,
    /// Something that never carries Service traffic.
    Other,
}

impl LinkLayer {
    /// By `ARPHRD_*` number.
    pub const fn new(arphrd: u16) -> Self {
        match arphrd {
            1 => Self::Ethernet,
            772 => Self::Loopback,
            // PPP, RAWIP, TUNNEL, TUNNEL6, SIT, IPGRE, IP6GRE, NONE
            512 | 519 | 768 | 769 | 776 | 778 | 823 | 0xfffe => Self::None,
            _ => Self::Other,
        }
    }
}

/// A link of this network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its ifindex.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Its kind, if it has one.
    pub kind: Option<String>,
    /// What stands before the IP header.
    pub layer: LinkLayer,
    /// Whether it is up.
    pub up: bool,
    /// Ifindex of what it is a port of.
    pub master: Option<u32>,
    /// Its MAC address.
    pub mac: Option<[u8; 6]>,
    /// Of a pair: the other end's ifindex, unless that is known to be in another namespace.
    pub peer: Option<u32>,
    /// Of a device that shares another's wire: that other's ifindex.
    pub lower: Option<u32>,
    /// Of a bridge: whether its own setting hands IPv4 and IPv6 to netfilter.
    pub nf_call: [bool; 2],
    /// Tells apart two links that had the same ifindex one after the other.
    pub birth: u64,
}

/// An address of this network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The device that has it.
    pub ifindex: u32,
    /// The address.
    pub addr: IpAddr,
    /// Valid everywhere (scope global).
    pub global: bool,
    /// Added to a subnet that had an address before (IPv4), or temporary (IPv6).
    pub secondary: bool,
    /// Not to be chosen as a source: deprecated, tentative, duplicate.
    pub unusable: bool,
}

/// Links and addresses at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Links by ifindex.
    pub links: BTreeMap<u32, Link>,
    /// Addresses, in the kernel's order.
    pub addresses: Vec<Address>,
    /// Whether br_netfilter hands bridged IPv4 and IPv6 to netfilter in this namespace.
    pub bridge_netfilter: [bool; 2],
}

impl Snapshot {
    /// Whether the other end of a pair is in this namespace as well. Ends tell no change when their peer leaves, so the
    /// peer must name this end too.
    fn has_peer_here(&self, link: &Link) -> bool {
        link.peer.and_then(|peer| self.links.get(&peer)).is_some_and(|peer| peer.peer == Some(link.ifindex))
    }

    /// The devices that get programs. An end of a pair whose other end has yet to leave for a pod is not among them: nobody
    /// knows which of the two will leave, and with the program on it.
    pub fn ports(&self) -> Vec<Port> {
        self.links
            .values()
            .filter(|link| matches!(link.layer, LinkLayer::Ethernet | LinkLayer::None) && !self.has_peer_here(link))
            .map(|link| Port {
                ifindex: link.ifindex,
                name: link.name.clone(),
                ethernet: link.layer == LinkLayer::Ethernet,
                birth: link.birth,
            })
            .collect()
    }

    fn bridge_of(&self, link: &Link) -> Option<&Link> {
        link.master.and_then(|master| self.links.get(&master)).filter(|m| m.kind.as_deref() == Some(kind::BRIDGE))
    }

    /// The source that the kernel would choose for packets that leave by a device: its own first address, else that of
    /// what it is a port of, else the node's primary address, else any.
    fn source(&self, link: &Link, primary: &[IpAddr], v4: bool) -> Option<IpAddr> {
        let of = |ifindex: Option<u32>| {
            self.addresses
                .iter()
                .filter(|address| ifindex.is_none_or(|ifindex| address.ifindex == ifindex))
                .filter(|address| address.addr.is_ipv4() == v4 && address.global && !address.unusable)
                .min_by_key(|address| address.secondary)
                .map(|address| address.addr)
        };
        let here = |addr: &&IpAddr| addr.is_ipv4() == v4 && self.addresses.iter().any(|a| a.addr == **addr);
        of(Some(link.ifindex))
            .or_else(|| link.master.and_then(|master| of(Some(master))))
            .or_else(|| primary.iter().find(here).copied())
            .or_else(|| of(None))
    }

    /// Rows of the table DEVICES: one for each link, the loopback device too. `is_local` says whether the local detector takes what
    /// enters by a device of this name as local; netfilter would see the bridge where the device is a port of one.
    pub fn device_rows(&self, primary: &[IpAddr], is_local: impl Fn(&str) -> bool) -> BTreeMap<u32, Device> {
        let masters: BTreeSet<u32> = self.links.values().filter_map(|link| link.master).collect();
        let row = |link: &Link| {
            let bridge = self.bridge_of(link);
            let source = |v4| self.source(link, primary, v4).map(Addr::from);
            let mut flags = 0;
            if is_local(bridge.map_or(&link.name, |bridge| &bridge.name)) {
                flags |= device_flags::LOCAL_SOURCES;
            }
            if masters.contains(&link.ifindex) {
                flags |= device_flags::HAS_PORTS;
            }
            if let Some(bridge) = bridge {
                let families = [device_flags::NEIGH_V4, device_flags::NEIGH_V6];
                for ((flag, netfilter), own) in families.into_iter().zip(self.bridge_netfilter).zip(bridge.nf_call) {
                    if !netfilter && !own {
                        flags |= flag;
                    }
                }
            }
            let mut bridge_mac = [0; 8];
            if let Some(mac) = bridge.and_then(|bridge| bridge.mac) {
                let [a, b, c, d, e, f] = mac;
                bridge_mac = [a, b, c, d, e, f, 0, 0];
            }
            Device {
                masquerade_v4: source(true).unwrap_or(Addr::UNSPECIFIED_V4),
                masquerade_v6: source(false).unwrap_or(Addr::UNSPECIFIED_V6),
                bridge: bridge.map_or(0, |bridge| bridge.ifindex),
                flags,
                bridge_mac,
            }
        };
        self.links.values().map(|link| (link.ifindex, row(link))).collect()
    }

    /// The node's addresses with the name of their device, loopback's too: what LOCAL is said of, and what NodePorts may answer
    /// on.
    pub fn node_addresses(&self) -> BTreeSet<(String, IpAddr)> {
        self.addresses
            .iter()
            .filter_map(|address| Some((self.links.get(&address.ifindex)?.name.clone(), address.addr)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn link(ifindex: u32, name: &str, kind: Option<&str>) -> Link {
        Link {
            ifindex,
            name: name.into(),
            kind: kind.map(Into::into),
            layer: LinkLayer::Ethernet,
            up: true,
            master: None,
            mac: Some([2, 0, 0, 0, 0, 1]),
            peer: None,
            lower: None,
            nf_call: [false; 2],
            birth: 0,
        }
    }

    fn address(ifindex: u32, addr: &str) -> Address {
        let addr: IpAddr = addr.parse().unwrap();
        Address { ifindex, addr, global: true, secondary: false, unusable: false }
    }

    pub(super) fn snapshot(links: Vec<Link>, addresses: Vec<Address>) -> Snapshot {
        Snapshot {
            links: links.into_iter().map(|link| (link.ifindex, link)).collect(),
            addresses,
            bridge_netfilter: [false; 2],
        }
    }

    #[test]
    fn an_end_of_a_pair_waits_until_its_peer_has_left() {
        let mut ends = [link(2, "a", Some("veth")), link(3, "b", Some("veth"))];
        ends[0].peer = Some(3);
        ends[1].peer = Some(2);
        let mut snapshot = snapshot(ends.to_vec(), vec![]);
        assert_eq!(snapshot.ports(), []);
        snapshot.links.remove(&3);
        assert_eq!(snapshot.ports().len(), 1);
        // A stranger that gets the peer's ifindex is no peer.
        snapshot.links.insert(3, link(3, "c", None));
        assert_eq!(snapshot.ports().len(), 2);
    }

    #[test]
    fn loopback_and_strange_devices_get_no_programs() {
        for (arphrd, ports, ethernet) in [(1, 1, true), (772, 0, false), (0xfffe, 1, false), (280, 0, false)] {
            let mut link = link(2, "x", None);
            link.layer = LinkLayer::new(arphrd);
            let found = snapshot(vec![link], vec![]).ports();
            assert_eq!(found.len(), ports, "{arphrd}");
            assert!(found.iter().all(|port| port.ethernet == ethernet), "{arphrd}");
        }
    }

    #[test]
    fn the_masquerade_source_is_the_one_that_the_kernel_would_choose() {
        let primary: Vec<IpAddr> = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let node = [address(9, "192.0.2.1"), address(9, "2001:db8::1")];
        let secondary = Address { secondary: true, ..address(2, "10.0.0.1") };
        let unusable = Address { unusable: true, ..address(2, "2001:db8::2") };
        let link_local = Address { global: false, ..address(2, "fe80::1") };
        for (name, own, v4, v6) in [
            ("own before primary", vec![address(2, "10.0.0.2")], "10.0.0.2", "2001:db8::1"),
            (
                "primary of a subnet before secondary",
                vec![secondary, address(2, "10.0.0.2")],
                "10.0.0.2",
                "2001:db8::1",
            ),
            ("never deprecated or link-local", vec![unusable, link_local], "192.0.2.1", "2001:db8::1"),
            ("own IPv6", vec![address(2, "2001:db8::9")], "192.0.2.1", "2001:db8::9"),
        ] {
            let addresses = own.into_iter().chain(node).collect();
            let rows = snapshot(vec![link(2, "eth0", None), link(9, "eth1", None)], addresses)
                .device_rows(&primary, |_| false);
            assert_eq!(IpAddr::from(rows[&2].masquerade_v4), v4.parse::<IpAddr>().unwrap(), "{name}");
            assert_eq!(IpAddr::from(rows[&2].masquerade_v6), v6.parse::<IpAddr>().unwrap(), "{name}");
        }
    }

    #[test]
    fn without_any_address_the_source_is_unspecified() {
        let rows = snapshot(vec![link(2, "eth0", None)], vec![]).device_rows(&[], |_| false);
        assert_eq!(rows[&2].masquerade_v4, Addr::UNSPECIFIED_V4);
        assert_eq!(rows[&2].masquerade_v6, Addr::UNSPECIFIED_V6);
    }

    #[test]
    fn a_port_knows_its_bridge_and_whether_netfilter_sees_it() {
        let all = device_flags::NEIGH_V4 | device_flags::NEIGH_V6;
        for (namespace, own, flags) in [
            ([false, false], [false, false], all),
            ([true, false], [false, false], device_flags::NEIGH_V6),
            ([false, false], [false, true], device_flags::NEIGH_V4),
            ([true, true], [true, true], 0),
        ] {
            let mut port = link(3, "veth1", Some("veth"));
            port.master = Some(2);
            let mut bridge = link(2, "br0", Some("bridge"));
            bridge.nf_call = own;
            let mut snapshot = snapshot(vec![port, bridge], vec![address(2, "10.244.0.1")]);
            snapshot.bridge_netfilter = namespace;
            let rows = snapshot.device_rows(&[], |name| name == "br0");
            assert_eq!(rows[&3].flags, flags | device_flags::LOCAL_SOURCES);
            assert_eq!(rows[&3].bridge, 2);
            assert_eq!(rows[&3].bridge_mac, [2, 0, 0, 0, 0, 1, 0, 0]);
            assert_eq!(IpAddr::from(rows[&3].masquerade_v4), "10.244.0.1".parse::<IpAddr>().unwrap());
            assert_eq!(rows[&2].bridge, 0);
            assert_eq!(rows[&2].flags, device_flags::LOCAL_SOURCES | device_flags::HAS_PORTS);
        }
    }
}
