use std::{net::IpAddr, sync::Arc};

use lb_common::{
    affinity::{Affinity, AffinityKey},
    decide::{Class, Question, classify, select},
    layout::{
        NodeAddress,
        frontend_flags::{EXTERNAL_DROP, EXTERNAL_LOCAL, INTERNAL_DROP, MASQUERADE, NODE_PORT, SOURCE_RANGES},
        node_flags,
        protocol::TCP,
    },
    tables::Tables,
};
use proptest::prelude::*;

use super::*;
use crate::{
    model::{ObjectName, object::Protocol},
    plan::{Book, Eligible, PlannedEndpoint, PlannedFrontend, ServicePlan},
};

const NODE: [u8; 4] = [192, 168, 0, 2];
const INSIDE: [u8; 4] = [10, 0, 0, 99];
const OUTSIDE: [u8; 4] = [203, 0, 113, 1];

fn v4(octets: [u8; 4]) -> Addr {
    IpAddr::from(octets).into()
}

/// What a Service of the generator looks like.
#[derive(Clone, Debug)]
struct Sketch {
    /// Last octets of the endpoints, with whether flows may only stay (false) or be chosen, too.
    endpoints: BTreeMap<u8, bool>,
    local: bool,
    shared_node_port: bool,
    restricted: Option<bool>,
    second_port: bool,
    /// With a timeout of so many seconds.
    affinity: Option<u8>,
}

fn sketch() -> impl Strategy<Value = Sketch> {
    let endpoints = prop::collection::btree_map(1..9_u8, prop::bool::weighted(0.8), 0..6);
    (endpoints, any::<bool>(), any::<bool>(), any::<Option<bool>>(), any::<bool>(), any::<Option<u8>>()).prop_map(
        |(endpoints, local, shared_node_port, restricted, second_port, affinity)| Sketch {
            endpoints,
            local,
            shared_node_port,
            restricted,
            second_port,
            affinity,
        },
    )
}

fn name(service: u8, port: &str) -> PortName {
    PortName { service: ObjectName::new("ns", &format!("s{service}")), port: port.into(), protocol: Protocol::Tcp }
}

fn plan_port(service: u8, port: &str, number: u16, sketch: &Sketch) -> PortPlan {
    let affinity = sketch.affinity.map_or(0, u32::from);
    let endpoint = |(octet, chosen): (&u8, &bool)| PlannedEndpoint {
        addr: [10, 0, 0, *octet].into(),
        port: 8080,
        // Endpoints of one address in several Services are endpoints of each.
        local: octet.is_multiple_of(2),
        eligible: Eligible {
            cluster: affinity != 0 && *chosen,
            local: affinity != 0 && *chosen && octet.is_multiple_of(2),
        },
    };
    let chosen = |wanted: &dyn Fn(u8) -> bool| -> Arc<[u32]> {
        let places = sketch.endpoints.iter().enumerate();
        places.filter(|(_, (octet, chosen))| **chosen && wanted(**octet)).map(|(place, _)| place as u32).collect()
    };
    let (all, local) = (chosen(&|_| true), chosen(&|octet| octet.is_multiple_of(2)));
    let policy = if sketch.local { EXTERNAL_LOCAL | EXTERNAL_DROP | INTERNAL_DROP } else { MASQUERADE };
    let frontend = |addr: Addr, number: u16, flags: u32| PlannedFrontend {
        key: FrontendKey::new(addr, Port::new(number), TCP),
        internal: all.clone(),
        external: if sketch.local { local.clone() } else { all.clone() },
        flags,
    };
    let mut frontends = vec![frontend(v4([172, 30, 0, service]), number, 0)];
    let restricted = sketch.restricted.map_or(0, |_| SOURCE_RANGES);
    frontends.push(frontend(v4([1, 2, 3, service]), number, policy | restricted));
    if sketch.shared_node_port {
        frontends.push(frontend(Addr::UNSPECIFIED_V4, 30000 + number, policy | NODE_PORT));
    }
    let range = |outside: bool| if outside { "203.0.113.0/24" } else { "10.0.0.0/8" };
    PortPlan {
        name: name(service, port),
        endpoints: sketch.endpoints.iter().map(endpoint).collect(),
        frontends,
        source_ranges: sketch.restricted.iter().map(|outside| range(*outside).parse().unwrap()).collect(),
        affinity,
    }
}

