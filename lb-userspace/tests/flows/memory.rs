//! Every packet of `data/flows.json` through model, plan, image and the function that the kernel runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use crate::cases::{self, Case, Detector, Expect, Flow};
use fairlead::{
    image::{Image, Write},
    model::{Change, EndpointSlice, Interner, Kind, Object, SliceState},
    pipeline::Pipeline,
    plan::node::{LocalDetector, NodeOptions, ProxyMode},
};
use lb_common::{
    addr::Port,
    decide::{Class, Decision, Question, classify, decide, select},
    layout::{Device, device_flags, protocol},
    memory::Memory,
};
use serde_json::Value;

fn options(case: &Case, mode: &str) -> NodeOptions {
    NodeOptions {
        mode: if mode == "iptables" { ProxyMode::Iptables } else { ProxyMode::Nftables },
        node_port_addresses: case.node_port_addresses(mode),
        localhost_node_ports: case.node.localhost_node_ports,
        detector: match &case.node.local_detector {
            None => LocalDetector::None,
            Some(Detector::ClusterCIDR { cidrs }) => {
                LocalDetector::ClusterCidr(cidrs.iter().map(|text| text.parse().unwrap()).collect())
            }
            Some(Detector::InterfaceNamePrefix { interface }) => LocalDetector::InterfaceNamePrefix(interface.clone()),
        },
        masquerade_all: case.node.masquerade_all,
        ..NodeOptions::default()
    }
}

fn object(value: &Value, interner: &mut Interner) -> Object {
    let of = |value: &Value| serde_json::from_value(value.clone()).unwrap();
    match value["kind"].as_str().unwrap() {
        "Service" => Object::Service(Box::new(of(value))),
        "Node" => Object::Node(Box::new(serde_json::from_value(value.clone()).unwrap())),
        "ServiceCIDR" => Object::ServiceCidr(serde_json::from_value(value.clone()).unwrap()),
        "EndpointSlice" => {
            let slice: EndpointSlice = serde_json::from_value(value.clone()).unwrap();
            Object::EndpointSlice(SliceState::new(&slice, interner).0)
        }
        other => panic!("{other}"),
    }
}

fn objects(case: &Case, values: &[Value]) -> Vec<Object> {
    let mut interner = Interner::default();
    case.manifests(values).iter().map(|value| object(value, &mut interner)).collect()
}

/// Ifindex of an interface that a row names.
fn device(flow: &Flow) -> u32 {
    match flow.from_interface.as_deref() {
        None => 0,
        Some("eth0") => 1,
        Some(_) => 2,
    }
}

fn pipeline(case: &Case, mode: &str) -> Pipeline {
    let options = options(case, mode);
    let names = case.flows.iter().filter_map(|flow| Some((device(flow), flow.from_interface.as_deref()?)));
    let local = |name: &str| if options.detector.takes_interface(name) { device_flags::LOCAL_SOURCES } else { 0 };
    let devices: BTreeMap<u32, Device> =
        names.map(|(ifindex, name)| (ifindex, Device { flags: local(name), ..Device::default() })).collect();
    let mut pipeline = Pipeline::new(&case.node.name, options, Image::default());
    pipeline.image_mut().set_devices(&devices);
    pipeline.set_interfaces(case.node.ips.clone());
    pipeline
}

fn from_scratch(case: &Case, mode: &str) -> Pipeline {
    let mut pipeline = pipeline(case, mode);
    objects(case, &case.objects).into_iter().for_each(|object| _ = pipeline.take(Change::Upsert(object)));
    pipeline.compile(0);
    pipeline
}

fn question(case: &Case, flow: &Flow) -> Question {
    Question {
        src: flow.from.into(),
        dst: flow.to.into(),
        dport: Port::new(flow.port),
        proto: match flow.protocol.as_str() {
            "TCP" => protocol::TCP,
            "UDP" => protocol::UDP,
            "SCTP" => protocol::SCTP,
            other => panic!("{other}"),
        },
        from_node: flow.from.is_loopback() || case.node.ips.contains(&flow.from),
        device: device(flow),
    }
}

/// The verdict on a packet, with every endpoint that `decide` chooses for some hash.
fn verdict(memory: &Memory, question: &Question) -> Expect {
    let mut found = Expect { verdict: String::new(), endpoints: Vec::new(), masquerade: false, hairpin: Vec::new() };
    let word = match classify(question, memory) {
        Class::Forward(forward) => {
            let mut masqueraded = BTreeSet::new();
            for hash in 0..forward.range.len {
                let (id, endpoint) = select(&forward.range, hash, memory).unwrap();
                let Decision::Forward(choice) = decide(question, hash, memory) else { panic!("{forward:?}") };
                assert_eq!((choice.id, &choice.endpoint), (id, endpoint));
                let text = SocketAddr::new(endpoint.addr.into(), endpoint.port.number()).to_string();
                if choice.masquerade {
                    masqueraded.insert(text.clone());
                }
                found.endpoints.push(text);
            }
            found.masquerade = masqueraded.len() == found.endpoints.len();
            if !found.masquerade {
                found.hairpin = masqueraded.into_iter().collect();
            }
            "dnat"
        }
        Class::Reject(_) => "reject",
        Class::Drop(_) => "drop",
        Class::Pass(_) => "pass",
    };
    found.verdict = word.to_owned();
    found
}

