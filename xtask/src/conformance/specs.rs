//! One run of Kubernetes' own tests. In: a control plane with nodes that are Ready, which specs. Out: the result of each.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::ControlPlane;
use tests::control_plane::parts;

use crate::interrupt;

/// How often a sign of life is shown.
const EVERY: Duration = Duration::from_secs(30);

/// A spec that was selected.
#[derive(Debug)]
pub struct Spec {
    /// Its name.
    pub name: String,
    /// What became of it.
    pub outcome: Outcome,
    /// How long it took.
    pub seconds: f64,
    /// Why it didn't pass.
    pub reason: String,
}

/// What became of a spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It failed, in whatever way.
    Failed,
    /// It found that it can't run here.
    Skipped,
}

impl Outcome {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// Runs the specs that match a regular expression.
pub fn run(plane: &ControlPlane, focus: &str, nodes: u8, logs: &Path) -> Result<Vec<Spec>> {
    let (log, results) = (logs.join("e2e.log"), logs.join("e2e.json"));
    let mut command = Command::new(parts::ensure(&parts::E2E)?);
    plane.netns().apply(&mut command)?;
    command.arg("--kubeconfig").arg(plane.kubeconfig("admin")).arg("--provider=skeleton");
    command.arg(format!("--num-nodes={nodes}"));
    command.args(["--minStartupPods=0", "--allowed-not-ready-nodes=0", "--dump-logs-on-failure=false"]);
    command.args(["--disable-log-dump=true", "--ginkgo.no-color", "--ginkgo.v", "--ginkgo.timeout=2h"]);
    command.arg(format!("--ginkgo.focus={focus}")).arg("--ginkgo.json-report").arg(&results);
    let file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    // A group of its own, so that Ctrl-C at the terminal is for us to act on.
    command.current_dir(logs).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
    // One of an earlier run is no result of this one.
    let _ = fs::remove_file(&results);
    let mut child = command.spawn().context("running e2e.test")?;
    let status = follow(&mut child, &log);
    if status.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let status = status?;
    let text = fs::read_to_string(&results)
        .with_context(|| format!("e2e.test ended with {status} and without results; its log is {}", log.display()))?;
    let specs = read(&text).context("reading the results of e2e.test")?;
    ensure!(!specs.is_empty(), "no spec matches {focus}");
    for spec in &specs {
        let reason = if spec.reason.is_empty() { String::new() } else { format!(" -- {}", spec.reason) };
        println!("  {:<8}{:>6.1} s  {}{reason}", spec.outcome.name(), spec.seconds, spec.name);
    }
    Ok(specs)
}

/// Waits for the end, or for a signal, and says now and then how far it is.
fn follow(child: &mut Child, log: &Path) -> Result<ExitStatus> {
    let mut shown = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        interrupt::check()?;
        if shown.elapsed() > EVERY {
            shown = Instant::now();
            let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
            let ended = text.lines().filter(|line| line.starts_with("• ") || line.starts_with("S [SKIPPED]")).count();
            eprintln!("  {ended} specs have ended …");
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// The specs in ginkgo's report, by name. Those that were not selected are in it, too.
fn read(text: &str) -> Result<Vec<Spec>> {
    let suites: Value = serde_json::from_str(text)?;
    let reports = suites.as_array().into_iter().flatten().flat_map(|suite| suite["SpecReports"].as_array()).flatten();
    let mut specs: Vec<Spec> = reports.filter_map(spec_in).collect();
    specs.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(specs)
}

fn spec_in(report: &Value) -> Option<Spec> {
    if report["LeafNodeType"] != "It" {
        return None;
    }
    let message = report["Failure"]["Message"].as_str().unwrap_or_default();
    let outcome = match report["State"].as_str()? {
        "passed" => Outcome::Passed,
        "skipped" if message.is_empty() => return None,
        "skipped" => Outcome::Skipped,
        "pending" => return None,
        _ => Outcome::Failed,
    };
    let texts = report["ContainerHierarchyTexts"].as_array().into_iter().flatten().chain([&report["LeafNodeText"]]);
    let name = texts.filter_map(Value::as_str).collect::<Vec<_>>().join(" ");
    let reason = message.lines().next().unwrap_or_default().chars().take(200).collect();
    Some(Spec { name, outcome, seconds: report["RunTime"].as_f64().unwrap_or_default() / 1e9, reason })
}

#[cfg(test)]
mod unit {
    use super::{Outcome, read};

    #[test]
    fn a_report_tells_skipped_specs_from_those_that_were_not_selected() {
        let report = |text: &str, state: &str, message: &str| {
            format!(
                r#"{{"ContainerHierarchyTexts":["[sig-network] Services"],"LeafNodeType":"It","LeafNodeText":"{text}",
                "State":"{state}","RunTime":1500000000,"Failure":{{"Message":"{message}"}}}}"#
            )
        };
        let reports = [
            report("d", "skipped", "Requires at least 2 nodes"),
            report("a", "passed", ""),
            report("b", "skipped", ""),
            report("c", "timedout", "too late\\nand more"),
            r#"{"LeafNodeType":"BeforeSuite","State":"passed"}"#.to_owned(),
        ];
        let specs = read(&format!(r#"[{{"SpecReports":[{}]}}]"#, reports.join(","))).unwrap();
        let found: Vec<_> = specs.iter().map(|spec| (&*spec.name, spec.outcome, &*spec.reason)).collect();
        assert_eq!(
            found,
            [
                ("[sig-network] Services a", Outcome::Passed, ""),
                ("[sig-network] Services c", Outcome::Failed, "too late"),
                ("[sig-network] Services d", Outcome::Skipped, "Requires at least 2 nodes"),
            ]
        );
    }
}
