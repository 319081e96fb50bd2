//! kube-proxy's command line.
//!
//! In: arguments in the syntax of Go's pflag. Out: the [`Config`] that they make, or which of them count beside a file, and
//! what the operator should be told about them. Never here: reading the file.
//!
//! Names, defaults and precedence are those of kube-proxy 1.37 (`kube-proxy.md` §15).

mod syntax;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use clap::Args;

pub use self::syntax::Arguments;
use super::{
    Config, GoDuration,
    defaults::{HEALTHZ_PORT, METRICS_PORT},
    file::KubeProxyConfiguration,
    logging::{Logging, VModule},
    number::{boolean, integer},
    with_port,
};
use crate::{model::address::parse_ip, plan::node::ProxyMode};

/// kube-proxy's flags that stand for fields of its configuration file. With `--config` only `--hostname-override` and those
/// for logging count.
#[derive(Args, Clone, Debug, Default, PartialEq)]
#[command(
    next_help_heading = "kube-proxy's options (with --config only --hostname-override, --master and logging count)"
)]
pub struct Flags {
    /// The name of this node; the machine's name where nothing is said
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// The kubeconfig; without it and --master, the service account of the pod
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<String>,
    /// The API server's address, before what the kubeconfig says
    #[arg(long, value_name = "URL")]
    pub master: Option<String>,
    /// Requests to the API server at once [10]
    #[arg(long, value_name = "NUMBER", value_parser = integer, allow_hyphen_values = true)]
    pub kube_api_burst: Option<i32>,
    /// Requests to the API server a second [5]
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub kube_api_qps: Option<f32>,
    /// Has no effect: JSON is spoken
    #[arg(long, value_name = "TYPE")]
    pub kube_api_content_type: Option<String>,

    /// iptables, ipvs or nftables: whose defaults hold [iptables]
    #[arg(long, value_name = "MODE")]
    pub proxy_mode: Option<String>,
    /// The node's own address; nothing is bound to it [0.0.0.0]
    #[arg(long, value_name = "IP", value_parser = address)]
    pub bind_address: Option<String>,
    /// Where health checks are answered; empty: nowhere [0.0.0.0:10256]
    #[arg(long, value_name = "IP:PORT", value_parser = address_port)]
    pub healthz_bind_address: Option<String>,
    /// Where metrics are served; empty: nowhere [127.0.0.1:10249]
    #[arg(long, value_name = "IP:PORT", value_parser = address_port)]
    pub metrics_bind_address: Option<String>,
    /// End when a port can't be bound
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    pub bind_address_hard_fail: Option<bool>,
    /// Has no effect: there are no Go profiles
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    pub profiling: Option<bool>,
    /// Show the metrics that were hidden since this version
    #[arg(long, value_name = "VERSION")]
    pub show_hidden_metrics_for_version: Option<String>,
    /// kube-proxy's feature gates, NAME=true,…
    #[arg(long, value_name = "GATES")]
    pub feature_gates: Vec<String>,

    /// How local sources are told: ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix [ClusterCIDR]
    #[arg(long, value_name = "MODE")]
    pub detect_local_mode: Option<String>,
    /// Networks of the pods, separated by commas
    #[arg(long, value_name = "CIDRS")]
    pub cluster_cidr: Option<String>,
    /// The bridge that pods are ports of
    #[arg(long, value_name = "NAME")]
    pub pod_bridge_interface: Option<String>,
    /// How the names of the pods' interfaces begin
    #[arg(long, value_name = "PREFIX")]
    pub pod_interface_name_prefix: Option<String>,
    /// Where NodePorts answer: networks, primary, localhost, all [all; nftables and --manifests: primary]
    #[arg(long, value_name = "CIDRS")]
    pub nodeport_addresses: Vec<String>,
    /// Rewrite the source of everything that goes to a ClusterIP
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    pub masquerade_all: Option<bool>,
    /// Whether NodePorts answer on localhost over IPv4 in mode iptables [true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    pub iptables_localhost_nodeports: Option<bool>,
    /// Has no effect: packets are not marked [14]
    #[arg(long, value_name = "BIT", value_parser = integer, allow_hyphen_values = true)]
    pub iptables_masquerade_bit: Option<i32>,
    /// Half of the time after which a change that isn't done counts as a failure [30s]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub iptables_sync_period: Option<GoDuration>,
    /// Has no effect: changes don't wait [1s]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub iptables_min_sync_period: Option<GoDuration>,

