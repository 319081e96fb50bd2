//! Counters of Service ports, in the kernel's per-CPU array: zero when an id is given to another Service port, and as many as
//! there are ids.
//!
//! In: [`Write`]s that are about to be done, the tables. Out: zeros. The programs count; only they know to what.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use lb_common::count::ServiceCounters;

use super::{
    maps::Table,
    sys::{bytes_of, value_of},
    tables::Store,
};
use crate::image::Write;

/// Ids that are not to be given out with what was counted before.
#[derive(Debug, Default)]
pub struct Counters {
    used: BTreeSet<u32>,
}

impl Counters {
    /// Whatever an earlier agent left may be of Services that are gone.
    pub fn adopt(store: &Store) -> Result<Self> {
        Ok(Self { used: read(store)?.into_keys().collect() })
    }

    /// Sets to zero what Service ports of these ids will count by, before they are written. Ids that rest in between may have
    /// been counted by connections that outlived their Service.
    pub fn begin(&mut self, store: &Store, came: impl Iterator<Item = u32>) -> Result<()> {
        for id in came {
            if self.used.contains(&id) {
                if id < store.room(Table::ServiceCounters) {
                    let map = store.map(Table::ServiceCounters)?;
                    let zeros = vec![0; map.stride()];
                    map.update(bytes_of(&[id]), &zeros).context("cannot write to map SERVICE_COUNTERS")?;
                }
                self.used.remove(&id);
            }
        }
        Ok(())
    }

    /// Service ports of these ids are gone.
    pub fn end(&mut self, gone: impl Iterator<Item = u32>) {
        self.used.extend(gone);
    }
}

/// Ids of Service ports that these writes bring.
pub fn came(writes: &[Write]) -> impl Iterator<Item = u32> {
    writes.iter().filter_map(|write| if let Write::Service(id, _) = write { Some(*id) } else { None })
}

/// Ids of Service ports that these writes take away.
pub fn gone(writes: &[Write]) -> impl Iterator<Item = u32> {
    writes.iter().filter_map(|write| if let Write::RemoveService(id) = write { Some(*id) } else { None })
}

/// The counters that are not zero, summed over the CPUs.
pub fn read(store: &Store) -> Result<BTreeMap<u32, ServiceCounters>> {
    let mut all = BTreeMap::new();
    let size = size_of::<ServiceCounters>();
    store
        .map(Table::ServiceCounters)?
        .read(|id, values| {
            let sum = values.chunks_exact(size).map(value_of).fold(ServiceCounters::default(), ServiceCounters::plus);
            if sum != ServiceCounters::default() {
                all.insert(value_of(id), sum);
            }
        })
        .context("cannot read map SERVICE_COUNTERS")?;
    Ok(all)
}

/// Takes over what was counted into a larger map that no program uses yet. What the old one counts from here on until the last
/// program is replaced is lost.
pub fn copy(from: &Store, to: &Store) -> Result<()> {
    let to = to.map(Table::ServiceCounters)?;
    let mut failed = Ok(());
    from.map(Table::ServiceCounters)?
        .read(|id, values| {
            if failed.is_ok() && values.iter().any(|byte| *byte != 0) {
                failed = to.update(id, values);
            }
        })
        .context("cannot read map SERVICE_COUNTERS")?;
    failed.context("cannot write to map SERVICE_COUNTERS")
}
