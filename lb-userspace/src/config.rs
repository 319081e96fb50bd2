//! kube-proxy's configuration file.
//!
//! In: a `KubeProxyConfiguration` as YAML or JSON, full of `null` and `""` as kubeadm writes it. Out: what of it concerns the
//! node, and what can't be used. Fields that nobody here reads are no errors (`kube-proxy.md` §16).

use std::net::IpAddr;

use anyhow::Context;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer};

use crate::{
    model::address::{parse_cidr, parse_ip},
    plan::{
        Problem,
        node::{LocalDetector, NodeOptions, ProxyMode},
    },
};

/// `kubeproxy.config.k8s.io/v1alpha1`, as far as it is read. Absent, `null` and `""` mean the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct KubeProxyConfiguration {
    /// The node's name, where it isn't the machine's.
    #[serde(deserialize_with = "nullable")]
    pub hostname_override: String,
    /// The node's own address, unless unspecified.
    #[serde(deserialize_with = "nullable")]
    pub bind_address: String,
    /// `iptables` (also if empty), `ipvs`, `nftables`.
    #[serde(deserialize_with = "nullable")]
    pub mode: String,
    /// Options of mode iptables, and of ipvs.
    #[serde(deserialize_with = "nullable")]
    pub iptables: Iptables,
    /// Options of mode nftables.
    #[serde(deserialize_with = "nullable")]
    pub nftables: Nftables,
    /// Networks of the pods, separated by commas.
    #[serde(rename = "clusterCIDR", deserialize_with = "nullable")]
    pub cluster_cidr: String,
    /// How local sources are told: `ClusterCIDR`, `NodeCIDR`, `BridgeInterface`, `InterfaceNamePrefix`.
    #[serde(deserialize_with = "nullable")]
    pub detect_local_mode: String,
    /// Details of the last two.
    #[serde(deserialize_with = "nullable")]
    pub detect_local: DetectLocal,
    /// Where NodePorts answer.
    #[serde(deserialize_with = "nullable")]
    pub node_port_addresses: Vec<String>,
}

/// `iptables`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Iptables {
    /// Rewrite the source of everything that goes to a ClusterIP.
    #[serde(deserialize_with = "nullable")]
    pub masquerade_all: bool,
    /// Whether NodePorts answer at 127.0.0.1; absent: they do.
    pub localhost_node_ports: Option<bool>,
}

/// `nftables`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Nftables {
    /// Rewrite the source of everything that goes to a ClusterIP.
    #[serde(deserialize_with = "nullable")]
    pub masquerade_all: bool,
}

/// `detectLocal`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct DetectLocal {
    /// The bridge that pods are ports of.
    #[serde(deserialize_with = "nullable")]
    pub bridge_interface: String,
    /// How the names of the pods' interfaces begin.
    #[serde(deserialize_with = "nullable")]
    pub interface_name_prefix: String,
}

impl KubeProxyConfiguration {
    /// Reads the text of a configuration file.
    ///
    /// # Errors
    ///
    /// The text is no YAML, or a field that is read has another type.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        // An empty document is an empty configuration.
        let config: Option<Self> = serde_saphyr::from_str(text).context(
            "not a KubeProxyConfiguration; compare it with `kubectl -n kube-system get cm kube-proxy -o yaml`",
        )?;
        Ok(config.unwrap_or_default())
    }

    /// What concerns the node, and fields that can't be used.
    #[must_use]
    pub fn node_options(&self) -> (NodeOptions, Vec<Problem>) {
        let mut problems = Vec::new();
        let mode = self.proxy_mode(&mut problems);
        let options = NodeOptions {
            mode,
            node_port_addresses: self.node_port_addresses.clone(),
            localhost_node_ports: self.iptables.localhost_node_ports.unwrap_or(true),
            detector: self.detector(&mut problems),
            // Only the section of the mode in force counts.
            masquerade_all: match mode {
                ProxyMode::Iptables | ProxyMode::Ipvs => self.iptables.masquerade_all,
                ProxyMode::Nftables => self.nftables.masquerade_all,
            },
            preserve_client_ip: false,
            bind_address: self.bound(&mut problems),
        };
        (options, problems)
    }

    fn proxy_mode(&self, problems: &mut Vec<Problem>) -> ProxyMode {
        match self.mode.as_str() {
            "" | "iptables" => ProxyMode::Iptables,
            "ipvs" => ProxyMode::Ipvs,
            "nftables" => ProxyMode::Nftables,
            other => {
                let message = format!("`{other}` is no mode of kube-proxy on Linux, iptables is assumed");
                problems.push(problem("mode", message, "write iptables, ipvs or nftables"));
                ProxyMode::Iptables
            }
        }
    }

    fn bound(&self, problems: &mut Vec<Problem>) -> Option<IpAddr> {
        let addr = parse_ip(&self.bind_address);
        if addr.is_none() && !self.bind_address.is_empty() {
            let message = format!("`{}` is not an IP address, 0.0.0.0 is assumed", self.bind_address);
            problems.push(problem("bindAddress", message, "write the node's address or 0.0.0.0"));
        }
        addr.filter(|addr| !addr.is_unspecified())
    }

    fn detector(&self, problems: &mut Vec<Problem>) -> LocalDetector {
        let DetectLocal { bridge_interface, interface_name_prefix } = &self.detect_local;
        let named = |name: &String, field: &str, problems: &mut Vec<Problem>| {
            if name.is_empty() {
                let message = format!("is empty, although detectLocalMode is {}", self.detect_local_mode);
                problems.push(problem(field, message, "name the interface; until then no source counts as local"));
            }
            !name.is_empty()
        };
        match self.detect_local_mode.as_str() {
            "" if self.cluster_cidr.is_empty() => LocalDetector::None,
            "" | "ClusterCIDR" => LocalDetector::ClusterCidr(self.cluster_cidrs(problems)),
            "NodeCIDR" => LocalDetector::NodeCidr,
            "BridgeInterface" if named(bridge_interface, "detectLocal.bridgeInterface", problems) => {
                LocalDetector::BridgeInterface(bridge_interface.clone())
            }
            "InterfaceNamePrefix" if named(interface_name_prefix, "detectLocal.interfaceNamePrefix", problems) => {
                LocalDetector::InterfaceNamePrefix(interface_name_prefix.clone())
            }
            "BridgeInterface" | "InterfaceNamePrefix" => LocalDetector::None,
            other => {
                let message = format!("`{other}` is not known, no source counts as local");
                let remedy = "write ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix";
                problems.push(problem("detectLocalMode", message, remedy));
                LocalDetector::None
            }
        }
    }

    fn cluster_cidrs(&self, problems: &mut Vec<Problem>) -> Vec<IpNet> {
        let mut nets = Vec::new();
        for text in self.cluster_cidr.split(',') {
            match parse_cidr(text) {
                Some(net) => nets.push(net),
                None => problems.push(problem(
                    "clusterCIDR",
                    format!("`{text}` is not a network, and is left out"),
                    "write it like 10.244.0.0/16,fd00:10:244::/56",
                )),
            }
        }
        nets
    }
}

