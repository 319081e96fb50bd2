//! What must be the same before and after. In: a world in which all is quiet. Out: entries, pins and programs that are too many.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{SETTLED, World};

/// Maps that remember traffic: they forget in their own time, and have a size that they keep.
const OF_TRAFFIC: [&str; 6] = ["FLOWS", "NEW_FLOWS", "AFFINITIES", "FRAGMENTS", "ENTRIES", "SOCKETS"];

/// File descriptors of an agent that may differ: connections to the API server.
const CONNECTIONS: usize = 8;

/// What an agent holds, by name.
pub struct Picture(Vec<BTreeMap<String, usize>>);

impl Picture {
    /// Of every agent.
    pub fn of(world: &World) -> Result<Self> {
        let agents = world.lab.nodes.iter().zip(&world.agents);
        let pictures = agents.map(|(node, agent)| {
            let status = agent.cli_json(&["status"]);
            let mut held = BTreeMap::new();
            for map in status["maps"].as_array().context("fairlead status names the maps")? {
                let name = map["name"].as_str().unwrap_or_default();
                if !OF_TRAFFIC.contains(&name) {
                    held.insert(format!("entries of {name}"), number(&map["used"]));
                }
            }
            for name in ["frontends", "endpoints"] {
                held.insert(name.to_owned(), number(&status[name]));
            }
            held.insert("attached programs".to_owned(), status["attached"].as_array().map_or(0, Vec::len));
            held.insert("pins".to_owned(), files_below(agent.bpffs()));
            let devices = node.netns.exec("ip", &["-json", "link"])?;
            let devices: Value = serde_json::from_str(&devices).context("reading ip's JSON")?;
            held.insert("devices".to_owned(), devices.as_array().map_or(0, Vec::len));
            let pid = agent.pid().context("an agent is not running")?;
            let descriptors =
                fs::read_dir(format!("/proc/{pid}/fd")).context("listing an agent's descriptors")?.count();
            held.insert("file descriptors".to_owned(), descriptors);
            Ok(held)
        });
        Ok(Self(pictures.collect::<Result<_>>()?))
    }

    /// Waits until it is so again.
    pub fn until_again(&self, world: &World) -> Result<()> {
        let start = Instant::now();
        loop {
            let left = self.less_than(&Self::of(world)?);
            if left.is_empty() {
                return Ok(());
            }
            ensure!(start.elapsed() < SETTLED, "something is left over: {}", left.join("; "));
            thread::sleep(Duration::from_millis(500));
        }
    }

    fn less_than(&self, now: &Self) -> Vec<String> {
        let mut left = Vec::new();
        for (index, (before, now)) in self.0.iter().zip(&now.0).enumerate() {
            for (what, now) in now {
                let before = before.get(what).copied().unwrap_or_default();
                let most = if what == "file descriptors" { before + CONNECTIONS } else { before };
                if *now > most {
                    left.push(format!("node{}: {now} {what}, and {before} before", index + 1));
                }
            }
        }
        left
    }
}

fn number(value: &Value) -> usize {
    value.as_u64().and_then(|number| usize::try_from(number).ok()).unwrap_or_default()
}

fn files_below(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { files_below(&entry.path()) } else { 1 }).sum()
}
