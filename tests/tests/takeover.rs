//! A node where kube-proxy was at work: its connections go on, and new ones are ours.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use tests::cluster::{By, Cluster, TARGET, addressed, one_service_a_kind};
use tests::command;
use tests::manifest::{Service, node_object};
use tests::traffic::client::{ask_on, echo_on};
use tests::traffic::socket::connect_tcp;
use tests::{Agent, Lab, Protocol, Topology};

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
fn a_node_port_among_the_masquerade_ports_is_named_in_the_status() {
    let cluster = Cluster::web(Topology::default(), &["--masquerade-ports", "30000-30127"]);
    let problems = cluster.agents[0].cli_json(&["status"])["problems"].clone();
    let named = |text: &str| text.contains("default/web:tcp") && text.contains("NodePort 30010");
    assert!(problems.as_array().unwrap().iter().any(|text| named(text.as_str().unwrap())), "{problems}");
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
