//! The life of a TCP connection, as its segments tell it to a [`Machine`].

use super::*;

const RST: Segment = Segment::Tcp(tcp_flags::RST);

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Client,
    Server,
}
use By::{Client, Server};

/// Both families, each with the client's own address and with the node's.
fn cases() -> impl Iterator<Item = (Case, u32)> {
    [V4, V6].into_iter().flat_map(|case| [0, frontend_flags::MASQUERADE].map(|flags| (case, flags)))
}

/// One connection to the first endpoint of a machine.
struct Connection {
    case: Case,
    flags: u32,
    machine: Machine,
    /// The client, as the endpoint sees it.
    seen: SocketAddr,
}

impl Connection {
    /// The client has sent its SYN.
    fn begun(case: Case, flags: u32) -> Self {
        let mut machine = case.machine(flags);
        let (seen, to) = cross(&mut machine, case.client(), case.service(), SYN);
        assert_eq!(to, case.endpoint());
        Self { case, flags, machine, seen }
    }

    fn established(case: Case, flags: u32) -> Self {
        let mut connection = Self::begun(case, flags);
        connection.send(Server, SYN_ACK);
        connection.send(Client, ACK);
        connection
    }

    /// A segment, which must get to the other end of this connection.
    fn send(&mut self, by: By, segment: Segment) {
        let Self { case, seen, machine, .. } = self;
        match by {
            Client => {
                assert_eq!(cross(machine, case.client(), case.service(), segment), (*seen, case.endpoint()));
            }
            Server => {
                assert_eq!(cross(machine, case.endpoint(), *seen, segment), (case.service(), case.client()));
            }
        }
    }

    /// Other endpoints are chosen from now on. The old one serves or not.
    fn change_set(&mut self, old_serves: bool) -> Vec<SocketAddr> {
        if !old_serves {
            self.machine.tables.endpoints.get_mut(&100).unwrap().flags = 0;
        }
        let others: Vec<_> = (1..50).map(|i| SocketAddr::new(self.case.endpoint().ip(), 9000 + i)).collect();
        add_service(&mut self.machine, 2, self.case.service(), &others, self.flags);
        let tables = &mut self.machine.tables;
        tables.frontends.values_mut().for_each(|frontend| frontend.service = 1);
        tables.endpoints.values_mut().for_each(|endpoint| endpoint.service = 1);
        others
    }

    /// A segment of the client that must be answered by a reset, while the endpoint gets one too.
    fn is_terminated(&mut self, segment: Segment) {
        let Self { case, seen, machine, .. } = self;
        let mut packet = frame(case.client(), case.service(), segment);
        assert_eq!(enter(machine, &mut packet), Action::Answer(Reason::EndpointGone));
        assert_eq!(ends(&packet), (case.service(), case.client()));
        let (acknowledged, flags) =
            told(&frame(case.client(), case.service(), segment), |tcp| tcp.acknowledgment_number());
        assert_eq!(told(&packet, |tcp| tcp.sequence_number()), (acknowledged, tcp_flags::RST));
        let [(device, mut copy)] = machine.entered.split_off(0).try_into().unwrap();
        assert_eq!((device, told(&copy, |tcp| tcp.sequence_number())), (3, (1000, flags | tcp_flags::RST)));
        assert_eq!(enter(machine, &mut copy), Action::Next(Reason::Established));
        leave(machine, &mut copy);
        assert_eq!(ends(&copy), (*seen, case.endpoint()));
        assert!(machine.entered.is_empty());
    }

    /// The same client port connects once more: where that goes, once the answer has come back.
    fn connect_again(&mut self) -> SocketAddr {
        let Self { case, machine, .. } = self;
        let (seen, endpoint) = cross(machine, case.client(), case.service(), SYN);
        assert_eq!(cross(machine, endpoint, seen, SYN_ACK), (case.service(), case.client()));
        assert_eq!(cross(machine, case.client(), case.service(), ACK), (seen, endpoint));
        endpoint
    }
}

/// A number that a segment says, and its flags.
fn told(frame: &[u8], number: fn(&etherparse::TcpSlice) -> u32) -> (u32, u8) {
    let Some(TransportSlice::Tcp(tcp)) = SlicedPacket::from_ethernet(frame).unwrap().transport else {
        panic!("no TCP segment")
    };
    (number(&tcp), tcp.slice()[13])
}

/// Every way in which a connection ends, each with all segments until nobody sends any more.
const ENDS: [(&str, &[(By, Segment)]); 7] = [
    ("the client closes first", &[(Client, FIN), (Server, ACK), (Server, ACK), (Server, FIN), (Client, ACK)]),
    ("the endpoint closes first", &[(Server, FIN), (Client, ACK), (Client, ACK), (Client, FIN), (Server, ACK)]),
    ("both close at once", &[(Client, FIN), (Server, FIN), (Client, ACK), (Server, ACK)]),
    ("both close at once, and once more", &[(Server, FIN), (Client, FIN), (Client, FIN), (Server, FIN), (Client, ACK)]),
    ("the client resets", &[(Client, RST)]),
    ("the endpoint resets", &[(Server, RST)]),
    ("closed, then reset", &[(Client, FIN), (Server, ACK), (Client, RST)]),
];

#[test]
fn a_source_port_is_used_again_however_the_connection_before_it_ended() {
    for (case, flags) in cases() {
        for (name, end) in ENDS {
            for old_serves in [true, false] {
                let mut connection = Connection::established(case, flags);
                for (by, segment) in end {
                    connection.send(*by, *segment);
                }
                let others = connection.change_set(old_serves);
                let again = connection.connect_again();
                assert!(others.contains(&again), "{name}, {case:?}: to {again}");
            }
        }
    }
}

