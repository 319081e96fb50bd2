//! Writing the tables, and reading them back.
//!
//! In: [`Write`]s in order, pinned maps. Out: as few bpf(2) calls as the order allows; a [`Memory`]. A table that is full is
//! reported, not grown, here.

use std::{borrow::Borrow, cell::Cell, collections::BTreeMap, io, os::fd::BorrowedFd, path::Path};

use anyhow::{Context as _, Result};
use lb_common::{
    addr::Addr,
    layout::{Device, Endpoint, Frontend, FrontendKey, NodeAddress, PrefixKey, ServiceName},
    memory::{Dense, Memory},
};

use super::{
    maps::{Capacity, Table, open_table},
    pinned::{self, Fill},
    sys::{self, Map, bytes_of, map_type, value_of},
};
use crate::image::Write;

/// What writing has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// bpf(2) calls that changed or read tables.
    pub calls: u64,
    /// Entries set or removed.
    pub entries: u64,
    /// Bytes of their keys and values.
    pub bytes: u64,
    /// How often tables grew.
    pub growths: u64,
}

/// The tables of one generation.
#[derive(Debug)]
pub struct Store {
    maps: BTreeMap<Table, Map>,
    /// The words of the two bit arrays that are not 0, so that setting a bit needs no look-up.
    words: BTreeMap<(Table, u32), u64>,
    statistics: Cell<Statistics>,
}

/// Why writing stopped.
#[derive(Debug)]
pub enum Stopped {
    /// This table has no room; writes from this index on have not been done in full.
    Full(Table, usize),
    /// The kernel refused.
    Failed(anyhow::Error),
}

/// So many bytes of keys and values are enough for one call: the agent's memory should not double while it writes a first list.
const MOST: usize = 512 * 1024;

/// Neighbouring changes of one kind to one table.
struct Run {
    table: Table,
    /// Index of the first [`Write`].
    first: usize,
    removes: bool,
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl Run {
    const fn is_full(&self) -> bool {
        self.keys.len() + self.values.len() >= MOST
    }
}

fn put<K: aya::Pod, V: aya::Pod>(run: &mut Run, key: &K, value: &V) {
    remove(run, key);
    run.values.extend_from_slice(bytes_of(std::slice::from_ref(value)));
}

fn remove<K: aya::Pod>(run: &mut Run, key: &K) {
    run.keys.extend_from_slice(bytes_of(std::slice::from_ref(key)));
}

impl Store {
    /// Opens a generation.
    pub fn open(generation: &Path, statistics: Statistics) -> Result<Self> {
        let mut maps = BTreeMap::new();
        for table in Table::ALL {
            let map = open_table(generation, table)?
                .with_context(|| format!("map {} is missing in {}", table.name(), generation.display()))?;
            maps.insert(table, map);
        }
        let mut store = Self { maps, words: BTreeMap::new(), statistics: Cell::new(statistics) };
        for table in [Table::FrontendBits, Table::EndpointBits] {
            let mut words = BTreeMap::new();
            store.each(table, |key: u32, word: u64| {
                if word != 0 {
                    words.insert((table, key), word);
                }
            })?;
            store.words.append(&mut words);
        }
        Ok(store)
    }

    /// The map of a table.
    pub(super) fn map(&self, table: Table) -> Result<&Map> {
        self.maps.get(&table).with_context(|| format!("map {} is not open", table.name()))
    }

    /// A descriptor of a table's map.
    pub fn fd(&self, table: Table) -> Result<BorrowedFd<'_>> {
        Ok(self.map(table)?.fd())
    }

    /// How many entries a table has room for.
    pub fn room(&self, table: Table) -> u32 {
        self.maps.get(&table).map_or(0, |map| map.shape().max_entries)
    }

    /// How full each table is. Arrays are taken as full: they do not tell what was never written.
    pub fn fill(&self) -> Result<Vec<Fill>> {
        let fill = |(table, map): (&Table, &Map)| {
            let shape = map.shape();
            let used = match shape.map_type {
                map_type::ARRAY | map_type::PERCPU_ARRAY => u64::from(shape.max_entries),
                _ => pinned::count(map)?,
            };
            Ok(Fill { name: table.name(), id: shape.id, used, room: shape.max_entries, evicted: None })
        };
        self.maps.iter().map(fill).collect()
    }

    /// What writing has cost.
    pub fn statistics(&self) -> Statistics {
        self.statistics.get()
    }

