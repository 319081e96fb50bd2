//! The command line: what people type, and what they get to see.

pub mod explain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Sends the connections of Kubernetes Services to their endpoints with eBPF, in kube-proxy's place
#[derive(Debug, Parser)]
#[command(name = "fairlead", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Explain(explain::ExplainArgs),
}

/// Does what the arguments of the process say.
#[must_use]
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Explain(args) => match &args.manifests {
            Some(dir) => explain::run_manifests(&args, dir),
            None => Err(anyhow::anyhow!("no tables to ask; name a folder with --manifests DIR")),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
