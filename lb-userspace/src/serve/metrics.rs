//! kube-proxy's metrics, by its names, with its meaning (`kube-proxy.md` §14).
//!
//! In: what the agent does, as it does it. Out: the text that Prometheus reads. Never here: numbers that are read from the
//! machine when somebody asks ([`process`], [`kernel`]).
//!
//! The crate `prometheus` writes format 0.0.4 as Go's client does; `prometheus-client` writes OpenMetrics, in which counters
//! and the end of the text look otherwise.

mod kernel;
mod process;
mod services;

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use prometheus::{
    Encoder as _, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder, core::Collector, exponential_buckets,
};

pub(super) use self::process::start_time;
use self::{kernel::Kernel, process::Process};
use super::health::Family;
use crate::{kernel::tables::Statistics, plan::node::ProxyMode};

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    sync: HistogramVec,
    full: Option<HistogramVec>,
    partial: Option<HistogramVec>,
    last: GaugeVec,
    last_queued: GaugeVec,
    programming: HistogramVec,
    endpoint_changes: IntCounter,
    endpoint_changes_pending: IntGauge,
    service_changes: IntCounter,
    service_changes_pending: IntGauge,
    no_local_endpoints: IntGaugeVec,
    healthz: IntCounterVec,
    livez: IntCounterVec,
    failures: IntCounterVec,
    effective: Histogram,
    calls: IntCounter,
    entries: IntCounter,
    bytes: IntCounter,
    growths: IntCounter,
    written: Mutex<Statistics>,
    process: Process,
    kernel: Kernel,
}

/// Makes metrics and puts them into a registry.
struct Maker(Registry);

impl Maker {
    fn add<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter> {
        self.add(IntCounter::new(name, help)?)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<Gauge> {
        self.add(Gauge::new(name, help)?)
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec> {
        self.add(GaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn int_gauge(&self, name: &str, help: &str) -> Result<IntGauge> {
        self.add(IntGauge::new(name, help)?)
    }

    fn int_gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    /// A histogram of times, with the buckets of kube-proxy's own.
    fn times(&self, name: &str, help: &str) -> Result<HistogramVec> {
        self.histograms(name, help, exponential_buckets(0.001, 2.0, 15)?)
    }

    fn histograms(&self, name: &str, help: &str, buckets: Vec<f64>) -> Result<HistogramVec> {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), &["ip_family"])?)
    }
}

/// 0 (kube-proxy merges its lists onto one 0), 0.25, 0.5, 1 to 59 by 1, 60 to 115 by 5, 120 to 300 by 30 seconds.
fn programming_buckets() -> Vec<f64> {
    let steps = |first: u32, step: usize, last: u32| (first..=last).step_by(step).map(f64::from);
    [0.0, 0.25, 0.5].into_iter().chain(steps(1, 1, 59)).chain(steps(60, 5, 115)).chain(steps(120, 30, 300)).collect()
}

impl Metrics {
    /// The metrics that kube-proxy has in this mode, and ours. `bpffs` is where the tables are read when somebody asks;
    /// `services` is whether the programs count by Service port.
    ///
    /// # Errors
    ///
    /// When two of them have one name, which no input leads to.
    pub fn new(mode: ProxyMode, bpffs: PathBuf, services: bool) -> Result<Self> {
        let maker = Maker(Registry::new());
        let of_family = &["ip_family"];
        let family_rules = mode != ProxyMode::Ipvs;
        let times = |wanted: bool, name: &str, help: &str| wanted.then(|| maker.times(name, help)).transpose();
        let failures = match mode {
            ProxyMode::Iptables | ProxyMode::Ipvs => (
                "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
                "[ALPHA] Cumulative proxy iptables restore failures",
            ),
            ProxyMode::Nftables => (
                "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
                "[ALPHA] Cumulative proxy nftables sync failures",
            ),
        };
        let metrics = Self {
            sync: maker
                .times("kubeproxy_sync_proxy_rules_duration_seconds", "[ALPHA] SyncProxyRules latency in seconds")?,
            full: times(
                family_rules,
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "[ALPHA] SyncProxyRules latency in seconds for full resyncs",
            )?,
            partial: times(
                family_rules,
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "[ALPHA] SyncProxyRules latency in seconds for partial resyncs",
            )?,
            last: maker.gauges(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "[ALPHA] The last time proxy rules were successfully synced",
                of_family,
            )?,
            last_queued: maker.gauges(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "[ALPHA] The last time a sync of proxy rules was queued",
                of_family,
            )?,
            programming: maker.histograms(
                "kubeproxy_network_programming_duration_seconds",
                "[ALPHA] In Cluster Network Programming Latency in seconds",
                programming_buckets(),
            )?,
            endpoint_changes: maker.counter(
                "kubeproxy_sync_proxy_rules_endpoint_changes_total",
                "[ALPHA] Cumulative proxy rules Endpoint changes",
            )?,
            endpoint_changes_pending: maker.int_gauge(
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                "[ALPHA] Pending proxy rules Endpoint changes",
            )?,
            service_changes: maker.counter(
                "kubeproxy_sync_proxy_rules_service_changes_total",
                "[ALPHA] Cumulative proxy rules Service changes",
            )?,
            service_changes_pending: maker.int_gauge(
                "kubeproxy_sync_proxy_rules_service_changes_pending",
                "[ALPHA] Pending proxy rules Service changes",
            )?,
            no_local_endpoints: maker.int_gauges(
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                "[ALPHA] Number of services with a Local traffic policy and no endpoints",
                &["ip_family", "traffic_policy"],
            )?,
            healthz: maker.counters(
                "kubeproxy_proxy_healthz_total",
                "[ALPHA] Cumulative proxy healthz HTTP status",
                &["code"],
            )?,
            livez: maker.counters(
                "kubeproxy_proxy_livez_total",
                "[ALPHA] Cumulative proxy livez HTTP status",
                &["code"],
            )?,
            failures: maker.counters(failures.0, failures.1, of_family)?,
            effective: maker.add(Histogram::with_opts(
                HistogramOpts::new(
                    "fairlead_change_duration_seconds",
                    "From a change of the cluster being taken in to its last entry being in the tables",
                )
                .buckets(exponential_buckets(0.000_05, 2.0, 18)?),
            )?)?,
            calls: maker.counter("fairlead_bpf_calls_total", "bpf(2) calls that changed or read tables")?,
            entries: maker.counter("fairlead_entries_written_total", "Table entries set or removed")?,
            bytes: maker
                .counter("fairlead_bytes_written_total", "Bytes of keys and values of entries set or removed")?,
            growths: maker.counter("fairlead_table_growths_total", "How often tables were replaced by larger ones")?,
            written: Mutex::default(),
            process: Process::new(&maker)?,
            kernel: Kernel::new(&maker, bpffs, services)?,
            registry: maker.0.clone(),
        };
        lacked(&maker, mode)?;
        build_info(&maker)?;
        Ok(metrics)
    }

