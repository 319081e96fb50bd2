//! What is dropped because something is missing or full, and that it goes on as soon as there is some.

use super::*;

#[test]
fn a_new_connection_is_dropped_where_no_entry_fits_and_a_known_one_goes_on() {
    for case in [V4, V6] {
        for segment in [SYN, Segment::Udp, INIT] {
            let mut machine = case.machine(0);
            cross(&mut machine, case.client(), case.service(), segment);
            machine.full = true;
            let other = SocketAddr::new(case.client().ip(), 40_001);
            let mut packet = frame(other, case.service(), segment);
            assert_eq!(enter(&mut machine, &mut packet), Action::Drop(Reason::FlowTableFull), "{segment:?}");
            assert_eq!(cross(&mut machine, case.client(), case.service(), segment).1, case.endpoint());
            machine.full = false;
            assert_eq!(cross(&mut machine, other, case.service(), segment).1, case.endpoint());
        }
    }
}

#[test]
fn what_must_be_masqueraded_is_dropped_where_the_device_has_no_address_of_its_family() {
    for (case, other) in [(V4, V6), (V6, V4)] {
        for segment in [SYN, Segment::Udp, INIT] {
            let mut machine = case.machine(frontend_flags::MASQUERADE);
            let has_one = machine.tables.devices[&UPLINK];
            for device in [None, Some(other.machine(0).tables.devices[&UPLINK]), Some(Device::default())] {
                match device {
                    None => machine.tables.devices.remove(&UPLINK),
                    Some(device) => machine.tables.devices.insert(UPLINK, device),
                };
                let mut packet = frame(case.client(), case.service(), segment);
                assert!(matches!(enter(&mut machine, &mut packet), Action::Next(_)));
                let action = leave(&mut machine, &mut packet);
                assert_eq!(action, Action::Drop(Reason::NoMasqueradeAddress), "{case:?} {segment:?} {device:?}");
            }
            machine.tables.devices.insert(UPLINK, has_one);
            let (from, to) = cross(&mut machine, case.client(), case.service(), segment);
            assert_eq!((from.ip(), to), (case.node(), case.endpoint()), "{segment:?}");
        }
    }
}

#[test]
fn what_is_refused_above_the_limit_is_dropped_as_it_came() {
    for case in [V4, V6] {
        for segment in [SYN, Segment::Udp] {
            let mut machine = case.machine(0);
            add_service(&mut machine, 1, case.service(), &[], 0);
            machine.refused_enough = true;
            let sent = frame(case.client(), case.service(), segment);
            let mut packet = sent.clone();
            assert_eq!(enter(&mut machine, &mut packet), Action::Drop(Reason::RefusalLimit), "{segment:?}");
            assert_eq!(packet, sent);
            machine.refused_enough = false;
            assert_eq!(enter(&mut machine, &mut packet), Action::Answer(Reason::NoEndpoints), "{segment:?}");
        }
    }
}