    fn count(&self, calls: u64, entries: usize, bytes: usize) {
        let before = self.statistics.get();
        self.statistics.set(Statistics {
            calls: before.calls + calls,
            entries: before.entries + entries as u64,
            bytes: before.bytes + bytes as u64,
            ..before
        });
    }

    /// Applies writes in order.
    pub fn apply(&mut self, writes: impl IntoIterator<Item: Borrow<Write>>) -> Result<(), Stopped> {
        let mut run: Option<Run> = None;
        for (index, write) in writes.into_iter().enumerate() {
            let write = write.borrow();
            let (table, removes) = place(write);
            if let Some(done) = run.take_if(|run| (run.table, run.removes) != (table, removes) || run.is_full()) {
                self.flush(&done)?;
            }
            let run =
                run.get_or_insert_with(|| Run { table, first: index, removes, keys: Vec::new(), values: Vec::new() });
            self.add(run, write);
        }
        run.map_or(Ok(()), |run| self.flush(&run))
    }

    fn set_bit(&mut self, run: &mut Run, bit: u32, on: bool) {
        let (word, mask) = (bit / 64, 1_u64 << (bit % 64));
        let shadow = self.words.entry((run.table, word)).or_default();
        *shadow = if on { *shadow | mask } else { *shadow & !mask };
        if run.keys.ends_with(bytes_of(&[word])) {
            run.keys.truncate(run.keys.len() - size_of_val(&word));
            run.values.truncate(run.values.len() - size_of_val(shadow));
        }
        put(run, &word, shadow);
    }

    fn add(&mut self, run: &mut Run, write: &Write) {
        match write {
            Write::Endpoint(id, endpoint) => put(run, id, endpoint),
            Write::Slots(first, ids) => {
                for (slot, id) in (*first..).zip(ids) {
                    put(run, &slot, id);
                }
            }
            Write::Service(id, name) => put(run, id, &**name),
            Write::SourceRange(prefix) | Write::LocalCidr(prefix) | Write::ServiceCidr(prefix) => {
                put(run, prefix, &1_u32);
            }
            Write::FrontendBit(bit) | Write::EndpointBit(bit) => self.set_bit(run, *bit, true),
            Write::ClearFrontendBit(bit) | Write::ClearEndpointBit(bit) => self.set_bit(run, *bit, false),
            Write::Frontend(key, frontend) => put(run, key, frontend),
            Write::NodeAddress(addr, flags) => put(run, addr, flags),
            Write::Device(ifindex, device) => put(run, ifindex, device),
            Write::Settings(settings) => put(run, &0_u32, settings),
            Write::RemoveService(id) => remove(run, id),
            Write::RemoveSourceRange(prefix) | Write::RemoveLocalCidr(prefix) | Write::RemoveServiceCidr(prefix) => {
                remove(run, prefix);
            }
            Write::RemoveFrontend(key) => remove(run, key),
            Write::RemoveNodeAddress(addr) => remove(run, addr),
            Write::RemoveDevice(ifindex) => remove(run, ifindex),
        }
    }

    fn flush(&self, run: &Run) -> Result<(), Stopped> {
        let map = self.map(run.table).map_err(Stopped::Failed)?;
        let shape = map.shape();
        let (key_size, value_size) = (shape.key_size as usize, shape.value_size as usize);
        let total = run.keys.len() / key_size;
        let mut done = 0;
        let mut batches = total > 1;
        while done < total {
            let keys = run.keys.get(done * key_size..).unwrap_or_default();
            let values = run.values.get(done * value_size..).unwrap_or_default();
            let (count, result) = match (batches, run.removes) {
                (true, false) => map.update_batch(keys, values),
                (true, true) => map.delete_batch(keys),
                (false, removes) => {
                    let key = keys.get(..key_size).unwrap_or_default();
                    let result = if removes {
                        map.delete(key)
                    } else {
                        map.update(key, values.get(..value_size).unwrap_or_default())
                    };
                    (usize::from(result.is_ok()), result)
                }
            };
            let size = key_size + if run.removes { 0 } else { value_size };
            self.count(1, count, count * size);
            done += count;
            match result {
                Ok(()) => {}
                Err(error) if batches && sys::is_unsupported(&error) => batches = false,
                // What is to be removed is not there: so be it.
                Err(error) if run.removes && error.kind() == io::ErrorKind::NotFound => done += 1,
                Err(error) if matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)) => {
                    return Err(Stopped::Full(run.table, run.first));
                }
                Err(error) => {
                    let verb = if run.removes { "remove from" } else { "write to" };
                    return Err(Stopped::Failed(
                        anyhow::Error::new(error).context(format!("cannot {verb} map {}", run.table.name())),
                    ));
                }
            }
        }
        Ok(())
    }

    fn each<K: aya::Pod, V: aya::Pod>(&self, table: Table, mut each: impl FnMut(K, V)) -> Result<()> {
        let calls = self
            .map(table)?
            .read(|key, value| each(value_of(key), value_of(value)))
            .with_context(|| format!("cannot read map {}", table.name()))?;
        self.count(calls, 0, 0);
        Ok(())
    }

    /// Names of Service ports by id.
    pub fn services(&self) -> Result<Dense<ServiceName>> {
        let mut services = Dense::default();
        self.each(Table::Services, |id: u32, name: ServiceName| services.extend([(id, name)]))?;
        Ok(services)
    }

    /// Everything that is in the tables. While another process writes, each entry is whole, but two entries may be of
    /// different times.
    ///
    /// Arrays do not tell what was never written: slots and endpoints of zeros are left out, and no endpoint has id 0.
    pub fn read(&self) -> Result<Memory> {
        let mut memory = Memory::default();
        for table in Table::ALL.into_iter().filter(|table| *table != Table::ServiceCounters) {
            let calls = self
                .map(table)?
                .read(|key, value| take_in(&mut memory, table, key, value))
                .with_context(|| format!("cannot read map {}", table.name()))?;
            self.count(calls, 0, 0);
        }
        Ok(memory)
    }
}

