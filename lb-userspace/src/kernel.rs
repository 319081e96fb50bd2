//! The kernel's side of the agent: maps, programs, links, devices.
//!
//! In: [`Write`]s from `image`, devices from [`devices`]. Out: the content of the maps, what is attached. A start adopts what is
//! pinned and clears nothing; programs are attached when the caller says so. What a write means is not known here.

mod capabilities;
pub mod cleanup;
mod counters;
pub mod devices;
pub mod drain;
pub mod folder;
pub mod kube_proxy;
pub mod links;
#[cfg(feature = "program-log")]
mod log;
pub mod maps;
mod netlink;
pub mod object;
mod older;
mod options;
pub mod pinned;
pub mod preflight;
mod reserved;
pub mod sockets;
mod sys;
pub mod sysctls;
pub mod tables;
mod types;

use std::{collections::BTreeSet, fs, os::fd::AsFd as _};

use anyhow::{Context as _, Result, bail};
use lb_common::{
    layout::bit_index,
    memory::{Dense, Memory},
};
use tracing::{info, warn};

use self::{
    counters::Counters,
    devices::Snapshot,
    folder::{Cgroup, Folder},
    links::{Attached, Links, Port},
    maps::{Capacity, Table},
    object::{Constants, Programs},
    tables::{Statistics, Stopped, Store},
};
use crate::{
    image::{Write, difference},
    plan::Expected,
};

pub use self::{
    older::{older_connections_until, programs_now},
    options::{Attach, Mark, Options, SocketLb},
    sys::{bytes_of, end_with_the_reader, release_memory, value_of},
};

/// One generation of tables, and programs that use it.
#[derive(Debug)]
struct Tables {
    generation: u64,
    store: Store,
    counters: Counters,
    programs: Programs,
}

impl Tables {
    /// Makes the first generation.
    fn create(folder: &Folder, constants: &Constants, options: &Options, capacity: &Capacity) -> Result<Self> {
        let dir = folder.unfinished(1);
        make_dir(&dir)?;
        let programs = Programs::load(&dir, &folder.flows(), capacity, constants, options)?;
        finish(folder, 1)?;
        let store = Store::open(&folder.generation(1), Statistics::default())?;
        Ok(Self { generation: 1, store, counters: Counters::default(), programs })
    }

    /// Adopts what is pinned.
    fn adopt(folder: &Folder, constants: &Constants, options: &Options, generation: u64) -> Result<Self> {
        let dir = folder.generation(generation);
        for table in Table::ALL {
            // Says what is wrong before the loader would take the map unseen.
            maps::open_table(&dir, table)?;
        }
        let programs = Programs::load(&dir, &folder.flows(), &Capacity::default(), constants, options)?;
        let store = Store::open(&dir, Statistics::default())?;
        let counters = Counters::adopt(&store)?;
        Ok(Self { generation, store, counters, programs })
    }
}

/// The kernel as the agent writes to it.
#[derive(Debug)]
pub struct Kernel {
    options: Options,
    folder: Folder,
    constants: Constants,
    /// None until something is written or attached: what is written first says how large they must be.
    tables: Option<Tables>,
    links: Links,
    cgroup: Option<Cgroup>,
    /// What programs are attached to, as this process did it.
    ports: Vec<Port>,
    /// How many of them there should be.
    wanted_ports: usize,
    /// Whether this process attached or detached the socket programs.
    sockets: bool,
}

/// What an agent without the right to write below `/proc/sys` finds done: [`Kernel::reserve_ports`], while no agent runs.
///
/// # Errors
///
/// When the ports can't be reserved, or an agent has the folder.
pub fn reserve_ports(options: &Options) -> Result<()> {
    reserve(&Folder::open(&options.bpffs)?, options)
}

