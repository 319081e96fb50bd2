//! A client that reaches an endpoint straight, from a port by which it reached it through a frontend, at once or before; and what a
//! bridge shows twice.

use super::*;
use crate::flow::IDLE_TCP;

#[test]
fn a_client_that_goes_straight_to_the_endpoint_later_gets_straight_answers() {
    let mut machine = V4.machine(0);
    cross(&mut machine, V4.client(), V4.service(), SYN);
    cross(&mut machine, V4.endpoint(), V4.client(), SYN_ACK);
    cross(&mut machine, V4.client(), V4.service(), FIN);
    cross(&mut machine, V4.endpoint(), V4.client(), FIN);
    assert_eq!(cross(&mut machine, V4.client(), V4.endpoint(), SYN), (V4.client(), V4.endpoint()));
    assert_eq!(cross(&mut machine, V4.endpoint(), V4.client(), SYN_ACK), (V4.endpoint(), V4.client()));
}

#[test]
fn a_client_speaks_to_an_endpoint_straight_and_through_a_service_at_once() {
    for case in [V4, V6] {
        for flags in [0, frontend_flags::MASQUERADE] {
            for segment in [SYN, Segment::Udp, INIT] {
                let mut machine = case.machine(flags);
                let (client, service, endpoint) = (case.client(), case.service(), case.endpoint());
                let (answer, middle) = answer_and_middle(segment);
                let through = cross(&mut machine, client, service, segment).0;
                assert_eq!(cross(&mut machine, endpoint, through, answer), (service, client));

                let (straight, to) = cross(&mut machine, client, endpoint, segment);
                assert_eq!((straight.ip(), to), (client.ip(), endpoint), "the client's address is kept");
                assert!(straight != client && straight != through);
                for _ in 0..2 {
                    assert_eq!(cross(&mut machine, endpoint, straight, answer), (endpoint, client));
                    assert_eq!(cross(&mut machine, client, endpoint, middle), (straight, endpoint));
                    assert_eq!(cross(&mut machine, endpoint, through, middle), (service, client));
                    assert_eq!(cross(&mut machine, client, service, middle), (through, endpoint));
                    // The other entries are looked after in the meantime.
                    machine.now += 5;
                }

                // A port shows again what its bridge has made an answer, and that looks like the other's before it was.
                let mut packet = frame(endpoint, straight, middle);
                enter(&mut machine, &mut packet);
                assert_eq!(leave(&mut machine, &mut packet), Action::Next(Reason::Reply));
                let hook = Hook { finished: true, ..hook_of(4, &packet) };
                egress(&mut packet, &hook, &mut Scratch::NEW.clone(), &mut machine);
                assert_eq!(ends(&packet), (endpoint, client));

                // Each lives as long as it is used.
                machine.now += crate::flow::IDLE_UDP_REPLIED - 1;
                cross(&mut machine, client, endpoint, middle);
                machine.now += 2;
                assert_eq!(cross(&mut machine, endpoint, straight, middle), (endpoint, client));
                assert_eq!(cross(&mut machine, client, endpoint, middle), (straight, endpoint));
            }
        }
    }
}

/// Connects through the Service and straight, from one port: the port that the straight connection has instead.
fn connect_both_ways(machine: &mut Machine, case: &Case) -> SocketAddr {
    let (client, service, endpoint) = (case.client(), case.service(), case.endpoint());
    cross(machine, client, service, SYN);
    cross(machine, endpoint, client, SYN_ACK);
    let straight = cross(machine, client, endpoint, SYN).0;
    assert_ne!(straight, client);
    cross(machine, endpoint, straight, SYN_ACK);
    straight
}

#[test]
fn a_straight_connection_has_its_own_port_again_when_the_other_is_over() {
    for case in [V4, V6] {
        let mut machine = case.machine(0);
        let (client, service, endpoint) = (case.client(), case.service(), case.endpoint());
        let straight = connect_both_ways(&mut machine, &case);
        for (from, to) in [(client, service), (endpoint, client), (client, endpoint), (endpoint, straight)] {
            cross(&mut machine, from, to, FIN);
        }
        assert_eq!(cross(&mut machine, client, endpoint, SYN), (client, endpoint));
        assert_eq!(cross(&mut machine, endpoint, client, SYN_ACK), (endpoint, client));
        assert_eq!(cross(&mut machine, client, endpoint, ACK), (client, endpoint));
    }
}

#[test]
fn a_straight_connection_lives_for_days_if_it_is_used() {
    for case in [V4, V6] {
        let mut machine = case.machine(0);
        let straight = connect_both_ways(&mut machine, &case);
        for _ in 0..5 {
            machine.now += IDLE_TCP - 4000;
            assert_eq!(cross(&mut machine, case.client(), case.endpoint(), ACK), (straight, case.endpoint()));
            assert_eq!(cross(&mut machine, case.endpoint(), straight, ACK), (case.endpoint(), case.client()));
        }
    }
}

#[test]
fn a_half_closed_connection_goes_on_beside_a_straight_one_and_beside_another_frontends() {
    for case in [V4, V6] {
        let (client, service, endpoint) = (case.client(), case.service(), case.endpoint());
        let second = SocketAddr::new(service.ip(), 81);
        for to in [endpoint, second] {
            let mut machine = case.machine(0);
            add_service(&mut machine, 2, second, &[endpoint], 0);
            cross(&mut machine, client, service, SYN);
            cross(&mut machine, endpoint, client, SYN_ACK);
            cross(&mut machine, client, service, FIN);
            let other = cross(&mut machine, client, to, SYN).0;
            assert_ne!(other, client);
            assert_eq!(cross(&mut machine, endpoint, other, SYN_ACK), (to, client));
            assert_eq!(cross(&mut machine, endpoint, client, ACK), (service, client));
            assert_eq!(cross(&mut machine, client, service, ACK), (client, endpoint));
        }
    }
}