/// Takes an entry of a map into memory, whatever it says.
///
/// # Panics
///
/// If key or value are not as long as the table's.
pub fn take_in(memory: &mut Memory, table: Table, key: &[u8], value: &[u8]) {
    match table {
        Table::Frontends => memory.frontends.extend([(value_of::<FrontendKey>(key), value_of::<Frontend>(value))]),
        Table::Slots => memory.slots.extend(Some((value_of(key), value_of(value))).filter(|(_, id)| *id != 0)),
        Table::Endpoints => {
            let endpoint: Endpoint = value_of(value);
            memory.endpoints.extend((endpoint != Endpoint::default()).then(|| (value_of(key), endpoint)));
        }
        Table::Services => memory.services.extend([(value_of(key), value_of::<ServiceName>(value))]),
        Table::SourceRanges => memory.source_ranges.extend([whole(value_of(key))]),
        Table::LocalCidrs => memory.local_cidrs.extend([whole(value_of(key))]),
        Table::ServiceCidrs => memory.service_cidrs.extend([whole(value_of(key))]),
        Table::NodeAddresses => memory.node_addresses.extend([(value_of::<Addr>(key), value_of::<NodeAddress>(value))]),
        Table::Devices => memory.devices.extend([(value_of::<u32>(key), value_of::<Device>(value))]),
        Table::Settings => memory.settings = value_of(value),
        Table::FrontendBits => memory.frontend_bits.extend(set_bits(value_of(key), value_of(value))),
        Table::EndpointBits => memory.endpoint_bits.extend(set_bits(value_of(key), value_of(value))),
        Table::ServiceCounters => {}
    }
}

/// A prefix as the agent writes it. To the kernel's tries bits behind its end are of no account: with them and without is one
/// entry, and whoever took them for two would remove what he wrote.
fn whole(prefix: PrefixKey) -> PrefixKey {
    let mask = |word: u32| {
        let bits = prefix.prefix_len.saturating_sub(32 * word).min(32);
        u32::MAX.checked_shl(32 - bits).unwrap_or(0).to_be()
    };
    let [a, b, c, d] = prefix.addr.words;
    PrefixKey {
        service: prefix.service & mask(0),
        addr: Addr { words: [a & mask(1), b & mask(2), c & mask(3), d & mask(4)] },
        ..prefix
    }
}

fn set_bits(word: u32, bits: u64) -> impl Iterator<Item = u32> {
    (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word * 64 + bit)
}

