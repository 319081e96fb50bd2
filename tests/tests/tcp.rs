//! TCP connections from their first segment to their last, and past it: segments made by hand where no socket would send them so, real
//! sockets where one does.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use tests::cluster::{By, Cluster, TARGET, own_addresses, web};
use tests::manifest::{PodObject, Service};
use tests::traffic::client::ask_on;
use tests::traffic::packet::{ACK, FIN, RST, SYN};
use tests::traffic::raw_tcp::{RawTcp, Segment};
use tests::{Agent, Answer, Lab, Netns, Protocol, Topology};

/// Where endpoints speak by hand. Nobody listens there.
const BY_HAND: u16 = 9090;
const NUMBER: u16 = 30;
const SOON: Duration = Duration::from_secs(2);
const A_WHILE: Duration = Duration::from_millis(100);

/// A Service whose three endpoints, and its clients, are in this test's hand.
struct ByHand {
    cluster: Cluster,
    endpoints: Vec<Endpoint>,
}

struct Endpoint {
    node: u8,
    pod: u8,
    /// IPv4, IPv6.
    ends: [RawTcp; 2],
}

fn by_hand() -> Service {
    Service::new("by-hand").selector("app", "web").dual_stack(NUMBER).node_port(
        "tcp",
        "TCP",
        80,
        BY_HAND,
        30_000 + NUMBER,
    )
}

impl ByHand {
    fn new(flags: &[&str]) -> Self {
        let cluster = Cluster::new(Topology { cni_rules: true, ..Topology::default() }, flags, |lab| {
            lab.manifests().write("by-hand.json", by_hand());
            for pod in lab.pods() {
                let app = if pod.name == "p1-1" { "client" } else { "web" };
                lab.manifests().write(&format!("pod-{}.json", pod.name), PodObject::of(pod).label("app", app));
            }
        });
        let endpoints = [(1, 2), (2, 1), (2, 2)].map(|(node, pod)| {
            let it = cluster.lab.pod(node, pod);
            let end = |address: IpAddr| RawTcp::new(&it.netns, (address, BY_HAND).into()).unwrap();
            Endpoint { node, pod, ends: [end(it.v4.into()), end(it.v6.into())] }
        });
        Self { cluster, endpoints: endpoints.into() }
    }

    /// A client by name, and where it connects to: from a pod with its own address, from outside with the node's.
    fn clients(&self, port: u16) -> Vec<(RawTcp, SocketAddr, usize)> {
        let lab = &self.cluster.lab;
        [("p1-1", &lab.pod(1, 1).netns, By::ClusterIp), ("outside", &lab.outside, By::NodePort(1))]
            .into_iter()
            .flat_map(|(name, netns, by): (&str, &Netns, By)| {
                let addresses = own_addresses(lab, name).into_iter().zip(by.addresses(NUMBER)).enumerate();
                addresses.map(|(family, (own, to))| (RawTcp::new(netns, (own, port).into()).unwrap(), to, family))
            })
            .collect()
    }

