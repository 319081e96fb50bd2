//! Clients that stay with their endpoint, packet by packet, with a clock that is set by hand.

use std::collections::BTreeSet;

use super::*;
use crate::{affinity::AffinityKey, tables::State as _};

/// Makes the clients of every Service stay with their endpoint for so many seconds.
fn make_sticky(machine: &mut Machine, seconds: u32) {
    let sets = endpoint_flags::IN_CLUSTER | endpoint_flags::IN_LOCAL;
    machine.tables.endpoints.values_mut().for_each(|endpoint| endpoint.flags |= sets);
    machine.tables.frontends.values_mut().for_each(|frontend| frontend.affinity = seconds);
}

/// Eight endpoints for each case, and its client at another port.
fn eight(case: Case) -> (Vec<SocketAddr>, impl Fn(u16) -> SocketAddr) {
    let endpoints = (0..8).map(|port| SocketAddr::new(case.endpoint().ip(), 8000 + port)).collect();
    (endpoints, move |port| SocketAddr::new(case.client().ip(), port))
}

#[test]
fn a_client_stays_with_its_endpoint_while_it_comes_back_in_time() {
    for (case, segment) in [(V4, SYN), (V6, SYN), (V4, Segment::Udp), (V6, Segment::Udp)] {
        let (endpoints, client) = eight(case);
        let mut machine = Machine { now: 5, ..Machine::default() };
        add_service(&mut machine, 1, case.service(), &endpoints, 0);
        make_sticky(&mut machine, 10_800);
        let first = cross(&mut machine, client(1), case.service(), segment).1;
        for port in 2..40 {
            // 2^30 ns each, so 10,737 seconds.
            machine.now += 10_000;
            assert_eq!(cross(&mut machine, client(port), case.service(), segment).1, first);
        }
        let other = SocketAddr::new(case.node(), 1);
        let others: Vec<_> = (0..40)
            .map(|port| cross(&mut machine, SocketAddr::new(other.ip(), port), case.service(), segment).1)
            .collect();
        assert!(others.iter().all(|it| *it == others[0]), "another client, one endpoint of its own");
        let mut found = BTreeSet::new();
        for port in 100..140 {
            machine.now += 10_100;
            found.insert(cross(&mut machine, client(port), case.service(), segment).1);
        }
        assert!(found.len() > 4, "after 10,845 seconds the choice is free: {found:?}");
    }
}

#[test]
fn all_frontends_of_a_service_port_share_what_is_remembered() {
    for case in [V4, V6] {
        let (endpoints, client) = eight(case);
        let mut machine = case.machine(0);
        add_service(&mut machine, 1, case.service(), &endpoints, 0);
        let node_port = SocketAddr::new(Addr::from(case.node()).unspecified().into(), 30080);
        add_service(&mut machine, 1, node_port, &endpoints, frontend_flags::NODE_PORT | frontend_flags::MASQUERADE);
        let other = SocketAddr::new(case.service().ip(), 443);
        add_service(&mut machine, 2, other, &endpoints, 0);
        make_sticky(&mut machine, 60);
        let through_node = SocketAddr::new(case.node(), 30080);
        let first = cross(&mut machine, client(1), case.service(), SYN).1;
        let mut elsewhere = BTreeSet::new();
        for port in 2..40 {
            let mut frame = frame(client(port), through_node, SYN);
            assert_eq!(enter(&mut machine, &mut frame), Action::Next(Reason::NewFlow));
            assert_eq!(ends(&frame).1, first);
            elsewhere.insert(cross(&mut machine, client(port), other, SYN).1);
        }
        assert_eq!(elsewhere.len(), 1, "another port of the Service has an endpoint of its own");
    }
}