#[test]
fn what_an_endpoint_still_sends_to_a_closed_straight_connection_takes_over_no_new_one() {
    for case in [V4, V6] {
        let mut machine = case.machine(0);
        let (client, service, endpoint) = (case.client(), case.service(), case.endpoint());
        let straight = connect_both_ways(&mut machine, &case);
        for to in [service, endpoint] {
            cross(&mut machine, client, to, Segment::Tcp(tcp_flags::RST));
        }
        assert_eq!(cross(&mut machine, client, endpoint, SYN).0, client);
        cross(&mut machine, endpoint, client, SYN_ACK);
        // Over and over, so that entries are looked after.
        for _ in 0..3 {
            machine.now += 5;
            let _ = cross(&mut machine, endpoint, straight, ACK);
            assert_eq!(cross(&mut machine, client, endpoint, ACK), (client, endpoint));
            assert_eq!(cross(&mut machine, endpoint, client, ACK), (endpoint, client));
        }
    }
}

#[test]
fn a_closed_connection_is_outlived_by_a_straight_one_whose_requests_the_host_does_not_see() {
    for flags in [0, frontend_flags::MASQUERADE] {
        let mut machine = V4.machine(flags);
        let (client, service, endpoint) = (V4.client(), V4.service(), V4.endpoint());
        let through = cross(&mut machine, client, service, SYN).0;
        cross(&mut machine, endpoint, through, SYN_ACK);
        cross(&mut machine, client, service, FIN);
        cross(&mut machine, endpoint, through, FIN);
        // Ports of one bridge: the request is for another MAC address, the answer leaves by a port like any packet.
        for answer in [SYN_ACK, ACK] {
            let mut packet = frame(endpoint, client, answer);
            leave(&mut machine, &mut packet);
            assert_eq!(ends(&packet), (endpoint, client), "{flags}");
        }
        // Until the port is used by the Service again.
        let through = cross(&mut machine, client, service, SYN).0;
        assert_eq!(cross(&mut machine, endpoint, through, SYN_ACK), (service, client));
    }
}

#[test]
fn an_error_that_a_bridge_shows_again_stays_with_its_connection() {
    let mut machine = V4.machine(0);
    let (client, service, endpoint) = (V4.client(), V4.service(), V4.endpoint());
    cross(&mut machine, client, service, Segment::Udp);
    cross(&mut machine, endpoint, client, Segment::Udp);
    assert_ne!(cross(&mut machine, client, endpoint, Segment::Udp).0, client);

    // About the answer of the Service, as the client sends it.
    let mut error = port_unreachable(client.ip(), service.ip(), &frame(service, client, Segment::Udp));
    assert_eq!(enter(&mut machine, &mut error), Action::Next(Reason::IcmpError));
    let at_the_port = error.clone();
    let hook = Hook { translated: true, ..hook_of(4, &error) };
    ingress(&mut error, &hook, &mut Scratch::NEW.clone(), &mut machine);
    assert_eq!(error, at_the_port);
}

#[test]
fn an_address_of_an_endpoint_that_becomes_a_services_is_a_services() {
    for segment in [SYN, Segment::Udp] {
        let mut machine = V4.machine(0);
        let (client, service, endpoint) = (V4.client(), V4.service(), V4.endpoint());
        cross(&mut machine, client, service, segment);
        let (straight, _) = cross(&mut machine, client, endpoint, segment);
        assert_ne!(straight, client);
        let other: SocketAddr = "10.244.3.3:8080".parse().unwrap();
        add_service(&mut machine, 2, endpoint, &[other], 0);
        assert_eq!(cross(&mut machine, client, endpoint, segment), (client, other));
    }
}

#[test]
fn a_request_that_a_bridge_shows_again_keeps_its_flow() {
    // Also where another frontend shares the endpoint's bit, so that the first glance doesn't end its way.
    for shares_bit in [false, true] {
        let mut machine = V4.machine(0);
        if shares_bit {
            let endpoint = V4.endpoint();
            machine.tables.frontend_bits.insert(bit_index(&endpoint.ip().into(), Port::new(endpoint.port())));
        }
        for segment in [SYN, Segment::Udp] {
            let mut packet = frame(V4.client(), V4.service(), segment);
            enter(&mut machine, &mut packet);
            let hook = Hook { translated: true, ..hook_of(4, &packet) };
            let action = ingress(&mut packet, &hook, &mut Scratch::NEW.clone(), &mut machine);
            assert_eq!(action, Action::Next(Reason::NotService));
            let (answer, _) = answer_and_middle(segment);
            assert_eq!(cross(&mut machine, V4.endpoint(), V4.client(), answer), (V4.service(), V4.client()));

            // The bridge itself, where the hint was lost; also while the client speaks to the endpoint straight.
            let bridge = Device { flags: device_flags::HAS_PORTS, ..Device::default() };
            machine.tables.devices.insert(4, bridge);
            for _ in 0..2 {
                let mut packet = frame(V4.client(), V4.service(), segment);
                enter(&mut machine, &mut packet);
                let hook = Hook { translated: false, ..hook };
                let action = ingress(&mut packet, &hook, &mut Scratch::NEW.clone(), &mut machine);
                assert_eq!(action, Action::Next(Reason::NotService));
                assert_eq!(ends(&packet), (V4.client(), V4.endpoint()));
                assert_eq!(cross(&mut machine, V4.endpoint(), V4.client(), answer), (V4.service(), V4.client()));
                assert_ne!(cross(&mut machine, V4.client(), V4.endpoint(), segment).0, V4.client());
            }
        }
    }
}
