//! `cargo xtask conformance`: Kubernetes' own tests of Services, with the agent in kube-proxy's place. In: nothing; what they need is
//! compiled from Go modules. Out: a result of each spec, and nothing left behind. The logs of the last run stay in the target folder.

mod daemonset;
mod report;
mod rollout;
mod specs;

use std::any::Any;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use tests::control_plane::parts;
use tests::kube_proxy::CLUSTER_CIDR;
use tests::kubelet::{self, Settings};
use tests::{Agent, ControlPlane, KubeProxy, Kubelet, Lab, Topology, residue};

use self::daemonset::DaemonSet;
use self::report::Report;
use self::specs::Spec;
use crate::image;
use crate::interrupt;
use crate::process;
use crate::setup;
use crate::workspace;

/// What to run.
#[derive(Args)]
pub struct Options {
    /// In this mode only; otherwise in one after the other
    #[arg(long)]
    mode: Option<Mode>,
    /// All specs of `[sig-network] Services`, not just those that every cluster has to pass
    #[arg(long)]
    all: bool,
    /// Also with the real kube-proxy, to which the agent is compared then; or with nothing but that
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "beside")]
    kube_proxy: Option<Reference>,
    /// The agent as a static binary in the container of a DaemonSet, instead of a process on each node
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "kubeadm")]
    daemonset: Option<DaemonSet>,
    /// Only specs whose name matches this regular expression
    #[arg(long, default_value = "", hide_default_value = true)]
    spec: String,
    /// Number of nodes, 1 to 9, each with a kubelet; otherwise as many as the specs ask for: 3 with `--all`, or 1
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: Option<u8>,
}

impl Options {
    fn nodes(&self) -> u8 {
        self.nodes.unwrap_or(if self.all { 3 } else { 1 })
    }
}

/// What kube-proxy is run for.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Reference {
    Beside,
    Only,
}

/// A `mode` of kube-proxy.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Iptables,
    Nftables,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }
}

/// What sends the connections of Services.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Proxy {
    Fairlead,
    KubeProxy,
}

impl Proxy {
    fn name(self) -> &'static str {
        match self {
            Self::Fairlead => "fairlead",
            Self::KubeProxy => "kube-proxy",
        }
    }
}

/// Whichever runs, one a node, until dropped.
type Running = Vec<Box<dyn Any>>;

