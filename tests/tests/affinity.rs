//! Session affinity, with real sockets and short timeouts: a client stays with its endpoint, by whatever address it comes.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use tests::cluster::{By, Cluster, clients, web};
use tests::manifest::PodObject;
use tests::traffic::client::ask_datagram;
use tests::{Agent, Client, Protocol, Topology};

/// Connections of one kind; by chance all of them would reach one of four endpoints once in 4^11 runs.
const TIMES: usize = 12;
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::UdpUnconnected];

/// The Service `web`, whose clients stay for so many seconds.
fn sticky(seconds: u64, topology: Topology, flags: &[&str]) -> Cluster {
    Cluster::new(topology, flags, |lab| {
        let config = serde_json::json!({"clientIP": {"timeoutSeconds": seconds}});
        let service = web().spec("sessionAffinity", "ClientIP").spec("sessionAffinityConfig", config);
        lab.manifests().write("web.json", service);
        for pod in lab.pods() {
            lab.manifests().write(&format!("pod-{}.json", pod.name), PodObject::of(pod).label("app", "web"));
        }
    })
}

/// The one endpoint that answers all of these.
fn only(name: &str, client: &Client, protocol: Protocol, by: &[By], family: usize) -> String {
    let mut found = Vec::new();
    for by in by {
        let to = by.addresses(10)[family];
        let tally =
            client.tally(protocol, to, TIMES).unwrap_or_else(|error| panic!("{name} {protocol:?} {to}: {error}"));
        found.extend(tally.into_keys());
    }
    found.dedup();
    assert!(found.len() == 1, "{name} {protocol:?} by {by:?}: {found:?}");
    found.remove(0)
}

/// By what a client reaches the Service through one node only.
fn ways(name: &str) -> &'static [By] {
    match name {
        "outside" => &[By::NodePort(1)],
        "node2" | "p2-1" | "p2-2" => &[By::ClusterIp, By::NodePort(2), By::LoadBalancer],
        _ => &[By::ClusterIp, By::NodePort(1), By::LoadBalancer],
    }
}

#[test]
fn a_client_stays_with_its_endpoint_by_every_address_also_when_the_agent_starts_again() {
    // Two agents on one cgroup would both translate sockets of all pods.
    let one_node = Topology { nodes: 1, pods_per_node: 4, ..Topology::default() };
    for (topology, flags) in [(Topology::default(), &[][..]), (one_node, &["--socket-lb", "all"])] {
        let mut cluster = sticky(10_800, topology, flags);
        let ask = |cluster: &Cluster| -> Vec<String> {
            let cases = PROTOCOLS.into_iter().flat_map(|protocol| [(protocol, 0), (protocol, 1)]);
            clients(&cluster.lab)
                .iter()
                .flat_map(|(name, client)| {
                    cases.clone().map(|(protocol, family)| only(name, client, protocol, ways(name), family))
                })
                .collect()
        };
        let before = ask(&cluster);
        cluster.agents.iter_mut().for_each(Agent::kill);
        cluster.agents.iter_mut().for_each(Agent::restart);
        assert_eq!(ask(&cluster), before, "{flags:?}");
    }
}

#[test]
fn a_client_whose_endpoint_goes_stays_with_the_next_one() {
    let cluster = sticky(10_800, Topology::default(), &[]);
    for (name, client) in clients(&cluster.lab) {
        for family in [0, 1] {
            for protocol in PROTOCOLS {
                let first = only(&name, &client, protocol, ways(&name), family);
                let (node, pod) = first[1..].split_once('-').unwrap();
                let (node, pod) = (node.parse().unwrap(), pod.parse().unwrap());
                cluster.relabel(node, pod, "parked");
                thread::sleep(Duration::from_millis(200));
                let next = only(&name, &client, protocol, ways(&name), family);
                assert_ne!(next, first, "{name} {protocol:?}");
                cluster.relabel(node, pod, "web");
                thread::sleep(Duration::from_millis(200));
                assert_eq!(only(&name, &client, protocol, ways(&name), family), next, "{name} {protocol:?}");
            }
        }
    }
}

