//! Pinned maps with bytes that no agent wrote.
//!
//! In: any bytes. They say where the maps of a small cluster are damaged, and how. Panics where a subcommand that reads them does,
//! or where an agent that starts with them doesn't come to the tables that a start with none comes to.

use std::{collections::BTreeMap, net::IpAddr, sync::LazyLock};

use fairlead::{
    cli::{
        endpoints,
        explain::{Named, Packet, explain},
        flows,
        pins::{Output, Selection},
        services, status,
    },
    image::{GRACE, Image, MOST_IDS, Write},
    kernel::{
        bytes_of,
        links::{Attached, Mechanism},
        maps::{Capacity, Table},
        pinned::Fill,
        tables::take_in,
        value_of,
    },
    model::{
        Change, EndpointSlice, Interner, Kind, Object, Pod, PodState, SliceState,
        object::{Protocol, Service},
    },
    pipeline::Pipeline,
};
use lb_common::{
    affinity::{Affinity, AffinityKey},
    flow::{Flow, FlowKey},
    layout::{BIT_WORDS, Device, Endpoint, Frontend, FrontendKey, NodeAddress, PrefixKey, ServiceName, Settings},
    memory::Memory,
};
use serde_json::Value;

use crate::{
    cluster::{assert_bits, assert_same, manifests, start},
    content::Content,
    input::Input,
};

/// A map's entries as the kernel gives them.
type Entries = BTreeMap<(Table, Vec<u8>), Vec<u8>>;

/// Tables, and how many bytes their keys and values have.
const TABLES: [(Table, usize, usize); 12] = [
    (Table::Frontends, size_of::<FrontendKey>(), size_of::<Frontend>()),
    (Table::Slots, 4, 4),
    (Table::Endpoints, 4, size_of::<Endpoint>()),
    (Table::Services, 4, size_of::<ServiceName>()),
    (Table::SourceRanges, size_of::<PrefixKey>(), 4),
    (Table::LocalCidrs, size_of::<PrefixKey>(), 4),
    (Table::ServiceCidrs, size_of::<PrefixKey>(), 4),
    (Table::NodeAddresses, size_of::<lb_common::addr::Addr>(), size_of::<NodeAddress>()),
    (Table::Devices, 4, size_of::<Device>()),
    (Table::Settings, 4, size_of::<Settings>()),
    (Table::FrontendBits, 4, 8),
    (Table::EndpointBits, 4, 8),
];

/// Numbers that matter as ids, places, lengths and flags.
const WORDS: [u32; 16] =
    [0, 1, 2, 3, 4, 5, 7, 31, 160, 1024, MOST_IDS - 1, MOST_IDS, 1 << 28, (1 << 28) + 1, u32::MAX - 1, u32::MAX];

static OBJECTS: LazyLock<Vec<Object>> = LazyLock::new(|| manifests().iter().map(object).collect());

static WHOLE: LazyLock<Entries> = LazyLock::new(|| {
    let image = start(&*OBJECTS, Image::default(), 0).0.into_image();
    entries(image.memory())
});

static FRESH: LazyLock<(Content, Memory)> = LazyLock::new(|| {
    let memory = start(&*OBJECTS, Image::default(), 0).0.into_image().into_memory();
    (Content::of(&memory), memory)
});

fn object(value: &Value) -> Object {
    let of = |value: &Value| value.clone();
    let interner = &mut Interner::default();
    match value["kind"].as_str().and_then(Kind::from_name).unwrap() {
        Kind::Service => Object::Service(serde_json::from_value::<Box<Service>>(of(value)).unwrap()),
        Kind::Node => Object::Node(serde_json::from_value(of(value)).unwrap()),
        Kind::ServiceCidr => Object::ServiceCidr(serde_json::from_value(of(value)).unwrap()),
        Kind::EndpointSlice => {
            let slice: EndpointSlice = serde_json::from_value(of(value)).unwrap();
            Object::EndpointSlice(SliceState::new(&slice, interner).0.into())
        }
        Kind::Pod => Object::Pod(PodState::new(&serde_json::from_value::<Pod>(of(value)).unwrap(), interner).0.into()),
    }
}

