//! The programs in the kernel and `lb_common::path` on the host are one source compiled twice. The same frames, in the same order,
//! through both: the same verdicts, causes and bytes, and the same connections remembered at the end. As root.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

mod frames;
mod icmp;
mod odd;
mod race;
mod sctp;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use aya::programs::{TestRun as _, TestRunOptions};
use fairlead::{
    image::Image,
    kernel::{
        Kernel, Mark, Options, SocketLb,
        cleanup::cleanup,
        folder,
        maps::Capacity,
        object::{Constants, Programs},
        pinned::Pinned,
    },
    pipeline::Pipeline,
    plan::node::NodeOptions,
    source::manifests,
};
use lb_common::{
    addr::Addr,
    flow::{Flow, FlowKey},
    layout::Device,
    memory::Machine,
    path::{Action, Hook, Scratch, egress, ingress},
    reason::Reason,
};
use rustix::{
    mount::{UnmountFlags, unmount},
    thread::{UnshareFlags, unshare_unsafe},
    time::{ClockId, clock_gettime},
};
use tests::folder::Folder;

use frames::{Frames, NODE_V4, NODE_V6, Way};

/// The loopback device, where BPF_PROG_TEST_RUN lets packets enter and leave unless told otherwise. Its MAC address is all zero.
const LOOPBACK: u32 = 1;

/// How many frames are compared.
const FRAMES: usize = 6000;

/// What the kernel understands as "next", "drop" and "redirected" (`include/uapi/linux/pkt_cls.h`).
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const ANSWER: u32 = 7;

const fn code(action: Action) -> u32 {
    match action {
        Action::Next(_) => NEXT,
        Action::Drop(_) => DROP,
        Action::Answer(_) | Action::Bridge(..) => ANSWER,
    }
}

/// The programs, with the tables that the real stages have filled.
struct Loaded {
    dir: Folder,
    options: Options,
    programs: Programs,
    pinned: Pinned,
    counters: Vec<u64>,
}

impl Loaded {
    fn new() -> Self {
        Self::with(frames::MANIFESTS, Options::default())
    }

    /// With objects and options of one's own.
    fn with(manifests: &str, options: Options) -> Self {
        let dir = Folder::create().unwrap();
        let objects = dir.path().join("manifests");
        fs::create_dir(&objects).unwrap();
        fs::write(objects.join("all.yaml"), manifests).unwrap();
        let mut pipeline = Pipeline::new("node1", NodeOptions::default(), Image::default());
        let update = manifests::read_all(&objects).unwrap();
        assert!(update.problems.is_empty(), "{:?}", update.problems);
        update.changes.into_iter().for_each(|change| _ = pipeline.take(change));
        pipeline
            .set_interfaces(["10.99.0.11", "fd00:99::11", "127.0.0.1", "::1"].map(|ip| ip.parse().unwrap()).to_vec());
        let device =
            Device { masquerade_v4: Addr::from(NODE_V4), masquerade_v6: Addr::from(NODE_V6), ..Device::default() };
        let mut writes = pipeline.image_mut().set_devices(&[(LOOPBACK, device)].into());
        writes.extend(pipeline.compile(0));
        assert_eq!(pipeline.problems(), []);

        let bpffs = dir.path().join("bpffs");
        let options = Options {
            bpffs: bpffs.clone(),
            socket_lb: SocketLb::Off,
            flows: 65_536,
            // As the host's half, which always remembers who is a client outside.
            reply_mark: Mark { value: 0x80, mask: 0x80 },
            ..options
        };
        let mut kernel = Kernel::open(options.clone()).unwrap();
        kernel.apply(&writes).unwrap();
        drop(kernel);
        let programs = load(&options);
        let pinned = Pinned::open(&bpffs).unwrap();
        let counters = pinned.counters().unwrap();
        Self { dir, options, programs, pinned, counters }
    }

    /// Runs one program on a frame: its verdict, its cause, what has become of the frame.
    fn run(&mut self, way: Way, frame: &[u8]) -> (u32, Option<&'static str>, Vec<u8>) {
        let (verdict, out) = run(&mut self.programs, way, frame);
        let counters = self.pinned.counters().unwrap();
        let counted = counters.iter().zip(&self.counters).position(|(after, before)| after != before);
        self.counters = counters;
        (verdict, counted.map(|index| Reason::ALL[index].as_str()), out)
    }

    fn flows(&self) -> Vec<(FlowKey, Flow)> {
        let mut flows = Vec::new();
        self.pinned.flows(|key, flow| flows.push((key, timeless(flow)))).unwrap();
        flows.sort_by_key(|(key, _)| *key);
        flows
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let bpffs = self.dir.path().join("bpffs");
        let _ = cleanup(&bpffs);
        let _ = unmount(&bpffs, UnmountFlags::DETACH);
    }
}

/// The programs once more, on the tables that are there.
fn load(options: &Options) -> Programs {
    let (generation, flows, _) = folder::current(&options.bpffs).unwrap();
    let constants = Constants::new(options).unwrap();
    Programs::load(&generation, &flows, &Capacity::default(), &constants, options).unwrap()
}