#[test]
fn a_side_that_has_not_closed_goes_on_sending_for_an_hour() {
    for (case, flags) in cases() {
        for (closes, goes_on) in [(Client, Server), (Server, Client)] {
            let mut connection = Connection::established(case, flags);
            connection.send(closes, FIN);
            for _ in 0..3 {
                connection.machine.now += 3500;
                connection.send(goes_on, ACK);
                connection.send(closes, ACK);
            }
            connection.send(goes_on, FIN);
            connection.send(closes, ACK);
        }
    }
}

#[test]
fn a_refused_connection_is_over_and_its_port_is_used_again() {
    for (case, flags) in cases() {
        let mut connection = Connection::begun(case, flags);
        connection.send(Server, Segment::Tcp(tcp_flags::RST | tcp_flags::ACK));
        let others = connection.change_set(true);
        assert!(others.contains(&connection.connect_again()), "{case:?}");
    }
}

#[test]
fn a_retransmitted_syn_goes_to_the_same_endpoint_as_long_as_that_serves() {
    for (case, flags) in cases() {
        let mut connection = Connection::begun(case, flags);
        connection.send(Client, SYN);
        connection.change_set(true);
        connection.machine.now += 63;
        connection.send(Client, SYN);
        connection.send(Server, SYN_ACK);
        connection.send(Client, ACK);

        let mut connection = Connection::begun(case, flags);
        let others = connection.change_set(false);
        assert!(others.contains(&connection.connect_again()), "{case:?}: to an endpoint that is gone");
    }
}

#[test]
fn a_client_that_forgot_its_connection_finds_the_endpoint_that_remembers_it() {
    for (case, flags) in cases() {
        let mut connection = Connection::established(case, flags);
        connection.change_set(true);
        // RFC 9293 §3.5.1: the endpoint answers a SYN in the window as it would answer anything else there, the client resets what it
        // knows nothing of, and begins again.
        connection.send(Client, SYN);
        connection.send(Server, ACK);
        connection.send(Client, RST);
        connection.connect_again();
    }
}

#[test]
fn an_endpoint_that_forgot_its_connection_tells_the_client() {
    for (case, flags) in cases() {
        let mut connection = Connection::established(case, flags);
        connection.send(Client, ACK);
        connection.send(Server, RST);
        let others = connection.change_set(false);
        assert!(others.contains(&connection.connect_again()), "{case:?}");
    }
}

#[test]
fn a_half_open_connection_is_kept_two_minutes() {
    for (case, flags) in cases() {
        for (waits, is_over) in [(120, false), (121, true)] {
            let mut connection = Connection::begun(case, flags);
            let others = connection.change_set(true);
            connection.machine.now += waits;
            let (_, to) = cross(&mut connection.machine, case.client(), case.service(), SYN);
            assert_eq!(others.contains(&to), is_over, "{case:?} after {waits} s");
        }
    }
}

#[test]
fn a_connection_stays_with_an_endpoint_that_is_gone_and_a_new_one_does_not() {
    for (case, flags) in cases() {
        let mut connection = Connection::established(case, flags);
        let others = connection.change_set(false);
        for _ in 0..3 {
            connection.machine.now += 3600;
            connection.send(Client, ACK);
            connection.send(Server, ACK);
        }
        assert!(others.contains(&connection.connect_again()), "{case:?}: the port is used again");
    }
}

#[test]
fn both_sides_hear_that_the_endpoint_is_gone_where_connections_end_with_it() {
    for (case, flags) in cases() {
        for segment in [ACK, FIN] {
            let mut connection = Connection::established(case, flags);
            connection.machine.tables.settings.flags = settings_flags::TERMINATE;
            let others = connection.change_set(true);
            connection.send(Client, ACK);
            connection.change_set(false);
            // What the endpoint says arrives: the client's acknowledgement brings the news.
            connection.send(Server, ACK);
            connection.is_terminated(segment);
            // What was under way, and what the client sends where the reset was lost.
            connection.send(Server, ACK);
            connection.is_terminated(ACK);
            connection.send(Server, RST);
            assert!(others.contains(&connection.connect_again()), "{case:?}: the port is used again");
        }
    }
}

#[test]
fn a_connection_that_ends_by_itself_is_not_reset_at_the_last_moment() {
    for (case, flags) in cases() {
        for (name, end) in ENDS {
            let mut connection = Connection::established(case, flags);
            connection.machine.tables.settings.flags = settings_flags::TERMINATE;
            let closed = end.iter().position(|(by, segment)| {
                connection.send(*by, *segment);
                connection.machine.flows.values().all(|(flow, _)| flow.is_closed())
            });
            connection.change_set(false);
            for (by, segment) in &end[closed.unwrap() + 1..] {
                connection.send(*by, *segment);
            }
            assert!(connection.machine.entered.is_empty(), "{name}, {case:?}");
        }
    }
}

#[test]
fn every_end_of_a_masqueraded_connection_frees_its_port_in_time() {
    type Case = (&'static str, &'static [(By, Segment)], u32);
    let ends: [Case; 5] = [
        ("reset by the client", &[(Client, RST)], 60),
        ("reset by the endpoint", &[(Server, RST)], 60),
        ("closed by both", &[(Client, FIN), (Server, FIN)], 60),
        ("closed by one", &[(Client, FIN)], 3600),
        ("established", &[], 24 * 3600),
    ];
    for (name, end, limit) in ends {
        let mut connection = Connection::established(V4, frontend_flags::MASQUERADE);
        for (by, segment) in end {
            connection.send(*by, *segment);
        }
        for (key, (flow, _)) in &connection.machine.flows {
            assert!(!flow.is_idle(key.proto, limit), "{name}: {key:?} is over too soon");
            assert!(flow.is_idle(key.proto, limit + 1), "{name}: {key:?} is not over");
        }
    }
}
