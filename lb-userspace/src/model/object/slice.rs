//! The API's EndpointSlice: what kube-proxy reads of it.

use serde::Deserialize;

use super::{Metadata, Protocol, nullable};

/// An EndpointSlice (`discovery.k8s.io/v1`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EndpointSlice {
    /// Name, and the label that names the Service.
    #[serde(deserialize_with = "nullable")]
    pub metadata: Metadata,
    /// `IPv4`, `IPv6`, `FQDN`.
    #[serde(deserialize_with = "nullable")]
    pub address_type: String,
    /// Endpoints.
    #[serde(deserialize_with = "nullable")]
    pub endpoints: Vec<SliceEndpoint>,
    /// Their ports.
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<SlicePort>,
}

/// One endpoint of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct SliceEndpoint {
    /// Only the first counts.
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<String>,
    /// What state it is in.
    #[serde(deserialize_with = "nullable")]
    pub conditions: EndpointConditions,
    /// Where it runs.
    pub node_name: Option<String>,
    /// Who should use it.
    pub hints: Option<EndpointHints>,
}

/// `conditions` of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EndpointConditions {
    /// Absent is true.
    pub ready: Option<bool>,
    /// Absent is true, also where `ready` is false (`kube-proxy.md` §1.2).
    pub serving: Option<bool>,
    /// Absent is false.
    pub terminating: Option<bool>,
}

/// `hints` of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EndpointHints {
    /// Zones that should use it.
    #[serde(deserialize_with = "nullable")]
    pub for_zones: Vec<Hint>,
    /// Nodes that should use it.
    #[serde(deserialize_with = "nullable")]
    pub for_nodes: Vec<Hint>,
}

/// The name of a zone or a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Hint {
    /// The name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
}

/// A port of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct SlicePort {
    /// Joins to the Service port's name; absent: the port is skipped.
    pub name: Option<String>,
    /// The number; absent or 0: the port is skipped.
    pub port: Option<u16>,
    /// Joins to the Service port's protocol.
    pub protocol: Option<Protocol>,
}
