//! Sockets of the node, and of pods with `--socket-lb=all`: what they are told of their peers, over IPv4, IPv6 and IPv4 through an IPv6
//! socket.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use tests::cluster::{By, Cluster, KINDS, addressed, one_service_a_kind};
use tests::manifest::{PodObject, Service};
use tests::traffic::client::{ask_datagram, ask_on};
use tests::traffic::socket::{connect_tcp, hear_errors, udp_for};
use tests::{Client, Protocol, Topology};

const TIMEOUT: Duration = Duration::from_millis(500);

fn cluster(flags: &[&str]) -> Cluster {
    Cluster::new(Topology { cni_rules: true, ..Topology::default() }, flags, |lab| {
        one_service_a_kind(lab);
        lab.manifests().write("empty.json", addressed(Service::new("empty").selector("app", "nobody"), 20));
    })
}

/// The same address for an IPv6 socket.
fn mapped(to: SocketAddr) -> Option<SocketAddr> {
    match to.ip() {
        IpAddr::V4(address) => Some(SocketAddr::new(address.to_ipv6_mapped().into(), to.port())),
        IpAddr::V6(_) => None,
    }
}

/// The addresses of a Service as each kind of socket says them.
fn ways(by: By, number: u16) -> Vec<SocketAddr> {
    let addresses = by.addresses(number);
    addresses.into_iter().chain(addresses.into_iter().filter_map(mapped)).collect()
}

fn connect(client: &Client, to: SocketAddr) -> std::io::Result<TcpStream> {
    client.netns().run(|| connect_tcp(None, to, TIMEOUT))
}

fn udp(client: &Client, to: SocketAddr) -> UdpSocket {
    client.netns().run(|| udp_for(None, to, TIMEOUT)).unwrap()
}

/// What is wrong with a socket's view of one frontend.
fn look(client: &Client, to: SocketAddr, endpoint: &str) -> Result<(), String> {
    LOOKS.iter().try_for_each(|look| look(client, to, endpoint))
}

type Look = fn(&Client, SocketAddr, &str) -> Result<(), String>;

/// By a kind of socket each.
const LOOKS: [Look; 3] = [look_by_tcp, look_by_udp, look_by_free_udp];

fn text(what: &str, error: &std::io::Error) -> String {
    format!("{what}: {error}")
}

fn look_by_tcp(client: &Client, to: SocketAddr, endpoint: &str) -> Result<(), String> {
    let mut stream = connect(client, to).map_err(|error| text("TCP", &error))?;
    let by = ask_on(&mut stream).map_err(|error| text("TCP", &error))?.by;
    let peer = stream.peer_addr().map_err(|error| text("TCP", &error))?;
    if by != endpoint || peer != to {
        return Err(format!("TCP: {by} answers, getpeername says {peer}"));
    }
    Ok(())
}

fn look_by_udp(client: &Client, to: SocketAddr, endpoint: &str) -> Result<(), String> {
    let connected = udp(client, to);
    connected.connect(to).map_err(|error| text("UDP", &error))?;
    let by = ask_datagram(&connected, to).map_err(|error| text("UDP", &error))?.by;
    let peer = connected.peer_addr().map_err(|error| text("UDP", &error))?;
    if by != endpoint || peer != to {
        return Err(format!("UDP: {by} answers, getpeername says {peer}"));
    }
    Ok(())
}

fn look_by_free_udp(client: &Client, to: SocketAddr, endpoint: &str) -> Result<(), String> {
    let free = udp(client, to);
    for _ in 0..3 {
        // Also looks at where the answer comes from.
        let by = ask_datagram(&free, to).map_err(|error| text("UDP, not connected", &error))?.by;
        if by != endpoint {
            return Err(format!("UDP, not connected: {by} answers"));
        }
    }
    Ok(())
}

