//! `cargo xtask test`: everything that the project tests. In: a clean checkout. Out: each test binary's own output, then the names of
//! what failed and, as the last line, `N passed, N failed`.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use serde_json::Value;
use tests::residue;

use crate::check;
use crate::cluster;
use crate::demo;
use crate::fuzz;
use crate::interrupt;
use crate::process;
use crate::setup;
use crate::workspace;

/// How long each fuzz target runs.
const FUZZ_SECONDS: u32 = 20;

/// What to test.
#[derive(Args)]
pub struct Options {
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// Run only the tests of this package
    #[arg(long, short)]
    package: Option<String>,
}

/// Counted results.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    failures: Vec<String>,
}

/// A test program and how cargo would run it.
struct Program {
    package: String,
    target: String,
    folder: PathBuf,
    executable: PathBuf,
}

/// Runs the tests; the exit code is 0 if all passed and something was tested.
pub fn run(options: &Options) -> Result<ExitCode> {
    ensure!(
        workspace::is_root(),
        "the tests make network namespaces and load programs: run `cargo xtask test` as root"
    );
    interrupt::catch();
    let start = Instant::now();
    setup::ensure()?;
    for leftover in residue::clean()? {
        println!("Removed what a killed run left: {leftover}");
    }
    workspace::build_agent()?;
    if options.package.as_deref().is_none_or(|package| package == "tests") {
        cluster::build(false)?;
    }

    let result = run_all(options, start);
    if interrupt::came() {
        // The signal ended the tests too, in the middle of what they were doing.
        residue::clean()?;
    }
    result
}

fn run_all(options: &Options, start: Instant) -> Result<ExitCode> {
    let mut tally = Tally::default();
    let programs = build_tests(options)?;
    for program in &programs {
        run_program(program, options.filter.as_deref(), &mut tally)?;
    }
    run_doc_tests(options, &mut tally)?;
    look_at_object(options, &mut tally)?;
    run_demo(options, &mut tally)?;
    run_fuzzers(options, &mut tally)?;
    look_for_residue(&mut tally)?;

    println!("\n{} test programs in {:.0} s, {} ignored", programs.len(), start.elapsed().as_secs_f32(), tally.ignored);
    for failure in &tally.failures {
        println!("FAILED {failure}");
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(if tally.failed == 0 && tally.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Compiles all test programs and asks cargo where they are.
fn build_tests(options: &Options) -> Result<Vec<Program>> {
    let selection: Vec<&str> = match &options.package {
        Some(package) => vec!["--package", package],
        None => vec!["--workspace"],
    };
    let build = [["test", "--no-run"].as_slice(), &selection].concat();
    process::run("building the tests", &mut workspace::cargo(&build))?;
    let list = [build.as_slice(), &["--message-format=json"]].concat();
    let output = workspace::cargo(&list).stderr(Stdio::null()).output().context("asking cargo for the tests")?;
    ensure!(output.status.success(), "cargo does not list the tests that it just built");
    let mut programs: Vec<Program> = String::from_utf8_lossy(&output.stdout).lines().filter_map(program_in).collect();
    // Whole-system tests last: what is wrong in a part is best seen there.
    programs.sort_by_key(|program| (program.package == "tests", program.package.clone(), program.target.clone()));
    Ok(programs)
}

fn program_in(line: &str) -> Option<Program> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    let folder = PathBuf::from(message["manifest_path"].as_str()?).parent()?.to_owned();
    Some(Program {
        package: folder.file_name()?.to_string_lossy().into_owned(),
        target: message["target"]["name"].as_str()?.to_owned(),
        executable: PathBuf::from(message["executable"].as_str()?),
        folder,
    })
}

fn run_program(program: &Program, filter: Option<&str>, tally: &mut Tally) -> Result<()> {
    interrupt::check()?;
    let name = format!("{}::{}", program.package, program.target);
    println!("\n=== {name}");
    let mut command = Command::new(&program.executable);
    command.args(filter).current_dir(&program.folder).env("CARGO_MANIFEST_DIR", &program.folder);
    command.env("FAIRLEAD_BIN", workspace::agent());
    if let Some(path) = workspace::path_with_tools() {
        command.env("PATH", path);
    }
    // Some say how much they have tried, and whoever reads a run should see it.
    command.arg("--show-output");
    if program.package == "tests" {
        // One cluster at a time: times are measured in them, on few cores.
        command.arg("--test-threads=1");
    }
    follow(&name, &mut command, tally)
}

fn run_doc_tests(options: &Options, tally: &mut Tally) -> Result<()> {
    if options.filter.is_some() || options.package.is_some() {
        return Ok(());
    }
    interrupt::check()?;
    println!("\n=== documentation");
    follow("documentation", &mut workspace::cargo(&["test", "--doc", "--workspace"]), tally)
}

/// Shows a test program's output as it comes and counts its results. One that ends badly without naming a failed test counts as one.
fn follow(name: &str, command: &mut Command, tally: &mut Tally) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("running the tests of {name}"))?;
    let output = child.stdout.take().context("reading a test's output")?;
    let failed_before = tally.failed;
    for line in BufReader::new(output).lines() {
        let line = line.with_context(|| format!("reading what {name} says"))?;
        println!("{line}");
        tally.read(name, &line);
    }
    let status = child.wait()?;
    interrupt::check()?;
    if !status.success() && tally.failed == failed_before {
        tally.fail(format!("{name} ended with {status}"));
    }
    Ok(())
}

