//! A node where kube-proxy was at work: its connections go on, and new ones are ours.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use tests::cluster::{By, Cluster, TARGET, addressed, one_service_a_kind};
use tests::command;
use tests::kube_proxy::{self, CLUSTER_CIDR};
use tests::lab::Node;
use tests::manifest::{PodObject, Service, node_object};
use tests::topology::{Wiring, gateway_v4, gateway_v6};
use tests::traffic::client::{ask_datagram, ask_on, echo_on};
use tests::traffic::socket::connect_tcp;
use tests::{Agent, Client, ControlPlane, KubeProxy, Lab, Protocol, Topology};

/// DNAT of connections as kube-proxy's rules do it.
fn translate(lab: &Lab, rules: &[(SocketAddr, SocketAddr)]) {
    let lines: Vec<String> = rules
        .iter()
        .map(|(from, to)| {
            let family = if from.is_ipv4() { "ip" } else { "ip6" };
            format!("{family} daddr {} tcp dport {} dnat {family} to {to}", from.ip(), from.port())
        })
        .collect();
    let text = format!(
        "table inet kube-proxy {{\n chain prerouting {{\n type nat hook prerouting priority dstnat;\n{}\n }}\n}}\n",
        lines.join("\n")
    );
    let netns = &lab.node(1).netns;
    command::run_with_input("ip", &["netns", "exec", netns.name(), "nft", "-f", "-"], &text).unwrap();
}

#[test]
fn connections_that_are_older_than_the_first_start_go_on_and_new_ones_are_ours() {
    let lab = Lab::new(Topology { cni_rules: true, ..Topology::default() });
    let _servers: Vec<_> = lab.pods().map(|pod| lab.serve(pod, TARGET)).collect();
    let old_endpoint = lab.pod(1, 2);
    let old = [SocketAddr::from((old_endpoint.v4, TARGET)), SocketAddr::from((old_endpoint.v6, TARGET))];
    // 12 has another endpoint in our tables, 20 none.
    let mut rules = Vec::new();
    for number in [12, 20] {
        for by in [By::ClusterIp, By::NodePort(1), By::LoadBalancer] {
            rules.extend(by.addresses(number).into_iter().zip(old));
        }
    }
    translate(&lab, &rules);
    let client = lab.client(lab.pod(1, 1));
    let mut streams: Vec<_> = rules.iter().map(|(to, _)| (*to, client.connect(*to).unwrap())).collect();
    for (to, stream) in &mut streams {
        assert_eq!(ask_on(stream).unwrap().by, old_endpoint.name, "{to}");
    }

    lab.manifests().write_list("nodes.json", lab.nodes.iter().map(node_object));
    one_service_a_kind(&lab);
    lab.manifests().write("empty.json", addressed(Service::new("empty").selector("app", "nobody"), 20));
    let mut agent = Agent::start(&lab, lab.node(1), &[]);
    for what in ["after the first start", "after another start"] {
        let mut wrong = Vec::new();
        for (to, stream) in &mut streams {
            if let Err(error) = echo_on(stream, 3000, 7) {
                wrong.push(format!("{to}: {error}"));
            }
        }
        assert!(wrong.is_empty(), "{what}: {} of {} wrong:\n{}", wrong.len(), streams.len(), wrong.join("\n"));
        for by in [By::ClusterIp, By::NodePort(1), By::LoadBalancer] {
            for to in by.addresses(12) {
                assert_eq!(client.ask(Protocol::Tcp, to).unwrap().by, "p2-1", "{what}: {to}");
            }
            for to in by.addresses(20) {
                assert!(client.ask(Protocol::Tcp, to).is_err(), "{what}: {to}");
            }
        }
        agent.kill();
        agent.restart();
    }
}