fn plan(service: u8, sketch: &Sketch) -> ServicePlan {
    let mut ports = vec![plan_port(service, "http", 80, sketch)];
    if sketch.second_port {
        ports.push(plan_port(service, "https", 443, sketch));
    }
    ServicePlan { ports, any_port: vec![v4([172, 30, 0, service])], local_ready: 0, health_check: None }
}

/// Reads the tables as if everyone were in the source ranges.
struct Admitting<'a>(&'a Memory);

impl Tables for Admitting<'_> {
    fn may_be_frontend(&self, addr: &Addr, port: Port) -> bool {
        self.0.may_be_frontend(addr, port)
    }
    fn may_be_endpoint(&self, addr: &Addr, port: Port) -> bool {
        self.0.may_be_endpoint(addr, port)
    }
    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
        self.0.frontend(key)
    }
    fn slot(&self, index: u32) -> Option<u32> {
        self.0.slot(index)
    }
    fn endpoint(&self, id: u32) -> Option<&Endpoint> {
        self.0.endpoint(id)
    }
    fn node_address(&self, addr: &Addr) -> NodeAddress {
        if addr.same(&v4(NODE)) { node_flags::LOCAL | node_flags::NODE_PORTS } else { 0 }
    }
    fn is_local_source(&self, addr: &Addr, device: u32) -> bool {
        self.0.is_local_source(addr, device)
    }
    fn in_source_ranges(&self, _: u32, _: &Addr) -> bool {
        true
    }
    fn in_service_cidr(&self, addr: &Addr) -> bool {
        self.0.in_service_cidr(addr)
    }
    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity> {
        self.0.affinity(key)
    }
    fn ticks(&self) -> u32 {
        self.0.ticks()
    }
}

fn questions() -> impl Iterator<Item = Question> {
    let dsts = (0..4).flat_map(|service| [[172, 30, 0, service], [1, 2, 3, service]]).chain([NODE]);
    let ports = [80, 443, 30080, 30443, 9];
    let packets = dsts.flat_map(move |dst| ports.map(|port| (dst, port)));
    packets.flat_map(|(dst, dport)| {
        [INSIDE, OUTSIDE, NODE].map(|src| Question {
            src: v4(src),
            dst: v4(dst),
            dport: Port::new(dport),
            proto: TCP,
            from_node: src == NODE,
            device: 0,
        })
    })
}

/// What happens to a packet, in words that don't name ids.
fn verdict(memory: &Memory, question: &Question) -> String {
    let tables = Admitting(memory);
    let Class::Forward(forward) = classify(question, &tables) else {
        return format!("{:?}", classify(question, &tables));
    };
    let endpoints: Vec<_> = (0..forward.range.len)
        .map(|hash| {
            let (_, endpoint) = select(&forward.range, hash, &tables).unwrap();
            assert_ne!(endpoint.flags, 0, "a frontend names an endpoint that is gone");
            assert_eq!(endpoint.service, forward.service);
            assert!(tables.may_be_endpoint(&endpoint.addr, endpoint.port));
            let stays = endpoint.flags & (endpoint_flags::SERVING | endpoint_flags::LOCAL);
            (IpAddr::from(endpoint.addr), endpoint.port.number(), stays)
        })
        .collect();
    let service = service_name(&memory.services[&forward.service]).unwrap();
    format!("{service} {:x} {} {} {endpoints:?}", forward.flags, forward.masquerade, forward.affinity)
}

/// A client stays with exactly the endpoints that it could be given anew.
fn assert_clients_stay_where_they_may_go(memory: &Memory) {
    for question in questions() {
        let Class::Forward(forward) = classify(&question, &Admitting(memory)) else { continue };
        let chosen: BTreeSet<u32> =
            (0..forward.range.len).map(|hash| select(&forward.range, hash, memory).unwrap().0).collect();
        let stays = |id: &u32, endpoint: &Endpoint| {
            let affinity = Affinity { endpoint_id: *id, generation: endpoint.generation, seen: 0 };
            affinity.holds(endpoint, &forward.wanted(), 0)
        };
        let staying = memory.endpoints.iter().filter(|(id, endpoint)| stays(id, endpoint)).map(|(id, _)| id).collect();
        let expected = if forward.affinity == 0 { BTreeSet::new() } else { chosen };
        assert_eq!(expected, staying, "{question:?}");
    }
}

fn view(memory: &Memory) -> Vec<String> {
    questions().map(|question| verdict(memory, &question)).collect()
}

