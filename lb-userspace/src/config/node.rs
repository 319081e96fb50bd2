//! What of the configuration concerns the node and its packets.
//!
//! In: a [`Config`] without problems. Out: [`NodeOptions`], [`Conntrack`].

use ipnet::IpNet;

use super::Config;
use crate::{
    kernel::sysctls::Conntrack,
    model::address::{parse_cidr, parse_ip},
    plan::node::{LocalDetector, NodeOptions},
};

impl Config {
    /// What `plan` needs of it.
    #[must_use]
    pub fn node_options(&self) -> NodeOptions {
        NodeOptions {
            mode: self.mode(),
            node_port_addresses: self.fields.node_port_addresses.clone().unwrap_or_default(),
            localhost_node_ports: self.fields.iptables.localhost_node_ports.unwrap_or(true),
            detector: self.detector(),
            masquerade_all: self.masquerade_all,
            preserve_client_ip: false,
            bind_address: parse_ip(&self.fields.bind_address).filter(|addr| !addr.is_unspecified()),
        }
    }

    /// conntrack's settings; what is absent, 0 or negative is left alone.
    #[must_use]
    pub fn conntrack(&self) -> Conntrack {
        let conntrack = &self.fields.conntrack;
        let number = |number: Option<i32>| number.and_then(|number| u32::try_from(number).ok()).unwrap_or(0);
        Conntrack {
            max_per_core: number(conntrack.max_per_core),
            min: number(conntrack.min),
            tcp_established_timeout: conntrack.tcp_established_timeout.unwrap_or_default().time(),
            tcp_close_wait_timeout: conntrack.tcp_close_wait_timeout.unwrap_or_default().time(),
            tcp_be_liberal: conntrack.tcp_be_liberal,
            udp_timeout: conntrack.udp_timeout.time(),
            udp_stream_timeout: conntrack.udp_stream_timeout.time(),
        }
    }

    fn detector(&self) -> LocalDetector {
        let local = &self.fields.detect_local;
        match self.fields.detect_local_mode.as_str() {
            "ClusterCIDR" => {
                let nets: Vec<IpNet> = self.cluster_cidrs().filter_map(parse_cidr).collect();
                if nets.is_empty() { LocalDetector::None } else { LocalDetector::ClusterCidr(nets) }
            }
            "NodeCIDR" => LocalDetector::NodeCidr,
            "BridgeInterface" => LocalDetector::BridgeInterface(local.bridge_interface.clone()),
            "InterfaceNamePrefix" => LocalDetector::InterfaceNamePrefix(local.interface_name_prefix.clone()),
            _ => LocalDetector::None,
        }
    }

    /// The parts of `clusterCIDR`.
    pub(super) fn cluster_cidrs(&self) -> impl Iterator<Item = &str> {
        let text = self.fields.cluster_cidr.as_str();
        text.split(',').filter(move |_| !text.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn conntracks_settings_are_kube_proxys_defaults_and_what_the_file_says() {
        let defaults = Conntrack {
            max_per_core: 32_768,
            min: 131_072,
            tcp_established_timeout: Duration::from_secs(86_400),
            tcp_close_wait_timeout: Duration::from_secs(3_600),
            ..Conntrack::default()
        };
        assert_eq!(Config::of_nothing().conntrack(), defaults);
        let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                    conntrack: {maxPerCore: 0, tcpBeLiberal: true, udpTimeout: 31s, tcpCloseWaitTimeout: 2m0s}";
        let want = Conntrack {
            max_per_core: 0,
            tcp_be_liberal: true,
            udp_timeout: Duration::from_secs(31),
            tcp_close_wait_timeout: Duration::from_secs(120),
            ..defaults
        };
        assert_eq!(Config::of_file(text).unwrap().0.conntrack(), want);
    }
}
