//! Refusals: at once and whole, whoever computes checksums, by every address of a Service that has no endpoint and every port that a
//! ClusterIP does not have.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tests::cluster::{By, Cluster, addressed, clients, refused};
use tests::manifest::Service;
use tests::traffic::socket::ping;
use tests::{Client, Netns, Protocol, Topology, Wiring};

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::UdpUnconnected];

/// How soon a refusal must be there.
const AT_ONCE: Duration = Duration::from_millis(100);

/// A lab with a Service that has no endpoints, number 20.
fn cluster(topology: Topology) -> Cluster {
    let cluster = Cluster::new(topology, &[], |lab| {
        lab.manifests().write("service.json", addressed(Service::new("empty").selector("app", "nobody"), 20));
    });
    // Whoever asks first must not find an agent that has read half.
    let (_, client) = clients(&cluster.lab).remove(0);
    for to in By::ClusterIp.addresses(20) {
        client.ask_until(Protocol::Tcp, to, Duration::from_secs(2), refused).unwrap();
    }
    cluster
}

/// Asks once; the error says what is wrong with the refusal.
fn is_refused_at_once(client: &Client, protocol: Protocol, to: SocketAddr) -> Result<(), String> {
    let (took, answer) = client.ask_timed(protocol, to);
    if !refused(&answer) {
        return Err(format!("{protocol:?} {to}: {answer:?}"));
    }
    if took > AT_ONCE {
        // The machine may be busy; twice in a row it isn't that.
        let (again, _) = client.ask_timed(protocol, to);
        if again > AT_ONCE {
            return Err(format!("{protocol:?} {to}: refused after {took:?} and {again:?}"));
        }
    }
    Ok(())
}

fn set_offload(netns: &Netns, device: &str, on: bool) {
    netns.exec("ethtool", &["-K", device, "tx", if on { "on" } else { "off" }]).unwrap();
}

#[test]
fn a_refusal_has_right_checksums_whoever_computes_them() {
    let mut wrong = Vec::new();
    for wiring in [Wiring::Ptp, Wiring::Bridge { hairpin_mode: false, netfilter: false }] {
        let cluster = cluster(Topology { wiring, cni_rules: true, ..Topology::default() });
        let lab = &cluster.lab;
        let pod = lab.pod(1, 1);
        for (pods, hosts) in [(true, true), (true, false), (false, true), (false, false)] {
            set_offload(&pod.netns, "eth0", pods);
            set_offload(&lab.node(1).netns, &pod.host_device, hosts);
            set_offload(&lab.outside, "eth0", pods);
            set_offload(&lab.node(1).netns, "eth0", hosts);
            for (name, client) in [("a pod", lab.client(pod)), ("outside", lab.outside_client())] {
                for by in By::ALL {
                    if name == "outside" && by == By::ClusterIp {
                        continue;
                    }
                    for to in by.addresses(20) {
                        for protocol in PROTOCOLS {
                            if let Err(error) = is_refused_at_once(&client, protocol, to) {
                                wrong.push(format!("{wiring:?}, offload {pods} {hosts}: {name} by {by:?}: {error}"));
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_port_that_a_cluster_ip_does_not_have_is_refused_to_everyone_inside() {
    let cluster = cluster(Topology { cni_rules: true, ..Topology::default() });
    let mut wrong = Vec::new();
    for (name, client) in clients(&cluster.lab) {
        if name == "outside" {
            continue;
        }
        for to in By::ClusterIp.addresses(20) {
            for protocol in PROTOCOLS {
                for port in [1, 81, 8080, 65_535] {
                    if let Err(error) = is_refused_at_once(&client, protocol, (to.ip(), port).into()) {
                        wrong.push(format!("{name}: {error}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_ping_to_a_cluster_ip_is_answered_by_unreachable() {
    for wiring in [Wiring::Ptp, Wiring::Bridge { hairpin_mode: false, netfilter: false }] {
        let cluster = cluster(Topology { wiring, cni_rules: true, ..Topology::default() });
        let lab = &cluster.lab;
        for offload in [true, false] {
            set_offload(&lab.pod(1, 1).netns, "eth0", offload);
            for to in By::ClusterIp.addresses(20) {
                let start = Instant::now();
                let result: io::Result<()> = lab.pod(1, 1).netns.run(|| ping(to.ip(), Duration::from_secs(1)));
                assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
                assert!(start.elapsed() < AT_ONCE * 2, "{to}: {:?}", start.elapsed());
            }
        }
        // Who is there answers: it is no rule against ping.
        for address in [IpAddr::from(lab.pod(2, 1).v4), lab.pod(2, 1).v6.into()] {
            lab.pod(1, 1).netns.run(|| ping(address, Duration::from_secs(1))).unwrap();
        }
    }
}
