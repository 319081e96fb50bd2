//! An API server, or something between, that keeps connections open and says nothing: to an agent that starts, and to one that runs.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::cluster::{TARGET, cluster_ips};
use tests::manifest::{Service, SliceEndpoint, endpoint_slice};
use tests::{Agent, Lab, Pod, Protocol, Topology, WatchServer};

/// A connection is given up after two minutes without a word; then there are pauses between attempts.
const GIVEN_UP: Duration = Duration::from_secs(180);

fn slices(pod: &Pod) -> [Value; 2] {
    [(IpAddr::from(pod.v4), "v4"), (pod.v6.into(), "v6")].map(|(address, family)| {
        let endpoint = SliceEndpoint { address, node: pod.node.clone(), serving: true, terminating: false };
        let ports = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];
        endpoint_slice(&format!("web-{family}"), "web", &ports, &[endpoint])
    })
}

#[test]
fn connections_that_say_nothing_are_given_up_and_nothing_is_missed() {
    let lab = Lab::new(Topology { nodes: 2, ..Topology::default() });
    let _servers = [lab.pod(1, 1), lab.pod(1, 2)].map(|pod| lab.serve(pod, TARGET));
    let server = WatchServer::start(&lab).unwrap();
    server.put(Service::new("web").dual_stack(10).port("tcp", "TCP", 80, TARGET).port("udp", "UDP", 80, TARGET));
    slices(lab.pod(1, 1)).into_iter().for_each(|slice| server.put(slice));
    let running = Agent::start_on_api_server(&lab, lab.node(1), server.kubeconfig(), &[]);
    let expect = |node: u8, pod: &str, limit: Duration| {
        let client = lab.client(lab.pod(node, 2)).with_timeout(Duration::from_millis(500));
        for to in cluster_ips(10) {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                client
                    .ask_until(protocol, to, limit, |answer| answer.as_ref().is_ok_and(|answer| answer.by == pod))
                    .unwrap_or_else(|error| panic!("{protocol:?} {to} is not {pod}'s on node {node}: {error}"));
            }
        }
    };
    expect(1, "p1-1", Duration::from_secs(5));

    server.go_mute();
    let before = server.connections();
    let mut starting = Agent::spawn_on_api_server(&lab, lab.node(2), server.kubeconfig(), &[]).unwrap();
    slices(lab.pod(1, 2)).into_iter().for_each(|slice| server.put(slice));
    let start = Instant::now();
    // All that it asks for is under way, each on a connection of its own.
    while server.connections() < before + 4 {
        assert!(start.elapsed() < Duration::from_secs(10), "{} connections", server.connections());
        thread::sleep(Duration::from_millis(10));
    }
    // What the server has to say is not heard: this is what is tested.
    assert!(starting.wait_ready(Duration::from_secs(1)).is_err());
    expect(1, "p1-1", Duration::from_millis(500));

    server.speak_again();
    starting.wait_ready(GIVEN_UP).unwrap();
    expect(2, "p1-2", Duration::from_secs(5));
    expect(1, "p1-2", GIVEN_UP);
    for agent in [&running, &starting] {
        assert_eq!(agent.cli_json(&["status"])["problems"], serde_json::json!([]));
    }
}
