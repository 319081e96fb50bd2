//! Kubernetes objects with the fields that kube-proxy reads (and, for Pods, that the EndpointSlice controller reads), and no
//! others. Field names and meanings are the API's.

mod pod;
mod slice;

use std::{cmp::Ordering, fmt, sync::Arc};

use serde::Deserialize;

pub use self::{
    pod::{Container, ContainerPort, Pod, PodCondition, PodIp, PodSpec, PodStatus},
    slice::{EndpointConditions, EndpointHints, EndpointSlice, Hint, SliceEndpoint, SlicePort},
};
use super::{intern::Interner, labels::Labels};

/// The label that gives a Service to another proxy; its presence counts, with any value.
pub const SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// The label that hides Services and EndpointSlices without a ClusterIP; its presence counts, with any value.
pub const HEADLESS: &str = "service.kubernetes.io/headless";
/// The label that names the Service of an EndpointSlice.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The longest timeout of session affinity that the API allows, a day.
pub const MAX_AFFINITY_SECONDS: u32 = 86_400;

/// `namespace/name`; the namespace is empty for objects without one, and has no slash. One text for both: names stand in every
/// table of the agent, and there are as many as the cluster has Pods.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ObjectName(Arc<str>);

impl ObjectName {
    /// The object of this name.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(format!("{namespace}/{name}").into())
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.parts().0
    }

    /// The name within it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.parts().1
    }

    /// The same name, as one copy that all objects share which have it.
    #[must_use]
    pub fn shared(&self, interner: &mut Interner) -> Self {
        Self(interner.text(&self.0))
    }

    fn parts(&self) -> (&str, &str) {
        self.0.split_once('/').unwrap_or_default()
    }
}

impl Default for ObjectName {
    fn default() -> Self {
        Self::new("", "")
    }
}

impl Ord for ObjectName {
    fn cmp(&self, other: &Self) -> Ordering {
        // Most comparisons that end with equality are of one copy with itself.
        if Arc::ptr_eq(&self.0, &other.0) { Ordering::Equal } else { self.0.cmp(&other.0) }
    }
}

impl PartialOrd for ObjectName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.strip_prefix('/').unwrap_or(&self.0))
    }
}

/// What all objects have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(from = "WrittenMetadata")]
pub struct Metadata {
    /// The name, with the namespace as it was written; an empty one stands for `default` in kinds that have one.
    pub name: ObjectName,
    /// Labels.
    pub labels: Labels,
    /// RFC 3339; compares as text.
    pub creation_timestamp: Option<Box<str>>,
    /// Set while the object is being deleted.
    pub deletion_timestamp: Option<Box<str>>,
    /// The annotations that are read.
    pub annotations: Annotations,
}

/// `metadata` as it is written.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct WrittenMetadata {
    name: Option<String>,
    namespace: Option<String>,
    #[serde(deserialize_with = "nullable")]
    labels: Labels,
    creation_timestamp: Option<Box<str>>,
    deletion_timestamp: Option<Box<str>>,
    #[serde(deserialize_with = "nullable")]
    annotations: Annotations,
}

impl From<WrittenMetadata> for Metadata {
    fn from(written: WrittenMetadata) -> Self {
        let WrittenMetadata { name, namespace, labels, creation_timestamp, deletion_timestamp, annotations } = written;
        let name = ObjectName::new(&namespace.unwrap_or_default(), &name.unwrap_or_default());
        Self { name, labels, creation_timestamp, deletion_timestamp, annotations }
    }
}

/// The annotations that are read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct Annotations {
    /// When what an EndpointSlice follows changed, in RFC 3339: what kube-proxy measures its latency from.
    #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time")]
    pub last_change_trigger_time: Option<Box<str>>,
}

impl Metadata {
    /// The name of an object that lives in a namespace.
    #[must_use]
    pub fn namespaced(&self) -> ObjectName {
        if self.name.namespace().is_empty() { ObjectName::new("default", self.name.name()) } else { self.name.clone() }
    }

    /// The name of an object that lives in no namespace.
    #[must_use]
    pub fn cluster_wide(&self) -> ObjectName {
        if self.name.namespace().is_empty() { self.name.clone() } else { ObjectName::new("", self.name.name()) }
    }
}

