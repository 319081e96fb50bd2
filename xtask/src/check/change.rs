//! What one change costs among few and among many Services. In: generated manifests, an agent in a lab. Out: times with the machine
//! that they were taken on, which nobody judges; and an error where counts grow with the number of Services, or beyond [`MOST`].

use std::fs;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tests::{Agent, Lab, Topology, residue, scale};

use crate::interrupt;
use crate::workspace;

/// Numbers of Services to compare.
const FEW: u32 = 100;
const MANY: u32 = 10_000;
/// Endpoints of each.
const ENDPOINTS: u32 = 4;
/// The Pod whose label changes: the first of a Service in the middle of its file.
const POD: u32 = 50 * ENDPOINTS;
/// What one change may cost: an endpoint of both families leaves its Service's two frontends, or joins them.
const MOST: Cost = Cost { calls: 6, entries: 16, bytes: 320 };
/// The profile for development is slow on few cores.
const PATIENCE: Duration = Duration::from_secs(120);

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cost {
    calls: u64,
    entries: u64,
    bytes: u64,
}

/// One run with a number of Services.
#[derive(Debug)]
struct Run {
    /// The Pod leaves, the Pod comes back.
    costs: [Cost; 2],
}

/// Counts and compares.
pub fn check() -> Result<String> {
    workspace::build_agent()?;
    residue::clean()?;
    println!("\n  on {}, Linux {}, {}", processor(), release()?, profile());
    let few = measure(FEW)?;
    let many = measure(MANY)?;
    println!();
    let wrong = compare(&few, &many);
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    let [leave, join] = many.costs;
    Ok(format!(" (a Pod leaves a Service: {leave}; joins it: {join}; the same among {FEW} and {MANY} Services)"))
}

/// What is wrong with two runs.
fn compare(few: &Run, many: &Run) -> Vec<String> {
    let mut wrong = Vec::new();
    for (what, few, many) in [("leaves", few.costs[0], many.costs[0]), ("joins", few.costs[1], many.costs[1])] {
        if few != many {
            wrong.push(format!("a Pod that {what} a Service costs {few} among {FEW} Services and {many} among {MANY}"));
        }
        if many.calls > MOST.calls || many.entries > MOST.entries || many.bytes > MOST.bytes {
            wrong.push(format!("a Pod that {what} a Service costs {many}; at most it should {MOST}"));
        }
    }
    wrong
}

fn measure(services: u32) -> Result<Run> {
    interrupt::check()?;
    let topology = Topology { nodes: 1, pods_per_node: 0, binary: Some(workspace::agent()), ..Topology::default() };
    let lab = Lab::build(topology)?;
    let manifests = lab.folder().join("manifests");
    scale::write(&manifests, services, ENDPOINTS)?;
    let mut agent = Agent::new(&lab, lab.node(1), &manifests, &[])?;
    let start = Instant::now();
    agent.spawn()?;
    agent.wait_ready(PATIENCE)?;
    let ready = start.elapsed();
    let pid = agent.pid().context("the agent is not running")?;
    let memory = fs::read_to_string(format!("/proc/{pid}/status")).context("reading the agent's memory")?;
    println!(
        "  {services:>6} Services × {ENDPOINTS}: ready {:.2} s after the start; memory at most {} MiB, then {} MiB",
        ready.as_secs_f32(),
        mebibytes(&memory, "VmHWM"),
        mebibytes(&memory, "VmRSS"),
    );
    let own = format!("app-{}", POD / ENDPOINTS);
    let mut costs = [Cost::default(); 2];
    for (cost, app) in costs.iter_mut().zip(["none", &own]) {
        let before = settled(&agent, None)?;
        let complete = scale::relabel(&manifests, POD, ENDPOINTS, app)?;
        let after = settled(&agent, Some(Cost::of(&before)?))?;
        *cost = Cost::of(&after)?.since(Cost::of(&before)?);
        println!(
            "  {services:>6} Services: label of one Pod to {app}: {cost}; planned and written in {} µs, {} µs after the file was \
             complete",
            after["agent"]["lastChange"]["microseconds"],
            written(&after)?.duration_since(complete).unwrap_or_default().as_micros(),
        );
    }
    Ok(Run { costs })
}

