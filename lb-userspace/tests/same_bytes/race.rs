//! Two CPUs that want the same at the same moment.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use etherparse::PacketBuilder;
use fairlead::kernel::Options;

use crate::{DROP, Loaded, NEXT, Way, in_a_namespace, load, run};

/// So many ports the Service has, each with an endpoint of its own.
const PORTS: u16 = 400;

/// So many connections of each kind to each of them.
const ROUNDS: u8 = 20;

/// The one port that the node masquerades by.
const MASQUERADED: u16 = 61_000;

/// An external address with many ports, over UDP.
fn manifests() -> String {
    let ports: String = (1..=PORTS)
        .map(|port| format!("    - {{name: p{port}, protocol: UDP, port: {port}, targetPort: {}}}\n", 10_000 + port))
        .collect();
    format!(
        "apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Node
  metadata: {{name: node1}}
  status: {{addresses: [{{type: InternalIP, address: 10.99.0.11}}]}}
- apiVersion: v1
  kind: Service
  metadata: {{name: many, namespace: default}}
  spec:
    selector: {{app: many}}
    clusterIP: 10.96.0.10
    clusterIPs: [10.96.0.10]
    ipFamilies: [IPv4]
    externalIPs: [10.99.1.10]
    ports:
{ports}- apiVersion: v1
  kind: Pod
  metadata: {{name: p1, namespace: default, labels: {{app: many}}}}
  spec: {{nodeName: node1, containers: [{{name: server}}]}}
  status:
    phase: Running
    podIPs: [{{ip: 10.244.1.11}}]
    conditions: [{{type: Ready, status: \"True\"}}]
"
    )
}

fn frame(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (from.ip(), to.ip()) else { panic!("{from} {to}") };
    let builder = PacketBuilder::ethernet2([0; 6], [0; 6]).ipv4(source.octets(), destination.octets(), 64);
    let mut frame = Vec::new();
    builder.udp(from.port(), to.port()).write(&mut frame, b"who").unwrap();
    frame
}

fn client(number: u8) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, number], 40_000))
}

fn service(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 99, 1, 10], port))
}

