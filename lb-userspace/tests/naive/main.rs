//! Random changes of a cluster. After each, the tables are those that a fresh start would make, and every packet's fate is the one that
//! a naive model of the specification gives it.

#![cfg(test)]

mod clients;
#[path = "../shared/content.rs"]
mod content;
#[path = "../shared/objects.rs"]
mod objects;
mod specification;
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use clients::{Clients, Remembered};
use content::Content;
use fairlead::{
    image::{FLOW_LIFE, Image},
    model::{Change, Interner, Kind, ObjectName, address::parse_ip},
    pipeline::Pipeline,
    plan::node::{LocalDetector, NodeOptions, ProxyMode},
};
use lb_common::{
    addr::{Addr, Port},
    affinity::{AffinityKey, node_client},
    decide::{Class, Decision, Question, classify, decide},
    layout::{Device, Endpoint, device_flags, protocol},
    memory::Memory,
};
use proptest::{collection::vec, prelude::*, test_runner::FileFailurePersistence};
use serde_json::Value;
use specification::{Cluster, Detector, Fate, Node, Packet};
use world::{CLUSTER_IPS, EXTERNAL_IPS, NODE_IPS, OUTSIDE, OWN_NODE, Op, POD_IPS, PORTS};

/// Devices of the node, by ifindex.
const INTERFACES: [(u32, &str); 3] = [(1, "eth0"), (2, "cni0"), (3, "veth1")];

/// One of so many packets begins a connection in each step.
const CONNECTS: usize = 11;

/// Seconds ago that a client may have connected, around the timeouts of [`world`].
const AGES: [u64; 7] = [0, 2, 4, 10_799, 10_800, 86_399, 86_400];

/// The second in which worlds begin: nobody connected before the clock did.
const START: u64 = 100_000;

fn options(node: &Node) -> NodeOptions {
    NodeOptions {
        mode: if node.nftables { ProxyMode::Nftables } else { ProxyMode::Iptables },
        node_port_addresses: node.node_port_addresses.iter().map(|text| (*text).to_owned()).collect(),
        localhost_node_ports: node.localhost_node_ports,
        detector: match node.detector {
            Detector::None => LocalDetector::None,
            Detector::ClusterCidr(list) => {
                LocalDetector::ClusterCidr(list.split(',').map(|text| text.parse().unwrap()).collect())
            }
            Detector::NodeCidr => LocalDetector::NodeCidr,
            Detector::BridgeInterface(name) => LocalDetector::BridgeInterface(name.to_owned()),
            Detector::InterfaceNamePrefix(prefix) => LocalDetector::InterfaceNamePrefix(prefix.to_owned()),
        },
        masquerade_all: node.masquerade_all,
        preserve_client_ip: node.preserve_client_ip,
        ..NodeOptions::default()
    }
}

fn pipeline(node: &Node, image: Image) -> Pipeline {
    let options = options(node);
    let device = |(ifindex, name): (u32, &str)| {
        let local = if options.detector.takes_interface(name) { device_flags::LOCAL_SOURCES } else { 0 };
        (ifindex, Device { flags: local, ..Device::default() })
    };
    let devices: BTreeMap<u32, Device> = INTERFACES.into_iter().map(device).collect();
    let mut pipeline = Pipeline::new(OWN_NODE, options, image);
    pipeline.image_mut().set_devices(&devices);
    pipeline.set_interfaces(node.interfaces.clone());
    pipeline
}

/// An agent that starts with these tables and finds these objects.
fn start<'a>(node: &Node, objects: impl Iterator<Item = &'a Value>, image: Image, now: u64) -> Pipeline {
    let mut pipeline = pipeline(node, image);
    let mut interner = Interner::default();
    objects.for_each(|value| _ = pipeline.take(Change::Upsert(objects::object(value, &mut interner))));
    pipeline.compile(now);
    pipeline.sweep(now);
    pipeline
}

/// The cluster, the agent, and the tables that it writes.
struct World {
    node: Node,
    objects: BTreeMap<(Kind, ObjectName), Value>,
    pipeline: Pipeline,
    kernel: Memory,
    clients: Remembered,
    now: u64,
}

