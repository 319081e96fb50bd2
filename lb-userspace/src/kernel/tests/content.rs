//! What is written is what is read.

use std::{net::Ipv4Addr, sync::mpsc};

use lb_common::{
    addr::{Addr, Port as Number},
    flow::{Flow, FlowKey, Kind},
    layout::{Cover, Device, Endpoint, Frontend, FrontendKey, PrefixKey, Range, Settings},
};

use super::*;
use crate::{
    image::Image,
    kernel::{pinned::Pinned, sys::bytes_of},
    model::{Change, Interner, Object, PodState},
    pipeline::Pipeline,
    plan::node::NodeOptions,
};

fn addr(number: u32) -> Addr {
    Addr::from_v4_word((0x0a00_0000 + number).to_be())
}

fn frontend(number: u32) -> Write {
    let key = FrontendKey::new(addr(number), Number::new(80), 6);
    let range = Range { offset: number % 3, len: 1 };
    Write::Frontend(key, Frontend { internal: range, external: range, service: number, ..Frontend::default() })
}

fn prefix(service: u32, number: u32) -> PrefixKey {
    PrefixKey { prefix_len: 160, service, addr: addr(number) }
}

fn endpoint(number: u32) -> Endpoint {
    Endpoint { addr: addr(number), port: Number::new(8080), flags: 1, service: 1, generation: 1 }
}

/// Some of every kind.
fn some_of_all() -> Vec<Write> {
    let device =
        Device { masquerade_v4: addr(1), bridge: 7, bridge_mac: [1, 2, 3, 4, 5, 6, 0, 0], ..Device::default() };
    let cover = Cover { network: addr(0), mask: addr(255) };
    let mut writes = vec![
        Write::Slots(0, vec![3, 1, 2]),
        Write::Slots(10, vec![2, 1]),
        Write::Service(1, Box::new([b'x'; 200])),
        Write::Service(2, Box::new([b'y'; 200])),
        Write::SourceRange(prefix(1, 5)),
        Write::SourceRange(prefix(2, 5)),
        Write::LocalCidr(prefix(0, 6)),
        Write::ServiceCidr(prefix(0, 7)),
        Write::ServiceCidr(prefix(0, 8)),
        Write::NodeAddress(addr(9), 3),
        Write::Device(4, device),
        Write::Settings(Settings { cidrs_v4: cover, ..Settings::default() }),
    ];
    writes.extend((0..3).map(|id| Write::Endpoint(id, endpoint(id))));
    writes.extend([0, 1, 63, 64, 1_048_575].map(Write::FrontendBit));
    writes.extend([3, 5, 3].map(Write::EndpointBit));
    writes.extend((0..3).map(frontend));
    writes
}

#[test]
fn every_table_is_read_as_it_was_written() {
    lab(|lab| {
        let mut kernel = lab.open();
        let writes = some_of_all();
        kernel.apply(&writes).unwrap();
        let mut expected = Memory::default();
        tables::add_to(&mut expected, &writes);
        assert_eq!(kernel.memory().unwrap(), expected);
        assert_eq!(Pinned::open(&lab.bpffs()).unwrap().memory().unwrap(), expected);
    });
}

#[test]
fn what_is_removed_is_gone_and_what_was_not_there_does_not_matter() {
    lab(|lab| {
        let mut kernel = lab.open();
        kernel.apply(&some_of_all()).unwrap();
        let key = |number| FrontendKey::new(addr(number), Number::new(80), 6);
        kernel
            .apply(&[
                Write::RemoveFrontend(key(0)),
                Write::RemoveFrontend(key(77)),
                Write::RemoveFrontend(key(78)),
                Write::RemoveFrontend(key(1)),
                Write::RemoveService(1),
                Write::RemoveSourceRange(prefix(9, 9)),
                Write::RemoveSourceRange(prefix(1, 5)),
                Write::RemoveLocalCidr(prefix(0, 6)),
                Write::RemoveServiceCidr(prefix(0, 7)),
                Write::RemoveNodeAddress(addr(9)),
                Write::RemoveDevice(4),
            ])
            .unwrap();
        let memory = kernel.memory().unwrap();
        assert_eq!(memory.frontends.keys().collect::<Vec<_>>(), [&key(2)]);
        assert_eq!(memory.services.len(), 1);
        assert_eq!(memory.source_ranges.len(), 1);
        assert_eq!(memory.service_cidrs.len(), 1);
        assert!(memory.local_cidrs.is_empty() && memory.node_addresses.is_empty() && memory.devices.is_empty());
    });
}

