//! What can't be: values that kube-proxy refuses to start with, and settings that mean nothing here.
//!
//! In: a [`Config`], a file. Out: [`Problem`]s with the names that the fields have in the file, and sentences.

use crate::{
    model::address::{parse_cidr, parse_ip},
    plan::{Problem, node::ProxyMode},
};

use super::{Config, GoDuration, KubeProxyConfiguration, file::KIND, mode_of, split_host_port};

/// Collects.
#[derive(Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn push(&mut self, field: &str, message: String, remedy: &str) {
        let (object, remedy) = (KIND.to_owned(), remedy.to_owned());
        self.0.push(Problem { object, field: field.to_owned(), message, remedy });
    }

    fn range(&mut self, field: &str, value: Option<i32>, min: i32, max: i32) {
        if let Some(value) = value.filter(|value| !(min..=max).contains(value)) {
            let limit = if max == i32::MAX { format!("of {min} or more") } else { format!("from {min} to {max}") };
            self.push(field, format!("{value} is out of range"), &format!("write a number {limit}"));
        }
    }

    fn time(&mut self, field: &str, value: GoDuration, least: GoDuration) {
        if value < least {
            let remedy = if least.is_zero() { "write 0s or more" } else { "write more than 0s" };
            self.push(field, format!("{value} is too short"), remedy);
        }
    }

    fn cidrs<'a>(&mut self, field: &str, texts: impl Iterator<Item = &'a str>) -> usize {
        let mut v4 = 0;
        for (index, text) in texts.enumerate() {
            match parse_cidr(text) {
                Some(net) => v4 += usize::from(net.addr().is_ipv4()),
                None => {
                    let message = format!("`{text}` is not a network");
                    self.push(&format!("{field}[{index}]"), message, "write it like 10.244.0.0/16 or fd00:10:244::/56");
                }
            }
        }
        v4
    }

    fn host_port(&mut self, field: &str, text: &str) {
        // Off: only flags can say that.
        if text.is_empty() {
            return;
        }
        let parsed = split_host_port(text).and_then(|(host, port)| {
            parse_ip(host)?;
            port.parse::<u16>().ok().filter(|port| *port != 0)
        });
        if parsed.is_none() {
            let message = format!("`{text}` is not an IP address with a port");
            self.push(field, message, "write it like 0.0.0.0:10256 or [::]:10256");
        }
    }
}

