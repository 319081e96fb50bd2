//! Requests that leave with the node's address, and its ports.

use super::*;
use crate::flow::flow_flags;

#[test]
fn a_masqueraded_request_comes_from_the_node_and_its_answer_finds_the_client() {
    for case in [V4, V6] {
        let mut machine = case.machine(frontend_flags::MASQUERADE);
        let (from, to) = cross(&mut machine, case.client(), case.service(), SYN);
        assert_eq!((from.ip(), to), (case.node(), case.endpoint()));
        assert_eq!(cross(&mut machine, case.endpoint(), from, SYN_ACK), (case.service(), case.client()));
        assert_eq!(cross(&mut machine, case.client(), case.service(), ACK), (from, to), "the port stays");
        assert!(machine.flows.values().all(|(_, confirmed)| *confirmed));
    }
}

#[test]
fn an_answer_finds_the_client_also_where_its_port_is_a_node_port() {
    for case in [V4, V6] {
        for (segment, answer) in [(SYN, SYN_ACK), (Segment::Udp, Segment::Udp)] {
            let mut machine = case.machine(frontend_flags::MASQUERADE);
            let (from, to) = cross(&mut machine, case.client(), case.service(), segment);
            let node_port = SocketAddr::new(Addr::from(case.node()).unspecified().into(), from.port());
            add_service(&mut machine, 2, node_port, &[case.client()], frontend_flags::NODE_PORT);
            assert_eq!(cross(&mut machine, to, from, answer), (case.service(), case.client()));
        }
    }
}

#[test]
fn a_pod_that_reaches_itself_through_its_service_is_masqueraded() {
    let mut machine = V4.machine(0);
    let client = SocketAddr::new(V4.endpoint().ip(), 40000);
    let (from, to) = cross(&mut machine, client, V4.service(), SYN);
    assert_eq!((from.ip(), to), (V4.node(), V4.endpoint()));
    assert_eq!(cross(&mut machine, V4.endpoint(), from, SYN_ACK), (V4.service(), client));
}

#[test]
fn a_port_by_which_the_node_itself_reaches_the_endpoint_is_not_taken() {
    for case in [V4, V6] {
        for segment in [SYN, Segment::Udp] {
            // The port that this connection takes where nobody has it.
            let mut machine = case.machine(frontend_flags::MASQUERADE);
            let (wanted, _) = cross(&mut machine, case.client(), case.service(), segment);
            let mut machine = case.machine(frontend_flags::MASQUERADE);
            let mut request = frame(wanted, case.endpoint(), segment);
            assert_eq!(leave(&mut machine, &mut request), Action::Next(Reason::NotService));
            let (other, _) = cross(&mut machine, case.client(), case.service(), segment);
            assert!(other.ip() == wanted.ip() && other != wanted, "{other}");
            let answer = if matches!(segment, Segment::Udp) { Segment::Udp } else { SYN_ACK };
            let mut reply = frame(case.endpoint(), wanted, answer);
            assert_eq!(enter(&mut machine, &mut reply), Action::Next(Reason::NotService), "it goes to the node");
            assert_eq!(ends(&reply), (case.endpoint(), wanted));
            assert_eq!(cross(&mut machine, case.endpoint(), other, answer), (case.service(), case.client()));
            // Both sides end it, and some time later the port may be taken.
            if matches!(segment, Segment::Tcp(_)) {
                leave(&mut machine, &mut frame(wanted, case.endpoint(), FIN));
                enter(&mut machine, &mut frame(case.endpoint(), wanted, FIN));
            }
            machine.now += 121;
            let (again, _) = cross(&mut machine, case.client(), SocketAddr::new(case.service().ip(), 80), segment);
            assert!(again == wanted || again == other, "{again}");
        }
    }
}

/// A connection of ours with an answer, and who the endpoint sees.
fn masqueraded(case: &Case, segment: Segment) -> (Machine, SocketAddr) {
    let mut machine = case.machine(frontend_flags::MASQUERADE);
    let (ours, _) = cross(&mut machine, case.client(), case.service(), segment);
    let (answer, _) = answer_and_middle(segment);
    assert_eq!(cross(&mut machine, case.endpoint(), ours, answer), (case.service(), case.client()));
    (machine, ours)
}

/// The node itself sends from a port by which a connection of ours is masqueraded: who the endpoint sees.
fn send_second(machine: &mut Machine, ours: SocketAddr, endpoint: SocketAddr, segment: Segment) -> SocketAddr {
    let mut packet = frame(ours, endpoint, segment);
    assert_eq!(leave(machine, &mut packet), Action::Next(Reason::Masqueraded));
    let (from, to) = ends(&packet);
    assert_eq!((from.ip(), to), (ours.ip(), endpoint));
    assert_ne!(from, ours);
    from
}

