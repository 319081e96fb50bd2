//! What is not ours, and what is on unusual ways: other people's programs, frames for other hosts, tunnels, devices without Ethernet
//! headers, devices that change under us.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use tests::bpf::Flags;
use tests::cluster::{By, Cluster, TARGET, addressed, one_service_a_kind, refused};
use tests::foreign::{Foreign, NEXT, OK, Place, Side};
use tests::manifest::Service;
use tests::traffic::client::{ask_datagram, upload};
use tests::traffic::packet::{SYN, ends, frame, ip_packet, tcp, tcp_ends, udp};
use tests::traffic::socket::send_frame;
use tests::tun::Cable;
use tests::{Agent, Client, Lab, Netns, Protocol, Topology};

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::UdpUnconnected];

/// How soon a change has to be effective; far above what it takes.
const SOON: Duration = Duration::from_secs(3);

fn cluster(flags: &[&str]) -> Cluster {
    Cluster::new(Topology::default(), flags, |lab| {
        one_service_a_kind(lab);
        lab.manifests().write("empty.json", addressed(Service::new("empty").selector("app", "nobody"), 20));
    })
}

/// Asks for Service `number`, and says what went wrong.
fn ask_all(client: &Client, number: u16, by: By, endpoint: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    for to in by.addresses(number) {
        for protocol in PROTOCOLS {
            match client.ask(protocol, to) {
                Ok(answer) if answer.by == endpoint => {}
                other => wrong.push(format!("{protocol:?} {to}: {other:?}")),
            }
        }
    }
    wrong
}

/// The counters of a node's packets.
fn packets(agent: &Agent) -> BTreeMap<String, u64> {
    serde_json::from_value(agent.cli_json(&["status"])["packets"].clone()).unwrap()
}

/// What was counted meanwhile, what is not ours excepted.
fn counted(agent: &Agent, before: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let after = packets(agent);
    let not_ours = ["not_service", "not_for_host", "unreadable"];
    after
        .into_iter()
        .map(|(reason, count)| (reason.clone(), count - before[&reason]))
        .filter(|(reason, count)| *count > 0 && !not_ours.contains(&reason.as_str()))
        .collect()
}

/// Everything that must go on while others are on the devices `vp1` and `eth0` of node 1, packets of no Service too.
fn all_is_served(cluster: &Cluster) -> Vec<String> {
    let lab = &cluster.lab;
    let (pod, outside) = (lab.client(lab.pod(1, 1)), lab.outside_client());
    let mut wrong = Vec::new();
    for by in [By::ClusterIp, By::NodePort(1), By::LoadBalancer] {
        wrong.extend(ask_all(&pod, 12, by, "p2-1"));
    }
    for by in [By::NodePort(1), By::LoadBalancer] {
        wrong.extend(ask_all(&outside, 11, by, "p1-1"));
    }
    for address in [IpAddr::from(lab.pod(2, 1).v4), lab.pod(2, 1).v6.into()] {
        for protocol in PROTOCOLS {
            match pod.ask(protocol, (address, TARGET).into()) {
                Ok(answer) if answer.by == "p2-1" => {}
                other => wrong.push(format!("{protocol:?} straight to {address}: {other:?}")),
            }
        }
    }
    wrong
}

/// A program at each place, on both sides of both devices.
fn attach_everywhere(lab: &Lab, places: &[Place], verdict: i32) -> Vec<(String, Foreign)> {
    let node = lab.node(1);
    let mut all = Vec::new();
    for device in ["vp1", "eth0"] {
        for side in [Side::Ingress, Side::Egress] {
            for place in places {
                let program = Foreign::attach(&node.netns, device, side, *place, verdict, &lab.bpffs(node));
                all.push((format!("{device} {side:?} {place:?}"), program));
            }
        }
    }
    all
}

/// Two families, two Services, two protocols and more: a program that is asked sees at least so many packets.
const AT_LEAST: u64 = 30;

fn assert_served_and_seen(cluster: &Cluster, programs: &[(String, Foreign)], what: &str) {
    let wrong = all_is_served(cluster);
    assert!(wrong.is_empty(), "{what}: {} wrong:\n{}", wrong.len(), wrong.join("\n"));
    for (place, program) in programs {
        assert!(program.seen() >= AT_LEAST, "{what}: the program at {place} saw {} packets", program.seen());
    }
}

