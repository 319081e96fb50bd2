//! `cargo xtask bench`: Fairlead beside the real kube-proxy, on this machine. Nobody judges the times; counts are judged by `check`.

mod control;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

/// What to measure.
#[derive(Subcommand)]
pub enum Bench {
    /// Start, memory, and one endpoint's change, with many Services
    Control(control::Options),
}

/// The subcommand.
pub fn run(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Control(options) => control::run(options),
    }
}
