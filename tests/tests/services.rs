//! Services, with an agent on each node and real sockets: every client reaches every endpoint by every address, and what is no
//! endpoint any more gets nothing.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tests::cluster::{By, Cluster, KINDS, TARGET, clients, one_service_a_kind, own_addresses, refused};
use tests::manifest::{PodObject, Service};
use tests::traffic::client::{ask_datagram, ask_on, echo_on, upload};
use tests::{Agent, Answer, Client, Protocol, Topology, Wiring};

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::UdpUnconnected];

/// How soon a change has to be effective; far above what it takes, so that a busy machine fails nothing.
const SOON: Duration = Duration::from_secs(3);

/// Asks for every pair of client and endpoint, by every address, and lists what went wrong. `udp_port`: from this port all datagrams come.
fn everyone_asks_everyone(cluster: &Cluster, pods_at_the_socket: bool, udp_port: Option<u16>) -> Vec<String> {
    let lab = &cluster.lab;
    let mut wrong = Vec::new();
    for (name, client) in clients(lab) {
        let client = client.with_timeout(Duration::from_millis(500));
        for (number, endpoint) in KINDS {
            for by in By::ALL {
                if name == "outside" && by == By::ClusterIp {
                    continue;
                }
                for (family, to) in by.addresses(number).into_iter().enumerate() {
                    for protocol in PROTOCOLS {
                        let what = format!("{name} asks {endpoint} by {by:?}, {protocol:?} {to}");
                        let answer = match udp_port {
                            Some(port) if protocol != Protocol::Tcp => {
                                client.ask_from(protocol, unspecified(to, port), to)
                            }
                            _ => client.ask(protocol, to),
                        };
                        match answer {
                            Err(error) => wrong.push(format!("{what}: {error}")),
                            Ok(answer) if answer.by != endpoint => wrong.push(format!("{what}: {} answers", answer.by)),
                            Ok(answer) => {
                                let kept = answer.from.ip() == own_addresses(lab, &name)[family];
                                // A pod that reaches itself through its Service is masqueraded, unless no packet leaves it.
                                let expected = name != endpoint || pods_at_the_socket;
                                // To other addresses the CNI masquerades.
                                let inside =
                                    endpoint.starts_with('p') || !lab.topology().cni_rules && endpoint != "outside";
                                let pods = name.starts_with('p') && inside;
                                if by == By::ClusterIp && pods && kept != expected {
                                    wrong.push(format!("{what}: seen as {}", answer.from));
                                }
                                if by != By::ClusterIp
                                    && name == "outside"
                                    && endpoint.starts_with('p')
                                    && kept
                                    && !pods_at_the_socket
                                {
                                    wrong.push(format!("{what}: not masqueraded"));
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    wrong
}

/// Sends a datagram that is longer than a packet, and gets it back from there. A fragment may overtake the first, and is lost then:
/// some tries are made.
fn echo_in_fragments(socket: &UdpSocket, to: SocketAddr) -> io::Result<()> {
    let mut tries = 5;
    loop {
        socket.send_to(&[7; 4000], to)?;
        let mut echo = [0; 4096];
        match socket.recv_from(&mut echo) {
            Ok((length, from)) => {
                assert_eq!((length, from), (4000, to));
                return Ok(());
            }
            Err(error) if tries == 0 => return Err(error),
            Err(_) => tries -= 1,
        }
    }
}

/// Any address of that family.
fn unspecified(family: SocketAddr, port: u16) -> SocketAddr {
    let any: IpAddr = if family.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(any, port)
}

fn assert_everyone_reaches_everyone(topology: &Topology, flags: &[&str]) {
    let cluster = Cluster::new(topology.clone(), flags, one_service_a_kind);
    let pods_at_the_socket = flags.contains(&"all");
    let mut wrong = everyone_asks_everyone(&cluster, pods_at_the_socket, None);
    // Within the time that a flow of UDP is remembered, also where what one asks through a Service is asked straight by another behind
    // the same address.
    wrong.extend(everyone_asks_everyone(&cluster, pods_at_the_socket, Some(40_000)));
    let packets =
        || cluster.agents.iter().map(|agent| agent.cli_json(&["status"])["packets"].to_string()).collect::<Vec<_>>();
    assert!(
        wrong.is_empty(),
        "{topology:?} {flags:?}: {} wrong:\n{}\n{}",
        wrong.len(),
        wrong.join("\n"),
        packets().join("\n")
    );
    if topology.cni_rules {
        for node in &cluster.lab.nodes {
            assert_eq!(cluster.lab.cni_counter(node, "invalid"), 0, "INVALID packets on {}: {topology:?}", node.name);
        }
    }
}

#[test]
fn everyone_reaches_every_endpoint_over_ptp_veths() {
    for cni_rules in [false, true] {
        assert_everyone_reaches_everyone(&Topology { cni_rules, ..Topology::default() }, &[]);
    }
}

#[test]
fn everyone_reaches_every_endpoint_over_clsact() {
    let topology = Topology { cni_rules: true, ..Topology::default() };
    assert_everyone_reaches_everyone(&topology, &["--attach", "clsact"]);
}

#[test]
fn everyone_reaches_every_endpoint_over_a_bridge() {
    for netfilter in [false, true] {
        for hairpin_mode in [false, true] {
            let wiring = Wiring::Bridge { hairpin_mode, netfilter };
            assert_everyone_reaches_everyone(&Topology { wiring, cni_rules: true, ..Topology::default() }, &[]);
        }
    }
}

#[test]
fn everyone_reaches_every_endpoint_with_pods_translated_at_the_socket() {
    let topology = Topology { cni_rules: true, ..Topology::default() };
    assert_everyone_reaches_everyone(&topology, &["--socket-lb", "all"]);
}

#[test]
fn one_client_port_reaches_an_endpoint_through_services_and_straight_at_once() {
    for wiring in [Wiring::Ptp, Wiring::Bridge { hairpin_mode: false, netfilter: true }] {
        let cluster =
            Cluster::new(Topology { wiring, cni_rules: true, ..Topology::default() }, &[], one_service_a_kind);
        let lab = &cluster.lab;
        lab.route_pods_from_switch().unwrap();
        let cases = [
            (lab.client(lab.pod(1, 1)), By::ClusterIp, 12, "p2-1", None),
            (lab.client(lab.pod(1, 2)), By::ClusterIp, 14, "node2", None),
            (lab.client(lab.pod(2, 2)), By::LoadBalancer, 11, "p1-1", None),
            (lab.host_client(lab.node(1)), By::NodePort(2), 12, "p2-1", None),
            (lab.host_client(lab.node(2)), By::NodePort(1), 13, "node1", None),
            // What its own node translates is straight for the endpoint's.
            (lab.client(lab.pod(1, 1)), By::NodePort(2), 14, "node2", Some(By::ClusterIp)),
            (lab.client(lab.pod(2, 1)), By::NodePort(1), 13, "node1", Some(By::LoadBalancer)),
        ];
        for (source_port, (client, by, number, endpoint, second)) in (40_000..).zip(cases) {
            for (family, through) in by.addresses(number).into_iter().enumerate() {
                let client = client.clone().with_timeout(Duration::from_secs(1));
                let straight = second.map_or_else(
                    || SocketAddr::new(own_addresses(lab, endpoint)[family], TARGET),
                    |by| by.addresses(number)[family],
                );
                let source = unspecified(through, source_port);
                let what = format!("{wiring:?} {} to {through} and {straight}", client.netns().name());
                let mut streams: Vec<_> = [through, straight]
                    .into_iter()
                    .map(|to| client.connect_from(source, to).unwrap_or_else(|error| panic!("{what}: {to}: {error}")))
                    .collect();
                for round in 0..3 {
                    for stream in &mut streams {
                        assert_eq!(ask_on(stream).unwrap().by, endpoint, "{what}");
                        echo_on(stream, 100_000, round).unwrap_or_else(|error| panic!("{what}: {error}"));
                    }
                }
                drop(streams);
                let socket = client.udp_from(source, through).unwrap_or_else(|error| panic!("{what}: {error}"));
                for to in [through, straight, through, straight] {
                    let answer = ask_datagram(&socket, to).unwrap_or_else(|error| panic!("{what}: {error}"));
                    assert_eq!(answer.by, endpoint, "{what}");
                    echo_in_fragments(&socket, to).unwrap_or_else(|error| panic!("{what}: in fragments: {error}"));
                }
            }
        }
        for node in &lab.nodes {
            assert_eq!(lab.cni_counter(node, "invalid"), 0, "INVALID packets on {}: {wiring:?}", node.name);
        }
    }
}

/// Waits until exactly these answer, to everyone who may ask, over every protocol.
fn expect_answers(cluster: &Cluster, to: &[SocketAddr], by_outside: bool, expected: &BTreeSet<String>) {
    for (name, client) in clients(&cluster.lab).into_iter().filter(|(name, _)| by_outside || name != "outside") {
        for (to, protocol) in to.iter().flat_map(|to| PROTOCOLS.map(|protocol| (*to, protocol))) {
            let start = Instant::now();
            loop {
                let tally = client.tally(protocol, to, 80);
                if tally.as_ref().is_ok_and(|tally| tally.keys().eq(expected)) {
                    break;
                }
                assert!(start.elapsed() < SOON, "{name} asks {to}, {protocol:?}: {tally:?} instead of {expected:?}");
            }
        }
    }
}

const fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp | Protocol::UdpUnconnected => "udp",
    }
}

#[test]
fn node_ports_follow_the_addresses_of_a_running_agents_node() {
    let cluster = Cluster::web(Topology::default(), &["--nodeport-addresses", "0.0.0.0/0,::/0"]);
    let lab = &cluster.lab;
    let client = lab.outside_client().with_timeout(Duration::from_millis(300));
    let change = |verb: &str, address: &str| {
        lab.node(1).netns.ip(&[format!("address {verb} {address} dev eth0")]).unwrap();
    };
    for (address, to) in [("10.99.0.77/24", "10.99.0.77:30010"), ("fd00:99::77/64", "[fd00:99::77]:30010")] {
        let to: SocketAddr = to.parse().unwrap();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            assert!(client.ask(protocol, to).is_err(), "{protocol:?} {to} is nobody's yet");
        }
        for _ in 0..2 {
            change("add", address);
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                client
                    .ask_until(protocol, to, SOON, Result::is_ok)
                    .unwrap_or_else(|error| panic!("{protocol:?} {to}: {error}"));
            }
            change("delete", address);
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                client
                    .ask_until(protocol, to, SOON, Result::is_err)
                    .unwrap_or_else(|error| panic!("{protocol:?} {to} is nobody's again: {error}"));
                let question = ["explain", protocol_name(protocol), "10.99.0.200", &to.to_string()];
                let start = Instant::now();
                while cluster.agents[0].cli_json(&question)["verdict"] != "pass" {
                    assert!(start.elapsed() < SOON, "{to}: {}", cluster.agents[0].cli_json(&question));
                }
            }
        }
    }
}

#[test]
fn every_endpoint_answers_everyone_by_an_external_address() {
    // The network brings them to node 1, as it does LoadBalancer addresses.
    let addresses: [IpAddr; 2] = [Ipv4Addr::new(10, 99, 1, 150).into(), "fd00:99:1::150".parse().unwrap()];
    let cluster = Cluster::new(Topology::default(), &[], |lab| {
        let service = Service::new("external").selector("app", "web").dual_stack(50);
        let service = service.port("tcp", "TCP", 80, TARGET).port("udp", "UDP", 80, TARGET).external_ips(&addresses);
        lab.manifests().write("external.json", service);
        lab.manifests().write_list("pods.json", lab.pods().map(|pod| PodObject::of(pod).label("app", "web")));
    });
    let pods = cluster.lab.pods().map(|pod| pod.name.clone()).collect();
    expect_answers(&cluster, &addresses.map(|address| SocketAddr::new(address, 80)), true, &pods);
}

#[test]
fn endpoints_that_are_about_to_go_are_asked_only_where_no_other_is_left() {
    let cluster = Cluster::web(Topology::default(), &[]);
    let names: Vec<String> = cluster.lab.pods().map(|pod| pod.name.clone()).collect();
    for going in [1, names.len()] {
        for pod in cluster.lab.pods().take(going) {
            let object = PodObject::of(pod).label("app", "web").terminating();
            cluster.lab.manifests().write(&format!("pod-{}.json", pod.name), object);
        }
        let expected = if going == names.len() { &names[..] } else { &names[going..] };
        let expected = expected.iter().cloned().collect();
        expect_answers(&cluster, &By::ClusterIp.addresses(10), false, &expected);
        expect_answers(&cluster, &By::NodePort(2).addresses(10), true, &expected);
    }
}

#[test]
fn all_endpoints_of_a_service_get_their_share() {
    let cluster = Cluster::web(Topology::default(), &[]);
    for (name, client) in clients(&cluster.lab) {
        let by = if name == "outside" { By::LoadBalancer } else { By::ClusterIp };
        for to in by.addresses(10) {
            for protocol in PROTOCOLS {
                let tally =
                    client.tally(protocol, to, 200).unwrap_or_else(|error| panic!("{name} {protocol:?} {to}: {error}"));
                let least = tally.values().min().copied().unwrap_or(0);
                // 50 expected; below 20 once in a million runs.
                assert!(tally.len() == 4 && least >= 20, "{name} {protocol:?} {to}: {tally:?}");
            }
        }
    }
}

#[test]
fn a_pod_without_the_label_gets_no_new_connection_and_keeps_its_old_ones() {
    let cluster = Cluster::web(Topology { cni_rules: true, ..Topology::default() }, &[]);
    let lab = &cluster.lab;
    for (name, client) in clients(lab) {
        let by = if name == "outside" { By::NodePort(1) } else { By::ClusterIp };
        let to = by.addresses(10)[0];
        let mut held: Vec<_> = (0..40).map(|_| client.connect(to).unwrap()).collect();
        let before: Vec<Answer> = held.iter_mut().map(|stream| ask_on(stream).unwrap()).collect();
        cluster.relabel(2, 1, "parked");
        thread::sleep(Duration::from_millis(100));
        let tally = client.tally(Protocol::Tcp, to, 60).unwrap();
        assert!(!tally.contains_key("p2-1"), "{name}: {tally:?}");
        for (stream, before) in held.iter_mut().zip(&before) {
            assert_eq!(&ask_on(stream).unwrap(), before, "{name}: a connection moved");
            echo_on(stream, 64 * 1024, 1).unwrap();
        }
        cluster.relabel(2, 1, "web");
        client
            .ask_until(Protocol::Tcp, to, SOON, |answer| answer.as_ref().is_ok_and(|answer| answer.by == "p2-1"))
            .unwrap_or_else(|error| panic!("{name}: p2-1 does not come back: {error}"));
    }
}

#[test]
fn a_service_without_endpoints_refuses_everyone_at_once() {
    let cluster = Cluster::web(Topology { cni_rules: true, ..Topology::default() }, &[]);
    cluster.relabel_all("parked");
    let mut wrong = Vec::new();
    for (name, client) in clients(&cluster.lab) {
        for by in By::ALL {
            if name == "outside" && by == By::ClusterIp {
                continue;
            }
            for to in by.addresses(10) {
                for protocol in PROTOCOLS {
                    let what = format!("{name} by {by:?}, {protocol:?} {to}");
                    if let Err(error) = client.ask_until(protocol, to, Duration::from_millis(500), refused) {
                        wrong.push(format!("{what}: {error}"));
                        continue;
                    }
                    let (took, _) = client.ask_timed(protocol, to);
                    if took > Duration::from_millis(100) {
                        wrong.push(format!("{what}: refused after {took:?} only"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_udp_client_follows_when_its_endpoint_goes_and_when_endpoints_come() {
    let cluster = Cluster::web(Topology::default(), &[]);
    let lab = &cluster.lab;
    for (name, client) in clients(lab) {
        let by = if name == "outside" { By::NodePort(1) } else { By::ClusterIp };
        for to in by.addresses(10) {
            // Unconnected, so that it is one socket to its end whatever errors come back.
            let client = client.clone().with_timeout(Duration::from_millis(50));
            let socket = client.udp(to).unwrap();
            // This node's agent may hear later than others that the endpoints of the last turn are back.
            let start = Instant::now();
            let first = loop {
                match ask_datagram(&socket, to) {
                    Ok(answer) => break answer.by,
                    Err(error) => assert!(start.elapsed() < SOON, "{name} {to}: {error}"),
                }
            };
            let (node, pod) = first[1..].split_once('-').unwrap();
            let (node, pod) = (node.parse().unwrap(), pod.parse().unwrap());
            let until = |what: &str, wanted: &dyn Fn(&str) -> bool| {
                let start = Instant::now();
                loop {
                    match ask_datagram(&socket, to) {
                        Ok(answer) if wanted(&answer.by) => return,
                        last => assert!(start.elapsed() < SOON, "{name} {to}: {what}: {last:?}"),
                    }
                }
            };
            cluster.relabel(node, pod, "parked");
            until("its endpoint went", &|by| by != first);
            cluster.relabel_all("parked");
            client.ask_until(Protocol::Udp, to, SOON, refused).unwrap();
            let _ = ask_datagram(&socket, to);
            cluster.relabel_all("web");
            until("endpoints came", &|_| true);
        }
    }
}

#[test]
fn streams_of_a_gigabyte_and_requests_of_64_kib_arrive_unbroken() {
    send_much(Wiring::Ptp, 1 << 30);
    for netfilter in [false, true] {
        send_much(Wiring::Bridge { hairpin_mode: true, netfilter }, 64 << 20);
    }
}

/// Sends streams of so many bytes to `web` by ClusterIP and NodePort, and much else.
fn send_much(wiring: Wiring, bytes: u64) {
    let cluster = Cluster::web(Topology { wiring, cni_rules: true, ..Topology::default() }, &[]);
    let lab = &cluster.lab;
    let cases =
        [("a pod", lab.client(lab.pod(1, 1)), By::ClusterIp), ("outside", lab.outside_client(), By::NodePort(1))];
    for (name, client, by) in cases {
        let client = client.with_timeout(Duration::from_secs(20));
        for to in by.addresses(10) {
            let what = format!("{wiring:?}: {name} {to}");
            let stream = client.connect(to).and_then(|mut stream| upload(&mut stream, bytes, 5));
            stream.unwrap_or_else(|error| panic!("{what}: {error}"));
            client.stream(to, 64 << 20).unwrap_or_else(|error| panic!("{what}: {error}"));
            for _ in 0..4 {
                client.echo(to, 64 * 1024, 200).unwrap_or_else(|error| panic!("{what}: {error}"));
                client.echo_datagrams(to, 1200, 200).unwrap_or_else(|error| panic!("{what}: {error}"));
            }
        }
    }
    for node in &lab.nodes {
        assert_eq!(lab.cni_counter(node, "invalid"), 0, "{wiring:?}: INVALID packets on {}", node.name);
    }
}

#[test]
fn no_connection_to_a_lasting_endpoint_fails_while_agents_are_killed_and_others_come_and_go() {
    let mut cluster = Cluster::web(Topology { pods_per_node: 3, ..Topology::default() }, &[]);
    let stop = AtomicBool::new(false);
    let askers: Vec<(&str, Client, SocketAddr)> = vec![
        ("a pod", cluster.lab.client(cluster.lab.pod(1, 1)), By::ClusterIp.addresses(10)[0]),
        ("a pod", cluster.lab.client(cluster.lab.pod(2, 1)), By::ClusterIp.addresses(10)[1]),
        ("node1", cluster.lab.host_client(cluster.lab.node(1)), By::ClusterIp.addresses(10)[0]),
        ("outside", cluster.lab.outside_client(), By::NodePort(1).addresses(10)[0]),
    ];
    // Pods that leave keep serving, as a Pod does while it terminates, so that no connection may fail at all.
    let seconds = 20;
    let results: Vec<(&str, usize, Vec<String>)> = thread::scope(|scope| {
        let workers: Vec<_> = askers
            .iter()
            .map(|(name, client, to)| {
                scope.spawn(|| {
                    let (mut made, mut broken) = (0, Vec::new());
                    while !stop.load(Ordering::Relaxed) {
                        let round = Instant::now();
                        for result in client.each(Protocol::Tcp, *to, 25) {
                            match result {
                                Ok(_) => made += 1,
                                Err(error) => broken.push(error.to_string()),
                            }
                        }
                        // 25 in 100 ms, by four clients: a thousand a second.
                        thread::sleep(Duration::from_millis(100).saturating_sub(round.elapsed()));
                    }
                    (*name, made, broken)
                })
            })
            .collect();
        for second in 0..seconds {
            match second {
                4 | 9 | 14 => cluster.agents.iter_mut().for_each(Agent::kill),
                5 | 10 | 15 => cluster.agents.iter_mut().for_each(Agent::restart),
                _ => {}
            }
            for pod in [2, 3] {
                cluster.relabel(1 + second % 2, pod, if second % 4 < 2 { "parked" } else { "web" });
            }
            thread::sleep(Duration::from_secs(1));
        }
        stop.store(true, Ordering::Relaxed);
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let made: usize = results.iter().map(|(_, made, _)| made).sum();
    for (name, _, broken) in &results {
        let kinds: BTreeSet<&String> = broken.iter().collect();
        assert!(broken.is_empty(), "{name}: {} of {made} connections failed: {kinds:?}", broken.len());
    }
    assert!(made > 10_000, "only {made} connections were made");
}

#[test]
fn sigterm_leaves_the_data_plane_and_cleanup_removes_it() {
    let mut cluster = Cluster::web(Topology::default(), &[]);
    let client = cluster.lab.client(cluster.lab.pod(1, 1)).with_timeout(Duration::from_millis(300));
    let to = By::ClusterIp.addresses(10)[0];
    for agent in &mut cluster.agents {
        assert!(agent.terminate().success(), "SIGTERM is no failure");
    }
    client.ask(Protocol::Tcp, to).unwrap();
    for agent in &cluster.agents {
        agent.cleanup();
        // The kernel puts files of its own into every bpffs (`maps.debug`).
        let entries = std::fs::read_dir(agent.bpffs()).into_iter().flatten().flatten();
        let left = entries.filter(|entry| entry.path().is_dir()).count();
        assert_eq!(left, 0, "pins are left in {}", agent.bpffs().display());
    }
    assert_eq!(client.ask(Protocol::Tcp, to).unwrap_err().kind(), ErrorKind::TimedOut);
    let links = cluster.lab.node(1).netns.exec("tc", &["qdisc", "show"]).unwrap();
    assert!(!links.contains("clsact"), "{links}");
}

#[test]
fn a_second_agent_on_one_folder_is_told_who_has_it() {
    let cluster = Cluster::web(Topology { nodes: 1, ..Topology::default() }, &[]);
    let lab = &cluster.lab;
    let mut second = Agent::new(lab, lab.node(1), lab.manifests().path(), &[]).unwrap();
    second.spawn().unwrap();
    let error = second.wait_ready(Duration::from_secs(10)).unwrap_err().to_string();
    let holder = cluster.agents[0].pid().unwrap().to_string();
    assert!(error.contains(&holder), "the error names process {holder}: {error}");
}