/// The subcommand; the exit code is 0 if nothing is wrong with the agent.
pub fn run(options: &Options) -> Result<ExitCode> {
    ensure!(
        workspace::is_root(),
        "network namespaces are made and programs loaded: run `cargo xtask conformance` as root"
    );
    interrupt::catch();
    setup::ensure()?;
    setup::ensure_cluster()?;
    setup::ensure_nodes()?;
    for part in [&parts::KUBE, &parts::KUBECTL, &parts::E2E, &parts::AGNHOST, &parts::COREDNS] {
        parts::ensure_by(part, |command| process::run(&format!("compiling {}", part.name), command))?;
    }
    residue::clean()?;
    workspace::build_agent()?;
    let image = if options.daemonset.is_some() { Some(image::build()?) } else { None };
    let modes = match options.mode {
        Some(mode) => vec![mode],
        None => vec![Mode::Iptables, Mode::Nftables],
    };
    let proxies: &[Proxy] = match options.kube_proxy {
        None => &[Proxy::Fairlead],
        Some(Reference::Beside) => &[Proxy::Fairlead, Proxy::KubeProxy],
        Some(Reference::Only) => &[Proxy::KubeProxy],
    };
    let mut report = Report::default();
    for mode in modes {
        for proxy in proxies {
            let name = format!("{}, {}", proxy.name(), mode.name());
            println!("{name}:");
            let specs = run_specs(options, *proxy, mode, image.as_deref()).with_context(|| name.clone())?;
            report.add(name, *proxy == Proxy::Fairlead, specs);
        }
    }
    report.print();
    Ok(if report.is_good(options.all) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `binary`: the static one, if the agent is to be a DaemonSet.
fn run_specs(options: &Options, proxy: Proxy, mode: Mode, binary: Option<&Path>) -> Result<Vec<Spec>> {
    let binary = binary.filter(|_| proxy == Proxy::Fairlead);
    let start = Instant::now();
    let logs = workspace::target().join("conformance").join(format!("{}-{}", proxy.name(), mode.name()));
    fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
    // Dropped in the opposite order: what needs others ends before them.
    let _settings = Settings::note()?;
    let topology =
        Topology { nodes: options.nodes(), pods_per_node: 0, binary: Some(workspace::agent()), ..Topology::default() };
    let lab = Lab::build(topology)?;
    lab.route_pods_from_switch()?;
    interrupt::check()?;
    let plane = ControlPlane::build_for_kubelets(&lab)?;
    interrupt::check()?;
    let folder = lab.folder().join("image");
    fs::create_dir(&folder).context("creating a folder for the image")?;
    let image = kubelet::image::build(&folder)?;
    let mut kubelets = Vec::new();
    for node in &lab.nodes {
        interrupt::check()?;
        kubelets.push(Kubelet::start(&lab, node, &plane, &image)?);
    }
    let daemon_set = options.daemonset.zip(binary);
    let running = match daemon_set {
        None => start_proxies(&lab, &plane, proxy, mode)?,
        Some((daemon_set, binary)) => {
            let folder = lab.folder().join("agent");
            let archive = daemonset::build_image(&folder, binary)?;
            kubelets.iter().try_for_each(|kubelet| kubelet.import(&archive))?;
            daemonset::apply(&plane, daemon_set, mode, &folder)?;
            Running::new()
        }
    };
    for kubelet in &mut kubelets {
        kubelet.wait_ready(&plane)?;
        interrupt::check()?;
    }
    if let Some((daemon_set, _)) = daemon_set {
        daemonset::wait_ready(&plane, daemon_set)?;
    }
    println!("  {} of {} Ready after {:.0} s", kubelets.len(), lab.nodes.len(), start.elapsed().as_secs_f32());
    let mut specs = specs::run(&plane, &focus(options), options.nodes(), &logs);
    // kubeadm's has no volume in which the data plane outlives its container.
    if let Some((DaemonSet::Own, _)) = daemon_set
        && let Ok(specs) = &mut specs
    {
        specs.push(rollout::run(&lab, &plane, DaemonSet::Own));
    }
    // Whatever became of them, how it looked from the proxies is kept.
    keep_logs(&lab.folder().join("log"), &logs)?;
    drop(running);
    drop(kubelets);
    specs
}

fn start_proxies(lab: &Lab, plane: &ControlPlane, proxy: Proxy, mode: Mode) -> Result<Running> {
    let (cidrs, proxy_mode) = (format!("--cluster-cidr={CLUSTER_CIDR}"), format!("--proxy-mode={}", mode.name()));
    let flags = [&*proxy_mode, &*cidrs, "--detect-local-mode=ClusterCIDR"];
    let kubeconfig = plane.kubeconfig("proxy");
    let mut running = Running::new();
    for node in &lab.nodes {
        running.push(match proxy {
            Proxy::Fairlead => Box::new(Agent::build(lab, node, &kubeconfig, &flags)?),
            Proxy::KubeProxy => Box::new(KubeProxy::start(lab, node, &kubeconfig, mode.name())?),
        });
    }
    Ok(running)
}

/// The specs' names, as a regular expression.
fn focus(options: &Options) -> String {
    let conformance = if options.all { "" } else { r".*\[Conformance\]" };
    let spec = if options.spec.is_empty() { String::new() } else { format!(".*({})", options.spec) };
    format!(r"\[sig-network\] Services{spec}{conformance}")
}

fn keep_logs(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))?.flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).context("keeping a log")?;
    }
    Ok(())
}