/// A transport protocol that Services know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP, also where nothing is said.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => lb_common::layout::protocol::TCP,
            Self::Udp => lb_common::layout::protocol::UDP,
            Self::Sctp => lb_common::layout::protocol::SCTP,
        }
    }

    /// The protocol with this IP protocol number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            lb_common::layout::protocol::TCP => Some(Self::Tcp),
            lb_common::layout::protocol::UDP => Some(Self::Udp),
            lb_common::layout::protocol::SCTP => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct Service {
    /// Name, labels, age.
    #[serde(deserialize_with = "nullable")]
    pub metadata: Metadata,
    /// What the user asked for.
    #[serde(deserialize_with = "nullable")]
    pub spec: ServiceSpec,
    /// What the cloud gave.
    #[serde(deserialize_with = "nullable")]
    pub status: ServiceStatus,
}

impl Service {
    /// Whether a label tells kube-proxy, and therefore us, to leave the Service alone.
    #[must_use]
    pub fn is_hidden(&self) -> bool {
        self.metadata.labels.contains_key(SERVICE_PROXY_NAME) || self.metadata.labels.contains_key(HEADLESS)
    }

    /// The first ClusterIP, as it is written.
    #[must_use]
    pub fn cluster_ip(&self) -> Option<&str> {
        self.spec.cluster_ip.as_deref().or(self.spec.cluster_ips.first().map(String::as_str))
    }

    /// Lets go of what nobody reads behind the checks of a source, and of spare memory: ten thousand Services are kept.
    pub fn shrink(&mut self, interner: &mut Interner) {
        self.metadata.name = self.metadata.namespaced().shared(interner);
        self.metadata.annotations = Annotations::default();
        // A family's ClusterIP is the one at its index (`GetClusterIPByFamily` in kube-proxy).
        if !self.spec.ip_families.is_empty() {
            self.spec.cluster_ips.truncate(self.spec.ip_families.len());
        }
        self.spec.ip_families = Vec::new();
        if self.spec.cluster_ips.first() == self.spec.cluster_ip.as_ref() {
            self.spec.cluster_ip = None;
        }
        let labels = self.metadata.labels.only(&[SERVICE_PROXY_NAME, HEADLESS]);
        self.metadata.labels = interner.labels(&labels);
        self.spec.selector = interner.labels(&self.spec.selector);
        self.spec.cluster_ips.shrink_to_fit();
        self.spec.ports.shrink_to_fit();
        self.spec.external_ips.shrink_to_fit();
        self.spec.load_balancer_source_ranges.shrink_to_fit();
        self.status.load_balancer.ingress.shrink_to_fit();
    }
}

/// `spec` of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceSpec {
    /// Kind of Service.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub type_: ServiceType,
    /// The first ClusterIP, `None` for headless Services.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// ClusterIPs, one a family.
    #[serde(rename = "clusterIPs", deserialize_with = "nullable")]
    pub cluster_ips: Vec<String>,
    /// `IPv4`, `IPv6`, in the order of `clusterIPs`.
    #[serde(deserialize_with = "nullable")]
    pub ip_families: Vec<String>,
    /// Ports.
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<ServicePort>,
    /// Labels that the Service's Pods have; empty: endpoints are made by hand.
    #[serde(deserialize_with = "nullable")]
    pub selector: Labels,
    /// Addresses that the user routes to the nodes.
    #[serde(rename = "externalIPs", deserialize_with = "nullable")]
    pub external_ips: Vec<String>,
    /// Who may connect to the load balancer's addresses; empty: everyone.
    #[serde(deserialize_with = "nullable")]
    pub load_balancer_source_ranges: Vec<String>,
    /// `Local`: clients inside reach endpoints of their own node only.
    #[serde(deserialize_with = "nullable")]
    pub internal_traffic_policy: TrafficPolicy,
    /// `Local`: clients outside reach endpoints of the node that they came to only.
    #[serde(deserialize_with = "nullable")]
    pub external_traffic_policy: TrafficPolicy,
    /// `ClientIP`: a client stays with its endpoint.
    #[serde(deserialize_with = "nullable")]
    pub session_affinity: SessionAffinity,
    /// Details of the affinity.
    pub session_affinity_config: Option<SessionAffinityConfig>,
    /// Where load balancers ask whether this node has endpoints.
    #[serde(deserialize_with = "nullable")]
    pub health_check_node_port: u16,
    /// Endpoints count as ready from the start.
    #[serde(deserialize_with = "nullable")]
    pub publish_not_ready_addresses: bool,
    /// The name that an ExternalName Service stands for.
    pub external_name: Option<String>,
}

