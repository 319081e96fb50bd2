//! `fairlead endpoints`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use clap::Args;
use comfy_table::Table;
use lb_common::{layout::endpoint_flags, memory::Memory};
use serde::Serialize;

use super::{
    pins::{Folder, Selection},
    table::{self, ServicePort},
};

/// List the endpoints of Services
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:\n  fairlead endpoints\n  fairlead endpoints -n default web --output json")]
pub struct EndpointsArgs {
    #[command(flatten)]
    folder: Folder,
    #[command(flatten)]
    selection: Selection,
}

#[derive(Debug, Serialize)]
struct Row {
    namespace: String,
    name: String,
    port: String,
    protocol: String,
    endpoint: String,
    local: bool,
    /// `chosen`: new connections come here. `kept`: only those that it has already.
    state: &'static str,
}

/// Prints the list.
pub fn run(args: &EndpointsArgs) -> Result<()> {
    print!("{}", list(&args.folder.open()?.memory()?, &args.selection)?);
    Ok(())
}

/// The list of what is in the tables.
///
/// # Errors
///
/// It can't be written as JSON.
pub fn list(memory: &Memory, selection: &Selection) -> Result<String> {
    let mut rows: Vec<Row> = rows(memory).filter(|row| selection.wants(&row.namespace, &row.name)).collect();
    rows.sort_by(|a, b| {
        (&a.namespace, &a.name, &a.port, &a.protocol).cmp(&(&b.namespace, &b.name, &b.port, &b.protocol))
    });
    table::list(&rows, selection.output, lines)
}

fn rows(memory: &Memory) -> impl Iterator<Item = Row> {
    let chosen = chosen(memory);
    memory.endpoints.iter().filter(|(_, endpoint)| endpoint.flags & endpoint_flags::SERVING != 0).filter_map(
        move |(id, endpoint)| {
            let ServicePort { namespace, name, port, protocol } =
                ServicePort::of(memory.services.get(&endpoint.service)?)?;
            Some(Row {
                namespace,
                name,
                port,
                protocol,
                endpoint: table::socket(&endpoint.addr, endpoint.port),
                local: endpoint.flags & endpoint_flags::LOCAL != 0,
                state: if chosen.contains(&id) { "chosen" } else { "kept" },
            })
        },
    )
}

/// Ids in slots that some frontend chooses from. Slots are walked through, and not ranges: damaged ones have any length.
fn chosen(memory: &Memory) -> BTreeSet<u32> {
    let ranges = memory.frontends.values().flat_map(|frontend| [frontend.internal, frontend.external]);
    let mut ends: BTreeMap<u32, u32> = BTreeMap::new();
    for range in ranges.filter(|range| range.len != 0) {
        let end = ends.entry(range.offset).or_default();
        *end = range.offset.saturating_add(range.len).max(*end);
    }
    let mut ends = ends.into_iter().peekable();
    let mut until = 0;
    let mut chosen = BTreeSet::new();
    for (slot, id) in memory.slots.iter() {
        while let Some((_, end)) = ends.next_if(|(offset, _)| *offset <= slot) {
            until = end.max(until);
        }
        if slot < until {
            chosen.insert(*id);
        }
    }
    chosen
}

fn lines(rows: &[Row]) -> Table {
    let mut list = table::new(&["namespace", "name", "port", "protocol", "endpoint", "where", "new connections"]);
    for row in rows {
        list.add_row([
            row.namespace.as_str(),
            &row.name,
            if row.port.is_empty() { "-" } else { &row.port },
            &row.protocol,
            &row.endpoint,
            if row.local { "this node" } else { "elsewhere" },
            if row.state == "chosen" { "yes" } else { "no" },
        ]);
    }
    list
}

#[cfg(test)]
mod tests {
    use lb_common::layout::{Frontend, FrontendKey, Range};

    use super::*;

    #[test]
    fn endpoints_in_ranges_are_chosen_however_long_a_damaged_one_says_it_is() {
        for (ranges, want) in [
            (&[(0, 2), (4, 1)][..], &[10, 11, 14][..]),
            (&[(3, 2), (0, 4), (3, 1)], &[10, 11, 12, 13, 14]),
            (&[(0, 0), (9, 0)], &[]),
            (&[(3, u32::MAX)], &[13, 14, 15, 99]),
            (&[(u32::MAX, u32::MAX), (6, 1000)], &[]),
        ] {
            let mut memory = Memory::default();
            memory.slots.extend([(0, 10), (1, 11), (2, 12), (3, 13), (4, 14), (5, 15), (u32::MAX - 1, 99)]);
            for (number, (offset, len)) in (0..).zip(ranges) {
                let key = FrontendKey::any_port(lb_common::addr::Addr::from_v4_word(number));
                let external = Range { offset: *offset, len: *len };
                memory.frontends.insert(key, Frontend { external, ..Frontend::default() });
            }
            assert_eq!(chosen(&memory).into_iter().collect::<Vec<_>>(), want, "{ranges:?}");
        }
    }
}
