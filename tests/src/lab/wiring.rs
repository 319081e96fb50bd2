//! Devices, addresses, routes, settings and rules of a lab. In: the lab's names and numbers. Out: a network that carries packets.

use anyhow::{Context, Result};

use crate::command;
use crate::lab::{Lab, Node, Pod};
use crate::netns::Netns;
use crate::topology::{self, OUTSIDE_V4, OUTSIDE_V6, SWITCH_V4, SWITCH_V6, Wiring};

/// Makes everything.
pub fn build(lab: &Lab) -> Result<()> {
    let pods = lab.pods().map(|pod| &pod.netns);
    let others = [&lab.switch, &lab.outside].into_iter().chain(lab.nodes.iter().map(|node| &node.netns));
    let all: Vec<&Netns> = others.chain(pods).collect();
    let lines: Vec<String> = all.iter().map(|netns| format!("netns add {}", netns.name())).collect();
    command::ip_batch(None, &lines)?;
    for netns in all {
        settled_from_the_start(netns)?;
    }

    let switch = [
        "link set lo up".to_owned(),
        "link add br0 type bridge".to_owned(),
        "link set br0 up".to_owned(),
        format!("address add {SWITCH_V4}/24 dev br0"),
        format!("address add {SWITCH_V6}/64 dev br0 nodad"),
    ];
    lab.switch.ip(&switch)?;
    quiet_bridge(&lab.switch)?;
    build_outside(lab)?;
    for node in &lab.nodes {
        build_node(lab, node).with_context(|| format!("building {}", node.name))?;
    }
    Ok(())
}

/// Routes from the switch to every node's Pods.
pub fn route_pods_from_switch(lab: &Lab) -> Result<()> {
    lab.switch.ip(&lab.nodes.iter().flat_map(routes_to_pods_of).collect::<Vec<_>>())
}

/// How many packets a named counter of the CNI rules has seen.
pub fn cni_counter(netns: &Netns, counter: &str) -> Result<u64> {
    let text = netns.exec("nft", &["--json", "list", "counter", "inet", "cni", counter])?;
    let json: serde_json::Value = serde_json::from_str(&text).context("reading nft's JSON")?;
    json["nftables"]
        .as_array()
        .and_then(|items| items.iter().find_map(|item| item["counter"]["packets"].as_u64()))
        .with_context(|| format!("no counter {counter} in {text}"))
}

fn build_outside(lab: &Lab) -> Result<()> {
    let mut lines = uplink(lab, 200, &format!("{OUTSIDE_V4}/24"), &format!("{OUTSIDE_V6}/64"));
    for node in &lab.nodes {
        lines.extend(routes_to_pods_of(node));
    }
    // LoadBalancer addresses are brought to node 1 by whoever announces them.
    if let Some(first) = lab.nodes.first() {
        lines.push(format!("route add 10.99.1.0/24 via {}", first.v4()));
        lines.push(format!("route add fd00:99:1::/64 via {}", first.v6()));
    }
    lab.outside.ip(&lines)?;
    plug_into_switch(lab, 200)
}

fn build_node(lab: &Lab, node: &Node) -> Result<()> {
    let rp_filter = if lab.topology().cni_rules { "1" } else { "0" };
    node.netns.set_sysctls(&[
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/all/rp_filter", rp_filter),
        ("net/ipv4/conf/default/rp_filter", rp_filter),
    ])?;
    let port = 10 + node.number;
    let mut lines = uplink(lab, port, &format!("{}/24", node.v4()), &format!("{}/64", node.v6()));
    for other in lab.nodes.iter().filter(|other| other.number != node.number) {
        lines.extend(routes_to_pods_of(other));
    }
    node.netns.ip(&lines)?;
    plug_into_switch(lab, port)?;
    match lab.topology().wiring {
        Wiring::Ptp => wire_ptp(node, &node.pods)?,
        Wiring::Bridge { hairpin_mode, netfilter } => wire_bridge(node, hairpin_mode, netfilter)?,
    }
    if lab.topology().cni_rules {
        command_nft(&node.netns, &cni_rules(node))?;
    }
    Ok(())
}

fn uplink(lab: &Lab, port: u8, v4: &str, v6: &str) -> Vec<String> {
    vec![
        "link set lo up".to_owned(),
        format!("link add eth0 type veth peer name v{port} netns {}", lab.switch.name()),
        format!("address add {v4} dev eth0"),
        format!("address add {v6} dev eth0 nodad"),
        "link set eth0 up".to_owned(),
        format!("route add 0.0.0.0/0 via {SWITCH_V4}"),
        format!("route add ::/0 via {SWITCH_V6}"),
    ]
}

fn plug_into_switch(lab: &Lab, port: u8) -> Result<()> {
    lab.switch.ip(&[format!("link set v{port} master br0 up")])
}

fn routes_to_pods_of(node: &Node) -> [String; 2] {
    let number = node.number;
    [
        format!("route add 10.244.{number}.0/24 via {}", node.v4()),
        format!("route add fd00:10:244:{number}::/64 via {}", node.v6()),
    ]
}