#[test]
fn a_bit_that_is_cleared_leaves_its_neighbours() {
    lab(|lab| {
        let mut kernel = lab.open();
        kernel.apply(&[1, 2, 70].map(Write::FrontendBit)).unwrap();
        drop(kernel);
        let mut kernel = lab.open();
        kernel.apply(&[Write::ClearFrontendBit(1), Write::FrontendBit(3), Write::ClearFrontendBit(70)]).unwrap();
        assert_eq!(kernel.memory().unwrap().frontend_bits, [2, 3].into());
    });
}

#[test]
fn one_write_costs_one_call_however_much_there_is() {
    lab(|lab| {
        let mut kernel = lab.open();
        let writes: Vec<_> = (0..10_000).map(frontend).collect();
        kernel.apply(&writes).unwrap();
        for write in [frontend(77), frontend(10_000), Write::FrontendBit(5), Write::Endpoint(3, endpoint(3))] {
            let before = kernel.statistics();
            kernel.apply(std::slice::from_ref(&write)).unwrap();
            let after = kernel.statistics();
            assert_eq!((after.calls - before.calls, after.entries - before.entries), (1, 1), "{write:?}");
        }
        let before = kernel.statistics().calls;
        kernel.apply(&writes).unwrap();
        assert_eq!(kernel.statistics().calls - before, 1, "neighbours of one kind are a batch");
    });
}

#[test]
fn tables_are_made_as_large_as_the_first_writes_need() {
    lab(|lab| {
        let mut kernel = lab.open();
        assert_eq!(kernel.memory().unwrap(), Memory::default());
        assert!(kernel.tables.is_none());
        let writes: Vec<_> = (0..3000).map(frontend).chain([Write::Endpoint(2999, endpoint(1))]).collect();
        kernel.apply(&writes).unwrap();
        assert_eq!(kernel.statistics().growths, 0);
        assert_eq!(
            [Table::Frontends, Table::Endpoints, Table::Slots].map(|table| kernel.room(table)),
            [8192, 8192, 4096]
        );
    });
}

#[test]
fn tables_are_made_for_what_is_expected_and_a_wrong_guess_costs_one_growth() {
    for (frontends, growths) in [(3000, 0), (0, 1)] {
        lab(move |lab| {
            let mut kernel = lab.open();
            kernel.prepare(&Expected { frontends, ..Expected::default() }).unwrap();
            let writes: Vec<_> = (0..3000).map(frontend).collect();
            kernel.apply(&writes).unwrap();
            assert_eq!(kernel.statistics().growths, growths);
            kernel.verified().unwrap();
            let mut expected = Memory::default();
            tables::add_to(&mut expected, &writes);
            assert!(kernel.memory().unwrap() == expected);
        });
    }
}

#[test]
fn tables_are_filled_with_what_an_image_holds_and_grow_where_they_must() {
    lab(|lab| {
        let mut kernel = lab.open();
        kernel.apply(&some_of_all()).unwrap();
        let old = kernel.memory().unwrap();
        let mut new = Memory::default();
        let writes: Vec<_> =
            (2..3000).map(frontend).chain([Write::Slots(3, vec![7]), Write::Endpoint(1, endpoint(9))]).collect();
        tables::add_to(&mut new, &writes);
        kernel.fill(&old, &new).unwrap();
        assert_eq!(kernel.statistics().growths, 1);
        // Nothing names slots and endpoints that are gone.
        let there = kernel.memory().unwrap();
        let (slots, endpoints) = (there.slots.clone(), there.endpoints.clone());
        assert_eq!((slots.get(&3), endpoints.get(&1)), (Some(&7), Some(&endpoint(9))));
        assert!(Memory { slots: new.slots.clone(), endpoints: new.endpoints.clone(), ..there } == new);
    });
}

