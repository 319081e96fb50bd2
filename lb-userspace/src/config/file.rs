//! The configuration file: `KubeProxyConfiguration`, `kubeproxy.config.k8s.io/v1alpha1`.
//!
//! In: YAML or JSON. Out: its fields as they stand there, and what kube-proxy's strict reading objects to (fields that don't
//! exist, fields given twice), which is said and not held against the file. Never here: what a field means, or its default.
//!
//! Names, types and the order of reading are those of kube-proxy 1.37 (`kube-proxy.md` §16).

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{duration::GoDuration, logging::Logging};

/// What `apiVersion` must say.
pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// What `kind` must say.
pub const KIND: &str = "KubeProxyConfiguration";

/// What helps against most mistakes.
const REMEDY: &str = "compare it with `kubectl -n kube-system get configmap kube-proxy -o yaml`";

/// All fields of the file. Absent, `null` and zero mean the same, unless the type says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct KubeProxyConfiguration {
    /// Switches of kube-proxy's experiments. The few that concern the configuration itself are heeded.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub feature_gates: BTreeMap<String, bool>,
    /// How the API server is reached.
    pub client_connection: ClientConnection,
    /// How log lines are written.
    pub logging: Logging,
    /// The node's name, where it isn't the machine's.
    pub hostname_override: String,
    /// The node's own address, unless unspecified. Nothing is bound to it.
    pub bind_address: String,
    /// Where health checks are answered.
    pub healthz_bind_address: String,
    /// Where metrics are served.
    pub metrics_bind_address: String,
    /// Whether a port that can't be bound ends the process.
    pub bind_address_hard_fail: bool,
    /// Whether Go's profiles are served; there are none here.
    pub enable_profiling: bool,
    /// The version whose hidden metrics are shown.
    pub show_hidden_metrics_for_version: String,
    /// `iptables` (also if empty), `ipvs`, `nftables`.
    pub mode: String,
    /// Options of mode iptables; `masqueradeAll` of ipvs, too.
    pub iptables: Iptables,
    /// Options of mode ipvs.
    pub ipvs: Ipvs,
    /// Options of mode nftables.
    pub nftables: Nftables,
    /// Options of Windows.
    pub winkernel: Winkernel,
    /// How local sources are told: `ClusterCIDR` (also if empty), `NodeCIDR`, `BridgeInterface`, `InterfaceNamePrefix`.
    pub detect_local_mode: String,
    /// Details of the last two.
    pub detect_local: DetectLocal,
    /// Networks of the pods, separated by commas.
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: String,
    /// Where NodePorts answer: networks, `primary`, `localhost`, `all`.
    pub node_port_addresses: Option<Vec<String>>,
    /// How willingly the kernel kills the process; absent: -999.
    pub oom_score_adj: Option<i32>,
    /// Settings of the kernel's connection tracking.
    pub conntrack: Conntrack,
    /// How often everything known is delivered again.
    pub config_sync_period: GoDuration,
    /// Has no meaning any more.
    pub port_range: String,
    /// An option of Windows.
    #[serde(skip_serializing_if = "is_false")]
    pub windows_run_as_service: bool,
}

/// `clientConnection`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClientConnection {
    /// The kubeconfig; empty: the service account of the pod.
    pub kubeconfig: String,
    /// Has no meaning here: JSON is spoken.
    pub accept_content_types: String,
    /// The same.
    pub content_type: String,
    /// Requests a second.
    #[serde(serialize_with = "float")]
    pub qps: f32,
    /// Requests at once.
    pub burst: i32,
}

/// `iptables`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Iptables {
    /// The bit of the packet mark; we mark nothing. Absent: 14.
    pub masquerade_bit: Option<i32>,
    /// Rewrite the source of everything that goes to a ClusterIP.
    pub masquerade_all: bool,
    /// Whether NodePorts answer on localhost over IPv4; absent: they do.
    pub localhost_node_ports: Option<bool>,
    /// How often things are checked, and half of the time after which they count as stuck.
    pub sync_period: GoDuration,
    /// The least time between two changes; we don't wait.
    pub min_sync_period: GoDuration,
}

/// `ipvs`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Ipvs {
    /// As of `iptables`.
    pub sync_period: GoDuration,
    /// As of `iptables`.
    pub min_sync_period: GoDuration,
    /// How endpoints are chosen; ours are chosen as in the other modes.
    pub scheduler: String,
    /// What kube-proxy leaves alone when it cleans up.
    #[serde(rename = "excludeCIDRs")]
    pub exclude_cidrs: Option<Vec<String>>,
    /// Whether ARP is answered strictly; we have no addresses to answer for.
    #[serde(rename = "strictARP")]
    pub strict_arp: bool,
    /// A timeout of ipvs.
    pub tcp_timeout: GoDuration,
    /// A timeout of ipvs.
    pub tcp_fin_timeout: GoDuration,
    /// A timeout of ipvs.
    pub udp_timeout: GoDuration,
}

/// `nftables`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Nftables {
    /// The bit of the packet mark; we mark nothing. Absent: 14.
    pub masquerade_bit: Option<i32>,
    /// Rewrite the source of everything that goes to a ClusterIP.
    pub masquerade_all: bool,
    /// As of [`Iptables`].
    pub sync_period: GoDuration,
    /// As of [`Iptables`].
    pub min_sync_period: GoDuration,
}

/// `winkernel`: read, written, and without meaning on Linux.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[expect(missing_docs, reason = "nothing of it has a meaning on Linux")]
pub struct Winkernel {
    pub network_name: String,
    pub source_vip: String,
    #[serde(rename = "enableDSR")]
    pub enable_dsr: bool,
    pub root_hns_endpoint_name: String,
    pub forward_health_check_vip: bool,
}

