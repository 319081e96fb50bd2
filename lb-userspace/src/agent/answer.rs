//! What the agent answers when it is asked.
//!
//! In: a question from the door. Out: JSON of a [`Report`] or of the Services. Nothing changes by it.

use std::net::IpAddr;

use lb_common::{
    addr::Addr,
    layout::{frontend_flags, node_flags},
};

use super::{
    Agent,
    door::Question,
    report::{Report, ServiceReport},
};
use crate::{model::Kind, source::Problem};

impl Agent {
    pub(super) fn answer(&self, question: Question) -> String {
        let text = match question {
            Question::Status => serde_json::to_string(&self.status()),
            Question::Services => serde_json::to_string(&self.services()),
        };
        text.unwrap_or_default()
    }

    fn status(&self) -> Report {
        let model = self.pipeline.model();
        let count = |kind| model.count(kind);
        let mut report = self.report.clone();
        report.objects = [
            ("services", Kind::Service),
            ("endpointSlices", Kind::EndpointSlice),
            ("pods", Kind::Pod),
            ("nodes", Kind::Node),
            ("serviceCIDRs", Kind::ServiceCidr),
        ]
        .map(|(name, kind)| (name.to_owned(), count(kind)))
        .into();
        report.devices = self.snapshot.links.values().map(|link| (link.ifindex, link.name.clone())).collect();
        report.bridges = self.snapshot.bridges();
        report.problems = self.pipeline.problems().iter().map(ToString::to_string).collect();
        report.problems.extend(self.report.source_problems.iter().map(Problem::to_string));
        report.problems.extend(
            [
                (&self.writing, "tables"),
                (&self.attaching, "devices"),
                (&self.attaching_sockets, "sockets"),
                (&self.reserving_ports, "ports"),
                (&self.ending_sockets, "connected sockets"),
            ]
            .into_iter()
            .filter_map(|(failure, heading)| failure.lasting(heading)),
        );
        report.problems.extend(self.serve.troubles().iter().map(ToString::to_string));
        report.problems.extend(self.shadowed());
        report.problems.extend(self.kernel.problems(&self.snapshot));
        let statistics = self.kernel.statistics();
        report.bpf_calls = statistics.calls;
        report.entries_written = statistics.entries;
        report.bytes_written = statistics.bytes;
        report
    }

    /// ClusterIPs that are addresses of the node, as node-local DNS caches have them: the host has them, not the Service.
    fn shadowed(&self) -> Vec<String> {
        let memory = self.pipeline.image().memory();
        let own = |addr: &Addr| memory.node_addresses.get(addr).is_some_and(|flags| flags & node_flags::LOCAL != 0);
        let refusing = memory.frontends.iter().filter(|(_, frontend)| frontend.flags & frontend_flags::ANY_PORT != 0);
        let shadowed = refusing.map(|(key, _)| key.addr).filter(own);
        shadowed
            .map(|addr| format!("ClusterIP {} is an address of this node and is left to it", IpAddr::from(addr)))
            .collect()
    }

    fn services(&self) -> Vec<ServiceReport> {
        self.pipeline
            .model()
            .services()
            .map(|(name, service)| ServiceReport {
                namespace: name.namespace().to_owned(),
                name: name.name().to_owned(),
                kind: if service.cluster_ip() == Some("None") {
                    "Headless".to_owned()
                } else {
                    service.spec.type_.as_str().to_owned()
                },
                external_name: service.spec.external_name.clone(),
            })
            .collect()
    }
}
