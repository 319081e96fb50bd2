//! `cargo xtask fuzz`: inputs that nobody thought of. In: the targets of `fuzz/`. Out: an input for each failure, in
//! `fuzz/regressions/<target>`, which `cargo test` replays from then on.
//!
//! libFuzzer and rustc's own instruments, so that the stable compiler does, without `cargo-fuzz`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::process;
use crate::setup;
use crate::workspace;

/// The targets, by the names of their programs.
pub const TARGETS: [&str; 3] = ["manifests", "packet", "tables"];

/// What `cargo-fuzz` gives rustc, but for the sanitizer, which only other compilers have: nothing here is unsafe.
const INSTRUMENTS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// What to fuzz.
#[derive(Args)]
pub struct Options {
    /// Only this target
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// Build as `cargo xtask test` does: in a third of the time, and the targets are slower
    #[arg(long)]
    short: bool,
}

/// Builds the targets and runs one after another, until one fails.
pub fn run(options: &Options) -> Result<ExitCode> {
    setup::ensure()?;
    let programs = build(if options.short { "short" } else { "release" })?;
    for target in TARGETS.into_iter().filter(|target| options.target.as_deref().is_none_or(|only| only == *target)) {
        run_target(&programs, target, options.seconds)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the targets by a profile of theirs, `release` or `short`; answers the folder of their programs.
pub fn build(profile: &str) -> Result<PathBuf> {
    setup::ensure_fuzzer()?;
    let folder = workspace::root().join("fuzz");
    // Named, so that build scripts and macros are compiled without the instruments.
    let host = host()?;
    let mut build = workspace::cargo(&["build", "--profile", profile, "--locked", "--target", &host]);
    build.current_dir(&folder).env("RUSTFLAGS", INSTRUMENTS).env_remove("CARGO_TARGET_DIR");
    process::run("building the fuzz targets", &mut build)?;
    Ok(folder.join("target").join(host).join(profile))
}

/// Runs one target for a time.
pub fn run_target(programs: &Path, target: &str, seconds: u32) -> Result<()> {
    let folder = workspace::root().join("fuzz");
    let regressions = folder.join("regressions").join(target);
    let corpus = folder.join("target").join("corpus").join(target);
    for folder in [&regressions, &corpus] {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    let mut command = Command::new(programs.join(target));
    command.arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-artifact_prefix={}/", regressions.display()));
    // Bytes are choices, and a few of them choose little: they are many from the start.
    command.args(["-max_len=4096", "-len_control=0", "-timeout=10", "-print_final_stats=1"]);
    command.arg(&corpus).arg(&regressions);
    let failed = format!("fuzzing {target}; an input that fails is in fuzz/regressions/{target}");
    let result = process::run(&failed, &mut command);
    // Git keeps no empty folder, and none is missed.
    let _ = fs::remove_dir(&regressions);
    result
}

fn host() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("-vV").output().context("asking rustc for the machine's kind")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(ToOwned::to_owned).context("rustc -vV names no host")
}
