//! What people want to know of the node's devices.
//!
//! In: a [`Snapshot`]. Out: sentences for `fairlead status`. Nothing depends on them.

use serde::{Deserialize, Serialize};

use super::{Snapshot, kind};

/// How requests from one port of a bridge to another go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bridge {
    /// The bridge.
    pub name: String,
    /// Which way IPv4 goes, and why.
    pub ipv4: String,
    /// Which way IPv6 goes, and why.
    pub ipv6: String,
}

impl Snapshot {
    /// The bridges that have ports, and how requests between these go: as answers do, which br_netfilter decides.
    pub fn bridges(&self) -> Vec<Bridge> {
        let has_ports = |ifindex| self.links.values().any(|link| link.master == Some(ifindex));
        let bridges = self.links.values().filter(|link| link.kind.as_deref() == Some(kind::BRIDGE));
        bridges
            .filter(|link| has_ports(link.ifindex))
            .map(|link| Bridge {
                name: link.name.clone(),
                ipv4: way(self.bridge_netfilter[0], link.nf_call[0], "iptables"),
                ipv6: way(self.bridge_netfilter[1], link.nf_call[1], "ip6tables"),
            })
            .collect()
    }

    /// Devices that share another's wire: pods on their like don't enter the node by a device, and only their sockets can be
    /// translated. (Those of pods are in other namespaces; one of the node's own tells of them, as it is how the node itself
    /// reaches such pods.)
    pub fn shared_wires(&self) -> Vec<String> {
        let name =
            |ifindex| self.links.get(&ifindex).map_or_else(|| format!("device {ifindex}"), |link| link.name.clone());
        let shared = self.links.values().filter_map(|link| Some((link, link.kind.as_deref()?, link.lower?)));
        shared
            .map(|(link, kind, lower)| {
                let lower = name(lower);
                format!(
                    "{}: {kind} on {lower}: if pods have such devices, they pass the node by and reach no Service; \
                     --socket-lb=all serves them",
                    link.name
                )
            })
            .collect()
    }
}

fn way(namespace: bool, own: bool, tables: &str) -> String {
    if namespace {
        format!("routed (net.bridge.bridge-nf-call-{tables} is on)")
    } else if own {
        format!("routed (the bridge's own nf_call_{tables} is on)")
    } else {
        "redirected to the bridge (br_netfilter is off)".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{link, snapshot},
        *,
    };

    #[test]
    fn a_bridge_says_which_way_its_packets_go_and_why() {
        let mut port = link(3, "veth1", Some("veth"));
        port.master = Some(2);
        let mut snapshot =
            snapshot(vec![port, link(2, "cni0", Some("bridge")), link(4, "br1", Some("bridge"))], vec![]);
        let redirected = "redirected to the bridge (br_netfilter is off)";
        for (namespace, own, ipv4, ipv6) in [
            ([false; 2], [false; 2], redirected, redirected),
            (
                [true, false],
                [true, true],
                "routed (net.bridge.bridge-nf-call-iptables is on)",
                "routed (the bridge's own nf_call_ip6tables is on)",
            ),
        ] {
            snapshot.bridge_netfilter = namespace;
            snapshot.links.get_mut(&2).unwrap().nf_call = own;
            let want = Bridge { name: "cni0".into(), ipv4: ipv4.into(), ipv6: ipv6.into() };
            assert_eq!(snapshot.bridges(), [want]);
        }
    }

    #[test]
    fn devices_that_share_a_wire_are_named_with_the_remedy() {
        let mut shared = link(3, "shim0", Some("ipvlan"));
        shared.lower = Some(2);
        let found =
            snapshot(vec![link(2, "eth0", None), shared, link(4, "vlan7", Some("vlan"))], vec![]).shared_wires();
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("shim0: ipvlan on eth0:") && found[0].contains("--socket-lb=all"), "{found:?}");
    }
}
