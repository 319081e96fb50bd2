//! Random clusters in small worlds, so that everything meets everything: the same few addresses, ports, names and labels.
//!
//! In: proptest's choices. Out: manifests, and [`Op`]s that change them.

use std::net::IpAddr;

use proptest::{collection::vec, option, prelude::*, sample::select, sample::subsequence};
use serde_json::{Value, json};

use crate::specification::{Detector, Node};

/// The node whose tables are looked at.
pub const OWN_NODE: &str = "node1";
/// Addresses that Services have: ClusterIPs, external ones, those of load balancers. The last of each is nobody's.
pub const CLUSTER_IPS: [[&str; 4]; 2] = [
    ["172.30.0.1", "172.30.0.041", "172.30.0.3", "172.30.0.99"],
    ["fd00:30::1", "fd00:30::41", "fd00:30::3", "fd00:30::99"],
];
/// See [`CLUSTER_IPS`].
pub const EXTERNAL_IPS: [[&str; 3]; 2] =
    [["192.0.2.1", "192.0.2.2", "192.0.2.9"], ["2001:db8::1", "2001:db8::2", "2001:db8::9"]];
/// Where pods are; the last is no endpoint.
pub const POD_IPS: [[&str; 5]; 2] = [
    ["10.1.0.1", "10.1.0.2", "10.2.0.1", "10.2.0.2", "10.1.0.9"],
    ["fd00:1::1", "fd00:1::2", "fd00:2::1", "fd00:2::2", "fd00:1::9"],
];
/// Which the node may have on its interfaces. The last is an address of a load balancer that is bound locally.
pub const NODE_IPS: [[&str; 3]; 2] =
    [["192.168.0.2", "192.168.1.2", "192.0.2.2"], ["fd00:c0::2", "fd00:c1::2", "2001:db8::2"]];
/// A client that is nowhere near.
pub const OUTSIDE: [&str; 2] = ["203.0.113.7", "2001:db8:77::7"];
/// Ports of Services, NodePorts (some outside the usual range), and one that is nobody's.
pub const PORTS: [(u16, &str); 10] = [
    (80, "TCP"),
    (80, "SCTP"),
    (53, "UDP"),
    (443, "TCP"),
    (30080, "TCP"),
    (30080, "UDP"),
    (3001, "TCP"),
    (3001, "UDP"),
    (20080, "SCTP"),
    (9, "UDP"),
];

/// The first more often, so that things meet.
const NAMESPACES: [&str; 4] = ["a", "a", "a", "b"];
const SERVICES: [&str; 5] = ["dns", "web", "web", "web", "x"];
const SLICES: [&str; 3] = ["one", "two", "zero"];
const PODS: [&str; 3] = ["p1", "p2", "p3"];

/// One change of the world.
#[derive(Clone, Debug)]
pub enum Op {
    /// The object comes, or becomes this.
    Put(Value),
    /// An object goes: kind, namespace and name.
    Remove(&'static str, &'static str, &'static str),
    /// The node has these addresses on its interfaces.
    Interfaces(Vec<IpAddr>),
    /// Seconds pass.
    Wait(u64),
    /// The agent starts anew with the tables that it left.
    Restart,
}

/// Changes that come together.
pub fn ops() -> impl Strategy<Value = Vec<Op>> {
    let name = |names: &'static [&'static str]| select(names);
    let namespace = || select(&NAMESPACES[..]);
    let op = prop_oneof![
        6 => service().prop_map(Op::Put),
        8 => slice().prop_map(Op::Put),
        4 => pod().prop_map(Op::Put),
        2 => own_node().prop_map(Op::Put),
        1 => service_cidr().prop_map(Op::Put),
        2 => (namespace(), name(&SERVICES)).prop_map(|(namespace, name)| Op::Remove("Service", namespace, name)),
        2 => (namespace(), name(&SLICES)).prop_map(|(namespace, name)| Op::Remove("EndpointSlice", namespace, name)),
        1 => (namespace(), name(&PODS)).prop_map(|(namespace, name)| Op::Remove("Pod", namespace, name)),
        1 => Just(Op::Remove("Node", "", OWN_NODE)),
        1 => Just(Op::Remove("ServiceCIDR", "", "kubernetes")),
        1 => interfaces().prop_map(Op::Interfaces),
        2 => prop_oneof![2 => 0..5_u64, 1 => Just(15_000), 1 => Just(90_000)].prop_map(Op::Wait),
        3 => Just(Op::Restart),
    ];
    vec(op, 1..4)
}

