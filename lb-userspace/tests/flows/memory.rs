//! Every packet of `data/flows.json` through model, plan, image and the function that the kernel runs.

use std::{collections::BTreeSet, net::SocketAddr};

use fairlead::{
    image::{FLOW_LIFE, Write},
    model::{Change, Kind, ObjectName},
    pipeline::Pipeline,
};
use lb_common::{
    addr::Port,
    decide::{Class, Decision, Question, classify, decide, select},
    layout::protocol,
    memory::Memory,
};

use crate::{
    cases::{self, Case, Expect, Flow},
    content::Content,
    objects,
    pipeline::{changes_from_previous, device, empty, from_scratch, objects as objects_of},
};

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
        from_node: case.is_from_node(flow),
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
                let Decision::Forward(choice) = decide(question, &question.src, hash, memory) else {
                    panic!("{forward:?}")
                };
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
    let others = cases::with_other_node_ports();
    assert!(others.len() > 20, "{}", others.len());
    let cases: Vec<Case> = cases.into_iter().chain(others).collect();
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
        println!("{mode}, in memory: {agreeing} of {rows} rows agree");
        assert_eq!(agreeing, rows);
    }
}

/// From the objects before to those of the case; every write is done to `kernel` too.
fn from_previous(case: &Case, mode: &str) -> (Pipeline, Memory) {
    let mut pipeline = empty(case, mode);
    let mut kernel = pipeline.image().memory().clone();
    let before = objects_of(case, &case.previous_objects).into_iter().map(Change::Upsert).collect();
    for (changes, now) in [(before, 0), (changes_from_previous(case), 1), (Vec::new(), 2 + FLOW_LIFE)] {
        changes.into_iter().for_each(|change| _ = pipeline.take(change));
        let mut writes = pipeline.compile(now);
        // No connection names what is gone: its bits go too, when their time has come.
        writes.extend(pipeline.image_mut().expire(now, &BTreeSet::new(), &BTreeSet::new()));
        writes.iter().for_each(|write: &Write| write.apply(&mut kernel));
        assert_eq!(&kernel, pipeline.image().memory(), "{}", case.id);
    }
    (pipeline, kernel)
}

#[test]
fn the_way_to_a_state_leaves_no_trace_in_it() {
    let cases = cases::all();
    let with_past: Vec<&Case> = cases.iter().filter(|case| !case.previous_objects.is_empty()).collect();
    assert_eq!(with_past.len(), 12);
    for case in with_past {
        for mode in &case.applies_to {
            let (pipeline, kernel) = from_previous(case, mode);
            let scratch = from_scratch(case, mode);
            for flow in &case.flows {
                let question = question(case, flow);
                let found = [&pipeline, &scratch].map(|pipeline| verdict(pipeline.image().memory(), &question));
                assert_eq!(found[0], found[1], "{} {}", case.id, flow.name);
            }
            // The same to the last byte, but for numbers that depend on the way there by design (see `content`).
            let fresh = scratch.image().memory();
            assert_eq!(Content::of(&kernel), Content::of(fresh), "{}", case.id);
            assert_eq!(kernel.frontend_bits, fresh.frontend_bits, "{}", case.id);
            assert_eq!(kernel.endpoint_bits, fresh.endpoint_bits, "{}", case.id);
        }
    }
}

/// Services of the case.
fn services(case: &Case) -> impl Iterator<Item = ObjectName> {
    let keys = case.objects.iter().map(objects::key);
    keys.filter(|(kind, _)| *kind == Kind::Service).map(|(_, name)| name)
}

#[test]
fn ready_endpoints_of_this_node_are_counted() {
    let mut counted = 0;
    for case in cases::all().iter().filter(|case| case.state["localReadyEndpoints"].is_object()) {
        for mode in &case.applies_to {
            let there = [from_scratch(case, mode), from_previous(case, mode).0];
            for (name, pipeline) in services(case).flat_map(|name| there.iter().map(move |it| (name.clone(), it))) {
                let found = pipeline.plan(&name).map_or(0, |plan| plan.local_ready);
                let want = case.state["localReadyEndpoints"][name.to_string()].as_u64().unwrap_or(0);
                assert_eq!(found as u64, want, "{} {name}", case.id);
            }
        }
        counted += 1;
    }
    assert_eq!(counted, 8);
}

#[test]
fn health_checks_listen_at_their_ports_and_are_told_how_many_endpoints_are_here() {
    let mut counted = [0; 3];
    for case in cases::all().iter().filter(|case| case.state["healthCheckNodePorts"].is_object()) {
        let wanted = case.state["healthCheckNodePorts"].as_object().unwrap();
        for mode in &case.applies_to {
            let mut pipeline = from_scratch(case, mode);
            let told = pipeline.changed_health_checks();
            for name in services(case) {
                let found = pipeline.plan(&name).and_then(|plan| plan.health_check);
                assert_eq!(told.get(&name).copied().flatten(), found, "{} {name}: as changes came", case.id);
                // A count for each family that the Service has: the cases have one.
                let found = found.map(|check| {
                    let counts: Vec<usize> = [check.v4, check.v6].into_iter().flatten().collect();
                    (u64::from(check.port), counts.iter().map(|count| *count as u64).collect::<Vec<_>>())
                });
                let want = wanted
                    .get(&name.to_string())
                    .map(|check| (check["port"].as_u64().unwrap(), vec![check["localEndpoints"].as_u64().unwrap()]));
                assert_eq!(found, want, "{mode} {} {name}", case.id);
                counted[1] += usize::from(want.is_some());
            }
            let strangers = wanted.keys().filter(|name| !services(case).any(|it| it.to_string() == **name));
            assert_eq!(strangers.count(), 0, "{}", case.id);
            counted[2] += 1;
        }
        counted[0] += 1;
    }
    assert_eq!(counted, [15, 27, 28], "cases, health checks, cases in each of their modes");
}

#[test]
fn services_without_local_endpoints_are_counted_by_policy() {
    let mut counted = 0;
    for case in cases::all().iter().filter(|case| case.state["noLocalEndpoints"].is_object()) {
        let pipeline = from_scratch(case, case.applies_to[0].as_str());
        let plans = pipeline.model().services().filter_map(|(name, _)| pipeline.plan(name));
        let lacking = plans.map(|plan| {
            let [(v4_in, v4_out), (v6_in, v6_out)] = [true, false].map(|v4| plan.ports_without_local_endpoints(v4));
            (v4_in.max(v6_in) as u64, v4_out.max(v6_out) as u64)
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