/// When the last change was in the kernel, as `fairlead status --output json` says.
fn written(status: &Value) -> Result<SystemTime> {
    let last = &status["agent"]["lastChange"];
    let number = |name: &str| last[name].as_u64().with_context(|| format!("fairlead status has no lastChange.{name}"));
    Ok(UNIX_EPOCH + Duration::from_secs(number("at")?) + Duration::from_micros(number("atMicroseconds")?))
}

/// The agent's status once it has counted more than before and nothing is added any more.
fn settled(agent: &Agent, before: Option<Cost>) -> Result<Value> {
    let start = Instant::now();
    let mut last = None;
    loop {
        interrupt::check()?;
        let status = agent.cli_json(&["status"]);
        let cost = Cost::of(&status)?;
        if last == Some(cost) && before != Some(cost) {
            return Ok(status);
        }
        if start.elapsed() > PATIENCE {
            bail!("the agent has written nothing for a change of a label in {PATIENCE:?}");
        }
        last = Some(cost);
        thread::sleep(Duration::from_millis(200));
    }
}

impl Cost {
    /// From `fairlead status --output json`.
    fn of(status: &Value) -> Result<Self> {
        let number = |name: &str| {
            status["agent"][name].as_u64().with_context(|| format!("fairlead status has no number agent.{name}"))
        };
        Ok(Self { calls: number("bpfCalls")?, entries: number("entriesWritten")?, bytes: number("bytesWritten")? })
    }

    fn since(self, before: Self) -> Self {
        Self {
            calls: self.calls.saturating_sub(before.calls),
            entries: self.entries.saturating_sub(before.entries),
            bytes: self.bytes.saturating_sub(before.bytes),
        }
    }
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bpf calls, {} entries, {} bytes", self.calls, self.entries, self.bytes)
    }
}

/// A line of `/proc/PID/status` that is in KiB.
pub fn mebibytes(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// The machine's processors.
pub fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let count = thread::available_parallelism().map_or(1, usize::from);
    format!("{count} × {}", model.map_or("a processor without a name", |(_, name)| name))
}

/// The kernel's release.
pub fn release() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's release")?.trim().to_owned())
}

fn profile() -> String {
    match std::env::var_os("FAIRLEAD_BIN") {
        None => "the release profile".to_owned(),
        Some(path) => format!("{} (FAIRLEAD_BIN)", path.display()),
    }
}

#[cfg(test)]
mod unit {
    use super::{Cost, MOST, Run, compare, mebibytes};

    #[test]
    fn a_cost_that_grows_with_the_services_or_is_too_large_is_wrong() {
        let cost = Cost { calls: 5, entries: 9, bytes: 300 };
        let more = Cost { calls: 6, ..cost };
        let large = Cost { bytes: MOST.bytes + 1, ..cost };
        let run = |leave, join| Run { costs: [leave, join] };
        for (few, many, wrong) in [
            (run(cost, more), run(cost, more), 0),
            (run(cost, cost), run(cost, more), 1),
            (run(large, cost), run(large, cost), 1),
            (run(cost, large), run(large, cost), 3),
        ] {
            assert_eq!(compare(&few, &many).len(), wrong, "{few:?} {many:?}");
        }
    }

    #[test]
    fn memory_is_read_in_mebibytes() {
        let text = "Name:\tfairlead\nVmHWM:\t  65536 kB\nVmRSS:\t   2047 kB\n";
        assert_eq!((mebibytes(text, "VmHWM"), mebibytes(text, "VmRSS"), mebibytes(text, "VmSwap")), (64, 1, 0));
    }
}