    /// The next segment at any endpoint.
    fn arrival(&self, family: usize) -> (usize, Segment) {
        let start = Instant::now();
        loop {
            for (number, endpoint) in self.endpoints.iter().enumerate() {
                if let Ok(segment) = endpoint.ends[family].receive(Duration::ZERO) {
                    return (number, segment);
                }
            }
            assert!(start.elapsed() < SOON, "nothing arrives at any endpoint");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes an endpoint out of the Service, or puts it back, and waits until that is so.
    fn set(&self, number: usize, serves: bool) {
        let Endpoint { node, pod, ends } = &self.endpoints[number];
        self.cluster.relabel(*node, *pod, if serves { "web" } else { "parked" });
        let start = Instant::now();
        loop {
            let rows = self.cluster.agents[0].cli_json(&["endpoints"]);
            let has =
                |end: &RawTcp| rows.as_array().unwrap().iter().any(|row| row["endpoint"] == end.local().to_string());
            if ends.iter().all(|end| has(end) == serves) {
                return;
            }
            assert!(start.elapsed() < SOON, "endpoint {number} serves: {serves}: {rows}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A connection between a client and an endpoint, both by hand.
struct Connection<'a> {
    client: &'a RawTcp,
    frontend: SocketAddr,
    endpoint: &'a RawTcp,
    number: usize,
    /// The client, as the endpoint sees it.
    seen: SocketAddr,
}

impl<'a> Connection<'a> {
    fn begin(service: &'a ByHand, client: &'a RawTcp, frontend: SocketAddr, family: usize) -> Self {
        client.send(frontend, SYN, 1).unwrap();
        let (number, segment) = service.arrival(family);
        assert_eq!(segment.flags, SYN);
        let endpoint = &service.endpoints[number].ends[family];
        Self { client, frontend, endpoint, number, seen: segment.from }
    }

    fn establish(service: &'a ByHand, client: &'a RawTcp, frontend: SocketAddr, family: usize) -> Self {
        let connection = Self::begin(service, client, frontend, family);
        connection.endpoint_sends(SYN | ACK, 1);
        connection.client_sends(ACK, 2);
        connection
    }

    fn client_sends(&self, flags: u8, sequence: u32) {
        self.client.send(self.frontend, flags, sequence).unwrap();
        let expected = Segment { from: self.seen, flags, sequence };
        assert_eq!(self.endpoint.receive(SOON).unwrap(), expected, "from the client of {}", self.frontend);
    }

    fn endpoint_sends(&self, flags: u8, sequence: u32) {
        self.endpoint.send(self.seen, flags, sequence).unwrap();
        let expected = Segment { from: self.frontend, flags, sequence };
        assert_eq!(self.client.receive(SOON).unwrap(), expected, "from the endpoint of {}", self.frontend);
    }
}

#[test]
fn a_source_port_is_served_again_however_its_connection_ended() {
    type Way = (&'static str, fn(&Connection));
    let ways: [Way; 5] = [
        ("the client closes first", |it| {
            it.client_sends(FIN | ACK, 2);
            it.endpoint_sends(ACK, 2);
            it.endpoint_sends(FIN | ACK, 2);
            it.client_sends(ACK, 3);
        }),
        ("the endpoint closes first", |it| {
            it.endpoint_sends(FIN | ACK, 2);
            it.client_sends(ACK, 2);
            it.client_sends(FIN | ACK, 2);
            it.endpoint_sends(ACK, 3);
        }),
        ("both close at once", |it| {
            it.client.send(it.frontend, FIN | ACK, 2).unwrap();
            it.endpoint.send(it.seen, FIN | ACK, 2).unwrap();
            assert_eq!(it.client.receive(SOON).unwrap().flags, FIN | ACK);
            assert_eq!(it.endpoint.receive(SOON).unwrap().flags, FIN | ACK);
            it.client_sends(ACK, 3);
            it.endpoint_sends(ACK, 3);
        }),
        ("the client resets", |it| it.client_sends(RST, 2)),
        ("the endpoint resets", |it| it.endpoint_sends(RST, 2)),
    ];
    let service = ByHand::new(&[]);
    for (client, frontend, family) in service.clients(40_001) {
        for (name, end) in ways {
            let old = Connection::establish(&service, &client, frontend, family);
            end(&old);
            service.set(old.number, false);
            let new = Connection::establish(&service, &client, frontend, family);
            assert_ne!(new.number, old.number, "{name}, {frontend}: to an endpoint that is gone");
            new.client_sends(ACK, 2);
            new.endpoint_sends(ACK, 2);
            new.client_sends(RST, 2);
            service.set(old.number, true);
        }
    }
}

#[test]
fn a_retransmitted_syn_goes_to_the_same_endpoint_while_others_come_and_go() {
    let service = ByHand::new(&[]);
    for (client, frontend, family) in service.clients(40_002) {
        let connection = Connection::begin(&service, &client, frontend, family);
        let others = [(connection.number + 1) % 3, (connection.number + 2) % 3];
        connection.client_sends(SYN, 1);
        for serves in [false, true] {
            for other in others {
                service.set(other, serves);
                connection.client_sends(SYN, 1);
            }
        }
        service.set(connection.number, false);
        client.send(frontend, SYN, 1).unwrap();
        let (number, segment) = service.arrival(family);
        assert!(others.contains(&number), "{frontend}: to an endpoint that is gone");
        let endpoint = &service.endpoints[number].ends[family];
        endpoint.send(segment.from, SYN | ACK, 1).unwrap();
        assert_eq!(client.receive(SOON).unwrap(), Segment { from: frontend, flags: SYN | ACK, sequence: 1 });
        client.send(frontend, RST, 2).unwrap();
        assert_eq!(service.arrival(family), (number, Segment { from: segment.from, flags: RST, sequence: 2 }));
        service.set(connection.number, true);
    }
}

#[test]
fn who_forgot_a_connection_is_told_by_who_remembers_it() {
    let service = ByHand::new(&[]);
    for (client, frontend, family) in service.clients(40_003) {
        // RFC 9293 §3.5.1: a SYN within a connection is answered by an ACK, which the client resets.
        let forgotten = Connection::establish(&service, &client, frontend, family);
        forgotten.client_sends(SYN, 100);
        forgotten.endpoint_sends(ACK, 2);
        forgotten.client_sends(RST, 2);
        let again = Connection::establish(&service, &client, frontend, family);
        again.client_sends(ACK, 2);
        again.endpoint_sends(RST, 2);
        assert!(client.hears_nothing(A_WHILE), "{frontend}: something that nobody sent");
    }
}

#[test]
fn a_connection_whose_endpoint_is_gone_goes_on_until_it_ends() {
    let service = ByHand::new(&[]);
    for (client, frontend, family) in service.clients(40_004) {
        let connection = Connection::establish(&service, &client, frontend, family);
        service.set(connection.number, false);
        for sequence in 2..5 {
            connection.client_sends(ACK, sequence);
            connection.endpoint_sends(ACK, sequence);
        }
        // A side that has closed still hears the other one.
        connection.client_sends(FIN | ACK, 5);
        connection.endpoint_sends(ACK, 5);
        connection.client_sends(ACK, 6);
        connection.endpoint_sends(FIN | ACK, 6);
        connection.client_sends(ACK, 6);
        service.set(connection.number, true);
    }
}

#[test]
fn with_terminate_connections_the_next_segment_is_answered_by_a_reset_and_goes_on_as_one() {
    let service = ByHand::new(&["--terminate-connections"]);
    for (client, frontend, family) in service.clients(40_005) {
        let connection = Connection::establish(&service, &client, frontend, family);
        let Connection { endpoint, seen, number, .. } = connection;
        connection.client_sends(ACK, 2);
        service.set(number, false);
        // The endpoint may be the one that sends.
        connection.endpoint_sends(ACK, 2);
        client.send(frontend, ACK, 2).unwrap();
        assert_eq!(client.receive(SOON).unwrap(), Segment { from: frontend, flags: RST, sequence: 1 });
        assert_eq!(endpoint.receive(SOON).unwrap(), Segment { from: seen, flags: RST | ACK, sequence: 2 });
        let new = Connection::establish(&service, &client, frontend, family);
        assert_ne!(new.number, number, "{frontend}");
        service.set(number, true);
        new.client_sends(ACK, 2);
        new.endpoint_sends(ACK, 2);
        new.client_sends(RST, 2);
        assert!(client.hears_nothing(A_WHILE) && endpoint.hears_nothing(A_WHILE), "{frontend}");
    }
}

#[test]
fn with_terminate_connections_both_sockets_hear_that_the_endpoint_is_gone_and_no_others_do() {
    for flags in [&["--terminate-connections"][..], &["--terminate-connections", "--socket-lb", "all"]] {
        let cluster = Cluster::web(Topology { cni_rules: true, ..Topology::default() }, flags);
        let lab = &cluster.lab;
        let server = &cluster.servers[lab.pods().position(|pod| pod.name == "p2-1").unwrap()];
        for (name, client, by) in [
            ("a pod", lab.client(lab.pod(1, 1)), By::ClusterIp),
            ("the node", lab.host_client(lab.node(1)), By::ClusterIp),
            ("outside", lab.outside_client(), By::NodePort(1)),
        ] {
            for to in by.addresses(10) {
                let what = format!("{flags:?}: {name}, {to}");
                let mut held: Vec<(TcpStream, Answer)> = (0..24)
                    .map(|_| {
                        let mut stream = client.connect(to).unwrap();
                        let answer = ask_on(&mut stream).unwrap();
                        (stream, answer)
                    })
                    .collect();
                assert!(held.iter().any(|(_, answer)| answer.by == "p2-1") && server.connections() != 0, "{what}");
                cluster.relabel(2, 1, "parked");
                let start = Instant::now();
                for (stream, before) in held.iter_mut().filter(|(_, answer)| answer.by == "p2-1") {
                    while let Ok(answer) = ask_on(stream) {
                        assert_eq!(answer, *before, "{what}: moved");
                        assert!(start.elapsed() < SOON, "{what}: goes on");
                    }
                }
                for (stream, before) in held.iter_mut().filter(|(_, answer)| answer.by != "p2-1") {
                    assert_eq!(ask_on(stream).unwrap(), *before, "{what}: an endpoint that stays");
                }
                while server.connections() != 0 {
                    assert!(start.elapsed() < SOON, "{what}: {} are open at the endpoint", server.connections());
                    thread::sleep(Duration::from_millis(5));
                }
                cluster.relabel(2, 1, "web");
                client
                    .ask_until(Protocol::Tcp, to, SOON, |answer| answer.as_ref().is_ok_and(|it| it.by == "p2-1"))
                    .unwrap();
            }
        }
    }
}

#[test]
fn with_terminate_connections_sockets_hear_that_their_service_or_its_port_is_gone_and_no_others_do() {
    for flags in [&["--terminate-connections"][..], &["--terminate-connections", "--socket-lb", "all"]] {
        let cluster = Cluster::web(Topology { cni_rules: true, ..Topology::default() }, flags);
        let lab = &cluster.lab;
        let service = || Service::new("only-tcp").selector("app", "web").dual_stack(NUMBER);
        let both = || service().node_port("a", "TCP", 80, TARGET, 30_000 + NUMBER).port("b", "TCP", 81, TARGET);
        let clients = [
            ("a pod", lab.client(lab.pod(1, 1)), By::ClusterIp),
            ("the node", lab.host_client(lab.node(1)), By::ClusterIp),
        ];
        let outside = ("outside", lab.outside_client(), By::NodePort(1));
        let askers: Vec<_> = clients.into_iter().chain([outside]).collect();
        for change in ["the Service goes", "its port goes"] {
            lab.manifests().write("only-tcp.json", both());
            let open = |number: u16| -> Vec<(String, TcpStream)> {
                let each = askers.iter().flat_map(|(name, client, by)| {
                    by.addresses(number).map(|to| {
                        client.ask_until(Protocol::Tcp, to, SOON, Result::is_ok).unwrap();
                        let mut stream = client.connect(to).unwrap();
                        ask_on(&mut stream).unwrap();
                        (format!("{flags:?}, {change}: {name}, {to}"), stream)
                    })
                });
                each.collect()
            };
            let (goes, mut stays) = (open(NUMBER), open(10));
            if change == "its port goes" {
                lab.manifests().write("only-tcp.json", service().port("b", "TCP", 81, TARGET));
            } else {
                lab.manifests().remove("only-tcp.json");
            }
            let start = Instant::now();
            for (what, mut stream) in goes {
                let error = loop {
                    match ask_on(&mut stream) {
                        Ok(_) => assert!(start.elapsed() < SOON, "{what}: goes on"),
                        Err(error) => break error.kind(),
                    }
                };
                let ended = [ErrorKind::ConnectionReset, ErrorKind::ConnectionAborted, ErrorKind::BrokenPipe];
                assert!(ended.contains(&error), "{what}: {error}");
            }
            for (what, stream) in &mut stays {
                assert!(ask_on(stream).is_ok(), "{what}");
            }
        }
    }
}

/// Ends a connection, orderly or by a reset, so that the kernel keeps nothing of it.
fn end(mut stream: TcpStream, orderly: bool) {
    if orderly {
        stream.shutdown(Shutdown::Write).unwrap();
        let _ = stream.read(&mut [0]);
    } else {
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    }
}

#[test]
fn a_socket_uses_its_port_again_and_again() {
    let cluster = Cluster::web(Topology { cni_rules: true, ..Topology::default() }, &[]);
    let lab = &cluster.lab;
    for (name, client, by) in [
        ("p1-1", lab.client(lab.pod(1, 1)), By::ClusterIp),
        ("node1", lab.host_client(lab.node(1)), By::ClusterIp),
        ("outside", lab.outside_client(), By::NodePort(2)),
    ] {
        // Without TIME_WAIT, that the kernel lets the port be used at once.
        client.netns().set_sysctls(&[("net/ipv4/tcp_max_tw_buckets", "0")]).unwrap();
        for (own, to) in own_addresses(lab, name).into_iter().zip(by.addresses(10)) {
            for orderly in [true, false] {
                let ask = |round: &str| {
                    let mut stream = client
                        .connect_from((own, 41_000).into(), to)
                        .unwrap_or_else(|error| panic!("{name}, {to}, orderly {orderly}, {round}: {error}"));
                    let by = ask_on(&mut stream).unwrap().by;
                    end(stream, orderly);
                    by
                };
                let mut last = String::new();
                for round in 0..20 {
                    last = ask(&round.to_string());
                }
                let pod = lab.pods().find(|pod| pod.name == last).unwrap();
                let labelled = |app: &str| {
                    lab.manifests().write(&format!("pod-{last}.json"), PodObject::of(pod).label("app", app));
                };
                labelled("parked");
                let start = Instant::now();
                while ask("another endpoint") == last {
                    assert!(start.elapsed() < SOON, "{name}, {to}: still {last}");
                }
                labelled("web");
            }
        }
    }
}

#[test]
fn connections_that_no_hook_saw_begin_are_left_as_they_are() {
    let lab = Lab::new(Topology { cni_rules: true, ..Topology::default() });
    let _servers: Vec<_> = lab.pods().map(|pod| lab.serve(pod, TARGET)).collect();
    let endpoint = lab.pod(2, 1);
    let clients =
        [lab.client(lab.pod(1, 1)), lab.client(lab.pod(2, 2)), lab.host_client(lab.node(1)), lab.outside_client()];
    let mut streams: Vec<TcpStream> = clients
        .iter()
        .flat_map(|client| {
            [IpAddr::from(endpoint.v4), endpoint.v6.into()].map(|to| client.connect((to, TARGET).into()).unwrap())
        })
        .collect();
    let before: Vec<_> = streams.iter_mut().map(|stream| ask_on(stream).unwrap()).collect();
    lab.manifests().write_list("nodes.json", lab.nodes.iter().map(tests::manifest::node_object));
    lab.manifests().write("web.json", web());
    let write = |app: &str| {
        lab.manifests().write("pod-p2-1.json", PodObject::of(endpoint).label("app", app));
    };
    write("web");
    let mut agents: Vec<Agent> = lab.nodes.iter().map(|node| Agent::start(&lab, node, &[])).collect();
    let check = |streams: &mut Vec<TcpStream>, when: &str| {
        for (stream, before) in streams.iter_mut().zip(&before) {
            let answer = ask_on(stream).unwrap_or_else(|error| panic!("{when}: from {}: {error}", before.from));
            assert_eq!(answer, *before, "{when}");
        }
    };
    check(&mut streams, "with programs");
    for client in &clients[..3] {
        for to in By::ClusterIp.addresses(10) {
            assert_eq!(client.ask(Protocol::Tcp, to).unwrap().by, "p2-1");
        }
    }
    write("parked");
    clients[0].ask_until(Protocol::Tcp, By::ClusterIp.addresses(10)[0], SOON, tests::cluster::refused).unwrap();
    check(&mut streams, "without the endpoint");
    for agent in &mut agents {
        agent.terminate();
        agent.cleanup();
    }
    check(&mut streams, "without programs");
}
