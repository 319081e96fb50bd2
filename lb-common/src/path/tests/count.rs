//! Each packet is counted once, for the Service port that it belongs to.

use super::*;
use crate::count::{self, ServiceCounters};

/// A frame through a hook, counted as the programs count.
fn pass(machine: &mut Machine, frame: &mut Vec<u8>, enters: bool) {
    let hook = hook_of(UPLINK, frame);
    let mut scratch = Scratch::NEW;
    let action =
        if enters { ingress(frame, &hook, &mut scratch, machine) } else { egress(frame, &hook, &mut scratch, machine) };
    count::packet(action.reason(), scratch.flow.service, frame.len() - hook.link_header, machine);
}

/// The same through the host.
fn send(machine: &mut Machine, from: SocketAddr, to: SocketAddr, segment: Segment) -> (SocketAddr, SocketAddr) {
    let mut frame = frame(from, to, segment);
    pass(machine, &mut frame, true);
    pass(machine, &mut frame, false);
    ends(&frame)
}

#[test]
fn requests_and_answers_are_counted_once_masqueraded_or_not() {
    for case in [V4, V6] {
        for flags in [0, frontend_flags::MASQUERADE] {
            for [first, answer, next] in [[SYN, SYN_ACK, ACK], [Segment::Udp; 3]] {
                let mut machine = case.machine(flags);
                let (node, endpoint) = send(&mut machine, case.client(), case.service(), first);
                assert_eq!(endpoint, case.endpoint());
                assert_eq!(send(&mut machine, endpoint, node, answer), (case.service(), case.client()));
                for _ in 0..2 {
                    send(&mut machine, case.client(), case.service(), next);
                }
                let bytes = |segment| frame(case.client(), case.service(), segment).len() as u64 - 14;
                let expected = ServiceCounters {
                    connections: 1,
                    request_packets: 3,
                    request_bytes: bytes(first) + 2 * bytes(next),
                    reply_packets: 1,
                    reply_bytes: bytes(answer),
                };
                assert_eq!(machine.service_counters, [(1, expected)].into(), "{case:?} {flags}");
            }
        }
    }
}

#[test]
fn what_is_refused_or_no_services_is_not_counted() {
    for case in [V4, V6] {
        let mut machine = Machine::default();
        add_service(&mut machine, 1, case.service(), &[], 0);
        pass(&mut machine, &mut frame(case.client(), case.service(), SYN), true);
        send(&mut machine, case.client(), case.endpoint(), SYN);
        assert_eq!(machine.service_counters, [].into());
    }
}