fn admitted(memory: &Memory) -> Vec<(Question, bool)> {
    let restricted = |question: &Question| {
        let key = FrontendKey::new(question.dst, question.dport, question.proto);
        memory.frontend(&key).is_none_or(|frontend| {
            frontend.flags & SOURCE_RANGES == 0 || memory.in_source_ranges(frontend.service, &question.src)
        })
    };
    questions().map(|question| (question, restricted(&question))).collect()
}

/// An image built at once from what a planner says now.
fn scratch(planner: &Book) -> Image {
    let mut image = Image::default();
    image.apply(&planner.everything(), 0);
    image
}

fn sweep(image: &mut Image, planner: &Book, now: u64) -> Vec<Write> {
    image.sweep(|name| planner.planner.has_port(name), |addr| planner.planner.has_any_port(addr), now)
}

/// A change of the generator: a Service, what becomes of it, and the seconds that pass before.
type Change = (u8, Option<Sketch>, u64);

fn changes(max: usize) -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec((0..4_u8, prop::option::weighted(0.8, sketch()), 0..3_u64), 1..max)
}

fn update(planner: &mut Book, service: u8, sketch: Option<&Sketch>) -> Step {
    // Services 2 and 3 are of one age.
    let age = ["2024", "2022", "2023", "2023"][usize::from(service)];
    planner.update(&name(service, "").service, sketch.map(|sketch| plan(service, sketch)), Some(age))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn every_write_leaves_the_old_set_or_the_new_one(changes in changes(12)) {
        let (mut planner, mut image, mut kernel, mut now) = (Book::default(), Image::default(), Memory::default(), 0);
        for (service, sketch, pause) in changes {
            now += pause;
            let (old, old_admitted) = (view(&kernel), admitted(&kernel));
            let writes = image.apply(&update(&mut planner, service, sketch.as_ref()), now);
            let (new, new_admitted) = (view(image.memory()), admitted(image.memory()));
            for write in &writes {
                write.apply(&mut kernel);
                for (seen, (old, new)) in view(&kernel).iter().zip(old.iter().zip(&new)) {
                    prop_assert!(seen == old || seen == new, "{write:?}: {seen} is neither {old} nor {new}");
                }
                for (seen, (old, new)) in admitted(&kernel).iter().zip(old_admitted.iter().zip(&new_admitted)) {
                    prop_assert!(seen == old || seen == new, "{write:?}: {seen:?}");
                }
            }
            prop_assert_eq!(&kernel, image.memory(), "the writes are the whole change");
            assert_clients_stay_where_they_may_go(&kernel);
            prop_assert_eq!(&new, &view(scratch(&planner).memory()), "the way there leaves no trace");
            prop_assert_eq!(image.apply(&planner.everything(), now), []);
            prop_assert!(image.required().slots <= 8 * scratch(&planner).required().slots + 256);
        }
    }

    #[test]
    fn a_restart_writes_nothing_and_goes_on_from_there(changes in changes(12)) {
        let (mut planner, mut image, mut now) = (Book::default(), Image::default(), 0);
        for (service, sketch, pause) in changes {
            now += pause;
            image = Image::restore(image.memory().clone(), now);
            prop_assert_eq!(image.apply(&planner.everything(), now), []);
            prop_assert_eq!(sweep(&mut image, &planner, now), []);
            let ids: Vec<_> = planner.everything().ports.into_keys().map(|name| { let id = image.service_id(&name); (name, id) }).collect();
            let before = view(image.memory());
            let mut kernel = image.memory().clone();
            let writes = image.apply(&update(&mut planner, service, sketch.as_ref()), now);
            for write in &writes {
                write.apply(&mut kernel);
                for (seen, (old, new)) in view(&kernel).iter().zip(before.iter().zip(view(image.memory()))) {
                    prop_assert!(*seen == *old || *seen == new);
                }
            }
            for (name, id) in ids {
                prop_assert!(image.service_id(&name).is_none_or(|now| Some(now) == id));
            }
            prop_assert_eq!(view(image.memory()), view(scratch(&planner).memory()));
        }
    }

    #[test]
    fn an_interrupted_change_is_finished_after_a_restart(changes in changes(8), done in 0.0..1.0) {
        let (mut planner, mut image, mut now) = (Book::default(), Image::default(), 0);
        for (service, sketch, pause) in changes {
            now += pause;
            let mut kernel = image.memory().clone();
            let writes = image.apply(&update(&mut planner, service, sketch.as_ref()), now);
            let old = view(&kernel);
            writes.iter().take((writes.len() as f64 * done) as usize).for_each(|write| write.apply(&mut kernel));
            image = Image::restore(kernel.clone(), now);
            let mut writes = image.apply(&planner.everything(), now);
            writes.extend(sweep(&mut image, &planner, now));
            let new = view(&scratch(&planner).memory);
            for write in &writes {
                write.apply(&mut kernel);
                for (seen, (old, new)) in view(&kernel).iter().zip(old.iter().zip(&new)) {
                    prop_assert!(seen == old || seen == new, "{write:?}: {seen} is neither {old} nor {new}");
                }
            }
            prop_assert_eq!(&kernel, image.memory());
            assert_clients_stay_where_they_may_go(&kernel);
            prop_assert_eq!(view(&kernel), new);
        }
    }

    #[test]
    fn a_restart_that_lists_no_writes_finds_them_by_comparing(changes in changes(8), missed in changes(4), done in 0.0..1.0) {
        let (mut planner, mut image) = (Book::default(), Image::default());
        for (service, sketch, _) in changes {
            image.apply(&update(&mut planner, service, sketch.as_ref()), 0);
        }
        let mut kernel = image.memory().clone();
        let old = view(&kernel);
        let mut image = Image::restore(kernel.clone(), 10);
        let mut planner = Book::default();
        for (service, sketch, _) in missed {
            update(&mut planner, service, sketch.as_ref());
        }
        image.set_silent(true);
        prop_assert_eq!(image.apply(&planner.everything(), 10), []);
        prop_assert_eq!(sweep(&mut image, &planner, 10), []);
        let writes: Vec<Write> = difference(&kernel, image.memory()).collect();
        let new = view(image.memory());
        prop_assert_eq!(&new, &view(scratch(&planner).memory()));
        for write in writes.iter().take((writes.len() as f64 * done) as usize) {
            write.apply(&mut kernel);
            for (seen, (old, new)) in view(&kernel).iter().zip(old.iter().zip(&new)) {
                prop_assert!(seen == old || seen == new, "{write:?}: {seen} is neither {old} nor {new}");
            }
        }
        difference(&kernel.clone(), image.memory()).for_each(|write| write.apply(&mut kernel));
        prop_assert_eq!(&kernel, image.memory());
        prop_assert_eq!(difference(&kernel, image.memory()).next(), None);
        image.set_silent(false);
        prop_assert_eq!(image.apply(&planner.everything(), 10), []);
    }

    #[test]
    fn damaged_tables_are_mended(changes in changes(6), damage in prop::collection::vec((0..7_u8, any::<u32>(), any::<u32>()), 1..12)) {
        let (mut planner, mut image) = (Book::default(), Image::default());
        for (service, sketch, _) in changes {
            image.apply(&update(&mut planner, service, sketch.as_ref()), 0);
        }
        let mut memory = image.memory().clone();
        for (kind, place, value) in damage {
            let small = [value % 16, value][place as usize % 2];
            let at = place as usize;
            match kind {
                0 => _ = memory.slots.insert(place % 64, small),
                1 => _ = memory.services.remove(&(place % 8)),
                2 => _ = memory.services.insert(place % 8, [value as u8; 200]),
                3 => {
                    let bit = memory.frontend_bits.iter().nth(at % 8);
                    bit.map(|bit| memory.frontend_bits.remove(&bit));
                }
                4 => if let Some((_, endpoint)) = memory.endpoints.iter_mut().nth(at % 8) {
                    *endpoint = Endpoint { service: small, flags: value as u16, ..*endpoint };
                },
                5 => if let Some((_, frontend)) = memory.frontends.iter_mut().nth(at % 8) {
                    *frontend = Frontend { service: small, internal: Range { offset: place, len: value }, ..*frontend };
                },
                _ => _ = memory.source_ranges.insert(PrefixKey { prefix_len: value, service: small, addr: v4(INSIDE) }),
            }
        }
        let mut image = Image::restore(memory, 0);
        image.apply(&planner.everything(), 0);
        sweep(&mut image, &planner, 0);
        let mended = scratch(&planner);
        prop_assert_eq!(view(image.memory()), view(mended.memory()));
        prop_assert_eq!(admitted(image.memory()), admitted(mended.memory()));
        prop_assert_eq!(image.memory().services.len(), mended.memory().services.len());
        prop_assert!(image.required().slots <= 4096);
    }
}

