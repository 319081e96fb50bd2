//! A packet's view of changes: while one set of endpoints follows the other through the real stages into the kernel's tables, packets run
//! through the program, and each sees one whole set, which was there while it ran. As root.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

#[expect(dead_code, reason = "what is deleted elsewhere is not here")]
#[path = "../shared/objects.rs"]
mod objects;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::programs::{TestRun as _, TestRunOptions};
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use fairlead::{
    image::Image,
    kernel::{
        Kernel, Options, SocketLb,
        cleanup::cleanup,
        folder,
        maps::{Capacity, Table},
        object::{Constants, Programs},
    },
    model::{Change, Interner},
    pipeline::Pipeline,
    plan::node::NodeOptions,
};
use rustix::{
    mount::{UnmountFlags, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};
use serde_json::{Value, json};
use tests::folder::Folder;

/// How long it is looked.
const WHILE: Duration = Duration::from_secs(3);
/// Changes in a second of the stages' clock, of which numbers that are free again rest two: as much as fits into tables that need not
/// grow, since the packets know the first ones only.
const CHANGES_A_SECOND: u64 = 8;
/// What the program says of a packet that goes on, of one that is refused, and of one that is dropped (`include/uapi/linux/pkt_cls.h`).
const NEXT: u32 = u32::MAX;
const REDIRECT: u32 = 7;
const SHOT: u32 = 2;

const SERVICE: [&str; 2] = ["10.96.0.10", "fd00:96::10"];

/// How many endpoints a set has. Every eighth is empty.
fn size(set: u64) -> u64 {
    if set % 8 == 7 { 0 } else { 1 + set % 5 }
}

/// An endpoint's address says of which set it is.
fn endpoint(set: u64, number: u64, family: usize) -> IpAddr {
    let [.., high, low] = set.to_be_bytes();
    if family == 0 {
        [10, 200 + u8::try_from(number).unwrap(), high, low].into()
    } else {
        [0xfd00, 0x200, 0, 0, 0, 0, u16::try_from(number).unwrap(), u16::from_be_bytes([high, low])].into()
    }
}

/// The set and number that an address stands for, if it is an endpoint's.
fn said_by(address: IpAddr) -> Option<(u64, u64)> {
    match address {
        IpAddr::V4(address) => {
            let [_, number, high, low] = address.octets();
            Some((u16::from_be_bytes([high, low]).into(), number.checked_sub(200)?.into()))
        }
        IpAddr::V6(address) => {
            let [_, kind, .., number, set] = address.segments();
            (kind == 0x200).then_some((set.into(), number.into()))
        }
    }
}

fn service() -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"}, "spec": {
        "clusterIP": SERVICE[0], "clusterIPs": SERVICE, "ipFamilies": ["IPv4", "IPv6"], "ports": [{"port": 80, "protocol": "TCP"}]}})
}

fn slice(set: u64, family: usize) -> Value {
    let endpoints: Vec<Value> =
        (0..size(set)).map(|number| json!({"addresses": [endpoint(set, number, family).to_string()]})).collect();
    let addresses = if family == 0 { "IPv4" } else { "IPv6" };
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": addresses,
        "metadata": {"name": format!("web-{family}"), "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "endpoints": endpoints, "ports": [{"port": 8080, "protocol": "TCP", "name": ""}]})
}

fn frame(family: usize, client: u32) -> Vec<u8> {
    let [a, b, c, d] = client.to_be_bytes();
    let ethernet = PacketBuilder::ethernet2([0, 0, 0, 0, 0, 2], [0; 6]);
    let net = match SERVICE[family].parse().unwrap() {
        IpAddr::V4(to) => ethernet.ipv4([10, 244, a, b], to.octets(), 64),
        IpAddr::V6(to) => {
            let from: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b];
            ethernet.ipv6(from, to.octets(), 64)
        }
    };
    let mut frame = Vec::new();
    net.tcp(u16::from_be_bytes([c, d]) | 1024, 80, 1, 65_535).syn().write(&mut frame, &[]).unwrap();
    frame
}

/// Where a frame goes.
fn destination(frame: &[u8]) -> SocketAddr {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let to: IpAddr = match packet.net.unwrap() {
        NetSlice::Ipv4(net) => net.header().destination_addr().into(),
        NetSlice::Ipv6(net) => net.header().destination_addr().into(),
        NetSlice::Arp(_) => panic!("{frame:02x?}"),
    };
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("{frame:02x?}") };
    SocketAddr::new(to, tcp.destination_port())
}

/// The number of the set that is being written, and of the last one that was.
#[derive(Default)]
struct Sets {
    begun: AtomicU64,
    done: AtomicU64,
}

