//! How much there will be to write, before it is planned.
//!
//! In: the model once the first list is in it. Out: numbers from which the kernel's tables are made, so that its programs can be verified while
//! the list is planned. A guess: tables that turn out too small grow.

use crate::model::{Model, Service};

/// About how many entries a list leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// Service ports.
    pub services: usize,
    /// Frontends.
    pub frontends: usize,
    /// Endpoints, each once for every Service port that it serves.
    pub endpoints: usize,
    /// Source ranges.
    pub source_ranges: usize,
}

impl Expected {
    /// What everything that is known leads to.
    #[must_use]
    pub fn of(model: &Model) -> Self {
        let mut expected = Self::default();
        for (name, service) in model.services() {
            expected.add(service);
            expected.endpoints += model.most_backends(name);
        }
        expected
    }

    fn add(&mut self, service: &Service) {
        let spec = &service.spec;
        let ports = spec.ports.len();
        let ingress = service.status.load_balancer.ingress.len();
        let families = spec.cluster_ips.len().max(1);
        let node_ports = spec.ports.iter().filter(|port| port.node_port != 0).count();
        self.services += ports;
        self.frontends += families + ports * (families + spec.external_ips.len() + ingress) + node_ports * families;
        if !spec.load_balancer_source_ranges.is_empty() {
            self.source_ranges += ports * (spec.load_balancer_source_ranges.len() + ingress + families);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        image::Image,
        model::{Change, Interner, Object, PodState, SliceState},
        pipeline::Pipeline,
        plan::node::NodeOptions,
    };

    #[test]
    fn a_list_needs_what_was_expected() {
        let mut interner = Interner::default();
        let mut changes = Vec::new();
        for number in 1..=20 {
            let service = format!(
                r#"{{"metadata":{{"name":"s{number}"}},"spec":{{"type":"LoadBalancer","clusterIP":"10.96.0.{number}",
                    "clusterIPs":["10.96.0.{number}","fd00:1::{number}"],"externalIPs":["192.0.2.{number}"],
                    "loadBalancerSourceRanges":["203.0.113.0/24"],"selector":{{"app":"a{number}"}},
                    "ports":[{{"name":"a","port":80,"nodePort":{}}},{{"name":"b","port":81}}]}},
                    "status":{{"loadBalancer":{{"ingress":[{{"ip":"198.51.100.{number}"}}]}}}}}}"#,
                30_000 + number
            );
            changes.push(Change::Upsert(Object::Service(serde_json::from_str(&service).unwrap())));
            let pod = format!(
                r#"{{"metadata":{{"name":"p{number}","labels":{{"app":"a{number}"}}}},"status":{{
                    "podIPs":[{{"ip":"10.0.0.{number}"}},{{"ip":"fd00::{number}"}}],
                    "conditions":[{{"type":"Ready","status":"True"}}]}}}}"#
            );
            let (pod, _) = PodState::new(&serde_json::from_str(&pod).unwrap(), &mut interner);
            changes.push(Change::Upsert(Object::Pod(pod.into())));
        }
        let slice = r#"{"metadata":{"name":"s1-x","labels":{"kubernetes.io/service-name":"s1"}},"addressType":"IPv4",
            "ports":[{"name":"a","port":80},{"name":"b","port":81}],
            "endpoints":[{"addresses":["10.0.1.1"]},{"addresses":["10.0.1.2"]},{"addresses":["10.0.1.3"]}]}"#;
        let (slice, _) = SliceState::new(&serde_json::from_str(slice).unwrap(), &mut interner);
        changes.push(Change::Upsert(Object::EndpointSlice(slice.into())));
        let mut pipeline = Pipeline::new("node1", NodeOptions::default(), Image::default());
        for change in changes {
            pipeline.take(change);
        }
        let expected = Expected::of(pipeline.model());
        pipeline.compile(0);
        let memory = pipeline.image().memory();
        assert_eq!(
            expected,
            Expected {
                services: memory.services.len(),
                frontends: memory.frontends.len(),
                endpoints: memory.endpoints.len(),
                // What comes beside where a range holds the node.
                source_ranges: memory.source_ranges.len() + 20 * 2 * 3,
            }
        );
    }
}