/// What an operator may wish.
pub fn node() -> impl Strategy<Value = Node> {
    let addresses = select(vec![
        vec![],
        vec!["primary"],
        vec!["0.0.0.0/0", "::/0"],
        vec!["192.168.1.0/24"],
        vec!["primary", "fd00:c1::/64", "127.0.0.0/8"],
        vec!["127.0.0.1/32"],
        vec!["127.9.9.0/24", "::/0"],
    ]);
    let detector = select(vec![
        Detector::None,
        Detector::ClusterCidr("10.1.0.0/16,fd00:1::/32,10.0.0.0/8"),
        Detector::ClusterCidr("10.0.0.0/8"),
        Detector::NodeCidr,
        Detector::BridgeInterface("cni0"),
        Detector::InterfaceNamePrefix("veth"),
    ]);
    (any::<[bool; 4]>(), interfaces(), addresses, detector).prop_map(|(flags, interfaces, addresses, detector)| Node {
        name: OWN_NODE,
        nftables: flags[0],
        interfaces,
        node_port_addresses: addresses,
        localhost_node_ports: flags[1],
        masquerade_all: flags[2],
        preserve_client_ip: flags[3],
        detector,
    })
}

fn interfaces() -> impl Strategy<Value = Vec<IpAddr>> {
    let all = NODE_IPS.as_flattened().iter().chain(&["127.9.9.9"]);
    subsequence(all.map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>(), 0..=7)
}

/// One list or the other, or both, by the families of a Service.
fn by_family<'a, const N: usize>(families: &[usize], lists: &[[&'a str; N]; 2], index: usize) -> Vec<&'a str> {
    families.iter().map(|family| lists[*family][index]).collect()
}

