//! This node: what policies need to know of it, which of its addresses have NodePorts, what it takes as local.
//!
//! In: the Node object, the operator's options, addresses and names of interfaces. Out: a [`NodeView`], flags of addresses,
//! the local detector (`kube-proxy.md` §4, §5, §12).

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use lb_common::{
    addr::Addr,
    layout::{NodeAddress, node_flags},
};

use super::{
    Detected, NodeView, Problem,
    address::{host, same_family},
};
use crate::model::{
    Node,
    address::{parse_cidr, parse_ip},
};

/// The label that names a node's zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// What of the operator's wishes concerns the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions {
    /// kube-proxy's mode, whose defaults hold.
    pub mode: ProxyMode,
    /// `nodePortAddresses`: CIDRs and the keywords `primary`, `localhost`, `all`; empty: what the mode says.
    pub node_port_addresses: Vec<String>,
    /// `iptables.localhostNodePorts`.
    pub localhost_node_ports: bool,
    /// Which sources are local.
    pub detector: LocalDetector,
    /// `masqueradeAll`.
    pub masquerade_all: bool,
    /// `--preserve-client-ip`.
    pub preserve_client_ip: bool,
    /// `bindAddress`, unless unspecified: goes before the Node's addresses of its family.
    pub bind_address: Option<IpAddr>,
}

/// `mode`: picks the defaults in which kube-proxy's modes differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyMode {
    /// Also where nothing is said.
    #[default]
    Iptables,
    /// NodePorts as in iptables mode.
    Ipvs,
    /// NodePorts on primary addresses.
    Nftables,
}

impl ProxyMode {
    /// kube-proxy's word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
            Self::Nftables => "nftables",
        }
    }
}

/// `detectLocalMode`: which sources are pods of this cluster or node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LocalDetector {
    /// Nothing is known: no source is local.
    #[default]
    None,
    /// Sources in these networks, of which the first of each family counts.
    ClusterCidr(Vec<IpNet>),
    /// Sources in the Node's `podCIDRs`.
    NodeCidr,
    /// What enters by this bridge.
    BridgeInterface(String),
    /// What enters by interfaces whose names begin so.
    InterfaceNamePrefix(String),
}

impl LocalDetector {
    /// The networks whose addresses are local.
    #[must_use]
    pub fn cidrs(&self, node: Option<&Node>) -> Vec<IpNet> {
        let all: Vec<IpNet> = match self {
            Self::ClusterCidr(cidrs) => cidrs.clone(),
            Self::NodeCidr => node.map(pod_cidrs).unwrap_or_default(),
            Self::None | Self::BridgeInterface(_) | Self::InterfaceNamePrefix(_) => Vec::new(),
        };
        let first = |v4| all.iter().copied().find(|net| net.addr().is_ipv4() == v4);
        first(true).into_iter().chain(first(false)).collect()
    }

    /// The families in which it can tell.
    fn families(&self, node: Option<&Node>) -> Detected {
        match self {
            Self::None => Detected::default(),
            Self::BridgeInterface(_) | Self::InterfaceNamePrefix(_) => Detected { v4: true, v6: true },
            Self::ClusterCidr(_) | Self::NodeCidr => {
                let cidrs = self.cidrs(node);
                let any = |v4| cidrs.iter().any(|net| net.addr().is_ipv4() == v4);
                Detected { v4: any(true), v6: any(false) }
            }
        }
    }

    /// Whether everything that enters by this interface is local.
    #[must_use]
    pub fn takes_interface(&self, name: &str) -> bool {
        match self {
            Self::BridgeInterface(bridge) => bridge == name,
            Self::InterfaceNamePrefix(prefix) => name.starts_with(prefix.as_str()),
            Self::None | Self::ClusterCidr(_) | Self::NodeCidr => false,
        }
    }
}

impl NodeView {
    /// What policies need to know of the node with this name; it may not be there yet.
    #[must_use]
    pub fn new(name: &str, node: Option<&Node>, options: &NodeOptions) -> Self {
        Self {
            name: name.trim().to_lowercase(),
            zone: node
                .and_then(|node| node.metadata.labels.get(ZONE_LABEL))
                .filter(|zone| !zone.is_empty())
                .map(ToOwned::to_owned),
            primary: primary(node, options.bind_address),
            detects_local: options.detector.families(node),
            masquerade_all: options.masquerade_all,
            preserve_client_ip: options.preserve_client_ip,
        }
    }
}

