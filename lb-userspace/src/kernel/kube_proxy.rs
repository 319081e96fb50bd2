//! Removing what kube-proxy left in the kernel, in any of its modes.
//!
//! In: the current network namespace. Out: nothing of kube-proxy's is left, and everything else is: exactly the tables,
//! chains, rules, sets and devices go that kube-proxy's own `--cleanup` removes, by name (`kube-proxy.md` §11). Chains of the
//! kubelet (`KUBE-FIREWALL`, `KUBE-KUBELET-CANARY`) and of network plugins (`KUBE-ROUTER-…`, `KUBE-NWPLCY-…`) have similar names
//! and stay.

mod iptables;
mod netfilter;

use anyhow::{Result, bail};
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
};

use super::netlink::request;

/// The device to which mode ipvs gives the addresses of Services.
const IPVS_DEVICE: &str = "kube-ipvs0";

/// Longer names of sets are cut off, by kube-proxy for ipset.
const SET_NAME: usize = 31;

/// The sets of mode ipvs, behind `KUBE-` and, for IPv6, `KUBE-6-`.
const SETS: [&str; 17] = [
    "LOOP-BACK",
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "EXTERNAL-IP-LOCAL",
    "LOAD-BALANCER",
    "LOAD-BALANCER-LOCAL",
    "LOAD-BALANCER-FW",
    "LOAD-BALANCER-SOURCE-IP",
    "LOAD-BALANCER-SOURCE-CIDR",
    "NODE-PORT-TCP",
    "NODE-PORT-LOCAL-TCP",
    "NODE-PORT-UDP",
    "NODE-PORT-LOCAL-UDP",
    "NODE-PORT-SCTP-HASH",
    "NODE-PORT-LOCAL-SCTP-HASH",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
];

/// Removes it, and says what was there.
///
/// # Errors
///
/// Something is there that could not be removed. Everything else has been.
pub fn remove() -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let mut errors = Vec::new();
    for (family, name) in [(libc::AF_INET, "ip"), (libc::AF_INET6, "ip6")] {
        match netfilter::delete_table(family, "kube-proxy") {
            Ok(true) => removed.push(format!("nftables table {name} kube-proxy")),
            Ok(false) => {}
            Err(error) => errors.push(format!("nftables table {name} kube-proxy: {error}")),
        }
    }
    // Sets can go only when no rule uses them, and ipvs would still have its addresses.
    match remove_device() {
        Ok(true) => {
            removed.push(format!("device {IPVS_DEVICE}"));
            match netfilter::flush_ipvs() {
                Ok(true) => removed.push("virtual servers of ipvs".to_owned()),
                Ok(false) => {}
                Err(error) => errors.push(format!("virtual servers of ipvs: {error}")),
            }
        }
        Ok(false) => {}
        Err(error) => errors.push(format!("device {IPVS_DEVICE}: {error}")),
    }
    iptables::remove(&mut removed, &mut errors);
    for mut name in SETS.iter().flat_map(|name| [format!("KUBE-{name}"), format!("KUBE-6-{name}")]) {
        name.truncate(SET_NAME);
        match netfilter::destroy_set(&name) {
            Ok(true) => removed.push(format!("ipset {name}")),
            Ok(false) => {}
            Err(error) => errors.push(format!("ipset {name}: {error}")),
        }
    }
    if !errors.is_empty() {
        bail!("not all of kube-proxy's rules could be removed: {}", errors.join("; "));
    }
    Ok(removed)
}

fn remove_device() -> std::io::Result<bool> {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(IPVS_DEVICE.to_owned()));
    match request(RouteNetlinkMessage::DelLink(link), libc::NLM_F_ACK as u16) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        Err(error) => Err(error),
    }
}
