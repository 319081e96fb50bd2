//! What of the configuration concerns the node and its packets.
//!
//! In: a [`Config`] without problems. Out: [`NodeOptions`].

use ipnet::IpNet;

use super::Config;
use crate::{
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
