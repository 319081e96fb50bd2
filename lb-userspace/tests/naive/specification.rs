//! kube-proxy's rules, said as plainly as they can be: what the plan and the tables are held against.
//!
//! In: the cluster's objects as JSON, the node, a packet. Out: its [`Fate`]. Nothing of the product is called here. The numbers in
//! comments are sections of `kube-proxy.md`; "ours" are rules that kube-proxy does not have.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use ipnet::IpNet;
use serde_json::Value;

/// What happens to a packet that starts a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Not ours.
    Pass,
    /// Refused at once.
    Reject,
    /// Silence.
    Drop,
    /// One of these gets it, and sees this node's address (true) or the client's.
    Forward(BTreeMap<SocketAddr, bool>),
}

impl Fate {
    /// Whoever gets it, whichever address they see.
    pub fn without_source(mut self) -> Self {
        if let Self::Forward(endpoints) = &mut self {
            endpoints.values_mut().for_each(|masqueraded| *masqueraded = false);
        }
        self
    }
}

/// A packet that starts a connection.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub from: IpAddr,
    pub to: IpAddr,
    pub port: u16,
    pub protocol: &'static str,
    /// A process of the node sends it.
    pub from_node: bool,
    /// By which it enters, where it does.
    pub interface: &'static str,
}

/// The operator's wishes, and what is on the node's interfaces.
#[derive(Clone, Debug)]
pub struct Node {
    pub name: &'static str,
    pub nftables: bool,
    pub interfaces: Vec<IpAddr>,
    pub node_port_addresses: Vec<&'static str>,
    pub localhost_node_ports: bool,
    pub masquerade_all: bool,
    pub preserve_client_ip: bool,
    pub detector: Detector,
}

