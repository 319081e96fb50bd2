//! `fairlead run`: the agent.

mod follow;

use std::{
    io::{IsTerminal as _, stderr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use clap::{ArgAction, Args, ValueEnum};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;

use self::follow::{Follow, begin_anew};
use super::{pins::Folder, print_version};
use crate::{
    agent,
    config::{Config, boolean, flags::Flags},
    kernel::{self, Attach, Mark, SocketLb, maps::DEFAULT_AFFINITIES, sysctls::Conntrack},
    plan::node::LocalDetector,
    serve,
    source::{Place, api},
};

const EXAMPLES: &str = "\
Examples:
  fairlead run --manifests /etc/fairlead/manifests
  fairlead run --manifests ./cluster --hostname-override node-1 --socket-lb all
  fairlead run --manifests ./cluster --config kube-proxy.conf
  fairlead run --config /var/lib/kube-proxy/config.conf --hostname-override node-1
  kube-proxy --kubeconfig /etc/kubernetes/kube-proxy.conf --cluster-cidr 10.244.0.0/16 -v=2

Without a subcommand, or called as kube-proxy, fairlead is `fairlead run`. All of kube-proxy's options are taken, in its
syntax: --bool, --bool=false, --some_name for --some-name, -v=2; the last one of several counts.
What happens to packets does not depend on the agent: it may be stopped, killed and upgraded while connections go on.";

/// Read Services and endpoints, and keep the kernel's tables as they say
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES, args_override_self = true)]
pub struct RunArgs {
    /// A folder of Kubernetes manifests (YAML, JSON), which is watched, instead of an API server
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "master", "endpoints"])]
    manifests: Option<PathBuf>,
    /// Where an API server's endpoints come from
    #[arg(long, value_enum, default_value_t = EndpointsArg::EndpointSlice)]
    endpoints: EndpointsArg,
    /// kube-proxy's configuration file (KubeProxyConfiguration)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Write the configuration in force to this file, and end
    #[arg(long, value_name = "FILE")]
    write_config_to: Option<PathBuf>,
    /// Remove every trace of us and of kube-proxy from the kernel, and end
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, action = ArgAction::Set)]
    cleanup: bool,
    /// Do only what needs all privileges, and end
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, action = ArgAction::Set)]
    init_only: bool,
    /// Print the version, and end
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = asks_version, action = ArgAction::Set)]
    version: bool,
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
    /// How many clients of Services with session affinity are remembered, once for each Service port that they use
    #[arg(long, value_name = "NUMBER", default_value_t = DEFAULT_AFFINITIES, value_parser = clap::value_parser!(u32).range(1024..))]
    affinities: u32,
    /// Ports that masqueraded connections leave by
    #[arg(long, value_name = "FIRST-LAST", default_value = "61000-65095", value_parser = ports)]
    masquerade_ports: (u32, u32),
    /// Mark answers to clients outside as they come from their pod, so that a rule of policy routing can send them back where the
    /// requests came from; like 0x80/0x80. Clients inside are told by --detect-local-mode
    #[arg(long, value_name = "VALUE[/MASK]", value_parser = mark)]
    reply_mark: Option<Mark>,
    /// Count connections, packets and bytes of every Service port, for /metrics
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true", value_parser = boolean, action = ArgAction::Set)]
    service_metrics: bool,
    /// Keep the client's address wherever the endpoint is on this node
    #[arg(long)]
    preserve_client_ip: bool,
    /// Reset TCP connections when their endpoint is no longer one of the Service's, ready or terminating but still serving;
    /// without, they go on as long as the endpoint answers
    #[arg(long)]
    terminate_connections: bool,
    /// How log lines are written; goes before --logging-format
    #[arg(long, value_enum)]
    log_format: Option<LogFormat>,
    /// Which log lines are written: error, warn, info, debug, or a filter of `tracing`; goes before -v
    #[arg(long, value_name = "FILTER", env = "FAIRLEAD_LOG")]
    log_level: Option<String>,
    /// What the kernel programs log: 0 nothing, 3 refusals and drops, 4 translated packets too, 5 every packet; what --log-level
    /// leaves out is not written
    #[cfg(feature = "program-log")]
    #[arg(long, value_name = "LEVEL", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=5))]
    program_log: u8,
    #[command(flatten)]
    flags: Flags,
    #[arg(hide = true)]
    rest: Vec<String>,
}

/// `--endpoints`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum EndpointsArg {
    /// EndpointSlices, which the cluster's controllers make
    #[value(name = "endpointslice")]
    EndpointSlice,
    /// Pods whose labels a Service selects, for clusters without those controllers
    PodSelector,
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