#[test]
fn only_new_connections_refresh_what_is_remembered() {
    let (endpoints, client) = eight(V4);
    let mut machine = Machine { now: 5, ..Machine::default() };
    add_service(&mut machine, 1, V4.service(), &endpoints, 0);
    make_sticky(&mut machine, 100);
    for (port, segment) in [(1, SYN), (2, Segment::Udp)] {
        machine.affinities.clear();
        let first = cross(&mut machine, client(port), V4.service(), segment).1;
        let seen = |machine: &Machine| machine.affinities.values().next().unwrap().seen;
        let begin = seen(&machine);
        for _ in 0..5 {
            machine.now += 10;
            let more = if matches!(segment, Segment::Udp) { segment } else { ACK };
            assert_eq!(cross(&mut machine, client(port), V4.service(), more).1, first);
        }
        assert_eq!(seen(&machine), begin);
        // A forgotten connection follows its client, and begins nothing.
        if !matches!(segment, Segment::Udp) {
            machine.flows.clear();
            assert_eq!(cross(&mut machine, client(port), V4.service(), ACK).1, first);
            assert_eq!(seen(&machine), begin);
        }
        cross(&mut machine, client(port + 10), V4.service(), segment);
        assert!(seen(&machine) > begin);
    }
}

#[test]
fn a_remembered_endpoint_must_be_one_that_may_be_chosen() {
    type Edit = fn(&mut Endpoint);
    let edits: [(&str, Edit); 4] = [
        ("gone", |endpoint| endpoint.flags = 0),
        ("its id stands for another", |endpoint| endpoint.generation += 1),
        ("serving, and not ready", |endpoint| endpoint.flags = endpoint_flags::SERVING | endpoint_flags::IN_LOCAL),
        ("another Service's", |endpoint| endpoint.service += 1),
    ];
    for (name, edit) in edits {
        let (endpoints, client) = eight(V4);
        let mut machine = Machine::default();
        add_service(&mut machine, 1, V4.service(), &endpoints, 0);
        make_sticky(&mut machine, 100);
        cross(&mut machine, client(1), V4.service(), SYN);
        let old = machine.affinities.values().next().unwrap().endpoint_id;
        edit(machine.tables.endpoints.get_mut(&old).unwrap());
        // The range that no longer has it.
        let range = Range { offset: 150, len: 7 };
        let others: Vec<u32> = (100..108).filter(|id| *id != old).collect();
        machine.tables.slots.extend((150..).zip(others));
        for frontend in machine.tables.frontends.values_mut() {
            (frontend.internal, frontend.external) = (range, range);
        }
        let next = cross(&mut machine, client(2), V4.service(), SYN).1;
        let new = machine.affinities.values().next().unwrap().endpoint_id;
        assert_ne!(new, old, "{name}");
        for port in 3..20 {
            assert_eq!(
                cross(&mut machine, client(port), V4.service(), SYN).1,
                next,
                "{name}: the new choice is remembered"
            );
        }
    }
}

#[test]
fn a_client_outside_stays_only_with_endpoints_of_this_node_under_policy_local() {
    let (endpoints, client) = eight(V4);
    for (local, stays) in [(true, true), (false, false)] {
        let mut machine = Machine::default();
        add_service(&mut machine, 1, V4.service(), &endpoints, frontend_flags::EXTERNAL_LOCAL);
        make_sticky(&mut machine, 100);
        let here = 103;
        for (id, endpoint) in machine.tables.endpoints.iter_mut() {
            endpoint.flags = endpoint_flags::SERVING | endpoint_flags::IN_CLUSTER;
            if id == here || local {
                endpoint.flags |= endpoint_flags::IN_LOCAL;
            }
        }
        let key = AffinityKey { client: Addr::from(V4.client().ip()), service: 1 };
        machine.insert_affinity(&key, 105, 1);
        for frontend in machine.tables.frontends.values_mut() {
            frontend.external = Range { offset: here, len: 1 };
        }
        let found = cross(&mut machine, client(1), V4.service(), SYN).1;
        assert_eq!(found, endpoints[if stays { 5 } else { 3 }]);
    }
}