#[test]
fn programs_of_others_that_say_next_see_every_packet_whoever_came_first() {
    for attach in ["tcx", "clsact"] {
        let mut cluster = cluster(&["--attach", attach]);
        let places = [Place::TcxFirst, Place::TcxLast, Place::Clsact];
        let programs = attach_everywhere(&cluster.lab, &places, NEXT);
        assert_served_and_seen(&cluster, &programs, &format!("{attach}, ours came first"));
        drop(programs);
        // Again, with theirs there before ours.
        cluster.agents[0].terminate();
        cluster.agents[0].cleanup();
        let programs = attach_everywhere(&cluster.lab, &places, NEXT);
        cluster.agents[0].restart();
        assert_served_and_seen(&cluster, &programs, &format!("{attach}, theirs came first"));
    }
}

#[test]
fn flags_that_others_have_in_tc_index_stay_beside_ours() {
    let cluster = cluster(&["--attach", "tcx"]);
    let lab = &cluster.lab;
    let (netns, device, bpffs) = (&lab.node(1).netns, &*lab.pod(1, 1).host_device, lab.bpffs(lab.node(1)));
    let attach = |device, side, place, flags| Foreign::attach_for(netns, device, side, place, flags, &bpffs);
    // Cilium's are 1 to 16.
    let flags = 0b1_0101;
    let _set = [
        attach(device, Side::Ingress, Place::TcxFirst, Flags::Set(flags)),
        attach("eth0", Side::Ingress, Place::TcxFirst, Flags::Set(flags)),
    ];
    let wanted = [
        (device, Side::Ingress, "a translated request"),
        ("eth0", Side::Egress, "a translated request that leaves"),
        (device, Side::Egress, "an answer that was made the frontend's"),
    ]
    .map(|(device, side, what)| (attach(device, side, Place::TcxLast, Flags::Want(flags)), what));
    let client = lab.client(lab.pod(1, 1));
    for to in By::ClusterIp.addresses(12) {
        let before = wanted.each_ref().map(|(program, _)| program.seen());
        let asked = client.ask_times(Protocol::Udp, to, 10).unwrap();
        assert_eq!(asked.len(), 10);
        for ((program, what), before) in wanted.iter().zip(before) {
            assert!(program.seen() >= before + 10, "{to}: {what}: {} of 10 have the flags", program.seen() - before);
        }
    }
}

#[test]
fn a_program_behind_ours_may_end_the_chain() {
    for (attach, place) in [("tcx", Place::TcxLast), ("tcx", Place::Clsact)] {
        let cluster = cluster(&["--attach", attach]);
        let programs = attach_everywhere(&cluster.lab, &[place], OK);
        assert_served_and_seen(&cluster, &programs, &format!("{attach}, {place:?}"));
    }
}

#[test]
fn a_program_before_ours_is_named_in_the_status() {
    for (attach, side, place) in [("tcx", Side::Ingress, Place::TcxFirst), ("clsact", Side::Egress, Place::Clsact)] {
        let cluster = cluster(&["--attach", attach]);
        let node = cluster.lab.node(1);
        let problems = || cluster.agents[0].cli_json(&["status"])["problems"].clone();
        assert_eq!(problems(), serde_json::json!([]));
        let _program = Foreign::attach(&node.netns, "vp1", side, place, OK, &cluster.lab.bpffs(node));
        let named = |text: &str| text.contains("vp1") && text.contains("foreign");
        let found = problems();
        assert!(found.as_array().unwrap().iter().any(|text| named(text.as_str().unwrap())), "{place:?}: {found}");
    }
}

#[test]
fn a_device_that_shares_a_wire_is_named_in_the_status_unless_all_sockets_are_served() {
    for (flags, named) in [(&[][..], true), (&["--socket-lb", "all"], false)] {
        let cluster = cluster(flags);
        let node = cluster.lab.node(1);
        node.netns.ip(&["link add shim0 link eth0 type macvlan mode bridge".to_owned()]).unwrap();
        let start = Instant::now();
        let problems = || cluster.agents[0].cli_json(&["status"])["problems"].to_string();
        while problems().contains("shim0: macvlan on eth0") != named {
            assert!(start.elapsed() < SOON, "{flags:?}: {}", problems());
        }
        assert_eq!(problems() == "[]", !named, "{}", problems());
    }
}

/// In a container: a cgroup namespace of its own, its cgroup v2 in place of every other one, and no bpffs.
const IN_A_CONTAINER: &str = r#"
for mounted in $(awk '$3 == "cgroup2" || $3 == "bpf" { print $2 }' /proc/mounts); do umount -l "$mounted"; done
mount -t cgroup2 cgroup2 "$1" && shift && exec "$@"
"#;

