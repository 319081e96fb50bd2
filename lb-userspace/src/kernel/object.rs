//! Maps and programs: sizes, creation, loading.
//!
//! In: the compiled object, how much there is to store, a generation's folder. Out: pinned maps of the right shape, loaded
//! programs. Nothing is attached here.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::ErrorKind,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Btf, Ebpf, EbpfLoader,
    programs::{CgroupSockAddr, Iter, Program, ProgramError, SchedClassifier},
};
use lb_common::{
    addr::Addr,
    affinity::{Affinity, AffinityKey},
    count::ServiceCounters,
    flow::{Flow, FlowKey, FragmentKey, FragmentPorts},
    layout::{BIT_WORDS, Device, Endpoint, Frontend, FrontendKey, NodeAddress, PrefixKey, ServiceName, Settings},
    memory::Memory,
    reason::REASONS,
    socket::Pairs,
};
use tracing::debug;

use super::{
    Options, SocketLb,
    sys::{self, Map, MapShape, NO_PREALLOC, map_type},
};
use crate::plan::Expected;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb"));

/// A table that the agent writes and the programs read. Grows by generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Frontends.
    Frontends,
    /// Slots of ranges.
    Slots,
    /// Endpoints.
    Endpoints,
    /// Names of Service ports; for people, not for programs.
    Services,
    /// Source ranges.
    SourceRanges,
    /// What the local detector knows.
    LocalCidrs,
    /// ServiceCIDRs.
    ServiceCidrs,
    /// The node's addresses.
    NodeAddresses,
    /// Devices.
    Devices,
    /// Settings.
    Settings,
    /// Bits of frontends.
    FrontendBits,
    /// Bits of endpoints.
    EndpointBits,
    /// What the programs count of each Service port. The agent writes nothing but zeros.
    ServiceCounters,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Frontends,
        Self::Slots,
        Self::Endpoints,
        Self::Services,
        Self::SourceRanges,
        Self::LocalCidrs,
        Self::ServiceCidrs,
        Self::NodeAddresses,
        Self::Devices,
        Self::Settings,
        Self::FrontendBits,
        Self::EndpointBits,
        Self::ServiceCounters,
    ];

    /// The map's name in the object and among the pins.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Frontends => "FRONTENDS",
            Self::Slots => "SLOTS",
            Self::Endpoints => "ENDPOINTS",
            Self::Services => "SERVICES",
            Self::SourceRanges => "SOURCE_RANGES",
            Self::LocalCidrs => "LOCAL_CIDRS",
            Self::ServiceCidrs => "SERVICE_CIDRS",
            Self::NodeAddresses => "NODE_ADDRESSES",
            Self::Devices => "DEVICES",
            Self::Settings => "SETTINGS",
            Self::FrontendBits => "FRONTEND_BITS",
            Self::EndpointBits => "ENDPOINT_BITS",
            Self::ServiceCounters => "SERVICE_COUNTERS",
        }
    }

    /// The shape that its map must have, with this many entries.
    const fn shape(self, max_entries: u32) -> MapShape {
        let hash = map_type::HASH;
        let array = map_type::ARRAY;
        let trie = map_type::LPM_TRIE;
        match self {
            Self::Frontends => shape::<FrontendKey, Frontend>(hash, max_entries),
            Self::Slots => shape::<u32, u32>(array, max_entries),
            Self::Endpoints => shape::<u32, Endpoint>(array, max_entries),
            Self::Services => shape::<u32, ServiceName>(hash, max_entries),
            Self::SourceRanges | Self::LocalCidrs | Self::ServiceCidrs => shape::<PrefixKey, u32>(trie, max_entries),
            Self::NodeAddresses => shape::<Addr, NodeAddress>(hash, max_entries),
            Self::Devices => shape::<u32, Device>(hash, max_entries),
            Self::Settings => shape::<u32, Settings>(array, max_entries),
            Self::FrontendBits | Self::EndpointBits => shape::<u32, u64>(array, max_entries),
            Self::ServiceCounters => shape::<u32, ServiceCounters>(map_type::PERCPU_ARRAY, max_entries),
        }
    }

    /// The fewest entries that its map is made with.
    const fn floor(self) -> u32 {
        match self {
            Self::Frontends | Self::Endpoints | Self::Services | Self::ServiceCounters => 1024,
            Self::Slots => 4096,
            Self::SourceRanges | Self::NodeAddresses | Self::Devices => 256,
            Self::LocalCidrs | Self::ServiceCidrs => 64,
            Self::Settings => 1,
            Self::FrontendBits | Self::EndpointBits => BIT_WORDS as u32,
        }
    }
}

