//! `cargo xtask chaos`: things happen at random to a cluster with a real control plane. In: for how long, a seed. Out: what happened,
//! or what was wrong after it. A short run is part of `cargo xtask test`.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use clap::Args;
use tests::{chaos, residue};

use crate::cluster;
use crate::interrupt;
use crate::setup;
use crate::workspace;

/// How much happens.
#[derive(Args)]
pub struct Options {
    /// For how long
    #[arg(long, value_name = "N", default_value_t = 600)]
    seconds: u64,
    /// What happens follows from it; another one every run where nothing is said
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// Lets it happen, and judges.
pub fn run(options: &Options) -> Result<ExitCode> {
    ensure!(workspace::is_root(), "network namespaces are made and programs loaded: run `cargo xtask chaos` as root");
    interrupt::catch();
    setup::ensure()?;
    cluster::build(false)?;
    workspace::build_agent()?;
    residue::clean()?;
    let seed = options.seed.unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::from(since.subsec_nanos()))
    });
    println!("seed {seed}");
    let options =
        chaos::Options { length: Duration::from_secs(options.seconds), seed, binary: Some(workspace::agent()) };
    let report = chaos::run(&options, |line| println!("  {line}"), interrupt::check)?;
    let left = residue::find()?;
    ensure!(left.is_empty(), "seed {seed}: something of the lab is left: {left:?}");
    let events: Vec<String> = report.events.iter().map(|(what, count)| format!("{count} × {what}")).collect();
    println!("{}", events.join(", "));
    println!(
        "{} connections and datagrams to lasting endpoints, none failed; {} packets, {} of them to endpoints, have the fate that the model \
         says",
        report.answered, report.compared, report.forwarded
    );
    Ok(ExitCode::SUCCESS)
}
