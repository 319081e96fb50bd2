//! A Service and its backends become frontends with lists of endpoints.
//!
//! In: the Service, its backends, the node. Out: its plan, and what in it could not be used. Never here: other Services.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::{
    addr::{Addr, Port},
    affinity::{DEFAULT_TIMEOUT, node_client},
    layout::{FrontendKey, frontend_flags},
};

use super::{
    Backend, Eligible, HealthCheck, NodeView, PlannedEndpoint, PlannedFrontend, PortName, PortPlan, Problem,
    ServicePlan,
    address::{host, same_family},
    topology::{Sets, categorize, is_local},
};
use crate::model::{
    Service,
    address::{parse_cidr, parse_ip},
    object::{MAX_AFFINITY_SECONDS, ServicePort, ServiceType, SessionAffinity, TrafficPolicy},
};

/// What this node does for a Service; nothing for one that isn't ours (hidden by label, ExternalName, headless).
#[must_use]
pub fn plan_service(service: &Service, backends: &[Backend], node: &NodeView) -> (Option<ServicePlan>, Vec<Problem>) {
    if service.is_hidden() || service.spec.type_ == ServiceType::ExternalName || is_headless(service) {
        return (None, Vec::new());
    }
    let mut reader = Reader { service, problems: Vec::new() };
    let families = reader.families(node);
    if families.is_empty() {
        return (None, reader.problems);
    }
    let affinity = reader.affinity();
    let ports =
        service.spec.ports.iter().map(|port| plan_port(service, port, &families, affinity, backends, node)).collect();
    let local_ready: BTreeSet<IpAddr> = backends
        .iter()
        .filter(|backend| backend.ready && is_local(backend, node))
        .map(|backend| backend.addr)
        .collect();
    let any_port = families.iter().map(|family| family.cluster_ip.into()).collect();
    let health_check = health_check(service, &families, &local_ready);
    (Some(ServicePlan { ports, any_port, local_ready: local_ready.len(), health_check }), reader.problems)
}

/// Only Services for which a load balancer must know where the endpoints are have one.
fn health_check(service: &Service, families: &[Family], local_ready: &BTreeSet<IpAddr>) -> Option<HealthCheck> {
    let spec = &service.spec;
    let wanted = spec.type_ == ServiceType::LoadBalancer && spec.external_traffic_policy == TrafficPolicy::Local;
    let count = |v4: bool| {
        let has_family = families.iter().any(|family| family.cluster_ip.is_ipv4() == v4);
        has_family.then(|| local_ready.iter().filter(|addr| addr.is_ipv4() == v4).count())
    };
    (wanted && spec.health_check_node_port != 0).then(|| HealthCheck {
        port: spec.health_check_node_port,
        v4: count(true),
        v6: count(false),
    })
}

/// The addresses of a Service in one family.
struct Family {
    cluster_ip: IpAddr,
    external: Vec<IpAddr>,
    load_balancer: Vec<IpAddr>,
    /// Empty: everyone may connect.
    source_ranges: BTreeSet<IpNet>,
}

fn is_headless(service: &Service) -> bool {
    matches!(service.cluster_ip(), None | Some("" | "None"))
}