/// What the endpoint answers goes to the node's stack.
fn receive_second(machine: &mut Machine, from: SocketAddr, to: SocketAddr, ours: SocketAddr, segment: Segment) {
    let mut packet = frame(from, to, segment);
    assert_eq!(enter(machine, &mut packet), Action::Next(Reason::MasqueradeReply));
    assert_eq!(ends(&packet), (from, ours));
}

#[test]
fn what_the_node_itself_opens_from_a_masquerade_port_in_use_gets_another_and_both_go_on() {
    for case in [V4, V6] {
        for segment in [SYN, Segment::Udp, INIT] {
            let (answer, middle) = answer_and_middle(segment);
            let (client, service, endpoint) = (case.client(), case.service(), case.endpoint());
            let (mut machine, ours) = masqueraded(&case, segment);
            let second = send_second(&mut machine, ours, endpoint, segment);
            assert_eq!(send_second(&mut machine, ours, endpoint, segment), second, "sent again");
            receive_second(&mut machine, endpoint, second, ours, answer);
            // Each is alive as long as it is used, in one direction alone as well.
            for _ in 0..3 {
                machine.now += crate::flow::IDLE_UDP_REPLIED - 1;
                assert_eq!(send_second(&mut machine, ours, endpoint, middle), second);
                assert_eq!(cross(&mut machine, client, service, middle), (ours, endpoint));
            }
            receive_second(&mut machine, endpoint, second, ours, middle);
            assert_eq!(cross(&mut machine, endpoint, ours, middle), (service, client));
            assert_eq!(machine.straight, None, "nothing to look for on the way in");

            // Errors find both.
            let about = frame(second, endpoint, middle);
            let mut error = port_unreachable(endpoint.ip(), second.ip(), &about);
            assert_eq!(enter(&mut machine, &mut error), Action::Next(Reason::IcmpError));
            let ends_at = if case.client().is_ipv4() { 14 + 20 + 8 + 20 } else { 14 + 40 + 8 + 40 };
            assert_eq!(error[ends_at..ends_at + 2], ours.port().to_be_bytes());

            // Whatever is evicted of it, the others restore.
            for kind in [Kind::Request, Kind::Forwarded, Kind::Masqueraded] {
                machine.flows.retain(|key, (flow, _)| key.kind != kind as u8 || flow.flags & flow_flags::STRAIGHT == 0);
                machine.now += 2;
                assert_eq!(send_second(&mut machine, ours, endpoint, middle), second, "without {kind:?}");
                receive_second(&mut machine, endpoint, second, ours, middle);
                let of_second = machine.flows.values().filter(|(flow, _)| flow.flags & flow_flags::STRAIGHT != 0);
                assert_eq!(of_second.count(), 3, "without {kind:?}");
            }

            // Both ends of both are done, and the port is whose it is next.
            if matches!(segment, Segment::Tcp(_)) {
                cross(&mut machine, client, service, FIN);
                cross(&mut machine, endpoint, ours, FIN);
                send_second(&mut machine, ours, endpoint, FIN);
                receive_second(&mut machine, endpoint, second, ours, FIN);
                assert!(machine.flows.values().all(|(flow, _)| flow.is_closed()), "all entries know");
            }
            machine.now += crate::flow::IDLE_UDP_REPLIED + 1;
            let mut packet = frame(ours, endpoint, segment);
            assert_eq!(leave(&mut machine, &mut packet), Action::Next(Reason::NotService));
            let mut packet = frame(endpoint, ours, answer);
            assert_eq!(enter(&mut machine, &mut packet), Action::Next(Reason::NotService));
            let (again, _) = cross(&mut machine, client, service, segment);
            assert_ne!(again, ours, "the node has it");
        }
    }
}

