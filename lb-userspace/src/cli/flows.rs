//! `fairlead flows`.

use anyhow::Result;
use clap::Args;
use comfy_table::Table;
use lb_common::{
    flow::{Flow, FlowKey, Kind, flow_flags, state},
    layout::protocol,
    memory::Memory,
};
use serde::Serialize;

use super::{
    pins::{Folder, Selection},
    table::{self, ServicePort},
};

/// List the live connections through Services
///
/// Connections of the node's own processes are translated at the socket and are not here; `ss` shows them. "(straight)" is who speaks to
/// an endpoint without a Service, and got another port because a connection through one has theirs.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:\n  fairlead flows\n  fairlead flows -n default web\n  fairlead flows --output json")]
pub struct FlowsArgs {
    #[command(flatten)]
    folder: Folder,
    #[command(flatten)]
    selection: Selection,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    namespace: String,
    name: String,
    port: String,
    protocol: String,
    client: String,
    frontend: String,
    endpoint: String,
    /// The address and port that the endpoint sees, where it is not the client's.
    masqueraded: Option<String>,
    state: &'static str,
    idle_seconds: u32,
}

/// Prints the list.
pub fn run(args: &FlowsArgs) -> Result<()> {
    let pinned = args.folder.open()?;
    let memory = pinned.memory()?;
    let now = crate::kernel::programs_now();
    let mut rows = Vec::new();
    pinned.flows(|key, flow| rows.extend(row(&key, &flow, &memory, now, &args.selection)))?;
    print!("{}", table_of(rows, &args.selection)?);
    Ok(())
}

/// The list of flows, by the names that the tables have for their Services.
///
/// # Errors
///
/// It can't be written as JSON.
pub fn list(flows: &[(FlowKey, Flow)], memory: &Memory, now: u32, selection: &Selection) -> Result<String> {
    let rows = flows.iter().filter_map(|(key, flow)| row(key, flow, memory, now, selection));
    table_of(rows.collect(), selection)
}

fn table_of(mut rows: Vec<Row>, selection: &Selection) -> Result<String> {
    rows.sort_by(|a, b| (&a.namespace, &a.name, &a.client).cmp(&(&b.namespace, &b.name, &b.client)));
    table::list(&rows, selection.output, lines)
}

/// The row of a flow, if it is alive and wanted. A flow has several entries: this is that of its requests.
fn row(key: &FlowKey, flow: &Flow, memory: &Memory, now: u32, selection: &Selection) -> Option<Row> {
    if key.kind != Kind::Request as u8 || flow.is_idle(key.proto, now) {
        return None;
    }
    let is_straight = flow.flags & flow_flags::STRAIGHT != 0;
    let nameless = || ServicePort {
        namespace: "-".to_owned(),
        name: if is_straight { "(straight)" } else { "(gone)" }.to_owned(),
        port: String::new(),
        protocol: table::protocol(key.proto),
    };
    let service = memory.services.get(&flow.service).and_then(ServicePort::of).unwrap_or_else(nameless);
    selection.wants(&service.namespace, &service.name).then(|| row_of(flow, key.proto, service, now))
}

fn row_of(flow: &Flow, proto: u8, service: ServicePort, now: u32) -> Row {
    let ServicePort { namespace, name, port, protocol } = service;
    let masqueraded = if flow.node_port.be != 0 {
        Some(table::socket(&flow.node, flow.node_port))
    } else if flow.forwarded_port != flow.client_port {
        Some(table::socket(&flow.client, flow.forwarded_port))
    } else {
        None
    };
    Row {
        namespace,
        name,
        port,
        protocol,
        client: table::socket(&flow.client, flow.client_port),
        frontend: table::socket(&flow.frontend, flow.frontend_port),
        endpoint: table::socket(&flow.endpoint, flow.endpoint_port),
        masqueraded: masqueraded.or_else(|| (flow.flags & flow_flags::MASQUERADE != 0).then(|| "pending".to_owned())),
        state: match (proto, flow.state & state::CLOSING, flow.state & state::REPLIED) {
            (protocol::TCP, 1.., _) => "closing",
            (_, _, 0) => "unanswered",
            (protocol::TCP, ..) => "established",
            _ => "answered",
        },
        idle_seconds: now.wrapping_sub(flow.seen),
    }
}

fn lines(rows: &[Row]) -> Table {
    let mut list =
        table::new(&["namespace", "name", "protocol", "client", "frontend", "endpoint", "seen as", "state", "idle"]);
    for row in rows {
        list.add_row([
            row.namespace.as_str(),
            &row.name,
            &row.protocol,
            &row.client,
            &row.frontend,
            &row.endpoint,
            row.masqueraded.as_deref().unwrap_or("-"),
            row.state,
            &table::age(u64::from(row.idle_seconds)),
        ]);
    }
    list
}