/// Reads the Service's addresses and notes what it could not read.
struct Reader<'a> {
    service: &'a Service,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn families(&mut self, node: &NodeView) -> Vec<Family> {
        let spec = &self.service.spec;
        let cluster_ips = self.cluster_ips();
        let external = self.ips("spec.externalIPs", spec.external_ips.iter().map(String::as_str).enumerate());
        let ingress = &self.service.status.load_balancer.ingress;
        // `Proxy`: packets arrive with another destination, and clients inside must go out to the load balancer.
        let virtual_ips = ingress.iter().enumerate().filter_map(|(index, ingress)| {
            let is_vip = ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP");
            Some((index, ingress.ip.as_deref().filter(|ip| is_vip && !ip.is_empty())?))
        });
        let load_balancer = self.ips("status.loadBalancer.ingress", virtual_ips);
        let ranges = self.source_ranges();
        if let Some((index, ip)) = external
            .iter()
            .find(|(_, ip)| !cluster_ips.is_empty() && !cluster_ips.iter().any(|cluster| same_family(cluster, ip)))
        {
            let message = format!("{ip} is of a family in which the Service has no ClusterIP, and is not served");
            let remedy = "add the family to spec.ipFamilies or remove the address";
            self.report(format!("spec.externalIPs[{index}]"), message, remedy);
        }
        let of_family = |ips: &[(usize, IpAddr)], family: &IpAddr| {
            ips.iter().map(|(_, ip)| *ip).filter(|ip| same_family(ip, family)).collect::<Vec<_>>()
        };
        let family = |cluster_ip: IpAddr| {
            let load_balancer = of_family(&load_balancer, &cluster_ip);
            let mut source_ranges: BTreeSet<IpNet> =
                ranges.iter().copied().filter(|range| same_family(&range.addr(), &cluster_ip)).collect();
            let admits_node =
                node.primary.iter().any(|primary| source_ranges.iter().any(|range| range.contains(primary)));
            // What the node sends to such an address may have the address as its source; its sockets have none yet.
            if admits_node {
                source_ranges.extend(load_balancer.iter().copied().map(host));
                source_ranges.insert(host(node_client(&cluster_ip.into()).into()));
            }
            Family { cluster_ip, external: of_family(&external, &cluster_ip), load_balancer, source_ranges }
        };
        cluster_ips.into_iter().map(family).collect()
    }

    /// The ClusterIPs, one a family: the first of each. A manifest without `ipFamilies` has those of its ClusterIPs, as the API server would
    /// give it.
    fn cluster_ips(&mut self) -> Vec<IpAddr> {
        let spec = &self.service.spec;
        let fields: Vec<(String, &str)> = if spec.cluster_ips.is_empty() {
            spec.cluster_ip.iter().map(|ip| ("spec.clusterIP".to_owned(), ip.as_str())).collect()
        } else {
            let texts = spec.cluster_ips.iter().enumerate();
            texts.map(|(index, ip)| (format!("spec.clusterIPs[{index}]"), ip.as_str())).collect()
        };
        let mut found: Vec<IpAddr> = Vec::new();
        for (field, text) in fields {
            let Some(ip) = parse_ip(text) else {
                self.report(field, format!("`{text}` is not an IP address"), "let the API server assign it");
                continue;
            };
            if !found.iter().any(|other| same_family(other, &ip)) {
                found.push(ip);
            }
        }
        found
    }

    fn ips<'b>(&mut self, list: &str, texts: impl Iterator<Item = (usize, &'b str)>) -> Vec<(usize, IpAddr)> {
        let mut found = Vec::new();
        for (index, text) in texts {
            match parse_ip(text) {
                Some(ip) => found.push((index, ip)),
                None => self.report(
                    format!("{list}[{index}]"),
                    format!("`{text}` is not an IP address and is not served"),
                    "write an IPv4 or IPv6 address",
                ),
            }
        }
        found
    }

    fn source_ranges(&mut self) -> Vec<IpNet> {
        let mut found = Vec::new();
        for (index, text) in self.service.spec.load_balancer_source_ranges.iter().enumerate() {
            match parse_cidr(text) {
                Some(net) => found.push(net),
                None => self.report(
                    format!("spec.loadBalancerSourceRanges[{index}]"),
                    format!("`{text}` is not a network and lets nobody in"),
                    "write it like 203.0.113.0/24; a family of which no range can be read is not restricted",
                ),
            }
        }
        found
    }

    /// Seconds for which a client stays with its endpoint; 0 without session affinity.
    fn affinity(&mut self) -> u32 {
        let spec = &self.service.spec;
        if spec.session_affinity == SessionAffinity::None {
            return 0;
        }
        let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let seconds = config.and_then(|config| config.timeout_seconds).unwrap_or(DEFAULT_TIMEOUT);
        if (1..=MAX_AFFINITY_SECONDS).contains(&seconds) {
            return seconds;
        }
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds".to_owned();
        let message = format!("{seconds} is out of range, clients are remembered for {DEFAULT_TIMEOUT} seconds");
        self.report(field, message, "write 1 to 86400");
        DEFAULT_TIMEOUT
    }

    fn report(&mut self, field: String, message: String, remedy: &str) {
        let object = format!("Service {}", self.service.metadata.namespaced());
        self.problems.push(Problem { object, field, message, remedy: remedy.to_owned() });
    }
}

fn plan_port(
    service: &Service,
    port: &ServicePort,
    families: &[Family],
    affinity: u32,
    backends: &[Backend],
    node: &NodeView,
) -> PortPlan {
    let name =
        PortName { service: service.metadata.namespaced(), port: port.name.as_str().into(), protocol: port.protocol };
    let backends = backends_of(port, backends);
    let staying: Vec<&Backend> = backends.iter().copied().filter(|backend| backend.ready || backend.serving).collect();
    let mut endpoints: Vec<PlannedEndpoint> = staying
        .iter()
        .map(|backend| PlannedEndpoint {
            addr: backend.addr,
            port: backend.port,
            local: is_local(backend, node),
            eligible: Eligible::default(),
        })
        .collect();
    let mut frontends = BTreeMap::new();
    let mut source_ranges = BTreeSet::new();
    for family in families {
        let of_family: Vec<&Backend> =
            backends.iter().copied().filter(|backend| same_family(&backend.addr, &family.cluster_ip)).collect();
        let choices = Choices::new(service, categorize(&of_family, node), &staying);
        add_frontends(&mut frontends, port, family, &choices, node);
        if affinity != 0 {
            choices.mark(&mut endpoints);
        }
        if !family.load_balancer.is_empty() {
            source_ranges.extend(&family.source_ranges);
        }
    }
    PortPlan { name, endpoints, frontends: frontends.into_values().collect(), source_ranges, affinity }
}

