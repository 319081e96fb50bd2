//! A lab that serves: an agent on each node, a server in every pod, on every node and outside, and Services by number.
//! In: a topology, flags, what to write. Out: who can ask whom by which address. Never here: what is expected of it.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::agent::Agent;
use crate::lab::Lab;
use crate::manifest::{PodObject, Service, SliceEndpoint, endpoint_slice, node_object};
use crate::topology::{self, Topology};
use crate::traffic::client::{Answer, Client};
use crate::traffic::server::Server;

/// What every server listens on.
pub const TARGET: u16 = 8080;

/// A lab with an agent on each node and a server in every pod, on every node and outside.
#[derive(Debug)]
pub struct Cluster {
    /// The agents, node by node.
    pub agents: Vec<Agent>,
    /// The servers: of the pods, of the nodes, outside.
    pub servers: Vec<Server>,
    /// Where they are.
    pub lab: Lab,
}

impl Cluster {
    /// Builds it. `write` makes the objects; nodes are there already.
    pub fn new(topology: Topology, flags: &[&str], write: impl Fn(&Lab)) -> Self {
        let lab = Lab::new(topology);
        let mut servers: Vec<Server> = lab.pods().map(|pod| lab.serve(pod, TARGET)).collect();
        servers.extend(lab.nodes.iter().map(|node| lab.serve_on_node(node, TARGET)));
        servers.push(lab.serve_outside(TARGET));
        lab.manifests().write_list("nodes.json", lab.nodes.iter().map(node_object));
        write(&lab);
        let agents = lab.nodes.iter().map(|node| Agent::start(&lab, node, flags)).collect();
        Self { agents, servers, lab }
    }

    /// The usual one: a Service `web` of all pods, 10.96.0.10, NodePort 30010, LoadBalancer 10.99.1.10.
    pub fn web(topology: Topology, flags: &[&str]) -> Self {
        Self::new(topology, flags, |lab| {
            lab.manifests().write("web.json", web());
            for pod in lab.pods() {
                lab.manifests().write(&format!("pod-{}.json", pod.name), PodObject::of(pod).label("app", "web"));
            }
        })
    }

    /// Changes a pod's label `app`.
    pub fn relabel(&self, node: u8, pod: u8, app: &str) {
        let pod = self.lab.pod(node, pod);
        self.lab.manifests().write(&format!("pod-{}.json", pod.name), PodObject::of(pod).label("app", app));
    }

    /// Changes every pod's label `app`.
    pub fn relabel_all(&self, app: &str) {
        for node in &self.lab.nodes {
            for pod in 1..=self.lab.topology().pods_per_node {
                self.relabel(node.number, pod, app);
            }
        }
    }
}

/// The Service `web` of all pods with that label, number 10.
pub fn web() -> Service {
    addressed(Service::new("web").selector("app", "web"), 10)
}

/// Gives a Service everything by which it can be reached: ClusterIPs 10.96.0.N, NodePort 30000+N, LoadBalancer addresses 10.99.1.N.
pub fn addressed(service: Service, number: u16) -> Service {
    service
        .dual_stack(number)
        .node_port("tcp", "TCP", 80, TARGET, 30_000 + number)
        .node_port("udp", "UDP", 80, TARGET, 30_000 + number)
        .load_balancer(&load_balancer(number))
}

/// The LoadBalancer addresses of a Service by number.
pub fn load_balancer(number: u16) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x99, 1, 0, 0, 0, 0, number);
    [IpAddr::from([10, 99, 1, number.to_be_bytes()[1]]), v6.into()]
}

/// The ClusterIPs of a Service by number, with port 80.
pub fn cluster_ips(number: u16) -> [SocketAddr; 2] {
    let [high, low] = number.to_be_bytes();
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number);
    [SocketAddr::from(([10, 96, high, low], 80)), SocketAddr::from((v6, 80))]
}

/// By what a Service is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// ClusterIPs 10.96.0.N and fd00:10:96::N.
    ClusterIp,
    /// NodePort 30000+N of a node.
    NodePort(u8),
    /// LoadBalancer addresses 10.99.1.N and fd00:99:1::N.
    LoadBalancer,
}

impl By {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::ClusterIp, Self::NodePort(1), Self::NodePort(2), Self::LoadBalancer];

    /// The addresses of both families for a Service of this number.
    pub fn addresses(self, number: u16) -> [SocketAddr; 2] {
        match self {
            Self::ClusterIp => cluster_ips(number),
            Self::NodePort(node) => [
                SocketAddr::from((topology::node_v4(node), 30_000 + number)),
                SocketAddr::from((topology::node_v6(node), 30_000 + number)),
            ],
            Self::LoadBalancer => load_balancer(number).map(|address| SocketAddr::new(address, 80)),
        }
    }
}

/// Everyone who may ask, by name.
pub fn clients(lab: &Lab) -> Vec<(String, Client)> {
    let pods = lab.pods().map(|pod| (pod.name.clone(), lab.client(pod)));
    let nodes = lab.nodes.iter().map(|node| (node.name.clone(), lab.host_client(node)));
    pods.chain(nodes).chain([("outside".to_owned(), lab.outside_client())]).collect()
}

/// The addresses by which a name is known.
pub fn own_addresses(lab: &Lab, name: &str) -> [IpAddr; 2] {
    if let Some(pod) = lab.pods().find(|pod| pod.name == name) {
        return [pod.v4.into(), pod.v6.into()];
    }
    if let Some(node) = lab.nodes.iter().find(|node| node.name == name) {
        return [node.v4().into(), node.v6().into()];
    }
    [topology::OUTSIDE_V4.into(), topology::OUTSIDE_V6.into()]
}

/// Whether the answer is ECONNREFUSED.
pub fn refused(answer: &io::Result<Answer>) -> bool {
    answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

/// One Service for each kind of endpoint, each with one endpoint: its number and the endpoint's name.
pub const KINDS: [(u16, &str); 5] = [(11, "p1-1"), (12, "p2-1"), (13, "node1"), (14, "node2"), (15, "outside")];

/// Writes the Services of [`KINDS`] and the Pods behind them.
pub fn one_service_a_kind(lab: &Lab) {
    for (number, endpoint) in KINDS {
        let service = Service::new(&format!("to-{endpoint}"));
        let service = if endpoint == "outside" { service } else { service.selector("app", endpoint) };
        lab.manifests().write(&format!("service-{endpoint}.json"), addressed(service, number));
    }
    for pod in lab.pods() {
        lab.manifests().write(&format!("pod-{}.json", pod.name), PodObject::of(pod).label("app", &pod.name));
    }
    for node in &lab.nodes {
        lab.manifests().write(&format!("pod-{}.json", node.name), PodObject::on_host(node).label("app", &node.name));
    }
    for address in own_addresses(lab, "outside") {
        let family = if address.is_ipv4() { "v4" } else { "v6" };
        let endpoint = SliceEndpoint { address, node: String::new(), serving: true, terminating: false };
        let ports = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];
        let mut slice = endpoint_slice(&format!("to-outside-{family}"), "to-outside", &ports, &[endpoint]);
        if let Some(endpoint) = slice["endpoints"][0].as_object_mut() {
            endpoint.remove("nodeName");
        }
        lab.manifests().write(&format!("slice-{family}.json"), slice);
    }
}
