//! Path MTU discovery through a Service: whoever sends too much hears of it about the address that it knows, wherever on the way
//! the link is narrow and whoever says so.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use tests::cluster::{By, Cluster, TARGET, addressed, one_service_a_kind};
use tests::manifest::{Service, SliceEndpoint, endpoint_slice};
use tests::traffic::client::{download, upload};
use tests::traffic::socket::{option, set_option};
use tests::{Client, Lab, Netns, Server, Topology, topology};

/// A machine behind a router (the switch of the lab): a second pair of addresses of the outside machine.
const FAR: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 99, 2, 1)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x99, 2, 0, 0, 0, 0, 1))];

/// The number of the Service whose endpoint is far.
const FAR_SERVICE: u16 = 16;

const BULK: u64 = 1 << 20;

/// A lab with the far machine, which is a server too.
fn cluster(cni_rules: bool) -> (Cluster, Server) {
    let cluster = Cluster::new(Topology { cni_rules, ..Topology::default() }, &[], |lab| {
        one_service_a_kind(lab);
        lab.manifests().write("service-far.json", addressed(Service::new("to-far"), FAR_SERVICE));
        for address in FAR {
            let family = if address.is_ipv4() { "v4" } else { "v6" };
            let endpoint = SliceEndpoint { address, node: String::new(), serving: true, terminating: false };
            let ports = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];
            let mut slice = endpoint_slice(&format!("to-far-{family}"), "to-far", &ports, &[endpoint]);
            slice["endpoints"][0].as_object_mut().unwrap().remove("nodeName");
            lab.manifests().write(&format!("slice-far-{family}.json"), slice);
        }
    });
    let lab = &cluster.lab;
    lab.switch
        .set_sysctls(&[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/br0/send_redirects", "0"),
        ])
        .unwrap();
    let [v4, v6] = FAR;
    lab.outside.ip(&[format!("address add {v4}/32 dev lo"), format!("address add {v6}/128 dev lo nodad")]).unwrap();
    let first = lab.node(1);
    let mut routes = vec![
        format!("route add 10.99.1.0/24 via {}", first.v4()),
        format!("route add fd00:99:1::/64 via {}", first.v6()),
    ];
    for node in &lab.nodes {
        routes.push(format!("route add 10.244.{}.0/24 via {}", node.number, node.v4()));
        routes.push(format!("route add fd00:10:244:{}::/64 via {}", node.number, node.v6()));
    }
    lab.switch.ip(&routes).unwrap();
    only(lab, AT_ROUTER, 1500);
    let server = Server::start(&lab.outside, "far", &FAR.map(|address| (address, TARGET).into())).unwrap();
    (cluster, server)
}

/// The MTU of a route, locked because only then forwarding over IPv6 obeys it. A wide route has none: a lock would keep the node
/// itself from learning.
fn limit(mtu: u32) -> String {
    if mtu < 1500 { format!("mtu lock {mtu}") } else { String::new() }
}

/// Narrows one place and widens the others.
fn only(lab: &Lab, narrow: fn(&Lab, u32), mtu: u32) {
    for place in [BETWEEN, AT_ENDPOINT, AT_CLIENT, AT_ROUTER] {
        place(lab, 1500);
    }
    narrow(lab, mtu);
}

/// Narrows the router's way to the far machine.
fn narrow_to_far(lab: &Lab, mtu: u32) {
    let limit = limit(mtu);
    let [v4, v6] = FAR;
    lab.switch
        .ip(&[
            format!("route replace {v4}/32 via {} dev br0 {limit}", topology::OUTSIDE_V4),
            format!("route replace {v6}/128 via {} dev br0 {limit}", topology::OUTSIDE_V6),
        ])
        .unwrap();
}

/// Narrows a node's way to one of its pods.
fn narrow_to_pod(lab: &Lab, node: u8, pod: u8, mtu: u32) {
    let limit = limit(mtu);
    let pod = lab.pod(node, pod);
    let device = &pod.host_device;
    lab.node(node)
        .netns
        .ip(&[
            format!("route replace {}/32 dev {device} {limit}", pod.v4),
            format!("route replace {}/128 dev {device} {limit}", pod.v6),
        ])
        .unwrap();
}

/// Narrows node 1's way to the pods of node 2.
fn narrow_between_nodes(lab: &Lab, mtu: u32) {
    let limit = limit(mtu);
    let to = lab.node(2);
    lab.node(1)
        .netns
        .ip(&[
            format!("route replace 10.244.2.0/24 via {} {limit}", to.v4()),
            format!("route replace fd00:10:244:2::/64 via {} {limit}", to.v6()),
        ])
        .unwrap();
}

