//! `fairlead status`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use clap::Args;
use lb_common::{memory::Memory, reason::Reason};
use serde::Serialize;

use super::{
    pins::{Folder, Output},
    table,
};
use crate::{
    agent::{
        door::{Question, ask},
        report::Report,
    },
    kernel::{links::Attached, pinned::Fill},
};

/// Say what is attached where, how many there are of everything, and what is wrong
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:\n  fairlead status\n  fairlead status --output json | jq .problems")]
pub struct StatusArgs {
    #[command(flatten)]
    folder: Folder,
    /// How it is written
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// What `fairlead status` says.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Whether an agent runs and everything it knows is effective.
    ready: bool,
    agent: Option<Report>,
    frontends: usize,
    endpoints: usize,
    attached: Vec<Program>,
    maps: Vec<Map>,
    packets: BTreeMap<&'static str, u64>,
    problems: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Program {
    program: String,
    device: Option<String>,
    ifindex: Option<u32>,
    mechanism: &'static str,
    live: bool,
    /// Programs that run before it and may end the chain.
    before: Vec<String>,
}

#[derive(Serialize)]
struct Map {
    name: &'static str,
    used: u64,
    room: u32,
    /// Entries that had to make room for others, estimated.
    #[serde(skip_serializing_if = "Option::is_none")]
    evicted: Option<u64>,
}

/// Prints the status.
pub fn run(args: &StatusArgs) -> Result<()> {
    print!("{}", Status::read(&args.folder)?.text(args.output)?);
    Ok(())
}

impl Status {
    fn read(folder: &Folder) -> Result<Self> {
        let pinned = folder.open()?;
        let agent: Option<Report> = ask(&folder.bpffs, Question::Status);
        Ok(Self::new(agent, &pinned.memory()?, pinned.attached()?, &pinned.fill()?, &pinned.counters()?))
    }

    /// What is to be said about an agent, if one runs, and of what is pinned.
    pub fn new(
        agent: Option<Report>,
        memory: &Memory,
        attached: Vec<Attached>,
        fill: &[Fill],
        counters: &[u64],
    ) -> Self {
        let names = agent.as_ref().map(|agent| agent.devices.clone()).unwrap_or_default();
        let attached: Vec<Program> = attached.into_iter().map(|attached| Program::new(attached, &names)).collect();
        let mut problems = match &agent {
            Some(agent) => agent.problems.clone(),
            None => vec!["no agent runs: packets are handled, changes are not; start `fairlead run`".to_owned()],
        };
        problems.extend(attached.iter().filter_map(Program::problem));
        Self {
            ready: agent.as_ref().is_some_and(|agent| agent.ready),
            frontends: memory.frontends.len(),
            endpoints: memory.endpoints.values().filter(|endpoint| endpoint.flags != 0).count(),
            attached,
            maps: maps(fill, memory),
            packets: Reason::ALL.iter().zip(counters).map(|(reason, count)| (reason.as_str(), *count)).collect(),
            problems,
            agent,
        }
    }

    /// The status as it is asked for.
    ///
    /// # Errors
    ///
    /// It can't be written as JSON.
    pub fn text(&self, output: Output) -> Result<String> {
        let mut text = String::new();
        match output {
            Output::Json => text = serde_json::to_string_pretty(self)? + "\n",
            Output::Table => self.lines(&mut text)?,
        }
        Ok(text)
    }