fn reserve(folder: &Folder, options: &Options) -> Result<()> {
    reserved::reserve(&folder.reserved(), options.masquerade_first, options.masquerade_ports).context(
        "the node's processes may take the ports that masquerading takes (--masquerade-ports); put them into \
         net.ipv4.ip_local_reserved_ports by other means",
    )
}

impl Kernel {
    /// Adopts what is pinned. Nothing is cleared, nothing is attached that was not, and where nothing is pinned, nothing is
    /// made yet.
    pub fn open(options: Options) -> Result<Self> {
        let folder = Folder::open(&options.bpffs)?;
        for name in folder::names(&folder.maps())? {
            if name.parse::<u64>().is_err() {
                object::remove_generation(&folder.maps().join(name))?;
            }
        }
        for name in maps::FLOW_MAPS {
            let Some(map) = maps::open_flow_map(&folder.flows(), name)? else { continue };
            let room = map.shape().max_entries;
            let (size, wanted) = match name {
                "FLOWS" => (room / 2, options.flows),
                "AFFINITIES" => (room, options.affinities),
                _ => continue,
            };
            if size != wanted {
                warn!(
                    map = name,
                    size,
                    wanted,
                    "the table keeps the size that it was made with; `fairlead cleanup` and a new start change it"
                );
            }
        }
        let constants = Constants::new(&options)?;
        let generations = folder.generations()?;
        let tables = match generations.last() {
            Some(&generation) => Some(Tables::adopt(&folder, &constants, &options, generation)?),
            None => None,
        };
        let links = Links::new(folder.links(), options.attach);
        let mut kernel = Self {
            options,
            folder,
            constants,
            tables,
            links,
            cgroup: None,
            ports: Vec::new(),
            wanted_ports: 0,
            sockets: false,
        };
        if generations.len() > 1 {
            info!("an agent ended while tables grew; the next attachment completes it");
        }
        kernel.open_cgroup()?;
        // An agent that counted nothing may have left fewer counters than there are Services.
        let services = kernel.tables.as_ref().map_or_else(|| Ok(Dense::default()), |tables| tables.store.services())?;
        kernel.make_counters(services.last_key().map_or(0, |id| id.saturating_add(1)), Capacity::of)?;
        Ok(kernel)
    }

    fn open_cgroup(&mut self) -> Result<()> {
        if self.options.socket_lb != SocketLb::Off {
            self.cgroup = Some(folder::cgroup(self.options.cgroup.as_deref())?);
        }
        Ok(())
    }

    /// Makes tables for what is expected if there are none. The programs are verified meanwhile, which takes longer than
    /// planning what comes into the tables.
    pub fn prepare(&mut self, expected: &Expected) -> Result<()> {
        self.tables_for(|| Capacity::expected(expected)).map(drop)
    }

    /// Waits until the programs are loaded.
    ///
    /// # Errors
    ///
    /// When the kernel refuses them: trying again would not help.
    pub fn verified(&mut self) -> Result<()> {
        self.tables.as_mut().map_or(Ok(()), |tables| tables.programs.verified())
    }

    /// What is in the tables.
    pub fn memory(&self) -> Result<Memory> {
        self.tables.as_ref().map_or_else(|| Ok(Memory::default()), |tables| tables.store.read())
    }

    /// The bits of frontends and endpoints that flows name.
    pub fn named_by_flows(&self) -> Result<(BTreeSet<u32>, BTreeSet<u32>)> {
        let (mut frontends, mut endpoints) = (BTreeSet::new(), BTreeSet::new());
        pinned::read_flows(&self.folder.flows(), |_, flow| {
            frontends.insert(bit_index(&flow.frontend, flow.frontend_port));
            frontends.insert(bit_index(&flow.frontend.unspecified(), flow.frontend_port));
            endpoints.insert(bit_index(&flow.endpoint, flow.endpoint_port));
        })?;
        Ok((frontends, endpoints))
    }

    /// What writing has cost so far.
    pub fn statistics(&self) -> Statistics {
        self.tables.as_ref().map(|tables| tables.store.statistics()).unwrap_or_default()
    }