impl World {
    fn new(node: Node) -> Self {
        let mut pipeline = pipeline(&node, Image::default());
        pipeline.compile(0);
        let kernel = pipeline.image().memory().clone();
        Self { node, objects: BTreeMap::new(), pipeline, kernel, clients: Remembered::default(), now: START }
    }

    /// Every step takes a second, so that ids are used again soon.
    fn step(&mut self, ops: &[Op]) {
        self.now += 1;
        let mut interner = Interner::default();
        for op in ops {
            match op {
                Op::Put(value) => {
                    self.objects.insert(objects::key(value), value.clone());
                    self.pipeline.take(Change::Upsert(objects::object(value, &mut interner)));
                }
                Op::Remove(kind, namespace, name) => {
                    let (kind, name) = (Kind::from_name(kind).unwrap(), ObjectName::new(namespace, name));
                    self.objects.remove(&(kind, name.clone()));
                    self.pipeline.take(Change::Delete(kind, name));
                }
                Op::Interfaces(addresses) => {
                    self.node.interfaces.clone_from(addresses);
                    self.pipeline.set_interfaces(addresses.clone());
                }
                Op::Wait(seconds) => self.now += seconds,
                Op::Restart => {
                    let image = Image::restore(self.kernel.clone(), self.now);
                    self.pipeline = start(&self.node, self.objects.values(), image, self.now);
                    self.kernel = self.pipeline.image().memory().clone();
                }
            }
        }
        let mut writes = self.pipeline.compile(self.now);
        if self.pipeline.image().has_expired(self.now) {
            writes.extend(self.pipeline.image_mut().expire(self.now, &BTreeSet::new(), &BTreeSet::new()));
        }
        writes.iter().for_each(|write| write.apply(&mut self.kernel));
    }

    fn fresh(&self) -> Pipeline {
        start(&self.node, self.objects.values(), Image::default(), 0)
    }
}

/// A packet of each kind of source to everything that may be a destination.
fn packets() -> impl Iterator<Item = Packet> {
    let ip = |text: &str| parse_ip(text).unwrap();
    [0, 1].into_iter().flat_map(move |family| {
        let loopback = [&["127.0.0.1", "127.9.9.9"][..], &["::1"]][family];
        let all =
            [&CLUSTER_IPS[family][..], &EXTERNAL_IPS[family], &NODE_IPS[family][..2], loopback, &[OUTSIDE[family]]];
        let sources = [
            (POD_IPS[family][0], false, "veth1"),
            (POD_IPS[family][2], false, "cni0"),
            (POD_IPS[family][4], false, "eth0"),
            (OUTSIDE[family], false, "eth0"),
            (NODE_IPS[family][0], false, "eth0"),
            (NODE_IPS[family][0], true, ""),
            (EXTERNAL_IPS[family][1], true, ""),
        ];
        let ends = all.concat().into_iter().flat_map(|to| PORTS.map(|(port, protocol)| (to, port, protocol)));
        ends.flat_map(move |(to, port, protocol)| {
            sources.map(|(from, from_node, interface)| Packet {
                from: ip(from),
                to: ip(to),
                port,
                protocol,
                from_node,
                interface,
            })
        })
    })
}

fn question(packet: &Packet) -> Question {
    Question {
        src: packet.from.into(),
        dst: packet.to.into(),
        dport: Port::new(packet.port),
        proto: match packet.protocol {
            "TCP" => protocol::TCP,
            "UDP" => protocol::UDP,
            _ => protocol::SCTP,
        },
        from_node: packet.from_node,
        device: INTERFACES.iter().find(|(_, name)| *name == packet.interface).map_or(0, |(ifindex, _)| *ifindex),
    }
}

/// Whose packet it is, to the programs.
fn client(packet: &Packet) -> Addr {
    let src = packet.from.into();
    if packet.from_node { node_client(&src) } else { src }
}

/// What the tables do with a packet, every endpoint of the range tried.
fn fate(tables: &Clients<'_>, packet: &Packet) -> Fate {
    answer(tables, &question(packet), &client(packet))
}