    fn lines(&self, out: &mut String) -> fmt::Result {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let ago = |at: u64| table::age(now.saturating_sub(at));
        if let Some(agent) = &self.agent {
            let state = if self.ready { "ready" } else { "not ready" };
            writeln!(
                out,
                "Agent       {state}: process {} on node {}, version {}, up {}, by {}",
                agent.pid,
                agent.node,
                agent.version,
                ago(agent.started),
                agent.attach
            )?;
            let objects: Vec<String> = agent.objects.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            writeln!(out, "Objects     {}, {} of other kinds", objects.join(", "), agent.skipped)?;
            if let Some(change) = &agent.last_change {
                writeln!(
                    out,
                    "Last change {} ago: {} writes in {} µs",
                    ago(change.at),
                    change.writes,
                    change.microseconds
                )?;
            }
        } else {
            writeln!(out, "Agent       none runs")?;
        }
        writeln!(out, "Tables      {} frontends, {} endpoints", self.frontends, self.endpoints)?;
        writeln!(out, "\nPrograms")?;
        let mut programs = table::new(&["program", "device", "by"]);
        for program in &self.attached {
            let device = program.device.clone().unwrap_or_else(|| "sockets".to_owned());
            programs.add_row([&program.program, &device, program.mechanism]);
        }
        out.push_str(&table::text(&programs));
        let bridges = self.agent.as_ref().map(|agent| agent.bridges.as_slice()).unwrap_or_default();
        if !bridges.is_empty() {
            writeln!(out, "\nBridges")?;
            let mut rows = table::new(&["bridge", "IPv4 between its ports", "IPv6 between its ports"]);
            for bridge in bridges {
                rows.add_row([&bridge.name, &bridge.ipv4, &bridge.ipv6]);
            }
            out.push_str(&table::text(&rows));
        }
        writeln!(out, "\nMaps")?;
        let mut maps = table::new(&["map", "used", "room", "", "evicted"]);
        for map in &self.maps {
            let share = map.used as f64 * 100.0 / f64::from(map.room.max(1));
            maps.add_row([
                map.name.to_owned(),
                map.used.to_string(),
                map.room.to_string(),
                format!("{share:.1} %"),
                map.evicted.map_or_else(String::new, |evicted| evicted.to_string()),
            ]);
        }
        out.push_str(&table::text(&maps));
        writeln!(out, "\nPackets")?;
        for (reason, count) in self.packets.iter().filter(|(_, count)| **count > 0) {
            writeln!(out, "  {reason:<24} {count}")?;
        }
        writeln!(out, "\nProblems")?;
        if self.problems.is_empty() {
            writeln!(out, "  none")?;
        }
        for problem in &self.problems {
            writeln!(out, "  {problem}")?;
        }
        Ok(())
    }
}

/// The maps that can fill up. Every element of an array is there from the start: what counts in them is what is in use.
fn maps(fill: &[Fill], memory: &Memory) -> Vec<Map> {
    let used = |fill: &Fill| match fill.name {
        "SLOTS" => Some(slots_in_use(memory)),
        "SERVICE_COUNTERS" => Some(memory.services.len() as u64),
        "ENDPOINTS" => Some(memory.endpoints.values().filter(|endpoint| endpoint.flags != 0).count() as u64),
        "SETTINGS" | "FRONTEND_BITS" | "ENDPOINT_BITS" | "STRAIGHT" | "COUNTERS" | "ENTRIES" | "SOCKETS" => None,
        _ => Some(fill.used),
    };
    fill.iter()
        .filter_map(|fill| Some(Map { name: fill.name, used: used(fill)?, room: fill.room, evicted: fill.evicted }))
        .collect()
}

/// Slots that a frontend's range names. Those of ranges that are gone keep what they said until others take them.
fn slots_in_use(memory: &Memory) -> u64 {
    let ranges = memory.frontends.values().flat_map(|frontend| [frontend.internal, frontend.external]);
    let ranges: BTreeSet<(u32, u32)> = ranges.map(|range| (range.offset, range.len)).collect();
    ranges.into_iter().map(|(_, len)| u64::from(len)).sum()
}

impl Program {
    fn new(attached: Attached, names: &BTreeMap<u32, String>) -> Self {
        let Attached { ifindex, program, mechanism, before, live, .. } = attached;
        let name = |ifindex| names.get(&ifindex).cloned().unwrap_or_else(|| format!("ifindex {ifindex}"));
        Self {
            program,
            device: ifindex.map(name),
            ifindex,
            mechanism: match mechanism {
                Some(mechanism) => mechanism.name(),
                None => "cgroup",
            },
            live,
            before,
        }
    }

    fn problem(&self) -> Option<String> {
        let device = self.device.as_deref().unwrap_or("sockets");
        if !self.live {
            return Some(format!(
                "{}: {} has lost its device; it is cleaned up by a running agent",
                device, self.program
            ));
        }
        (!self.before.is_empty()).then(|| {
            format!(
                "{device}: {} may keep packets from {}, running before it; see `bpftool net` and `tc filter`",
                self.before.join(", "),
                self.program
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{
        addr::Addr,
        layout::{Endpoint, Frontend, FrontendKey, Range, SERVICE_NAME_LEN},
    };

    use super::*;

    #[test]
    fn arrays_are_as_full_as_what_is_in_use() {
        let endpoint = |flags| Endpoint { flags, ..Endpoint::default() };
        let range = Range { offset: 4, len: 3 };
        let frontend = Frontend { internal: range, external: range, ..Frontend::default() };
        let memory = Memory {
            frontends: [1, 2].map(|number| (FrontendKey::any_port(Addr::from_v4_word(number)), frontend)).into(),
            endpoints: [(1, endpoint(1)), (2, endpoint(0))].into(),
            services: [(7, [0; SERVICE_NAME_LEN]), (9, [0; SERVICE_NAME_LEN])].into(),
            ..Memory::default()
        };
        let fill = ["SLOTS", "ENDPOINTS", "SERVICE_COUNTERS", "SETTINGS", "FRONTENDS"];
        let fill = fill.map(|name| Fill { name, id: 1, used: 1024, room: 1024, evicted: None });
        let status = Status::new(None, &memory, Vec::new(), &fill, &[]);
        let used: Vec<_> = status.maps.iter().map(|map| (map.name, map.used)).collect();
        assert_eq!(used, [("SLOTS", 3), ("ENDPOINTS", 1), ("SERVICE_COUNTERS", 2), ("FRONTENDS", 1024)]);
    }
}
