//! What this node must do for each Service: policies, topology and masquerade rules become lists of endpoints and flags.
//!
//! In: a Service, its [`Backend`]s, the [`NodeView`]. Out: a [`ServicePlan`]. Pure: no I/O, no clock, no logging.

pub mod address;
pub mod claims;
mod expected;
pub mod node;
mod service;
pub mod topology;

use std::{collections::BTreeSet, fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use lb_common::{
    addr::Addr,
    layout::{FrontendKey, frontend_flags},
};

use crate::model::{ObjectName, object::Protocol};

#[cfg(test)]
pub(crate) use claims::Book;
pub use claims::{Conflict, Planner, Step};
pub use expected::Expected;
pub use service::plan_service;

/// An endpoint of a Service as the model knows it, for one Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Name of the Service port that it serves.
    pub port_name: Arc<str>,
    /// Protocol of that port.
    pub protocol: Protocol,
    /// The pod's address.
    pub addr: IpAddr,
    /// The target port.
    pub port: u16,
    /// May get new connections.
    pub ready: bool,
    /// Still answers.
    pub serving: bool,
    /// Is going away.
    pub terminating: bool,
    /// Where it runs, if that is known.
    pub node: Option<Arc<str>>,
    /// Zones that should use it.
    pub for_zones: Vec<Arc<str>>,
    /// Nodes that should use it.
    pub for_nodes: Vec<Arc<str>>,
}

/// What the plan knows of its own node and of the operator's wishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// The node's name, in lower case.
    pub name: String,
    /// Label `topology.kubernetes.io/zone`, if there is one.
    pub zone: Option<String>,
    /// The node's primary addresses (status InternalIP, then ExternalIP), one a family at most.
    pub primary: Vec<IpAddr>,
    /// Families in which a local detector is configured (`detectLocalMode`), which makes rule M2 apply.
    pub detects_local: Detected,
    /// `masqueradeAll` (M1).
    pub masquerade_all: bool,
    /// `--preserve-client-ip`.
    pub preserve_client_ip: bool,
}

/// Families in which local sources can be told from others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Detected {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

impl Detected {
    /// Whether this holds for the family of an address.
    #[must_use]
    pub const fn of(self, addr: &IpAddr) -> bool {
        if addr.is_ipv4() { self.v4 } else { self.v6 }
    }
}

/// A Service port: what one id in the kernel stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortName {
    /// The Service.
    pub service: ObjectName,
    /// The port's name, which may be empty.
    pub port: Arc<str>,
    /// The port's protocol.
    pub protocol: Protocol,
}

impl fmt::Display for PortName {
    /// `namespace/name:port/TCP`, as the kernel's table of names has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.service, self.port, self.protocol)
    }
}

/// What this node does for one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// Its ports.
    pub ports: Vec<PortPlan>,
    /// ClusterIPs of which every other port is refused.
    pub any_port: Vec<Addr>,
    /// Distinct addresses of ready endpoints on this node: what health checks of load balancers report.
    pub local_ready: usize,
    /// What its healthCheckNodePort answers, if it has one.
    pub health_check: Option<HealthCheck>,
}

/// A Service's healthCheckNodePort: where load balancers ask whether this node has endpoints (`kube-proxy.md` §7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The port.
    pub port: u16,
    /// Distinct IPv4 addresses of ready endpoints on this node; none if the Service has no IPv4 ClusterIP.
    pub v4: Option<usize>,
    /// The same for IPv6.
    pub v6: Option<usize>,
}

impl ServicePlan {
    /// Of how many ports policy Local leaves clients inside, and clients outside, without the endpoints that are elsewhere.
    #[must_use]
    pub fn ports_without_local_endpoints(&self, v4: bool) -> (usize, usize) {
        let lack = |lacks: fn(&PlannedFrontend) -> bool| {
            let of_family = |it: &&PlannedFrontend| it.key.addr.is_v4() == v4;
            self.ports.iter().filter(|port| port.frontends.iter().filter(of_family).any(lacks)).count()
        };
        let inside = lack(|it| it.internal.is_empty() && it.flags & frontend_flags::INTERNAL_DROP != 0);
        let outside = lack(|it| it.external.is_empty() && it.flags & frontend_flags::EXTERNAL_DROP != 0);
        (inside, outside)
    }
}

/// What this node does for one Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPlan {
    /// Its name.
    pub name: PortName,
    /// Every endpoint to which flows may stay, in the order of address and port, each once.
    pub endpoints: Vec<PlannedEndpoint>,
    /// Its frontends, in the order of their keys.
    pub frontends: Vec<PlannedFrontend>,
    /// Who may connect, where a frontend says SOURCE_RANGES.
    pub source_ranges: BTreeSet<IpNet>,
    /// Seconds for which a client stays with its endpoint; 0: it doesn't.
    pub affinity: u32,
}

/// An endpoint of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PlannedEndpoint {
    /// Its address.
    pub addr: IpAddr,
    /// Its port.
    pub port: u16,
    /// Whether it runs on this node.
    pub local: bool,
    /// Whether policy Cluster may choose it, and policy Local. Both are false without session affinity: nobody asks then.
    pub eligible: Eligible,
}

/// The sets that an endpoint is in, as session affinity asks for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Eligible {
    /// What policy Cluster chooses from.
    pub cluster: bool,
    /// What policy Local chooses from.
    pub local: bool,
}

/// A frontend of a Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedFrontend {
    /// Where clients connect to.
    pub key: FrontendKey,
    /// Indices of [`PortPlan::endpoints`] for clients inside.
    pub internal: Arc<[u32]>,
    /// Indices for clients outside; the same `Arc` where the two are equal.
    pub external: Arc<[u32]>,
    /// Bits of [`lb_common::layout::frontend_flags`].
    pub flags: u32,
}

/// Something in an object that can't be used. The rest of the object is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Kind and name of the object.
    pub object: String,
    /// The field, as a path within the object.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { object, field, message, remedy } = self;
        write!(f, "{object}: {field}: {message}; {remedy}")
    }
}
