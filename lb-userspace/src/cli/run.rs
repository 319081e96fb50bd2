//! `fairlead run`: the agent.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

use super::{explain::read_config, pins::Folder};
use crate::{
    agent,
    kernel::{self, Attach, SocketLb},
    plan::node::{NodeOptions, ProxyMode},
    serve,
};

const EXAMPLES: &str = "\
Examples:
  fairlead run --manifests /etc/fairlead/manifests
  fairlead run --manifests ./cluster --hostname-override node-1 --socket-lb all
  fairlead run --manifests ./cluster --config kube-proxy.conf

What happens to packets does not depend on the agent: it may be stopped, killed and upgraded while connections go on.";

/// Read Services and endpoints, and keep the kernel's tables as they say
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// A folder of Kubernetes manifests (YAML, JSON), which is watched
    #[arg(long, value_name = "DIR")]
    manifests: PathBuf,
    /// kube-proxy's configuration file (KubeProxyConfiguration)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The name of this node; the machine's name where nothing is said
    #[arg(long, value_name = "NAME")]
    hostname_override: Option<String>,
    #[command(flatten)]
    folder: Folder,
    /// The cgroup v2 folder whose sockets are translated; the root of the hierarchy where nothing is said
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// How programs are attached to devices
    #[arg(long, value_enum, default_value_t = AttachArg::Auto)]
    attach: AttachArg,
    /// Whose sockets are translated at connect and send: the node's own, pods' too, or nobody's
    #[arg(long, value_enum, default_value_t = SocketLbArg::Host)]
    socket_lb: SocketLbArg,
    /// How many connections are remembered; kube-proxy's defaults for conntrack where nothing is said, at most 524288
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1024..))]
    flows: Option<u32>,
    /// Ports that masqueraded connections leave by
    #[arg(long, value_name = "FIRST-LAST", default_value = "61000-65095", value_parser = ports)]
    masquerade_ports: (u32, u32),
    /// Keep the client's address wherever the endpoint is on this node
    #[arg(long)]
    preserve_client_ip: bool,
    /// How log lines are written
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Which log lines are written: error, warn, info, debug, or a filter of `tracing`
    #[arg(long, value_name = "FILTER", default_value = "info", env = "FAIRLEAD_LOG")]
    log_level: String,
}

/// `--attach`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum AttachArg {
    /// TCX from Linux 6.6, clsact before
    Auto,
    /// TCX links
    Tcx,
    /// Filters of the clsact qdisc
    Clsact,
}

/// `--socket-lb`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum SocketLbArg {
    /// Clients in the node's own network namespace
    Host,
    /// Pods too; service meshes then don't see Services' addresses
    All,
    /// Nobody: clients on the node itself are not served
    Off,
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// For programs
    Json,
}

/// Reads `FIRST-LAST` as first port and number of ports.
fn ports(text: &str) -> Result<(u32, u32)> {
    let (first, last) = text.split_once('-').context("write FIRST-LAST, such as 61000-65095")?;
    let (first, last): (u16, u16) = (first.trim().parse()?, last.trim().parse()?);
    if first < 1024 || last < first {
        bail!("the first port must be at least 1024, and the last no smaller than the first");
    }
    Ok((u32::from(first), u32::from(last - first) + 1))
}

/// Runs the agent until a signal ends it.
pub fn run(args: RunArgs) -> Result<()> {
    log(args.log_format, &args.log_level)?;
    let (mut node_options, config_name) = match &args.config {
        Some(path) => read_config(path)?,
        // Without kube-proxy's configuration there are no defaults of it to keep.
        None => (NodeOptions { mode: ProxyMode::Nftables, ..NodeOptions::default() }, None),
    };
    node_options.preserve_client_ip |= args.preserve_client_ip;
    let node = match args.hostname_override.or(config_name) {
        Some(name) => name,
        None => std::fs::read_to_string("/proc/sys/kernel/hostname").context("--hostname-override is missing")?,
    };
    let (masquerade_first, masquerade_ports) = args.masquerade_ports;
    let mode = node_options.mode;
    let options = agent::Options {
        manifests: args.manifests,
        node: node.trim().to_lowercase(),
        node_options,
        kernel: kernel::Options {
            bpffs: args.folder.bpffs,
            cgroup: args.cgroup,
            attach: match args.attach {
                AttachArg::Auto => Attach::Auto,
                AttachArg::Tcx => Attach::Tcx,
                AttachArg::Clsact => Attach::Clsact,
            },
            socket_lb: match args.socket_lb {
                SocketLbArg::Host => SocketLb::Host,
                SocketLbArg::All => SocketLb::All,
                SocketLbArg::Off => SocketLb::Off,
            },
            flows: args.flows.unwrap_or_else(|| kernel::Options::default().flows),
            masquerade_first,
            masquerade_ports,
        },
        serve: serve::Options { mode, ..serve::Options::default() },
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(agent::run(options))
}

fn log(format: LogFormat, level: &str) -> Result<()> {
    let filter = EnvFilter::try_new(level).with_context(|| format!("--log-level {level}"))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.with_target(false).init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::ports;

    #[test]
    fn a_range_of_ports_is_read_or_refused() {
        assert_eq!(ports("61000-65095").unwrap(), (61_000, 4096));
        assert_eq!(ports("2000-2000").unwrap(), (2000, 1));
        for wrong in ["", "61000", "61000-", "65095-61000", "80-90", "61000-70000"] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }
}
