//! `fairlead explain`: what would happen to a packet, and why, from the function that the kernel runs.
//!
//! In: tables (of manifests here; of a running agent, read from its pinned maps) and packets. Out: for each packet a line of
//! JSON or a paragraph. Never here: packets of known connections, which follow their connection.

mod answer;
mod packet;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use lb_common::{
    affinity::{Affinity, AffinityKey, ticks_of_nanoseconds},
    layout::{Device, device_flags},
    memory::Memory,
};

pub use self::{
    answer::{Answer, Verdict, explain},
    packet::Packet,
};
use super::run::read_config;
use crate::{
    config::flags::Flags,
    image::{Image, service_name},
    model::{address::parse_ip, object::Protocol},
    pipeline::Pipeline,
    plan::node::LocalDetector,
    source::manifests,
};

/// What `--help` ends with.
const EXAMPLES: &str = "\
Examples:
  fairlead explain tcp 10.244.1.7:40000 10.96.0.10:53
  fairlead explain --manifests ./cluster --hostname-override node-1 udp 10.244.1.7 10.96.0.10:53
  echo '{\"from\":\"10.0.0.2\",\"to\":\"172.30.0.41\",\"port\":80,\"protocol\":\"TCP\"}' \\
    | fairlead explain --manifests ./cluster --hostname-override node-1 --packets - --output json";

/// Say what would happen to a packet that starts a connection, and why
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ExplainArgs {
    /// The packet: tcp, udp or sctp
    #[arg(value_name = "PROTOCOL", requires = "to", conflicts_with = "packets", required_unless_present = "packets", value_parser = packet::protocol_of)]
    pub protocol: Option<Protocol>,
    /// Where it comes from; the port is of no importance
    #[arg(value_name = "FROM[:PORT]", requires = "to", value_parser = packet::source)]
    pub from: Option<IpAddr>,
    /// Where it is sent to
    #[arg(value_name = "TO:PORT", value_parser = packet::destination)]
    pub to: Option<(IpAddr, u16)>,
    /// The interface by which the packet enters the node
    #[arg(long, value_name = "NAME", conflicts_with = "packets")]
    pub from_interface: Option<String>,
    /// Packets, one JSON object a line: {"from":"10.0.0.2","to":"172.30.0.41","port":80,"protocol":"TCP","from_interface":"eth0"}; - is the standard input
    #[arg(long, value_name = "FILE|-")]
    pub packets: Option<PathBuf>,
    #[command(flatten)]
    pub folder: super::pins::Folder,
    /// Ask what a folder of manifests says, instead of the running agent
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// kube-proxy's configuration file
    #[arg(long, value_name = "FILE", requires = "manifests")]
    pub config: Option<PathBuf>,
    /// The name of the node whose view is taken; the machine's name where nothing is said
    #[arg(long, value_name = "NAME", requires = "manifests")]
    pub hostname_override: Option<String>,
    /// An address on the node's interfaces; those of the Node object where none is given
    #[arg(long = "local-address", value_name = "IP", requires = "manifests")]
    pub local_addresses: Vec<IpAddr>,
    /// How answers are written
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// How answers are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A short paragraph.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Tables with the names that people have for what is in them.
pub trait Named {
    /// What decisions read.
    fn tables(&self) -> &Memory;
    /// The ifindex of an interface.
    fn interface(&self, name: &str) -> Option<u32>;

    /// What is remembered of a client, and the programs' clock in [`lb_common::affinity::ticks`].
    fn remembered(&self, _: &AffinityKey) -> Option<(Affinity, u32)> {
        None
    }

    /// `namespace/name:port/PROTO` of a Service port's id.
    fn service(&self, id: u32) -> Option<String> {
        self.tables().services.get(&id).and_then(service_name).map(ToOwned::to_owned)
    }
}

/// Answers every packet that the arguments name, from these tables.
///
/// # Errors
///
/// A packet can't be read, or an answer can't be written.
pub fn answer_all<N: Named>(args: &ExplainArgs, named: &N) -> anyhow::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for_each_packet(args, |packet| {
        let answer = explain(packet, named)?;
        match args.output {
            Output::Json => {
                serde_json::to_writer(&mut out, &answer)?;
                writeln!(out)?;
            }
            Output::Text => writeln!(out, "{}", answer.paragraph(packet))?,
        }
        Ok(())
    })?;
    Ok(out.flush()?)
}

/// Answers from a folder of manifests: without a kernel, without privileges.
///
/// # Errors
///
/// The folder, the configuration or a packet can't be read. What in them can't be used is said on the standard error, and
/// the rest is answered.
pub fn run_manifests(args: &ExplainArgs, dir: &Path) -> anyhow::Result<()> {
    answer_all(args, &Manifests::read(args, dir)?)
}