/// Flow state: maps that programs write, which keep their size and their content for life.
pub const FLOW_MAPS: [&str; 7] = ["FLOWS", "NEW_FLOWS", "ENTRIES", "FRAGMENTS", "AFFINITIES", "COUNTERS", "SOCKETS"];

const fn flow_shape(name: &str, flows: u32, affinities: u32) -> MapShape {
    let lru = map_type::LRU_HASH;
    match name.as_bytes() {
        b"FLOWS" => shape::<FlowKey, Flow>(lru, 2 * flows),
        b"NEW_FLOWS" => shape::<FlowKey, Flow>(lru, flows / 2),
        b"ENTRIES" => shape::<u32, u64>(map_type::PERCPU_ARRAY, 2),
        b"FRAGMENTS" => shape::<FragmentKey, FragmentPorts>(lru, 4096),
        b"AFFINITIES" => shape::<AffinityKey, Affinity>(lru, affinities),
        b"COUNTERS" => shape::<u32, u64>(map_type::PERCPU_ARRAY, REASONS as u32),
        _ => shape::<u32, Pairs>(map_type::SK_STORAGE, 0),
    }
}

const fn shape<K, V>(map_type: u32, max_entries: u32) -> MapShape {
    let flags = match map_type {
        map_type::HASH | map_type::LPM_TRIE | map_type::SK_STORAGE => NO_PREALLOC,
        _ => 0,
    };
    MapShape { map_type, id: 0, key_size: size_of::<K>() as u32, value_size: size_of::<V>() as u32, max_entries, flags }
}

/// How many connections are remembered: as kube-proxy sizes conntrack (32,768 for each CPU, at least 131,072), at most
/// 524,288.
///
/// LRU maps are allocated in full. A flow needs two entries (three if masqueraded) of 40 + 92 bytes and 64 of the kernel's
/// own, so FLOWS, with twice as many entries, takes about 400 bytes a flow, and NEW_FLOWS a quarter of that: 65 MB at
/// 131,072 flows, 262 MB at 524,288.
pub fn default_flows() -> u32 {
    let cpus = thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX));
    cpus.saturating_mul(32_768).clamp(131_072, 524_288)
}

/// How many clients are remembered, each for each Service port that it uses: 104 bytes an entry, allocated in full, 7 MB.
pub const DEFAULT_AFFINITIES: u32 = 65_536;

/// How many entries each table must have room for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capacity(BTreeMap<Table, u32>);

impl Capacity {
    /// What a list of this much is expected to need.
    pub fn expected(expected: &Expected) -> Self {
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        Self(BTreeMap::from([
            (Table::Frontends, count(expected.frontends)),
            // A range takes the next power of two.
            (Table::Slots, count(2 * expected.endpoints)),
            (Table::Endpoints, count(expected.endpoints)),
            (Table::Services, count(expected.services)),
            // Ids begin with 1.
            (Table::ServiceCounters, count(expected.services.saturating_add(1))),
            (Table::SourceRanges, count(expected.source_ranges)),
        ]))
    }

    /// What the content needs.
    pub fn of(memory: &Memory) -> Self {
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let last = |key: Option<u32>| key.map_or(0, |key| key.saturating_add(1));
        Self(BTreeMap::from([
            (Table::Frontends, count(memory.frontends.len())),
            (Table::Slots, last(memory.slots.last_key())),
            (Table::Endpoints, last(memory.endpoints.last_key())),
            (Table::Services, count(memory.services.len())),
            (Table::ServiceCounters, last(memory.services.last_key())),
            (Table::SourceRanges, count(memory.source_ranges.len())),
            (Table::LocalCidrs, count(memory.local_cidrs.len())),
            (Table::ServiceCidrs, count(memory.service_cidrs.len())),
            (Table::NodeAddresses, count(memory.node_addresses.len())),
            (Table::Devices, count(memory.devices.len())),
        ]))
    }

