//! More changes than anybody needs to see: a thousand EndpointSlice changes a second come by a watch, and the agent keeps up.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tests::cluster::{TARGET, cluster_ips};
use tests::manifest::{Service, SliceEndpoint, endpoint_slice};
use tests::traffic::client::echo_on;
use tests::{Agent, Lab, Pod, Protocol, Server, Topology, WatchServer};

/// How soon the last change has to be seen; far above what it takes.
const SOON: Duration = Duration::from_secs(5);
/// The Services that change, by number.
const FLOODED: std::ops::Range<u16> = 20..60;
/// The one that doesn't.
const STEADY: u16 = 10;
/// How many changes come in a second, and for how many.
const RATE: u32 = 1000;
const SECONDS: u32 = 3;
/// How many come at once.
const BURST: u32 = 10;
/// How many Services change while the agent sleeps: each often.
const SLEPT: u32 = 4;

/// A node with three pods, its agent on a watch server, and Services of one endpoint each.
struct World {
    agent: Agent,
    server: WatchServer,
    _servers: Vec<Server>,
    lab: Lab,
    /// The pod behind each of the Services that change.
    behind: BTreeMap<(u16, bool), u8>,
}

impl World {
    fn new() -> Self {
        let lab = Lab::new(Topology { nodes: 1, pods_per_node: 3, ..Topology::default() });
        let server = WatchServer::start(&lab).unwrap();
        let servers = [1, 2].map(|pod| lab.serve(lab.pod(1, pod), TARGET)).into();
        let mut behind = BTreeMap::new();
        for number in FLOODED.chain([STEADY]) {
            let service = Service::new(&format!("s{number}")).dual_stack(number);
            server.put(service.port("tcp", "TCP", 80, TARGET).port("udp", "UDP", 80, TARGET));
            for v4 in [true, false] {
                server.put(slice(number, v4, lab.pod(1, 1)));
                behind.insert((number, v4), 1);
            }
        }
        behind.retain(|(number, _), _| *number != STEADY);
        let agent = Agent::start_on_api_server(&lab, lab.node(1), server.kubeconfig(), &[]);
        Self { agent, server, _servers: servers, lab, behind }
    }

    /// One change among so many Services: the endpoint of one of them and of one family becomes the other pod.
    fn change(&mut self, number: u32, services: u32) {
        let service = FLOODED.start + u16::try_from(number * 7 % services).unwrap();
        // Both families of a Service get their turns.
        let v4 = (number / services + number).is_multiple_of(2);
        let pod = self.behind.get_mut(&(service, v4)).unwrap();
        *pod = 3 - *pod;
        self.server.put(slice(service, v4, self.lab.pod(1, *pod)));
    }

    /// Waits until so many changes are taken in since, and the kernel sends to where the last changes say, and nowhere else.
    fn expect_last_state(&self, before: Counts, changes: u32) {
        let client = self.lab.client(self.lab.pod(1, 3)).with_timeout(Duration::from_millis(500));
        let start = Instant::now();
        loop {
            let done = self.counts().since(before);
            if done.changes == u64::from(changes) {
                break;
            }
            assert!(start.elapsed() < SOON, "{changes} changes came: {done:?}");
            thread::sleep(Duration::from_millis(10));
        }
        for (&(number, v4), &pod) in &self.behind {
            let to = cluster_ips(number)[usize::from(!v4)];
            let name = &self.lab.pod(1, pod).name;
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                client
                    .ask_until(protocol, to, SOON.saturating_sub(start.elapsed()), |answer| {
                        answer.as_ref().is_ok_and(|answer| answer.by == *name)
                    })
                    .unwrap_or_else(|error| panic!("{protocol:?} {to} is not {name}'s: {error}"));
            }
        }
    }

    /// What was done so far.
    fn counts(&self) -> Counts {
        let text = get(&self.lab, "/metrics");
        let number = |name: &str| -> u64 {
            let lines = text.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
            lines.map(|(_, value)| value.parse::<f64>().unwrap() as u64).sum()
        };
        Counts {
            changes: number("kubeproxy_sync_proxy_rules_endpoint_changes_total"),
            syncs: number("kubeproxy_sync_proxy_rules_duration_seconds_count"),
            entries: self.agent.cli_json(&["status"])["agent"]["entriesWritten"].as_u64().unwrap(),
        }
    }
}

/// What an agent has done.
#[derive(Clone, Copy, Debug)]
struct Counts {
    /// Changes of EndpointSlices that were taken in.
    changes: u64,
    /// How often a family's tables were written.
    syncs: u64,
    /// Entries of tables that were written.
    entries: u64,
}

impl Counts {
    fn since(self, before: Self) -> Self {
        Self {
            changes: self.changes - before.changes,
            syncs: self.syncs - before.syncs,
            entries: self.entries - before.entries,
        }
    }
}

