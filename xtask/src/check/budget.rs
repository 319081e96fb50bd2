//! What the verifier has to do for each program, against what it may. In: `fairlead preflight`, `xtask/budgets.json` (series of kernels, as
//! 6.18 → program → instructions). Out: a table, and an error where a program has grown. Times are printed, never judged.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::workspace;

/// By how many percent a program may exceed its budget: compilers differ a little.
const TOLERANCE: u64 = 10;

/// Numbers by program.
pub type Counts = BTreeMap<String, u64>;

/// What `fairlead preflight` says.
struct Measured {
    release: String,
    /// Name, verified instructions, milliseconds, in the order in which they were loaded.
    programs: Vec<(String, u64, u64)>,
}

/// Prints what every program costs; fails where one exceeds its budget on this kernel.
pub fn check() -> Result<String> {
    let measured = measure()?;
    let budget = read()?.remove(series(&measured.release));
    println!("\n  {:<24} {:>21} {:>10} {:>8}", "program", "instructions verified", "budget", "load");
    for (name, verified, milliseconds) in &measured.programs {
        let allowed = budget.as_ref().and_then(|budget| budget.get(name));
        let allowed = allowed.map_or_else(|| "-".to_owned(), ToString::to_string);
        println!("  {name:<24} {verified:>21} {allowed:>10} {milliseconds:>5} ms");
    }
    println!();
    let total: u64 = measured.programs.iter().map(|(.., milliseconds)| milliseconds).sum();
    Ok(format!(" ({total} ms in all; {})", judge(&measured.release, &measured.counts())?))
}

/// Holds counts against the budget of their kernel's series, and says what came of it.
pub fn judge(release: &str, counts: &Counts) -> Result<String> {
    let Some(budget) = read()?.remove(series(release)) else {
        return Ok(format!("no budget for Linux {release}"));
    };
    let wrong = compare(&budget, counts);
    ensure!(
        wrong.is_empty(),
        "{}; if that is meant: the same command with --write-budgets, and commit xtask/budgets.json",
        wrong.join("; ")
    );
    Ok(format!("none exceeds its budget for Linux {release} by more than {TOLERANCE} %"))
}

/// Makes today's counts the budget of this kernel; those of others stay.
pub fn write() -> Result<String> {
    let measured = measure()?;
    keep(&measured.release, measured.counts())?;
    Ok(format!(" ({} programs on Linux {})", measured.programs.len(), measured.release))
}

/// Makes counts the budget of their kernel's series; those of others stay.
pub fn keep(release: &str, counts: Counts) -> Result<()> {
    let mut budgets = read()?;
    budgets.insert(series(release).to_owned(), counts);
    let path = path();
    let text = serde_json::to_string_pretty(&serde_json::json!(budgets))? + "\n";
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

/// The first two numbers of a kernel's release: the verifier of a series stays as it is but for what is mended in it.
fn series(release: &str) -> &str {
    release.match_indices('.').nth(1).map_or(release, |(end, _)| &release[..end])
}

/// What is wrong with these counts.
fn compare(budget: &Counts, counts: &Counts) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, count) in counts {
        match budget.get(name) {
            None => wrong.push(format!("{name} has no budget")),
            Some(allowed) if count * 100 > allowed * (100 + TOLERANCE) => {
                wrong.push(format!("{name} takes {count} instructions, more than {TOLERANCE} % above {allowed}"));
            }
            Some(_) => {}
        }
    }
    wrong.extend(budget.keys().filter(|name| !counts.contains_key(*name)).map(|name| format!("{name} is gone")));
    wrong
}

impl Measured {
    fn counts(&self) -> Counts {
        self.programs.iter().map(|(name, verified, _)| (name.clone(), *verified)).collect()
    }
}

fn measure() -> Result<Measured> {
    workspace::build_agent()?;
    let agent = workspace::agent();
    let output = Command::new(&agent).args(["preflight", "--output", "json"]).output();
    let output = output.with_context(|| format!("running {} preflight", agent.display()))?;
    ensure!(output.status.success(), "fairlead preflight: {}", String::from_utf8_lossy(&output.stderr).trim());
    parse(&serde_json::from_slice(&output.stdout).context("reading what fairlead preflight says")?)
}

fn parse(json: &Value) -> Result<Measured> {
    let release = json["kernel"].as_str().context("fairlead preflight names no kernel")?.to_owned();
    let mut programs = Vec::new();
    for program in json["programs"].as_array().into_iter().flatten() {
        let name = program["program"].as_str().context("a program without a name")?;
        let form = if program["linkLayer"] == "none" { " (no Ethernet)" } else { "" };
        let Some(verified) = program["verifiedInstructions"].as_u64() else {
            bail!("Linux {release} doesn't tell how many instructions it verified (from Linux 5.16)");
        };
        programs.push((format!("{name}{form}"), verified, program["loadMilliseconds"].as_u64().unwrap_or(0)));
    }
    ensure!(!programs.is_empty(), "fairlead preflight names no programs");
    Ok(Measured { release, programs })
}

fn path() -> PathBuf {
    workspace::root().join("xtask/budgets.json")
}

fn read() -> Result<BTreeMap<String, Counts>> {
    let path = path();
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let json: BTreeMap<String, BTreeMap<String, Value>> =
        serde_json::from_str(&text).with_context(|| format!("{}: kernel → program → number", path.display()))?;
    let mut budgets = BTreeMap::new();
    for (release, programs) in json {
        let mut counts = Counts::new();
        for (name, count) in programs {
            let number = count.as_u64().with_context(|| format!("{}: {release}, {name}: no number", path.display()))?;
            counts.insert(name, number);
        }
        budgets.insert(release, counts);
    }
    Ok(budgets)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Counts, compare, parse, series};

    fn counts(list: &[(&str, u64)]) -> Counts {
        list.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn a_program_may_grow_by_a_tenth_and_no_more() {
        let budget = counts(&[("egress", 1000), ("ingress", 500)]);
        let cases = [
            (counts(&[("egress", 1000), ("ingress", 500)]), None),
            (counts(&[("egress", 1100), ("ingress", 1)]), None),
            (
                counts(&[("egress", 1101), ("ingress", 500)]),
                Some("egress takes 1101 instructions, more than 10 % above 1000"),
            ),
            (counts(&[("egress", 1), ("ingress", 1), ("xdp", 1)]), Some("xdp has no budget")),
            (counts(&[("egress", 1)]), Some("ingress is gone")),
        ];
        for (measured, wrong) in cases {
            assert_eq!(compare(&budget, &measured), Vec::from_iter(wrong), "{measured:?}");
        }
    }

    #[test]
    fn kernels_of_one_series_have_one_budget() {
        for (release, expected) in [("6.18.44-custom", "6.18"), ("6.1.0-38-amd64", "6.1"), ("7.0", "7.0"), ("7", "7")] {
            assert_eq!(series(release), expected);
        }
    }

    #[test]
    fn the_two_forms_of_a_program_have_budgets_of_their_own() {
        let program = |layer: &str, count: u64| json!({"program": "ingress", "linkLayer": layer, "verifiedInstructions": count, "loadMilliseconds": 3});
        let json = json!({"kernel": "6.18.0", "programs": [program("ethernet", 7), program("none", 8)]});
        let measured = parse(&json).unwrap();
        assert_eq!(measured.counts(), counts(&[("ingress", 7), ("ingress (no Ethernet)", 8)]));
        assert!(parse(&json!({"kernel": "6.18.0", "programs": []})).is_err());
    }
}
