//! Set-up, demonstration, tests and checks of the project: one file a subcommand, here only their names.

mod bench;
mod chaos;
mod check;
mod cluster;
mod conformance;
mod demo;
mod fuzz;
mod image;
mod interrupt;
mod kernels;
mod loops;
mod process;
mod scale;
mod setup;
mod stack;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Everything that is done with this repository; each command does the set-up that it needs by itself.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Show the agent at work in a small cluster of network namespaces (root; under a minute after the build)
    Demo(demo::Options),
    /// Run every test of the project and end with `N passed, N failed` (root)
    Test(test::Options),
    /// Check format, lints, the eBPF object and what is counted (root), or with --kernel the agent on other kernels
    Check(check::Options),
    /// Fairlead beside the real kube-proxy on this machine (root; minutes)
    #[command(subcommand)]
    Bench(bench::Bench),
    /// The static binary and the folder that a container's image is built from
    Image(image::Options),
    /// Let things happen at random to a cluster, and see that none of it is noticed (root; ten minutes)
    Chaos(chaos::Options),
    /// Look for inputs that make what reads packets, manifests or pinned maps fail, with libFuzzer
    Fuzz(fuzz::Options),
    /// A real control plane and agents on it, to look at (root)
    Cluster(cluster::Options),
    /// Kubernetes' own tests of Services, with the agent in kube-proxy's place, on a node with a real kubelet (root; minutes)
    Conformance(conformance::Options),
    /// Install what building and testing need and isn't there; asks nothing
    Setup(setup::Options),
    /// Write a folder of manifests with many Services
    Scale(scale::Options),
    /// What a virtual machine of `check --kernel` runs
    #[command(hide = true)]
    Guest,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Demo(options) => demo::run(&options),
        Task::Test(options) => test::run(&options),
        Task::Check(options) => check::run(&options),
        Task::Bench(bench) => bench::run(&bench),
        Task::Image(options) => image::run(&options),
        Task::Chaos(options) => chaos::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Cluster(options) => cluster::run(&options),
        Task::Conformance(options) => conformance::run(&options),
        Task::Setup(options) => setup::run(&options),
        Task::Scale(options) => scale::run(&options),
        Task::Guest => kernels::guest::run(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
