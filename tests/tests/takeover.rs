//! A node where kube-proxy was at work: its connections go on, and new ones are ours.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::net::SocketAddr;

use tests::cluster::{By, TARGET, addressed, one_service_a_kind};
use tests::command;
use tests::manifest::{Service, node_object};
use tests::traffic::client::{ask_on, echo_on};
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
