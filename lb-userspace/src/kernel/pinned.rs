//! Reading what is pinned, beside a running agent.
//!
//! In: the folder of pins. Out: the tables' content, flows, counters, what is attached. Nothing is written, locked or attached.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use lb_common::{
    affinity::{Affinity, AffinityKey},
    count::ServiceCounters,
    flow::{Flow, FlowKey},
    layout::ServiceName,
    memory::{Dense, Memory},
};

use super::{
    counters, folder,
    links::{self, Attached},
    maps::{FLOW_MAPS, Table, open_flow_map},
    sys::{Map, value_of},
    tables::{Statistics, Store},
};

/// A reader of what is pinned. [`Pinned::memory`] answers what decisions need ([`lb_common::tables::Tables`]).
#[derive(Debug)]
pub struct Pinned {
    store: Store,
    flows: PathBuf,
    links: PathBuf,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Its name.
    pub name: &'static str,
    /// Its id.
    pub id: u32,
    /// Entries in it.
    pub used: u64,
    /// Entries it has room for.
    pub room: u32,
    /// Entries that had to make room for others since it was made, where the map does that and it is known.
    pub evicted: Option<u64>,
}

impl Pinned {
    /// Opens the newest tables in a folder.
    pub fn open(root: &Path) -> Result<Self> {
        let (generation, flows, links) = folder::current(root)?;
        Ok(Self { store: Store::open(&generation, Statistics::default())?, flows, links })
    }

    /// What is in the tables now.
    pub fn memory(&self) -> Result<Memory> {
        self.store.read()
    }

    fn flow_map(&self, name: &str) -> Result<Map> {
        open_flow_map(&self.flows, name)?.with_context(|| format!("map {name} is missing in {}", self.flows.display()))
    }

    /// Every flow entry: first those that were answered, then the others.
    pub fn flows(&self, each: impl FnMut(FlowKey, Flow)) -> Result<()> {
        read_flows(&self.flows, each)
    }

    /// Every client that stays with an endpoint.
    pub fn affinities(&self, mut each: impl FnMut(AffinityKey, Affinity)) -> Result<()> {
        self.flow_map("AFFINITIES")?
            .read(|key, affinity| each(value_of(key), value_of(affinity)))
            .context("cannot read map AFFINITIES")?;
        Ok(())
    }

    /// The counters, by [`lb_common::reason::Reason`], summed over the CPUs.
    pub fn counters(&self) -> Result<Vec<u64>> {
        self.sums("COUNTERS")
    }

    /// Names of Service ports by id.
    pub fn services(&self) -> Result<Dense<ServiceName>> {
        self.store.services()
    }

    /// What was counted of each Service port, by its id; those of which nothing was are left out.
    pub fn service_counters(&self) -> Result<BTreeMap<u32, ServiceCounters>> {
        counters::read(&self.store)
    }

    /// The elements of an array, summed over the CPUs.
    fn sums(&self, name: &str) -> Result<Vec<u64>> {
        let mut sums = Vec::new();
        let sum = |values: &[u8]| values.chunks_exact(8).fold(0, |sum: u64, value| sum.wrapping_add(value_of(value)));
        let map = self.flow_map(name)?;
        map.read(|_, values| sums.push(sum(values))).with_context(|| format!("cannot read map {name}"))?;
        Ok(sums)
    }

    /// What is attached.
    pub fn attached(&self) -> Result<Vec<Attached>> {
        links::status(&self.links)
    }

    /// How full each map is.
    pub fn fill(&self) -> Result<Vec<Fill>> {
        let mut fill = self.store.fill()?;
        let made = self.sums("ENTRIES")?;
        for name in FLOW_MAPS {
            let made = match name {
                "FLOWS" => made.first(),
                "NEW_FLOWS" => made.get(1),
                _ => None,
            };
            // A version before may have had fewer.
            let Some(map) = open_flow_map(&self.flows, name)? else { continue };
            let used =
                if matches!(name, "FLOWS" | "NEW_FLOWS" | "FRAGMENTS" | "AFFINITIES") { count(&map)? } else { 0 };
            // Programs make and remove entries meanwhile: a difference below 0 is none.
            let evicted = made.map(|made| made.wrapping_sub(used).cast_signed().max(0).cast_unsigned());
            fill.push(Fill { name, id: map.shape().id, used, room: map.shape().max_entries, evicted });
        }
        Ok(fill)
    }

    /// How many entries a table has room for.
    pub fn room(&self, table: Table) -> u32 {
        self.store.room(table)
    }
}

/// Every flow entry of a folder of flow maps: first those that were answered, then the others.
pub fn read_flows(dir: &Path, mut each: impl FnMut(FlowKey, Flow)) -> Result<()> {
    for name in ["FLOWS", "NEW_FLOWS"] {
        open_flow_map(dir, name)?
            .with_context(|| format!("map {name} is missing in {}", dir.display()))?
            .read(|key, flow| each(value_of(key), value_of(flow)))
            .with_context(|| format!("cannot read map {name}"))?;
    }
    Ok(())
}

/// Entries of a map.
pub fn count(map: &Map) -> Result<u64> {
    let mut count = 0;
    map.read(|_, _| count += 1)?;
    Ok(count)
}
