//! Every frontend of every node, held against the naive model of the specification. In: a world in which all is quiet. Out: packets
//! with another fate than the model says.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::World;
use crate::agent::Agent;
use crate::kube_proxy::CLUSTER_CIDR;
use crate::lab::{Lab, Node};
use crate::specification::{Clients, Cluster, Detector, Fate, Node as Seen, Packet};
use crate::topology::{OUTSIDE_V4, OUTSIDE_V6};

/// What came of comparing.
#[derive(Debug, Default)]
pub struct Judgement {
    /// Packets.
    pub compared: usize,
    /// Those of them that go to an endpoint.
    pub forwarded: usize,
    /// Those whose fate differs, in words.
    pub wrong: Vec<String>,
}

/// Asks every agent for every packet.
pub fn compare(world: &World) -> Result<Judgement> {
    let objects = objects(world)?;
    let mut judgement = Judgement::default();
    for (node, agent) in world.lab.nodes.iter().zip(&world.agents) {
        let seen = seen(node)?;
        // `explain` lists all that may be chosen, whatever is remembered of the client.
        let cluster = Cluster { objects: &objects, node: &seen, clients: &Clients::default(), now: 0 };
        let packets = packets(&world.lab, node, &objects);
        let answers = explain(agent, &packets)?;
        for (packet, answer) in packets.iter().zip(&answers) {
            let (fate, expected) = (fate(answer)?, cluster.fate(packet));
            judgement.compared += 1;
            judgement.forwarded += usize::from(matches!(expected, Fate::Forward(_)));
            if fate != expected {
                judgement.wrong.push(format!("{}: {packet:?}: {fate:?}, and by the model {expected:?}", node.name));
            }
        }
    }
    Ok(judgement)
}

/// What the API server has, as manifests would say it.
fn objects(world: &World) -> Result<Vec<Value>> {
    let api = world.plane.api();
    let mut objects = Vec::new();
    for (path, version, kind) in [
        ("/api/v1/services", "v1", "Service"),
        ("/apis/discovery.k8s.io/v1/endpointslices", "discovery.k8s.io/v1", "EndpointSlice"),
        ("/api/v1/nodes", "v1", "Node"),
        ("/apis/networking.k8s.io/v1/servicecidrs", "networking.k8s.io/v1", "ServiceCIDR"),
    ] {
        let list = api.get(path)?;
        for item in list["items"].as_array().with_context(|| format!("{path} has no items"))? {
            let mut object = item.clone();
            object["apiVersion"] = version.into();
            object["kind"] = kind.into();
            objects.push(object);
        }
    }
    Ok(objects)
}

/// The node as the model sees it: kube-proxy's defaults, and the addresses that are on its devices now.
fn seen(node: &Node) -> Result<Seen> {
    let text = node.netns.exec("ip", &["-json", "address"])?;
    let devices: Value = serde_json::from_str(&text).context("reading ip's JSON")?;
    let interfaces = devices
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|device| device["addr_info"].as_array().into_iter().flatten())
        .filter_map(|info| info["local"].as_str()?.parse().ok())
        .collect();
    Ok(Seen {
        name: if node.number == 1 { "node1" } else { "node2" },
        nftables: false,
        interfaces,
        node_port_addresses: Vec::new(),
        localhost_node_ports: true,
        masquerade_all: false,
        preserve_client_ip: false,
        detector: Detector::ClusterCidr(CLUSTER_CIDR),
    })
}

/// From everyone to everything that a Service may have, and to a port that none has.
fn packets(lab: &Lab, node: &Node, objects: &[Value]) -> Vec<Packet> {
    let other = lab.node(3 - node.number);
    let mut ends: BTreeSet<(IpAddr, u16)> = BTreeSet::new();
    let services = || objects.iter().filter(|object| object["kind"] == "Service");
    let ports: BTreeSet<u16> = services()
        .flat_map(|service| service["spec"]["ports"].as_array().into_iter().flatten())
        .flat_map(|port| [&port["port"], &port["nodePort"]])
        .filter_map(|number| u16::try_from(number.as_u64()?).ok())
        .chain([81])
        .collect();
    let addresses = services().flat_map(|service| {
        let of_load_balancer = service["status"]["loadBalancer"]["ingress"].as_array().into_iter().flatten();
        let cluster_ips = service["spec"]["clusterIPs"].as_array().into_iter().flatten();
        cluster_ips.chain(of_load_balancer.map(|ingress| &ingress["ip"])).filter_map(|it| it.as_str()?.parse().ok())
    });
    let of_nodes = [node, other].into_iter().flat_map(|node| [IpAddr::from(node.v4()), node.v6().into()]);
    for addr in addresses.chain(of_nodes) {
        ends.extend(ports.iter().map(|port| (addr, *port)));
    }
    let sources = |v4: bool| -> [(IpAddr, bool, &'static str); 5] {
        let of = |v4_addr: IpAddr, v6_addr: IpAddr| if v4 { v4_addr } else { v6_addr };
        let (own_pod, other_pod) = (&node.pods[0], &other.pods[0]);
        [
            (of(own_pod.v4.into(), own_pod.v6.into()), false, "vp1"),
            (of(other_pod.v4.into(), other_pod.v6.into()), false, "eth0"),
            (of(OUTSIDE_V4.into(), OUTSIDE_V6.into()), false, "eth0"),
            (of(other.v4().into(), other.v6().into()), false, "eth0"),
            (of(node.v4().into(), node.v6().into()), true, ""),
        ]
    };
    let mut packets = Vec::new();
    for (to, port) in ends {
        for protocol in ["TCP", "UDP"] {
            for (from, from_node, interface) in sources(to.is_ipv4()) {
                packets.push(Packet { from, to, port, protocol, from_node, interface });
            }
        }
    }
    packets
}

fn explain(agent: &Agent, packets: &[Packet]) -> Result<Vec<Value>> {
    let mut input = tempfile::NamedTempFile::new().context("a file for packets")?;
    for packet in packets {
        let Packet { from, to, port, protocol, .. } = packet;
        // By which interface it enters is of no importance to a detector by address.
        let line = json!({"from": from, "to": to, "port": port, "protocol": protocol});
        writeln!(input, "{line}").context("writing packets")?;
    }
    let path = input.path().display().to_string();
    let output = agent.cli(&["explain", "--output", "json", "--packets", &path]);
    ensure!(output.status.success(), "fairlead explain: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).context("fairlead explain speaks UTF-8")?;
    let answers = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    ensure!(answers.len() == packets.len(), "{} answers to {} packets", answers.len(), packets.len());
    Ok(answers)
}

/// What an answer of `fairlead explain` says.
fn fate(answer: &Value) -> Result<Fate> {
    let addresses = |field: &str| -> Vec<SocketAddr> {
        let texts = answer[field].as_array().into_iter().flatten();
        texts.filter_map(|text| text.as_str()?.parse().ok()).collect()
    };
    Ok(match answer["verdict"].as_str().with_context(|| format!("no verdict in {answer}"))? {
        "pass" => Fate::Pass,
        "reject" => Fate::Reject,
        "drop" => Fate::Drop,
        _ => {
            let (all, hairpin) = (answer["masquerade"] == true, addresses("hairpin"));
            let endpoints = addresses("endpoints").into_iter();
            let seen: BTreeMap<_, _> = endpoints.map(|addr| (addr, all || hairpin.contains(&addr))).collect();
            Fate::Forward(seen)
        }
    })
}