fn web(octets: &[u8]) -> Sketch {
    Sketch {
        endpoints: octets.iter().map(|octet| (*octet, true)).collect(),
        local: false,
        shared_node_port: false,
        restricted: None,
        second_port: false,
        affinity: None,
    }
}

#[test]
#[expect(clippy::wildcard_enum_match_arm, reason = "any other kind of write is one too many")]
fn one_endpoint_among_ten_thousand_services_costs_a_few_writes() {
    let mut image = Image::default();
    let addr = |number: u32, net: u32| Addr::from(IpAddr::from((net << 24 | number).to_be_bytes()));
    let port = |number: u32, endpoints: u8| {
        let mut plan = plan_port(0, "http", 80, &web(&(0..endpoints).collect::<Vec<_>>()));
        plan.name.service = ObjectName::new("ns", &format!("s{number}"));
        plan.frontends.truncate(1);
        plan.frontends[0].key.addr = addr(number, 172);
        plan.endpoints.iter_mut().for_each(|it| it.addr = addr(number << 8 | u32::from(it.port), 10).into());
        plan.endpoints.iter_mut().zip(0..).for_each(|(endpoint, place)| endpoint.port = 8000 + place);
        plan
    };
    let plans: Vec<PortPlan> = (0..10_000).map(|number| port(number, 4)).collect();
    let step =
        Step { ports: plans.into_iter().map(|it| (it.name.clone(), Some(Arc::new(it)))).collect(), ..Step::default() };
    let first = image.apply(&step, 0);
    assert_eq!(first.iter().filter(|write| matches!(write, Write::Frontend(..))).count(), 10_000);
    for (endpoints, kinds) in [(3, ["slots", "frontend", "endpoint"]), (4, ["endpoint", "slots", "frontend"])] {
        let plan = port(5_000, endpoints);
        let writes = image.set_port(&plan.name, Some(&plan), 0);
        let kind = |write: &Write| match write {
            Write::Endpoint(..) => "endpoint",
            Write::Slots(..) => "slots",
            Write::Frontend(..) => "frontend",
            _ => "other",
        };
        assert_eq!(writes.iter().map(kind).collect::<Vec<_>>(), kinds);
    }
    let Capacity { frontends, slots, endpoints, services, .. } = image.required();
    assert_eq!((frontends, endpoints, services), (10_000, 40_002, 10_000));
    assert!(slots <= 40_008, "{slots}");
}

