//! The cases of `data/flows.json`.

use std::{collections::BTreeMap, net::IpAddr, path::Path};

use serde::Deserialize;
use serde_json::Value;

#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    pub id: String,
    pub applies_to: Vec<String>,
    pub node: Node,
    pub objects: Vec<Value>,
    #[serde(default)]
    pub previous_objects: Vec<Value>,
    pub flows: Vec<Flow>,
    #[serde(default)]
    pub state: Value,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    pub name: String,
    pub labels: Value,
    pub ips: Vec<IpAddr>,
    #[serde(rename = "primaryIPs")]
    pub primary_ips: Vec<IpAddr>,
    pub local_detector: Option<Detector>,
    #[serde(rename = "serviceCIDRs")]
    pub service_cidrs: Vec<String>,
    pub node_port_addresses: Vec<String>,
    pub masquerade_all: bool,
    pub localhost_node_ports: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "mode")]
pub enum Detector {
    ClusterCIDR { cidrs: Vec<String> },
    InterfaceNamePrefix { interface: String },
}

#[derive(Clone, Debug, Deserialize)]
pub struct Flow {
    pub name: String,
    pub from: IpAddr,
    pub to: IpAddr,
    pub port: u16,
    pub protocol: String,
    pub from_interface: Option<String>,
    pub expect: Expect,
    pub expect_iptables: Option<Expect>,
    pub modes: Option<Vec<String>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Expect {
    pub verdict: String,
    #[serde(default)]
    pub endpoints: Vec<String>,
    #[serde(default)]
    pub masquerade: bool,
    #[serde(default)]
    pub hairpin: Vec<String>,
}

impl Flow {
    /// Whether the row exists in a mode.
    pub fn is_of(&self, mode: &str) -> bool {
        self.modes.as_ref().is_none_or(|modes| modes.iter().any(|it| it == mode))
    }

    /// Whether a verdict is one of those that are right.
    pub fn accepts(&self, mut found: Expect) -> bool {
        let sorted = |mut expect: Expect| {
            expect.endpoints.sort();
            expect.hairpin.sort();
            expect
        };
        found = sorted(found);
        [Some(&self.expect), self.expect_iptables.as_ref()].into_iter().flatten().any(|it| sorted(it.clone()) == found)
    }
}

impl Case {
    /// Whether the node itself sends a packet.
    pub fn is_from_node(&self, flow: &Flow) -> bool {
        flow.from.is_loopback() || self.node.ips.contains(&flow.from)
    }

    /// What the operator writes under `nodePortAddresses` to get the case's addresses in a mode.
    pub fn node_port_addresses(&self, mode: &str) -> Vec<String> {
        let list: Vec<&str> = self.node.node_port_addresses.iter().map(String::as_str).collect();
        let text = |list: &[&str]| list.iter().map(|it| (*it).to_owned()).collect();
        match (&list[..], mode) {
            (["primary"], _) => Vec::new(),
            ([], "nftables") => text(&["0.0.0.0/0", "::/0"]),
            (list, _) => text(list),
        }
    }

    /// The objects of the case with those that stand under `node`.
    pub fn manifests(&self, objects: &[Value]) -> Vec<Value> {
        let node = &self.node;
        let addresses: Vec<Value> = node
            .primary_ips
            .iter()
            .map(|ip| serde_json::json!({ "type": "InternalIP", "address": ip.to_string() }))
            .collect();
        let own = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": node.name, "labels": node.labels },
            "status": { "addresses": addresses },
        });
        let cidrs = serde_json::json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": { "name": "kubernetes" },
            "spec": { "cidrs": node.service_cidrs },
        });
        objects.iter().cloned().chain([own, cidrs]).collect()
    }
}

/// How the ids of cases end that have other NodePorts than in the file.
pub const OTHER_NODE_PORTS: &str = " with other NodePorts";

/// All cases.
pub fn all() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/flows.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The cases that have NodePorts, once more with NodePorts outside 30000–32767: the range is an option of the API server, and no
/// node knows it.
pub fn with_other_node_ports() -> Vec<Case> {
    all().into_iter().filter_map(with_other_node_ports_in).collect()
}

fn with_other_node_ports_in(mut case: Case) -> Option<Case> {
    let mut others = BTreeMap::new();
    let ports = case.objects.iter_mut().chain(&mut case.previous_objects);
    let ports = ports.filter_map(|object| object["spec"]["ports"].as_array_mut()).flatten();
    for port in ports {
        let Some(number) = port["nodePort"].as_u64().filter(|number| *number != 0) else { continue };
        let next = [3001, 20080, 1, 65535].get(others.len()).copied().unwrap_or(20000 + others.len() as u16);
        let other = *others.entry(number).or_insert(next);
        port["nodePort"] = other.into();
    }
    for flow in &mut case.flows {
        flow.port = others.get(&u64::from(flow.port)).copied().unwrap_or(flow.port);
    }
    case.id.push_str(OTHER_NODE_PORTS);
    (!others.is_empty()).then_some(case)
}
