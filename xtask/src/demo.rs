//! `cargo xtask demo`: the agent doing its job in a small cluster, step by step. In: nothing. Out: a page that a person reads, and an
//! exit code that says whether every step went as it should; the machine is as before, also after Ctrl-C.

mod cluster;
mod page;
mod steps;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use tests::residue;

use self::cluster::Cluster;
use self::page::Page;
use crate::interrupt;
use crate::setup;
use crate::workspace;

/// How to show it.
#[derive(Args, Default)]
pub struct Options {
    /// Leave the cluster up at the end and print commands to explore it; Ctrl-C removes it
    #[arg(long)]
    keep: bool,
}

/// Runs the demonstration.
pub fn run(options: &Options) -> Result<ExitCode> {
    ensure!(
        workspace::is_root(),
        "the demo makes network namespaces and loads programs: run `cargo xtask demo` as root"
    );
    interrupt::catch();
    setup::ensure()?;
    for leftover in residue::clean()? {
        println!("Removed what a killed run left: {leftover}");
    }
    workspace::build_agent()?;

    let start = Instant::now();
    let mut page = Page::new();
    let cluster = Cluster::build().context("building the cluster")?;
    let result = show(&mut page, cluster, options.keep);
    let left = residue::find()?;
    for leftover in &left {
        page.line(&format!("left on the machine: {leftover}"));
    }
    result?;
    ensure!(left.is_empty(), "something was left on the machine");
    page.good("no namespace, process, mount, cgroup or folder is left");
    println!("\nThat took {:.0} s.", start.elapsed().as_secs_f32());
    Ok(ExitCode::SUCCESS)
}

/// All steps; whatever happens, the cluster is gone afterwards.
fn show(page: &mut Page, mut cluster: Cluster, keep: bool) -> Result<()> {
    steps::start(page, &mut cluster)?;
    steps::services(page, &cluster)?;
    steps::connections(page, &cluster)?;
    steps::label(page, &cluster)?;
    steps::scale_to_nothing(page, &cluster)?;
    steps::kill(page, &mut cluster)?;
    if keep {
        explore(page, &cluster);
        while !interrupt::came() {
            std::thread::sleep(Duration::from_millis(50));
        }
        println!();
    }
    page.heading("Clean up", "SIGTERM ends the agents, and the data plane stays; `fairlead cleanup` removes it.");
    cluster.stop()
}

fn explore(page: &mut Page, cluster: &Cluster) {
    page.heading("Explore", "The cluster stays up until Ctrl-C. In another terminal, as root:");
    let agent = workspace::agent().display().to_string();
    let bpffs = cluster.lab.bpffs(cluster.lab.node(1)).display().to_string();
    let pod = cluster.client_pod();
    let node = cluster.lab.node(1).netns.name();
    page.line("Edit, add or remove manifests; a change is effective at once:");
    page.command(&format!("$EDITOR {}/*.yaml", cluster.lab.manifests().path().display()));
    page.line("Ask the Service from the client pod, from outside, from the node:");
    page.command(&format!("ip netns exec {} curl http://10.96.0.10/", pod.netns.name()));
    page.command(&format!(
        "ip netns exec {} curl http://10.99.1.10/ 'http://[fd00:99:1::10]/'",
        cluster.lab.outside.name()
    ));
    // A client of the node is one of its cgroup, as on a real node all processes are.
    let procs = cluster.lab.cgroup().join("cgroup.procs").display().to_string();
    page.command(&format!("sh -c 'echo $$ > {procs}; exec ip netns exec {node} curl http://10.96.0.10/'"));
    page.line("Ask the agent of node1:");
    for subcommand in ["status", "services", "endpoints", "flows"] {
        page.command(&format!("ip netns exec {node} {agent} {subcommand} --bpffs {bpffs}"));
    }
    page.command(&format!("ip netns exec {node} {agent} explain --bpffs {bpffs} tcp {}:40000 10.96.0.10:80", pod.v4));
    page.line("");
    page.line("Ctrl-C ends it.");
}
