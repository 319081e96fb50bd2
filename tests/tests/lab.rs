//! The laboratory itself, without an agent: packets arrive, and nothing is left.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tests::folder::{self, Folder};
use tests::traffic::client::ask_datagram;
use tests::{Lab, Pod, Protocol, Topology, Wiring, cgroup, residue, topology};

const PORT: u16 = 8080;

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::UdpUnconnected];

fn addresses(pod: &Pod) -> [SocketAddr; 2] {
    [(pod.v4, PORT).into(), (pod.v6, PORT).into()]
}

fn wirings() -> Vec<Topology> {
    let bridge = |hairpin_mode, netfilter| Wiring::Bridge { hairpin_mode, netfilter };
    [Wiring::Ptp, bridge(false, false), bridge(true, true)]
        .into_iter()
        .flat_map(|wiring| [false, true].map(|cni_rules| Topology { wiring, cni_rules, ..Topology::default() }))
        .collect()
}

#[test]
fn every_pod_reaches_every_pod_and_is_seen_as_itself() {
    for topology in wirings() {
        let lab = Lab::new(topology.clone());
        let servers: Vec<_> = lab.pods().map(|pod| lab.serve(pod, PORT)).collect();
        for client in lab.pods() {
            for server in lab.pods() {
                for to in addresses(server) {
                    for protocol in PROTOCOLS {
                        let answer = lab.client(client).ask(protocol, to);
                        let answer = answer.unwrap_or_else(|error| {
                            panic!(
                                "{topology:?}: {} asks {} at {to} by {protocol:?}: {error}",
                                client.name, server.name
                            )
                        });
                        assert_eq!(answer.by, server.name);
                        let expected: IpAddr = if to.is_ipv4() { client.v4.into() } else { client.v6.into() };
                        assert_eq!(answer.from.ip(), expected, "{topology:?}: {} asks {to}", client.name);
                    }
                }
            }
        }
        if topology.cni_rules {
            assert_eq!(lab.cni_counter(lab.node(1), "invalid"), 0, "{topology:?}");
        }
        drop(servers);
    }
}

#[test]
fn nodes_and_the_outside_reach_pods_and_each_other() {
    let lab = Lab::new(Topology::default());
    let server = lab.serve(lab.pod(2, 1), PORT);
    let _host = lab.serve_on_node(lab.node(1), PORT);
    for protocol in PROTOCOLS {
        for to in addresses(lab.pod(2, 1)) {
            assert_eq!(lab.outside_client().ask(protocol, to).unwrap().by, "p2-1");
            assert_eq!(lab.host_client(lab.node(1)).ask(protocol, to).unwrap().by, "p2-1");
            assert_eq!(lab.host_client(lab.node(2)).ask(protocol, to).unwrap().by, "p2-1");
        }
        for address in [IpAddr::from(lab.node(1).v4()), lab.node(1).v6().into()] {
            assert_eq!(lab.outside_client().ask(protocol, (address, PORT).into()).unwrap().by, "node1");
        }
    }
    assert_eq!(server.served(), 18);
}

#[test]
fn a_cni_masquerades_what_leaves_the_cluster() {
    let lab = Lab::new(Topology { cni_rules: true, ..Topology::default() });
    let _server = lab.serve_outside(PORT);
    for (to, seen) in [
        (IpAddr::from(topology::OUTSIDE_V4), IpAddr::from(lab.node(1).v4())),
        (topology::OUTSIDE_V6.into(), lab.node(1).v6().into()),
    ] {
        let answer = lab.client(lab.pod(1, 1)).ask(Protocol::Tcp, (to, PORT).into()).unwrap();
        assert_eq!(answer.from.ip(), seen);
    }
    assert!(lab.cni_counter(lab.node(1), "masqueraded") > 0);
}