/// The flags of the node's addresses: those on its interfaces, and loopback; where NodePorts are served at every address, also those of
/// `127.0.0.0/8` that are on none ([`Addr::LOOPBACK_NET_V4`]).
#[must_use]
pub fn node_addresses(
    interfaces: &[IpAddr],
    view: &NodeView,
    options: &NodeOptions,
) -> (BTreeMap<Addr, NodeAddress>, Vec<Problem>) {
    let (nets, problems) = node_port_nets(view, options);
    let answers = |addr: &IpAddr| {
        let mut of_family = nets.iter().filter(|net| same_family(&net.addr(), addr)).peekable();
        // None of the family is no restriction, but `primary` without a primary address is.
        of_family.peek().is_none() && !wants_primary(options) || of_family.any(|net| net.contains(addr))
    };
    let loopback = [IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])];
    let flags = |addr: &IpAddr| {
        let serves = if addr.is_loopback() {
            // Only iptables mode serves NodePorts there, and only IPv4; packets from outside never do (`decide`).
            addr.is_ipv4() && options.localhost_node_ports && options.mode == ProxyMode::Iptables
        } else {
            true
        };
        node_flags::LOCAL | if serves && answers(addr) { node_flags::NODE_PORTS } else { 0 }
    };
    let mut addresses: BTreeMap<Addr, NodeAddress> =
        interfaces.iter().chain(&loopback).map(|addr| (Addr::from(*addr), flags(addr))).collect();
    let serves = |flags: &NodeAddress| flags & node_flags::NODE_PORTS != 0;
    if is_everywhere(true, &nets, options) && addresses.get(&loopback[0].into()).is_some_and(serves) {
        addresses.insert(Addr::LOOPBACK_NET_V4, node_flags::LOCAL | node_flags::NODE_PORTS);
    }
    (addresses, problems)
}

/// Whether NodePorts are served at every address of the node of that family.
fn is_everywhere(v4: bool, nets: &[IpNet], options: &NodeOptions) -> bool {
    let mut of_family = nets.iter().filter(|net| net.addr().is_ipv4() == v4).peekable();
    !wants_primary(options) && (of_family.peek().is_none() || of_family.any(|net| net.prefix_len() == 0))
}

/// Where healthCheckNodePorts listen: everywhere, written as the unspecified address, unless NodePorts are restricted.
#[must_use]
pub fn health_check_addresses(
    addresses: &BTreeMap<Addr, NodeAddress>,
    view: &NodeView,
    options: &NodeOptions,
) -> Vec<IpAddr> {
    let (nets, _) = node_port_nets(view, options);
    let serving = || addresses.iter().filter(|(_, flags)| **flags & node_flags::NODE_PORTS != 0);
    let mut listen = Vec::new();
    for (v4, unspecified) in [(true, Addr::UNSPECIFIED_V4), (false, Addr::UNSPECIFIED_V6)] {
        if is_everywhere(v4, &nets, options) {
            listen.push(unspecified.into());
        } else {
            listen.extend(serving().map(|(addr, _)| *addr).filter(|addr| addr.is_v4() == v4).map(IpAddr::from));
        }
    }
    listen
}

/// Whether the keyword `primary` is in force.
fn wants_primary(options: &NodeOptions) -> bool {
    match options.node_port_addresses.as_slice() {
        [] => options.mode == ProxyMode::Nftables,
        list => list.iter().any(|entry| entry == "primary"),
    }
}

/// The networks that an entry of `nodePortAddresses` stands for.
fn networks(entry: &str) -> impl Iterator<Item = &str> + Clone {
    let keyword = match entry {
        "localhost" => ["127.0.0.0/8", "::1/128"],
        "all" => ["0.0.0.0/0", "::/0"],
        other => [other, ""],
    };
    keyword.into_iter().filter(|text| !text.is_empty())
}

fn node_port_nets(view: &NodeView, options: &NodeOptions) -> (Vec<IpNet>, Vec<Problem>) {
    let mut nets = Vec::new();
    let mut problems = Vec::new();
    if wants_primary(options) {
        nets.extend(view.primary.iter().copied().map(host));
    }
    for (index, text) in options.node_port_addresses.iter().enumerate().filter(|(_, text)| *text != "primary") {
        for text in networks(text) {
            match parse_cidr(text) {
                Some(net) => nets.push(net),
                None => problems.push(Problem {
                    object: "KubeProxyConfiguration".to_owned(),
                    field: format!("nodePortAddresses[{index}]"),
                    message: format!("`{text}` is neither a network nor a keyword, and is left out"),
                    remedy: "write it like 192.168.0.0/24, or primary, localhost or all".to_owned(),
                }),
            }
        }
    }
    (nets, problems)
}