/// Wires pods of a node by a veth pair each.
pub fn wire_ptp(node: &Node, pods: &[Pod]) -> Result<()> {
    let (gateway4, gateway6) = (topology::gateway_v4(node.number), topology::gateway_v6(node.number));
    for pod in pods {
        pod.netns.ip(&[
            "link set lo up".to_owned(),
            format!("link add eth0 type veth peer name {} netns {}", pod.host_device, node.netns.name()),
            format!("address add {}/32 dev eth0", pod.v4),
            format!("address add {}/128 dev eth0 nodad", pod.v6),
            "link set eth0 up".to_owned(),
            format!("route add {gateway4}/32 dev eth0 scope link"),
            format!("route add 0.0.0.0/0 via {gateway4}"),
            format!("route add {gateway6}/128 dev eth0"),
            format!("route add ::/0 via {gateway6} dev eth0"),
        ])?;
    }
    let lines: Vec<String> = pods
        .iter()
        .flat_map(|pod| {
            let device = &pod.host_device;
            [
                format!("link set {device} up"),
                format!("address add {gateway4}/32 dev {device}"),
                format!("address add {gateway6}/128 dev {device} nodad"),
                format!("route add {}/32 dev {device}", pod.v4),
                format!("route add {}/128 dev {device}", pod.v6),
            ]
        })
        .collect();
    node.netns.ip(&lines)
}

fn wire_bridge(node: &Node, hairpin_mode: bool, netfilter: bool) -> Result<()> {
    let (gateway4, gateway6) = (topology::gateway_v4(node.number), topology::gateway_v6(node.number));
    if netfilter {
        call_netfilter(&node.netns, "1").context("br_netfilter is asked for and this kernel has none loaded")?;
    } else {
        quiet_bridge(&node.netns)?;
    }
    node.netns.ip(&[
        "link add cni0 type bridge".to_owned(),
        format!("address add {gateway4}/24 dev cni0"),
        format!("address add {gateway6}/64 dev cni0 nodad"),
        "link set cni0 up".to_owned(),
    ])?;
    for pod in &node.pods {
        pod.netns.ip(&[
            "link set lo up".to_owned(),
            format!("link add eth0 type veth peer name {} netns {}", pod.host_device, node.netns.name()),
            format!("address add {}/24 dev eth0", pod.v4),
            format!("address add {}/64 dev eth0 nodad", pod.v6),
            "link set eth0 up".to_owned(),
            format!("route add 0.0.0.0/0 via {gateway4}"),
            format!("route add ::/0 via {gateway6}"),
        ])?;
    }
    let hairpin = if hairpin_mode { "on" } else { "off" };
    let lines: Vec<String> = node
        .pods
        .iter()
        .flat_map(|pod| {
            let device = &pod.host_device;
            [
                format!("link set {device} master cni0"),
                format!("link set {device} type bridge_slave hairpin {hairpin}"),
                format!("link set {device} up"),
            ]
        })
        .collect();
    node.netns.ip(&lines)
}

/// Bridged packets don't pass netfilter; a kernel without br_netfilter is like that by itself.
fn quiet_bridge(netns: &Netns) -> Result<()> {
    if netns.run(|| std::path::Path::new("/proc/sys/net/bridge").exists()) {
        call_netfilter(netns, "0")
    } else {
        Ok(())
    }
}

fn call_netfilter(netns: &Netns, value: &str) -> Result<()> {
    netns.set_sysctls(&[("net/bridge/bridge-nf-call-iptables", value), ("net/bridge/bridge-nf-call-ip6tables", value)])
}

/// Nothing that a namespace does by itself in its first seconds shows in a test: a redirect learnt before an address worked would
/// hide it for minutes, and a router whose own link-local address is still being probed for duplicates can't ask for its neighbours
/// (two seconds, RFC 4862 §5.4). Set before the devices are there, so that they inherit it.
fn settled_from_the_start(netns: &Netns) -> Result<()> {
    netns.set_sysctls(&[
        ("net/ipv4/conf/all/accept_redirects", "0"),
        ("net/ipv4/conf/default/accept_redirects", "0"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/default/send_redirects", "0"),
        ("net/ipv6/conf/all/accept_redirects", "0"),
        ("net/ipv6/conf/default/accept_redirects", "0"),
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_ra", "0"),
    ])
}

fn command_nft(netns: &Netns, rules: &str) -> Result<()> {
    command::run_with_input("ip", &["netns", "exec", netns.name(), "nft", "-f", "-"], rules)?;
    Ok(())
}

fn cni_rules(node: &Node) -> String {
    let number = node.number;
    format!(
        "table inet cni {{
  counter invalid {{ }}
  counter masqueraded {{ }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    ct state invalid counter name invalid drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 10.244.{number}.0/24 ip daddr != 10.244.0.0/16 counter name masqueraded masquerade
    ip6 saddr fd00:10:244:{number}::/64 ip6 daddr != fd00:10:244::/48 counter name masqueraded masquerade
  }}
}}
"
    )
}