    /// Shows what is counted elsewhere, too.
    ///
    /// # Errors
    ///
    /// When a metric has this name already.
    pub fn show(&self, counter: IntCounterVec) -> Result<()> {
        Ok(self.registry.register(Box::new(counter))?)
    }

    /// A change of a Service was taken in.
    pub fn service_changed(&self) {
        self.service_changes.inc();
        self.service_changes_pending.inc();
    }

    /// A change of an EndpointSlice, or of a Pod where endpoints are made from Pods, was taken in.
    pub fn endpoints_changed(&self) {
        self.endpoint_changes.inc();
        self.endpoint_changes_pending.inc();
    }

    /// Nothing that was taken in waits for being planned any more.
    pub fn nothing_pending(&self) {
        self.service_changes_pending.set(0);
        self.endpoint_changes_pending.set(0);
    }

    /// Writes of these families are about to be done.
    pub fn queued(&self, families: &[Family]) {
        for family in families {
            self.last_queued.with_label_values(&[family.as_str()]).set(unix_time());
        }
    }

    /// Writes of these families are done. `full`: everything was compared, not just what changed.
    pub fn synced(&self, families: &[Family], took: Duration, full: bool) {
        let kind = if full { &self.full } else { &self.partial };
        for family in families {
            let label = [family.as_str()];
            self.sync.with_label_values(&label).observe(took.as_secs_f64());
            if let Some(kind) = kind {
                kind.with_label_values(&label).observe(took.as_secs_f64());
            }
            self.last.with_label_values(&label).set(unix_time());
        }
        if !families.is_empty() {
            self.effective.observe(took.as_secs_f64());
        }
    }