    /// As --iptables-sync-period, in mode ipvs [30s]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub ipvs_sync_period: Option<GoDuration>,
    /// Has no effect: changes don't wait [1s]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub ipvs_min_sync_period: Option<GoDuration>,
    /// Has no effect
    #[arg(long, value_name = "NAME")]
    pub ipvs_scheduler: Option<String>,
    /// Has no effect
    #[arg(long, value_name = "CIDRS")]
    pub ipvs_exclude_cidrs: Vec<String>,
    /// Has no effect
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    pub ipvs_strict_arp: Option<bool>,
    /// Has no effect
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub ipvs_tcp_timeout: Option<GoDuration>,
    /// Has no effect
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub ipvs_tcpfin_timeout: Option<GoDuration>,
    /// Has no effect
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub ipvs_udp_timeout: Option<GoDuration>,

    /// How willingly the kernel kills this process [-999]
    #[arg(long, value_name = "NUMBER", value_parser = integer, allow_hyphen_values = true)]
    pub oom_score_adj: Option<i32>,
    /// Entries of connection tracking for each CPU; 0: as it is [32768]
    #[arg(long, value_name = "NUMBER", value_parser = integer, allow_hyphen_values = true)]
    pub conntrack_max_per_core: Option<i32>,
    /// Entries of connection tracking at least [131072]
    #[arg(long, value_name = "NUMBER", value_parser = integer, allow_hyphen_values = true)]
    pub conntrack_min: Option<i32>,
    /// Connection tracking's timeout of idle TCP connections; 0: as it is [24h]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub conntrack_tcp_timeout_established: Option<GoDuration>,
    /// Connection tracking's timeout in the state CLOSE_WAIT; 0: as it is [1h]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub conntrack_tcp_timeout_close_wait: Option<GoDuration>,
    /// Let connection tracking take TCP packets out of the window
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    pub conntrack_tcp_be_liberal: Option<bool>,
    /// Connection tracking's timeout of UDP without an answer; 0: as it is
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub conntrack_udp_timeout: Option<GoDuration>,
    /// Connection tracking's timeout of UDP with answers; 0: as it is
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub conntrack_udp_timeout_stream: Option<GoDuration>,
    /// How often everything known is looked at again [15m]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub config_sync_period: Option<GoDuration>,

    /// Deprecated: see --healthz-bind-address
    #[arg(long, value_name = "PORT", value_parser = integer, allow_hyphen_values = true, hide = true)]
    pub healthz_port: Option<i32>,
    /// Deprecated: see --metrics-bind-address
    #[arg(long, value_name = "PORT", value_parser = integer, allow_hyphen_values = true, hide = true)]
    pub metrics_port: Option<i32>,

    /// How much is logged: from 4 on what happens in detail, from 6 on more
    #[arg(short = 'v', long = "v", value_name = "LEVEL", value_parser = clap::value_parser!(u32).range(0..=0x7fff_ffff))]
    pub verbosity: Option<u32>,
    /// Has no effect: there are no Go files
    #[arg(long, value_name = "PATTERN=LEVEL,…")]
    pub vmodule: Vec<String>,
    /// text or json [text]
    #[arg(long, value_name = "FORMAT")]
    pub logging_format: Option<String>,
    /// Has no effect: lines are not held back [5s]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub log_flush_frequency: Option<GoDuration>,
    /// Has no effect
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean, hide = true)]
    pub log_json_split_stream: Option<bool>,
    /// Has no effect
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean, hide = true)]
    pub log_text_split_stream: Option<bool>,
    /// Has no effect
    #[arg(long, value_name = "SIZE", hide = true)]
    pub log_json_info_buffer_size: Option<String>,
    /// Has no effect
    #[arg(long, value_name = "SIZE", hide = true)]
    pub log_text_info_buffer_size: Option<String>,
}

impl Flags {
    /// What is in force: the file's text if there is one, else the flags. Beside it comes what the operator should know.
    ///
    /// # Errors
    ///
    /// The file can't be read, a list of flags can't, or something of what they say is impossible; all that is, is named.
    pub fn config(&self, file: Option<&str>) -> Result<(Config, Vec<String>)> {
        let (mut config, mut warnings) = match file {
            Some(text) => Config::of_file(text)?,
            None => self.alone()?,
        };
        if file.is_some() {
            warnings.extend(self.ignored_beside_a_file());
            self.logging(&mut config.fields.logging)?;
        }
        if let Some(name) = self.hostname_override.as_deref().filter(|name| !name.is_empty()) {
            let name = name.trim().to_lowercase();
            if name.is_empty() {
                bail!("--hostname-override: there are only spaces in it; write the node's name");
            }
            config.fields.hostname_override = name;
        }
        let problems = config.problems();
        if !problems.is_empty() {
            let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
            bail!("{}", lines.join("\n"));
        }
        Ok((config, warnings))
    }