impl Config {
    /// Everything that kube-proxy would refuse to start with.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Problems::default();
        let fields = &self.fields;
        self.mode_problems(&mut problems);
        self.detector_problems(&mut problems);
        self.addresses_problems(&mut problems);
        self.logging_problems(&mut problems);
        problems.range("oomScoreAdj", fields.oom_score_adj, -1000, 1000);
        problems.range("clientConnection.burst", Some(fields.client_connection.burst), 0, i32::MAX);
        let conntrack = &fields.conntrack;
        problems.range("conntrack.maxPerCore", conntrack.max_per_core, 0, i32::MAX);
        problems.range("conntrack.min", conntrack.min, 0, i32::MAX);
        for (field, value) in [
            ("conntrack.tcpEstablishedTimeout", conntrack.tcp_established_timeout.unwrap_or_default()),
            ("conntrack.tcpCloseWaitTimeout", conntrack.tcp_close_wait_timeout.unwrap_or_default()),
            ("conntrack.udpTimeout", conntrack.udp_timeout),
            ("conntrack.udpStreamTimeout", conntrack.udp_stream_timeout),
        ] {
            problems.time(field, value, GoDuration::ZERO);
        }
        problems.time("configSyncPeriod", fields.config_sync_period, GoDuration(1));
        let version = &fields.show_hidden_metrics_for_version;
        let numbers = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !version.is_empty()
            && !version.split_once('.').is_some_and(|(major, minor)| numbers(major) && numbers(minor))
        {
            problems.push("showHiddenMetricsForVersion", format!("`{version}` is no version"), "write it like 1.36");
        }
        problems.0
    }

    fn mode_problems(&self, problems: &mut Problems) {
        let fields = &self.fields;
        let mode = mode_of(&fields.mode);
        if mode.is_none() {
            let message = format!("`{}` is no mode of kube-proxy on Linux", fields.mode);
            problems.push("mode", message, "write iptables, ipvs or nftables, or leave it empty for iptables");
        }
        let gate = |name: &str| fields.feature_gates.get(name).copied();
        problems.range("iptables.masqueradeBit", fields.iptables.masquerade_bit, 0, 31);
        let section = match mode {
            Some(ProxyMode::Ipvs) => {
                if gate("KubeProxyIPVS") == Some(false) {
                    let message = "is ipvs, which featureGates.KubeProxyIPVS switches off".to_owned();
                    problems.push("mode", message, "write iptables or nftables");
                }
                let ipvs = &fields.ipvs;
                problems.time("ipvs.tcpTimeout", ipvs.tcp_timeout, GoDuration::ZERO);
                problems.time("ipvs.tcpFinTimeout", ipvs.tcp_fin_timeout, GoDuration::ZERO);
                problems.time("ipvs.udpTimeout", ipvs.udp_timeout, GoDuration::ZERO);
                problems.cidrs("ipvs.excludeCIDRs", ipvs.exclude_cidrs.iter().flatten().map(String::as_str));
                "ipvs"
            }
            Some(ProxyMode::Nftables) => {
                problems.range("nftables.masqueradeBit", fields.nftables.masquerade_bit, 0, 31);
                "nftables"
            }
            Some(ProxyMode::Iptables) | None => "iptables",
        };
        problems.time(&format!("{section}.syncPeriod"), self.sync_period, GoDuration(1));
        problems.time(&format!("{section}.minSyncPeriod"), self.min_sync_period, GoDuration::ZERO);
        if self.min_sync_period > self.sync_period {
            let message = format!("{} is more than syncPeriod, {}", self.min_sync_period, self.sync_period);
            problems.push(&format!("{section}.minSyncPeriod"), message, "write no more than syncPeriod");
        }
    }

    fn detector_problems(&self, problems: &mut Problems) {
        let local = &self.fields.detect_local;
        let mode = self.fields.detect_local_mode.as_str();
        let (name, field) = match mode {
            "ClusterCIDR" => {
                let count = self.cluster_cidrs().count();
                let v4 = problems.cidrs("clusterCIDR", self.cluster_cidrs());
                if count > 2
                    || count == 2 && v4 != 1 && problems.0.iter().all(|it| !it.field.starts_with("clusterCIDR"))
                {
                    let message = "is neither one network nor one of each IP family".to_owned();
                    problems.push("clusterCIDR", message, "write it like 10.244.0.0/16,fd00:10:244::/56");
                }
                return;
            }
            "NodeCIDR" => return,
            "BridgeInterface" => (&local.bridge_interface, "detectLocal.bridgeInterface"),
            "InterfaceNamePrefix" => (&local.interface_name_prefix, "detectLocal.interfaceNamePrefix"),
            other => {
                let remedy = "write ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix";
                problems.push("detectLocalMode", format!("`{other}` is not known"), remedy);
                return;
            }
        };
        if name.is_empty() {
            problems.push(field, format!("is empty, although detectLocalMode is {mode}"), "name the interface");
        }
    }

    fn addresses_problems(&self, problems: &mut Problems) {
        let fields = &self.fields;
        if parse_ip(&fields.bind_address).is_none() {
            let message = format!("`{}` is not an IP address", fields.bind_address);
            problems.push("bindAddress", message, "write the node's address, or 0.0.0.0");
        }
        problems.host_port("healthzBindAddress", &fields.healthz_bind_address);
        problems.host_port("metricsBindAddress", &fields.metrics_bind_address);
        let entries = fields.node_port_addresses.as_deref().unwrap_or_default();
        for (index, entry) in entries.iter().enumerate() {
            let field = format!("nodePortAddresses[{index}]");
            let keyword = ["primary", "localhost", "all"].contains(&entry.as_str());
            if keyword && entries[..index].contains(entry) {
                problems.push(&field, format!("`{entry}` stands there twice"), "remove one of the two");
            } else if !keyword && parse_cidr(entry).is_none() {
                let message = format!("`{entry}` is neither a network nor a keyword");
                problems.push(&field, message, "write it like 192.168.0.0/24, or primary, localhost or all");
            }
        }
    }

    fn logging_problems(&self, problems: &mut Problems) {
        let logging = &self.fields.logging;
        problems.time("logging.flushFrequency", logging.flush_frequency.duration, GoDuration(1));
        if !["text", "json"].contains(&logging.format.as_str()) {
            problems.push("logging.format", format!("`{}` is not known", logging.format), "write text or json");
        }
        let limit = i32::MAX.unsigned_abs();
        if logging.verbosity > limit {
            problems.push("logging.verbosity", format!("{} is out of range", logging.verbosity), "write 0 to 10");
        }
        if !logging.vmodule.is_empty() && logging.format != "text" {
            problems.push("logging.vmodule", "is there, although logging.format is not text".to_owned(), "remove it");
        }
        for (index, item) in logging.vmodule.iter().enumerate() {
            if item.file_pattern.is_empty() || item.file_pattern.contains(['=', ',']) || item.verbosity > limit {
                let message = format!("`{}={}` is no pattern with a level", item.file_pattern, item.verbosity);
                problems.push(&format!("logging.vmodule[{index}]"), message, "write filePattern and verbosity");
            }
        }
        let gate = |name: &str| self.fields.feature_gates.get(name).copied();
        let alpha = gate("LoggingAlphaOptions").or_else(|| gate("AllAlpha")).unwrap_or(false);
        for (name, routing) in [("json", &logging.options.json), ("text", &logging.options.text)] {
            for (field, set) in [
                ("splitStream", routing.split_stream),
                ("infoBufferSize", !["", "0"].contains(&routing.info_buffer_size.as_str())),
            ] {
                if set && !alpha {
                    let message = "needs the feature gate LoggingAlphaOptions".to_owned();
                    problems.push(&format!("logging.options.{name}.{field}"), message, "remove it");
                }
            }
        }
    }
}

