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
        others
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