fn answer(tables: &Clients<'_>, question: &Question, client: &Addr) -> Fate {
    match classify(question, tables) {
        Class::Pass(_) => Fate::Pass,
        Class::Reject(_) => Fate::Reject,
        Class::Drop(_) => Fate::Drop,
        Class::Forward(forward) => {
            let chosen = (0..forward.range.len).map(|hash| match decide(question, client, hash, tables) {
                Decision::Forward(choice) => (socket(&choice.endpoint), choice.masquerade),
                other @ (Decision::Reject(_) | Decision::Drop(_) | Decision::Pass(_)) => panic!("{other:?}"),
            });
            Fate::Forward(chosen.collect())
        }
    }
}

fn socket(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(IpAddr::from(endpoint.addr), endpoint.port.number())
}

proptest! {
    #![proptest_config(ProptestConfig {
        // PROPTEST_CASES makes it look longer.
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(20),
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/naive/regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn whatever_happens_the_tables_say_what_the_specification_says(node in world::node(), steps in vec(world::ops(), 1..24)) {
        prop_assert!(90_000 > FLOW_LIFE, "some waits outlive bits");
        let mut world = World::new(node);
        for (step, ops) in steps.into_iter().enumerate() {
            world.step(&ops);
            prop_assert!(&world.kernel == world.pipeline.image().memory(), "the writes are the whole change");
            let fresh = world.fresh();
            prop_assert_eq!(Content::of(&world.kernel), Content::of(fresh.image().memory()));
            let bits = |memory: &Memory| [memory.frontend_bits.clone(), memory.endpoint_bits.clone()];
            for (there, needed) in bits(&world.kernel).iter().zip(bits(fresh.image().memory())) {
                prop_assert!(needed.iter().all(|bit| there.contains(&bit)));
            }
            let objects: Vec<Value> = world.objects.values().cloned().collect();
            let cluster = |clients| Cluster { objects: &objects, node: &world.node, clients, now: world.now };
            let noted = cluster(&world.clients.noted).still_noted();
            let specified = cluster(&noted);
            let mut new = noted.clone();
            let mut last = world.clients.last.clone();
            let tables = Clients { tables: &world.kernel, last: &world.clients.last, ticks: Remembered::judged(world.now) };
            for (number, packet) in packets().enumerate() {
                prop_assert_eq!(fate(&tables, &packet), specified.fate(&packet), "{:?}", packet);
                // A socket of the node has no source yet, and is nobody's to masquerade.
                if packet.from_node && specified.primary().contains(&packet.from) {
                    let client = client(&packet);
                    let found = answer(&tables, &Question { src: client, ..question(&packet) }, &client);
                    prop_assert_eq!(found.without_source(), specified.fate(&packet).without_source(), "{:?}", packet);
                }
                let key = specified.noted(&packet);
                let Decision::Forward(choice) = decide(&question(&packet), &client(&packet), number as u32, &tables) else {
                    continue;
                };
                prop_assert_eq!(choice.affinity, key.is_some(), "{:?}", packet);
                let Some(key) = key else { continue };
                let numbers = AffinityKey { client: client(&packet), service: choice.service };
                // As long as none has connected in this step, a client is what it was before.
                if (number + step).is_multiple_of(CONNECTS) {
                    new.insert(key.clone(), (socket(&choice.endpoint), world.now));
                    last.insert(numbers, Remembered::now(choice.id, &choice.endpoint, world.now));
                }
                // And if it had gone to one endpoint or another of the Service port, some time ago?
                let own = world.kernel.endpoints.iter().filter(|(_, it)| it.flags != 0 && it.service == choice.service);
                let own = own.filter(|(_, it)| it.addr.is_v4() == packet.to.is_ipv4());
                for ((id, endpoint), then) in own.zip((step + number..).map(|turn| world.now - AGES[turn % AGES.len()])) {
                    let noted = [(key.clone(), (socket(endpoint), then))].into();
                    let last = [(numbers, Remembered::now(id, endpoint, then))].into();
                    let tables = Clients { last: &last, ..tables };
                    prop_assert_eq!(fate(&tables, &packet), Cluster { clients: &noted, ..specified }.fate(&packet), "{:?}: {:?}", packet, noted);
                }
            }
            world.clients = Remembered { noted: new, last };
        }
    }
}