    /// Makes it at least this large for a table.
    pub fn require(&mut self, table: Table, entries: u32) {
        let needs = self.0.entry(table).or_default();
        *needs = entries.max(*needs);
    }

    /// Entries that a table needs.
    pub fn needs(&self, table: Table) -> u32 {
        self.0.get(&table).copied().unwrap_or(0)
    }

    /// Entries that a table's map is made with: room for twice as many, a power of two, as updates pass through more than
    /// their end needs. Counters take their memory once for each CPU, and get a quarter more.
    pub fn entries(&self, table: Table) -> u32 {
        match table {
            Table::Settings | Table::FrontendBits | Table::EndpointBits => table.floor(),
            Table::ServiceCounters => {
                let needs = self.needs(table);
                needs.saturating_add(needs / 4).max(table.floor())
            }
            Table::Frontends
            | Table::Slots
            | Table::Endpoints
            | Table::Services
            | Table::SourceRanges
            | Table::LocalCidrs
            | Table::ServiceCidrs
            | Table::NodeAddresses
            | Table::Devices => {
                let twice = self.needs(table).saturating_mul(2).min(1 << 31);
                twice.next_power_of_two().max(table.floor())
            }
        }
    }
}

/// A hook for sockets: the program's name and its attach type.
pub const SOCKET_HOOKS: [(&str, u32); 8] = [
    ("connect4", sys::attach_type::CONNECT4),
    ("connect6", sys::attach_type::CONNECT6),
    ("sendmsg4", sys::attach_type::SENDMSG4),
    ("sendmsg6", sys::attach_type::SENDMSG6),
    ("recvmsg4", sys::attach_type::RECVMSG4),
    ("recvmsg6", sys::attach_type::RECVMSG6),
    ("getpeername4", sys::attach_type::GETPEERNAME4),
    ("getpeername6", sys::attach_type::GETPEERNAME6),
];

/// Programs for devices.
const CLASSIFIERS: [&str; 2] = ["ingress", "egress"];

/// The programs, loaded against one generation of maps.
#[derive(Debug)]
pub struct Programs {
    ethernet: Ethernet,
    bare: Ebpf,
    /// Most nodes have no device without Ethernet header, and the verifier takes most of the time of a start.
    bare_is_verified: bool,
}

/// The programs for devices with Ethernet header and for sockets.
#[derive(Debug)]
enum Ethernet {
    /// The verifier is at them, on a thread of its own.
    Loading(JoinHandle<Result<Ebpf>>),
    Loaded(Ebpf),
    /// The kernel refused them, for this reason.
    Refused(String),
}

impl Programs {
    /// Waits until the programs are loaded, and says whether the kernel took them.
    pub fn verified(&mut self) -> Result<()> {
        self.ethernet().map(drop)
    }

    fn ethernet(&mut self) -> Result<&mut Ebpf> {
        let panicked = || Ethernet::Refused("loading the programs panicked".to_owned());
        if matches!(self.ethernet, Ethernet::Loading(_))
            && let Ethernet::Loading(loading) = std::mem::replace(&mut self.ethernet, panicked())
        {
            self.ethernet = match loading.join() {
                Ok(Ok(object)) => Ethernet::Loaded(object),
                Ok(Err(error)) => Ethernet::Refused(format!("{error:#}")),
                Err(_) => panicked(),
            };
        }
        match &mut self.ethernet {
            Ethernet::Loaded(object) => Ok(object),
            Ethernet::Refused(reason) => bail!("{reason}"),
            Ethernet::Loading(_) => bail!("the programs are not loaded yet"),
        }
    }