#[test]
fn the_masquerade_ports_are_reserved_while_an_agent_is_there_and_what_was_reserved_stays() {
    const KEY: &str = "net/ipv4/ip_local_reserved_ports";
    let lab = Lab::new(Topology::default());
    let netns = &lab.node(1).netns;
    // The kernel answers only the first read(2), for which `fs::read_to_string` has 32 bytes.
    let reserved = || netns.exec("cat", &[&format!("/proc/sys/{KEY}")]).unwrap().trim().to_owned();
    for (before, with_default, with_other) in [
        ("", "61000-65095", "50000-50127"),
        ("8080,61500,65000-65535", "8080,61000-65535", "8080,50000-50127,61500,65000-65535"),
    ] {
        netns.set_sysctls(&[(KEY, &format!("{before}\n"))]).unwrap();
        let mut agent = Agent::start(&lab, lab.node(1), &[]);
        assert_eq!(reserved(), with_default);
        agent.terminate();
        let mut other = Agent::start(&lab, lab.node(1), &["--masquerade-ports", "50000-50127"]);
        assert_eq!(reserved(), with_other);
        other.kill();
        agent.restart();
        assert_eq!(reserved(), with_default);
        agent.terminate();
        assert_eq!(reserved(), with_default, "the data plane goes on");
        agent.cleanup();
        assert_eq!(reserved(), before);
    }
}

#[test]
fn a_masquerade_port_that_the_node_itself_uses_towards_the_endpoint_is_not_taken() {
    // A range of few ports: without a look at who has them, half of the connections would take one of the node's.
    let cluster = Cluster::new(Topology::default(), &["--masquerade-ports", "61000-61031"], one_service_a_kind);
    let lab = &cluster.lab;
    let (node, pod) = (lab.node(1), lab.pod(2, 1));
    for (own, endpoint, to) in [
        (IpAddr::from(node.v4()), IpAddr::from(pod.v4), By::NodePort(1).addresses(12)[0]),
        (node.v6().into(), pod.v6.into(), By::NodePort(1).addresses(12)[1]),
    ] {
        let timeout = Duration::from_millis(500);
        let mut streams: Vec<TcpStream> = (61_000..61_016)
            .map(|port| {
                let from = Some(SocketAddr::new(own, port));
                node.netns.run(|| connect_tcp(from, (endpoint, TARGET).into(), timeout)).unwrap()
            })
            .collect();
        let outside = lab.outside_client();
        for _ in 0..12 {
            let mut stream = outside.connect(to).unwrap();
            let answer = ask_on(&mut stream).unwrap();
            assert!(!(61_000..61_016).contains(&answer.from.port()), "{to}: it came from {}", answer.from);
        }
        for stream in &mut streams {
            echo_on(stream, 100, 7).unwrap();
        }
    }
}

/// netfilter masquerades what these sources send to endpoints by the ports that are ours, of which it knows nothing.
fn masquerade_by_netfilter(node: &Node, sources: &[IpAddr], ports: &str) {
    let rules: Vec<String> = sources
        .iter()
        .map(|source| {
            let family = if source.is_ipv4() { "ip" } else { "ip6" };
            format!("{family} saddr {source} meta l4proto {{ tcp, udp }} th dport {TARGET} masquerade to :{ports}")
        })
        .collect();
    let table = format!(
        "table inet other {{\n chain postrouting {{\n type nat hook postrouting priority srcnat\n{}\n }}\n}}\n",
        rules.join("\n")
    );
    command::run_with_input("ip", &["netns", "exec", node.netns.name(), "nft", "-f", "-"], &table).unwrap();
}

#[test]
fn who_comes_second_to_a_masquerade_port_gets_another_and_both_get_their_answers() {
    const PORTS: &str = "61000-61031";
    for wiring in [Wiring::Ptp, Wiring::Bridge { hairpin_mode: false, netfilter: false }] {
        let topology = Topology { wiring, ..Topology::default() };
        let cluster = Cluster::new(topology, &["--masquerade-ports", PORTS], one_service_a_kind);
        let lab = &cluster.lab;
        let (node, pod) = (lab.node(1), lab.pod(1, 2));
        let gateways = [IpAddr::from(gateway_v4(1)), gateway_v6(1).into()];
        let own = [pod.v4.into(), pod.v6.into(), node.v4().into(), node.v6().into()];
        masquerade_by_netfilter(node, &[&own[..], &gateways].concat(), PORTS);
        let (outside, inside, host) = (lab.outside_client(), lab.client(pod), lab.host_client(node));
        // An endpoint elsewhere, and one of the node, which the host alone reaches by netfilter where both are on a bridge.
        for (number, endpoint, others) in [(12, lab.pod(2, 1), [&inside, &host]), (11, lab.pod(1, 1), [&host, &host])] {
            for (to, addr) in
                By::NodePort(1).addresses(number).into_iter().zip([endpoint.v4.into(), endpoint.v6.into()])
            {
                let endpoint = SocketAddr::new(addr, TARGET);
                share_ports(&outside, to, others, endpoint);
                let flows = cluster.agents[0].cli_json(&["flows"]);
                let flows = flows.as_array().into_iter().flatten();
                let second =
                    flows.filter(|flow| flow["name"] == "(straight)" && flow["endpoint"] == endpoint.to_string());
                assert!(second.count() > 0, "{wiring:?}, {endpoint}: none came second");
            }
        }
    }
}