/// `detectLocalMode`.
#[derive(Clone, Debug)]
pub enum Detector {
    None,
    ClusterCidr(&'static str),
    NodeCidr,
    BridgeInterface(&'static str),
    InterfaceNamePrefix(&'static str),
}

/// A Service port as a packet meets it.
struct Port<'a> {
    service: &'a Value,
    port: &'a Value,
    /// The ClusterIP of the packet's family.
    cluster_ip: IpAddr,
}

struct Endpoint {
    addr: SocketAddr,
    ready: bool,
    serving: bool,
    terminating: bool,
    local: bool,
    zones: Vec<String>,
    nodes: Vec<String>,
}

/// Which endpoint clients were given last, and when, by Service port and client (§6).
pub type Clients = BTreeMap<(String, String), (SocketAddr, u64)>;

/// The cluster, seen from a node.
#[derive(Clone, Copy)]
pub struct Cluster<'a> {
    pub objects: &'a [Value],
    pub node: &'a Node,
    pub clients: &'a Clients,
    /// Seconds.
    pub now: u64,
}

impl Cluster<'_> {
    /// The Service port that a packet is sent to, and whether by an address of its own; else what happens to the packet (§3).
    fn hit(&self, packet: &Packet) -> Result<(Port<'_>, bool), Fate> {
        let v4 = packet.to.is_ipv4();
        let ports = || self.ports(v4).filter(|it| it.port["protocol"].as_str().unwrap_or("TCP") == packet.protocol);
        let at_address = |it: &Port<'_>| {
            let mut addresses = external_ips(it.service).chain(load_balancer_ips(it.service)).chain([it.cluster_ip]);
            it.port["port"] == packet.port && addresses.any(|addr| addr == packet.to)
        };
        let at_node = |it: &Port<'_>| it.port["nodePort"] == packet.port && packet.port != 0;
        // Step 2, and where several claim it, the oldest has it.
        if let Some(port) = ports().filter(at_address).min_by_key(claim) {
            return Ok((port, true));
        }
        // Step 3.
        match ports().filter(at_node).min_by_key(claim) {
            // From outside, localhost is nobody's (§5).
            Some(_) if self.has_node_ports(packet.to) && packet.to.is_loopback() && !packet.from_node => {
                Err(Fate::Pass)
            }
            Some(port) if self.has_node_ports(packet.to) => Ok((port, false)),
            Some(_) | None => Err(self.miss(packet.to)),
        }
    }

    /// What happens to a packet (§3).
    pub fn fate(&self, packet: &Packet) -> Fate {
        let v4 = packet.to.is_ipv4();
        let (hit, by_address) = match self.hit(packet) {
            Ok(hit) => hit,
            Err(fate) => return fate,
        };
        let internal = by_address && hit.cluster_ip == packet.to;
        // Ours: a ClusterIP that is the node's own address is the host's.
        if internal && self.is_own(packet.to) {
            return Fate::Pass;
        }
        // Step 1.
        let by_load_balancer = by_address && load_balancer_ips(hit.service).any(|addr| addr == packet.to);
        if by_load_balancer && !self.admits(&hit, packet.from) {
            return Fate::Drop;
        }
        let endpoints = self.endpoints(&hit, v4);
        let (cluster, local, has_any) = self.categorize(&endpoints);
        let local_policy = |field: &str| hit.service["spec"][field] == "Local";
        let detected = self.is_detected(packet);
        let (set, masquerade) = if internal {
            // M1, M2, M3.
            let masquerade = self.node.masquerade_all || self.detects(v4) && !detected;
            (if local_policy("internalTrafficPolicy") { local } else { cluster }, masquerade)
        } else if !local_policy("externalTrafficPolicy") {
            // M4.
            (cluster, true)
        } else if detected {
            // M5.
            (cluster, false)
        } else if packet.from_node || self.is_own(packet.from) {
            // M6.
            (cluster, true)
        } else {
            // M7.
            (local, false)
        };
        if set.is_empty() {
            return if has_any { Fate::Drop } else { Fate::Reject };
        }
        let kept = self.node.preserve_client_ip && (internal || !local_policy("externalTrafficPolicy"));
        let seen = |endpoint: &&Endpoint| {
            // M8; ours: `--preserve-client-ip`.
            let masquerade = masquerade && !(kept && endpoint.local) || endpoint.addr.ip() == packet.from;
            (endpoint.addr, masquerade)
        };
        // A client stays where it went, if it could be sent there now.
        let stay = self.stay(&hit, packet);
        let stays = set.iter().any(|it| Some(it.addr) == stay);
        Fate::Forward(set.iter().filter(|it| !stays || Some(it.addr) == stay).map(seen).collect())
    }

    /// The endpoint that a packet's sender was given by a Service port, while that counts (§6).
    fn stay(&self, hit: &Port<'_>, packet: &Packet) -> Option<SocketAddr> {
        let (addr, last) = self.clients.get(&(port_name(hit), client(packet)))?;
        let spec = &hit.service["spec"];
        let timeout = spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].as_u64().unwrap_or(10_800);
        (spec["sessionAffinity"] == "ClientIP" && self.now - last < timeout).then_some(*addr)
    }

    /// Under what an endpoint is noted for a packet that begins a connection (§6), if it is.
    pub fn noted(&self, packet: &Packet) -> Option<(String, String)> {
        let (hit, _) = self.hit(packet).ok()?;
        (hit.service["spec"]["sessionAffinity"] == "ClientIP").then(|| (port_name(&hit), client(packet)))
    }

    /// What is left of what was noted: with an endpoint its clients are forgotten (§6).
    pub fn still_noted(&self) -> Clients {
        let is_there = |name: &str, addr: &SocketAddr| {
            let port = self.ports(true).chain(self.ports(false)).find(|port| port_name(port) == name);
            port.is_some_and(|port| {
                let all = self.endpoints(&port, addr.is_ipv4());
                all.iter().any(|endpoint| endpoint.addr == *addr && (endpoint.ready || endpoint.serving))
            })
        };
        let kept = self.clients.iter().filter(|((name, _), (addr, _))| is_there(name, addr));
        kept.map(|(key, last)| (key.clone(), *last)).collect()
    }

    /// Step 4, as nftables mode has it.
    fn miss(&self, to: IpAddr) -> Fate {
        if self.services().any(|service| cluster_ips(service).contains(&to)) {
            return if self.is_own(to) { Fate::Pass } else { Fate::Reject };
        }
        let cidrs = self.of_kind("ServiceCIDR").flat_map(|cidr| texts(&cidr["spec"]["cidrs"]));
        if cidrs.map(network).any(|cidr| cidr.contains(&to)) { Fate::Drop } else { Fate::Pass }
    }

    fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.objects.iter().filter(move |object| object["kind"] == kind)
    }

    /// Services that are there for kube-proxy (§1, §1.1).
    fn services(&self) -> impl Iterator<Item = &Value> {
        self.of_kind("Service").filter(|service| {
            let labels = &service["metadata"]["labels"];
            labels.get("service.kubernetes.io/service-proxy-name").is_none()
                && labels.get("service.kubernetes.io/headless").is_none()
                && service["spec"]["type"] != "ExternalName"
                && !matches!(service["spec"]["clusterIP"].as_str(), None | Some("" | "None"))
        })
    }

    /// Ports of the Services that exist for a family (§1.1).
    fn ports(&self, v4: bool) -> impl Iterator<Item = Port<'_>> {
        self.services().flat_map(move |service| {
            let cluster_ip = cluster_ips(service).into_iter().find(|ip| ip.is_ipv4() == v4);
            let ports = list(&service["spec"]["ports"]);
            cluster_ip
                .into_iter()
                .flat_map(move |cluster_ip| ports.iter().map(move |port| Port { service, port, cluster_ip }))
        })
    }

    /// The endpoints of a Service port (§1.2).
    fn endpoints(&self, port: &Port<'_>, v4: bool) -> Vec<Endpoint> {
        let metadata = &port.service["metadata"];
        let own = |object: &&Value| object["metadata"]["namespace"] == metadata["namespace"];
        let mut slices: Vec<&Value> = self
            .of_kind("EndpointSlice")
            .filter(own)
            .filter(|slice| slice["metadata"]["labels"]["kubernetes.io/service-name"] == metadata["name"])
            .filter(|slice| slice["metadata"]["labels"].get("service.kubernetes.io/headless").is_none())
            .collect();
        slices.sort_by_key(|slice| slice["metadata"]["name"].as_str());
        // Ours: a Service that no slice names has the Pods that it selects.
        let all: Vec<Endpoint> = if slices.is_empty() {
            self.of_kind("Pod").filter(own).flat_map(|pod| self.endpoint_of_pod(pod, port, v4)).collect()
        } else {
            slices.iter().flat_map(|slice| self.endpoints_of_slice(slice, port, v4)).collect()
        };
        let mut once: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
        for endpoint in all {
            let better = once.get(&endpoint.addr).is_none_or(|other| other.terminating && !endpoint.terminating);
            if better {
                once.insert(endpoint.addr, endpoint);
            }
        }
        once.into_values().collect()
    }

    fn endpoints_of_slice(&self, slice: &Value, port: &Port<'_>, v4: bool) -> Vec<Endpoint> {
        if slice["addressType"] != if v4 { "IPv4" } else { "IPv6" } {
            return Vec::new();
        }
        let joins = |it: &&Value| {
            let same = |field: &str, absent: &str| {
                it[field].as_str().unwrap_or(absent) == port.port[field].as_str().unwrap_or(absent)
            };
            it["name"].is_string() && same("name", "") && same("protocol", "TCP")
        };
        let numbers = list(&slice["ports"]).iter().filter(joins).filter_map(|it| it["port"].as_u64());
        let numbers: Vec<u16> = numbers.filter(|number| *number != 0).map(|number| number as u16).collect();
        let mut found = Vec::new();
        for endpoint in list(&slice["endpoints"]) {
            let Some(addr) = list(&endpoint["addresses"]).first().and_then(Value::as_str).map(address) else {
                continue;
            };
            let conditions = &endpoint["conditions"];
            let ready = conditions["ready"].as_bool().unwrap_or(true);
            let names = |field: &str| list(&endpoint["hints"][field]).iter().map(|hint| text(&hint["name"])).collect();
            found.extend(numbers.iter().map(|number| Endpoint {
                addr: SocketAddr::new(addr, *number),
                ready,
                serving: conditions["serving"].as_bool().unwrap_or(true),
                terminating: conditions["terminating"].as_bool().unwrap_or(false),
                local: endpoint["nodeName"] == self.node.name,
                zones: names("forZones"),
                nodes: names("forNodes"),
            }));
        }
        found
    }

    /// What the EndpointSlice controller would make of a Pod.
    fn endpoint_of_pod(&self, pod: &Value, port: &Port<'_>, v4: bool) -> Option<Endpoint> {
        let spec = &port.service["spec"];
        let selector = spec["selector"].as_object().filter(|selector| !selector.is_empty())?;
        let selected = selector.iter().all(|(key, value)| pod["metadata"]["labels"].get(key) == Some(value));
        let finished = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        if !selected || finished {
            return None;
        }
        let ips = list(&pod["status"]["podIPs"]).iter().filter_map(|ip| ip["ip"].as_str()).map(address);
        let addr = ips.filter(|addr| addr.is_ipv4() == v4).collect::<Vec<_>>();
        let target = &port.port["targetPort"];
        let number = if target.is_null() {
            port.port["port"].as_u64()?
        } else if let Some(name) = target.as_str() {
            let containers = list(&pod["spec"]["containers"]).iter();
            let named = |it: &&Value| it["name"] == *name && it.get("protocol") == port.port.get("protocol");
            containers.flat_map(|it| list(&it["ports"])).find(named)?["containerPort"].as_u64()?
        } else {
            target.as_u64()?
        };
        let condition = |it: &Value| it["type"] == "Ready" && it["status"] == "True";
        let ready = list(&pod["status"]["conditions"]).iter().any(condition);
        let terminating = pod["metadata"]["deletionTimestamp"].is_string();
        Some(Endpoint {
            addr: SocketAddr::new(*addr.first()?, number as u16),
            ready: !terminating && (ready || spec["publishNotReadyAddresses"] == true),
            serving: ready,
            terminating,
            local: pod["spec"]["nodeName"] == self.node.name,
            zones: Vec::new(),
            nodes: Vec::new(),
        })
    }

    /// The cluster-wide set, the local one, and whether there is anything at all (§2).
    fn categorize<'a>(&self, endpoints: &'a [Endpoint]) -> (Vec<&'a Endpoint>, Vec<&'a Endpoint>, bool) {
        let ready: Vec<&Endpoint> = endpoints.iter().filter(|it| it.ready).collect();
        let leaving: Vec<&Endpoint> = endpoints.iter().filter(|it| it.serving && it.terminating).collect();
        let node = self.node.name.to_owned();
        let zone = self.own().map(|own| text(&own["metadata"]["labels"]["topology.kubernetes.io/zone"]));
        let zone = zone.unwrap_or_default();
        let by_node = ready.iter().all(|it| !it.nodes.is_empty()) && ready.iter().any(|it| it.nodes.contains(&node));
        let by_zone = !by_node
            && !zone.is_empty()
            && ready.iter().all(|it| !it.zones.is_empty())
            && ready.iter().any(|it| it.zones.contains(&zone));
        let suits = |it: &Endpoint| (!by_node || it.nodes.contains(&node)) && (!by_zone || it.zones.contains(&zone));
        let mut cluster: Vec<&Endpoint> = ready.iter().copied().filter(|it| suits(it)).collect();
        let mut local: Vec<&Endpoint> = ready.iter().copied().filter(|it| it.local).collect();
        if cluster.is_empty() {
            cluster.clone_from(&leaving);
        }
        if local.is_empty() {
            local = leaving.iter().copied().filter(|it| it.local).collect();
        }
        (cluster, local, !ready.is_empty() || !leaving.is_empty())
    }

    /// `loadBalancerSourceRanges` (§1.1, §3 step 1).
    fn admits(&self, port: &Port<'_>, from: IpAddr) -> bool {
        let ranges = texts(&port.service["spec"]["loadBalancerSourceRanges"]).map(network);
        let ranges: Vec<IpNet> = ranges.filter(|range| range.addr().is_ipv4() == from.is_ipv4()).collect();
        let holds = |addr: &IpAddr| ranges.iter().any(|range| range.contains(addr));
        let is_node = self.primary().iter().any(holds) && load_balancer_ips(port.service).any(|addr| addr == from);
        ranges.is_empty() || holds(&from) || is_node
    }

    fn own(&self) -> Option<&Value> {
        self.of_kind("Node").find(|node| node["metadata"]["name"] == self.node.name)
    }

    fn is_own(&self, addr: IpAddr) -> bool {
        self.node.interfaces.contains(&addr) || addr.is_loopback()
    }

    /// InternalIP before ExternalIP, one of each family (§12).
    pub fn primary(&self) -> Vec<IpAddr> {
        let of = |type_: &str| -> Vec<IpAddr> {
            let all = self.own().map(|own| list(&own["status"]["addresses"])).unwrap_or_default();
            all.iter().filter(|it| it["type"] == type_).map(|it| address(&text(&it["address"]))).collect()
        };
        let all = [of("InternalIP"), of("ExternalIP")].concat();
        [true, false].iter().filter_map(|v4| all.iter().copied().find(|it| it.is_ipv4() == *v4)).collect()
    }

    /// Whether NodePorts answer at an address (§5).
    fn has_node_ports(&self, addr: IpAddr) -> bool {
        let Node { nftables, node_port_addresses, localhost_node_ports, .. } = self.node;
        if !self.is_own(addr) || addr.is_loopback() && (addr.is_ipv6() || *nftables || !localhost_node_ports) {
            return false;
        }
        let default: &[&str] = if *nftables { &["primary"] } else { &[] };
        let list = if node_port_addresses.is_empty() { default } else { node_port_addresses };
        let nets: Vec<IpNet> = list.iter().filter(|it| **it != "primary").map(|it| network(it)).collect();
        let mut of_family = nets.iter().filter(|net| net.addr().is_ipv4() == addr.is_ipv4()).peekable();
        let primary = list.contains(&"primary");
        // Of localhost, lists know the addresses that are on an interface; an iptables rule without a list knows all (§5).
        let on_interface = self.node.interfaces.contains(&addr) || addr == IpAddr::from([127, 0, 0, 1]);
        if addr.is_loopback() && !on_interface {
            return !primary && (of_family.peek().is_none() || of_family.any(|net| net.prefix_len() == 0));
        }
        !primary && of_family.peek().is_none()
            || of_family.any(|net| net.contains(&addr))
            || primary && self.primary().contains(&addr)
    }

    /// The networks of the detector, the first of each family.
    fn local_networks(&self) -> Vec<IpNet> {
        let all: Vec<IpNet> = match &self.node.detector {
            Detector::ClusterCidr(list) => list.split(',').map(network).collect(),
            Detector::NodeCidr => {
                self.own().map(|own| texts(&own["spec"]["podCIDRs"]).map(network).collect()).unwrap_or_default()
            }
            Detector::None | Detector::BridgeInterface(_) | Detector::InterfaceNamePrefix(_) => Vec::new(),
        };
        [true, false].iter().filter_map(|v4| all.iter().copied().find(|net| net.addr().is_ipv4() == *v4)).collect()
    }

    /// Whether there is a detector for a family (§4).
    fn detects(&self, v4: bool) -> bool {
        match &self.node.detector {
            Detector::None => false,
            Detector::ClusterCidr(_) | Detector::NodeCidr => {
                self.local_networks().iter().any(|net| net.addr().is_ipv4() == v4)
            }
            Detector::BridgeInterface(_) | Detector::InterfaceNamePrefix(_) => true,
        }
    }

    fn is_detected(&self, packet: &Packet) -> bool {
        match &self.node.detector {
            Detector::BridgeInterface(name) => !packet.from_node && packet.interface == *name,
            Detector::InterfaceNamePrefix(prefix) => !packet.from_node && packet.interface.starts_with(prefix),
            Detector::None | Detector::ClusterCidr(_) | Detector::NodeCidr => {
                self.local_networks().iter().any(|net| net.contains(&packet.from))
            }
        }
    }
}