#[test]
fn a_client_is_forgotten_when_its_time_is_over_and_not_before() {
    let cluster = sticky(3, Topology::default(), &[]);
    // Each is remembered by itself: a Service port of a family.
    let kinds = [(Protocol::Tcp, 0), (Protocol::Udp, 0), (Protocol::Tcp, 1), (Protocol::UdpUnconnected, 1)];
    let clients: Vec<_> = clients(&cluster.lab).into_iter().filter(|(name, _)| !name.ends_with("-2")).collect();
    let asking = clients.iter().flat_map(|client| kinds.map(|kind| (client, kind)));
    let ask = |(name, client): &(String, Client), (protocol, family): (Protocol, usize)| {
        let to = ways(name)[0].addresses(10)[family];
        client.ask(protocol, to).unwrap_or_else(|error| panic!("{name} {protocol:?} {to}: {error}")).by
    };
    let mut first: Vec<_> = asking.map(|(client, kind)| (client, kind, ask(client, kind))).collect();
    for _ in 0..3 {
        // Each is within the time of the one before.
        thread::sleep(Duration::from_millis(1500));
        for (client, kind, by) in &first {
            assert_eq!(ask(client, *kind), *by, "{} {kind:?}", client.0);
        }
    }
    let start = Instant::now();
    while !first.is_empty() {
        let left: Vec<_> = first.iter().map(|(client, kind, by)| (&client.0, kind, by)).collect();
        assert!(start.elapsed() < Duration::from_secs(90), "for ever: {left:?}");
        thread::sleep(Duration::from_millis(3200));
        first.retain(|(client, kind, by)| ask(client, *kind) == *by);
    }
}

#[test]
fn datagrams_of_one_socket_refresh_nothing() {
    let cluster = sticky(2, Topology::default(), &[]);
    let client = cluster.lab.host_client(cluster.lab.node(1));
    let to = By::ClusterIp.addresses(10)[0];
    let socket = client.udp(to).unwrap();
    let first = ask_datagram(&socket, to).unwrap().by;
    let start = Instant::now();
    loop {
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(500));
            assert_eq!(ask_datagram(&socket, to).unwrap().by, first, "the flow stays");
        }
        if client.ask(Protocol::UdpUnconnected, to).unwrap().by != first {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{first} for ever");
    }
}

#[test]
fn a_pod_is_a_client_by_its_address_also_where_its_sockets_are_translated() {
    for flags in [&[][..], &["--socket-lb", "all"]] {
        let cluster = sticky(10_800, Topology { nodes: 1, pods_per_node: 5, ..Topology::default() }, flags);
        // No endpoint: what comes back from one of its addresses to another has itself as its source.
        let (node, pod) = (cluster.lab.node(1), cluster.lab.pod(1, 5));
        cluster.relabel(1, 5, "parked");
        thread::sleep(Duration::from_millis(200));
        // By chance all of twelve would have one of four endpoints once in 4^11 runs.
        let others: Vec<[IpAddr; 2]> = (0..TIMES as u8)
            .map(|i| [[10, 244, 1, 100 + i].into(), [0xfd00, 0x10, 0x244, 1, 0, 0, 1, u16::from(i)].into()])
            .collect();
        for address in others.iter().flatten() {
            let length = if address.is_ipv4() { 32 } else { 128 };
            pod.netns.ip(&[format!("address add {address}/{length} dev eth0 nodad")]).unwrap();
            node.netns.ip(&[format!("route add {address}/{length} dev {}", pod.host_device)]).unwrap();
        }
        let client = cluster.lab.client(pod);
        for family in [0, 1] {
            let asked = |own: &[IpAddr; 2]| -> BTreeSet<String> {
                let source = SocketAddr::new(own[family], 0);
                let ways = PROTOCOLS.into_iter().flat_map(|protocol| ways("p1-5").iter().map(move |by| (protocol, by)));
                ways.map(|(protocol, by)| {
                    let to = by.addresses(10)[family];
                    // TCP and UDP are two Service ports.
                    let kind = if protocol == Protocol::Tcp { "TCP" } else { "UDP" };
                    let answer = client.ask_from(protocol, source, to);
                    format!(
                        "{kind} {}",
                        answer.unwrap_or_else(|error| panic!("{protocol:?} {source} {to}: {error}")).by
                    )
                })
                .collect()
            };
            let each: Vec<BTreeSet<String>> = others.iter().map(asked).collect();
            assert!(each.iter().all(|answers| answers.len() == 2), "{flags:?}: {each:?}");
            let all: BTreeSet<&String> = each.iter().flatten().collect();
            assert!(all.len() > 3, "{flags:?}: clients of their own: {all:?}");
            assert_eq!(others.iter().map(asked).collect::<Vec<_>>(), each, "{flags:?}");
        }
    }
}