#[test]
fn every_packet_meets_the_fate_that_kube_proxy_gives_it() {
    let cases = cases::all();
    assert_eq!((cases.len(), cases.iter().map(|case| case.flows.len()).sum::<usize>()), (141, 710));
    for mode in ["iptables", "nftables"] {
        let (mut rows, mut agreeing) = (0, 0);
        for case in cases.iter().filter(|case| case.applies_to.iter().any(|it| it == mode)) {
            let pipeline = from_scratch(case, mode);
            for flow in case.flows.iter().filter(|flow| flow.is_of(mode)) {
                rows += 1;
                let found = verdict(pipeline.image().memory(), &question(case, flow));
                if flow.accepts(found.clone()) {
                    agreeing += 1;
                } else {
                    eprintln!("{mode} {} {}: {found:?} instead of {:?}", case.id, flow.name, flow.expect);
                }
            }
        }
        println!("{mode}: {agreeing} of {rows} rows agree");
        assert_eq!(agreeing, rows);
    }
}

#[test]
fn the_way_to_a_state_leaves_no_trace_in_it() {
    let cases = cases::all();
    let with_past: Vec<&Case> = cases.iter().filter(|case| !case.previous_objects.is_empty()).collect();
    assert_eq!(with_past.len(), 12);
    for case in with_past {
        let mode = case.applies_to[0].as_str();
        let mut pipeline = pipeline(case, mode);
        let mut kernel = pipeline.image().memory().clone();
        let mut step = |pipeline: &mut Pipeline, changes: Vec<Change>, now| {
            changes.into_iter().for_each(|change| _ = pipeline.take(change));
            let writes = pipeline.compile(now);
            writes.iter().for_each(|write: &Write| write.apply(&mut kernel));
            assert_eq!(&kernel, pipeline.image().memory(), "{}", case.id);
        };
        let key = |object: &Object| (object.kind(), object.name());
        let (before, after) = (objects(case, &case.previous_objects), objects(case, &case.objects));
        let keys: BTreeSet<(Kind, _)> = after.iter().map(key).collect();
        let gone =
            before.iter().map(key).filter(|key| !keys.contains(key)).map(|(kind, name)| Change::Delete(kind, name));
        let gone: Vec<Change> = gone.collect();
        step(&mut pipeline, before.into_iter().map(Change::Upsert).collect(), 0);
        step(&mut pipeline, gone.into_iter().chain(after.into_iter().map(Change::Upsert)).collect(), 1);
        let scratch = from_scratch(case, mode);
        for flow in &case.flows {
            let question = question(case, flow);
            let found = [&pipeline, &scratch].map(|pipeline| verdict(pipeline.image().memory(), &question));
            assert_eq!(found[0], found[1], "{} {}", case.id, flow.name);
        }
    }
}

#[test]
fn health_checks_are_told_how_many_endpoints_are_here() {
    for case in cases::all() {
        let pipeline = from_scratch(&case, case.applies_to[0].as_str());
        for (service, check) in case.state["healthCheckNodePorts"].as_object().into_iter().flatten() {
            let (namespace, name) = service.split_once('/').unwrap();
            let plan = pipeline.plan(&fairlead::model::ObjectName::new(namespace, name));
            let found = plan.map_or(0, |plan| plan.local_ready);
            assert_eq!(found as u64, check["localEndpoints"], "{} {service}", case.id);
        }
    }
}

#[test]
fn services_without_local_endpoints_are_counted_by_policy() {
    let mut counted = 0;
    for case in cases::all().iter().filter(|case| case.state["noLocalEndpoints"].is_object()) {
        let pipeline = from_scratch(case, case.applies_to[0].as_str());
        let plans = pipeline.model().services().filter_map(|(name, _)| pipeline.plan(name));
        let lacking = plans.map(|plan| {
            let [(v4_in, v4_out), (v6_in, v6_out)] = [true, false].map(|v4| plan.lacks_local_endpoints(v4));
            (u64::from(v4_in || v6_in), u64::from(v4_out || v6_out))
        });
        let found = lacking.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        let by_family = [true, false].map(|v4| pipeline.lacking_local_endpoints(v4));
        let most = |pick: fn((usize, usize)) -> usize| by_family.map(pick).into_iter().max().unwrap() as u64;
        let most = (most(|it| it.0), most(|it| it.1));
        assert_eq!(most, found, "{}: counted as changes came", case.id);
        let want = &case.state["noLocalEndpoints"];
        assert_eq!(found, (want["internal"].as_u64().unwrap(), want["external"].as_u64().unwrap()), "{}", case.id);
        counted += 1;
    }
    assert_eq!(counted, 16);
}
