//! Fields that are well-formed and still can't be meant.
//!
//! In: a Service, a Node or a ServiceCIDR. Out: what is wrong with each field. (Slices and Pods are checked where they are made
//! compact.) The API server refuses such objects; a manifest folder has nobody else to do it.

use std::collections::BTreeSet;

use crate::model::{
    FieldError, Node, Service, ServiceCidr,
    address::{parse_cidr, parse_ip},
    is_name,
    object::{MAX_AFFINITY_SECONDS, ServiceType},
};

/// What is wrong with a Service.
pub(super) fn service(service: &Service) -> Vec<FieldError> {
    let spec = &service.spec;
    let mut errors = Vec::new();
    let mut check = |field: String, text: &str, good: bool, remedy: &str| {
        if !good {
            errors.push(FieldError::new(field, format!("{text:?} {remedy}")));
        }
    };
    let cluster_ip = |text: &str| text.is_empty() || text == "None" || parse_ip(text).is_some();
    const IP: &str = "is no IP address; write one like 10.0.0.1 or fd00::1";
    if spec.type_ != ServiceType::ExternalName {
        let text = spec.cluster_ip.as_deref().unwrap_or_default();
        check("spec.clusterIP".into(), text, cluster_ip(text), IP);
        for (index, text) in spec.cluster_ips.iter().enumerate() {
            check(format!("spec.clusterIPs[{index}]"), text, cluster_ip(text), IP);
        }
    }
    for (index, text) in spec.ip_families.iter().enumerate() {
        let known = matches!(&**text, "IPv4" | "IPv6");
        check(format!("spec.ipFamilies[{index}]"), text, known, "is not known; write IPv4 or IPv6");
    }
    for (index, text) in spec.external_ips.iter().enumerate() {
        check(format!("spec.externalIPs[{index}]"), text, parse_ip(text).is_some(), IP);
    }
    for (index, text) in spec.load_balancer_source_ranges.iter().enumerate() {
        let remedy = "is no network; write one like 192.0.2.0/24";
        check(format!("spec.loadBalancerSourceRanges[{index}]"), text, parse_cidr(text).is_some(), remedy);
    }
    for (index, ingress) in service.status.load_balancer.ingress.iter().enumerate() {
        let field = |name| format!("status.loadBalancer.ingress[{index}].{name}");
        let ip = ingress.ip.as_deref().unwrap_or_default();
        check(field("ip"), ip, ip.is_empty() || parse_ip(ip).is_some(), IP);
        let mode = ingress.ip_mode.as_deref().unwrap_or("VIP");
        check(field("ipMode"), mode, matches!(mode, "VIP" | "Proxy"), "is not known; write VIP or Proxy");
    }
    if let Some(seconds) =
        spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds)
    {
        let good = (1..=MAX_AFFINITY_SECONDS).contains(&seconds);
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds".to_owned();
        check(field, &seconds.to_string(), good, "is out of range; write 1 to 86400");
    }
    let mut names = BTreeSet::new();
    for (index, port) in spec.ports.iter().enumerate() {
        check(format!("spec.ports[{index}].port"), "0", port.port != 0, "is no port; write a number from 1 to 65535");
        let new = names.insert((&port.name, port.protocol));
        check(format!("spec.ports[{index}].name"), &port.name, new, "is another port's name; give each port its own");
        let field = format!("spec.ports[{index}].name");
        check(field, &port.name, is_name(&port.name), "is no name; write letters, digits and `-`");
    }
    errors
}

/// What is wrong with a Node.
pub(super) fn node(node: &Node) -> Vec<FieldError> {
    let first = node.spec.pod_cidr.iter().map(|text| ("spec.podCIDR".to_owned(), text));
    let all = node.spec.pod_cidrs.iter().enumerate();
    networks(first.chain(all.map(|(index, text)| (format!("spec.podCIDRs[{index}]"), text))))
}

/// What is wrong with a ServiceCIDR.
pub(super) fn service_cidr(cidr: &ServiceCidr) -> Vec<FieldError> {
    networks(cidr.spec.cidrs.iter().enumerate().map(|(index, text)| (format!("spec.cidrs[{index}]"), text)))
}

fn networks<'a>(fields: impl Iterator<Item = (String, &'a String)>) -> Vec<FieldError> {
    let bad = fields.filter(|(_, text)| !text.is_empty() && parse_cidr(text).is_none());
    bad.map(|(field, text)| {
        FieldError::new(field, format!("{text:?} is no network, and is not used; write one like 10.96.0.0/12"))
    })
    .collect()
}
