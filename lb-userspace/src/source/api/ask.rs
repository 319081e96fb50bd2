//! What is asked of the API server.
//!
//! In: where endpoints come from, the node's name. Out: kinds with their selectors. The selectors are those of the list requests
//! that kube-proxy 1.37 sends (`kube-proxy.md` §1).

use kube::runtime::watcher::Config;

use crate::model::{
    Kind,
    object::{HEADLESS, SERVICE_PROXY_NAME},
};

/// Where endpoints come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Endpoints {
    /// EndpointSlices, which the controllers of the cluster make.
    #[default]
    EndpointSlice,
    /// Pods whose labels a Service selects; EndpointSlices only where no controller made them from Pods.
    PodSelector,
}

/// A kind of object, and which of them.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    /// The kind.
    pub kind: Kind,
    /// Whether nothing may be written before they have been listed.
    pub needed: bool,
    labels: Option<String>,
    fields: Option<String>,
    /// Whether the list comes as a stream, which servers before 1.32 refuse.
    streaming: bool,
}

/// Everything that is asked for.
pub(super) fn all(endpoints: Endpoints, node: &str) -> Vec<Ask> {
    let ask = |kind, needed| Ask { kind, needed, labels: None, fields: None, streaming: true };
    let services = Ask {
        labels: Some(format!("!{SERVICE_PROXY_NAME}")),
        fields: Some("spec.clusterIP!=None".to_owned()),
        ..ask(Kind::Service, true)
    };
    let own_node = Ask { fields: Some(format!("metadata.name={node}")), ..ask(Kind::Node, true) };
    let slices = Ask { labels: Some(format!("!{HEADLESS}")), ..ask(Kind::EndpointSlice, true) };
    let mut asks = vec![services, ask(Kind::ServiceCidr, false)];
    match endpoints {
        Endpoints::EndpointSlice => asks.extend([own_node, slices]),
        Endpoints::PodSelector => {
            // The Service of the API server itself, and others without a selector, have slices and no Pods.
            let by_hand =
                format!("!{HEADLESS},endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io");
            let slices = Ask { labels: Some(by_hand), ..slices };
            asks.extend([ask(Kind::Node, true), ask(Kind::Pod, true), slices]);
        }
    }
    asks
}

impl Ask {
    /// How kube's watcher is told.
    pub(super) fn config(&self) -> Config {
        let mut config = Config::default();
        config.label_selector.clone_from(&self.labels);
        config.field_selector.clone_from(&self.fields);
        if self.streaming { config.streaming_lists() } else { config }
    }

    /// Asks for less after a server has refused, and says whether there was less to ask for: first a list in pages instead of a
    /// stream, then all Services, since servers before 1.32 don't select them by `spec.clusterIP`.
    pub(super) fn simplify(&mut self) -> bool {
        self.ask_for_pages() || self.kind == Kind::Service && self.fields.take().is_some()
    }

    /// Asks for pages instead of a stream, and says whether that is something else: a server that doesn't know streamed lists may send
    /// nothing at all.
    pub(super) fn ask_for_pages(&mut self) -> bool {
        std::mem::take(&mut self.streaming)
    }

    /// The resource as RBAC rules name it: `endpointslices` in API group `discovery.k8s.io`.
    pub(super) fn resource(&self) -> String {
        let (group, plural) = (self.kind.group(), self.kind.plural());
        if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") }
    }
}
