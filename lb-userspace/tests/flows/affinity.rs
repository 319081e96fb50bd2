//! Session affinity as the facts of its cases say it: packets through model, plan, image and the path that the kernel runs, with a clock
//! that is set by hand.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use fairlead::{model::Change, pipeline::Pipeline};
use lb_common::{
    memory::Machine,
    path::{Action, Hook, Scratch, ingress},
    reason::Reason,
};
use serde::Deserialize;

use crate::{
    cases::{self, Case, Flow},
    kernel::{frame, parse},
    pipeline::{device, from_scratch, objects},
};

/// So many clients: by chance all of them would choose alike once in 2^63 runs.
const CLIENTS: u8 = 64;

/// A tick of the machine's clock, in nanoseconds.
const TICK: u64 = 1 << 30;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Facts {
    key: Vec<String>,
    timeout_seconds: u64,
    refreshed_on_each_new_connection: bool,
    #[serde(rename = "sharedAcrossVIPs")]
    shared_across_vips: bool,
    shared_across_ports: bool,
    sticky_only_while_endpoint_usable: bool,
}

struct World<'a> {
    case: &'a Case,
    pipeline: Pipeline,
    machine: Machine,
    /// Every connection is a new one.
    port: u16,
}

impl<'a> World<'a> {
    fn new(case: &'a Case, mode: &str) -> Self {
        let pipeline = from_scratch(case, mode);
        let machine = Machine { tables: pipeline.image().memory().clone(), ..Machine::default() };
        Self { case, pipeline, machine, port: 1024 }
    }

    fn wait(&mut self, seconds: u64) {
        self.machine.now += u32::try_from(seconds * 1_000_000_000 / TICK).unwrap();
    }

    /// Where one more connection of a client goes.
    fn connect(&mut self, flow: &Flow, client: u8) -> SocketAddr {
        let from = match flow.from {
            IpAddr::V4(ip) => IpAddr::from([ip.octets()[0], ip.octets()[1], ip.octets()[2], client]),
            IpAddr::V6(ip) => IpAddr::from((u128::from(ip) & !0xff | u128::from(client)).to_be_bytes()),
        };
        self.port += 1;
        let mut packet = frame(&Flow { from, ..flow.clone() }, self.port);
        let hook = Hook {
            device: device(flow),
            link_header: 14,
            v6: from.is_ipv6(),
            translated: false,
            finished: false,
            from_node: false,
        };
        let action = ingress(&mut packet, &hook, &mut Scratch::NEW.clone(), &mut self.machine);
        assert!(matches!(action, Action::Next(Reason::NewFlow)), "{} {}: {action:?}", self.case.id, flow.name);
        parse(&packet).to
    }

    /// Where one more connection of each goes.
    fn connect_all(&mut self, flow: &Flow) -> Vec<SocketAddr> {
        (1..=CLIENTS).map(|client| self.connect(flow, client)).collect()
    }

    /// An endpoint is usable no more.
    fn lose(&mut self, endpoint: SocketAddr) {
        let mut values = self.case.objects.clone();
        let endpoints = values.iter_mut().filter_map(|object| object["endpoints"].as_array_mut()).flatten();
        let lost = endpoints.filter(|it| it["addresses"][0] == endpoint.ip().to_string());
        let lost = lost.map(|it| it["conditions"] = serde_json::json!({"ready": false, "serving": false}));
        assert_eq!(lost.count(), 1);
        for object in objects(self.case, &values) {
            _ = self.pipeline.take(Change::Upsert(object));
        }
        self.pipeline.compile(u64::from(self.machine.now));
        self.machine.tables = self.pipeline.image().memory().clone();
    }
}

/// The name of the Service's port that a row is sent to.
fn port_of<'a>(case: &'a Case, flow: &Flow) -> &'a str {
    let ports = case.objects.iter().filter_map(|object| object["spec"]["ports"].as_array()).flatten();
    let mut of = ports.filter(|port| port["port"] == flow.port || port["nodePort"] == flow.port);
    of.next().and_then(|port| port["name"].as_str()).unwrap()
}

#[test]
fn clients_stay_with_their_endpoint_as_the_facts_of_the_case_say() {
    let mut counted = 0;
    for case in cases::all().iter().filter(|case| !case.state["affinity"].is_null()) {
        let facts: Facts = serde_json::from_value(case.state["affinity"].clone()).unwrap();
        assert_eq!(facts.key, ["clientIP", "servicePortName"], "{}", case.id);
        let timeout = facts.timeout_seconds;
        for mode in &case.applies_to {
            let new = || World::new(case, mode);
            let [first, .., last] = &case.flows[..] else { panic!("{}: one row says nothing", case.id) };

            let mut world = new();
            let chosen = world.connect_all(first);
            let distinct: BTreeSet<&SocketAddr> = chosen.iter().collect();
            assert_eq!(distinct.len(), first.expect.endpoints.len(), "each client is one of its own");
            world.wait(timeout - 2);
            assert_eq!(world.connect_all(first), chosen, "{}: in time", case.id);
            world.wait(timeout - 2);
            let again = world.connect_all(first);
            assert_eq!(again == chosen, facts.refreshed_on_each_new_connection, "{}", case.id);
            world.wait(timeout + 2);
            assert_ne!(world.connect_all(first), again, "{}: too late", case.id);

            // By every pair of rows in which the same clients ask.
            let mut world = new();
            for (one, other) in case.flows.iter().flat_map(|one| case.flows.iter().map(move |other| (one, other))) {
                if one.from != other.from {
                    continue;
                }
                let hosts = |world: &mut World<'_>, flow| -> Vec<IpAddr> {
                    world.connect_all(flow).iter().map(SocketAddr::ip).collect()
                };
                let is_shared = hosts(&mut world, one) == hosts(&mut world, other);
                let is_one_port = port_of(case, one) == port_of(case, other);
                let want = if is_one_port { facts.shared_across_vips } else { facts.shared_across_ports };
                assert_eq!(is_shared, want, "{}: {} and {}", case.id, one.name, other.name);
            }
            assert_ne!(port_of(case, first), port_of(case, last), "{}: rows of two ports", case.id);

            let mut world = new();
            let chosen = world.connect_all(first);
            world.lose(chosen[0]);
            for (before, after) in chosen.iter().zip(world.connect_all(first)) {
                let stays = *before != chosen[0] || !facts.sticky_only_while_endpoint_usable;
                assert_eq!(after == *before, stays, "{}: {before} became {after}", case.id);
            }
        }
        counted += 1;
    }
    assert_eq!(counted, 2);
}