/// `detectLocal`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct DetectLocal {
    /// The bridge that pods are ports of.
    pub bridge_interface: String,
    /// How the names of the pods' interfaces begin.
    pub interface_name_prefix: String,
}

/// `conntrack`: sysctls `net.netfilter.nf_conntrack_…` (`kube-proxy.md` §10.2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Conntrack {
    /// Entries for each CPU; absent: 32768; 0: the kernel's limit stays.
    pub max_per_core: Option<i32>,
    /// Entries at least; absent: 131072.
    pub min: Option<i32>,
    /// `tcp_timeout_established`; absent: 24h; 0: as it is.
    pub tcp_established_timeout: Option<GoDuration>,
    /// `tcp_timeout_close_wait`; absent: 1h; 0: as it is.
    pub tcp_close_wait_timeout: Option<GoDuration>,
    /// `tcp_be_liberal`.
    pub tcp_be_liberal: bool,
    /// `udp_timeout`; 0: as it is.
    pub udp_timeout: GoDuration,
    /// `udp_timeout_stream`; 0: as it is.
    pub udp_stream_timeout: GoDuration,
}

impl KubeProxyConfiguration {
    /// Reads the text of a configuration file. Beside it comes what a strict reader would refuse, one sentence each.
    ///
    /// # Errors
    ///
    /// The text is no YAML, is of another kind or version, or a field has another type.
    pub fn parse(text: &str) -> anyhow::Result<(Self, Vec<String>)> {
        let mut warnings = Vec::new();
        let mut value = tree(text, &mut warnings)?;
        let fields = match &mut value {
            Value::Object(fields) => fields,
            Value::Null => bail!("it is empty; {}", heading()),
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                bail!("it is not a mapping of fields; {}", heading())
            }
        };
        for (field, wanted) in [("kind", KIND), ("apiVersion", API_VERSION)] {
            match fields.remove(field) {
                Some(Value::String(found)) if found == wanted => {}
                Some(Value::String(found)) if !found.is_empty() => {
                    bail!("{field}: `{found}` is not `{wanted}`, which alone can be read; {}", heading())
                }
                Some(_) | None => bail!("{field} is missing; {}", heading()),
            }
        }
        unknown(&value, &template(), "", &mut warnings);
        let config = serde_path_to_error::deserialize(without_nulls(value)).map_err(|error| {
            let path = error.path().to_string();
            anyhow::anyhow!("field {path}: {}; {REMEDY}", error.into_inner())
        })?;
        Ok((config, warnings))
    }
}

fn heading() -> String {
    format!("begin it with `apiVersion: {API_VERSION}` and `kind: {KIND}`")
}

/// The first document of the text. Of fields that are given twice the last one counts, as in kube-proxy.
fn tree(text: &str, warnings: &mut Vec<String>) -> anyhow::Result<Value> {
    // A full file is some 80 lines; the limits of the parser are kept, against files that unfold.
    let strict = serde_saphyr::options! { with_snippet: false };
    let lenient = serde_saphyr::options! {
        with_snippet: false,
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = serde_saphyr::from_multiple_with_options::<Value>(text, lenient)
        .with_context(|| format!("it is no YAML; {REMEDY}"))?;
    if documents.len() > 1 {
        warnings.push("there is more than one document in it; only the first one counts".to_owned());
    }
    if let Err(error) = serde_saphyr::from_multiple_with_options::<Value>(text, strict) {
        warnings.push(format!("a field is given twice, and the last one counts: {error}"));
    }
    Ok(if documents.is_empty() { Value::Null } else { documents.swap_remove(0) })
}

/// `null` is as good as absent, but in lists.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(fields.map(|(name, value)| (name, without_nulls(value))).collect())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => value,
    }
}

/// Every field that there is.
fn template() -> Value {
    let mut all = KubeProxyConfiguration { windows_run_as_service: true, ..KubeProxyConfiguration::default() };
    all.logging = Logging::with_every_field();
    let mut value = serde_json::to_value(all).unwrap_or_default();
    if let Value::Object(fields) = &mut value {
        // Names of gates are not fields.
        fields.insert("featureGates".to_owned(), Value::Null);
    }
    value
}

fn unknown(value: &Value, template: &Value, path: &str, warnings: &mut Vec<String>) {
    match (value, template) {
        (Value::Object(fields), Value::Object(known)) => {
            for (name, field) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                match known.get(name) {
                    Some(known) => unknown(field, known, &path, warnings),
                    None => {
                        warnings.push(format!("field {path} does not exist and is ignored{}", similar(name, known)))
                    }
                }
            }
        }
        (Value::Array(items), Value::Array(known)) => {
            for (index, item) in items.iter().enumerate() {
                if let Some(known) = known.first() {
                    unknown(item, known, &format!("{path}[{index}]"), warnings);
                }
            }
        }
        _ => {}
    }
}

/// kube-proxy tells small letters from capitals; people don't always.
fn similar(name: &str, known: &Map<String, Value>) -> String {
    let found = known.keys().find(|known| known.eq_ignore_ascii_case(name));
    found.map(|known| format!("; write {known}")).unwrap_or_default()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
pub(super) const fn is_false(value: &bool) -> bool {
    !*value
}

/// A `float32` as Go writes it: no digits that only `f64` has, no `.0`.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn float<S: serde::Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    let text = value.to_string();
    match (text.parse::<i64>(), text.parse::<f64>()) {
        (Ok(whole), _) => serializer.serialize_i64(whole),
        (Err(_), Ok(number)) => serializer.serialize_f64(number),
        (Err(_), Err(_)) => serializer.serialize_f32(*value),
    }
}

#[cfg(test)]
mod tests;