#[test]
fn an_agent_in_a_container_without_the_hosts_cgroups_and_bpffs_says_so() {
    let lab = Lab::new(Topology::default());
    let node = lab.node(1);
    // For its command line; the agent is the one below.
    let agent = Agent::new(&lab, node, lab.manifests().path(), &[]).unwrap();
    let place = lab.folder().join("cgroup");
    fs::create_dir(&place).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--cgroup", "--mount", "sh", "-c", IN_A_CONTAINER, "sh"]).arg(&place).arg(agent.binary());
    command.args(["run", "--hostname-override", "node1", "--manifests"]).arg(lab.manifests().path());
    command.arg("--bpffs").arg(agent.bpffs());
    node.netns.apply(&mut command).unwrap();
    let mut child = command.spawn().unwrap();
    let start = Instant::now();
    let status = loop {
        // As `kubectl exec` does.
        let mut inside = Command::new("nsenter");
        inside.args(["--target", &child.id().to_string(), "--mount", "--net", "--"]).arg(agent.binary());
        let output = inside.args(["status", "--output", "json", "--bpffs"]).arg(agent.bpffs()).output().unwrap();
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if status["ready"] == true || start.elapsed() > 4 * SOON {
            break status;
        }
        thread::sleep(Duration::from_millis(20));
    };
    child.kill().unwrap();
    child.wait().unwrap();
    agent.cleanup();
    let problems = status["problems"].to_string();
    assert!(problems.contains("is the root of a cgroup namespace") && problems.contains("--cgroup"), "{status}");
    assert!(problems.contains("the data plane ends with this container"), "{status}");
}

