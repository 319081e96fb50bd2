//! Packets of the node itself: real sockets through the hooks. The node is a network namespace with the row's addresses; everything
//! else is one other namespace, which has every address there is and tells who came from where to which of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use fairlead::kernel::devices::watch::Watch;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketType, bind, connect, socket,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use tests::{cgroup::Cgroup, command::ip_batch, folder::Folder, lab::NETNS_PREFIX, netns::Netns};

use crate::{
    cases::{self, Case, Expect, Flow},
    machine::{Machine, runtime, set_addresses},
    pipeline::objects,
};

/// Both ends of the wire have it, so that they need no neighbour discovery.
const MAC: &str = "02:00:00:00:00:01";

/// So long an answer is waited for: a lost SYN is sent again after a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// Listeners that answer every connection with their name and both ends of it, until dropped.
struct Listeners {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Listeners {
    fn start(name: &'static str, sockets: Vec<TcpListener>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        sockets.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for (mut stream, peer) in sockets.iter().filter_map(|socket| socket.accept().ok()) {
                    let ends = [stream.local_addr().unwrap(), peer];
                    let [local, peer] = ends.map(|end| SocketAddr::new(end.ip().to_canonical(), end.port()));
                    // Who is gone again needs no answer.
                    let _ = stream.write_all(format!("{name} {local} {peer}").as_bytes());
                }
                thread::sleep(Duration::from_micros(200));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Two namespaces, joined.
struct Wire {
    node: Netns,
    world: Netns,
    cgroup: Cgroup,
    _folder: Folder,
}

impl Wire {
    fn new() -> Self {
        let folder = Folder::create().unwrap();
        let cgroup = Cgroup::enter().unwrap();
        let [node, world] = ["node", "world"].map(|name| Netns::named(format!("{NETNS_PREFIX}{}-{name}", folder.id())));
        ip_batch(None, &[&node, &world].map(|netns| format!("netns add {}", netns.name()))).unwrap();
        let wire = Self { node, world, cgroup, _folder: folder };
        let lines = [
            "link set lo up".to_owned(),
            format!("link add eth0 address {MAC} type veth peer name wire address {MAC} netns {}", wire.world.name()),
            "link set eth0 arp off up".to_owned(),
        ];
        wire.node.ip(&lines).unwrap();
        let lines = [
            "link set lo up",
            "link set wire arp off up",
            // Behind the table of local addresses, so that the node's own are elsewhere.
            "route add local 0.0.0.0/0 dev lo table main",
            "route add local ::/0 dev lo table main",
        ];
        wire.world.ip(&lines.map(ToOwned::to_owned)).unwrap();
        wire
    }

