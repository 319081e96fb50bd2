//! What a source tells the model, and what the model makes of it.

use std::{collections::BTreeSet, fmt, sync::Arc};

use super::{
    object::{Node, ObjectName, Service, ServiceCidr},
    pod::PodState,
    slice::SliceState,
};

/// A kind of object that the agent reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `v1` Pod.
    Pod,
    /// `v1` Node.
    Node,
    /// `networking.k8s.io/v1` ServiceCIDR.
    ServiceCidr,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Service, Self::EndpointSlice, Self::Pod, Self::Node, Self::ServiceCidr];

    /// The API's word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Pod => "Pod",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }

    /// The version of the API that the agent reads.
    #[must_use]
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Pod | Self::Node => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::ServiceCidr => "networking.k8s.io/v1",
        }
    }

    /// The group of the API that it is in; empty for the core's.
    #[must_use]
    pub const fn group(self) -> &'static str {
        match self {
            Self::Service | Self::Pod | Self::Node => "",
            Self::EndpointSlice => "discovery.k8s.io",
            Self::ServiceCidr => "networking.k8s.io",
        }
    }

    /// The version within the group.
    #[must_use]
    pub const fn version(self) -> &'static str {
        "v1"
    }

    /// The word for several, which paths and RBAC rules have.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::Pod => "pods",
            Self::Node => "nodes",
            Self::ServiceCidr => "servicecidrs",
        }
    }

    /// The kind of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An object of any kind that the agent reads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Object {
    /// A Service.
    Service(Box<Service>),
    /// An EndpointSlice.
    EndpointSlice(Box<SliceState>),
    /// A Pod.
    Pod(Arc<PodState>),
    /// A Node.
    Node(Box<Node>),
    /// A ServiceCIDR.
    ServiceCidr(Box<ServiceCidr>),
}

impl Object {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::Pod(_) => Kind::Pod,
            Self::Node(_) => Kind::Node,
            Self::ServiceCidr(_) => Kind::ServiceCidr,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> ObjectName {
        match self {
            Self::Service(service) => service.metadata.namespaced(),
            Self::EndpointSlice(slice) => slice.name.clone(),
            Self::Pod(pod) => pod.name.clone(),
            Self::Node(node) => node.metadata.cluster_wide(),
            Self::ServiceCidr(cidr) => cidr.metadata.cluster_wide(),
        }
    }
}

/// One change to the state of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The object is new, or is now this.
    Upsert(Object),
    /// The object is gone.
    Delete(Kind, ObjectName),
}

impl Change {
    /// The kind of the object.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Upsert(object) => object.kind(),
            Self::Delete(kind, _) => *kind,
        }
    }
}

/// What has to be planned again after a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affected {
    /// Services that came, went or changed, and those of which an endpoint did.
    pub services: BTreeSet<ObjectName>,
    /// This node's own Node object changed, and so may every Service's plan.
    pub node: bool,
    /// ServiceCIDRs changed.
    pub service_cidrs: bool,
    /// When endpoints changed, in seconds of Unix time, and whether they are IPv4's: as their slices' annotations say.
    pub endpoints_changed: Vec<(bool, i64)>,
}

impl Affected {
    /// Adds what another change affected.
    pub fn merge(&mut self, other: Self) {
        self.services.extend(other.services);
        self.node |= other.node;
        self.service_cidrs |= other.service_cidrs;
        self.endpoints_changed.extend(other.endpoints_changed);
    }
}