/// Connections by a Service that masquerades, and as many straight to its endpoint that others have masqueraded.
fn share_ports(ours: &Client, to: SocketAddr, others: [&Client; 2], endpoint: SocketAddr) {
    let mut streams: Vec<TcpStream> = (0..16).map(|_| ours.connect(to).unwrap()).collect();
    let taken: BTreeSet<u16> = streams.iter_mut().map(|stream| ask_on(stream).unwrap().from.port()).collect();
    assert_eq!(taken.len(), 16, "{to}: {taken:?}");
    for i in 0..16 {
        let mut stream = others[i % 2].connect(endpoint).unwrap_or_else(|error| panic!("{endpoint}, {i}: {error}"));
        let from = ask_on(&mut stream).unwrap().from.port();
        assert!(!taken.contains(&from), "{endpoint}, {i}: {from} of {taken:?}");
        streams.push(stream);
    }
    for stream in &mut streams {
        echo_on(stream, 3000, 7).unwrap();
    }
    let mut sockets: Vec<_> = (0..8).map(|_| (to, ours.udp(to).unwrap())).collect();
    sockets.extend((0..16).map(|i| (endpoint, others[i % 2].udp(endpoint).unwrap())));
    for round in 0..3 {
        for (i, (to, socket)) in sockets.iter().enumerate() {
            ask_datagram(socket, *to).unwrap_or_else(|error| panic!("{to}, {i}, round {round}: {error}"));
        }
    }
}

/// A way by which connections come to an endpoint.
struct Way {
    name: &'static str,
    client: Client,
    by: By,
    number: u16,
    /// Whether the endpoint sees another address than the client's; `None` where both are the node's.
    masqueraded: Option<bool>,
}

/// Both families of each, and that often: 200 connections.
const EACH: usize = 10;

fn ways(lab: &Lab) -> [Way; 10] {
    let (own, other) = (lab.client(lab.pod(1, 1)), lab.client(lab.pod(1, 2)));
    let (node, outside) = (lab.host_client(lab.node(1)), lab.outside_client());
    [
        ("pod, ClusterIP, endpoint elsewhere", &other, By::ClusterIp, 12, Some(false)),
        ("pod, ClusterIP, endpoint beside it", &other, By::ClusterIp, 11, Some(false)),
        ("pod, ClusterIP, the pod itself", &own, By::ClusterIp, 11, Some(true)),
        ("pod, NodePort", &other, By::NodePort(1), 12, Some(true)),
        ("outside, NodePort, endpoint elsewhere", &outside, By::NodePort(1), 12, Some(true)),
        ("outside, NodePort, endpoint on the node", &outside, By::NodePort(1), 11, Some(true)),
        ("outside, NodePort, policy Local", &outside, By::NodePort(1), 16, Some(false)),
        ("outside, LoadBalancer", &outside, By::LoadBalancer, 12, Some(true)),
        ("outside, LoadBalancer, policy Local", &outside, By::LoadBalancer, 16, Some(false)),
        ("node, ClusterIP", &node, By::ClusterIp, 12, None),
    ]
    .map(|(name, client, by, number, masqueraded)| Way { name, client: client.clone(), by, number, masqueraded })
}