/// The MAC address of a device.
fn mac(netns: &Netns, device: &str) -> [u8; 6] {
    let text = netns.exec("cat", &[&format!("/sys/class/net/{device}/address")]).unwrap();
    let bytes: Vec<u8> = text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

#[test]
fn a_frame_for_another_host_gets_no_answer_and_makes_no_entry() {
    let cluster = cluster(&[]);
    let lab = &cluster.lab;
    let (node, neighbour) = (lab.node(1), lab.pod(1, 2));
    node.netns
        .ip(&[
            "link set eth0 promisc on".to_owned(),
            format!("link add mv0 link eth0 netns {} type macvlan mode bridge", neighbour.netns.name()),
        ])
        .unwrap();
    neighbour.netns.ip(&["link set mv0 up".to_owned()]).unwrap();
    let source = mac(&lab.outside, "eth0");
    let targets = [
        ("another host's", [2, 0, 0, 0, 0xbe, 0xef], false),
        ("a macvlan's", mac(&neighbour.netns, "mv0"), false),
        ("everyone's", [0xff; 6], false),
        ("the node's", mac(&node.netns, "eth0"), true),
    ];
    let mut port = 50_000;
    for (what, target, ours) in targets {
        for by in [By::NodePort(1), By::LoadBalancer] {
            for number in [11, 20] {
                for (family, to) in by.addresses(number).into_iter().enumerate() {
                    port += 1;
                    let from = SocketAddr::new(tests::cluster::own_addresses(lab, "outside")[family], port);
                    let before = packets(&cluster.agents[0]);
                    for packet in [
                        ip_packet(tcp_ends(from, to), &tcp(from, to, SYN, 7, 0)),
                        ip_packet(ends(from, to), &udp(from, to, b"who")),
                    ] {
                        lab.outside.run(|| send_frame("eth0", &frame(source, target, &packet))).unwrap();
                    }
                    thread::sleep(Duration::from_millis(20));
                    let reason = if number == 11 { "new_flow" } else { "no_endpoints" };
                    let counted = counted(&cluster.agents[0], &before);
                    if ours {
                        assert_eq!(counted.get(reason), Some(&2), "{what}, {to}: {counted:?}");
                    } else {
                        assert!(counted.is_empty(), "{what}, {to}: {counted:?}");
                        assert!(
                            packets(&cluster.agents[0])["not_for_host"] >= before["not_for_host"] + 2,
                            "{what}, {to}"
                        );
                        let flows = cluster.agents[0].cli_json(&["flows"]).to_string();
                        assert!(!flows.contains(&format!(":{port}\"")), "{what}, {to}: {flows}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_goes_through_a_tunnel_is_counted_once() {
    let cluster = cluster(&[]);
    let lab = &cluster.lab;
    for (node, other) in [(1, 2), (2, 1)] {
        let (here, there) = (lab.node(node), lab.node(other));
        here.netns
            .ip(&[
                format!("link add vx0 type vxlan id 7 local {} remote {} dstport 4789 dev eth0", here.v4(), there.v4()),
                format!("address add 10.98.0.{node}/24 dev vx0"),
                format!("address add fd00:98::{node}/64 dev vx0 nodad"),
                "link set vx0 up".to_owned(),
                format!("route replace 10.244.{other}.0/24 via 10.98.0.{other}"),
                format!("route replace fd00:10:244:{other}::/64 via fd00:98::{other}"),
            ])
            .unwrap();
    }
    let client = lab.client(lab.pod(1, 1));
    let all = |client: &Client, by| ask_all(client, 12, by, "p2-1");
    // Neighbours are found and devices have their programs before anything is counted.
    for to in By::NodePort(1).addresses(12) {
        client.ask_until(Protocol::Udp, to, SOON, Result::is_ok).unwrap();
    }
    for by in [By::ClusterIp, By::NodePort(1), By::LoadBalancer] {
        for (who, client) in [("a pod", client.clone()), ("outside", lab.outside_client())] {
            if who == "outside" && by == By::ClusterIp {
                continue;
            }
            let wrong = all(&client, by);
            assert!(wrong.is_empty(), "{who} by {by:?}:\n{}", wrong.join("\n"));
        }
    }
    for (by, masqueraded) in [(By::ClusterIp, false), (By::NodePort(1), true)] {
        for to in by.addresses(12) {
            let before = [packets(&cluster.agents[0]), packets(&cluster.agents[1])];
            let socket = client.udp(to).unwrap();
            for _ in 0..2 {
                ask_datagram(&socket, to).unwrap();
            }
            let mut expected = vec![("established", 1), ("new_flow", 1), ("reply", 2)];
            if masqueraded {
                expected.extend([("masqueraded", 2), ("masquerade_reply", 2)]);
            }
            let expected: BTreeMap<String, u64> =
                expected.into_iter().map(|(reason, count)| (reason.to_owned(), count)).collect();
            assert_eq!(counted(&cluster.agents[0], &before[0]), expected, "{to}, the client's node");
            assert_eq!(counted(&cluster.agents[1], &before[1]), BTreeMap::new(), "{to}, the endpoint's node");
            let mut stream = client.connect(to).unwrap();
            upload(&mut stream, 1 << 20, 7).unwrap();
        }
    }
}

#[test]
fn a_client_behind_a_device_without_ethernet_header_is_served() {
    for attach in ["tcx", "clsact"] {
        let cluster = cluster(&["--attach", attach]);
        let lab = &cluster.lab;
        let (node, far) = (lab.node(1), &lab.pod(1, 2).netns);
        let _cable = Cable::new([(&node.netns, "tun0"), (far, "tun1")]).unwrap();
        node.netns
            .ip(&[
                "link set tun0 up".to_owned(),
                "route add 10.244.1.99/32 dev tun0".to_owned(),
                "route add fd00:10:244:1::99/128 dev tun0".to_owned(),
            ])
            .unwrap();
        far.ip(&[
            "link set tun1 up".to_owned(),
            "address add 10.244.1.99/32 dev tun1".to_owned(),
            "address add fd00:10:244:1::99/128 dev tun1 nodad".to_owned(),
            "route add 10.96.0.0/16 dev tun1 src 10.244.1.99".to_owned(),
            "route add fd00:10:96::/64 dev tun1 src fd00:10:244:1::99".to_owned(),
            format!("route add {}/32 dev tun1 src 10.244.1.99", node.v4()),
            format!("route add {}/128 dev tun1 src fd00:10:244:1::99", node.v6()),
        ])
        .unwrap();
        let client = Client::new(far).with_timeout(Duration::from_millis(500));
        for to in By::ClusterIp.addresses(12) {
            client.ask_until(Protocol::Tcp, to, SOON, Result::is_ok).unwrap();
        }
        let mut wrong = Vec::new();
        for (number, endpoint) in [(11, "p1-1"), (12, "p2-1"), (13, "node1"), (14, "node2"), (15, "outside")] {
            for by in [By::ClusterIp, By::NodePort(1)] {
                wrong.extend(ask_all(&client, number, by, endpoint));
            }
        }
        for by in [By::ClusterIp, By::NodePort(1)] {
            for to in by.addresses(20) {
                for protocol in PROTOCOLS {
                    let answer = client.ask(protocol, to);
                    if !refused(&answer) {
                        wrong.push(format!("{protocol:?} {to}: {answer:?}"));
                    }
                }
            }
            for to in by.addresses(12) {
                if let Err(error) = client.stream(to, 1 << 20) {
                    wrong.push(format!("bulk to {to}: {error}"));
                }
                if let Err(error) = client.echo_datagrams(to, 8192, 2) {
                    wrong.push(format!("fragments to {to}: {error}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{attach}: {} wrong:\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// Gives a pod's device on the node its addresses and routes, as the lab does.
fn wire(lab: &Lab, device: &str) {
    let pod = lab.pod(1, 1);
    lab.node(1)
        .netns
        .ip(&[
            format!("link set {device} up"),
            format!("address replace 10.244.1.1/32 dev {device}"),
            format!("address replace fd00:10:244:1::1/128 dev {device} nodad"),
            format!("route replace {}/32 dev {device}", pod.v4),
            format!("route replace {}/128 dev {device}", pod.v6),
        ])
        .unwrap();
}

#[test]
fn a_device_that_is_renamed_moved_or_made_anew_is_served_as_before() {
    for attach in ["tcx", "clsact"] {
        let cluster = cluster(&["--attach", attach]);
        let lab = &cluster.lab;
        let (node, pod) = (&lab.node(1).netns, lab.pod(1, 1));
        let served = |what: &str| {
            let client = lab.client(pod).with_timeout(Duration::from_millis(200));
            let outside = lab.outside_client().with_timeout(Duration::from_millis(200));
            for (client, by, number) in [(client, By::ClusterIp, 12), (outside, By::NodePort(1), 11)] {
                for to in by.addresses(number) {
                    for protocol in PROTOCOLS {
                        client
                            .ask_until(protocol, to, SOON, Result::is_ok)
                            .unwrap_or_else(|error| panic!("{attach}, {what}: {protocol:?} {to}: {error}"));
                    }
                }
            }
        };
        served("as it was made");
        node.ip(&["link set vp1 down".to_owned(), "link set vp1 name renamed".to_owned()]).unwrap();
        wire(lab, "renamed");
        served("renamed");

        node.ip(&[format!("link set renamed netns {}", lab.switch.name())]).unwrap();
        let gone = lab.switch.exec("ip", &["-details", "link", "show", "renamed"]).unwrap();
        assert!(gone.contains("veth"), "{gone}");
        lab.switch.ip(&[format!("link set renamed netns {}", node.name())]).unwrap();
        wire(lab, "renamed");
        served("moved away and back");

        node.ip(&["link delete renamed".to_owned()]).unwrap();
        pod.netns
            .ip(&[
                format!("link add eth0 type veth peer name vp1 netns {}", node.name()),
                format!("address add {}/32 dev eth0", pod.v4),
                format!("address add {}/128 dev eth0 nodad", pod.v6),
                "link set eth0 up".to_owned(),
                "route add 10.244.1.1/32 dev eth0 scope link".to_owned(),
                "route add 0.0.0.0/0 via 10.244.1.1".to_owned(),
                "route add fd00:10:244:1::1/128 dev eth0".to_owned(),
                "route add ::/0 via fd00:10:244:1::1 dev eth0".to_owned(),
            ])
            .unwrap();
        wire(lab, "vp1");
        served("made anew");
    }
}

#[test]
fn answers_to_clients_outside_go_back_by_a_rule_for_their_mark() {
    let cluster = cluster(&["--reply-mark", "0x80/0x80", "--preserve-client-ip"]);
    let lab = &cluster.lab;
    let (node, outside) = (&lab.node(1).netns, lab.outside_client());
    let ask = || ask_all(&outside, 11, By::NodePort(1), "p1-1");
    assert_eq!(ask(), Vec::<String>::new());
    let rule = |family: &str, rule: &[&str]| {
        node.exec("ip", &[&[family, "rule", "add"], rule].concat()).unwrap();
    };
    let pod = lab.pod(1, 1);
    // As CNIs have it whose pods have routes of their own: from a pod, the main table is not asked.
    for (family, addr) in [("-4", pod.v4.to_string()), ("-6", pod.v6.to_string())] {
        rule(family, &["pref", "100", "from", &addr, "blackhole"]);
    }
    assert_eq!(ask().len(), 2 * PROTOCOLS.len(), "without a rule for the mark nothing comes back");
    for family in ["-4", "-6"] {
        rule(family, &["pref", "90", "fwmark", "0x80/0x80", "lookup", "main"]);
    }
    assert_eq!(ask(), Vec::<String>::new());
    // What the pod sends by itself has no mark.
    let other = SocketAddr::from((lab.pod(2, 1).v4, TARGET));
    assert!(lab.client(pod).ask(Protocol::Tcp, other).is_err(), "the rule is for answers alone");
}