#[test]
fn a_socket_sees_the_frontend_as_its_peer_whatever_family_it_is_of() {
    for flags in [&[][..], &["--socket-lb", "all"], &["--socket-lb", "off"]] {
        let cluster = cluster(flags);
        let lab = &cluster.lab;
        let (node, pod) = (lab.host_client(lab.node(1)), lab.client(lab.pod(1, 1)));
        let mut wrong = Vec::new();
        for (who, client) in [("the node", node), ("a pod", pod)] {
            if who == "the node" && flags.contains(&"off") {
                continue;
            }
            for by in By::ALL {
                for (number, endpoint) in KINDS {
                    for to in ways(by, number) {
                        if let Err(error) = look(&client, to, endpoint) {
                            wrong.push(format!("{flags:?}: {who} by {by:?}, {to}: {error}"));
                        }
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    }
}

#[test]
fn a_socket_is_refused_at_once_whatever_family_it_is_of() {
    for flags in [&[][..], &["--socket-lb", "all"]] {
        let cluster = cluster(flags);
        let lab = &cluster.lab;
        let mut wrong = Vec::new();
        for (who, client) in [("the node", lab.host_client(lab.node(1))), ("a pod", lab.client(lab.pod(1, 1)))] {
            for to in By::ALL.into_iter().flat_map(|by| ways(by, 20)) {
                let tcp = connect(&client, to).map(drop);
                let connected = udp(&client, to);
                let connected = connected.connect(to).and_then(|()| ask_datagram(&connected, to)).map(drop);
                let free = udp(&client, to);
                hear_errors(&free).unwrap();
                if mapped(to).is_none() && to.ip().to_canonical().is_ipv4() {
                    // IPv4 errors of an IPv6 socket are asked for at both levels.
                    tests::traffic::socket::set_option(&free, libc::IPPROTO_IP, libc::IP_RECVERR, 1).unwrap();
                }
                let free = ask_datagram(&free, to).map(drop);
                for (what, result) in [("TCP", tcp), ("UDP", connected), ("UDP, not connected", free)] {
                    match result {
                        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                        other => wrong.push(format!("{flags:?}: {who}, {what} {to}: {other:?}")),
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    }
}

#[test]
fn a_socket_of_the_node_that_is_left_alone_reaches_what_is_no_service() {
    let cluster = cluster(&["--socket-lb", "off"]);
    let lab = &cluster.lab;
    let node = lab.host_client(lab.node(1));
    for to in [SocketAddr::from((lab.pod(2, 1).v4, 8080)), SocketAddr::from((lab.pod(2, 1).v6, 8080))] {
        look(&node, to, "p2-1").unwrap();
        if let Some(to) = mapped(to) {
            look(&node, to, "p2-1").unwrap();
        }
    }
}

#[test]
fn node_ports_answer_on_localhost_where_the_mode_has_them() {
    for (mode, has_them) in [("iptables", true), ("nftables", false)] {
        let cluster = cluster(&["--proxy-mode", mode]);
        let node = cluster.lab.host_client(cluster.lab.node(1)).with_timeout(TIMEOUT);
        for to in ["127.0.0.1:30012", "127.9.9.9:30012", "[::1]:30012"] {
            let to: SocketAddr = to.parse().unwrap();
            let expected = has_them && to.is_ipv4();
            for to in [Some(to), mapped(to)].into_iter().flatten() {
                for look in LOOKS {
                    let seen = look(&node, to, "p2-1");
                    assert_eq!(seen.is_ok(), expected, "{mode} {to}: {seen:?}");
                }
            }
        }
    }
}

#[test]
fn a_socket_bound_to_localhost_reaches_only_endpoints_of_the_node_itself() {
    let cluster = cluster(&["--proxy-mode", "iptables"]);
    let node = cluster.lab.host_client(cluster.lab.node(1));
    let localhost = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    for (number, endpoint) in KINDS {
        let to = SocketAddr::from(([127, 0, 0, 1], 30_000 + number));
        let tcp = || connect_tcp(localhost, to, TIMEOUT).and_then(|mut stream| ask_on(&mut stream));
        let udp = || udp_for(localhost, to, TIMEOUT).and_then(|socket| ask_datagram(&socket, to));
        for seen in [node.netns().run(tcp), node.netns().run(udp)] {
            match seen {
                Ok(answer) => assert_eq!((&*answer.by, endpoint), ("node1", "node1")),
                Err(error) => {
                    assert_eq!(
                        (error.kind(), endpoint == "node1"),
                        (ErrorKind::InvalidInput, false),
                        "{endpoint}: {error}"
                    );
                }
            }
        }
    }
}

#[test]
fn source_ranges_judge_a_pod_by_its_own_address() {
    const NUMBER: u16 = 21;
    for flags in [&[][..], &["--socket-lb", "all"]] {
        // Two agents on one cgroup would both translate sockets of all pods.
        let cluster = Cluster::new(Topology { nodes: 1, ..Topology::default() }, flags, |lab| {
            let pod = lab.pod(1, 1);
            let ranges = serde_json::json!([format!("{}/32", pod.v4), format!("{}/128", pod.v6)]);
            let service = addressed(Service::new("ranged").selector("app", "ranged"), NUMBER);
            lab.manifests().write("ranged.json", service.spec("loadBalancerSourceRanges", ranges));
            lab.manifests().write("pod.json", PodObject::of(lab.pod(1, 2)).label("app", "ranged"));
        });
        let lab = &cluster.lab;
        let clients = [lab.client(lab.pod(1, 1)), lab.client(lab.pod(1, 2)), lab.host_client(lab.node(1))];
        for (client, (who, may)) in clients.into_iter().zip([("in", true), ("out", false), ("the node", false)]) {
            let client = client.with_timeout(TIMEOUT);
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::UdpUnconnected] {
                for to in By::LoadBalancer.addresses(NUMBER) {
                    match (client.ask(protocol, to), may) {
                        (Ok(answer), true) => assert_eq!(answer.by, "p1-2"),
                        (Err(error), false) if error.kind() != ErrorKind::ConnectionRefused => {}
                        (other, _) => panic!("{flags:?}: {who}, {protocol:?} {to}: {other:?}"),
                    }
                }
                // The ranges are about addresses of load balancers.
                for to in By::ClusterIp.addresses(NUMBER) {
                    assert_eq!(client.ask(protocol, to).unwrap().by, "p1-2", "{flags:?}: {who}, {protocol:?} {to}");
                }
            }
        }
    }
}