/// What a connected socket knows about its path.
fn known_mtu(socket: &impl std::os::fd::AsRawFd, to: SocketAddr) -> i32 {
    let (level, name) =
        if to.is_ipv4() { (libc::IPPROTO_IP, libc::IP_MTU) } else { (libc::IPPROTO_IPV6, libc::IPV6_MTU) };
    option(socket, level, name).unwrap()
}

/// What a namespace has learnt about the path to an address; the interface's MTU if nothing.
fn learnt_mtu(netns: &Netns, to: IpAddr) -> u32 {
    let text = netns.exec("ip", &["route", "get", &to.to_string()]).unwrap();
    let mut words = text.split_whitespace().skip_while(|word| *word != "mtu");
    words.nth(1).map_or(1500, |word| word.parse().unwrap())
}

/// One narrow place and who sends through it. Numbers of MTU fall from case to case, so that what was learnt before isn't taken for
/// what is learnt now.
struct Case {
    what: &'static str,
    narrow: fn(&Lab, u32),
    client: fn(&Lab) -> Client,
    service: u16,
    by: By,
}

const POD: fn(&Lab) -> Client = |lab| lab.client(lab.pod(1, 1));
const OUTSIDE: fn(&Lab) -> Client = Lab::outside_client;
const HOST: fn(&Lab) -> Client = |lab| lab.host_client(lab.node(1));
const BETWEEN: fn(&Lab, u32) = narrow_between_nodes;
const AT_ENDPOINT: fn(&Lab, u32) = |lab, mtu| narrow_to_pod(lab, 2, 1, mtu);
const AT_ROUTER: fn(&Lab, u32) = narrow_to_far;

#[rustfmt::skip]
const REQUESTS: [Case; 9] = [
    Case { what: "this node says so to its pod", narrow: BETWEEN, client: POD, service: 12, by: By::ClusterIp },
    Case { what: "this node says so to its pod, masqueraded", narrow: BETWEEN, client: POD, service: 12, by: By::NodePort(1) },
    Case { what: "this node says so to the outside", narrow: BETWEEN, client: OUTSIDE, service: 12, by: By::NodePort(1) },
    Case { what: "the other node says so to a pod", narrow: AT_ENDPOINT, client: POD, service: 12, by: By::ClusterIp },
    Case { what: "the other node says so to the outside", narrow: AT_ENDPOINT, client: OUTSIDE, service: 12, by: By::LoadBalancer },
    Case { what: "the other node says so to this node", narrow: AT_ENDPOINT, client: HOST, service: 12, by: By::ClusterIp },
    Case { what: "a router says so to a pod", narrow: AT_ROUTER, client: POD, service: FAR_SERVICE, by: By::ClusterIp },
    Case { what: "a router says so to a pod, masqueraded", narrow: AT_ROUTER, client: POD, service: FAR_SERVICE, by: By::NodePort(1) },
    Case { what: "a router says so to the outside", narrow: AT_ROUTER, client: OUTSIDE, service: FAR_SERVICE, by: By::NodePort(1) },
];

/// The MTU of a case: every one lower than those before.
fn mtu(index: usize) -> u32 {
    1480 - 20 * u32::try_from(index).unwrap()
}