impl KubeProxyConfiguration {
    /// Settings that are read, and change nothing here: a sentence for all of them.
    pub(super) fn without_effect(&self) -> Option<String> {
        let plain = Self::default();
        let ipvs = &self.ipvs;
        let mut names: Vec<String> = [
            ("enableProfiling", self.enable_profiling),
            ("portRange", !self.port_range.is_empty()),
            ("ipvs.scheduler", !ipvs.scheduler.is_empty()),
            ("ipvs.excludeCIDRs", ipvs.exclude_cidrs.as_ref().is_some_and(|list| !list.is_empty())),
            ("ipvs.strictARP", ipvs.strict_arp),
            ("ipvs.tcpTimeout", !ipvs.tcp_timeout.is_zero()),
            ("ipvs.tcpFinTimeout", !ipvs.tcp_fin_timeout.is_zero()),
            ("ipvs.udpTimeout", !ipvs.udp_timeout.is_zero()),
            ("winkernel", self.winkernel != plain.winkernel),
            ("windowsRunAsService", self.windows_run_as_service),
            ("logging.vmodule", !self.logging.vmodule.is_empty()),
            ("logging.options", self.logging.options != plain.logging.options),
        ]
        .into_iter()
        .filter(|(_, set)| *set)
        .map(|(name, _)| name.to_owned())
        .collect();
        names.extend(self.feature_gates.keys().map(|name| format!("featureGates.{name}")));
        (!names.is_empty()).then(|| format!("without effect here: {}", names.join(", ")))
    }
}