/// Runs a program on a frame: its verdict, what has become of the frame.
fn run(programs: &mut Programs, way: Way, frame: &[u8]) -> (u32, Vec<u8>) {
    let name = match way {
        Way::In => "ingress",
        Way::Out => "egress",
    };
    let mut out = vec![0; 4096];
    let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::default() };
    let program = programs.classifier(name, true).unwrap();
    let result = program.test_run(options).unwrap_or_else(|error| panic!("{name} of {frame:02x?}: {error:?}"));
    out.truncate(result.data_size_out as usize);
    (result.return_value, out)
}

/// Without the time, in which the two may differ by one.
fn timeless(flow: Flow) -> Flow {
    Flow { seen: 0, ..flow }
}

/// The host's half.
fn run_here(machine: &mut Machine, way: Way, frame: &[u8]) -> (u32, Option<&'static str>, Vec<u8>) {
    let time = clock_gettime(ClockId::MonotonicCoarse);
    machine.now = ((time.tv_sec * 1_000_000_000 + time.tv_nsec) >> 30) as u32;
    let v6 = match frame[12..14] {
        [0x08, 0x00] => false,
        [0x86, 0xdd] => true,
        _ => return (NEXT, None, frame.to_vec()),
    };
    let hook = Hook { device: LOOPBACK, link_header: 14, v6, translated: false, finished: false, from_node: true };
    let mut out = frame.to_vec();
    let run = match way {
        Way::In => ingress::<Vec<u8>, Machine>,
        Way::Out => egress,
    };
    let action = run(&mut out, &hook, &mut Scratch::NEW.clone(), machine);
    // What is none of ours is not counted.
    let counted = (action.reason() != Reason::NotService).then_some(action.reason().as_str());
    (code(action), counted, out)
}

/// Both halves, one after the other.
struct Halves {
    kernel: Loaded,
    here: Machine,
}

impl Halves {
    fn new() -> Self {
        let kernel = Loaded::new();
        let here = Machine { tables: kernel.pinned.memory().unwrap(), ..Machine::default() };
        Self { kernel, here }
    }

    /// Runs a frame through both: what they answer, and what has become of it.
    fn run(&mut self, what: &str, way: Way, frame: &[u8]) -> (u32, Vec<u8>) {
        let mut frame = frame.to_vec();
        frame[..6].fill(0);
        let here = run_here(&mut self.here, way, &frame);
        let there = self.kernel.run(way, &frame);
        let is_same = here.0 == there.0 && here.1 == there.1 && (here.0 == DROP || here.2 == there.2);
        assert!(is_same, "{what}, {way:?}:\n  {frame:02x?}\nhere   {here:02x?}\nkernel {there:02x?}");
        (there.0, there.2)
    }
}

fn compare(seed: u64) {
    let mut loaded = Loaded::new();
    let mut machine = Machine { tables: loaded.pinned.memory().unwrap(), ..Machine::default() };
    let mut frames = Frames::new(seed);
    let mut causes = std::collections::BTreeMap::new();
    for number in 0..FRAMES {
        let (way, frame) = frames.next();
        let here = run_here(&mut machine, way, &frame);
        let there = loaded.run(way, &frame);
        *causes.entry(here.1).or_insert(0) += 1;
        let kept = here.0 == DROP || here.2 == there.2;
        assert!(
            here.0 == there.0 && here.1 == there.1 && kept,
            "seed {seed}, frame {number}, {way:?}:\n   {frame:02x?}\nhere {}, {:?}:\n   {:02x?}\nkernel {}, {:?}:\n   {:02x?}",
            here.0,
            here.1,
            here.2,
            there.0,
            there.1,
            there.2,
        );
        if here.0 != DROP {
            frames.became(way, frame, here.2);
        }
    }
    let remembered: Vec<_> = machine.flows.iter().map(|(key, (flow, _))| (*key, timeless(*flow))).collect();
    assert_eq!(loaded.flows(), remembered, "seed {seed}: what is remembered");
    println!("{causes:#?}\n{} entries", remembered.len());
    for wanted in frames::CAUSES {
        assert!(causes.contains_key(&Some(*wanted)), "seed {seed}: no frame was {wanted}: {causes:?}");
    }
}

#[test]
fn the_programs_and_the_host_do_the_same_to_every_frame() {
    assert!(Path::new("/sys/fs/bpf").exists(), "this kernel has no BPF file system");
    // Another seed every run; a failure names it, and FAIRLEAD_SEED brings it back.
    let seed = match std::env::var("FAIRLEAD_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
    };
    in_a_namespace(move || compare(seed));
}

/// Runs a test on a thread with a network namespace of its own.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let test = thread::spawn(move || {
        // SAFETY: a namespace of its own for a thread that ends with the test; descriptors stay shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        test();
    });
    if let Err(panic) = test.join() {
        std::panic::resume_unwind(panic);
    }
}
