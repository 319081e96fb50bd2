//! Requests that leave with the node's address, and its ports.

use super::*;

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