/// What tells Service ports from each other.
fn port_name(port: &Port<'_>) -> String {
    let [metadata, protocol] = [&port.service["metadata"], &port.port["protocol"]];
    format!("{}/{}:{}/{protocol}", metadata["namespace"], metadata["name"], port.port["name"])
}

/// Whose packet it is: the node is one client in each family, whatever its addresses.
fn client(packet: &Packet) -> String {
    if packet.from_node { format!("node, IPv4: {}", packet.from.is_ipv4()) } else { packet.from.to_string() }
}

/// Who has a frontend that several claim: the smallest. Ours: objects without a time count as oldest.
fn claim(port: &Port<'_>) -> (Option<String>, String, String, String) {
    let metadata = &port.service["metadata"];
    let age = metadata["creationTimestamp"].as_str().map(ToOwned::to_owned);
    (age, text(&metadata["namespace"]), text(&metadata["name"]), text(&port.port["name"]))
}

fn cluster_ips(service: &Value) -> Vec<IpAddr> {
    texts(&service["spec"]["clusterIPs"]).map(address).collect()
}

fn external_ips(service: &Value) -> impl Iterator<Item = IpAddr> {
    texts(&service["spec"]["externalIPs"]).map(address)
}

fn load_balancer_ips(service: &Value) -> impl Iterator<Item = IpAddr> {
    let ingress = list(&service["status"]["loadBalancer"]["ingress"]).iter();
    let virtual_ip = |it: &&Value| it["ipMode"].as_str().is_none_or(|mode| mode == "VIP");
    ingress.filter(virtual_ip).filter_map(|it| it["ip"].as_str()).map(address)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn texts(value: &Value) -> impl Iterator<Item = &str> {
    list(value).iter().filter_map(Value::as_str)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// IPv4 octets are decimal, with zeros before them or not (§1.1).
fn address(text: &str) -> IpAddr {
    if text.contains(':') {
        return text.parse().unwrap();
    }
    let octets: Vec<u8> = text.split('.').map(|octet| octet.parse().unwrap()).collect();
    Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]).into()
}

fn network(text: &str) -> IpNet {
    let (addr, length) = text.trim().split_once('/').unwrap();
    IpNet::new(address(addr), length.parse().unwrap()).unwrap().trunc()
}