#[test]
fn an_id_that_is_used_again_has_another_generation_and_is_left_alone_for_a_while() {
    let mut image = Image::default();
    let mut ids = |octets: &[u8], now| {
        let plan = plan_port(0, "http", 80, &web(octets));
        image.set_port(&plan.name, Some(&plan), now);
        let serving = image.memory().endpoints.iter().filter(|(_, endpoint)| endpoint.flags != 0);
        serving.map(|(id, endpoint)| (id, endpoint.generation)).collect::<Vec<_>>()
    };
    assert_eq!(ids(&[1, 2], 0), [(1, 0), (2, 0)]);
    assert_eq!(ids(&[2], 10), [(2, 0)]);
    assert_eq!(ids(&[2, 3], 10 + GRACE - 1), [(2, 0), (3, 0)]);
    assert_eq!(ids(&[2, 3, 4], 10 + GRACE), [(1, 1), (2, 0), (3, 0)]);
}

#[test]
fn a_bit_stays_while_a_flow_may_name_what_is_gone() {
    let mut image = Image::default();
    let plan = plan_port(0, "http", 80, &web(&[1]));
    image.set_port(&plan.name, Some(&plan), 0);
    let bits = |image: &Image| (image.memory().frontend_bits.len(), image.memory().endpoint_bits.len());
    assert_eq!(bits(&image), (2, 1));
    image.set_port(&plan.name, None, 100);
    assert_eq!((image.expire(100 + FLOW_LIFE - 1, &BTreeSet::new(), &BTreeSet::new()), bits(&image)), (vec![], (2, 1)));
    assert_eq!((image.expire(100 + FLOW_LIFE, &BTreeSet::new(), &BTreeSet::new()).len(), bits(&image)), (3, (0, 0)));
}

