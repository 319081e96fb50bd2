//! Counters of Service ports: theirs alone, and as many as there are.

use lb_common::{count::ServiceCounters, layout::ServiceName};

use super::*;
use crate::kernel::{
    pinned::Pinned,
    sys::{bytes_of, possible_cpus},
};

fn service(id: u32, name: &[u8]) -> Write {
    let mut bytes: ServiceName = [0; 200];
    bytes[..name.len()].copy_from_slice(name);
    Write::Service(id, Box::new(bytes))
}

/// Writes what the programs of every CPU would have counted.
fn count(kernel: &Kernel, id: u32) {
    let counters = ServiceCounters { connections: 1, request_packets: 2, ..ServiceCounters::default() };
    let map = kernel.tables.as_ref().unwrap().store.map(Table::ServiceCounters).unwrap();
    map.update(bytes_of(&[id]), bytes_of(&vec![counters; possible_cpus()])).unwrap();
}

fn counted(lab: &Lab) -> Vec<(u32, u64)> {
    let counters = Pinned::open(&lab.bpffs()).unwrap().service_counters().unwrap();
    counters.into_iter().map(|(id, counters)| (id, counters.connections)).collect()
}

#[test]
fn an_id_that_is_used_again_counts_from_zero() {
    let cpus = possible_cpus() as u64;
    lab(move |lab| {
        let mut kernel = lab.open();
        kernel.apply(&[service(1, b"a/a:/TCP"), service(2, b"a/b:/TCP")]).unwrap();
        count(&kernel, 1);
        count(&kernel, 2);
        kernel.apply(&[Write::RemoveService(1)]).unwrap();
        // A connection that outlives its Service.
        count(&kernel, 1);
        kernel.apply(&[service(1, b"a/c:/TCP")]).unwrap();
        assert_eq!(counted(lab), [(2, cpus)]);
        // What others left is no new Service's either, and a start doesn't forget.
        kernel.apply(&[Write::RemoveService(2)]).unwrap();
        drop(kernel);
        let mut kernel = lab.open();
        assert_eq!(counted(lab), [(2, cpus)]);
        kernel.apply(&[service(2, b"a/d:/TCP")]).unwrap();
        assert_eq!(counted(lab), []);
    });
}

#[test]
fn counters_grow_with_the_services_and_keep_what_they_counted() {
    let cpus = possible_cpus() as u64;
    lab(move |lab| {
        let mut kernel = lab.open();
        kernel.apply(&[service(1, b"a/a:/TCP")]).unwrap();
        count(&kernel, 1);
        assert_eq!(kernel.room(Table::ServiceCounters), 1024);
        kernel.apply(&[service(1024, b"a/b:/TCP"), service(3, b"a/c:/TCP")]).unwrap();
        assert!(kernel.room(Table::ServiceCounters) > 1024);
        assert_eq!(kernel.memory().unwrap().services.len(), 3);
        count(&kernel, 1024);
        assert_eq!(counted(lab), [(1, cpus), (1024, cpus)]);
    });
}

#[test]
fn an_agent_that_counts_makes_room_for_what_one_that_does_not_left() {
    lab(|lab| {
        let mut kernel = Kernel::open(Options { count_services: false, ..lab.options() }).unwrap();
        kernel.apply(&[service(5000, b"a/a:/TCP")]).unwrap();
        kernel.verified().unwrap();
        assert_eq!(kernel.room(Table::ServiceCounters), 1024);
        drop(kernel);
        assert!(lab.open().room(Table::ServiceCounters) > 5000);
    });
}