#[test]
fn a_bridge_and_its_ports_see_who_came_second_to_a_masquerade_port_once() {
    const PORT: u32 = 8;
    for case in [V4, V6] {
        for segment in [SYN, Segment::Udp, INIT] {
            let (answer, middle) = answer_and_middle(segment);
            let (client, service, endpoint) = (case.client(), case.service(), case.endpoint());
            let (mut machine, ours) = masqueraded(&case, segment);
            machine.tables.devices.get_mut(&UPLINK).unwrap().flags = device_flags::HAS_PORTS;
            machine.tables.devices.insert(PORT, Device { flags: 0, ..machine.tables.devices[&UPLINK] });
            let at = |device, packet: &[u8], translated| Hook { translated, ..hook_of(device, packet) };
            // By the bridge, and then by its port.
            let send = |machine: &mut Machine, from, to, segment| {
                let mut packet = frame(from, to, segment);
                enter(machine, &mut packet);
                for device in [UPLINK, PORT] {
                    let hook = at(device, &packet, true);
                    egress(&mut packet, &hook, &mut Scratch::NEW.clone(), machine);
                }
                ends(&packet)
            };
            let second = send_second(&mut machine, ours, endpoint, segment);
            for segment in [segment, middle] {
                assert_eq!(send(&mut machine, client, service, segment), (ours, endpoint));
                let mut packet = frame(second, endpoint, segment);
                let hook = at(PORT, &packet, false);
                let action = egress(&mut packet, &hook, &mut Scratch::NEW.clone(), &mut machine);
                assert_eq!(action, Action::Next(Reason::NotService));
            }
            // The end of ours is not that of the other.
            if matches!(segment, Segment::Tcp(_)) {
                assert_eq!(send(&mut machine, client, service, FIN), (ours, endpoint));
                let of_second = machine.flows.values().filter(|(flow, _)| flow.flags & flow_flags::STRAIGHT != 0);
                assert_eq!(of_second.filter(|(flow, _)| flow.state & crate::flow::state::CLOSING == 0).count(), 3);
            }
            // The answer the other way.
            let mut packet = frame(endpoint, second, answer);
            for (device, translated) in [(PORT, false), (UPLINK, true)] {
                let hook = at(device, &packet, translated);
                ingress(&mut packet, &hook, &mut Scratch::NEW.clone(), &mut machine);
            }
            assert_eq!(ends(&packet), (endpoint, ours));
        }
    }
}

#[test]
fn fragments_of_an_answer_to_who_came_second_follow_their_first_through_a_bridge() {
    const PORT: u32 = 8;
    let (mut machine, ours) = masqueraded(&V4, Segment::Udp);
    let second = send_second(&mut machine, ours, V4.endpoint(), Segment::Udp);
    machine.tables.devices.get_mut(&UPLINK).unwrap().flags = device_flags::HAS_PORTS;
    for mut fragment in fragments(V4.endpoint(), second) {
        for (device, translated, reason) in [(PORT, false, Reason::MasqueradeReply), (UPLINK, true, Reason::NotService)]
        {
            let hook = Hook { translated, ..hook_of(device, &fragment) };
            super::super::answers_outside(&fragment, &hook, &mut Scratch::NEW.clone(), &mut machine);
            let action = ingress(&mut fragment, &hook, &mut Scratch::NEW.clone(), &mut machine);
            assert_eq!(action, Action::Next(reason));
        }
        assert_eq!(fragment[30..34], [10, 99, 0, 11], "the node's address");
    }
}

#[test]
fn an_error_about_what_the_node_itself_sent_from_a_masquerade_port_is_the_nodes() {
    for case in [V4, V6] {
        let mut machine = case.machine(frontend_flags::MASQUERADE);
        let (wanted, _) = cross(&mut machine, case.client(), case.service(), Segment::Udp);
        let mut machine = case.machine(frontend_flags::MASQUERADE);
        let request = frame(wanted, case.endpoint(), Segment::Udp);
        assert_eq!(leave(&mut machine, &mut request.clone()), Action::Next(Reason::NotService));
        let error = port_unreachable(case.endpoint().ip(), wanted.ip(), &request);
        let mut seen = error.clone();
        assert_eq!(enter(&mut machine, &mut seen), Action::Next(Reason::NotService));
        assert_eq!(seen, error);
    }
}

#[test]
fn a_silent_udp_flow_keeps_its_port_where_the_node_itself_wants_it() {
    let (mut machine, ours) = masqueraded(&V4, Segment::Udp);
    machine.now += crate::flow::SILENT_UDP + 1;
    let second = send_second(&mut machine, ours, V4.endpoint(), Segment::Udp);
    assert_eq!(cross(&mut machine, V4.endpoint(), ours, Segment::Udp), (V4.service(), V4.client()));
    receive_second(&mut machine, V4.endpoint(), second, ours, Segment::Udp);
}

#[test]
fn a_connection_of_the_node_is_not_over_because_one_before_it_from_the_same_port_is() {
    let mut machine = V4.machine(frontend_flags::MASQUERADE);
    let (wanted, _) = cross(&mut machine, V4.client(), V4.service(), SYN);
    let mut machine = V4.machine(frontend_flags::MASQUERADE);
    for segment in [SYN, ACK, FIN] {
        leave(&mut machine, &mut frame(wanted, V4.endpoint(), segment));
    }
    enter(&mut machine, &mut frame(V4.endpoint(), wanted, FIN));
    leave(&mut machine, &mut frame(wanted, V4.endpoint(), SYN));
    // So many that they take whatever is free or closed.
    for i in 0..6000_u16 {
        let mut packet = frame(SocketAddr::new(V4.client().ip(), 10000 + i), V4.service(), SYN);
        enter(&mut machine, &mut packet);
        if leave(&mut machine, &mut packet) == Action::Next(Reason::Masqueraded) {
            assert_ne!(ends(&packet).0, wanted, "connection {i}");
        }
    }
}

