//! One socket and many Services: each has its own endpoint, its own answers and its own memory.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use tests::bpf::PinnedMap;
use tests::cluster::{Cluster, TARGET, cluster_ips};
use tests::manifest::{PodObject, Service, SliceEndpoint, endpoint_slice};
use tests::traffic::client::{ask_datagram, ask_on};
use tests::{Client, Protocol, Server, Topology};

const SERVICES: u16 = 40;

/// The port of an endpoint: all of them are on one pod.
const fn target(number: u16) -> u16 {
    9000 + number
}

fn frontends(number: u16) -> [SocketAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 256 + number);
    [SocketAddr::from(([10, 96, 1, number.to_be_bytes()[1]], 80)), SocketAddr::from((v6, 80))]
}

/// Forty Services, each with an endpoint port of its own on pod 1 of node 2; and one more name for the first endpoint.
fn cluster(flags: &[&str]) -> (Cluster, Vec<Server>) {
    let cluster = Cluster::new(Topology::default(), flags, |lab| {
        let pod = lab.pod(2, 1);
        let one = |number: u16, target: u16| {
            Service::new(&format!("s{number}"))
                .selector("app", "many")
                .dual_stack(256 + number)
                .port("tcp", "TCP", 80, target)
                .port("udp", "UDP", 80, target)
        };
        lab.manifests().write_list("services.json", (0..SERVICES).map(|number| one(number, target(number))));
        lab.manifests().write("alias.json", one(SERVICES, target(0)));
        lab.manifests().write("pod.json", PodObject::of(pod).label("app", "many"));
    });
    let pod = cluster.lab.pod(2, 1);
    let servers = (0..SERVICES)
        .map(|number| {
            let addresses = [SocketAddr::from((pod.v4, target(number))), SocketAddr::from((pod.v6, target(number)))];
            Server::start(&pod.netns, &format!("e{number}"), &addresses).unwrap()
        })
        .collect();
    (cluster, servers)
}

