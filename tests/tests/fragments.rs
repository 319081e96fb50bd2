//! Fragments: long datagrams arrive whole, there and back, however their fragments are cut; what can't be told is dropped and counted.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use tests::cluster::{By, Cluster, KINDS, clients, one_service_a_kind, own_addresses};
use tests::traffic::client::echo_on;
use tests::traffic::packet::{ends, ip_fragment, ip_packet, udp};
use tests::traffic::socket::{send_raw, set_option};
use tests::{Agent, Client, Lab, Topology, Wiring};

/// The MTU of links with jumbo frames.
const JUMBO: usize = 9000;

/// Enough for six fragments on a usual link.
const LONG: usize = 8192;

#[test]
fn long_datagrams_arrive_whole_and_so_do_their_answers() {
    let bridge = |netfilter| Wiring::Bridge { hairpin_mode: true, netfilter };
    let mut wrong = Vec::new();
    for (wiring, cni_rules) in
        [(Wiring::Ptp, false), (Wiring::Ptp, true), (bridge(false), false), (bridge(false), true), (bridge(true), true)]
    {
        let topology = Topology { wiring, cni_rules, ..Topology::default() };
        let cluster = Cluster::new(topology, &[], one_service_a_kind);
        let mut overtook = overtakers(&cluster);
        for (name, client) in clients(&cluster.lab) {
            let client = client.with_timeout(Duration::from_millis(500));
            for (number, endpoint) in KINDS {
                for by in By::ALL {
                    if name == "outside" && by == By::ClusterIp {
                        continue;
                    }
                    for to in by.addresses(number) {
                        if let Err(error) = echo(&cluster, &client, to, &mut overtook) {
                            wrong.push(format!(
                                "{wiring:?}, CNI rules {cni_rules}: {name} to {endpoint} by {to}: {error}"
                            ));
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Sends long datagrams and gets them back. Where the sender is moved to another CPU between two fragments, they go on through two
/// queues, and one that overtakes the first is dropped and counted: only then is it tried again. `overtook`: how many were counted so far.
fn echo(cluster: &Cluster, client: &Client, to: SocketAddr, overtook: &mut u64) -> io::Result<()> {
    for _ in 0..4 {
        match client.echo_datagrams(to, LONG, 2) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                let before = std::mem::replace(overtook, overtakers(cluster));
                if *overtook == before {
                    return Err(error);
                }
            }
            result => return result,
        }
    }
    client.echo_datagrams(to, LONG, 2)
}

/// Fragments that came before the first one of their datagram, on all nodes.
fn overtakers(cluster: &Cluster) -> u64 {
    cluster.agents.iter().map(fragments_without_first).sum()
}

fn fragments_without_first(agent: &Agent) -> u64 {
    agent.cli_json(&["status"])["packets"]["fragment_without_first"].as_u64().expect("`fairlead status` has this count")
}

/// Makes every link of a lab as wide as networks with jumbo frames have them.
fn widen(lab: &Lab) {
    let nodes = (1..=lab.topology().nodes).map(|number| &lab.node(number).netns);
    // The switch last: a bridge is as wide as its ports.
    for netns in nodes.chain(lab.pods().map(|pod| &pod.netns)).chain([&lab.outside, &lab.switch]) {
        let links = netns.exec("ip", &["-brief", "link"]).unwrap();
        let mut names: Vec<&str> = links.lines().filter_map(|line| line.split([' ', '@']).next()).collect();
        names.retain(|name| *name != "lo");
        names.sort_by_key(|name| name.starts_with("br") || name.starts_with("cni"));
        netns.ip(&names.iter().map(|name| format!("link set {name} mtu {JUMBO}")).collect::<Vec<_>>()).unwrap();
    }
}

#[test]
fn jumbo_frames_arrive_whole_and_so_do_their_answers() {
    let mut wrong = Vec::new();
    for wiring in [Wiring::Ptp, Wiring::Bridge { hairpin_mode: true, netfilter: true }] {
        let topology = Topology { wiring, cni_rules: true, ..Topology::default() };
        let cluster = Cluster::new(topology, &[], one_service_a_kind);
        widen(&cluster.lab);
        for (name, client) in clients(&cluster.lab) {
            for (number, endpoint) in KINDS {
                for by in By::ALL.into_iter().filter(|by| name != "outside" || *by != By::ClusterIp) {
                    for to in by.addresses(number) {
                        if let Err(error) = echo_unfragmented(&client, to) {
                            wrong.push(format!("{wiring:?}: {name} to {endpoint} by {to}: {error}"));
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// A datagram as long as the link, which must not be fragmented, and as much over TCP.
fn echo_unfragmented(client: &Client, to: SocketAddr) -> io::Result<()> {
    let socket = client.udp(to)?;
    socket.connect(to)?;
    let headers = if to.is_ipv4() { 20 + 8 } else { 40 + 8 };
    let (level, name, whole) = if to.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)
    };
    set_option(&socket, level, name, whole)?;
    let sent = vec![7; JUMBO - headers];
    socket.send(&sent)?;
    let mut received = vec![0; JUMBO];
    let length = socket.recv(&mut received)?;
    if received[..length] != sent {
        return Err(io::Error::other(format!("{length} bytes came back")));
    }
    echo_on(&mut client.connect(to)?, 3 * JUMBO, 7)
}

#[test]
fn a_fragment_that_overtakes_its_first_is_dropped_and_counted() {
    let cluster = Cluster::new(Topology::default(), &[], one_service_a_kind);
    let lab = &cluster.lab;
    let pod = lab.pod(1, 1);
    // Service 12, whose endpoint is the first pod of node 2.
    let server = &cluster.servers[lab.pods().position(|pod| pod.name == "p2-1").unwrap()];
    let dropped = || fragments_without_first(&cluster.agents[0]);
    for (family, to) in By::ClusterIp.addresses(12).into_iter().enumerate() {
        let from: IpAddr = own_addresses(lab, "p1-1")[family];
        let from = SocketAddr::new(from, 45_000);
        let datagram = udp(from, to, &[b'x'; 1000]);
        let (first, second) = datagram.split_at(512);
        let send = |id: u32, swapped: bool| {
            let mut packets =
                [ip_fragment(ends(from, to), id, 0, true, first), ip_fragment(ends(from, to), id, 512, false, second)];
            if swapped {
                packets.reverse();
            }
            for packet in packets {
                pod.netns.run(|| send_raw(to, &packet)).unwrap();
            }
            thread::sleep(Duration::from_millis(100));
        };
        let (served, lost) = (server.served(), dropped());
        send(0x1001, false);
        assert_eq!(server.served(), served + 1, "{to}: fragments in order make a datagram");
        assert_eq!(dropped(), lost, "{to}: nothing is lost in order");
        send(0x1002, true);
        assert_eq!(server.served(), served + 1, "{to}: half a datagram is none");
        assert_eq!(dropped(), lost + 1, "{to}: the overtaker is counted");
        send(0x1003, false);
        assert_eq!(server.served(), served + 2, "{to}: and the next one arrives");
        // Of the whole datagram nothing would be lost.
        let whole = ip_packet(ends(from, to), &datagram);
        pod.netns.run(|| send_raw(to, &whole)).unwrap();
        thread::sleep(Duration::from_millis(100));
        assert_eq!(server.served(), served + 3, "{to}");
    }
}