    /// Writes of these families failed.
    pub fn failed(&self, families: &[Family]) {
        for family in families {
            self.failures.with_label_values(&[family.as_str()]).inc();
        }
    }

    /// An endpoint change that happened at this time, as the controller said, is effective.
    pub fn programmed(&self, family: Family, since: SystemTime) {
        if let Ok(took) = since.elapsed() {
            self.programming.with_label_values(&[family.as_str()]).observe(took.as_secs_f64());
        }
    }

    /// How many ports of Services with policy Local have endpoints, but none here: for clients inside and outside.
    pub fn set_no_local_endpoints(&self, family: Family, inside: usize, outside: usize) {
        for (policy, count) in [("internal", inside), ("external", outside)] {
            let gauge = self.no_local_endpoints.with_label_values(&[family.as_str(), policy]);
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// What writing has cost so far.
    pub fn set_written(&self, now: Statistics) {
        let mut before = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let Statistics { calls, entries, bytes, growths } = now;
        self.calls.inc_by(calls.saturating_sub(before.calls));
        self.entries.inc_by(entries.saturating_sub(before.entries));
        self.bytes.inc_by(bytes.saturating_sub(before.bytes));
        self.growths.inc_by(growths.saturating_sub(before.growths));
        *before = now;
    }

    /// `/healthz` (`of_node`) or `/livez` was answered.
    pub fn probed(&self, of_node: bool, good: bool) {
        let counter = if of_node { &self.healthz } else { &self.livez };
        counter.with_label_values(&[if good { "200" } else { "503" }]).inc();
    }

    /// Everything as text. Reads the tables, which takes its time.
    pub fn text(&self) -> String {
        self.process.read();
        self.kernel.read();
        let mut text = Vec::new();
        // Writing to memory fails only for metrics without a sample, which are not gathered.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8(text).unwrap_or_default()
    }
}

/// Metrics of mechanisms that Fairlead has nothing of. kube-proxy has them from its first sync on; they stay 0
/// (`docs/metrics.md`).
fn lacked(maker: &Maker, mode: ProxyMode) -> Result<()> {
    let reconciler = maker.times(
        "kubeproxy_conntrack_reconciler_sync_duration_seconds",
        "[ALPHA] ReconcileConntrackFlowsLatency latency in seconds",
    )?;
    let deleted = maker.counters(
        "kubeproxy_conntrack_reconciler_deleted_entries_total",
        "[ALPHA] Cumulative conntrack flows deleted by conntrack reconciler",
        &["ip_family"],
    )?;
    for family in Family::ALL.map(Family::as_str) {
        let _ = (reconciler.with_label_values(&[family]), deleted.with_label_values(&[family]));
    }
    match mode {
        ProxyMode::Iptables => {
            for (name, help) in [
                (
                    "kubeproxy_sync_proxy_rules_iptables_total",
                    "[ALPHA] Total number of iptables rules owned by kube-proxy",
                ),
                (
                    "kubeproxy_sync_proxy_rules_iptables_last",
                    "[ALPHA] Number of iptables rules written by kube-proxy in last sync",
                ),
            ] {
                let rules = maker.int_gauges(name, help, &["ip_family", "table"])?;
                for family in Family::ALL {
                    for table in ["filter", "nat"] {
                        rules.with_label_values(&[family.as_str(), table]).set(0);
                    }
                }
            }
            maker.counters(
                "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
                "[ALPHA] Cumulative proxy iptables partial restore failures",
                &["ip_family"],
            )?;
            maker.counter(
                "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
                "[ALPHA] packets dropped by iptables to work around conntrack problems",
            )?;
            maker.counter(
                "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
                "[ALPHA] Number of packets accepted on nodeports of loopback interface",
            )?;
        }
        ProxyMode::Nftables => {
            maker.counters(
                "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
                "[ALPHA] Cumulative proxy nftables cleanup failures",
                &["ip_family"],
            )?;
        }
        ProxyMode::Ipvs => {}
    }
    Ok(())
}

fn build_info(maker: &Maker) -> Result<()> {
    let info = maker.int_gauges(
        "kubernetes_build_info",
        "[BETA] A metric with a constant '1' value labeled by major, minor, git version, git commit, git tree state, build \
         date, Go version, and compiler from which Kubernetes was built, and platform on which it is running.",
        &["build_date", "compiler", "git_commit", "git_tree_state", "git_version", "go_version", "major", "minor", "platform"],
    )?;
    let version = super::pages::git_version();
    let platform = super::pages::platform();
    info.with_label_values(&["", "rustc", "", "", &version, "", "1", "37", &platform]).set(1);
    Ok(())
}

fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What kube-proxy 1.37.2 showed in mode nftables on a dual-stack node after one Service, one EndpointSlice of IPv4 and two
    /// changes of it, without the values.
    const REAL: &str = include_str!("metrics/nftables.txt");

    /// Lines without values.
    fn shape(text: &str) -> BTreeSet<String> {
        let line = |line: &str| match line.strip_prefix("kubernetes_build_info{") {
            Some(labels) => {
                let names: Vec<&str> = labels.split(',').filter_map(|label| label.split('=').next()).collect();
                format!("kubernetes_build_info {}", names.join(" "))
            }
            None if line.starts_with('#') => line.to_owned(),
            None => line
                .rsplit_once(' ')
                .filter(|(_, value)| value.parse::<f64>().is_ok())
                .map_or(line, |it| it.0)
                .to_owned(),
        };
        text.lines().map(line).collect()
    }

    #[test]
    fn names_types_texts_buckets_and_labels_are_those_of_the_real_kube_proxy() {
        let metrics = Metrics::new(ProxyMode::Nftables, "/nowhere".into(), true).unwrap();
        metrics.queued(&Family::ALL);
        metrics.synced(&Family::ALL, Duration::from_millis(3), true);
        metrics.synced(&[Family::V4], Duration::from_millis(1), false);
        metrics.programmed(Family::V4, SystemTime::now());
        for family in Family::ALL {
            metrics.set_no_local_endpoints(family, 0, 1);
        }
        metrics.probed(true, true);
        metrics.probed(false, true);
        let (ours, real) = (shape(&metrics.text()), shape(REAL));
        let missing: Vec<_> = real.difference(&ours).collect();
        assert_eq!(missing, Vec::<&String>::new());
        let more = ours.difference(&real).filter(|line| !line.contains("fairlead_"));
        // kube-proxy has them from the first change of a family's UDP endpoints on.
        let more: Vec<_> =
            more.filter(|line| !(line.contains("conntrack_reconciler") && line.contains("IPv6"))).collect();
        assert_eq!(more, Vec::<&String>::new());
    }

    #[test]
    fn each_mode_has_the_metrics_that_kube_proxy_registers_in_it() {
        for (mode, has, lacks) in [
            (
                ProxyMode::Iptables,
                &[
                    "iptables_total{ip_family=\"IPv6\",table=\"nat\"} 0",
                    "iptables_restore_failures_total",
                    "sync_full_",
                ][..],
                &["nftables"][..],
            ),
            (ProxyMode::Nftables, &["nftables_sync_failures_total", "sync_partial_"], &["iptables"]),
            (ProxyMode::Ipvs, &["iptables_restore_failures_total"], &["nftables", "sync_full_", "iptables_total"]),
        ] {
            let metrics = Metrics::new(mode, "/nowhere".into(), true).unwrap();
            metrics.failed(&[Family::V4]);
            for full in [true, false] {
                metrics.synced(&Family::ALL, Duration::from_millis(3), full);
            }
            let text = metrics.text();
            assert!(has.iter().all(|name| text.contains(name)), "{mode:?}: {text}");
            assert!(lacks.iter().all(|name| !text.contains(name)), "{mode:?}: {text}");
            assert!(text.contains("_failures_total{ip_family=\"IPv4\"} 1"), "{text}");
        }
    }

    #[test]
    fn what_waits_is_pending_until_it_is_planned_and_writes_are_counted_once() {
        let metrics = Metrics::new(ProxyMode::Iptables, "/nowhere".into(), true).unwrap();
        metrics.service_changed();
        metrics.endpoints_changed();
        metrics.endpoints_changed();
        assert!(metrics.text().contains("endpoint_changes_pending 2\n"));
        metrics.nothing_pending();
        for calls in [3, 3, 5] {
            metrics.set_written(Statistics { calls, entries: 2 * calls, bytes: 10 * calls, growths: 0 });
        }
        let text = metrics.text();
        for line in [
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 2",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_service_changes_total 1",
            "fairlead_bpf_calls_total 5",
            "fairlead_entries_written_total 10",
            "fairlead_bytes_written_total 50",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} in {text}");
        }
    }
}
