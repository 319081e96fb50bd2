//! What is in force where nothing is said.
//!
//! In, out: a configuration. As in kube-proxy there are two passes: one over a file as soon as it is read, one over file or
//! flags at the end.

use super::{GoDuration, KubeProxyConfiguration, with_port};
use crate::model::address::parse_ip;

/// The port of health checks.
pub const HEALTHZ_PORT: i32 = 10256;
/// The port of metrics.
pub const METRICS_PORT: i32 = 10249;

/// The defaults of `v1alpha1`.
pub(super) fn fill(file: &mut KubeProxyConfiguration) {
    or_text(&mut file.bind_address, "0.0.0.0");
    let v4 = parse_ip(&file.bind_address).is_some_and(|addr| addr.is_ipv4());
    let (healthz, metrics) = if v4 { ("0.0.0.0", "127.0.0.1") } else { ("::", "::1") };
    or_text(&mut file.healthz_bind_address, healthz);
    or_text(&mut file.metrics_bind_address, metrics);
    file.healthz_bind_address = with_port(&file.healthz_bind_address, HEALTHZ_PORT);
    file.metrics_bind_address = with_port(&file.metrics_bind_address, METRICS_PORT);

    file.oom_score_adj.get_or_insert(-999);
    file.iptables.masquerade_bit.get_or_insert(14);
    file.iptables.localhost_node_ports.get_or_insert(true);
    file.nftables.masquerade_bit.get_or_insert(14);
    let (sync, min) = (GoDuration::from_secs(30), GoDuration::from_secs(1));
    or_time(&mut file.iptables.sync_period, sync);
    or_time(&mut file.iptables.min_sync_period, min);
    // ipvs has no least time of its own: nothing said is no waiting.
    or_time(&mut file.ipvs.sync_period, sync);
    or_time(&mut file.nftables.sync_period, sync);
    or_time(&mut file.nftables.min_sync_period, min);
    or_time(&mut file.config_sync_period, GoDuration::from_secs(15 * 60));

    let conntrack = &mut file.conntrack;
    conntrack.max_per_core.get_or_insert(32 * 1024);
    conntrack.min.get_or_insert(128 * 1024);
    conntrack.tcp_established_timeout.get_or_insert(GoDuration::from_secs(24 * 3600));
    conntrack.tcp_close_wait_timeout.get_or_insert(GoDuration::from_secs(3600));

    let client = &mut file.client_connection;
    or_text(&mut client.content_type, "application/vnd.kubernetes.protobuf");
    if client.qps == 0.0 {
        client.qps = 5.0;
    }
    if client.burst == 0 {
        client.burst = 10;
    }
    or_text(&mut file.logging.format, "text");
    let flush = &mut file.logging.flush_frequency;
    if flush.duration.is_zero() {
        (flush.duration, flush.as_text) = (GoDuration::from_secs(5), true);
    }
}

/// The defaults that only Linux has.
pub(super) fn complete(fields: &mut KubeProxyConfiguration) {
    or_text(&mut fields.mode, "iptables");
    if fields.mode == "nftables" && fields.node_port_addresses.as_ref().is_none_or(Vec::is_empty) {
        fields.node_port_addresses = Some(vec!["primary".to_owned()]);
    }
    or_text(&mut fields.detect_local_mode, "ClusterCIDR");
}

fn or_text(field: &mut String, default: &str) {
    if field.is_empty() {
        default.clone_into(field);
    }
}

const fn or_time(field: &mut GoDuration, default: GoDuration) {
    if field.is_zero() {
        *field = default;
    }
}