    /// A classifier for devices with or without Ethernet header.
    pub fn classifier(&mut self, name: &str, ethernet: bool) -> Result<&mut SchedClassifier> {
        if !ethernet && !self.bare_is_verified {
            verify(&mut self.bare, false)?;
            self.bare_is_verified = true;
        }
        let object = if ethernet { self.ethernet()? } else { &mut self.bare };
        let program = object.program_mut(name).with_context(|| format!("no program {name} in the object"))?;
        program.try_into().with_context(|| format!("program {name} is no classifier"))
    }

    /// A descriptor of the classifier.
    pub fn classifier_fd(&mut self, name: &str, ethernet: bool) -> Result<OwnedFd> {
        let fd = self.classifier(name, ethernet)?.fd().with_context(|| format!("program {name} is not loaded"))?;
        Ok(fd.as_fd().try_clone_to_owned()?)
    }

    /// A descriptor of a socket program.
    pub fn socket_fd(&mut self, name: &str) -> Result<OwnedFd> {
        let program = self.ethernet()?.program_mut(name).with_context(|| format!("no program {name} in the object"))?;
        let program: &mut CgroupSockAddr =
            program.try_into().with_context(|| format!("program {name} is none for sockets"))?;
        Ok(program.fd().with_context(|| format!("program {name} is not loaded"))?.as_fd().try_clone_to_owned()?)
    }

    /// What the sockets of the calling thread's network namespace were told, the TCP ones or the UDP ones: for each a cookie and
    /// its [`Pairs`]. The program is loaded when it is first asked for.
    pub fn told(&mut self, tcp: bool) -> Result<File> {
        let (name, kind) = if tcp { ("told_tcp", "tcp") } else { ("told_udp", "udp") };
        let program = self.ethernet()?.program_mut(name).with_context(|| format!("no program {name} in the object"))?;
        let program: &mut Iter = program.try_into().with_context(|| format!("program {name} is no iterator"))?;
        if program.fd().is_err() {
            let types = Btf::from_sys_fs().context("cannot read the kernel's types (CONFIG_DEBUG_INFO_BTF)")?;
            persevere(|| program.load(kind, &types)).map_err(|error| explain(name, error))?;
            // They take ten megabytes, this once.
            drop(types);
            sys::release_memory();
        }
        let link = program.attach().and_then(|id| program.take_link(id)).context("cannot make an iterator")?;
        link.into_file().context("cannot open an iterator")
    }

    /// Creates the maps that are not pinned yet, and loads the programs: those for devices with Ethernet header while the
    /// caller goes on, the others when the first device without one comes.
    pub fn load(
        generation: &Path,
        flows: &Path,
        capacity: &Capacity,
        constants: &Constants,
        options: &Options,
    ) -> Result<Self> {
        create_services(generation, capacity)?;
        let pins = Some((generation, flows));
        let mut ethernet = relocate(true, constants, pins, capacity, options)?;
        let loading = thread::spawn(move || {
            verify(&mut ethernet, true)?;
            Ok(ethernet)
        });
        let bare = relocate(false, constants, pins, capacity, options)?;
        Ok(Self { ethernet: Ethernet::Loading(loading), bare, bare_is_verified: false })
    }
}

/// What came of loading a program.
#[derive(Debug)]
pub struct Trial {
    /// The program's name.
    pub program: &'static str,
    /// Whether it is the one for devices with Ethernet header; programs for sockets are only in that set.
    pub ethernet: bool,
    /// What the verifier had to do, or why it refused.
    pub result: Result<Verified>,
}

/// What the verifier had to do.
#[derive(Clone, Copy, Debug)]
pub struct Verified {
    /// Instructions that it walked through; loops and branches count each time. Known from Linux 5.16.
    pub instructions: Option<u32>,
    /// How long loading took, in milliseconds.
    pub milliseconds: u64,
}

/// Loads every program, one after another, and lets it go. Their maps are their own: nothing is pinned or attached. One that
/// is refused does not keep the others from being tried.
pub fn try_all(constants: &Constants, options: &Options) -> Result<Vec<Trial>> {
    let mut trials = Vec::new();
    for ethernet in [true, false] {
        let mut object = relocate(ethernet, constants, None, &Capacity::default(), options)?;
        for program in names(ethernet) {
            trials.push(Trial { program, ethernet, result: load(&mut object, program) });
        }
    }
    Ok(trials)
}