fn entries(memory: &Memory) -> Entries {
    let mut entries = Entries::new();
    let mut put = |table, key: &[u8], value: &[u8]| _ = entries.insert((table, key.to_vec()), value.to_vec());
    memory.frontends.iter().for_each(|(key, value)| put(Table::Frontends, bytes_of(&[*key]), bytes_of(&[*value])));
    memory.slots.iter().for_each(|(key, value)| put(Table::Slots, bytes_of(&[key]), bytes_of(&[*value])));
    memory.endpoints.iter().for_each(|(key, value)| put(Table::Endpoints, bytes_of(&[key]), bytes_of(&[*value])));
    memory.services.iter().for_each(|(key, value)| put(Table::Services, bytes_of(&[key]), value));
    for (table, prefixes) in [
        (Table::SourceRanges, &memory.source_ranges),
        (Table::LocalCidrs, &memory.local_cidrs),
        (Table::ServiceCidrs, &memory.service_cidrs),
    ] {
        prefixes.iter().for_each(|key| put(table, bytes_of(&[*key]), bytes_of(&[1_u32])));
    }
    memory.node_addresses.iter().for_each(|(key, value)| {
        put(Table::NodeAddresses, bytes_of(&[*key]), bytes_of(&[*value]));
    });
    memory.devices.iter().for_each(|(key, value)| put(Table::Devices, bytes_of(&[*key]), bytes_of(&[*value])));
    put(Table::Settings, bytes_of(&[0_u32]), bytes_of(&[memory.settings]));
    for (table, bits) in [(Table::FrontendBits, &memory.frontend_bits), (Table::EndpointBits, &memory.endpoint_bits)] {
        let mut words: BTreeMap<u32, u64> = BTreeMap::new();
        bits.iter().for_each(|bit| *words.entry(bit / 64).or_default() |= 1 << (bit % 64));
        words.iter().for_each(|(key, word)| put(table, bytes_of(&[*key]), bytes_of(&[*word])));
    }
    entries
}

/// A key that the kernel would have in this table.
fn possible(table: Table, mut key: Vec<u8>) -> Vec<u8> {
    let first = u32::from_ne_bytes([key[0], key[1], key[2], key[3]]);
    let first = match table {
        Table::Slots => first % 8192,
        Table::Endpoints => first % 2048,
        Table::FrontendBits | Table::EndpointBits => first % BIT_WORDS as u32,
        Table::Settings => 0,
        // The length of a prefix.
        Table::SourceRanges | Table::LocalCidrs | Table::ServiceCidrs => first % 161,
        Table::Frontends | Table::Services | Table::NodeAddresses | Table::Devices | Table::ServiceCounters => first,
    };
    key[..4].copy_from_slice(&first.to_ne_bytes());
    key
}

fn overwrite(bytes: &mut [u8], input: &mut Input<'_>) {
    let at = usize::from(input.byte()) % bytes.len();
    let how = input.byte();
    if how & 1 == 0 {
        let (at, word) = (at / 4 * 4, input.one_of(&WORDS));
        bytes.iter_mut().skip(at).zip(word.to_ne_bytes()).for_each(|(byte, new)| *byte = new);
    } else {
        let new = input.take(1 + usize::from(how >> 1) % 8);
        bytes.iter_mut().skip(at).zip(new).for_each(|(byte, new)| *byte = *new);
    }
}

fn damage(entries: &mut Entries, input: &mut Input<'_>) {
    let how = input.byte();
    let (table, key_size, value_size) = input.one_of(&TABLES);
    let of_table = entries.range((table, Vec::new())..).take_while(|((other, _), _)| *other == table).count();
    let nth = usize::from(input.byte()) % of_table.max(1);
    let there = entries.range((table, Vec::new())..).nth(nth).filter(|((other, _), _)| *other == table);
    let (mut key, mut value) = match there {
        Some(((_, key), value)) if how & 3 != 0 => (key.clone(), value.clone()),
        _ => (vec![0; key_size], vec![0; value_size]),
    };
    // A change of the key makes another entry beside the old one.
    let removed = how & 0x30 == 0;
    if removed {
        entries.remove(&(table, key.clone()));
    }
    if how & 4 != 0 || how & 3 == 0 {
        overwrite(&mut key, input);
    }
    for _ in 0..how >> 6 {
        overwrite(&mut value, input);
    }
    if !removed || how & 8 != 0 {
        entries.insert((table, possible(table, key)), value);
    }
}

/// Tables as `explain` reads them.
struct Pins {
    memory: Memory,
    affinities: BTreeMap<AffinityKey, Affinity>,
    now: u32,
}

impl Named for Pins {
    fn tables(&self) -> &Memory {
        &self.memory
    }

    fn interface(&self, name: &str) -> Option<u32> {
        name.strip_prefix("eth")?.parse().ok()
    }

    fn remembered(&self, key: &AffinityKey) -> Option<(Affinity, u32)> {
        Some((*self.affinities.get(key)?, self.now))
    }
}

