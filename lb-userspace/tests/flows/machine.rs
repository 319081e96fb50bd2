//! A node of one thread: a network namespace with real devices, the programs in the kernel, tables that the real stages fill.
//!
//! In: cases, one after another: each starts an agent anew on the tables that the one before left. Out: programs to run and an
//! image to look at.

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use aya::maps::{HashMap, Map, MapData};
use fairlead::{
    image::{GRACE, Image, Write},
    kernel::{Kernel, Options, SocketLb, devices::watch::Watch, folder},
    model::{Change, Object},
    pipeline::Pipeline,
};
use lb_common::affinity::{Affinity, AffinityKey};
use rustix::{
    mount::{UnmountFlags, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};
use tests::command::ip_batch;
use tests::folder::Folder;

use crate::{cases::Case, pipeline};

/// Runs a test on a thread with a network namespace of its own.
pub fn on_a_node(test: impl FnOnce() + Send + 'static) {
    let result = thread::spawn(move || {
        // SAFETY: a namespace of its own for a thread that ends with the test; descriptors stay shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        ip(&["link set lo up"]);
        test();
    })
    .join();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// Runs lines of `ip` in the thread's namespace.
pub fn ip<T: AsRef<str>>(lines: &[T]) {
    ip_batch(None, &lines.iter().map(|line| line.as_ref().to_owned()).collect::<Vec<_>>()).unwrap();
}

/// Gives these addresses and no others to a device, which has the default routes.
pub fn set_addresses(device: &str, addresses: &[IpAddr]) {
    // IPv4 addresses first: routes go when the last address of their family goes.
    let mut lines = vec![format!("address flush dev {device} scope global")];
    lines.extend(addresses.iter().map(|address| match address {
        IpAddr::V4(address) => format!("address add {address}/32 dev {device}"),
        IpAddr::V6(address) => format!("address add {address}/128 dev {device} nodad"),
    }));
    lines.push(format!("route replace 0.0.0.0/0 dev {device}"));
    lines.push(format!("route replace ::/0 dev {device}"));
    ip(&lines);
}

/// What netlink is asked with.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// The kernel with the tables of one case after another.
pub struct Machine {
    pub kernel: Kernel,
    pub pipeline: Option<Pipeline>,
    now: u64,
    bpffs: PathBuf,
    _dir: Folder,
}

impl Machine {
    /// Nothing is loaded yet.
    pub fn new(cgroup: Option<PathBuf>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = Folder::create().unwrap();
        let bpffs = dir.path().join(format!("bpffs{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let socket_lb = if cgroup.is_some() { SocketLb::Host } else { SocketLb::Off };
        let options = Options { bpffs: bpffs.clone(), cgroup, socket_lb, flows: 65_536, ..Options::default() };
        Self { kernel: Kernel::open(options).unwrap(), pipeline: None, now: 0, bpffs, _dir: dir }
    }

    /// An agent starts with the case's configuration, on the tables that the agent before it left.
    pub fn start(&mut self, case: &Case, mode: &str, objects: Vec<Object>) {
        self.now += 2 * GRACE;
        let image = self.pipeline.take().map_or_else(Image::default, Pipeline::into_image);
        let mut pipeline = Pipeline::new(&case.node.name, pipeline::options(case, mode), image);
        pipeline.set_interfaces(case.node.ips.clone());
        self.pipeline = Some(pipeline);
        self.change(case, mode, objects.into_iter().map(Change::Upsert).collect());
        let writes = self.pipeline.as_mut().unwrap().sweep(self.now);
        self.apply(case, &writes);
    }

    /// Changes come.
    pub fn change(&mut self, case: &Case, mode: &str, changes: Vec<Change>) {
        let pipeline = self.pipeline.as_mut().unwrap();
        changes.into_iter().for_each(|change| _ = pipeline.take(change));
        let mut writes = pipeline.compile(self.now);
        let detector = pipeline::options(case, mode).detector;
        let rows = runtime().block_on(async {
            let watch = Watch::open().unwrap();
            watch.snapshot().device_rows(&pipeline.view().primary, |name| detector.takes_interface(name))
        });
        writes.extend(pipeline.image_mut().set_devices(&rows));
        self.apply(case, &writes);
        assert_eq!(self.kernel.statistics().growths, 0, "the programs are those of the first tables");
    }

    fn apply(&mut self, case: &Case, writes: &[Write]) {
        self.kernel.apply(writes).unwrap();
        let is_image = self.kernel.memory().unwrap() == *self.image().memory();
        assert!(is_image, "{}: the tables are those of the image", case.id);
    }

    /// Where things are pinned.
    pub fn bpffs(&self) -> &PathBuf {
        &self.bpffs
    }

    /// Makes every client a new one, so that rows of Services with session affinity meet all of their endpoints.
    pub fn forget_clients(&self) {
        let (_, flows, _) = folder::current(&self.bpffs).unwrap();
        let map = Map::LruHashMap(MapData::from_pin(flows.join("AFFINITIES")).unwrap());
        let mut affinities: HashMap<_, AffinityKey, Affinity> = HashMap::try_from(map).unwrap();
        let keys: Vec<AffinityKey> = affinities.keys().map(Result::unwrap).collect();
        keys.iter().for_each(|key| affinities.remove(key).unwrap());
    }

    fn image(&self) -> &Image {
        self.pipeline.as_ref().unwrap().image()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = unmount(&self.bpffs, UnmountFlags::DETACH);
    }
}
