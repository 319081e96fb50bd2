//! An EndpointSlice in compact form.
//!
//! In: the API's EndpointSlice. Out: [`SliceState`], and its part of a Service's [`Backend`]s. The rules are kube-proxy's.

use std::{net::IpAddr, sync::Arc};

use super::{
    address::parse_ip,
    intern::Interner,
    object::{EndpointHints, EndpointSlice, HEADLESS, Hint, ObjectName, SERVICE_NAME, SliceEndpoint},
    pod::NamedPort,
    problem::FieldError,
};
use crate::plan::Backend;

/// An EndpointSlice as the model keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SliceState {
    /// Its name.
    pub name: ObjectName,
    /// The Service that it belongs to, in the same namespace; none if no label names one or the slice is hidden.
    pub service: Option<ObjectName>,
    /// Ports that have a name (which may be empty) and a number.
    pub ports: Box<[NamedPort]>,
    /// Endpoints that have an address of the slice's family.
    pub endpoints: Box<[EndpointState]>,
    /// When what it follows changed, in seconds of Unix time, as its controller says.
    pub changed: Option<i64>,
}

/// An endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointState {
    /// Its address.
    pub addr: IpAddr,
    /// May get new connections.
    pub ready: bool,
    /// Still answers.
    pub serving: bool,
    /// Is going away.
    pub terminating: bool,
    /// Where it runs.
    pub node: Option<Arc<str>>,
    /// Zones and nodes that should use it, where the slice says so.
    pub hints: Option<Box<Hints>>,
}

/// Who should use an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    /// Zones.
    pub zones: Box<[Arc<str>]>,
    /// Nodes.
    pub nodes: Box<[Arc<str>]>,
}

impl SliceState {
    /// The compact form, and the fields that can't be used.
    pub fn new(slice: &EndpointSlice, interner: &mut Interner) -> (Self, Vec<FieldError>) {
        let mut errors = Vec::new();
        let metadata = &slice.metadata;
        let name = metadata.namespaced();
        let service = metadata.labels.get(SERVICE_NAME).filter(|service| !service.is_empty());
        let service = service.filter(|_| !metadata.labels.contains_key(HEADLESS));
        let service = service.map(|service| ObjectName::new(name.namespace(), service).shared(interner));
        let ports = slice.ports.iter().filter_map(|port| {
            Some(NamedPort {
                name: interner.text(port.name.as_deref()?),
                port: port.port.filter(|number| *number != 0)?,
                protocol: port.protocol.unwrap_or_default(),
            })
        });
        let ports = ports.collect();
        let ipv4 = match &*slice.address_type {
            "IPv4" => Some(true),
            "IPv6" => Some(false),
            "FQDN" => None,
            other => {
                errors.push(FieldError::new(
                    "addressType",
                    format!("{other:?} is not known, so the slice's endpoints are not used; write IPv4 or IPv6"),
                ));
                None
            }
        };
        let endpoints = match ipv4 {
            Some(ipv4) => {
                let numbered = slice.endpoints.iter().enumerate();
                numbered
                    .filter_map(|(index, endpoint)| {
                        let (addr, error) = address(endpoint, index, ipv4)?;
                        errors.extend(error);
                        Some(EndpointState::new(endpoint, addr?, interner))
                    })
                    .collect()
            }
            None => Box::default(),
        };
        let changed = metadata.annotations.last_change_trigger_time.as_deref();
        let changed = changed.and_then(|text| text.parse::<jiff::Timestamp>().ok()).map(jiff::Timestamp::as_second);
        (Self { name, service, ports, endpoints, changed }, errors)
    }

    /// What this slice says about its Service.
    pub(super) fn backends(&self) -> impl Iterator<Item = Backend> {
        self.ports.iter().flat_map(|port| self.endpoints.iter().map(move |endpoint| endpoint.backend(port)))
    }
}

impl EndpointState {
    fn new(endpoint: &SliceEndpoint, addr: IpAddr, interner: &mut Interner) -> Self {
        let conditions = &endpoint.conditions;
        Self {
            addr,
            ready: conditions.ready.unwrap_or(true),
            serving: conditions.serving.unwrap_or(true),
            terminating: conditions.terminating.unwrap_or(false),
            node: endpoint.node_name.as_deref().filter(|node| !node.is_empty()).map(|node| interner.text(node)),
            hints: endpoint.hints.as_ref().and_then(|hints| Hints::new(hints, interner)),
        }
    }

    fn backend(&self, port: &NamedPort) -> Backend {
        let list = |names: fn(&Hints) -> &[Arc<str>]| self.hints.as_deref().map(names).unwrap_or_default().to_vec();
        Backend {
            port_name: port.name.clone(),
            protocol: port.protocol,
            addr: self.addr,
            port: port.port,
            ready: self.ready,
            serving: self.serving,
            terminating: self.terminating,
            node: self.node.clone(),
            for_zones: list(|hints| &hints.zones),
            for_nodes: list(|hints| &hints.nodes),
        }
    }
}

impl Hints {
    fn new(hints: &EndpointHints, interner: &mut Interner) -> Option<Box<Self>> {
        let mut names = |hints: &[Hint]| hints.iter().map(|hint| interner.text(&hint.name)).collect::<Box<[_]>>();
        let hints = Self { zones: names(&hints.for_zones), nodes: names(&hints.for_nodes) };
        (!hints.zones.is_empty() || !hints.nodes.is_empty()).then(|| Box::new(hints))
    }
}

/// The endpoint's first address, or why there is none; nothing at all for an endpoint that lists none.
fn address(endpoint: &SliceEndpoint, index: usize, ipv4: bool) -> Option<(Option<IpAddr>, Option<FieldError>)> {
    let text = endpoint.addresses.first()?;
    let field = || format!("endpoints[{index}].addresses[0]");
    Some(match parse_ip(text) {
        Some(addr) if addr.is_ipv4() == ipv4 => (Some(addr), None),
        Some(_) => {
            let message = format!("{text:?} is not of the slice's addressType; put it into a slice of its own family");
            (None, Some(FieldError::new(field(), message)))
        }
        None => {
            let message = format!("{text:?} is no IP address; the endpoint is not used until it is one");
            (None, Some(FieldError::new(field(), message)))
        }
    })
}