fn service() -> impl Strategy<Value = Value> {
    let names = (select(&NAMESPACES[..]), select(&SERVICES[..]));
    let addresses = (
        select(vec![vec![0], vec![1], vec![0, 1], vec![1, 0]]),
        0..3_usize,
        subsequence(vec![0, 1], 0..=2),
        subsequence(vec![(0, None), (1, Some("VIP")), (1, Some("Proxy"))], 0..=2),
        subsequence(vec!["203.0.113.000/24 ", "10.0.0.0/8", "fd00:1::/32", "192.168.0.0/24"], 0..=2),
    );
    let node_port = || select(&[0_u16, 30080, 3001, 20080][..]);
    let all_ports =
        subsequence(vec![("http", 80, "TCP"), ("dns", 53, "UDP"), ("tls", 443, "TCP"), ("odd", 80, "SCTP")], 1..=3);
    let ports = (
        all_ports,
        [node_port(), node_port(), node_port()],
        select(vec![None, Some(json!(8080)), Some(json!("main"))]),
    );
    let affinity = prop_oneof![
        2 => Just(json!({})),
        1 => Just(json!({ "sessionAffinity": "None", "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 3 } } })),
        2 => Just(json!({ "sessionAffinity": "ClientIP" })),
        3 => select(vec![1, 3, 86_400]).prop_map(|seconds| {
            json!({ "sessionAffinity": "ClientIP", "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": seconds } } })
        }),
    ];
    let policies = (any::<[bool; 3]>(), option::of(select(&["2024", "2025", "2026"][..])), affinity);
    let what = prop_oneof![
        20 => Just(("LoadBalancer", None)),
        1 => Just(("ExternalName", None)),
        1 => Just(("ClusterIP", Some("service.kubernetes.io/headless"))),
        1 => Just(("ClusterIP", Some("service.kubernetes.io/service-proxy-name"))),
        1 => Just(("None", None)),
    ];
    (names, addresses, ports, policies, what, option::weighted(0.7, select(&["x", "y"][..]))).prop_map(
        |((namespace, name), (families, ip, external, ingress, ranges), (ports, node_ports, target), (flags, age, affinity), (type_, label), app)| {
            let cluster_ips = by_family(&families, &CLUSTER_IPS, ip);
            let policy = |local: bool| if local { "Local" } else { "Cluster" };
            let ports: Vec<Value> = ports
                .iter()
                .zip(node_ports)
                .map(|((name, port, protocol), node_port)| {
                    json!({ "name": name, "port": port, "protocol": protocol, "nodePort": node_port, "targetPort": target })
                })
                .collect();
            // Addresses of both families, also of those that the Service doesn't have.
            let external: Vec<&str> = external.iter().flat_map(|index| by_family(&[0, 1], &EXTERNAL_IPS, *index)).collect();
            // Two pools that meet: what is external to one Service may be another's load balancer.
            let ingress: Vec<Value> = ingress
                .iter()
                .flat_map(|(index, mode)| by_family(&[0, 1], &EXTERNAL_IPS, 1 - *index).into_iter().map(|ip| (ip, *mode)))
                .map(|(ip, mode)| json!({ "ip": ip, "ipMode": mode }))
                .collect();
            let headless = type_ == "None";
            let mut service = json!({
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {
                    "namespace": namespace,
                    "name": name,
                    "creationTimestamp": age,
                    "labels": label.map(|label| json!({ label: "" })).unwrap_or_default(),
                },
                "spec": {
                    "type": if headless { "ClusterIP" } else { type_ },
                    "clusterIP": if headless { "None" } else { cluster_ips[0] },
                    "clusterIPs": if headless { vec!["None"] } else { cluster_ips },
                    "ipFamilies": families.iter().map(|it| ["IPv4", "IPv6"][*it]).collect::<Vec<_>>(),
                    "ports": ports,
                    "externalIPs": external,
                    "loadBalancerSourceRanges": ranges,
                    "internalTrafficPolicy": policy(flags[0]),
                    "externalTrafficPolicy": policy(flags[1]),
                    "publishNotReadyAddresses": flags[2],
                    "selector": app.map(|app| json!({ "app": app })).unwrap_or_default(),
                },
                "status": { "loadBalancer": { "ingress": ingress } },
            });
            if let (Some(spec), Value::Object(fields)) = (service["spec"].as_object_mut(), affinity) {
                spec.extend(fields);
            }
            service
        },
    )
}

/// `ready`, `serving`, `terminating`: in every combination, those that matter more often.
fn conditions() -> impl Strategy<Value = (Option<bool>, Option<bool>, Option<bool>)> {
    prop_oneof![
        9 => Just((None, None, None)),
        4 => Just((Some(false), Some(true), Some(true))),
        2 => Just((Some(false), Some(true), None)),
        1 => Just((Some(false), None, Some(true))),
        2 => any::<(Option<bool>, Option<bool>, Option<bool>)>(),
    ]
}

fn slice() -> impl Strategy<Value = Value> {
    let endpoint = (
        0..4_usize,
        conditions(),
        option::of(select(vec![OWN_NODE, "node2"])),
        option::weighted(0.5, (subsequence(vec!["z1", "z2"], 0..=2), subsequence(vec![OWN_NODE, "node2"], 0..=1))),
    );
    let names = (select(&NAMESPACES[..]), select(&SLICES[..]), option::weighted(0.9, select(&SERVICES[..])));
    let ports = subsequence(
        vec![
            json!({ "name": "http", "port": 8080, "protocol": "TCP" }),
            json!({ "name": "http", "port": 8081 }),
            json!({ "name": "dns", "port": 5353, "protocol": "UDP" }),
            json!({ "name": "tls", "port": null, "protocol": "TCP" }),
            json!({ "name": "odd", "port": 80, "protocol": "SCTP" }),
            json!({ "port": 80, "protocol": "TCP" }),
        ],
        1..=4,
    );
    let families = prop_oneof![6 => Just("IPv4"), 4 => Just("IPv6"), 1 => Just("FQDN")];
    (names, families, vec(endpoint, 0..7), ports, prop::bool::weighted(0.05)).prop_map(
        |((namespace, name, service), family, endpoints, ports, headless)| {
            let endpoints: Vec<Value> = endpoints
                .iter()
                .map(|(index, (ready, serving, terminating), node, hints)| {
                    let names = |list: &[&str]| list.iter().map(|name| json!({ "name": name })).collect::<Vec<_>>();
                    json!({
                        "addresses": [POD_IPS[usize::from(family == "IPv6")][*index]],
                        "conditions": { "ready": ready, "serving": serving, "terminating": terminating },
                        "nodeName": node,
                        "hints": hints.as_ref().map(|(zones, nodes)| json!({ "forZones": names(zones), "forNodes": names(nodes) })),
                    })
                })
                .collect();
            let mut labels = json!({});
            if let Some(service) = service {
                labels["kubernetes.io/service-name"] = service.into();
            }
            if headless {
                labels["service.kubernetes.io/headless"] = "".into();
            }
            json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": { "namespace": namespace, "name": name, "labels": labels },
                "addressType": family,
                "endpoints": endpoints,
                "ports": ports,
            })
        },
    )
}