fn port_at(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

#[test]
fn of_two_cpus_that_want_the_port_of_a_silent_flow_one_gets_it() {
    in_a_namespace(|| {
        let options = Options { masquerade_first: MASQUERADED.into(), masquerade_ports: 1, ..Options::default() };
        let mut loaded = Loaded::with(&manifests(), options);
        for port in 1..=PORTS {
            let (verdict, entered) = run(&mut loaded.programs, Way::In, &frame(client(1), service(port)));
            assert_eq!(verdict, NEXT);
            let (verdict, left) = run(&mut loaded.programs, Way::Out, &entered);
            assert_eq!((verdict, port_at(&left, 34)), (NEXT, MASQUERADED), "the first one's");
        }
        // Long enough to be silent; not so long that they are over.
        thread::sleep(Duration::from_secs(7));
        let arrived = AtomicUsize::new(0);
        let [one, other] = thread::scope(|scope| {
            let runners = [2, 3].map(|number| {
                let (options, arrived) = (&loaded.options, &arrived);
                scope.spawn(move || {
                    let mut programs = load(options);
                    let mut got = Vec::new();
                    for port in 1..=PORTS {
                        let (_, entered) = run(&mut programs, Way::In, &frame(client(number), service(port)));
                        // As close to each other as can be.
                        arrived.fetch_add(1, Ordering::AcqRel);
                        while arrived.load(Ordering::Acquire) < 2 * usize::from(port) {
                            std::hint::spin_loop();
                        }
                        let (verdict, left) = run(&mut programs, Way::Out, &entered);
                        assert!(verdict == DROP || verdict == NEXT && port_at(&left, 34) == MASQUERADED, "{verdict}");
                        got.push(verdict == NEXT);
                    }
                    got
                })
            });
            runners.map(|runner| runner.join().unwrap())
        });
        let node = SocketAddr::from(([10, 99, 0, 11], MASQUERADED));
        let mut wrong = Vec::new();
        for (port, got) in (1..=PORTS).zip(one.into_iter().zip(other)) {
            let endpoint = SocketAddr::from(([10, 244, 1, 11], 10_000 + port));
            let (verdict, answer) = run(&mut loaded.programs, Way::In, &frame(endpoint, node));
            let to = answer[33];
            let is_right = match got {
                (true, false) => to == 2,
                (false, true) => to == 3,
                (true, true) | (false, false) => false,
            };
            if verdict != NEXT || !is_right {
                wrong.push(format!("port {port}: {got:?}, the answer goes to client {to}"));
            }
        }
        assert!(wrong.is_empty(), "{} of {PORTS}:\n{}", wrong.len(), wrong.join("\n"));
    });
}

#[test]
fn what_passes_while_the_first_answer_confirms_its_connection_is_translated() {
    in_a_namespace(|| {
        let loaded = Loaded::with(&manifests(), Options::default());
        let node = |port| SocketAddr::from(([10, 99, 0, 11], port));
        let pod = |number| SocketAddr::from(([10, 244, 1, 7], 40_000 + u16::from(number)));
        let endpoint = |port| SocketAddr::from(([10, 244, 1, 11], 10_000 + port));
        // By whom and where to; which way the first answer goes, and whether an answer or a request passes beside it.
        let cases =
            [("masqueraded", Way::In, true), ("masqueraded", Way::In, false), ("not masqueraded", Way::Out, true)];
        let rounds =
            cases.iter().zip(0..).flat_map(|(case, number)| (1..=ROUNDS).map(move |r| (case, number * ROUNDS + r)));
        let questions: Vec<_> =
            rounds.flat_map(|(case, number)| (1..=PORTS).map(move |port| (case, number, port))).collect();
        let (arrived, masqueraded) = (AtomicUsize::new(0), AtomicU16::new(0));
        let wrong: Vec<String> = thread::scope(|scope| {
            let runners = [true, false].map(|is_first| {
                let (questions, options, arrived, masqueraded) = (&questions, &loaded.options, &arrived, &masqueraded);
                scope.spawn(move || {
                    let mut programs = load(options);
                    let mut wrong = Vec::new();
                    let meet = |times: usize| {
                        arrived.fetch_add(1, Ordering::AcqRel);
                        while arrived.load(Ordering::Acquire) < 2 * times {
                            std::hint::spin_loop();
                        }
                    };
                    for (index, ((case, way, answers), number, port)) in questions.iter().enumerate() {
                        let (from, to) = match way {
                            Way::In => (client(*number), service(*port)),
                            Way::Out => (pod(*number), SocketAddr::from(([10, 96, 0, 10], *port))),
                        };
                        if is_first {
                            let (_, entered) = run(&mut programs, Way::In, &frame(from, to));
                            let (_, left) = run(&mut programs, Way::Out, &entered);
                            masqueraded.store(port_at(&left, 34), Ordering::Release);
                        }
                        meet(2 * index + 1);
                        let (way, packet) = match way {
                            _ if !is_first && !answers => (Way::Out, frame(from, endpoint(*port))),
                            Way::In => (Way::In, frame(endpoint(*port), node(masqueraded.load(Ordering::Acquire)))),
                            Way::Out => (Way::Out, frame(endpoint(*port), from)),
                        };
                        meet(2 * index + 2);
                        let (verdict, out) = run(&mut programs, way, &packet);
                        if verdict != NEXT || out == packet {
                            wrong.push(format!("{case}, {from} to {to}, {way:?}: {verdict}"));
                        }
                    }
                    wrong
                })
            });
            runners.into_iter().flat_map(|runner| runner.join().unwrap()).collect()
        });
        assert!(wrong.is_empty(), "{} of {}, as {:?}", wrong.len(), questions.len(), wrong.first());
    });
}