/// Sends packets until told to stop. Answers which sets they saw.
fn observe(programs: &mut Programs, family: usize, sets: &Sets, stop: &AtomicBool) -> BTreeSet<u64> {
    let mut seen = BTreeSet::new();
    let mut out = vec![0; 512];
    let (mut client, mut packets) = (0_u32, 0);
    while !stop.load(Ordering::SeqCst) {
        client = client.wrapping_add(0x9e37_79b1);
        let frame = frame(family, client);
        let program = programs.classifier("ingress", true).unwrap();
        let options = TestRunOptions { data_in: Some(&frame), data_out: Some(&mut out), ..TestRunOptions::default() };
        let done = sets.done.load(Ordering::SeqCst);
        let result = program.test_run(options).unwrap();
        let begun = sets.begun.load(Ordering::SeqCst);
        let there = done..=begun;
        match result.return_value {
            NEXT => {
                let to = destination(&out[..result.data_size_out as usize]);
                let Some((set, number)) = said_by(to.ip()) else {
                    panic!("passed to {to} while there was {there:?}, packet {packets}")
                };
                packets += 1;
                assert!(there.contains(&set), "to {to}, of set {set}, while there was {there:?}");
                assert!(number < size(set) && to.port() == 8080, "to {to}, which was never there");
                seen.insert(set);
            }
            // More than ten thousand refusals a second are dropped.
            verdict @ (REDIRECT | SHOT) => {
                let empty = there.clone().find(|set| size(*set) == 0);
                seen.insert(empty.unwrap_or_else(|| panic!("{verdict}: refused while there was {there:?}")));
            }
            other => panic!("verdict {other} while there was {there:?}"),
        }
    }
    seen
}

fn change(kernel: &mut Kernel, pipeline: &mut Pipeline, sets: &Sets) -> u64 {
    let mut interner = Interner::default();
    let start = Instant::now();
    let mut set = 0;
    // Numbers of sets have 16 bits.
    while start.elapsed() < WHILE && set < 60_000 {
        set += 1;
        sets.begun.store(set, Ordering::SeqCst);
        for family in [0, 1] {
            pipeline.take(Change::Upsert(objects::object(&slice(set, family), &mut interner)));
        }
        let writes = pipeline.compile(set / CHANGES_A_SECOND);
        kernel.apply(&writes).unwrap();
        sets.done.store(set, Ordering::SeqCst);
    }
    set
}

/// Both families' frontends change, so that each gets the elements which the other's have left. (A packet in a million may meet that, and
/// only by chance: the test that holds it is with `decide::classify`.)
fn look(family: usize) {
    let dir = Folder::create().unwrap();
    let bpffs = dir.path().join("bpffs");
    let options = Options { bpffs: bpffs.clone(), socket_lb: SocketLb::Off, flows: 4096, ..Options::default() };
    let mut pipeline = Pipeline::new("node1", NodeOptions::default(), Image::default());
    let mut interner = Interner::default();
    for value in [service(), slice(0, 0), slice(0, 1)] {
        pipeline.take(Change::Upsert(objects::object(&value, &mut interner)));
    }
    let writes = pipeline.compile(0);
    assert_eq!(pipeline.problems(), []);
    let mut kernel = Kernel::open(options.clone()).unwrap();
    kernel.apply(&writes).unwrap();
    let (generation, flows, _) = folder::current(&bpffs).unwrap();
    let constants = Constants::new(&options).unwrap();
    let mut programs = Programs::load(&generation, &flows, &Capacity::default(), &constants, &options).unwrap();
    let rooms = Table::ALL.map(|table| kernel.room(table));
    let (sets, stop) = (Sets::default(), AtomicBool::new(false));
    let (changes, seen) = thread::scope(|scope| {
        let observer = scope.spawn(|| observe(&mut programs, family, &sets, &stop));
        let changes = change(&mut kernel, &mut pipeline, &sets);
        stop.store(true, Ordering::SeqCst);
        (changes, observer.join())
    });
    let rooms_then = Table::ALL.map(|table| kernel.room(table));
    drop((kernel, programs));
    let _ = cleanup(&bpffs);
    let _ = unmount(&bpffs, UnmountFlags::DETACH);
    assert_eq!(
        rooms_then,
        rooms,
        "tables grew after {changes} changes, and the packets saw old ones: {:?}",
        Table::ALL
    );
    let seen = seen.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    println!("{changes} changes, {} sets seen", seen.len());
    assert!(changes > 100, "{changes} changes in {WHILE:?}");
    assert!(seen.len() > 20, "{} of {changes} sets were seen", seen.len());
}

#[test]
fn every_packet_sees_one_whole_set_of_endpoints_while_sets_follow_each_other() {
    let test = thread::spawn(|| {
        // SAFETY: a namespace of its own for a thread that ends with the test; descriptors stay shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        [0, 1].into_iter().for_each(look);
    });
    if let Err(panic) = test.join() {
        std::panic::resume_unwind(panic);
    }
}