/// What changing the labels of one Pod costs among this many Services: bpf(2) calls, entries, bytes.
fn cost_of_a_label(lab: &Lab, services: u32) -> (u64, u64, u64) {
    let mut pipeline = Pipeline::new("node1", NodeOptions::default(), Image::default());
    let mut interner = Interner::default();
    let mut pod = |number: u32, app: u32| {
        let addr = Ipv4Addr::from(0x0a80_0000 + number).to_string();
        let text = format!(
            r#"{{"metadata":{{"name":"pod-{number}","labels":{{"app":"app-{app}"}}}},"status":{{"podIP":"{addr}",
                "conditions":[{{"type":"Ready","status":"True"}}]}}}}"#
        );
        let (pod, errors) = PodState::new(&serde_json::from_str(&text).unwrap(), &mut interner);
        assert_eq!(errors, []);
        Change::Upsert(Object::Pod(pod.into()))
    };
    for service in 0..services {
        let addr = Ipv4Addr::from(0x0a60_0001 + service).to_string();
        let text = format!(
            r#"{{"metadata":{{"name":"service-{service}"}},"spec":{{"clusterIP":"{addr}",
                "selector":{{"app":"app-{service}"}},"ports":[{{"port":80}}]}}}}"#
        );
        pipeline.take(Change::Upsert(Object::Service(serde_json::from_str(&text).unwrap())));
        for endpoint in 0..2 {
            pipeline.take(pod(2 * service + endpoint, service));
        }
    }
    let mut kernel = lab.open();
    kernel.apply(&pipeline.compile(0)).unwrap();
    assert!(kernel.statistics().calls < 32, "the first list is written in batches: {:?}", kernel.statistics());
    let before = kernel.statistics();
    pipeline.take(pod(7, services));
    kernel.apply(&pipeline.compile(10)).unwrap();
    let after = kernel.statistics();
    (after.calls - before.calls, after.entries - before.entries, after.bytes - before.bytes)
}

#[test]
fn a_label_costs_the_same_calls_among_few_services_and_many() {
    let costs = [100, 10_000].map(|services| {
        let (sender, receiver) = mpsc::channel();
        lab(move |lab| sender.send(cost_of_a_label(lab, services)).unwrap());
        receiver.recv().unwrap()
    });
    let bytes = size_of::<(u32, u32)>() + size_of::<(FrontendKey, Frontend)>() + size_of::<(u32, Endpoint)>();
    assert_eq!(costs, [(3, 3, bytes as u64); 2], "a slot, the frontend, the endpoint");
}

#[test]
fn tables_grow_and_lose_nothing() {
    lab(|lab| {
        let mut kernel = lab.open();
        kernel.apply(&some_of_all()).unwrap();
        run("ip link add d0 type bridge");
        kernel.attach_devices(&ports()).unwrap();
        kernel.attach_sockets().unwrap();
        let ids = |kernel: &Kernel| kernel.status().unwrap().iter().map(|a| a.link).collect::<Vec<_>>();
        let links = ids(&kernel);
        let flows = sys::Map::open(&lab.bpffs().join("v1/flows/FLOWS")).unwrap();
        let key = FlowKey::new(Kind::Request, addr(1), Number::new(1), addr(2), Number::new(2), 6);
        flows.update(bytes_of(&[key]), &[7; size_of::<Flow>()]).unwrap();

        let mut writes = some_of_all();
        writes.extend((0..20_000).map(frontend));
        writes.extend((0..5_000).map(|id| Write::Endpoint(id, endpoint(id))));
        writes.extend((0..700).map(|number| Write::SourceRange(prefix(3, number))));
        writes.push(Write::Slots(9_000, vec![1, 2, 3]));
        kernel.apply(&writes).unwrap();

        let mut expected = Memory::default();
        tables::add_to(&mut expected, &writes);
        assert!(kernel.memory().unwrap() == expected, "nothing is lost");
        assert_eq!(kernel.statistics().growths, 1, "one new generation has room for all of it");
        assert_eq!(folder::names(&lab.bpffs().join("v1/maps")).unwrap(), ["2"]);
        assert_eq!(ids(&kernel), links, "programs are replaced, links stay");
        assert!(kernel.status().unwrap().iter().all(|attached| attached.live));

        let pinned = Pinned::open(&lab.bpffs()).unwrap();
        let mut found = Vec::new();
        pinned.flows(|key, flow| found.push((key, flow.seen))).unwrap();
        assert_eq!(found, [(key, 0x0707_0707)]);
    });
}

#[test]
fn counters_and_fill_are_told() {
    lab(|lab| {
        let mut kernel = lab.open();
        kernel.apply(&some_of_all()).unwrap();
        let pinned = Pinned::open(&lab.bpffs()).unwrap();
        let counters = pinned.counters().unwrap();
        assert_eq!(counters, vec![0; lb_common::reason::REASONS]);
        let fill = pinned.fill().unwrap();
        let of = |name| fill.iter().find(|fill| fill.name == name).map(|fill| (fill.used, fill.room));
        assert_eq!(of("FRONTENDS"), Some((3, 1024)));
        assert_eq!(of("FLOWS"), Some((0, 8192)));
        assert_eq!(of("NEW_FLOWS"), Some((0, 2048)));
        assert!(of("SOCKETS").is_some());
    });
}
