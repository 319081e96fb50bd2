//! Refusals: at once and whole, whoever computes checksums, by every address of a Service that has no endpoint and every port that a
//! ClusterIP does not have.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde_json::json;
use tests::cluster::{By, Cluster, addressed, clients, refused};
use tests::manifest::{PodObject, Service};
use tests::traffic::socket::ping;
use tests::{Client, Netns, Protocol, Server, Topology, Wiring, topology};

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

#[test]
fn what_the_policy_drops_does_not_leave_the_node_by_its_own_sockets() {
    let cidrs = ["10.96.0.0/16", "fd00:10:96::/64"];
    let cluster = Cluster::new(Topology::default(), &[], |lab| {
        // All endpoints of the first are on the other node; the second takes nobody of this cluster.
        let elsewhere = Service::new("elsewhere").selector("app", "p2-1");
        let local = addressed(elsewhere, 21).spec("internalTrafficPolicy", "Local");
        lab.manifests().write("elsewhere.json", local);
        let ranged = addressed(Service::new("ranged").selector("app", "p2-1"), 22);
        lab.manifests()
            .write("ranged.json", ranged.spec("loadBalancerSourceRanges", json!(["192.0.2.0/24", "2001:db8::/32"])));
        let pod = lab.pod(2, 1);
        lab.manifests().write("pod.json", PodObject::of(pod).label("app", "p2-1"));
        lab.manifests().write(
            "cidrs.json",
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
                   "spec": {"cidrs": cidrs}}),
        );
    });
    let lab = &cluster.lab;
    let client = lab.host_client(lab.node(1)).with_timeout(Duration::from_millis(300));
    let dropped: Vec<SocketAddr> =
        [By::ClusterIp.addresses(21), By::LoadBalancer.addresses(22), By::ClusterIp.addresses(23)].concat();
    for to in By::ClusterIp.addresses(22) {
        client.ask_until(Protocol::Tcp, to, Duration::from_secs(2), |answer| answer.is_ok()).unwrap();
    }
    // Whatever leaves the node for these addresses is answered from outside.
    let servers: Vec<_> = dropped
        .iter()
        .map(|to| {
            let (address, gateway) = match to.ip() {
                IpAddr::V4(ip) => (format!("{ip}/32"), topology::OUTSIDE_V4.to_string()),
                IpAddr::V6(ip) => (format!("{ip}/128 nodad"), topology::OUTSIDE_V6.to_string()),
            };
            lab.outside.ip(&[format!("address add {address} dev lo")]).unwrap();
            let route = format!("route add {} via {gateway}", address.trim_end_matches(" nodad"));
            lab.node(1).netns.ip(&[route]).unwrap();
            Server::start(&lab.outside, "outside", &[*to]).unwrap()
        })
        .collect();
    for to in dropped {
        for (protocol, expected) in [
            (Protocol::Tcp, ErrorKind::TimedOut),
            (Protocol::Udp, ErrorKind::TimedOut),
            (Protocol::UdpUnconnected, ErrorKind::PermissionDenied),
        ] {
            let answer = client.ask(protocol, to).map_err(|error| error.kind());
            assert_eq!(answer.as_ref().err(), Some(&expected), "{protocol:?} {to}: {answer:?}");
        }
    }
    assert!(servers.iter().all(|server| server.served() == 0), "a packet left the node");
}