    /// The node has these addresses.
    fn set_addresses(&self, addresses: &[IpAddr]) {
        self.node.run(|| set_addresses("eth0", addresses));
        let lines: Vec<String> = addresses.iter().map(|address| format!("route replace {address} dev wire")).collect();
        self.world.ip(&lines).unwrap();
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let lines = [&self.node, &self.world].map(|netns| format!("netns delete {}", netns.name()));
        if let Err(error) = ip_batch(None, &lines) {
            eprintln!("leaving namespaces behind: {error:#}");
        }
    }
}

/// What became of one connection.
#[derive(Debug)]
enum Fate {
    Drop,
    Reject,
    /// It came to where it was sent to.
    Pass,
    /// It came to an endpoint, which sees this source.
    Forward(SocketAddr, IpAddr),
}

/// One connection of a row, in the node's namespace.
fn open(flow: &Flow) -> Fate {
    let to = SocketAddr::new(flow.to, flow.port);
    let family = if flow.to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let client = socket(family, SocketType::STREAM, None).unwrap();
    set_socket_timeout(&client, Timeout::Send, Some(PATIENCE)).unwrap();
    set_socket_timeout(&client, Timeout::Recv, Some(PATIENCE)).unwrap();
    if !flow.from.is_loopback() {
        bind(&client, &SocketAddr::new(flow.from, 0)).unwrap();
    }
    match connect(&client, &to) {
        Ok(()) => {}
        Err(Errno::CONNREFUSED) => return Fate::Reject,
        Err(Errno::INPROGRESS | Errno::AGAIN | Errno::TIMEDOUT) => return Fate::Drop,
        Err(error) => panic!("{to}: {error}"),
    }
    let mut text = String::new();
    TcpStream::from(client).read_to_string(&mut text).unwrap();
    let [who, local, peer] = text.split(' ').collect::<Vec<_>>()[..] else { panic!("{text:?}") };
    let [local, peer]: [SocketAddr; 2] = [local, peer].map(|text| text.parse().unwrap());
    if local == to {
        return Fate::Pass;
    }
    assert_eq!(who, "world", "endpoints are elsewhere");
    Fate::Forward(local, peer.ip())
}

/// The verdict on a row: connections are made until all the endpoints that it names have been met, and some more.
fn verdict(machine: &Machine, case: &Case, flow: &Flow) -> Expect {
    let wanted: BTreeSet<&String> = flow.expect.endpoints.iter().collect();
    let mut seen: BTreeMap<String, bool> = BTreeMap::new();
    let mut verdict = "dnat";
    for number in 0..40 * wanted.len().max(1) {
        machine.forget_clients();
        match open(flow) {
            Fate::Forward(endpoint, source) => {
                // Whatever leaves the node must be from an address of the node; the row's own source may be that already.
                assert!(case.node.ips.contains(&source), "{} {}: {endpoint} sees {source}", case.id, flow.name);
                let kept = source == flow.from;
                seen.insert(endpoint.to_string(), if kept { flow.expect.masquerade } else { true });
            }
            Fate::Drop => verdict = "drop",
            Fate::Reject => verdict = "reject",
            Fate::Pass => verdict = "pass",
        }
        if verdict != "dnat" || number > 3 * wanted.len() && wanted.iter().all(|it| seen.contains_key(*it)) {
            break;
        }
    }
    let masquerade = !seen.is_empty() && seen.values().all(|it| *it);
    Expect { verdict: verdict.to_owned(), endpoints: seen.into_keys().collect(), masquerade, hairpin: Vec::new() }
}

/// The ports that somebody must listen on: those of rows and endpoints.
fn ports<'a>(cases: impl Iterator<Item = &'a Case>) -> BTreeSet<u16> {
    let of_flow = |flow: &Flow| {
        let endpoints = flow.expect.endpoints.iter().map(|text| text.parse::<SocketAddr>().unwrap().port());
        endpoints.chain([flow.port]).collect::<Vec<_>>()
    };
    cases.flat_map(|case| case.flows.iter().filter(|flow| case.is_from_node(flow)).flat_map(of_flow)).collect()
}

#[test]
fn every_connection_of_the_node_meets_its_fate_at_the_socket() {
    let wire = Wire::new();
    let all: Vec<Case> = cases::all().into_iter().chain(cases::with_other_node_ports()).collect();
    let ports = ports(all.iter());
    let listen = |port: &u16| TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port)).unwrap();
    let world = wire.world.run(|| ports.iter().map(listen).collect());
    let here = wire.node.run(|| ports.iter().map(listen).collect());
    let _listeners = [Listeners::start("world", world), Listeners::start("node", here)];
    let cgroup = wire.cgroup.path().to_owned();
    let mut met = BTreeSet::new();
    wire.node.run(|| {
        let mut machine = Machine::new(Some(cgroup));
        let mut attached = false;
        let mut addresses: &[IpAddr] = &[];
        for mode in ["iptables", "nftables"] {
            let (mut rows, mut agreeing) = (0, 0);
            for case in all.iter().filter(|case| case.applies_to.iter().any(|it| it == mode)) {
                let of_node = |flow: &&Flow| flow.is_of(mode) && case.is_from_node(flow);
                if !case.flows.iter().any(|flow| of_node(&flow)) {
                    continue;
                }
                if addresses != case.node.ips {
                    addresses = &case.node.ips;
                    wire.set_addresses(addresses);
                }
                machine.start(case, mode, objects(case, &case.objects));
                if !attached {
                    let devices = runtime().block_on(async { Watch::open().unwrap().snapshot().ports() });
                    machine.kernel.attach_devices(&devices).unwrap();
                    machine.kernel.attach_sockets().unwrap();
                    attached = true;
                }
                for (number, flow) in case.flows.iter().enumerate().filter(|(_, flow)| of_node(flow)) {
                    assert_eq!(flow.protocol, "TCP", "{} {}", case.id, flow.name);
                    met.insert((&case.id, number));
                    rows += 1;
                    let found = verdict(&machine, case, flow);
                    if flow.accepts(found.clone()) {
                        agreeing += 1;
                    } else {
                        eprintln!("{mode} {} {}: {found:?} instead of {:?}", case.id, flow.name, flow.expect);
                    }
                }
            }
            println!("{mode}, by sockets of the node: {agreeing} of {rows} rows agree");
            assert_eq!(agreeing, rows);
        }
    });
    let of_the_file = met.iter().filter(|(id, _)| !id.ends_with(cases::OTHER_NODE_PORTS)).count();
    println!("by sockets: {of_the_file} of the file's rows, {} with other NodePorts", met.len() - of_the_file);
    assert_eq!(of_the_file, 134);
}