/// What the programs are told once and for all.
#[derive(Debug)]
pub struct Constants {
    netns_cookie: u64,
    checksum_flag: u64,
    socket_lb_all: u32,
}

impl Constants {
    /// What the kernel and the operator say.
    pub fn new(options: &Options) -> Result<Self> {
        Ok(Self {
            netns_cookie: sys::netns_cookie()
                .context("cannot read the network namespace's cookie (SO_NETNS_COOKIE, Linux 5.14)")?,
            checksum_flag: sys::ipv6_checksum_flag()
                .context("cannot load a BPF program: the agent needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")?,
            socket_lb_all: u32::from(options.socket_lb == SocketLb::All),
        })
    }
}

/// Creates the maps that are not pinned yet in the folders of a generation and of flow state, and makes programs that name them.
/// Without folders all maps are new, and go with the programs.
fn relocate(
    ethernet: bool,
    constants: &Constants,
    pins: Option<(&Path, &Path)>,
    capacity: &Capacity,
    options: &Options,
) -> Result<Ebpf> {
    let link_header: u32 = if ethernet { 14 } else { 0 };
    let count_services = u32::from(options.count_services);
    let mut loader = EbpfLoader::new();
    for table in Table::ALL {
        if table != Table::Services {
            let counts = options.count_services || table != Table::ServiceCounters;
            loader.map_max_entries(table.name(), if counts { capacity.entries(table) } else { table.floor() });
            if let Some((generation, _)) = pins {
                loader.map_pin_path(table.name(), generation.join(table.name()));
            }
        }
    }
    for name in FLOW_MAPS {
        let entries = flow_shape(name, options.flows, options.affinities).max_entries;
        if entries > 0 {
            loader.map_max_entries(name, entries);
        }
        if let Some((_, flows)) = pins {
            loader.map_pin_path(name, flows.join(name));
        }
    }
    loader
        .override_global("LINK_HEADER", &link_header, true)
        .override_global("NETNS_COOKIE", &constants.netns_cookie, true)
        .override_global("SOCKET_LB_ALL", &constants.socket_lb_all, true)
        .override_global("IPV6_CHECKSUM_FLAG", &constants.checksum_flag, true)
        .override_global("MASQUERADE_FIRST", &options.masquerade_first, true)
        .override_global("MASQUERADE_PORTS", &options.masquerade_ports, true)
        .override_global("COUNT_SERVICES", &count_services, true);
    #[cfg(feature = "program-log")]
    loader.override_global(aya_log::LEVEL, &options.program_log, true);
    let object = loader.load(OBJECT).context("cannot load the BPF object")?;
    #[cfg(feature = "program-log")]
    let object = super::log::follow(object)?;
    Ok(object)
}

/// The programs of a set: those for sockets are in the one for devices with Ethernet header.
fn names(ethernet: bool) -> impl Iterator<Item = &'static str> {
    let sockets = SOCKET_HOOKS.iter().filter(move |_| ethernet).map(|(name, _)| *name);
    CLASSIFIERS.into_iter().chain(sockets)
}

/// Gives the programs to the kernel, the one that takes longest beside the others.
fn verify(object: &mut Ebpf, ethernet: bool) -> Result<()> {
    let wanted: Vec<&str> = names(ethernet).collect();
    if let Some(name) = wanted.iter().find(|name| object.program(name).is_none()) {
        bail!("no program {name} in the object");
    }
    let programs = object.programs_mut().filter(|(name, _)| wanted.contains(name));
    let (longest, others): (Vec<_>, Vec<_>) = programs.partition(|(name, _)| *name == "egress");
    let give = |programs: Vec<(&str, &mut Program)>| -> Result<()> {
        for (name, program) in programs {
            let Verified { instructions, milliseconds } = load_program(program, name)?;
            debug!(program = name, ethernet, verified = instructions, milliseconds, "program loaded");
        }
        Ok(())
    };
    thread::scope(|scope| {
        let beside = scope.spawn(|| give(longest));
        give(others)?;
        beside.join().map_err(|_| anyhow!("loading programs panicked"))?
    })
}