#[test]
fn an_evicted_masquerade_entry_is_restored_by_a_request() {
    let mut machine = V4.machine(frontend_flags::MASQUERADE);
    let (from, _) = cross(&mut machine, V4.client(), V4.service(), SYN);
    cross(&mut machine, V4.endpoint(), from, SYN_ACK);
    machine.flows.retain(|key, _| key.kind != Kind::Masqueraded as u8);
    machine.now += 10;
    cross(&mut machine, V4.client(), V4.service(), ACK);
    assert_eq!(cross(&mut machine, V4.endpoint(), from, ACK), (V4.service(), V4.client()));
}

#[test]
fn eight_thousand_flows_share_four_thousand_ports_and_again_after_they_are_idle() {
    let mut machine = V4.machine(frontend_flags::MASQUERADE);
    let endpoints: Vec<SocketAddr> = (1..=4).map(|i| format!("10.244.2.{i}:8080").parse().unwrap()).collect();
    add_service(&mut machine, 1, V4.service(), &endpoints, frontend_flags::MASQUERADE);
    for round in 0..2_u16 {
        let mut lost = 0;
        for i in 0..8000_u16 {
            let client: SocketAddr = format!("198.51.{}.{}:{}", 100 + round, i / 250, 30000 + i).parse().unwrap();
            let mut frame = frame(client, V4.service(), SYN);
            enter(&mut machine, &mut frame);
            lost += usize::from(leave(&mut machine, &mut frame) == Action::Drop(Reason::NoMasqueradePort));
        }
        assert_eq!(lost, 0, "round {round}");
        for (flow, _) in machine.flows.values_mut() {
            flow.state |= crate::flow::state::RESET;
        }
        machine.now += 61;
    }
}

#[test]
fn a_closed_connection_gives_its_port_away_before_a_new_one_fails() {
    let mut machine = V4.machine(frontend_flags::MASQUERADE);
    for i in 0..6000_u16 {
        let client = SocketAddr::new(V4.client().ip(), 10000 + i);
        let (from, _) = cross(&mut machine, client, V4.service(), SYN);
        cross(&mut machine, V4.endpoint(), from, SYN_ACK);
        cross(&mut machine, client, V4.service(), FIN);
        assert_eq!(cross(&mut machine, V4.endpoint(), from, FIN), (V4.service(), client), "connection {i}");
    }
}

#[test]
fn a_connection_that_comes_second_to_a_port_on_another_cpu_takes_the_next_one() {
    let client = |i: u16| SocketAddr::new(V4.client().ip(), 10_000 + i);
    // None, or so many that all ports are held, and may be lent.
    for held in [0, 6000] {
        let mut machine = V4.machine(frontend_flags::MASQUERADE);
        for i in 0..held {
            let mut request = frame(client(i), V4.service(), Segment::Udp);
            enter(&mut machine, &mut request);
            leave(&mut machine, &mut request);
        }
        machine.now += 5;
        machine.second = 3;
        let (from, _) = cross(&mut machine, client(held), V4.service(), Segment::Udp);
        assert_eq!(machine.second, 0);
        assert_eq!(cross(&mut machine, V4.endpoint(), from, Segment::Udp), (V4.service(), client(held)), "{held} held");
    }
}

#[test]
fn a_silent_udp_flow_lends_its_port_before_a_new_one_fails_and_gets_another_when_it_goes_on() {
    let mut machine = V4.machine(frontend_flags::MASQUERADE);
    let client = |i: u16| SocketAddr::new(V4.client().ip(), 10_000 + i);
    let ask = |machine: &mut Machine, i: u16| {
        let (from, _) = cross(machine, client(i), V4.service(), Segment::Udp);
        let answered = cross(machine, V4.endpoint(), from, Segment::Udp);
        assert_eq!(answered, (V4.service(), client(i)), "question {i} by {from}");
        from
    };
    let first = ask(&mut machine, 0);
    let mut talker = ask(&mut machine, 1);
    // 500 a second, and one that is never silent for long.
    for i in 2..9000_u16 {
        ask(&mut machine, i);
        if i % 500 == 0 {
            machine.now += 1;
        }
        if i % 1000 == 0 {
            let now = ask(&mut machine, 1);
            assert_eq!(now, talker, "after {i}: it was not silent");
            talker = now;
        }
    }
    let now = ask(&mut machine, 0);
    let holder = machine.flows.iter().filter(|(key, (flow, _))| {
        key.kind == Kind::Masqueraded as u8 && flow.client_port.number() == client(0).port()
    });
    assert_eq!(holder.count(), 1, "{first}, then {now}");
    // Who has its former port gets its own answers.
    ask(&mut machine, 8999);
    assert_eq!(ask(&mut machine, 0), now);
}
