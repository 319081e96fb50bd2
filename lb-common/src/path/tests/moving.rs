//! Packets that pass while another CPU moves an entry of their connection to the other table.

use super::*;
use crate::flow::{Flow, flow_flags};

/// By which hook a frame passes.
const WAYS: [fn(&mut Machine, &mut Vec<u8>) -> Action; 2] = [enter, leave];

/// Takes a frame through both hooks, and through each of them also with each entry missed by the first look for it: nothing may become
/// of it that would not become of it without. What leaves is answered.
fn cross_beside_every_move(machine: &mut Machine, from: SocketAddr, to: SocketAddr) -> (SocketAddr, SocketAddr) {
    let mut frame = frame(from, to, Segment::Udp);
    for (way, pass) in WAYS.iter().enumerate() {
        let (mut undisturbed, mut out) = (machine.clone(), frame.clone());
        let action = pass(&mut undisturbed, &mut out);
        assert!(matches!(action, Action::Next(_)), "{from} to {to}, {way}: {action:?}");
        // What has not left yet is not answered, and doesn't move.
        let has_left = |flow: &Flow| flow.flags & flow_flags::MASQUERADE == 0 || flow.node_port != Port::ZERO;
        for key in machine.flows.iter().filter(|(_, (flow, _))| has_left(flow)).map(|(key, _)| key) {
            let (mut machine, mut other) = (Machine { moving: Some(*key), ..machine.clone() }, frame.clone());
            let what = format!("{from} to {to}, {way}, while {key:?} moves");
            assert_eq!(pass(&mut machine, &mut other), action, "{what}");
            assert_eq!(ends(&other), ends(&out), "{what}");
            assert!(machine.flows == undisturbed.flows, "{what}: {:?}", machine.flows);
        }
        (*machine, frame) = (undisturbed, out);
    }
    ends(&frame)
}

#[test]
fn what_passes_while_an_entry_moves_goes_where_it_would_go_and_takes_no_others_place() {
    for case in [V4, V6] {
        for flags in [0, frontend_flags::MASQUERADE] {
            let mut machine = case.machine(flags);
            let second = SocketAddr::new(case.service().ip(), 81);
            add_service(&mut machine, 2, second, &[case.endpoint()], flags);
            // Each question is asked again some seconds later, when the entries are looked after.
            for question in 0..4 {
                for service in [case.service(), second] {
                    let (from, to) = cross_beside_every_move(&mut machine, case.client(), service);
                    assert_eq!(to, case.endpoint());
                    let answer = cross_beside_every_move(&mut machine, to, from);
                    assert_eq!(answer, (service, case.client()), "question {question}");
                }
                machine.now += 3;
            }
            // The client speaks to the endpoint straight as well, and so does the node, from the port of one of the two.
            let (from, to) = cross_beside_every_move(&mut machine, case.client(), case.service());
            for again in 0..2 {
                cross_beside_every_move(&mut machine, case.client(), case.endpoint());
                if flags != 0 {
                    let (other, _) = cross_beside_every_move(&mut machine, from, to);
                    assert_ne!(other, from, "{again}");
                }
                machine.now += 3;
            }
        }
    }
}

#[test]
fn an_answer_to_a_client_outside_is_told_from_others_while_its_entry_moves() {
    for case in [V4, V6] {
        let mut machine = case.machine(0);
        let (from, to) = cross(&mut machine, case.client(), case.service(), Segment::Udp);
        let answer = frame(to, from, Segment::Udp);
        let hook = hook_of(3, &answer);
        for key in machine.flows.keys() {
            let mut machine = Machine { moving: Some(*key), ..machine.clone() };
            assert!(super::super::answers_outside(&answer, &hook, &mut Scratch::NEW.clone(), &mut machine), "{key:?}");
        }
    }
}