fn load(object: &mut Ebpf, name: &str) -> Result<Verified> {
    load_program(object.program_mut(name).with_context(|| format!("no program {name} in the object"))?, name)
}

fn load_program(program: &mut Program, name: &str) -> Result<Verified> {
    let start = Instant::now();
    let result = persevere(|| {
        if CLASSIFIERS.contains(&name) {
            <&mut SchedClassifier>::try_from(&mut *program).and_then(SchedClassifier::load)
        } else {
            <&mut CgroupSockAddr>::try_from(&mut *program).and_then(CgroupSockAddr::load)
        }
    });
    result.map_err(|error| explain(name, error))?;
    let milliseconds = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(Verified { instructions: program.info().ok().and_then(|info| info.verified_instruction_count()), milliseconds })
}

/// Tries again what a signal interrupted: the verifier gives up with EAGAIN while one is pending (`do_check`).
fn persevere(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    const ATTEMPTS: usize = 10;
    let mut result = load();
    for _ in 1..ATTEMPTS {
        match &result {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == ErrorKind::WouldBlock => {}
            Ok(()) | Err(_) => break,
        }
        thread::sleep(Duration::from_millis(1));
        result = load();
    }
    result
}

/// The end of the verifier's log, which names the instruction that it refused.
fn explain(name: &str, error: ProgramError) -> anyhow::Error {
    const LINES: usize = 40;
    if let ProgramError::LoadError { io_error, verifier_log } = &error {
        let log = verifier_log.to_string();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n");
        return anyhow::anyhow!(
            "the kernel refused program {name}: {io_error}; the end of the verifier's log:\n{tail}"
        );
    }
    anyhow::Error::new(error).context(format!("cannot load program {name}"))
}

fn create_services(generation: &Path, capacity: &Capacity) -> Result<()> {
    let path = generation.join(Table::Services.name());
    if path.exists() {
        return Ok(());
    }
    let shape = Table::Services.shape(capacity.entries(Table::Services));
    let map = Map::create("SERVICES", shape).context("cannot create map SERVICES")?;
    sys::pin(map.fd(), &path).with_context(|| format!("cannot pin {}", path.display()))
}

/// Opens a table of a generation, if it is there and has the shape that this program knows.
pub fn open_table(generation: &Path, table: Table) -> Result<Option<Map>> {
    open(&generation.join(table.name()), table.shape(0))
}

/// Opens a map of flow state, in the same way.
pub fn open_flow_map(flows: &Path, name: &str) -> Result<Option<Map>> {
    open(&flows.join(name), flow_shape(name, 0, 0))
}

fn open(path: &Path, wanted: MapShape) -> Result<Option<Map>> {
    let map = match Map::open(path) {
        Ok(map) => map,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot open the pinned map {}", path.display())),
    };
    let found = map.shape();
    if (MapShape { id: 0, max_entries: 0, ..found }) != (MapShape { max_entries: 0, ..wanted }) {
        bail!(
            "the pinned map {} has another shape than this version's (found type {}, {} + {} bytes, flags {:#x}; wanted \
             type {}, {} + {} bytes, flags {:#x}): run `fairlead cleanup` and start again, or give --bpffs another folder",
            path.display(),
            found.map_type,
            found.key_size,
            found.value_size,
            found.flags,
            wanted.map_type,
            wanted.key_size,
            wanted.value_size,
            wanted.flags,
        );
    }
    Ok(Some(map))
}

/// Removes a generation's pins.
pub fn remove_generation(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_have_room_for_twice_what_there_is() {
        for (needs, entries) in [(0, 1024), (512, 1024), (513, 2048), (100_000, 262_144)] {
            let capacity = Capacity(BTreeMap::from([(Table::Frontends, needs)]));
            assert_eq!(capacity.entries(Table::Frontends), entries, "{needs}");
        }
    }

    #[test]
    fn arrays_need_their_last_index() {
        let memory = Memory { slots: [(70_000, 1)].into(), ..Memory::default() };
        assert_eq!(Capacity::of(&memory).needs(Table::Slots), 70_001);
    }
}