    /// What flags make without a file.
    fn alone(&self) -> Result<(Config, Vec<String>)> {
        let mut warnings = Vec::new();
        // The defaults are those of an empty file: bindAddress doesn't move the others' as it does in a file.
        let mut config = Config::of(KubeProxyConfiguration::default());
        let fields = &mut config.fields;
        self.logging(&mut fields.logging)?;
        set(&self.proxy_mode, &mut fields.mode);
        set(&self.kubeconfig, &mut fields.client_connection.kubeconfig);
        set(&self.kube_api_content_type, &mut fields.client_connection.content_type);
        set(&self.kube_api_burst, &mut fields.client_connection.burst);
        set(&self.kube_api_qps, &mut fields.client_connection.qps);
        set(&self.bind_address.clone().filter(|text| !text.is_empty()), &mut fields.bind_address);
        set(&self.bind_address_hard_fail, &mut fields.bind_address_hard_fail);
        set(&self.profiling, &mut fields.enable_profiling);
        set(&self.show_hidden_metrics_for_version, &mut fields.show_hidden_metrics_for_version);
        for (flag, port, field, default, name) in [
            (&self.healthz_bind_address, self.healthz_port, &mut fields.healthz_bind_address, HEALTHZ_PORT, "healthz"),
            (&self.metrics_bind_address, self.metrics_port, &mut fields.metrics_bind_address, METRICS_PORT, "metrics"),
        ] {
            if port.is_some() {
                warnings.push(format!("--{name}-port is deprecated; write --{name}-bind-address"));
            }
            set(flag, field);
            match port {
                Some(0) => field.clear(),
                port => *field = with_port(field, port.unwrap_or(default)),
            }
        }
        for (name, value) in pairs("feature-gates", &self.feature_gates)? {
            let value =
                boolean(&value).map_err(|remedy| anyhow::anyhow!("--feature-gates: {name}={value}: {remedy}"))?;
            fields.feature_gates.insert(name, value);
        }
        set(&self.detect_local_mode, &mut fields.detect_local_mode);
        set(&self.cluster_cidr, &mut fields.cluster_cidr);
        set(&self.pod_bridge_interface, &mut fields.detect_local.bridge_interface);
        set(&self.pod_interface_name_prefix, &mut fields.detect_local.interface_name_prefix);
        set_list(&self.nodeport_addresses, &mut fields.node_port_addresses);
        set_some(self.iptables_localhost_nodeports, &mut fields.iptables.localhost_node_ports);
        set_some(self.iptables_masquerade_bit, &mut fields.iptables.masquerade_bit);
        self.ipvs_and_conntrack(fields);
        set(&self.masquerade_all, &mut config.masquerade_all);
        let (sync, min) = if config.mode() == ProxyMode::Ipvs {
            (&self.ipvs_sync_period, &self.ipvs_min_sync_period)
        } else {
            (&self.iptables_sync_period, &self.iptables_min_sync_period)
        };
        set(sync, &mut config.sync_period);
        set(min, &mut config.min_sync_period);
        warnings.extend(config.fields.without_effect());
        Ok((config.completed(), warnings))
    }

    fn ipvs_and_conntrack(&self, fields: &mut KubeProxyConfiguration) {
        let ipvs = &mut fields.ipvs;
        set(&self.ipvs_scheduler, &mut ipvs.scheduler);
        set_list(&self.ipvs_exclude_cidrs, &mut ipvs.exclude_cidrs);
        set(&self.ipvs_strict_arp, &mut ipvs.strict_arp);
        set(&self.ipvs_tcp_timeout, &mut ipvs.tcp_timeout);
        set(&self.ipvs_tcpfin_timeout, &mut ipvs.tcp_fin_timeout);
        set(&self.ipvs_udp_timeout, &mut ipvs.udp_timeout);
        set_some(self.oom_score_adj, &mut fields.oom_score_adj);
        let conntrack = &mut fields.conntrack;
        set_some(self.conntrack_max_per_core, &mut conntrack.max_per_core);
        set_some(self.conntrack_min, &mut conntrack.min);
        set_some(self.conntrack_tcp_timeout_established, &mut conntrack.tcp_established_timeout);
        set_some(self.conntrack_tcp_timeout_close_wait, &mut conntrack.tcp_close_wait_timeout);
        set(&self.conntrack_tcp_be_liberal, &mut conntrack.tcp_be_liberal);
        set(&self.conntrack_udp_timeout, &mut conntrack.udp_timeout);
        set(&self.conntrack_udp_timeout_stream, &mut conntrack.udp_stream_timeout);
        set(&self.config_sync_period, &mut fields.config_sync_period);
    }

