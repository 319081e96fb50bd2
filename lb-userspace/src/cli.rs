//! The command line: what people type, and what they get to see.

mod completions;
pub mod endpoints;
pub mod explain;
pub mod flows;
pub mod pins;
mod preflight;
mod run;
pub mod services;
pub mod status;
mod table;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::flags::Arguments;

/// What `--help` ends with.
const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  it could not be done; the error says what helps
  2  the command line is wrong
  3  nothing is pinned in the folder (--bpffs): no agent has run with it";

/// Sends the connections of Kubernetes Services to their endpoints with eBPF, in kube-proxy's place
#[derive(Debug, Parser)]
#[command(name = "fairlead", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Status(status::StatusArgs),
    Services(services::ServicesArgs),
    Endpoints(endpoints::EndpointsArgs),
    Flows(flows::FlowsArgs),
    Explain(explain::ExplainArgs),
    Preflight(preflight::PreflightArgs),
    /// Give new connections back to the host; those that are open go on
    ///
    /// For going back to kube-proxy: once it has written its rules and the agent is stopped, it gets every new connection. When
    /// `fairlead flows` lists no connection that matters, `fairlead cleanup` removes the rest. A new start of the agent undoes it.
    #[command(after_help = "Example:\n  fairlead drain && sleep 3600 && fairlead cleanup")]
    Drain(pins::Folder),
    /// Remove every trace from the kernel: programs, links, maps, the folder
    ///
    /// Connections through Services break. Stop the agent first.
    #[command(after_help = "Example:\n  fairlead cleanup --bpffs /sys/fs/bpf/fairlead")]
    Cleanup(pins::Folder),
    /// Print the version
    Version,
    Completions(completions::CompletionsArgs),
}

/// Does what the arguments of the process say.
#[must_use]
pub fn main() -> ExitCode {
    let Arguments { all, gone } = Arguments::of_process(std::env::args_os());
    let command = Cli::parse_from(all).command;
    if !matches!(command, Command::Run(_)) {
        crate::kernel::end_with_the_reader();
    }
    let result = match command {
        Command::Run(args) => run::run(*args, &gone),
        Command::Status(args) => status::run(&args),
        Command::Services(args) => services::run(&args),
        Command::Endpoints(args) => endpoints::run(&args),
        Command::Flows(args) => flows::run(&args),
        Command::Explain(args) => match &args.manifests {
            Some(dir) => explain::run_manifests(&args, dir),
            None => explain::run_pinned(&args),
        },
        Command::Preflight(args) => preflight::run(&args),
        Command::Drain(folder) => folder.open().and_then(|_| crate::kernel::drain::drain(&folder.bpffs)),
        Command::Cleanup(folder) => crate::kernel::cleanup::cleanup(&folder.bpffs),
        Command::Version => {
            print_version();
            Ok(())
        }
        Command::Completions(args) => {
            completions::run(&args);
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<pins::NothingPinned>() => {
            eprintln!("error: {error:#}");
            ExitCode::from(3)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_version() {
    println!("fairlead {}", env!("CARGO_PKG_VERSION"));
}