/// The backends of a Service port, in the order of address and port, each once: one that stays beats one that goes.
fn backends_of<'a>(port: &ServicePort, backends: &'a [Backend]) -> Vec<&'a Backend> {
    let mut found: Vec<&Backend> = backends
        .iter()
        .filter(|backend| *backend.port_name == *port.name && backend.protocol == port.protocol)
        .collect();
    found.sort_by_key(|backend| (backend.addr, backend.port, backend.terminating));
    found.dedup_by_key(|backend| (backend.addr, backend.port));
    found
}

/// What the frontends of one port and family may choose from, by policy.
struct Choices {
    cluster: Arc<[u32]>,
    local: Arc<[u32]>,
    has_any: bool,
    internal_local: bool,
    external_local: bool,
}

impl Choices {
    fn new(service: &Service, sets: Sets<'_>, staying: &[&Backend]) -> Self {
        let indices = |set: &[&Backend]| -> Arc<[u32]> {
            let index = |backend: &&Backend| {
                let place = staying.binary_search_by_key(&(backend.addr, backend.port), |b| (b.addr, b.port));
                place.ok().and_then(|place| u32::try_from(place).ok())
            };
            set.iter().filter_map(index).collect()
        };
        let cluster = indices(&sets.cluster);
        let local = indices(&sets.local);
        Self {
            local: if local == cluster { cluster.clone() } else { local },
            cluster,
            has_any: sets.has_any,
            internal_local: service.spec.internal_traffic_policy == TrafficPolicy::Local,
            external_local: service.spec.external_traffic_policy == TrafficPolicy::Local,
        }
    }

    /// Tells the endpoints which sets they are in.
    fn mark(&self, endpoints: &mut [PlannedEndpoint]) {
        let mut mark = |indices: &[u32], set: fn(&mut Eligible)| {
            for index in indices {
                if let Some(endpoint) = usize::try_from(*index).ok().and_then(|index| endpoints.get_mut(index)) {
                    set(&mut endpoint.eligible);
                }
            }
        };
        mark(&self.cluster, |eligible| eligible.cluster = true);
        mark(&self.local, |eligible| eligible.local = true);
    }

    /// Ranges and flags of a ClusterIP.
    fn inside(&self, detects_local: bool, node: &NodeView) -> (Arc<[u32]>, Arc<[u32]>, u32) {
        let masquerade = if node.masquerade_all {
            frontend_flags::MASQUERADE | kept(node)
        } else if detects_local {
            frontend_flags::MASQUERADE_UNDETECTED | kept(node)
        } else {
            0
        };
        if self.internal_local {
            let drops = if self.has_any { frontend_flags::INTERNAL_DROP } else { 0 };
            let flags = frontend_flags::CLUSTER_IP | frontend_flags::INTERNAL_LOCAL | masquerade | drops;
            (self.local.clone(), self.local.clone(), flags)
        } else {
            (self.cluster.clone(), self.cluster.clone(), frontend_flags::CLUSTER_IP | masquerade)
        }
    }

    /// Ranges and flags of NodePorts, external addresses and those of load balancers.
    fn outside(&self, node: &NodeView) -> (Arc<[u32]>, Arc<[u32]>, u32) {
        if self.external_local {
            let drops = if self.has_any { frontend_flags::EXTERNAL_DROP } else { 0 };
            (self.cluster.clone(), self.local.clone(), frontend_flags::EXTERNAL_LOCAL | drops)
        } else {
            (self.cluster.clone(), self.cluster.clone(), frontend_flags::MASQUERADE | kept(node))
        }
    }
}

/// Where a frontend masquerades: whether it leaves alone what goes to an endpoint of this node (`--preserve-client-ip`).
const fn kept(node: &NodeView) -> u32 {
    if node.preserve_client_ip { frontend_flags::PRESERVE_LOCAL } else { 0 }
}

fn add_frontends(
    frontends: &mut BTreeMap<FrontendKey, PlannedFrontend>,
    port: &ServicePort,
    family: &Family,
    choices: &Choices,
    node: &NodeView,
) {
    // Where one address stands in several fields, the first has it, and restrictions add up.
    let mut add = |addr: Addr, number: u16, (internal, external, flags): (Arc<[u32]>, Arc<[u32]>, u32), more: u32| {
        let key = FrontendKey::new(addr, Port::new(number), port.protocol.number());
        let frontend = frontends.entry(key).or_insert(PlannedFrontend { key, internal, external, flags });
        frontend.flags |= more;
    };
    add(family.cluster_ip.into(), port.port, choices.inside(node.detects_local.of(&family.cluster_ip), node), 0);
    for ip in &family.external {
        add((*ip).into(), port.port, choices.outside(node), 0);
    }
    let restricted = if family.source_ranges.is_empty() { 0 } else { frontend_flags::SOURCE_RANGES };
    for ip in &family.load_balancer {
        add((*ip).into(), port.port, choices.outside(node), restricted);
    }
    if port.node_port != 0 {
        let any = Addr::from(family.cluster_ip).unspecified();
        add(any, port.node_port, choices.outside(node), frontend_flags::NODE_PORT);
    }
}

#[cfg(test)]
mod tests;