/// Connections by every way, each of which has carried something and is as the way says.
fn open_all(ways: &[Way]) -> Vec<(&'static str, TcpStream)> {
    let mut streams = Vec::new();
    for way in ways {
        for to in way.by.addresses(way.number) {
            for _ in 0..EACH {
                let mut stream = way.client.connect(to).unwrap_or_else(|error| panic!("{} {to}: {error}", way.name));
                let answer = ask_on(&mut stream).unwrap_or_else(|error| panic!("{} {to}: {error}", way.name));
                assert_eq!(answer.by, if way.number == 12 { "p2-1" } else { "p1-1" }, "{} {to}", way.name);
                if let Some(masqueraded) = way.masqueraded {
                    let own = answer.from.ip() == stream.local_addr().unwrap().ip();
                    assert_eq!(!own, masqueraded, "{} {to}: seen as {}", way.name, answer.from);
                }
                streams.push((way.name, stream));
            }
        }
    }
    streams
}

/// How many connections of each way carry nothing any more.
fn broken(streams: &mut [(&'static str, TcpStream)]) -> BTreeMap<&'static str, usize> {
    let results: Vec<(&'static str, bool)> = thread::scope(|scope| {
        let workers: Vec<_> = streams
            .iter_mut()
            .map(|(name, stream)| scope.spawn(|| (*name, echo_on(stream, 3000, 7).is_ok())))
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let mut broken = BTreeMap::new();
    for (name, _) in results.into_iter().filter(|(_, good)| !good) {
        *broken.entry(name).or_insert(0) += 1;
    }
    broken
}

/// What kubelet and network plugins write, some of it by names that kube-proxy's resemble.
fn plant_rules_of_others(node: &Node) {
    let text = "*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*nat
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-HOSTPORTS - [0:0]
:KUBE-SERVICES-OF-ANOTHER - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 9 -m comment --comment KUBE-SVC-LOOKALIKE -j RETURN
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-NWPLCY-ABCDEF - [0:0]
:KUBE-POD-FW-ABCDEF - [0:0]
:KUBE-ROUTER-FORWARD - [0:0]
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment \"kube-router netpol - 4IA2OSFRMVNDXBVV\" -j KUBE-ROUTER-FORWARD
-A KUBE-ROUTER-FORWARD -m comment --comment \"to KUBE-POD-FW-ABCDEF\" -j KUBE-POD-FW-ABCDEF
-A KUBE-POD-FW-ABCDEF -j KUBE-NWPLCY-ABCDEF
COMMIT
";
    // kubelet's rule, which kube-proxy writes too, and leaves.
    let localnet = "*filter
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" \\
  -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
COMMIT
"
    .replace(" \\\n ", "");
    for (program, text) in [("iptables-restore", text), ("ip6tables-restore", text), ("iptables-restore", &localnet)] {
        command::run_with_input("ip", &["netns", "exec", node.netns.name(), program, "--noflush"], text).unwrap();
    }
    let table =
        "table inet kube-proxy-of-another {\n chain services {\n }\n}\ntable ip kube-router {\n chain x {\n }\n}\n";
    command::run_with_input("ip", &["netns", "exec", node.netns.name(), "nft", "-f", "-"], table).unwrap();
}

/// Waits until a node has these chains and rules, and no others.
fn wait_for_rules(node: &Node, want: &BTreeSet<String>, when: &str) {
    let start = Instant::now();
    loop {
        let rules = kube_proxy::chains_and_rules(node).unwrap();
        if rules == *want {
            return;
        }
        let [gone, more] = [want.difference(&rules), rules.difference(want)].map(|rules| rules.collect::<Vec<_>>());
        assert!(start.elapsed() < Duration::from_secs(10), "{when}: gone: {gone:#?}\nmore: {more:#?}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// kube-proxy → Fairlead → kube-proxy, as `docs/install.md` says it.
fn there_and_back(mode: &str) {
    let lab = Lab::new(Topology { cni_rules: true, ..Topology::default() });
    let _servers: Vec<_> = lab.pods().map(|pod| lab.serve(pod, TARGET)).collect();
    let plane = ControlPlane::start(&lab);
    let api = plane.api();
    for (number, app) in [(11, "p1-1"), (12, "p2-1"), (16, "p1-1")] {
        let policy = if number == 16 { "Local" } else { "Cluster" };
        let service = Service::new(&format!("s{number}")).selector("app", app).spec("externalTrafficPolicy", policy);
        api.put(addressed(service, number));
    }
    for pod in lab.pods() {
        api.put(PodObject::of(pod).label("app", &pod.name));
    }
    api.until("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", |list| {
        let slices = list["items"].as_array().into_iter().flatten();
        slices.filter(|slice| slice["endpoints"][0]["conditions"]["ready"] == true).count() >= 6
    });
    let node = lab.node(1);
    let addresses = [11, 12, 16].map(|number| By::LoadBalancer.addresses(number).map(|to| to.ip().to_string()));
    let addresses: Vec<&str> = addresses.iter().flatten().map(String::as_str).collect();
    let ways = ways(&lab);

    plant_rules_of_others(node);
    let of_others = kube_proxy::chains_and_rules(node).unwrap();
    assert!(of_others.len() > 30, "{of_others:#?}");
    let kubeconfig = plane.kubeconfig("proxy");
    let first = KubeProxy::start(&lab, node, &kubeconfig, mode).unwrap();
    first.wait_written(node, &addresses).unwrap();
    let mut of_kube_proxy = open_all(&ways);
    assert_eq!(of_kube_proxy.len(), 200);
    drop(first);

    let proxy_mode = format!("--proxy-mode={mode}");
    let cidr = format!("--cluster-cidr={CLUSTER_CIDR}");
    let flags = [&*proxy_mode, &*cidr, "--detect-local-mode=ClusterCIDR"];
    let mut agent = Agent::start_on_api_server(&lab, node, &kubeconfig, &flags);
    wait_for_rules(node, &of_others, "once Fairlead is there");
    assert_eq!(broken(&mut of_kube_proxy), BTreeMap::new(), "kube-proxy's, once Fairlead is there");
    let mut of_fairlead = open_all(&ways);

    agent.terminate();
    let second = KubeProxy::start(&lab, node, &kubeconfig, mode).unwrap();
    second.wait_written(node, &addresses).unwrap();
    assert_eq!(broken(&mut of_fairlead), BTreeMap::new(), "Fairlead's, while its data plane is there");
    assert_eq!(broken(&mut of_kube_proxy), BTreeMap::new(), "kube-proxy's, while Fairlead's data plane is there");
    let output = agent.cli(&["drain"]);
    assert!(output.status.success(), "fairlead drain: {}", String::from_utf8_lossy(&output.stderr));
    let mut of_second = open_all(&ways);
    for (whose, streams) in
        [("Fairlead's", &mut of_fairlead), ("kube-proxy's", &mut of_kube_proxy), ("the second's", &mut of_second)]
    {
        assert_eq!(broken(streams), BTreeMap::new(), "{whose}, once drained");
    }
    let flows = agent.cli_json(&["flows"]);
    let flows = flows.as_array().into_iter().flatten();
    // kube-proxy's masquerading takes any port, one of ours to the same endpoint once in about 25 runs.
    let (straight, own): (Vec<_>, Vec<_>) = flows.partition(|flow| flow["name"] == "(straight)");
    assert_eq!(own.len(), 180, "Fairlead's own, without those of the node's sockets, and no others");
    agent.cleanup();
    assert_eq!(broken(&mut of_kube_proxy), BTreeMap::new(), "kube-proxy's, once Fairlead is gone");
    let lost = broken(&mut of_second);
    assert_eq!(lost.values().sum::<usize>(), straight.len(), "the second's, once Fairlead is gone: {lost:?}");
    // As docs/install.md says: whoever doesn't wait loses the connections of pods and of clients outside.
    let lost: BTreeMap<_, _> = ways.iter().filter(|way| way.masqueraded.is_some()).map(|way| (way.name, 20)).collect();
    assert_eq!(broken(&mut of_fairlead), lost, "Fairlead's, once it is gone");
    let _ = open_all(&ways);

    drop(second);
    assert!(kube_proxy::chains_and_rules(node).unwrap().len() > of_others.len(), "what kube-proxy left");
    let output = agent.cli(&["--cleanup"]);
    assert!(output.status.success(), "fairlead --cleanup: {}", String::from_utf8_lossy(&output.stderr));
    wait_for_rules(node, &of_others, "after --cleanup");
}

#[test]
fn what_kube_proxy_in_iptables_mode_connected_goes_on_there_and_back() {
    there_and_back("iptables");
}

#[test]
fn what_kube_proxy_in_nftables_mode_connected_goes_on_there_and_back() {
    there_and_back("nftables");
}
