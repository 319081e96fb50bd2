//! The compiled object: its maps made, its programs loaded.
//!
//! In: the compiled object, how much there is to store, a generation's folder. Out: pinned maps of the right shape, loaded
//! programs. Nothing is attached here.

use std::{
    fs::{self, File},
    io::ErrorKind,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{
        Mutex,
        mpsc::{self, Receiver},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfLoader,
    programs::{CgroupSockAddr, Iter, Program, ProgramError, SchedClassifier},
};
use tracing::debug;

use super::{
    Options, SocketLb, capabilities,
    maps::{Capacity, FLOW_MAPS, Table, flow_shape},
    sys::{self, Map},
    types,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb"));

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
            let types = types::of_iterator(kind)?;
            persevere(|| program.load(kind, &types)).map_err(|error| explain(name, error))?;
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
    loaders: Loaders,
}

impl Constants {
    /// What the kernel and the operator say.
    pub fn new(options: &Options) -> Result<Self> {
        capabilities::check()?;
        Ok(Self {
            netns_cookie: sys::netns_cookie()
                .context("cannot read the network namespace's cookie (SO_NETNS_COOKIE, Linux 5.14)")?,
            checksum_flag: sys::ipv6_checksum_flag().context("cannot load a BPF program")?,
            socket_lb_all: u32::from(options.socket_lb == SocketLb::All),
            loaders: Loaders::prepare(),
        })
    }
}

/// Loaders for the two sets, made while the first list comes: each reads the kernel's types (aya 0.14), which takes a moment
/// and twenty megabytes that nothing of ours needs, least of all when the list is there.
#[derive(Debug)]
struct Loaders(Mutex<Receiver<EbpfLoader<'static>>>);

impl Loaders {
    fn prepare() -> Self {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            for _set in [true, false] {
                if sender.send(loader()).is_err() {
                    break;
                }
            }
        });
        Self(Mutex::new(receiver))
    }

    fn take(&self) -> EbpfLoader<'static> {
        let prepared = self.0.lock().ok().and_then(|loaders| loaders.recv().ok());
        prepared.unwrap_or_else(loader)
    }
}

/// A loader without the kernel's types.
fn loader() -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    sys::release_memory();
    loader
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
    let mut loader: EbpfLoader<'_> = constants.loaders.take();
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
        .override_global("REPLY_MARK_MASK", &options.reply_mark.mask, true)
        .override_global("REPLY_MARK", &options.reply_mark.value, true)
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

/// Removes a generation's pins.
pub fn remove_generation(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}
