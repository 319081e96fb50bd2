//! The writes that lead from one state of the tables to another.
//!
//! In: the tables as they are and as they should be. Out: the writes in the order of a step's: first everything new, then what
//! switches packets over, then what nobody asks for any more.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::{
    layout::FrontendKey,
    memory::{BitSet, Dense, Memory},
};

use super::Write;

/// The writes that make the old tables the new ones. They are made as they are asked for.
pub fn difference<'a>(old: &'a Memory, new: &'a Memory) -> impl Iterator<Item = Write> + 'a {
    let (there, gone) = (
        changed_ids(&old.endpoints, &new.endpoints).filter(|(_, endpoint)| endpoint.flags != 0),
        changed_ids(&old.endpoints, &new.endpoints).filter(|(_, endpoint)| endpoint.flags == 0),
    );
    let node = missing(&old.local_cidrs, &new.local_cidrs)
        .map(Write::LocalCidr)
        .chain(changed(&old.node_addresses, &new.node_addresses).map(|(addr, flags)| Write::NodeAddress(addr, flags)))
        .chain(missing(&old.service_cidrs, &new.service_cidrs).map(Write::ServiceCidr))
        .chain((old.settings != new.settings).then_some(Write::Settings(new.settings)))
        .chain(missing(&new.local_cidrs, &old.local_cidrs).map(Write::RemoveLocalCidr))
        .chain(surplus(&old.node_addresses, &new.node_addresses).map(Write::RemoveNodeAddress))
        .chain(missing(&new.service_cidrs, &old.service_cidrs).map(Write::RemoveServiceCidr));
    let services = there
        .map(|(id, endpoint)| Write::Endpoint(id, endpoint))
        .chain(slots(old, new))
        .chain(changed_ids(&old.services, &new.services).map(|(id, name)| Write::Service(id, Box::new(name))))
        .chain(missing(&old.source_ranges, &new.source_ranges).map(Write::SourceRange))
        .chain(unset(&old.endpoint_bits, &new.endpoint_bits).map(Write::EndpointBit))
        .chain(unset(&old.frontend_bits, &new.frontend_bits).map(Write::FrontendBit))
        .chain(frontends(old, new, false))
        .chain(frontends(old, new, true));
    let devices = changed(&old.devices, &new.devices)
        .map(|(ifindex, device)| Write::Device(ifindex, device))
        .chain(surplus(&old.devices, &new.devices).map(Write::RemoveDevice));
    let removed = removed_frontends(old, new, true)
        .chain(removed_frontends(old, new, false))
        .chain(missing(&new.source_ranges, &old.source_ranges).map(Write::RemoveSourceRange))
        .chain(gone.map(|(id, endpoint)| Write::Endpoint(id, endpoint)))
        .chain(old.services.keys().filter(|id| !new.services.contains_key(id)).map(Write::RemoveService))
        .chain(unset(&new.endpoint_bits, &old.endpoint_bits).map(Write::ClearEndpointBit))
        .chain(unset(&new.frontend_bits, &old.frontend_bits).map(Write::ClearFrontendBit));
    node.chain(services).chain(removed).chain(devices)
}

/// Frontends of Services, or those that refuse every other port of an address: while a Service comes or goes, no packet to it is
/// refused.
fn frontends<'a>(old: &'a Memory, new: &'a Memory, any_port: bool) -> impl Iterator<Item = Write> + 'a {
    changed(&old.frontends, &new.frontends)
        .filter(move |(key, _)| (*key == FrontendKey::any_port(key.addr)) == any_port)
        .map(|(key, frontend)| Write::Frontend(key, frontend))
}

fn removed_frontends<'a>(old: &'a Memory, new: &'a Memory, any_port: bool) -> impl Iterator<Item = Write> + 'a {
    surplus(&old.frontends, &new.frontends)
        .filter(move |key| (*key == FrontendKey::any_port(key.addr)) == any_port)
        .map(Write::RemoveFrontend)
}

/// Slots that hold something else, neighbours together.
fn slots<'a>(old: &'a Memory, new: &'a Memory) -> impl Iterator<Item = Write> + 'a {
    let mut changed = changed_ids(&old.slots, &new.slots).peekable();
    std::iter::from_fn(move || {
        let (first, id) = changed.next()?;
        let mut ids = vec![id];
        while let Some((_, id)) = changed.next_if(|(slot, _)| slot - first == ids.len() as u32) {
            ids.push(id);
        }
        Some(Write::Slots(first, ids))
    })
}

/// Entries that are new, or other than before.
fn changed<'a, K: Ord + Copy, V: PartialEq + Copy>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (K, V)> + 'a {
    new.iter().filter(|(key, value)| old.get(key) != Some(value)).map(|(key, value)| (*key, *value))
}

/// The same of tables by id.
fn changed_ids<'a, V: PartialEq + Copy>(old: &'a Dense<V>, new: &'a Dense<V>) -> impl Iterator<Item = (u32, V)> + 'a {
    new.iter().filter(|(id, value)| old.get(id) != Some(value)).map(|(id, value)| (id, *value))
}

/// Bits that one array lacks of another.
fn unset<'a>(of: &'a BitSet, wanted: &'a BitSet) -> impl Iterator<Item = u32> + 'a {
    wanted.iter().filter(|bit| !of.contains(bit))
}

/// Keys that are there no more.
fn surplus<'a, K: Ord + Copy, V>(old: &'a BTreeMap<K, V>, new: &'a BTreeMap<K, V>) -> impl Iterator<Item = K> + 'a {
    old.keys().filter(|key| !new.contains_key(key)).copied()
}

/// What a set lacks of another.
fn missing<'a, T: Ord + Copy>(of: &'a BTreeSet<T>, wanted: &'a BTreeSet<T>) -> impl Iterator<Item = T> + 'a {
    wanted.difference(of).copied()
}
