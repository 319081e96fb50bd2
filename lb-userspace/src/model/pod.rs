//! A Pod in compact form: what makes it an endpoint, and nothing else.
//!
//! In: the API's Pod. Out: [`PodState`], and its part of a Service's [`Backend`]s. The rules are the EndpointSlice controller's.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use super::{
    address::parse_ip,
    intern::Interner,
    labels::Labels,
    object::{ObjectName, Pod, PortRef, Protocol, Service, ServicePort},
    problem::FieldError,
};
use crate::plan::Backend;

/// A Pod as the model keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodState {
    /// Its name.
    pub name: ObjectName,
    /// What selectors look at.
    pub labels: Labels,
    /// Where it runs.
    pub node: Option<Arc<str>>,
    /// Its addresses; none if it is no endpoint of anything (finished, or not started).
    pub addrs: PodAddrs,
    /// Named ports of containers that keep running.
    pub ports: Arc<[NamedPort]>,
    /// Condition `Ready`.
    pub ready: bool,
    /// Has a `deletionTimestamp`.
    pub terminating: bool,
}

/// The addresses of a Pod, each once. Nearly all have one a family at most, and these have no memory of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct PodAddrs {
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
    more: Box<[IpAddr]>,
}

impl FromIterator<IpAddr> for PodAddrs {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addrs: I) -> Self {
        let (mut v4, mut v6, mut more) = (None, None, Vec::new());
        for addr in addrs {
            match addr {
                IpAddr::V4(addr) if v4.is_none() => v4 = Some(addr),
                IpAddr::V6(addr) if v6.is_none() => v6 = Some(addr),
                IpAddr::V4(other) if v4 == Some(other) => {}
                IpAddr::V6(other) if v6 == Some(other) => {}
                IpAddr::V4(_) | IpAddr::V6(_) if more.contains(&addr) => {}
                IpAddr::V4(_) | IpAddr::V6(_) => more.push(addr),
            }
        }
        Self { v4, v6, more: more.into() }
    }
}

impl PodAddrs {
    /// The addresses.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        let first = self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6));
        first.chain(self.more.iter().copied())
    }
}

/// A port that has a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NamedPort {
    /// The name.
    pub name: Arc<str>,
    /// The number.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

impl PodState {
    /// The compact form, and the addresses that can't be read.
    pub fn new(pod: &Pod, interner: &mut Interner) -> (Self, Vec<FieldError>) {
        let mut errors = Vec::new();
        let finished = matches!(&*pod.status.phase, "Succeeded" | "Failed");
        let sidecars =
            pod.spec.init_containers.iter().filter(|container| container.restart_policy.as_deref() == Some("Always"));
        // Containers before sidecars: where both have the name, the container has it.
        let ports = pod.spec.containers.iter().chain(sidecars).flat_map(|container| &container.ports);
        let named = ports.filter(|port| !port.name.is_empty()).map(|port| NamedPort {
            name: interner.text(&port.name),
            port: port.container_port,
            protocol: port.protocol,
        });
        let named: Vec<NamedPort> = named.collect();
        let state = Self {
            name: pod.metadata.namespaced(),
            labels: interner.labels(&pod.metadata.labels),
            node: pod.spec.node_name.as_deref().filter(|node| !node.is_empty()).map(|node| interner.text(node)),
            addrs: if finished { PodAddrs::default() } else { addresses(pod, &mut errors) },
            ports: interner.ports(&named),
            ready: pod.status.conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"),
            terminating: pod.metadata.deletion_timestamp.is_some(),
        };
        (state, errors)
    }

    /// What this Pod is to a Service that selects it.
    pub(super) fn backends<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = Backend> + 'a {
        service.spec.ports.iter().filter_map(|port| Some((port, self.target(port)?))).flat_map(move |(port, number)| {
            let name: Arc<str> = port.name.as_str().into();
            self.addrs.iter().map(move |addr| Backend {
                port_name: name.clone(),
                protocol: port.protocol,
                addr,
                port: number,
                ready: (self.ready || service.spec.publish_not_ready_addresses) && !self.terminating,
                serving: self.ready,
                terminating: self.terminating,
                node: self.node.clone(),
                for_zones: Vec::new(),
                for_nodes: Vec::new(),
            })
        })
    }

    /// The number of a Service port's target in this Pod.
    fn target(&self, port: &ServicePort) -> Option<u16> {
        match &port.target_port {
            None | Some(PortRef::Number(0)) => Some(port.port),
            Some(PortRef::Number(number)) => Some(*number),
            Some(PortRef::Name(name)) if name.is_empty() => Some(port.port),
            Some(PortRef::Name(name)) => {
                let named = |candidate: &&NamedPort| *candidate.name == **name && candidate.protocol == port.protocol;
                self.ports.iter().find(named).map(|found| found.port)
            }
        }
        .filter(|number| *number != 0)
    }
}

fn addresses(pod: &Pod, errors: &mut Vec<FieldError>) -> PodAddrs {
    let mut addrs = Vec::with_capacity(2);
    let mut add = |field: String, text: &str| match parse_ip(text) {
        Some(addr) => addrs.push(addr),
        None if text.is_empty() => {}
        None => errors.push(FieldError::new(
            field,
            format!("{text:?} is no IP address; the Pod gets no connections there until it is one"),
        )),
    };
    if pod.status.pod_ips.is_empty() {
        add("status.podIP".into(), pod.status.pod_ip.as_deref().unwrap_or_default());
    } else {
        for (index, pod_ip) in pod.status.pod_ips.iter().enumerate() {
            add(format!("status.podIPs[{index}].ip"), &pod_ip.ip);
        }
    }
    addrs.into_iter().collect()
}