fn problem(field: &str, message: String, remedy: &str) -> Problem {
    let object = "KubeProxyConfiguration".to_owned();
    Problem { object, field: field.to_owned(), message, remedy: remedy.to_owned() }
}

fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> (NodeOptions, Vec<String>) {
        let (options, problems) = KubeProxyConfiguration::parse(text).unwrap().node_options();
        (options, problems.into_iter().map(|problem| problem.field).collect())
    }

    #[test]
    fn what_kubeadm_writes_means_the_defaults() {
        let text = r#"
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: "", burst: 0, contentType: "", kubeconfig: /etc/kubeconfig, qps: 0}
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpEstablishedTimeout: null}
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
detectLocalMode: ""
enableProfiling: false
hostnameOverride: ""
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
mode: ""
nftables: null
nodePortAddresses: null
winkernel: {enableDSR: false}
"#;
        let nets = ["10.244.0.0/16", "fd00:10:244::/56"].map(|net| net.parse().unwrap());
        let detector = LocalDetector::ClusterCidr(nets.into());
        let want = NodeOptions { detector, localhost_node_ports: true, ..NodeOptions::default() };
        assert_eq!(options(text), (want, Vec::new()));
    }

    #[test]
    fn nothing_is_a_configuration_too() {
        for text in ["", "---\n", "null", "{}"] {
            let want = NodeOptions { localhost_node_ports: true, ..NodeOptions::default() };
            assert_eq!(options(text), (want, Vec::new()), "{text:?}");
        }
    }

    #[test]
    fn masquerade_all_is_read_from_the_section_of_the_mode() {
        for (mode, want) in [("iptables", true), ("ipvs", true), ("nftables", false), ("''", true)] {
            let text = format!("mode: {mode}\niptables: {{masqueradeAll: true}}\nnftables: {{masqueradeAll: false}}");
            assert_eq!(options(&text).0.masquerade_all, want, "{mode}");
        }
    }

    #[test]
    fn detectors_are_named_by_their_mode() {
        for (text, want, fields) in [
            ("detectLocalMode: NodeCIDR", LocalDetector::NodeCidr, &[][..]),
            (
                "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}",
                LocalDetector::BridgeInterface("cni0".into()),
                &[],
            ),
            (
                "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}",
                LocalDetector::InterfaceNamePrefix("veth".into()),
                &[],
            ),
            ("detectLocalMode: BridgeInterface", LocalDetector::None, &["detectLocal.bridgeInterface"]),
            ("detectLocalMode: Magic", LocalDetector::None, &["detectLocalMode"]),
            ("clusterCIDR: 10.0.0.0", LocalDetector::ClusterCidr(Vec::new()), &["clusterCIDR"]),
            ("mode: userspace\nbindAddress: here", LocalDetector::None, &["mode", "bindAddress"]),
        ] {
            let (options, problems) = options(text);
            assert_eq!(
                (options.detector, &problems[..]),
                (want, &fields.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>()[..]),
                "{text}"
            );
        }
    }
}
