//! Packets to the number of a NodePort that are the node's own.

use super::*;

/// The node's address with the number of a NodePort, and a machine that has it.
fn node_port(case: &Case) -> (SocketAddr, Machine) {
    let mut machine = case.machine(0);
    let any = Addr::from(case.node()).unspecified().into();
    let flags = frontend_flags::NODE_PORT | frontend_flags::MASQUERADE;
    add_service(&mut machine, 2, SocketAddr::new(any, 30_080), &[case.endpoint()], flags);
    (SocketAddr::new(case.node(), 30_080), machine)
}

#[test]
fn what_opens_no_connection_and_belongs_to_none_is_the_nodes() {
    for case in [V4, V6] {
        let (port, mut machine) = node_port(&case);
        for segment in [ACK, SYN_ACK, FIN, Segment::Tcp(tcp_flags::RST)] {
            let sent = frame(case.client(), port, segment);
            let mut packet = sent.clone();
            assert_eq!(enter(&mut machine, &mut packet), Action::Next(Reason::MidFlowForeign));
            assert_eq!(packet, sent);
        }
        assert!(machine.flows.is_empty());
        assert_eq!(cross(&mut machine, case.client(), port, SYN).1, case.endpoint());
        assert_eq!(cross(&mut machine, case.client(), port, ACK).1, case.endpoint());
    }
}

#[test]
fn an_answer_to_what_the_node_has_sent_from_such_a_port_is_the_nodes_for_half_a_minute() {
    for case in [V4, V6] {
        for (seconds, is_answer) in [(0, true), (30, true), (31, false)] {
            let (port, mut machine) = node_port(&case);
            let mut question = frame(port, case.client(), Segment::Udp);
            assert_eq!(leave(&mut machine, &mut question), Action::Next(Reason::NotService));
            machine.now += seconds;
            let answer = frame(case.client(), port, Segment::Udp);
            let mut packet = answer.clone();
            let expected = if is_answer { Reason::MidFlowForeign } else { Reason::NewFlow };
            assert_eq!(enter(&mut machine, &mut packet), Action::Next(expected), "after {seconds} s");
            assert_eq!(packet == answer, is_answer, "after {seconds} s");
        }
    }
}