fn slice(number: u16, v4: bool, pod: &Pod) -> Value {
    let address: IpAddr = if v4 { pod.v4.into() } else { pod.v6.into() };
    let endpoint = SliceEndpoint { address, node: pod.node.clone(), serving: true, terminating: false };
    let name = format!("s{number}-{}", if v4 { "v4" } else { "v6" });
    endpoint_slice(&name, &format!("s{number}"), &[("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)], &[endpoint])
}

fn get(lab: &Lab, path: &str) -> String {
    let to = SocketAddr::from(([127, 0, 0, 1], 10249));
    let mut stream = lab.host_client(lab.node(1)).connect(to).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Ends the traffic when it goes.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Does something while connections to the Service that doesn't change are made, and are open; returns what broke.
fn beside_traffic(world: &mut World, work: impl FnOnce(&mut World)) -> Vec<String> {
    let client = world.lab.client(world.lab.pod(1, 3));
    let mut open = cluster_ips(STEADY).map(|to| client.connect(to).unwrap());
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let mut broken = Vec::new();
            let mut round = 0;
            while !over.load(Ordering::Relaxed) {
                for (to, stream) in cluster_ips(STEADY).into_iter().zip(&mut open) {
                    if let Err(error) = echo_on(stream, 1000, round) {
                        broken.push(format!("round {round}, open to {to}: {error}"));
                    }
                    for protocol in [Protocol::Tcp, Protocol::Udp] {
                        match client.ask(protocol, to) {
                            Ok(answer) if answer.by == "p1-1" => {}
                            other => broken.push(format!("round {round}, {protocol:?} {to}: {other:?}")),
                        }
                    }
                }
                round += 1;
                thread::sleep(Duration::from_millis(5));
            }
            assert!(round > 10, "only {round} rounds");
            broken
        });
        // Also where `work` panics: the scope waits for the traffic.
        let ends = Ends(&over);
        work(world);
        drop(ends);
        traffic.join().unwrap()
    })
}

#[test]
fn tables_are_made_once_for_a_list_that_comes_in_parts() {
    let lab = Lab::new(Topology { nodes: 1, pods_per_node: 1, ..Topology::default() });
    let server = WatchServer::start(&lab).unwrap();
    for number in 0..1500 {
        server.put(Service::new(&format!("s{number}")).dual_stack(number + 1).port("tcp", "TCP", 80, TARGET));
        server.put(slice(number, true, lab.pod(1, 1)));
    }
    let _agent = Agent::start_on_api_server(&lab, lab.node(1), server.kubeconfig(), &[]);
    let growths = get(&lab, "/metrics");
    let growths: Vec<&str> = growths.lines().filter(|line| line.starts_with("fairlead_table_growths_total")).collect();
    assert_eq!(growths, ["fairlead_table_growths_total 0"]);
}

#[test]
fn no_connection_notices_that_tables_become_larger() {
    let mut world = World::new();
    let growths = |world: &World| -> u64 {
        let text = get(&world.lab, "/metrics");
        let value = text.lines().find_map(|line| line.strip_prefix("fairlead_table_growths_total "));
        value.unwrap().parse().unwrap()
    };
    let before = growths(&world);
    let broken = beside_traffic(&mut world, |world| {
        let client = world.lab.client(world.lab.pod(1, 3)).with_timeout(Duration::from_millis(500));
        let mut number = 1000;
        while growths(world) < before + 2 {
            assert!(number < 20_000, "{} growths", growths(world) - before);
            for _ in 0..500 {
                number += 1;
                let service = Service::new(&format!("s{number}")).dual_stack(number);
                world.server.put(service.port("tcp", "TCP", 80, TARGET).port("udp", "UDP", 80, TARGET));
                world.server.put(slice(number, true, world.lab.pod(1, 2)));
                world.server.put(slice(number, false, world.lab.pod(1, 2)));
            }
            for to in cluster_ips(number) {
                client
                    .ask_until(Protocol::Udp, to, 4 * SOON, |answer| answer.as_ref().is_ok_and(|by| by.by == "p1-2"))
                    .unwrap_or_else(|error| panic!("{to}: {error}"));
            }
        }
    });
    assert_eq!(broken, Vec::<String>::new());
}

#[test]
fn a_flood_of_changes_is_kept_up_with_and_harms_no_other_service() {
    let mut world = World::new();
    let before = world.counts();
    let changes = RATE * SECONDS;
    let broken = beside_traffic(&mut world, |world| {
        let start = Instant::now();
        for burst in 0..changes / BURST {
            (0..BURST).for_each(|number| world.change(burst * BURST + number, FLOODED.len() as u32));
            thread::sleep((Duration::from_secs(1) * BURST / RATE * (burst + 1)).saturating_sub(start.elapsed()));
        }
        world.expect_last_state(before, changes);
    });
    assert_eq!(broken, Vec::<String>::new());
    let done = world.counts().since(before);
    assert!(done.syncs < done.changes, "{done:?}");
}

#[test]
fn what_changed_again_and_again_while_the_agent_slept_is_written_a_few_times() {
    let mut world = World::new();
    let before = world.counts();
    world.change(0, SLEPT);
    world.expect_last_state(before, 1);
    let one = world.counts().since(before);
    let before = world.counts();
    let pid = Pid::from_raw(world.agent.pid().unwrap().cast_signed()).unwrap();
    let broken = beside_traffic(&mut world, |world| {
        kill_process(pid, Signal::STOP).unwrap();
        (0..RATE).for_each(|number| world.change(number, SLEPT));
        thread::sleep(Duration::from_millis(500));
        kill_process(pid, Signal::CONT).unwrap();
        world.expect_last_state(before, RATE);
    });
    assert_eq!(broken, Vec::<String>::new());
    let done = world.counts().since(before);
    assert!(done.syncs < done.changes / 4, "{done:?}");
    assert!(done.entries < done.changes * one.entries / 2, "{done:?}, and one change: {one:?}");
}
