//! The API's Pod: what the EndpointSlice controller reads of it.

use serde::Deserialize;

use super::{Metadata, Protocol, nullable};

/// A Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Pod {
    /// Name, labels, whether it is being deleted.
    #[serde(deserialize_with = "nullable")]
    pub metadata: Metadata,
    /// Containers and node.
    #[serde(deserialize_with = "nullable")]
    pub spec: PodSpec,
    /// Phase, conditions and addresses.
    #[serde(deserialize_with = "nullable")]
    pub status: PodStatus,
}

/// `spec` of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodSpec {
    /// Where it runs.
    pub node_name: Option<String>,
    /// Whether it uses the node's own network.
    #[serde(deserialize_with = "nullable")]
    pub host_network: bool,
    /// Containers.
    #[serde(deserialize_with = "nullable")]
    pub containers: Vec<Container>,
    /// Init containers; those with `restartPolicy: Always` keep running.
    #[serde(deserialize_with = "nullable")]
    pub init_containers: Vec<Container>,
}

/// A container of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Container {
    /// Its ports.
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<ContainerPort>,
    /// `Always` makes an init container a sidecar.
    pub restart_policy: Option<String>,
}

/// A port of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ContainerPort {
    /// Its name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Its number.
    #[serde(deserialize_with = "nullable")]
    pub container_port: u16,
    /// Its protocol.
    #[serde(deserialize_with = "nullable")]
    pub protocol: Protocol,
}

/// `status` of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodStatus {
    /// `Succeeded` and `Failed` Pods are no endpoints.
    #[serde(deserialize_with = "nullable")]
    pub phase: String,
    /// Conditions; `Ready` matters.
    #[serde(deserialize_with = "nullable")]
    pub conditions: Vec<PodCondition>,
    /// The first address.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    /// Addresses, one a family.
    #[serde(rename = "podIPs", deserialize_with = "nullable")]
    pub pod_ips: Vec<PodIp>,
}

/// A condition of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PodCondition {
    /// Its name.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    #[serde(deserialize_with = "nullable")]
    pub status: String,
}

/// An address of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PodIp {
    /// The address.
    #[serde(deserialize_with = "nullable")]
    pub ip: String,
}