#[test]
fn refusal_and_silence_are_told_apart_and_bounded() {
    let lab = Lab::new(Topology::default());
    let client = lab.client(lab.pod(1, 1)).with_timeout(Duration::from_millis(300));
    for protocol in PROTOCOLS {
        for to in addresses(lab.pod(1, 2)) {
            let error = client.ask(protocol, to).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{protocol:?} {to}");
        }
        for nowhere in ["10.96.0.1:80", "[fd00:10:96::1]:80", "10.99.1.1:80"] {
            let start = Instant::now();
            let error = client.ask(protocol, nowhere.parse().unwrap()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{protocol:?} {nowhere}");
            assert!(start.elapsed() < Duration::from_secs(2));
        }
    }
}

#[test]
fn streams_and_echoes_arrive_unbroken() {
    let lab = Lab::new(Topology { cni_rules: true, ..Topology::default() });
    let _server = lab.serve(lab.pod(2, 1), PORT);
    let client = lab.client(lab.pod(1, 1)).with_timeout(Duration::from_secs(10));
    for to in addresses(lab.pod(2, 1)) {
        client.stream(to, 64 << 20).unwrap();
        client.echo(to, 64 * 1024, 100).unwrap();
        client.echo_datagrams(to, 1200, 200).unwrap();
    }
}

#[test]
fn a_source_port_is_as_chosen_and_repeats_use_many() {
    let lab = Lab::new(Topology::default());
    let pod = lab.pod(1, 1);
    let _server = lab.serve(lab.pod(1, 2), PORT);
    let to = addresses(lab.pod(1, 2))[0];
    let source = SocketAddr::from((pod.v4, 40_000));
    for protocol in PROTOCOLS {
        assert_eq!(lab.client(pod).ask_from(protocol, source, to).unwrap().from, source);
        let answers = lab.client(pod).ask_times(protocol, to, 50).unwrap();
        let mut ports: Vec<u16> = answers.iter().map(|answer| answer.from.port()).collect();
        ports.sort_unstable();
        ports.dedup();
        assert!(ports.len() > 45, "{protocol:?}: {} ports", ports.len());
    }
    let socket = lab.client(pod).udp(to).unwrap();
    assert_eq!(ask_datagram(&socket, to).unwrap().by, "p1-2");
}

#[test]
fn nothing_of_a_lab_is_left_after_it_or_after_a_panic_in_it() {
    let traces = |lab: &Lab| {
        let netns = lab.pods().map(|pod| pod.netns.path()).chain(lab.nodes.iter().map(|node| node.netns.path()));
        netns.chain([lab.outside.path(), lab.switch.path(), lab.folder().to_owned()]).collect::<Vec<_>>()
    };
    let lab = Lab::new(Topology::default());
    let mut paths = traces(&lab);
    drop(lab);
    let panicked = std::panic::catch_unwind(|| {
        let lab = Lab::new(Topology::default());
        let paths = traces(&lab);
        let _server = lab.serve(lab.pod(1, 1), PORT);
        assert!(paths.iter().all(|path| path.exists()));
        std::panic::resume_unwind(Box::new(paths));
    });
    paths.extend(*panicked.unwrap_err().downcast::<Vec<_>>().unwrap());
    for path in paths {
        assert!(!path.exists(), "{} is left", path.display());
    }
}

/// Set in the process that the next test kills.
const VICTIM: &str = "FAIRLEAD_LAB_VICTIM";

/// A lab with a process of its own in it, until it is killed.
fn be_the_victim() {
    let lab = Lab::new(Topology { nodes: 1, pods_per_node: 1, ..Topology::default() });
    let mut command = Command::new("sleep");
    lab.node(1).netns.apply(&mut command).unwrap();
    let mut sleeper = command.arg("60").stdout(Stdio::null()).spawn().unwrap();
    // As tests that load programs without a lab have them.
    let folder = Folder::create().unwrap();
    let group = cgroup::mount_point().unwrap().join(folder.path().file_name().unwrap());
    std::fs::create_dir(group).unwrap();
    println!("folder {}", folder.id());
    println!("up {}", lab.node(1).netns.name());
    sleeper.wait().unwrap();
}

#[test]
fn leftovers_of_a_killed_run_are_found_and_removed_and_labs_in_use_are_not() {
    use std::io::{BufRead, BufReader};

    if std::env::var_os(VICTIM).is_some() {
        return be_the_victim();
    }
    let mine = Lab::new(Topology { nodes: 1, pods_per_node: 0, ..Topology::default() });
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "leftovers_of_a_killed_run_are_found_and_removed_and_labs_in_use_are_not", "--nocapture"])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut said = |what| {
        let found = lines.find_map(|line| line.split_once(what).map(|(_, name)| name.to_owned()));
        found.expect("the victim comes up")
    };
    let (id, name) = (said("folder "), said("up "));
    let pid = child.id();
    child.kill().unwrap();
    child.wait().unwrap();

    let removed: Vec<String> = residue::clean().unwrap().iter().map(ToString::to_string).collect();
    let group = cgroup::mount_point().unwrap().join(format!("fairlead-lab-{id}"));
    let folder = folder::of(&id);
    for expected in [
        format!("network namespace {name}"),
        "process ".to_owned(),
        "mount ".to_owned(),
        format!("cgroup {}", group.display()),
        format!("folder {}", folder.display()),
    ] {
        assert!(removed.iter().any(|item| item.starts_with(&expected)), "{expected} in {removed:?}");
    }
    assert!(!Path::new("/run/netns").join(&name).exists());
    assert!(!cgroup::mount_point().unwrap().join(format!("fairlead-lab-{pid}")).exists());
    assert!(!group.exists() && !folder.exists());
    assert!(residue::find().unwrap().is_empty());
    assert!(mine.node(1).netns.path().exists());
}

#[test]
fn host_clients_are_in_the_cgroup_of_the_lab() {
    let lab = Lab::new(Topology { nodes: 1, pods_per_node: 0, ..Topology::default() });
    let name = lab.cgroup().file_name().unwrap().to_str().unwrap().to_owned();
    let here = lab.node(1).netns.run(|| std::fs::read_to_string("/proc/thread-self/cgroup").unwrap());
    assert!(here.contains(&name), "{here}");
}