/// Answers from the pinned maps of an agent, running or not.
///
/// # Errors
///
/// Nothing is pinned, or a packet can't be read.
pub fn run_pinned(args: &ExplainArgs) -> anyhow::Result<()> {
    let pinned = args.folder.open()?;
    let mut affinities = BTreeMap::new();
    pinned.affinities(|key, affinity| _ = affinities.insert(key, affinity))?;
    answer_all(args, &Pins { memory: pinned.memory()?, affinities })
}

/// What an agent has written to the kernel.
struct Pins {
    memory: Memory,
    affinities: BTreeMap<AffinityKey, Affinity>,
}

impl Named for Pins {
    fn tables(&self) -> &Memory {
        &self.memory
    }

    fn interface(&self, name: &str) -> Option<u32> {
        std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?.trim().parse().ok()
    }

    fn remembered(&self, key: &AffinityKey) -> Option<(Affinity, u32)> {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let nanoseconds = now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned();
        Some((*self.affinities.get(key)?, ticks_of_nanoseconds(nanoseconds)))
    }
}

/// What the agent would write to the kernel for a folder of manifests.
struct Manifests {
    memory: Memory,
    detector: LocalDetector,
}

/// Two interfaces stand for all: those by which local sources enter, and the others.
const LOCAL_INTERFACE: u32 = 1;
const OTHER_INTERFACE: u32 = 2;

impl Manifests {
    fn read(args: &ExplainArgs, dir: &Path) -> anyhow::Result<Self> {
        let flags = Flags { hostname_override: args.hostname_override.clone(), ..Flags::default() };
        let (config, warnings) = read_config(args.config.as_deref(), &flags)?;
        warnings.iter().for_each(|warning| eprintln!("{warning}"));
        let mut options = config.node_options();
        if args.config.is_none() {
            // Without kube-proxy's configuration there are no defaults of it to keep.
            options.node_port_addresses = vec!["primary".to_owned()];
        }
        let name = match config.node_name() {
            Some(name) => name,
            None => std::fs::read_to_string("/proc/sys/kernel/hostname").context("--hostname-override is missing")?,
        };
        let detector = options.detector.clone();
        let mut pipeline = Pipeline::new(&name, options, Image::default());
        let update = manifests::read_all(dir)?;
        update.problems.iter().for_each(|problem| eprintln!("{problem}"));
        update.changes.into_iter().for_each(|change| _ = pipeline.take(change));
        pipeline.set_interfaces(match &args.local_addresses[..] {
            [] => node_status_addresses(&pipeline),
            addresses => addresses.to_vec(),
        });
        let local = Device { flags: device_flags::LOCAL_SOURCES, ..Device::default() };
        pipeline.image_mut().set_devices(&[(LOCAL_INTERFACE, local), (OTHER_INTERFACE, Device::default())].into());
        pipeline.compile(0);
        pipeline.problems().iter().for_each(|problem| eprintln!("{problem}"));
        Ok(Self { memory: pipeline.into_image().into_memory(), detector })
    }
}

impl Named for Manifests {
    fn tables(&self) -> &Memory {
        &self.memory
    }

    fn interface(&self, name: &str) -> Option<u32> {
        Some(if self.detector.takes_interface(name) { LOCAL_INTERFACE } else { OTHER_INTERFACE })
    }
}

fn node_status_addresses(pipeline: &Pipeline) -> Vec<IpAddr> {
    let addresses = pipeline.model().node().into_iter().flat_map(|node| &node.status.addresses);
    addresses.filter_map(|address| parse_ip(&address.address)).collect()
}

fn for_each_packet(args: &ExplainArgs, mut visit: impl FnMut(&Packet) -> anyhow::Result<()>) -> anyhow::Result<()> {
    if let (Some(protocol), Some(from), Some((to, port))) = (args.protocol, args.from, args.to) {
        return visit(&Packet { from, to, port, protocol, from_interface: args.from_interface.clone() });
    }
    let Some(path) = &args.packets else { bail!("no packet is given; see `fairlead explain --help` for examples") };
    let lines: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(BufReader::new(File::open(path).with_context(|| format!("{} can't be read", path.display()))?))
    };
    for (number, line) in (1..).zip(lines.lines()) {
        let line = line.with_context(|| format!("{} can't be read", path.display()))?;
        if line.trim().is_empty() {
            continue;
        }
        Packet::from_json(&line)
            .and_then(|packet| visit(&packet))
            .with_context(|| format!("{}, line {number}", path.display()))?;
    }
    Ok(())
}