/// The table that a write changes, and whether it removes.
const fn place(write: &Write) -> (Table, bool) {
    match write {
        Write::Endpoint(..) => (Table::Endpoints, false),
        Write::Slots(..) => (Table::Slots, false),
        Write::Service(..) => (Table::Services, false),
        Write::RemoveService(_) => (Table::Services, true),
        Write::SourceRange(_) => (Table::SourceRanges, false),
        Write::RemoveSourceRange(_) => (Table::SourceRanges, true),
        Write::FrontendBit(_) | Write::ClearFrontendBit(_) => (Table::FrontendBits, false),
        Write::EndpointBit(_) | Write::ClearEndpointBit(_) => (Table::EndpointBits, false),
        Write::Frontend(..) => (Table::Frontends, false),
        Write::RemoveFrontend(_) => (Table::Frontends, true),
        Write::LocalCidr(_) => (Table::LocalCidrs, false),
        Write::RemoveLocalCidr(_) => (Table::LocalCidrs, true),
        Write::ServiceCidr(_) => (Table::ServiceCidrs, false),
        Write::RemoveServiceCidr(_) => (Table::ServiceCidrs, true),
        Write::NodeAddress(..) => (Table::NodeAddresses, false),
        Write::RemoveNodeAddress(_) => (Table::NodeAddresses, true),
        Write::Device(..) => (Table::Devices, false),
        Write::RemoveDevice(_) => (Table::Devices, true),
        Write::Settings(_) => (Table::Settings, false),
    }
}

/// Does to memory what the writes add, and nothing of what they remove: the most that the tables must hold meanwhile.
pub fn add_to(memory: &mut Memory, writes: &[Write]) {
    writes.iter().filter(|write| !place(write).1).for_each(|write| write.apply(memory));
}

/// What empty tables need to take these writes.
pub fn capacity(writes: &[Write]) -> Capacity {
    let mut capacity = Capacity::default();
    for write in writes {
        let (table, removes) = place(write);
        let entries = if let Write::Endpoint(id, _) = write {
            id.saturating_add(1)
        } else if let Write::Slots(first, ids) = write {
            first.saturating_add(u32::try_from(ids.len()).unwrap_or(u32::MAX))
        } else if removes {
            0
        } else {
            capacity.needs(table).saturating_add(1)
        };
        capacity.require(table, entries);
        if let Write::Service(id, _) = write {
            capacity.require(Table::ServiceCounters, id.saturating_add(1));
        }
    }
    capacity
}

/// The writes that fill one empty table with what memory holds.
pub fn fill(memory: &Memory, table: Table) -> Vec<Write> {
    match table {
        Table::Frontends => memory.frontends.iter().map(|(key, value)| Write::Frontend(*key, *value)).collect(),
        Table::Slots => memory.slots.iter().map(|(slot, id)| Write::Slots(slot, vec![*id])).collect(),
        Table::Endpoints => memory.endpoints.iter().map(|(id, value)| Write::Endpoint(id, *value)).collect(),
        Table::Services => memory.services.iter().map(|(id, name)| Write::Service(id, Box::new(*name))).collect(),
        Table::SourceRanges => memory.source_ranges.iter().map(|prefix| Write::SourceRange(*prefix)).collect(),
        Table::LocalCidrs => memory.local_cidrs.iter().map(|prefix| Write::LocalCidr(*prefix)).collect(),
        Table::ServiceCidrs => memory.service_cidrs.iter().map(|prefix| Write::ServiceCidr(*prefix)).collect(),
        Table::NodeAddresses => {
            memory.node_addresses.iter().map(|(addr, flags)| Write::NodeAddress(*addr, *flags)).collect()
        }
        Table::Devices => memory.devices.iter().map(|(ifindex, value)| Write::Device(*ifindex, *value)).collect(),
        Table::Settings => vec![Write::Settings(memory.settings)],
        Table::FrontendBits => memory.frontend_bits.iter().map(Write::FrontendBit).collect(),
        Table::EndpointBits => memory.endpoint_bits.iter().map(Write::EndpointBit).collect(),
        // What is in them is no memory of the agent's: `counters` copies it.
        Table::ServiceCounters => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_behind_the_end_of_a_prefix_are_of_no_account() {
        for (prefix_len, service, words, want) in [
            (160, 7, [1, 2, 3, 4], (7, [1, 2, 3, 4])),
            (144, 7, [1, 2, 3, u32::MAX], (7, [1, 2, 3, u32::from_ne_bytes([255, 255, 0, 0])])),
            (32, 7, [1, 2, 3, 4], (7, [0; 4])),
            (0, 7, [1, 2, 3, 4], (0, [0; 4])),
            (u32::MAX, 7, [1, 2, 3, 4], (7, [1, 2, 3, 4])),
        ] {
            let prefix = PrefixKey { prefix_len, service, addr: Addr { words } };
            let mut memory = Memory::default();
            take_in(&mut memory, Table::LocalCidrs, bytes_of(&[prefix]), bytes_of(&[1_u32]));
            let want = PrefixKey { prefix_len, service: want.0, addr: Addr { words: want.1 } };
            assert_eq!(memory.local_cidrs, [want].into(), "{prefix_len}");
        }
    }
}
