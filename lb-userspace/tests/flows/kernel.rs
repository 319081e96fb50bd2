//! Packets of pods and from outside, through the programs in the kernel: ingress, and then egress on the bytes that came out. What
//! became of a packet is read from the packet by a parser that is not ours.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use aya::programs::{TestRun as _, TestRunOptions};
use etherparse::{IpNumber, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use fairlead::kernel::{
    Options,
    devices::watch::Watch,
    folder,
    maps::Capacity,
    object::{Constants, Programs},
};

use crate::{
    cases::{self, Case, Expect, Flow},
    machine::{Machine, ip, on_a_node, runtime, set_addresses},
    pipeline::{changes_from_previous, objects},
};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Offset of `ifindex` in the context of a program for packets (`include/uapi/linux/bpf.h`).
const IFINDEX: usize = 40;

/// Verdicts of programs (`include/uapi/linux/pkt_cls.h`): "next", "drop", and "redirected" by which a refusal goes back.
const NEXT: u32 = u32::MAX;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

/// What a packet says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// Refusals: RST or an ICMP error.
    pub refuses: bool,
}

pub fn parse(frame: &[u8]) -> Seen {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let (from, to, payload) = match packet.net.unwrap() {
        NetSlice::Ipv4(net) => {
            let (header, payload) = (net.header(), net.payload().payload.to_vec());
            (IpAddr::V4(header.source_addr()), IpAddr::V4(header.destination_addr()), payload)
        }
        NetSlice::Ipv6(net) => {
            let (header, payload) = (net.header(), net.payload().payload.to_vec());
            (IpAddr::V6(header.source_addr()), IpAddr::V6(header.destination_addr()), payload)
        }
        NetSlice::Arp(_) => panic!("{frame:02x?}"),
    };
    let (ports, refuses) = match packet.transport {
        Some(TransportSlice::Tcp(tcp)) => ((tcp.source_port(), tcp.destination_port()), tcp.rst()),
        Some(TransportSlice::Udp(udp)) => ((udp.source_port(), udp.destination_port()), false),
        Some(TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_)) => ((0, 0), true),
        Some(TransportSlice::Igmp(_)) => panic!("{frame:02x?}"),
        // SCTP, whose header begins with the ports as well.
        None => {
            let word = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
            ((word(0), word(2)), false)
        }
    };
    Seen { from: SocketAddr::new(from, ports.0), to: SocketAddr::new(to, ports.1), refuses }
}

pub fn frame(flow: &Flow, port: u16) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(CLIENT_MAC, MAC);
    let net = match (flow.from, flow.to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        (from, to) => panic!("{from} {to}"),
    };
    let mut frame = Vec::new();
    match flow.protocol.as_str() {
        "TCP" => net.tcp(port, flow.port, 1, 65_535).syn().write(&mut frame, &[]).unwrap(),
        "UDP" => net.udp(port, flow.port).write(&mut frame, b"hello").unwrap(),
        "SCTP" => {
            // An INIT chunk's beginning; nobody looks at the checksum on the way.
            let ports = [port.to_be_bytes(), flow.port.to_be_bytes()].concat();
            let packet = [&ports[..], &[0; 8], &[1, 0, 0, 20], &[0; 16]].concat();
            net.write(&mut frame, IpNumber::SCTP, &packet).unwrap();
        }
        other => panic!("{other}"),
    }
    frame
}

/// What became of one packet: nothing, or where it went and whether it left as the node's.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Drop,
    Reject,
    Pass,
    Forward(SocketAddr, bool),
}

struct Runner {
    machine: Machine,
    programs: Option<Programs>,
    devices: BTreeMap<&'static str, u32>,
    port: u16,
}

impl Runner {
    fn new() -> Self {
        let names = ["eth0", "veth1234", "cali0"];
        for name in names {
            ip(&[
                format!("link add {name} address 02:00:00:00:00:01 type veth peer name {name}-end"),
                format!("link set {name} up"),
                format!("link set {name}-end up"),
            ]);
        }
        let links = runtime().block_on(async { Watch::open().unwrap().snapshot().links.clone() });
        let index = |name| links.values().find(|link| link.name == name).unwrap().ifindex;
        let devices = names.map(|name| (name, index(name))).into();
        Self { machine: Machine::new(None), programs: None, devices, port: 1024 }
    }

    fn start(&mut self, case: &Case, mode: &str, before: bool) {
        set_addresses("eth0", &case.node.ips);
        let values = if before { &case.previous_objects } else { &case.objects };
        self.machine.start(case, mode, objects(case, values));
        if self.programs.is_none() {
            let bpffs = self.machine.bpffs();
            let options = Options { bpffs: bpffs.clone(), ..Options::default() };
            let (generation, flows, _) = folder::current(bpffs).unwrap();
            let constants = Constants::new(&options).unwrap();
            self.programs =
                Some(Programs::load(&generation, &flows, &Capacity::default(), &constants, &options).unwrap());
        }
    }

    fn run(&mut self, program: &str, device: u32, frame: &[u8]) -> (u32, Vec<u8>) {
        let mut context = [0; IFINDEX + 4];
        context[IFINDEX..].copy_from_slice(&device.to_ne_bytes());
        let mut out = vec![0; 2048];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let program = self.programs.as_mut().unwrap().classifier(program, true).unwrap();
        let result = program.test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }

    /// One packet of a row, from this port.
    fn send(&mut self, case: &Case, flow: &Flow, port: u16) -> Fate {
        let frame = frame(flow, port);
        let sent = parse(&frame);
        let pods = self.devices["cali0"];
        let enters = flow.from_interface.as_deref().map_or(pods, |name| self.devices[name]);
        let (verdict, forwarded) = self.run("ingress", enters, &frame);
        match verdict {
            SHOT => return Fate::Drop,
            REDIRECT => {
                let refusal = parse(&forwarded);
                assert!(refusal.refuses && refusal.to.ip() == flow.from, "{refusal:?}");
                return Fate::Reject;
            }
            NEXT if forwarded == frame => return Fate::Pass,
            NEXT => {}
            other => panic!("{other}"),
        }
        let chosen = parse(&forwarded);
        assert_eq!(chosen.from, sent.from, "{} {}: the source is changed on the way out only", case.id, flow.name);
        let leaves = if chosen.to.ip() == flow.from { enters } else { self.devices["eth0"] };
        let (verdict, left) = self.run("egress", leaves, &forwarded);
        assert_eq!(verdict, NEXT, "{} {}", case.id, flow.name);
        let left = parse(&left);
        assert_eq!(left.to, chosen.to);
        let masqueraded = left.from != sent.from;
        if masqueraded {
            assert!(case.node.ips.contains(&left.from.ip()), "{} {}: {left:?}", case.id, flow.name);
        }
        Fate::Forward(left.to, masqueraded)
    }

    /// The verdict on a row: packets are sent until all the endpoints that it names have been met, and some more.
    fn verdict(&mut self, case: &Case, flow: &Flow) -> Expect {
        let wanted: BTreeSet<&String> = flow.expect.endpoints.iter().collect();
        let mut seen: BTreeMap<String, bool> = BTreeMap::new();
        let mut verdict = "dnat";
        for number in 0..40 * wanted.len().max(1) {
            self.port = self.port.checked_add(1).unwrap_or(1024);
            self.machine.forget_clients();
            match self.send(case, flow, self.port) {
                Fate::Forward(endpoint, masqueraded) => {
                    if !case.state["affinity"].is_null() {
                        self.port = self.port.checked_add(1).unwrap_or(1024);
                        let again = self.send(case, flow, self.port);
                        assert_eq!(again, Fate::Forward(endpoint, masqueraded), "{}: the client stays", case.id);
                    }
                    let before = seen.insert(endpoint.to_string(), masqueraded);
                    assert!(before.is_none_or(|it| it == masqueraded), "{} {}", case.id, flow.name);
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
        let hairpin = seen.iter().filter(|(_, it)| **it && !masquerade).map(|(endpoint, _)| endpoint.clone()).collect();
        let endpoints = seen.into_keys().collect();
        Expect { verdict: verdict.to_owned(), endpoints, masquerade, hairpin }
    }
}

#[test]
fn every_packet_of_others_meets_its_fate_in_the_kernel() {
    on_a_node(|| {
        let mut runner = Runner::new();
        let all: Vec<Case> = cases::all().into_iter().chain(cases::with_other_node_ports()).collect();
        let mut met = BTreeSet::new();
        for mode in ["iptables", "nftables"] {
            let (mut rows, mut agreeing) = (0, 0);
            for case in all.iter().filter(|case| case.applies_to.iter().any(|it| it == mode)) {
                // By way of what was there before, where there was something.
                runner.start(case, mode, !case.previous_objects.is_empty());
                if !case.previous_objects.is_empty() {
                    runner.machine.change(case, mode, changes_from_previous(case));
                }
                for (number, flow) in case.flows.iter().enumerate() {
                    if !flow.is_of(mode) || case.is_from_node(flow) {
                        continue;
                    }
                    met.insert((case.id.clone(), number));
                    rows += 1;
                    let found = runner.verdict(case, flow);
                    if flow.accepts(found.clone()) {
                        agreeing += 1;
                    } else {
                        eprintln!("{mode} {} {}: {found:?} instead of {:?}", case.id, flow.name, flow.expect);
                    }
                }
            }
            println!("{mode}, by the programs: {agreeing} of {rows} rows agree");
            assert_eq!(agreeing, rows);
        }
        let of_the_file = met.iter().filter(|(id, _)| !id.ends_with(cases::OTHER_NODE_PORTS)).count();
        println!("by the programs: {of_the_file} of the file's rows, {} with other NodePorts", met.len() - of_the_file);
        assert_eq!(of_the_file, 576);
    });
}

#[test]
fn udp_flows_are_where_they_may_be_after_every_change() {
    on_a_node(|| {
        let mut runner = Runner::new();
        let mut required = 0;
        for case in cases::all().iter().filter(|case| case.state["conntrackCleanupRequired"].is_boolean()) {
            required += u32::from(case.state["conntrackCleanupRequired"] == true);
            for mode in &case.applies_to {
                runner.start(case, mode, true);
                runner.port += 1;
                let port = runner.port;
                let before: Vec<Fate> = case.flows.iter().map(|flow| runner.send(case, flow, port)).collect();
                runner.machine.change(case, mode, changes_from_previous(case));
                for (flow, before) in case.flows.iter().zip(before) {
                    let after = runner.send(case, flow, port);
                    let allowed = match &after {
                        Fate::Forward(endpoint, _) => flow.expect.endpoints.contains(&endpoint.to_string()),
                        Fate::Reject => flow.expect.verdict == "reject",
                        Fate::Drop => flow.expect.verdict == "drop",
                        Fate::Pass => flow.expect.verdict == "pass",
                    };
                    assert!(allowed, "{} {}: {before:?} became {after:?}", case.id, flow.name);
                    if let Fate::Forward(endpoint, _) = &before
                        && flow.expect.endpoints.contains(&endpoint.to_string())
                    {
                        assert_eq!(before, after, "{} {}: a flow whose endpoint serves stays", case.id, flow.name);
                    }
                }
            }
        }
        assert_eq!(required, 6);
    });
}
