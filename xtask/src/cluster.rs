//! `cargo xtask cluster`: a real control plane with agents on it, for people to look at. In: nothing. Out: two nodes, pods, a Service,
//! kubeconfigs, commands to explore it; it stays up until Ctrl-C or `cargo xtask cluster down`, and then nothing is left.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use tests::cluster::{TARGET, web};
use tests::control_plane::parts;
use tests::manifest::PodObject;
use tests::{Agent, ControlPlane, Lab, Server, Topology, folder, residue};

use crate::interrupt;
use crate::process;
use crate::setup;
use crate::workspace;

/// The file in a lab's folder that says that it was made for a person.
const MARK: &str = "cluster-up";

/// What to do.
#[derive(Args)]
pub struct Options {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Compile etcd and Kubernetes' parts, if that has not been done (minutes, the first time)
    Build {
        /// Also the programs of `cargo xtask conformance`
        #[arg(long)]
        conformance: bool,
    },
    /// Start the control plane and an agent on each of two nodes; until Ctrl-C
    Up,
    /// End what `up` started in another terminal
    Down,
}

/// The subcommand.
pub fn run(options: &Options) -> Result<ExitCode> {
    match options.action {
        Action::Build { conformance } => build(conformance)?,
        Action::Up => up()?,
        Action::Down => down()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Compiles the Kubernetes parts, with what that needs.
pub fn build(conformance: bool) -> Result<()> {
    setup::ensure_cluster()?;
    let more = if conformance { [&parts::E2E, &parts::AGNHOST, &parts::COREDNS].as_slice() } else { &[] };
    for part in [&parts::KUBE, &parts::KUBECTL, &parts::HELM].into_iter().chain(more.iter().copied()) {
        parts::ensure_by(part, |command| process::run(&format!("compiling {}", part.name), command))?;
    }
    Ok(())
}

fn up() -> Result<()> {
    ensure!(
        workspace::is_root(),
        "network namespaces are made and programs loaded: run `cargo xtask cluster up` as root"
    );
    interrupt::catch();
    setup::ensure()?;
    build(false)?;
    residue::clean()?;
    workspace::build_agent()?;
    let start = Instant::now();
    let lab = Lab::build(Topology { binary: Some(workspace::agent()), ..Topology::default() })?;
    fs::write(lab.folder().join(MARK), "").context("marking the cluster")?;
    let servers: Vec<Server> = lab.pods().map(|pod| lab.serve(pod, TARGET)).collect();
    let plane = ControlPlane::build(&lab)?;
    let api = plane.api();
    api.put(web());
    lab.pods().for_each(|pod| api.put(PodObject::of(pod).label("app", "web")));
    let kubeconfig = plane.kubeconfig("proxy");
    let agents: Vec<Agent> =
        lab.nodes.iter().map(|node| Agent::start_on_api_server(&lab, node, &kubeconfig, &[])).collect();
    println!(
        "A control plane, {} nodes and {} pods are up after {:.0} s.",
        lab.nodes.len(),
        servers.len(),
        start.elapsed().as_secs_f32()
    );
    explore(&lab, &plane, &parts::ensure(&parts::KUBECTL)?);
    while !interrupt::came() {
        thread::sleep(Duration::from_millis(50));
    }
    drop((agents, plane, servers, lab));
    Ok(())
}

fn explore(lab: &Lab, plane: &ControlPlane, kubectl: &Path) {
    let (node, agent) = (lab.node(1), workspace::agent());
    let (enter, bpffs) = (format!("ip netns exec {}", node.netns.name()), lab.bpffs(node));
    println!("In another terminal, as root:");
    let (kubectl, admin) = (kubectl.display(), plane.kubeconfig("admin"));
    println!("  {enter} {kubectl} --kubeconfig {} get services,endpointslices,pods", admin.display());
    for subcommand in ["status", "services", "endpoints"] {
        println!("  {enter} {} {subcommand} --bpffs {}", agent.display(), bpffs.display());
    }
    println!("  ip netns exec {} curl -sS http://10.99.1.10/", lab.outside.name());
    println!("Ctrl-C or `cargo xtask cluster down` ends it.");
}

fn down() -> Result<()> {
    let marked = folder::all().into_iter().filter(|id| folder::of(id).join(MARK).exists() && folder::in_use(id));
    let owners: Vec<String> = marked.filter_map(|id| Some(id.split('-').next()?.to_owned())).collect();
    for owner in &owners {
        process::run("ending the cluster", std::process::Command::new("kill").arg(owner))?;
    }
    let start = Instant::now();
    // Not the folder, which is half gone for some time.
    while owners.iter().any(|owner| Path::new("/proc").join(owner).exists()) {
        ensure!(start.elapsed() < Duration::from_secs(60), "the cluster's owner does not end");
        thread::sleep(Duration::from_millis(50));
    }
    let left = residue::clean()?.len();
    println!("{} clusters ended; {left} leftovers of killed runs removed.", owners.len());
    Ok(())
}
