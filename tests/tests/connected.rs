//! Connected UDP sockets of the node, and of pods with `--socket-lb=all`: no hook sees their packets again, so those that speak to nobody
//! are ended, and no others.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use tests::cluster::{By, Cluster, TARGET, web};
use tests::traffic::client::ask_datagram;
use tests::traffic::socket::udp_for;
use tests::{Client, Protocol, Topology};

const TIMEOUT: Duration = Duration::from_millis(300);
const SOON: Duration = Duration::from_secs(3);

/// What has NodePorts answer on localhost, too.
const LOCALHOST: [&str; 2] = ["--proxy-mode", "iptables"];

/// The addresses of `web` on node 1, and one of them as a socket of both families says it.
fn ways(flags: &[&str]) -> Vec<SocketAddr> {
    let own = [By::ClusterIp, By::LoadBalancer, By::NodePort(1)].map(|by| by.addresses(10));
    let localhost = (flags == LOCALHOST).then(|| SocketAddr::from(([127, 0, 0, 1], own[2][0].port())));
    own.into_iter().flatten().chain([mapped(own[0][0])]).chain(localhost).collect()
}

fn mapped(to: SocketAddr) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(address) => SocketAddr::new(address.to_ipv6_mapped().into(), to.port()),
        IpAddr::V6(_) => to,
    }
}

fn connected(client: &Client, to: SocketAddr) -> UdpSocket {
    client.netns().run(|| {
        let socket = udp_for(None, to, TIMEOUT).unwrap();
        socket.connect(to).unwrap();
        socket
    })
}

/// Waits until the kernel has ended the socket, and takes the error that says so.
fn wait_end(socket: &UdpSocket, what: &str) {
    let start = Instant::now();
    while socket.peer_addr().is_ok() {
        assert!(start.elapsed() < SOON, "{what}: the socket is not ended");
        thread::sleep(Duration::from_millis(1));
    }
    let error = socket.take_error().unwrap().map(|error| error.kind());
    assert_eq!(error, Some(ErrorKind::ConnectionAborted), "{what}");
}

/// Node and pod of an endpoint's name.
fn numbers(name: &str) -> (u8, u8) {
    let (node, pod) = name[1..].split_once('-').unwrap();
    (node.parse().unwrap(), pod.parse().unwrap())
}

#[test]
fn a_connected_udp_socket_is_ended_when_its_endpoint_goes_and_no_other_is() {
    for flags in [LOCALHOST, ["--socket-lb", "all"]] {
        let cluster = Cluster::web(Topology::default(), &flags);
        let lab = &cluster.lab;
        let mut clients = vec![("the node", lab.host_client(lab.node(1)))];
        if flags.contains(&"all") {
            clients.push(("a pod", lab.client(lab.pod(1, 1))));
        }
        for (name, client) in clients {
            for to in ways(&flags) {
                let what = format!("{flags:?}: {name}, {to}");
                let sockets: Vec<(UdpSocket, String)> = (0..12)
                    .map(|_| {
                        let socket = connected(&client, to);
                        let by = ask_datagram(&socket, to).unwrap_or_else(|error| panic!("{what}: {error}")).by;
                        (socket, by)
                    })
                    .collect();
                let gone = sockets[0].1.clone();
                let (node, pod) = numbers(&gone);
                let free = client.udp(to).unwrap();
                ask_datagram(&free, to).unwrap();
                // To the same endpoint by its own address.
                let [v4, v6] = [IpAddr::from(lab.pod(node, pod).v4), IpAddr::from(lab.pod(node, pod).v6)];
                let address = if to.ip().to_canonical().is_ipv4() { v4 } else { v6 };
                let own = SocketAddr::new(address, TARGET);
                let own = if to.ip().to_canonical() == to.ip() { own } else { mapped(own) };
                let direct = connected(&client, own);
                ask_datagram(&direct, own).unwrap();
                cluster.relabel(node, pod, "parked");
                for (socket, _) in sockets.iter().filter(|(_, by)| *by == gone) {
                    wait_end(socket, &what);
                    client
                        .netns()
                        .run(|| socket.connect(to).and_then(|()| ask_datagram(socket, to)))
                        .map(|answer| assert_ne!(answer.by, gone, "{what}"))
                        .unwrap_or_else(|error| panic!("{what}: connected again: {error}"));
                }
                for (socket, by) in sockets.iter().filter(|(_, by)| *by != gone) {
                    assert_eq!(ask_datagram(socket, to).unwrap().by, *by, "{what}: an endpoint that stays");
                }
                assert_eq!(ask_datagram(&direct, own).unwrap().by, gone, "{what}: the endpoint's own address");
                ask_datagram(&free, to).unwrap_or_else(|error| panic!("{what}: not connected: {error}"));
                cluster.relabel(node, pod, "web");
                client
                    .ask_until(Protocol::Udp, to, SOON, |answer| answer.as_ref().is_ok_and(|it| it.by == gone))
                    .unwrap();
            }
        }
    }
}