    /// How many entries a table has room for.
    pub fn room(&self, table: Table) -> u32 {
        self.tables.as_ref().map_or(0, |tables| tables.store.room(table))
    }

    /// Does the writes in order. Tables are made if there are none, and grow where they must.
    pub fn apply(&mut self, writes: &[Write]) -> Result<()> {
        let mut rest = writes;
        let after = |memory: &Memory, rest: &[Write]| {
            let mut after = memory.clone();
            tables::add_to(&mut after, rest);
            Capacity::of(&after)
        };
        self.tables_for(|| tables::capacity(rest))?;
        let needed = counters::came(writes).max().map_or(0, |id| id.saturating_add(1));
        self.make_counters(needed, |memory| after(memory, writes))?;
        loop {
            let Tables { store, counters, .. } = self.tables_for(|| tables::capacity(rest))?;
            counters.begin(store, counters::came(rest))?;
            match store.apply(rest) {
                Ok(()) => {
                    counters.end(counters::gone(writes));
                    return Ok(());
                }
                Err(Stopped::Failed(error)) => return Err(error),
                Err(Stopped::Full(table, index)) => {
                    rest = rest.get(index..).unwrap_or_default();
                    self.grow(table, |memory| after(memory, rest))?;
                }
            }
        }
    }

    /// Makes room for so many counters, if anything is counted.
    fn make_counters(&mut self, needed: u32, capacity: impl FnOnce(&Memory) -> Capacity) -> Result<()> {
        let counts = self.options.count_services && self.tables.is_some();
        if counts && needed > self.room(Table::ServiceCounters) {
            self.grow(Table::ServiceCounters, capacity)?;
        }
        Ok(())
    }

    /// Makes the tables new ones, where they are the old ones. Takes no more memory than they do.
    pub fn fill(&mut self, old: &Memory, new: &Memory) -> Result<()> {
        let both = |memory: &Memory| {
            let mut capacity = Capacity::of(new);
            let there = Capacity::of(memory);
            Table::ALL.into_iter().for_each(|table| capacity.require(table, there.needs(table)));
            capacity
        };
        self.tables_for(|| Capacity::of(new))?;
        self.make_counters(Capacity::of(new).needs(Table::ServiceCounters), both)?;
        loop {
            let Tables { store, counters, .. } = self.tables_for(|| Capacity::of(new))?;
            let came = new.services.iter().filter(|(id, name)| old.services.get(id) != Some(name));
            counters.begin(store, came.map(|(id, _)| id))?;
            match store.apply(difference(old, new)) {
                Ok(()) => {
                    counters.end(old.services.keys().filter(|id| !new.services.contains_key(id)));
                    return Ok(());
                }
                Err(Stopped::Failed(error)) => return Err(error),
                // What has been written is written again.
                Err(Stopped::Full(table, _)) => self.grow(table, both)?,
            }
        }
    }

    /// The tables; made with this capacity if there are none.
    fn tables_for(&mut self, capacity: impl FnOnce() -> Capacity) -> Result<&mut Tables> {
        match self.tables {
            Some(ref mut tables) => Ok(tables),
            None => {
                let tables = Tables::create(&self.folder, &self.constants, &self.options, &capacity())?;
                Ok(self.tables.insert(tables))
            }
        }
    }