fn pod() -> impl Strategy<Value = Value> {
    let names = (select(&NAMESPACES[..]), 0..PODS.len());
    let phase = prop_oneof![6 => Just("Running"), 1 => Just("Succeeded"), 1 => Just("")];
    (names, select(&["x", "y", "z"][..]), phase, any::<[bool; 2]>(), select(&["TCP", "UDP"][..]), 0..4_u8).prop_map(
        |((namespace, pod), app, phase, [ready, here], protocol, rare)| {
            let ips: Vec<Value> = [0, 1].map(|family| json!({ "ip": POD_IPS[family][pod] })).into();
            json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "namespace": namespace,
                    "name": PODS[pod],
                    "labels": { "app": app, "tier": "any" },
                    "deletionTimestamp": (rare == 0).then_some("2026-01-01T00:00:00Z"),
                },
                "spec": {
                    "nodeName": if here { OWN_NODE } else { "node2" },
                    "containers": [{ "ports": [{ "name": "main", "containerPort": 7000, "protocol": protocol }] }],
                },
                "status": {
                    "phase": phase,
                    "podIP": ips[0]["ip"],
                    "podIPs": if rare == 1 { &ips[..1] } else { &ips },
                    "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
                },
            })
        },
    )
}

fn own_node() -> impl Strategy<Value = Value> {
    let addresses = subsequence(
        vec![
            ("ExternalIP", "203.0.113.2"),
            ("InternalIP", "192.168.0.2"),
            ("InternalIP", "192.168.1.2"),
            ("InternalIP", "fd00:c0::2"),
            ("ExternalIP", "fd00:c1::2"),
        ],
        0..=3,
    );
    let networks = subsequence(vec!["10.1.0.0/24", "10.2.0.0/24", "fd00:1::/64"], 0..=2);
    (option::of(select(&["", "z1", "z2", "z3"][..])), addresses, networks).prop_map(|(zone, addresses, networks)| {
        let addresses: Vec<Value> =
            addresses.iter().map(|(type_, address)| json!({ "type": type_, "address": address })).collect();
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": OWN_NODE,
                "labels": zone.map(|zone| json!({ "topology.kubernetes.io/zone": zone })).unwrap_or_default(),
            },
            "spec": { "podCIDRs": networks },
            "status": { "addresses": addresses },
        })
    })
}

fn service_cidr() -> impl Strategy<Value = Value> {
    subsequence(vec!["172.30.0.0/16", "fd00:30::/108", "172.30.0.99/32"], 0..=3).prop_map(|cidrs| {
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": { "name": "kubernetes" },
            "spec": { "cidrs": cidrs },
        })
    })
}