#[test]
fn what_is_in_no_plan_is_swept_away() {
    let (mut planner, mut image) = (Book::default(), Image::default());
    for service in 0..4 {
        image.apply(&update(&mut planner, service, Some(&web(&[service + 1]))), 0);
    }
    let mut image = Image::restore(image.memory().clone(), 0);
    let mut kept = Book::default();
    assert_eq!(image.apply(&update(&mut kept, 2, Some(&web(&[3]))), 0), []);
    assert_ne!(sweep(&mut image, &kept, 0), []);
    assert_eq!(view(image.memory()), view(scratch(&kept).memory()));
    assert_eq!((image.memory().frontends.len(), image.memory().services.len()), (3, 1));
    assert_eq!(sweep(&mut image, &kept, 0), []);
}

/// Tables of one Service port with so many endpoints, in the slots from 0 on.
fn table_of(endpoints: u32) -> Memory {
    let mut memory = Memory::default();
    memory.services.insert(1, name::encode(&name(1, "http")));
    for id in 1..=endpoints {
        let addr = Addr::from_v4_word((0x0a00_0000 + id).to_be());
        let flags = endpoint_flags::SERVING;
        memory.endpoints.insert(id, Endpoint { addr, port: Port::new(8080), flags, service: 1, generation: 0 });
        memory.slots.insert(id - 1, id);
    }
    memory
}

#[test]
fn damaged_ranges_cost_no_more_than_there_are_slots() {
    let many = 1 << 16;
    let mut memory = table_of(many);
    // All that lie within the slots, and some that no memory would hold: each looked through, it would take hours.
    let ranges = (0..many).map(|at| Range { offset: at, len: many - at });
    let ranges = ranges.chain((0..64).map(|at| Range { offset: at, len: u32::MAX - at }));
    for (number, range) in (0..).zip(ranges) {
        let key = FrontendKey::new(Addr::from_v4_word(number), Port::new(80), TCP);
        let frontend = Frontend { internal: range, external: range, service: 1, ..Frontend::default() };
        memory.frontends.insert(key, frontend);
    }
    let image = Image::restore(memory, 0);
    assert_eq!(image.ports[&name(1, "http")].ranges, [Range { offset: 0, len: many }]);
    assert_eq!(image.required().slots, many as usize);
}

#[test]
fn ranges_that_hold_the_same_are_held_once() {
    let mut memory = table_of(4);
    let other = Endpoint { service: 2, ..memory.endpoints[&4] };
    memory.endpoints.insert(5, other);
    memory.services.insert(2, name::encode(&name(2, "http")));
    memory.slots.extend([(4, 1), (5, 2), (6, 9), (8, 2), (9, 1), (10, 5), (12, 1), (13, 2)]);
    for (number, (offset, len)) in
        (0..).zip([(0, 4), (0, 4), (4, 2), (6, 1), (7, 1), (8, 2), (5, 1), (10, 1), (12, 2), (0, 0)])
    {
        let key = FrontendKey::new(Addr::from_v4_word(number), Port::new(80), TCP);
        let range = Range { offset, len };
        memory.frontends.insert(key, Frontend { external: range, service: 1, ..Frontend::default() });
    }
    let image = Image::restore(memory, 0);
    let ranges = image.ports[&name(1, "http")].ranges.iter().map(|range| (range.offset, range.len));
    // [6] names no endpoint, [7] is empty, [5] lies in another, [10] is another Service's, [12] holds what [4] does.
    assert_eq!(ranges.collect::<Vec<_>>(), [(0, 4), (4, 2), (8, 2)]);
}

#[test]
fn an_absurd_id_is_swept_away_and_never_given_out() {
    let (mut planner, mut image) = (Book::default(), Image::default());
    image.apply(&update(&mut planner, 1, Some(&web(&[1]))), 0);
    let mut memory = image.memory().clone();
    let absurd = [MOST_IDS, u32::MAX];
    memory.services.extend(absurd.map(|id| (id, name::encode(&name(2, "http")))));
    for (number, service) in (0..).zip([MOST_IDS + 1, u32::MAX - 1]) {
        let key = FrontendKey::new(Addr::from_v4_word(number), Port::new(80), TCP);
        memory.frontends.insert(key, Frontend { service, ..Frontend::default() });
    }
    let mut image = Image::restore(memory, 0);
    sweep(&mut image, &planner, 0);
    assert_eq!(image.memory().services.keys().collect::<Vec<_>>(), [1]);
    for (service, id) in [(0, 2), (2, 3), (3, 4)] {
        image.apply(&update(&mut planner, service, Some(&web(&[1]))), GRACE);
        assert_eq!(image.service_id(&name(service, "http")), Some(id));
    }
}