fn explained(pins: &Pins) {
    for (from, to) in [
        (
            ["10.1.0.1", "203.0.113.7", "192.168.0.2"],
            ["10.96.0.10", "10.96.0.99", "192.0.2.1", "192.0.2.2", "192.168.0.2"],
        ),
        (
            ["fd00:1::1", "2001:db8:7::7", "fd00:c0::2"],
            ["fd00:96::10", "fd00:96::99", "2001:db8::1", "2001:db8::2", "fd00:c0::2"],
        ),
    ] {
        for (from, to) in from.into_iter().flat_map(|from| to.map(|to| (from, to))) {
            for (port, protocol) in
                [(80, Protocol::Tcp), (53, Protocol::Udp), (30080, Protocol::Tcp), (9, Protocol::Sctp)]
            {
                let [from, to] = [from, to].map(|text| text.parse::<IpAddr>().unwrap());
                let packet = Packet { from, to, port, protocol, from_interface: Some("eth1".to_owned()) };
                match explain(&packet, pins) {
                    Ok(answer) => assert!(answer.paragraph(&packet).ends_with('.')),
                    Err(error) => assert!(error.to_string().contains("; "), "{error}"),
                }
            }
        }
    }
}

/// What the list says is in lines, and as many as there are of it.
fn listed(list: impl Fn(&Selection) -> String) {
    let as_ = |output| list(&Selection { output, ..Selection::default() });
    let rows = serde_json::from_str::<Vec<Value>>(&as_(Output::Json)).unwrap();
    let lines = as_(Output::Table);
    assert!(lines.lines().count() > rows.len(), "{} rows in {} lines", rows.len(), lines.lines().count());
    assert!(!lines.chars().any(|c| c.is_control() && c != '\n'), "writes over other lines: {lines:?}");
}

/// Reads damaged tables as every reader does.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut entries = WHOLE.clone();
    for _ in 0..input.byte() % 16 {
        damage(&mut entries, &mut input);
    }
    let mut memory = Memory::default();
    for ((table, key), value) in &entries {
        take_in(&mut memory, *table, key, value);
    }
    let mut flows = Vec::new();
    let mut affinities = BTreeMap::new();
    let now = u32::from_ne_bytes([input.byte(), input.byte(), input.byte(), input.byte()]);
    while !input.0.is_empty() && flows.len() < 8 {
        let mut part = |size: usize| {
            let mut bytes = vec![0; size];
            bytes.iter_mut().zip(input.take(size)).for_each(|(byte, new)| *byte = *new);
            bytes
        };
        let service = 1 + u32::from(part(1)[0] % 4);
        let flow = Flow { service, ..value_of(&part(size_of::<Flow>())) };
        flows.push((value_of::<FlowKey>(&part(size_of::<FlowKey>())), flow));
        let client = value_of::<AffinityKey>(&part(size_of::<AffinityKey>())).client;
        affinities.insert(AffinityKey { client, service }, value_of::<Affinity>(&part(size_of::<Affinity>())));
    }

    listed(|selection| endpoints::list(&memory, selection).unwrap());
    listed(|selection| services::list(&memory, Vec::new(), selection).unwrap());
    listed(|selection| flows::list(&flows, &memory, now, selection).unwrap());
    let attached = || {
        let program = "egress".to_owned();
        vec![Attached {
            ifindex: Some(now),
            program,
            mechanism: Some(Mechanism::Tcx),
            link: None,
            program_id: None,
            before: Vec::new(),
            live: now % 2 == 0,
        }]
    };
    let fill = || vec![Fill { name: "SLOTS", id: 1, used: u64::from(now), room: now % 3, evicted: None }];
    for output in [Output::Table, Output::Json] {
        let text = status::Status::new(None, &memory, attached(), &fill(), &[u64::from(now); 3]).text(output).unwrap();
        assert!(text.contains("no agent runs"), "{text}");
    }
    let pins = Pins { memory, affinities, now };
    explained(&pins);

    let Pins { memory, .. } = pins;
    assert!(Capacity::of(&memory).needs(Table::ServiceCounters) <= MOST_IDS);
    let mut kernel = memory.clone();
    let (mut pipeline, writes) = start(&*OBJECTS, Image::restore(memory, 10), 10);
    let mut look = |pipeline: &Pipeline, writes: Vec<Write>, whole: bool| {
        writes.iter().for_each(|write| write.apply(&mut kernel));
        assert_same(&kernel, pipeline.image().memory());
        let (content, fresh) = &*FRESH;
        let now = Content::of(&kernel);
        if whole {
            assert_same(&now, content);
            assert_bits(&kernel, fresh);
        }
        let required = pipeline.image().required();
        assert!(required.slots <= 2 * 8192 && required.endpoints <= 2 * 2048, "{required:?}");
    };
    look(&pipeline, writes, true);
    // What was damaged may be used again, and nothing that is in use.
    for (now, whole) in (10 + GRACE..).zip([false, true, false, true]) {
        for object in &*OBJECTS {
            pipeline.take(if whole {
                Change::Upsert(object.clone())
            } else {
                Change::Delete(object.kind(), object.name())
            });
        }
        let writes = pipeline.compile(now * GRACE);
        look(&pipeline, writes, whole);
    }
}
