//! `fairlead endpoints`.

use std::collections::BTreeSet;

use anyhow::Result;
use clap::Args;
use lb_common::{layout::endpoint_flags, memory::Memory};
use serde::Serialize;

use super::{
    pins::{Folder, Output, Selection},
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
    let memory = args.folder.open()?.memory()?;
    let mut rows: Vec<Row> = rows(&memory).filter(|row| args.selection.wants(&row.namespace, &row.name)).collect();
    rows.sort_by(|a, b| {
        (&a.namespace, &a.name, &a.port, &a.protocol).cmp(&(&b.namespace, &b.name, &b.port, &b.protocol))
    });
    match args.selection.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&rows)?),
        Output::Table => print(&rows),
    }
    Ok(())
}

fn rows(memory: &Memory) -> impl Iterator<Item = Row> {
    let chosen: BTreeSet<u32> = memory
        .frontends
        .values()
        .flat_map(|frontend| [frontend.internal, frontend.external])
        .flat_map(|range| range.offset..range.offset.saturating_add(range.len))
        .filter_map(|slot| memory.slots.get(&slot).copied())
        .collect();
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

fn print(rows: &[Row]) {
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
    table::print(&list);
}
