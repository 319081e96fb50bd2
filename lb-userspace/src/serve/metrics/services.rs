//! What the programs count of each Service port.
//!
//! In: counters by id, names by id. Out: metrics; those of Service ports that are gone go with them.

use std::collections::BTreeMap;

use anyhow::Result;
use lb_common::{count::ServiceCounters, layout::ServiceName, memory::Dense};
use prometheus::IntCounterVec;

use super::Maker;
use crate::image::port_name;

const LABELS: &[&str] = &["namespace", "service", "port_name", "protocol"];
const DIRECTED: &[&str] = &["namespace", "service", "port_name", "protocol", "direction"];

/// Metrics of Service ports.
#[derive(Debug)]
pub(super) struct Services {
    connections: IntCounterVec,
    packets: IntCounterVec,
    bytes: IntCounterVec,
}

impl Services {
    pub(super) fn new(maker: &Maker) -> Result<Self> {
        Ok(Self {
            connections: maker.counters(
                "fairlead_service_connections_total",
                "Connections to a Service port that began, those of the node's own sockets too",
                LABELS,
            )?,
            packets: maker.counters(
                "fairlead_service_packets_total",
                "Packets of connections to a Service port, but for those of the node's own sockets",
                DIRECTED,
            )?,
            bytes: maker.counters(
                "fairlead_service_bytes_total",
                "Bytes from the IP header on of the packets of fairlead_service_packets_total",
                DIRECTED,
            )?,
        })
    }

    /// Shows these counters, and no others.
    pub(super) fn show(&self, names: &Dense<ServiceName>, counters: &BTreeMap<u32, ServiceCounters>) {
        for metric in [&self.connections, &self.packets, &self.bytes] {
            metric.reset();
        }
        for (id, name) in names.iter() {
            let Some(name) = port_name(name) else { continue };
            let counters = counters.get(&id).copied().unwrap_or_default();
            let protocol = name.protocol.to_string();
            let labels = [name.service.namespace(), name.service.name(), &*name.port, protocol.as_str()];
            self.connections.with_label_values(&labels).inc_by(counters.connections);
            let [namespace, service, port, protocol] = labels;
            for (direction, packets, bytes) in [
                ("request", counters.request_packets, counters.request_bytes),
                ("reply", counters.reply_packets, counters.reply_bytes),
            ] {
                let labels = [namespace, service, port, protocol, direction];
                self.packets.with_label_values(&labels).inc_by(packets);
                self.bytes.with_label_values(&labels).inc_by(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{Encoder as _, Registry, TextEncoder};

    use super::*;

    #[test]
    fn a_service_port_shows_what_it_counted_until_it_is_gone() {
        let maker = Maker(Registry::new());
        let services = Services::new(&maker).unwrap();
        let text = || {
            let mut text = Vec::new();
            TextEncoder::new().encode(&maker.0.gather(), &mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        let mut names = Dense::default();
        for (id, name) in [(1, "default/web:http/TCP"), (2, "kube-system/dns:/UDP")] {
            let mut bytes = [0; lb_common::layout::SERVICE_NAME_LEN];
            bytes[..name.len()].copy_from_slice(name.as_bytes());
            names.insert(id, bytes);
        }
        let counters = ServiceCounters { connections: 2, reply_packets: 5, reply_bytes: 500, ..Default::default() };
        services.show(&names, &[(1, counters), (7, counters)].into());
        let found = text();
        for line in [
            r#"fairlead_service_connections_total{namespace="default",port_name="http",protocol="TCP",service="web"} 2"#,
            r#"fairlead_service_bytes_total{direction="reply",namespace="default",port_name="http",protocol="TCP",service="web"} 500"#,
            r#"fairlead_service_connections_total{namespace="kube-system",port_name="",protocol="UDP",service="dns"} 0"#,
        ] {
            assert!(found.contains(line), "{line} is missing in {found}");
        }
        names.remove(&1);
        services.show(&names, &BTreeMap::new());
        assert!(!text().contains("web") && text().contains("dns"));
    }
}