/// `--version=raw` and `--version=v1.2.3` ask for it, too.
fn asks_version(text: &str) -> Result<bool, String> {
    if text == "raw" || text.starts_with('v') { Ok(true) } else { boolean(text) }
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

/// Reads `VALUE` or `VALUE/MASK`, hexadecimal behind `0x`; without a mask the whole mark is the value.
fn mark(text: &str) -> Result<Mark> {
    let number = |text: &str| {
        let text = text.trim();
        match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => text.parse(),
        }
        .with_context(|| format!("{text:?} is no number; write VALUE/MASK, such as 0x80/0x80"))
    };
    let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
    let mark = Mark { value: number(value)?, mask: number(mask)? };
    if mark.mask == 0 || mark.value & !mark.mask != 0 {
        bail!("the value has bits that the mask has not, or the mask has none");
    }
    Ok(mark)
}

/// Runs the agent until a signal ends it, or does the one thing that is asked for.
pub fn run(args: RunArgs, gone: &[String]) -> Result<()> {
    if args.version {
        print_version();
        return Ok(());
    }
    if let Some(text) = args.rest.iter().find(|text| !text.is_empty()) {
        bail!("`{text}` is no option; `fairlead help` lists the subcommands, `fairlead run --help` the options");
    }
    let (config, warnings) = args.read_config()?;
    let file = args.config.clone().map(|path| (path, config.clone()));
    log(&args, &config)?;
    for name in gone {
        warn!("--{name} has no effect any more; leave it out");
    }
    for warning in warnings {
        warn!("{warning}");
    }
    if let Some(path) = &args.write_config_to {
        std::fs::write(path, config.to_yaml()).with_context(|| format!("--write-config-to {}", path.display()))?;
        info!(file = %path.display(), "the configuration is written");
        return Ok(());
    }
    if args.cleanup {
        return cleanup(&args.folder);
    }
    if args.init_only {
        init(&args.options(config)?);
        return Ok(());
    }
    args.set_oom_score(&config);
    let flags = args.flags.clone();
    let options = args.options(config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let anew = runtime.block_on(async {
        let Some((path, config)) = file else { return agent::run(options).await.map(|()| false) };
        let mut follow = Follow::begin(&path, config)?;
        tokio::select! {
            result = agent::run(options) => result.map(|()| false),
            () = follow.changed(&flags) => Ok(true),
        }
    })?;
    if anew { begin_anew() } else { Ok(()) }
}

/// What needs rights that the agent can do without later: to write below `/proc/sys`. What fails doesn't keep the rest, nor the agent.
fn init(options: &agent::Options) {
    for problem in options.conntrack.iter().flat_map(|conntrack| conntrack.apply(Path::new("/"))) {
        warn!("{problem}");
    }
    if let Err(error) = kernel::reserve_ports(&options.kernel) {
        warn!("{error:#}");
    }
    info!("what needs all privileges is done");
}

/// Removes ours and kube-proxy's; what is left of one doesn't keep the other.
fn cleanup(folder: &Folder) -> Result<()> {
    let ours = kernel::cleanup::cleanup(&folder.bpffs);
    for removed in kernel::kube_proxy::remove()? {
        info!("removed: {removed}");
    }
    ours
}

impl RunArgs {
    /// The configuration in force, and what is to be said about it.
    fn read_config(&self) -> Result<(Config, Vec<String>)> {
        let (mut config, warnings) = read_config(self.config.as_deref(), &self.flags)?;
        let said = self.config.is_some() || self.flags.proxy_mode.is_some();
        if self.manifests.is_some() && !said && config.fields.node_port_addresses.is_none() {
            // Without kube-proxy's configuration there are no defaults of it to keep.
            config.fields.node_port_addresses = Some(vec!["primary".to_owned()]);
        }
        Ok((config, warnings))
    }

    /// conntrack's settings; a folder of manifests without kube-proxy's configuration has none to keep.
    fn conntrack(&self, config: &Config) -> Option<Conntrack> {
        (self.manifests.is_none() || self.config.is_some()).then(|| config.conntrack())
    }

    /// Whom the kernel's out-of-memory killer spares (`oomScoreAdj`). Lowering it takes `CAP_SYS_RESOURCE`, without which kube-proxy
    /// goes on, too.
    fn set_oom_score(&self, config: &Config) {
        let wanted = self.manifests.is_none() || self.config.is_some();
        let Some(score) = config.fields.oom_score_adj.filter(|_| wanted) else { return };
        if let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
            info!(score, %error, "oomScoreAdj can't be set");
        }
    }

    /// The flags that say where things are, where they were given: for `/flagz`.
    fn given_flags(&self) -> Vec<(String, String)> {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let flags = &self.flags;
        [
            ("config", path(&self.config)),
            ("manifests", path(&self.manifests)),
            ("hostname-override", flags.hostname_override.clone()),
            ("kubeconfig", flags.kubeconfig.clone()),
            ("master", flags.master.clone()),
            ("proxy-mode", flags.proxy_mode.clone()),
            ("healthz-bind-address", flags.healthz_bind_address.clone()),
            ("metrics-bind-address", flags.metrics_bind_address.clone()),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
    }

    fn options(self, config: Config) -> Result<agent::Options> {
        let node = match config.node_name() {
            Some(name) => name,
            None => std::fs::read_to_string("/proc/sys/kernel/hostname").context("--hostname-override is missing")?,
        };
        let mut node_options = config.node_options();
        node_options.preserve_client_ip |= self.preserve_client_ip;
        let (masquerade_first, masquerade_ports) = self.masquerade_ports;
        let node = node.trim().to_lowercase();
        let (flags, conntrack) = (self.given_flags(), self.conntrack(&config));
        // Beside a file kube-proxy doesn't look at --kubeconfig. Where the file names none, we do.
        let kubeconfig = Some(config.fields.client_connection.kubeconfig.clone()).filter(|path| !path.is_empty());
        let source = match self.manifests {
            Some(dir) => Place::Manifests(dir),
            None => Place::ApiServer(api::Options {
                address: api::Address {
                    kubeconfig: kubeconfig.or(self.flags.kubeconfig).map(PathBuf::from),
                    master: self.flags.master,
                },
                endpoints: match self.endpoints {
                    EndpointsArg::EndpointSlice => api::Endpoints::EndpointSlice,
                    EndpointsArg::PodSelector => api::Endpoints::PodSelector,
                },
                node: node.clone(),
                pod_cidrs: node_options.detector == LocalDetector::NodeCidr,
            }),
        };
        Ok(agent::Options {
            source,
            node,
            node_options,
            serve: serve::Options {
                healthz: config.healthz_address(),
                metrics: config.metrics_address(),
                mode: config.mode(),
                configuration: config.to_json(),
                flags,
                hard_fail: config.fields.bind_address_hard_fail,
                sync_period: config.sync_period.time(),
                service_metrics: self.service_metrics,
            },
            config,
            conntrack,
            kernel: kernel::Options {
                bpffs: self.folder.bpffs,
                cgroup: self.cgroup,
                attach: match self.attach {
                    AttachArg::Auto => Attach::Auto,
                    AttachArg::Tcx => Attach::Tcx,
                    AttachArg::Clsact => Attach::Clsact,
                },
                socket_lb: match self.socket_lb {
                    SocketLbArg::Host => SocketLb::Host,
                    SocketLbArg::All => SocketLb::All,
                    SocketLbArg::Off => SocketLb::Off,
                },
                affinities: self.affinities,
                flows: self.flows.unwrap_or_else(|| kernel::Options::default().flows),
                masquerade_first,
                masquerade_ports,
                reply_mark: self.reply_mark.unwrap_or_default(),
                terminate_connections: self.terminate_connections,
                #[cfg(feature = "program-log")]
                program_log: self.program_log,
                count_services: self.service_metrics,
            },
        })
    }
}

/// What a configuration file and flags say.
pub(super) fn read_config(path: Option<&Path>, flags: &Flags) -> Result<(Config, Vec<String>)> {
    let Some(path) = path else { return flags.config(None) };
    let text = std::fs::read_to_string(path).with_context(|| format!("{} can't be read", path.display()))?;
    let (config, warnings) = flags.config(Some(&text)).with_context(|| path.display().to_string())?;
    Ok((config, warnings.into_iter().map(|warning| format!("{}: {warning}", path.display())).collect()))
}

fn log(args: &RunArgs, config: &Config) -> Result<()> {
    // kube-proxy is quiet at 0 and usually run at 2; what it says from 4 on is what `debug` says here.
    let verbosity = match config.fields.logging.verbosity {
        ..=3 => "info",
        4..=5 => "debug",
        _ => "trace",
    };
    let level = args.log_level.as_deref().unwrap_or(verbosity);
    // What kube's client has to say, the source says in the words of an operator.
    let filter = EnvFilter::try_new(format!("kube_client=off,kube_runtime=off,{level}"))
        .with_context(|| format!("--log-level {level}"))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr).with_ansi(stderr().is_terminal());
    let format = if config.fields.logging.format == "json" { LogFormat::Json } else { LogFormat::Text };
    match args.log_format.unwrap_or(format) {
        LogFormat::Text => lines.with_target(false).init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Mark, mark, ports};

    #[test]
    fn a_range_of_ports_is_read_or_refused() {
        assert_eq!(ports("61000-65095").unwrap(), (61_000, 4096));
        assert_eq!(ports("2000-2000").unwrap(), (2000, 1));
        for wrong in ["", "61000", "61000-", "65095-61000", "80-90", "61000-70000"] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_mark_is_read_with_its_mask_or_refused() {
        let cases = [
            ("0x80/0x80", Some((0x80, 0x80))),
            ("128/0xf0", Some((0x80, 0xf0))),
            ("0/0x80", Some((0, 0x80))),
            ("5", Some((5, u32::MAX))),
            ("0x1/0xffffffff", Some((1, u32::MAX))),
            ("", None),
            ("/0x80", None),
            ("0x80/", None),
            ("0x80/0", None),
            ("0x81/0x80", None),
            ("-1", None),
            ("0x100000000", None),
            ("mark", None),
        ];
        for (text, expected) in cases {
            assert_eq!(mark(text).ok(), expected.map(|(value, mask)| Mark { value, mask }), "{text:?}");
        }
    }
}