#[test]
fn a_client_that_sends_too_much_hears_of_it_about_the_frontend_and_gets_through() {
    let mut wrong = Vec::new();
    for cni_rules in [false, true] {
        let (cluster, _far) = cluster(cni_rules);
        for (index, case) in REQUESTS.iter().enumerate() {
            let mtu = mtu(index);
            only(&cluster.lab, case.narrow, mtu);
            let client = (case.client)(&cluster.lab);
            for to in case.by.addresses(case.service) {
                let what = format!("CNI rules {cni_rules}, {}: {to}", case.what);
                let mut stream = match client.connect(to) {
                    Ok(stream) => stream,
                    Err(error) => {
                        wrong.push(format!("{what}: {error}"));
                        continue;
                    }
                };
                if let Err(error) = upload(&mut stream, BULK, 7) {
                    wrong.push(format!("{what}: {error}"));
                } else if known_mtu(&stream, to) != mtu.cast_signed() {
                    wrong.push(format!("{what}: the socket knows {}, not {mtu}", known_mtu(&stream, to)));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_datagram_that_must_not_be_fragmented_is_told_the_mtu_of_the_path() {
    let mut wrong = Vec::new();
    for cni_rules in [false, true] {
        let (cluster, _far) = cluster(cni_rules);
        for (index, case) in REQUESTS.iter().enumerate() {
            let mtu = mtu(index);
            only(&cluster.lab, case.narrow, mtu);
            let client = (case.client)(&cluster.lab);
            for to in case.by.addresses(case.service) {
                if let Err(error) = datagrams_are_told(&client, to, mtu) {
                    wrong.push(format!("CNI rules {cni_rules}, {}: {to}: {error}", case.what));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Sends datagrams as long as the link until one is refused for its length, and one that just fits after it.
fn datagrams_are_told(client: &Client, to: SocketAddr, mtu: u32) -> io::Result<()> {
    let socket = client.udp(to)?;
    socket.connect(to)?;
    let headers = if to.is_ipv4() { 20 + 8 } else { 40 + 8 };
    if to.is_ipv4() {
        set_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)?;
    } else {
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)?;
    }
    let before = usize::try_from(known_mtu(&socket, to)).unwrap();
    let start = Instant::now();
    loop {
        match socket.send(&vec![1; before - headers]) {
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => break,
            Err(error) => return Err(error),
            Ok(_) if start.elapsed() > Duration::from_secs(1) => return Err(io::Error::other("never told")),
            Ok(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
    if known_mtu(&socket, to) != mtu.cast_signed() {
        return Err(io::Error::other(format!("the socket knows {}, not {mtu}", known_mtu(&socket, to))));
    }
    // What was under way when the first error came is answered with errors too.
    thread::sleep(Duration::from_millis(20));
    socket.take_error()?;
    echo(&socket, usize::try_from(mtu).unwrap() - headers)
}

fn echo(socket: &UdpSocket, length: usize) -> io::Result<()> {
    socket.send(&vec![2; length])?;
    let mut buffer = [0; 2048];
    let got = socket.recv(&mut buffer)?;
    if got == length { Ok(()) } else { Err(io::Error::other(format!("{got} bytes came back of {length}"))) }
}

/// A narrow place on the way to the client.
struct Reply {
    what: &'static str,
    narrow: fn(&Lab, u32),
    /// Whether the client is the far machine, else pod 1 of node 1.
    far: bool,
    /// The Service's number, and node and number of its endpoint.
    service: (u16, (u8, u8)),
    by: By,
    masqueraded: bool,
}

const AT_CLIENT: fn(&Lab, u32) = |lab, mtu| narrow_to_pod(lab, 1, 1, mtu);

#[rustfmt::skip]
const REPLIES: [Reply; 5] = [
    Reply { what: "this node says so about its pod", narrow: AT_CLIENT, far: false, service: (12, (2, 1)), by: By::ClusterIp, masqueraded: false },
    Reply { what: "this node says so about its pod, masqueraded", narrow: AT_CLIENT, far: false, service: (12, (2, 1)), by: By::NodePort(1), masqueraded: true },
    Reply { what: "a router says so, the endpoint is here", narrow: AT_ROUTER, far: true, service: (11, (1, 1)), by: By::NodePort(1), masqueraded: true },
    Reply { what: "a router says so, the endpoint is there", narrow: AT_ROUTER, far: true, service: (12, (2, 1)), by: By::NodePort(1), masqueraded: true },
    Reply { what: "a router says so, by a LoadBalancer address", narrow: AT_ROUTER, far: true, service: (12, (2, 1)), by: By::LoadBalancer, masqueraded: true },
];

#[test]
fn an_endpoint_that_sends_too_much_hears_of_it_about_the_client_that_it_sees() {
    let mut wrong = Vec::new();
    for cni_rules in [false, true] {
        let (cluster, _far) = cluster(cni_rules);
        let lab = &cluster.lab;
        for (index, case) in REPLIES.iter().enumerate() {
            let mtu = mtu(index);
            only(lab, case.narrow, mtu);
            let (service, (node, pod)) = case.service;
            for (family, to) in case.by.addresses(service).into_iter().enumerate() {
                let what = format!("CNI rules {cni_rules}, {}: {to}", case.what);
                let stream = if case.far {
                    lab.outside_client().connect_from((FAR[family], 0).into(), to)
                } else {
                    POD(lab).connect(to)
                };
                let mut stream = match stream {
                    Ok(stream) => stream,
                    Err(error) => {
                        wrong.push(format!("{what}: {error}"));
                        continue;
                    }
                };
                let seen = tests::traffic::client::ask_on(&mut stream).unwrap().from.ip();
                let client = stream.local_addr().unwrap().ip();
                if (seen != client) != case.masqueraded {
                    wrong.push(format!("{what}: seen as {seen}"));
                }
                if let Err(error) = download(&mut stream, BULK, 7) {
                    wrong.push(format!("{what}: {error}"));
                    continue;
                }
                let learnt = learnt_mtu(&lab.pod(node, pod).netns, seen);
                if learnt != mtu {
                    wrong.push(format!("{what}: the endpoint knows {learnt} to {seen}, not {mtu}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}