/// The first InternalIP of each family, else the first ExternalIP.
fn primary(node: Option<&Node>, bind_address: Option<IpAddr>) -> Vec<IpAddr> {
    let of_type = |wanted: &'static str| {
        let addresses = node.map(|node| node.status.addresses.as_slice()).unwrap_or_default();
        addresses.iter().filter(move |address| address.type_ == wanted).filter_map(|address| parse_ip(&address.address))
    };
    let bound = bind_address.filter(|addr| !addr.is_unspecified());
    let candidates = || bound.into_iter().chain(of_type("InternalIP")).chain(of_type("ExternalIP"));
    let first = |v4| candidates().find(|addr| addr.is_ipv4() == v4);
    first(true).into_iter().chain(first(false)).collect()
}

fn pod_cidrs(node: &Node) -> Vec<IpNet> {
    let texts = node.spec.pod_cidrs.iter().chain(node.spec.pod_cidr.iter());
    texts.filter_map(|text| parse_cidr(text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::object::NodeStatusAddress;

    fn node() -> Node {
        let mut node = Node::default();
        let address =
            |(type_, address): (&str, &str)| NodeStatusAddress { type_: type_.into(), address: address.into() };
        node.status.addresses = [
            ("Hostname", "here"),
            ("ExternalIP", "203.0.113.1"),
            ("InternalIP", "192.168.0.2"),
            ("InternalIP", "192.168.0.3"),
            ("ExternalIP", "2001:db8::1"),
        ]
        .map(address)
        .into();
        node.spec.pod_cidrs = vec!["10.1.0.0/24".into(), "fd00:1::/64".into()];
        node
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn internal_addresses_come_before_external_ones_and_the_bound_one_before_both() {
        let primary = |bind: Option<&str>| {
            let bind_address = bind.map(|text| text.parse().unwrap());
            NodeView::new(" Here ", Some(&node()), &NodeOptions { bind_address, ..NodeOptions::default() }).primary
        };
        assert_eq!(primary(None), ips(&["192.168.0.2", "2001:db8::1"]));
        assert_eq!(primary(Some("0.0.0.0")), ips(&["192.168.0.2", "2001:db8::1"]));
        assert_eq!(primary(Some("192.168.9.9")), ips(&["192.168.9.9", "2001:db8::1"]));
        assert_eq!(NodeView::new(" Here ", None, &NodeOptions::default()).name, "here");
    }

    #[test]
    fn node_ports_answer_where_mode_and_option_say() {
        let all = ["192.168.0.2", "192.168.1.2", "2001:db8::1", "2001:db8:1::2"];
        let localhost = [&all[..], &["127.0.0.0", "127.0.0.1"]].concat();
        let first = ["192.168.0.2", "2001:db8::1"];
        for (mode, option, want) in [
            (ProxyMode::Iptables, &[][..], &localhost[..]),
            (ProxyMode::Ipvs, &[], &all),
            (ProxyMode::Nftables, &[], &first),
            (ProxyMode::Iptables, &["primary"], &first),
            (ProxyMode::Nftables, &["primary", "127.0.0.0/8"], &first),
            (ProxyMode::Iptables, &["primary", "127.0.0.0/8"], &["192.168.0.2", "2001:db8::1", "127.0.0.1"]),
            (ProxyMode::Nftables, &["0.0.0.0/0", "::/0"], &all),
            (ProxyMode::Nftables, &["all"], &all),
            (ProxyMode::Iptables, &["primary", "localhost"], &["192.168.0.2", "2001:db8::1", "127.0.0.1"]),
            (ProxyMode::Iptables, &["0.0.0.0/0", "::/0"], &localhost),
            (ProxyMode::Nftables, &["localhost"], &[]),
            (ProxyMode::Nftables, &["192.168.1.0/24"], &["192.168.1.2", "2001:db8::1", "2001:db8:1::2"]),
            (ProxyMode::Iptables, &["192.168.1.0/24", "2001:db8:9::/64"], &["192.168.1.2"]),
        ] {
            let options = NodeOptions {
                mode,
                node_port_addresses: option.iter().map(|text| (*text).to_owned()).collect(),
                localhost_node_ports: true,
                ..NodeOptions::default()
            };
            let view = NodeView::new("here", Some(&node()), &options);
            let (found, problems) = node_addresses(&ips(&all), &view, &options);
            let mut want: Vec<Addr> = ips(want).into_iter().map(Addr::from).collect();
            want.sort();
            let serving: Vec<Addr> = found
                .iter()
                .filter(|(_, flags)| **flags & node_flags::NODE_PORTS != 0)
                .map(|(addr, _)| *addr)
                .collect();
            assert_eq!(serving, want, "{mode:?} {option:?}");
            let is_net = |addr: &&Addr| **addr == Addr::LOOPBACK_NET_V4;
            assert_eq!((found.keys().filter(|addr| !is_net(addr)).count(), problems), (6, Vec::new()));
            assert!(found.values().all(|flags| flags & node_flags::LOCAL != 0));
        }
    }

    #[test]
    fn health_checks_listen_where_node_ports_answer() {
        let all = ips(&["192.168.0.2", "192.168.1.2", "2001:db8::1"]);
        for (mode, option, want) in [
            (ProxyMode::Iptables, &[][..], &["0.0.0.0", "::"][..]),
            (ProxyMode::Nftables, &[], &["192.168.0.2", "2001:db8::1"]),
            (ProxyMode::Nftables, &["0.0.0.0/0", "::/0"], &["0.0.0.0", "::"]),
            (ProxyMode::Nftables, &["primary", "all"], &["192.168.0.2", "192.168.1.2", "2001:db8::1"]),
            (ProxyMode::Nftables, &["all"], &["0.0.0.0", "::"]),
            (ProxyMode::Iptables, &["192.168.1.0/24"], &["192.168.1.2", "::"]),
            (ProxyMode::Nftables, &["all"], &["0.0.0.0", "::"]),
            (ProxyMode::Nftables, &["localhost"], &[]),
        ] {
            let options = NodeOptions {
                mode,
                node_port_addresses: option.iter().map(|text| (*text).to_owned()).collect(),
                ..NodeOptions::default()
            };
            let view = NodeView::new("here", Some(&node()), &options);
            let (addresses, _) = node_addresses(&all, &view, &options);
            assert_eq!(health_check_addresses(&addresses, &view, &options), ips(want), "{mode:?} {option:?}");
        }
    }

    #[test]
    fn primary_without_a_primary_address_of_the_family_serves_none_of_it() {
        let options = NodeOptions { mode: ProxyMode::Nftables, ..NodeOptions::default() };
        let view = NodeView { primary: ips(&["192.168.0.2"]), ..NodeView::default() };
        let (found, _) = node_addresses(&ips(&["2001:db8::1"]), &view, &options);
        assert!(found.values().all(|flags| *flags == node_flags::LOCAL));
    }

    #[test]
    fn an_unreadable_network_is_reported() {
        let options = NodeOptions { node_port_addresses: vec!["10.0.0.0".into()], ..NodeOptions::default() };
        let (_, problems) = node_addresses(&[], &NodeView::default(), &options);
        assert_eq!(problems[0].field, "nodePortAddresses[0]");
    }

    #[test]
    fn detectors_know_networks_or_interfaces() {
        let texts = |detector: LocalDetector| {
            detector.cidrs(Some(&node())).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        let nets = ["10.0.0.0/8", "10.9.0.0/16", "fd00::/8"].map(|text| text.parse().unwrap());
        assert_eq!(texts(LocalDetector::ClusterCidr(nets.into())), "10.0.0.0/8 fd00::/8");
        assert_eq!(texts(LocalDetector::NodeCidr), "10.1.0.0/24 fd00:1::/64");
        assert_eq!(texts(LocalDetector::None), "");
        let only_v4 = LocalDetector::ClusterCidr(vec!["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(only_v4.families(None), Detected { v4: true, v6: false });
        let prefix = LocalDetector::InterfaceNamePrefix("veth".into());
        assert!(prefix.takes_interface("veth12") && !prefix.takes_interface("eth0"));
        let bridge = LocalDetector::BridgeInterface("cni0".into());
        assert!(bridge.takes_interface("cni0") && !bridge.takes_interface("cni01"));
    }
}