/// Who asks, and how many Services at once: a socket of the node remembers sixteen.
fn askers(cluster: &Cluster) -> [(&'static str, Client, u16); 2] {
    let lab = &cluster.lab;
    [("a pod", lab.client(lab.pod(1, 1)), SERVICES), ("the node", lab.host_client(lab.node(1)), 16)]
}

#[test]
fn one_udp_socket_talks_to_forty_services_at_once() {
    let (cluster, _servers) = cluster(&[]);
    for (who, client, services) in askers(&cluster) {
        for family in [0, 1] {
            let socket = client.udp(frontends(0)[family]).unwrap();
            for round in 0..3 {
                // All questions first, then all answers: forty connections of one port are alive together.
                for number in 0..services {
                    socket.send_to(b"who", frontends(number)[family]).unwrap();
                }
                let mut answers = BTreeMap::new();
                let mut buffer = [0; 256];
                for _ in 0..services {
                    let (length, from) = socket.recv_from(&mut buffer).unwrap_or_else(|error| {
                        panic!("{who}, round {round}: {} of {services} answers, then {error}", answers.len())
                    });
                    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                    answers.insert(from, text.split(' ').next().unwrap().to_owned());
                }
                for number in 0..services {
                    let from = frontends(number)[family];
                    assert_eq!(answers.get(&from), Some(&format!("e{number}")), "{who}, round {round}: {from}");
                }
            }
        }
    }
}

#[test]
fn one_udp_socket_of_a_pod_reaches_one_endpoint_by_two_names() {
    let (cluster, _servers) = cluster(&[]);
    let client = cluster.lab.client(cluster.lab.pod(1, 1));
    for family in [0, 1] {
        let (one, two) = (frontends(0)[family], frontends(SERVICES)[family]);
        let socket = client.udp(one).unwrap();
        for round in 0..3 {
            // An answer from another address than the one that was asked is an error.
            for to in [one, two] {
                let answer = ask_datagram(&socket, to);
                assert_eq!(answer.unwrap_or_else(|error| panic!("round {round}: {to}: {error}")).by, "e0");
            }
        }
    }
}

/// What is not as it should be when one socket asks every Service.
fn ask_every_service(socket: &UdpSocket, family: usize) -> Vec<String> {
    let mut wrong = Vec::new();
    for number in 0..SERVICES {
        let to = frontends(number)[family];
        match ask_datagram(socket, to) {
            Ok(answer) if answer.by == format!("e{number}") => {}
            other => wrong.push(format!("{to}: {other:?}")),
        }
    }
    wrong
}

#[test]
fn an_entry_that_is_evicted_costs_no_other_connection_and_comes_back() {
    let (cluster, _servers) = cluster(&[]);
    let lab = &cluster.lab;
    let flows = PinnedMap::open(&lab.bpffs(lab.node(1)).join("v1/flows/FLOWS")).unwrap();
    let client = lab.client(lab.pod(1, 1)).with_timeout(Duration::from_millis(100));
    let sockets = [0, 1].map(|family| client.udp(frontends(0)[family]).unwrap());
    let ask_all = || -> Vec<String> {
        sockets.iter().enumerate().flat_map(|(family, socket)| ask_every_service(socket, family)).collect()
    };
    assert_eq!(ask_all(), Vec::<String>::new());
    let keys = flows.keys().unwrap();
    assert_eq!(keys.len(), 4 * usize::from(SERVICES), "two entries each");
    let evicted: Vec<_> = keys.iter().step_by(keys.len() / 8).collect();
    for key in &evicted {
        flows.remove(key).unwrap();
    }
    let wrong = ask_all();
    assert!(wrong.len() <= evicted.len(), "{} entries are gone: {wrong:?}", evicted.len());
    // Once in eight seconds one entry asks whether the other is there.
    thread::sleep(Duration::from_secs(9));
    ask_all();
    // An answer that came untranslated may still wait in a socket.
    for socket in &sockets {
        while socket.recv(&mut [0; 256]).is_ok() {}
    }
    assert_eq!(ask_all(), Vec::<String>::new(), "nine seconds later");
}

#[test]
fn a_flood_that_nobody_answers_takes_no_connections_place_that_was_answered() {
    // Room for 2,048 entries of connections that were answered, and for 512 of others.
    let (cluster, _servers) = cluster(&["--flows", "1024"]);
    let lab = &cluster.lab;
    let silent = Service::new("silent").selector("app", "many").dual_stack(600).port("udp", "UDP", 80, 9);
    lab.manifests().write("silent.json", silent);
    let maps = lab.bpffs(lab.node(1)).join("v1/flows");
    let [flows, new_flows] = ["FLOWS", "NEW_FLOWS"].map(|name| PinnedMap::open(&maps.join(name)).unwrap());
    let client = lab.client(lab.pod(1, 1));
    let sockets = [0, 1].map(|family| client.udp(frontends(0)[family]).unwrap());
    let ask_all = || -> Vec<String> {
        sockets.iter().enumerate().flat_map(|(family, socket)| ask_every_service(socket, family)).collect()
    };
    assert_eq!(ask_all(), Vec::<String>::new());
    let mut streams: Vec<_> = (0..SERVICES).flat_map(frontends).map(|to| (to, client.connect(to).unwrap())).collect();
    for (to, stream) in &mut streams {
        assert!(ask_on(stream).is_ok(), "{to}");
    }
    let answered: BTreeSet<_> = flows.keys().unwrap().into_iter().collect();
    assert_eq!(answered.len(), 8 * usize::from(SERVICES), "two entries of each");

    let evicted = || {
        let status = cluster.agents[0].cli_json(&["status"]);
        let map = status["maps"].as_array().unwrap().iter().find(|map| map["name"] == "NEW_FLOWS").unwrap();
        map["evicted"].as_u64().unwrap()
    };
    let before = evicted();
    for to in cluster_ips(600) {
        for _ in 0..3000 {
            // Refused at most: nobody listens.
            let _ = client.udp(to).unwrap().send_to(b"?", to);
        }
    }
    assert!(evicted() > before + 2000, "{before}, then {}", evicted());
    assert!(new_flows.keys().unwrap().len() <= 512);
    let left: BTreeSet<_> = flows.keys().unwrap().into_iter().collect();
    assert_eq!(answered.difference(&left).count(), 0);
    assert_eq!(ask_all(), Vec::<String>::new());
    for (to, stream) in &mut streams {
        assert!(ask_on(stream).is_ok(), "{to}");
    }
}

#[test]
fn a_service_that_goes_takes_no_other_with_it() {
    let (cluster, _servers) = cluster(&[]);
    let lab = &cluster.lab;
    let client = lab.client(lab.pod(1, 1));
    let sockets = [client.udp(frontends(0)[0]).unwrap(), client.udp(frontends(0)[1]).unwrap()];
    let ask_all = |from: u16| {
        for (family, socket) in sockets.iter().enumerate() {
            for number in from..SERVICES {
                let to = frontends(number)[family];
                let answer = ask_datagram(socket, to).unwrap_or_else(|error| panic!("{to}: {error}"));
                assert_eq!(answer.by, format!("e{number}"));
            }
        }
    };
    ask_all(0);
    // The first one's endpoint is another from now on.
    let pod = lab.pod(1, 2);
    for (address, family) in [(IpAddr::from(pod.v4), "v4"), (pod.v6.into(), "v6")] {
        let endpoint = SliceEndpoint { address, node: pod.node.clone(), serving: true, terminating: false };
        let ports = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];
        lab.manifests()
            .write(&format!("slice-{family}.json"), endpoint_slice(&format!("s0-{family}"), "s0", &ports, &[endpoint]));
    }
    for to in frontends(0) {
        client
            .ask_until(Protocol::Udp, to, Duration::from_secs(3), |answer| {
                answer.as_ref().is_ok_and(|answer| answer.by == "p1-2")
            })
            .unwrap();
    }
    for (family, socket) in sockets.iter().enumerate() {
        let to = frontends(0)[family];
        assert_eq!(ask_datagram(socket, to).unwrap().by, "p1-2", "{to}: the socket that was there before");
    }
    ask_all(1);
}

#[test]
fn what_a_full_table_evicts_is_counted() {
    let cluster = Cluster::web(Topology::default(), &["--flows", "1024"]);
    let to = cluster_ips(10)[0];
    let client = cluster.lab.client(cluster.lab.pod(1, 1));
    let map = |name: &str| {
        let status = cluster.agents[0].cli_json(&["status"]);
        let found = status["maps"].as_array().unwrap().iter().find(|map| map["name"] == name).cloned().unwrap();
        (found["used"].as_u64().unwrap(), found["evicted"].as_u64().unwrap())
    };
    for _ in 0..100 {
        client.ask(Protocol::Udp, to).unwrap();
    }
    let (used, evicted) = map("FLOWS");
    assert!((150..=300).contains(&used) && evicted == 0, "{used} entries, {evicted} evicted");
    for _ in 0..3000 {
        client.ask(Protocol::Udp, to).unwrap();
    }
    // Two entries each, or three where the pod reaches itself; some ports come again.
    let (used, evicted) = map("FLOWS");
    assert!(used <= 2048 && (5000..=7800).contains(&(used + evicted)), "{used} entries, {evicted} evicted");
    assert_eq!(map("NEW_FLOWS").1, 0, "each was answered before the next came");
}