#[test]
fn a_udp_socket_that_connected_before_the_service_was_there_is_ended_when_it_comes() {
    let cluster = Cluster::web(Topology::default(), &LOCALHOST);
    let lab = &cluster.lab;
    let client = lab.host_client(lab.node(1));
    lab.manifests().remove("web.json");
    for to in ways(&LOCALHOST) {
        client.ask_until(Protocol::Udp, to, SOON, not_answered).unwrap();
        let early = connected(&client, to);
        let [v4, v6] = By::ClusterIp.addresses(99);
        let nowhere = if to.is_ipv4() { v4 } else { v6 };
        let other = connected(&client, nowhere);
        early.send(b"who").unwrap();
        lab.manifests().write("web.json", web());
        wait_end(&early, &format!("{to}"));
        assert_eq!(other.peer_addr().unwrap(), nowhere, "connected to no frontend");
        client.netns().run(|| early.connect(to).and_then(|()| ask_datagram(&early, to))).unwrap();
        lab.manifests().remove("web.json");
    }
}

#[test]
fn a_connected_udp_socket_by_a_node_port_is_ended_when_the_nodes_address_goes() {
    let cluster = Cluster::web(Topology::default(), &["--nodeport-addresses", "0.0.0.0/0,::/0"]);
    let lab = &cluster.lab;
    let client = lab.host_client(lab.node(1));
    for (address, to, other) in [
        ("10.99.0.77/24", "10.99.0.77:30010", By::NodePort(1).addresses(10)[0]),
        ("fd00:99::77/64", "[fd00:99::77]:30010", By::NodePort(1).addresses(10)[1]),
    ] {
        let to: SocketAddr = to.parse().unwrap();
        let change = |verb: &str| lab.node(1).netns.ip(&[format!("address {verb} {address} dev eth0")]).unwrap();
        change("add");
        client.ask_until(Protocol::Udp, to, SOON, Result::is_ok).unwrap();
        let [goes, stays] = [to, other].map(|to| (connected(&client, to), to));
        for (socket, to) in [&goes, &stays] {
            ask_datagram(socket, *to).unwrap();
        }
        change("delete");
        wait_end(&goes.0, &format!("{to}"));
        assert_eq!(stays.0.peer_addr().unwrap(), other, "by an address that stays");
    }
}

fn not_answered<T>(answer: &io::Result<T>) -> bool {
    answer.as_ref().is_err_and(|error| [ErrorKind::TimedOut, ErrorKind::ConnectionRefused].contains(&error.kind()))
}

#[test]
fn udp_sockets_that_connected_without_an_agent_or_lost_their_endpoint_meanwhile_are_ended_at_its_start() {
    let mut cluster = Cluster::web(Topology::default(), &[]);
    let client = cluster.lab.host_client(cluster.lab.node(1));
    for to in ways(&[]) {
        // The programs go on without the agent, and so does what they have translated.
        let kept: Vec<_> = (0..12)
            .map(|_| {
                let socket = connected(&client, to);
                let by = ask_datagram(&socket, to).unwrap().by;
                (socket, by)
            })
            .collect();
        let gone = kept[0].1.clone();
        let (node, pod) = numbers(&gone);
        cluster.agents[0].kill();
        cluster.relabel(node, pod, "parked");
        cluster.agents[0].restart();
        for (socket, by) in &kept {
            if *by == gone {
                wait_end(socket, &format!("{to}: gone meanwhile"));
            }
        }
        for (socket, by) in kept.iter().filter(|(_, by)| *by != gone) {
            assert_eq!(ask_datagram(socket, to).unwrap().by, *by, "{to}: cut by a restart");
        }
        cluster.agents[0].kill();
        cluster.agents[0].cleanup();
        let early = connected(&client, to);
        cluster.relabel(node, pod, "web");
        cluster.agents[0].restart();
        wait_end(&early, &format!("{to}: before the first start"));
        client.netns().run(|| early.connect(to).and_then(|()| ask_datagram(&early, to))).unwrap();
    }
}