fn look_at_object(options: &Options, tally: &mut Tally) -> Result<()> {
    if options.filter.is_some() || options.package.is_some() {
        return Ok(());
    }
    interrupt::check()?;
    println!("\n=== object");
    for (name, check) in check::OF_THE_OBJECT {
        match check() {
            Ok(detail) => {
                println!("test {} ... ok{detail}", name.replace(' ', "_"));
                tally.passed += 1;
            }
            Err(error) => {
                println!("{error:#}");
                tally.fail(format!("object::{}", name.replace(' ', "_")));
            }
        }
    }
    Ok(())
}

/// The demonstration shows what it says, and cleans up.
fn run_demo(options: &Options, tally: &mut Tally) -> Result<()> {
    if options.filter.is_some() || options.package.is_some() {
        return Ok(());
    }
    interrupt::check()?;
    println!("\n=== demo");
    match demo::run(&demo::Options::default()) {
        Ok(_) => {
            println!("test demo ... ok");
            tally.passed += 1;
        }
        Err(error) => {
            println!("{error:#}");
            tally.fail("demo".to_owned());
        }
    }
    Ok(())
}

/// Each fuzz target for a moment: it builds, and what it learns at once breaks nothing.
fn run_fuzzers(options: &Options, tally: &mut Tally) -> Result<()> {
    if options.filter.is_some() || options.package.is_some() {
        return Ok(());
    }
    println!("\n=== fuzz, {FUZZ_SECONDS} s each");
    let programs = fuzz::build("short");
    for target in fuzz::TARGETS {
        interrupt::check()?;
        let result = programs.as_ref().map_err(|error| anyhow!("{error:#}"));
        match result.and_then(|programs| fuzz::run_target(programs, target, FUZZ_SECONDS)) {
            Ok(()) => {
                println!("test {target} ... ok");
                tally.passed += 1;
            }
            Err(error) => {
                println!("{error:#}");
                tally.fail(format!("fuzz::{target}"));
            }
        }
    }
    Ok(())
}

fn look_for_residue(tally: &mut Tally) -> Result<()> {
    println!("\n=== residue");
    let leftovers = residue::find()?;
    if leftovers.is_empty() {
        println!("test nothing_is_left_on_the_machine ... ok");
        tally.passed += 1;
        return Ok(());
    }
    for leftover in &leftovers {
        println!("left: {leftover}");
    }
    tally.fail("residue::nothing_is_left_on_the_machine".to_owned());
    if let Err(error) = residue::clean() {
        bail!("{error:#}");
    }
    Ok(())
}

impl Tally {
    fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }

    /// Takes libtest's lines: the failed tests by name, the numbers from the closing line.
    fn read(&mut self, program: &str, line: &str) {
        if let Some(test) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.failures.push(format!("{program}::{test}"));
        }
        let Some(counts) = line.strip_prefix("test result: ") else { return };
        for part in counts.split([';', '.']) {
            let mut words = part.split_whitespace();
            let (Some(number), Some(what)) = (words.next().and_then(|word| word.parse::<u64>().ok()), words.next())
            else {
                continue;
            };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod unit {
    use super::Tally;

    #[test]
    fn libtests_closing_lines_are_added_up() {
        let mut tally = Tally::default();
        for line in [
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 5 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 4 filtered out; finished in 1.20s",
        ] {
            tally.read("p", line);
        }
        assert_eq!((tally.passed, tally.failed, tally.ignored), (8, 1, 2));
        assert_eq!(tally.failures, ["p::a::c"]);
    }
}