/// `spec.type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
pub enum ServiceType {
    /// Reachable inside the cluster.
    #[default]
    ClusterIP,
    /// Reachable on a port of every node, too.
    NodePort,
    /// Reachable through a load balancer, too.
    LoadBalancer,
    /// A name in DNS and nothing else.
    ExternalName,
}

impl ServiceType {
    /// The API's word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ClusterIP => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalName => "ExternalName",
        }
    }
}

/// Whether traffic stays on its node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
pub enum TrafficPolicy {
    /// All endpoints.
    #[default]
    Cluster,
    /// Endpoints of this node.
    Local,
}

/// `spec.sessionAffinity`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
pub enum SessionAffinity {
    /// Every connection is chosen anew.
    #[default]
    None,
    /// Connections of a client address go to the same endpoint.
    ClientIP,
}

/// `spec.sessionAffinityConfig`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct SessionAffinityConfig {
    /// Details of `ClientIP`.
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIpConfig>,
}

/// `spec.sessionAffinityConfig.clientIP`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClientIpConfig {
    /// Seconds after the last new connection; 10800 where nothing is said.
    pub timeout_seconds: Option<u32>,
}

/// A port of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServicePort {
    /// Its name; may be empty if there is only one.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Its protocol.
    #[serde(deserialize_with = "nullable")]
    pub protocol: Protocol,
    /// The port of the ClusterIP.
    #[serde(deserialize_with = "nullable")]
    pub port: u16,
    /// The port of the nodes, or 0.
    #[serde(deserialize_with = "nullable")]
    pub node_port: u16,
    /// The port of the Pods; matters only where endpoints are made from Pods.
    pub target_port: Option<PortRef>,
}

/// A port by number or by a container port's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(untagged)]
pub enum PortRef {
    /// The number.
    Number(u16),
    /// The name of a container port.
    Name(String),
}

/// `status` of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceStatus {
    /// The load balancer.
    #[serde(deserialize_with = "nullable")]
    pub load_balancer: LoadBalancerStatus,
}

/// `status.loadBalancer`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct LoadBalancerStatus {
    /// Its addresses.
    #[serde(deserialize_with = "nullable")]
    pub ingress: Vec<LoadBalancerIngress>,
}

/// One address of the load balancer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct LoadBalancerIngress {
    /// The address; absent if the load balancer has only a name.
    pub ip: Option<String>,
    /// `VIP` (also when absent): packets arrive with this destination. `Proxy`: they don't, the address is not ours.
    pub ip_mode: Option<String>,
}

/// A Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Name and labels.
    #[serde(deserialize_with = "nullable")]
    pub metadata: Metadata,
    /// Pod networks.
    #[serde(deserialize_with = "nullable")]
    pub spec: NodeSpec,
    /// Addresses.
    #[serde(deserialize_with = "nullable")]
    pub status: NodeStatus,
}

/// `spec` of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NodeSpec {
    /// The networks that its Pods' addresses come from.
    #[serde(rename = "podCIDRs", deserialize_with = "nullable")]
    pub pod_cidrs: Vec<String>,
    /// The first of them.
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<String>,
    /// What keeps Pods away.
    #[serde(deserialize_with = "nullable")]
    pub taints: Vec<Taint>,
}

/// A taint of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct Taint {
    /// Its key.
    #[serde(deserialize_with = "nullable")]
    pub key: String,
}

impl Node {
    /// Whether load balancers should send new connections here: the Node is neither being deleted nor about to be, which the
    /// cluster autoscaler says with a taint (KEP-3836).
    #[must_use]
    pub fn is_eligible(&self) -> bool {
        self.metadata.deletion_timestamp.is_none()
            && self.spec.taints.iter().all(|taint| taint.key != "ToBeDeletedByClusterAutoscaler")
    }
}

/// `status` of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Addresses.
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<NodeStatusAddress>,
}

/// An address of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct NodeStatusAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname`.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub type_: String,
    /// The address.
    #[serde(deserialize_with = "nullable")]
    pub address: String,
}

/// A ServiceCIDR (`networking.k8s.io/v1`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct ServiceCidr {
    /// Its name.
    #[serde(deserialize_with = "nullable")]
    pub metadata: Metadata,
    /// Its networks.
    #[serde(deserialize_with = "nullable")]
    pub spec: ServiceCidrSpec,
}

/// `spec` of a ServiceCIDR.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct ServiceCidrSpec {
    /// The networks.
    #[serde(deserialize_with = "nullable")]
    pub cidrs: Vec<String>,
}

/// `null` is the empty value, as it is to the API server.
fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