    /// Makes a larger generation of the tables, complete before the first program uses it.
    fn grow(&mut self, full: Table, capacity: impl FnOnce(&Memory) -> Capacity) -> Result<()> {
        let Self { folder, constants, options, tables, links, cgroup, ports, sockets, wanted_ports: _ } = self;
        let tables = tables.as_mut().context("there are no tables")?;
        let old = &tables.store;
        let memory = old.read()?;
        let capacity = capacity(&memory);
        let larger: Vec<Table> = Table::ALL
            .into_iter()
            .filter(|table| *table == full || capacity.needs(*table) > old.room(*table))
            .filter(|table| options.count_services || *table != Table::ServiceCounters)
            .collect();
        if capacity.entries(full) <= old.room(full) {
            bail!("map {} is full at {} entries and can't grow", full.name(), old.room(full));
        }
        let next = tables.generation + 1;
        let dir = folder.unfinished(next);
        if dir.exists() {
            // An attempt that failed half-way.
            object::remove_generation(&dir)?;
        }
        make_dir(&dir)?;
        for table in Table::ALL {
            if !larger.contains(&table) {
                let path = dir.join(table.name());
                sys::pin(old.fd(table)?, &path).with_context(|| format!("cannot pin {}", path.display()))?;
            }
        }
        let mut programs = Programs::load(&dir, &folder.flows(), &capacity, constants, options)?;
        let statistics = old.statistics();
        let mut store = Store::open(&dir, Statistics { growths: statistics.growths + 1, ..statistics })?;
        for table in &larger {
            match store.apply(tables::fill(&memory, *table)) {
                Ok(()) => {}
                Err(Stopped::Failed(error)) => return Err(error),
                Err(Stopped::Full(table, _)) => bail!("the larger map {} is full", table.name()),
            }
        }
        programs.verified()?;
        if larger.contains(&Table::ServiceCounters) {
            counters::copy(old, &store)?;
        }
        finish(folder, next)?;
        ports.retain(|port| match links.attach(&mut programs, port) {
            Ok(()) => true,
            Err(error) => {
                warn!(
                    device = port.name,
                    error = format!("{error:#}"),
                    "it keeps its programs until it is attached to again"
                );
                false
            }
        });
        if let Some(cgroup) = cgroup.as_ref()
            && *sockets
            && let Err(error) = links.attach_sockets(&mut programs, cgroup.fd.as_fd())
        {
            warn!(error = format!("{error:#}"), "sockets keep their programs until they are attached to again");
            *sockets = false;
        }
        info!(table = full.name(), generation = next, room = store.room(full), "tables have grown");
        let counters = std::mem::take(&mut tables.counters);
        *tables = Tables { generation: next, store, counters, programs };
        // Links that this process has not attached yet still run programs of the old maps.
        self.remove_old_generations()?;
        Ok(())
    }

    /// Whether something is pinned that this process has not attached, so that it runs older programs.
    fn is_adopting(&self) -> Result<bool> {
        let attached = |ifindex: &u32| self.ports.iter().any(|port| port.ifindex == *ifindex);
        Ok(!self.links.devices()?.iter().all(attached) || (self.links.has_sockets()? && !self.sockets))
    }

    /// Removes the generations that no program uses any more.
    fn remove_old_generations(&self) -> Result<()> {
        let Some(current) = self.tables.as_ref().map(|tables| tables.generation) else { return Ok(()) };
        if self.is_adopting()? {
            return Ok(());
        }
        for generation in self.folder.generations()? {
            if generation < current {
                object::remove_generation(&self.folder.generation(generation))?;
            }
        }
        Ok(())
    }

