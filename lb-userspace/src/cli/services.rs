//! `fairlead services`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use clap::Args;
use comfy_table::Table;
use lb_common::{
    layout::{endpoint_flags, frontend_flags},
    memory::Memory,
};
use serde::Serialize;

use super::{
    pins::{Folder, Selection},
    table::{self, ServicePort},
};
use crate::agent::{
    door::{Question, ask},
    report::ServiceReport,
};

/// List the Services that are served, by port
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Examples:\n  fairlead services\n  fairlead services -n kube-system kube-dns\n  fairlead services --output json"
)]
pub struct ServicesArgs {
    #[command(flatten)]
    folder: Folder,
    #[command(flatten)]
    selection: Selection,
}

/// A Service port, or a Service without ports.
#[derive(Debug, Default, Serialize)]
struct Row {
    namespace: String,
    name: String,
    #[serde(rename = "type")]
    kind: Option<String>,
    port: String,
    protocol: String,
    frontends: Vec<String>,
    endpoints: usize,
    note: Option<String>,
}

/// Prints the list.
pub fn run(args: &ServicesArgs) -> Result<()> {
    let memory = args.folder.open()?.memory()?;
    let known: Vec<ServiceReport> = ask(&args.folder.bpffs, Question::Services).unwrap_or_default();
    print!("{}", list(&memory, known, &args.selection)?);
    Ok(())
}

/// The list of what is in the tables, with what only the agent knows.
///
/// # Errors
///
/// It can't be written as JSON.
pub fn list(memory: &Memory, known: Vec<ServiceReport>, selection: &Selection) -> Result<String> {
    let wanted = |row: &Row| selection.wants(&row.namespace, &row.name);
    let rows: Vec<Row> = rows(memory, known).into_iter().filter(wanted).collect();
    table::list(&rows, selection.output, lines)
}

/// Rows of what is in the tables, with what only the agent knows; Services that it knows and the tables don't come too.
fn rows(memory: &Memory, known: Vec<ServiceReport>) -> Vec<Row> {
    let mut rows: BTreeMap<u32, Row> = memory
        .services
        .iter()
        .filter_map(|(id, name)| {
            let ServicePort { namespace, name, port, protocol } = ServicePort::of(name)?;
            Some((id, Row { namespace, name, port, protocol, ..Row::default() }))
        })
        .collect();
    for (key, frontend) in &memory.frontends {
        if frontend.flags & frontend_flags::ANY_PORT == 0
            && let Some(row) = rows.get_mut(&frontend.service)
        {
            row.frontends.push(table::frontend(key));
        }
    }
    for endpoint in memory.endpoints.values().filter(|endpoint| endpoint.flags & endpoint_flags::SERVING != 0) {
        if let Some(row) = rows.get_mut(&endpoint.service) {
            row.endpoints += 1;
        }
    }
    let mut rows: Vec<Row> = rows.into_values().collect();
    let served: BTreeSet<(String, String)> = rows.iter().map(|row| (row.namespace.clone(), row.name.clone())).collect();
    let mut kinds = BTreeMap::new();
    for ServiceReport { namespace, name, kind, external_name } in known {
        if !served.contains(&(namespace.clone(), name.clone())) {
            let note = external_name.map_or_else(|| "no frontends".to_owned(), |target| format!("stands for {target}"));
            let (namespace, name, kind) = (namespace.clone(), name.clone(), Some(kind));
            rows.push(Row { namespace, name, kind, note: Some(note), ..Row::default() });
        } else {
            kinds.insert((namespace, name), kind);
        }
    }
    for row in &mut rows {
        if row.kind.is_none() {
            row.kind = kinds.get(&(row.namespace.clone(), row.name.clone())).cloned();
        }
        if row.note.is_none() && row.endpoints == 0 {
            row.note = Some("refused: no endpoints".to_owned());
        }
    }
    rows.sort_by(|a, b| {
        (&a.namespace, &a.name, &a.port, &a.protocol).cmp(&(&b.namespace, &b.name, &b.port, &b.protocol))
    });
    rows
}

fn lines(rows: &[Row]) -> Table {
    let mut list = table::new(&["namespace", "name", "type", "port", "protocol", "frontends", "endpoints", ""]);
    for row in rows {
        let text = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        list.add_row([
            row.namespace.clone(),
            row.name.clone(),
            row.kind.clone().unwrap_or_else(|| "-".to_owned()),
            text(&row.port),
            text(&row.protocol),
            text(&row.frontends.join("\n")),
            row.endpoints.to_string(),
            row.note.clone().unwrap_or_default(),
        ]);
    }
    list
}