    /// Logging flags go before what the file says.
    fn logging(&self, logging: &mut Logging) -> Result<()> {
        set(&self.verbosity, &mut logging.verbosity);
        set(&self.logging_format, &mut logging.format);
        if let Some(duration) = self.log_flush_frequency {
            logging.flush_frequency.duration = duration;
        }
        for (routing, split, size) in [
            (&mut logging.options.json, self.log_json_split_stream, &self.log_json_info_buffer_size),
            (&mut logging.options.text, self.log_text_split_stream, &self.log_text_info_buffer_size),
        ] {
            set(&split, &mut routing.split_stream);
            set(size, &mut routing.info_buffer_size);
        }
        let mut items = Vec::new();
        for (file_pattern, level) in pairs("vmodule", &self.vmodule)? {
            let verbosity =
                level.parse().with_context(|| format!("--vmodule: {file_pattern}={level}: write a level from 0"))?;
            items.push(VModule { file_pattern, verbosity });
        }
        items.append(&mut logging.vmodule);
        logging.vmodule = items;
        Ok(())
    }

    /// Flags that were given and don't count, in a sentence.
    fn ignored_beside_a_file(&self) -> Option<String> {
        let counted = Self {
            hostname_override: self.hostname_override.clone(),
            master: self.master.clone(),
            verbosity: self.verbosity,
            vmodule: self.vmodule.clone(),
            logging_format: self.logging_format.clone(),
            log_flush_frequency: self.log_flush_frequency,
            log_json_split_stream: self.log_json_split_stream,
            log_text_split_stream: self.log_text_split_stream,
            log_json_info_buffer_size: self.log_json_info_buffer_size.clone(),
            log_text_info_buffer_size: self.log_text_info_buffer_size.clone(),
            ..Self::default()
        };
        (counted != *self).then(|| {
            "--config is given, so only --hostname-override, --master and the flags for logging count beside it; \
             write the others into the file"
                .to_owned()
        })
    }
}

fn set<T: Clone>(flag: &Option<T>, field: &mut T) {
    if let Some(value) = flag {
        field.clone_from(value);
    }
}

fn set_some<T>(flag: Option<T>, field: &mut Option<T>) {
    if flag.is_some() {
        *field = flag;
    }
}

/// A list that is given by commas, by repetition, or by both.
fn set_list(flag: &[String], field: &mut Option<Vec<String>>) {
    if !flag.is_empty() {
        let items = flag.iter().filter(|text| !text.is_empty()).flat_map(|text| text.split(','));
        *field = Some(items.map(ToOwned::to_owned).collect());
    }
}

/// `name=value` by commas, by repetition, or by both; the last one of a name counts.
fn pairs(flag: &str, texts: &[String]) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for text in texts.iter().flat_map(|text| text.split(',')).filter(|text| !text.is_empty()) {
        let (name, value) =
            text.split_once('=').with_context(|| format!("--{flag}: `{text}` has no `=`; write NAME=VALUE"))?;
        found.insert(name.trim().to_owned(), value.trim().to_owned());
    }
    Ok(found)
}

fn address(text: &str) -> Result<String, String> {
    if text.is_empty() || parse_ip(text).is_some() {
        return Ok(text.to_owned());
    }
    Err("write an IP address".to_owned())
}

fn address_port(text: &str) -> Result<String, String> {
    let port = |port: &str| port.parse::<u16>().is_ok();
    let split = super::split_host_port(text).is_some_and(|(host, number)| parse_ip(host).is_some() && port(number));
    if text.is_empty() || parse_ip(text).is_some() || split {
        return Ok(text.to_owned());
    }
    Err("write an IP address, with or without a port: 0.0.0.0:10256, [::]:10256".to_owned())
}

#[cfg(test)]
mod tests;