    /// Makes the devices with programs exactly these: attaches to new ones, replaces the programs of those that an earlier
    /// agent attached, detaches from the others. One device that fails does not keep the others waiting.
    ///
    /// A new TCX link costs a grace period of RCU, ten milliseconds or more, in which this call waits; the program runs from its
    /// beginning. Replacing a program costs nothing of the kind.
    pub fn attach_devices(&mut self, ports: &[Port]) -> Result<()> {
        let mut failed = Vec::new();
        for ifindex in self.links.devices()? {
            if ports.iter().all(|port| port.ifindex != ifindex)
                && let Err(error) = self.links.detach(ifindex)
            {
                failed.push(error);
            }
        }
        self.wanted_ports = ports.len();
        self.ports.retain(|port| ports.contains(port));
        for port in ports {
            if !self.ports.contains(port) {
                self.tables_for(Capacity::default)?;
                let Some(tables) = &mut self.tables else { continue };
                match self.links.attach(&mut tables.programs, port) {
                    Ok(()) => self.ports.push(port.clone()),
                    Err(error) => failed.push(error),
                }
            }
        }
        self.remove_old_generations()?;
        match failed.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Attaches the socket programs, or detaches them where they are off.
    pub fn attach_sockets(&mut self) -> Result<()> {
        self.tables_for(Capacity::default)?;
        match (&self.cgroup, &mut self.tables) {
            (Some(cgroup), Some(tables)) => self
                .links
                .attach_sockets(&mut tables.programs, cgroup.fd.as_fd())
                .with_context(|| format!("cgroup {}", cgroup.path.display()))?,
            (None, _) | (_, None) => self.links.detach_sockets()?,
        }
        self.sockets = true;
        self.remove_old_generations()
    }

    /// Whether writes may have left connected sockets without anybody to speak to. `memory`: the tables with them.
    #[must_use]
    pub fn concerns_sockets(&self, writes: &[Write], memory: &Memory) -> bool {
        sockets::concerns(writes, self.options.terminate_connections, memory)
    }

    /// Ends the connected sockets that these tables leave without anybody to speak to: UDP ones, and TCP ones where
    /// connections end with their endpoint. Answers how many.
    pub fn end_sockets_astray(&mut self, memory: &Memory) -> Result<usize> {
        match &mut self.tables {
            Some(tables) if self.sockets && self.options.socket_lb != SocketLb::Off => {
                let (pods, tcp) = (self.options.socket_lb == SocketLb::All, self.options.terminate_connections);
                sockets::end_astray(&mut tables.programs, pods, tcp, memory)
            }
            Some(_) | None => Ok(0),
        }
    }

    /// Whether programs run everywhere that the last calls asked for. Growing tables may lose an attachment.
    pub fn is_attached(&self) -> bool {
        self.sockets && self.ports.len() == self.wanted_ports
    }

    /// Whether nothing of ours is attached anywhere: what connections there are, they are not ours.
    pub fn is_detached(&self) -> Result<bool> {
        Ok(self.links.devices()?.is_empty() && !self.links.has_sockets()?)
    }

    /// Keeps the ports that masquerading takes from the host's own choice.
    pub fn reserve_ports(&self) -> Result<()> {
        reserve(&self.folder, &self.options)
    }

    /// What keeps clients from being served, though everything is as the operator said.
    pub fn problems(&self, snapshot: &Snapshot) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(cgroup) = self.cgroup.as_ref().filter(|cgroup| cgroup.is_partial) {
            problems.push(format!(
                "sockets: {} is the root of a cgroup namespace, so only processes in it are served; mount the host's cgroup \
                 v2 and name it by --cgroup",
                cgroup.path.display()
            ));
        }
        if self.folder.is_private() {
            problems.push(format!(
                "tables: no bpffs of the host is mounted at {} (--bpffs), so the data plane ends with this container; mount \
                 the host's /sys/fs/bpf",
                self.folder.root().display()
            ));
        }
        if self.options.socket_lb != SocketLb::All {
            problems.extend(snapshot.shared_wires());
        }
        problems
    }

    /// What is attached.
    pub fn status(&self) -> Result<Vec<Attached>> {
        self.links.status()
    }

    /// How programs are attached to devices.
    pub fn mechanism(&self) -> links::Mechanism {
        self.links.mechanism()
    }
}

fn make_dir(dir: &std::path::Path) -> Result<()> {
    fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))
}

/// Gives a generation its number: it is complete.
fn finish(folder: &Folder, generation: u64) -> Result<()> {
    let (from, to) = (folder.unfinished(generation), folder.generation(generation));
    fs::rename(&from, &to).with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
}

#[cfg(test)]
mod tests;
