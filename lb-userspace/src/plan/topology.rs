//! Which endpoints may be chosen: readiness, hints and the two traffic policies (`kube-proxy.md` §2).
//!
//! In: the backends of one Service port and one family. Out: the cluster-wide and the local set.

use super::{Backend, NodeView};

/// The sets that policies choose from, in the order of the backends given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets<'a> {
    /// For policy Cluster.
    pub cluster: Vec<&'a Backend>,
    /// For policy Local.
    pub local: Vec<&'a Backend>,
    /// Whether there is something to choose anywhere: an empty set then drops instead of refusing.
    pub has_any: bool,
}

/// Which hints narrow the cluster-wide set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology<'a> {
    Node(&'a str),
    Zone(&'a str),
    Everywhere,
}

/// Sorts backends into the sets that policies choose from.
#[must_use]
pub fn categorize<'a>(backends: &[&'a Backend], node: &NodeView) -> Sets<'a> {
    let ready: Vec<&Backend> = backends.iter().copied().filter(|backend| backend.ready).collect();
    // Used only where nothing is ready: better an endpoint that is going away than none (KEP-1669).
    let leaving: Vec<&Backend> =
        backends.iter().copied().filter(|backend| backend.serving && backend.terminating).collect();
    let topology = topology(&ready, node);
    let cluster = ready.iter().copied().filter(|backend| suits(backend, topology)).collect();
    let local = ready.iter().copied().filter(|backend| is_local(backend, node)).collect();
    let leaving_here = || leaving.iter().copied().filter(|backend| is_local(backend, node)).collect();
    Sets {
        has_any: !ready.is_empty() || !leaving.is_empty(),
        local: or_else(local, leaving_here),
        cluster: or_else(cluster, || leaving.clone()),
    }
}

/// Whether a backend runs on this node.
#[must_use]
pub fn is_local(backend: &Backend, node: &NodeView) -> bool {
    backend.node.as_deref().is_some_and(|name| name == node.name)
}

fn or_else<'a>(set: Vec<&'a Backend>, fallback: impl FnOnce() -> Vec<&'a Backend>) -> Vec<&'a Backend> {
    if set.is_empty() { fallback() } else { set }
}

/// Hints count only if every ready endpoint has them and at least one names us: a half-written set of hints must not
/// send everything to a few endpoints.
fn topology<'a>(ready: &[&Backend], node: &'a NodeView) -> Topology<'a> {
    let whole = |suits: &dyn Fn(&Backend) -> bool, has: &dyn Fn(&Backend) -> bool| {
        ready.iter().all(|backend| has(backend)) && ready.iter().any(|backend| suits(backend))
    };
    let by_node = Topology::Node(&node.name);
    if whole(&|backend| suits(backend, by_node), &|backend| !backend.for_nodes.is_empty()) {
        return by_node;
    }
    let Some(zone) = node.zone.as_deref().filter(|zone| !zone.is_empty()) else { return Topology::Everywhere };
    let by_zone = Topology::Zone(zone);
    if whole(&|backend| suits(backend, by_zone), &|backend| !backend.for_zones.is_empty()) {
        return by_zone;
    }
    Topology::Everywhere
}

fn suits(backend: &Backend, topology: Topology<'_>) -> bool {
    match topology {
        Topology::Node(name) => backend.for_nodes.iter().any(|hint| **hint == *name),
        Topology::Zone(zone) => backend.for_zones.iter().any(|hint| **hint == *zone),
        Topology::Everywhere => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::object::Protocol;

    /// `name state node zones nodes`: state is `r`eady, `u`nready but serving, `t`erminating and serving, `d`ead.
    fn backend(text: &str) -> Backend {
        let [last, state, node, zones, nodes] = text.split(' ').collect::<Vec<_>>()[..] else { panic!("{text}") };
        let list = |text: &str| text.split(',').filter(|hint| *hint != "-").map(Into::into).collect();
        Backend {
            port_name: "p".into(),
            protocol: Protocol::Tcp,
            addr: format!("10.0.0.{last}").parse().unwrap(),
            port: 80,
            ready: state == "r",
            serving: state != "d",
            terminating: state == "t",
            node: (node != "-").then(|| node.into()),
            for_zones: list(zones),
            for_nodes: list(nodes),
        }
    }

    #[test]
    fn sets_follow_readiness_hints_and_place() {
        for (name, backends, cluster, local, has_any) in [
            ("nothing", &[][..], "", "", false),
            ("unready is never used", &["1 u here - -"], "", "", false),
            ("ready before terminating", &["1 r - - -", "2 t here - -"], "1", "2", true),
            ("terminating where nothing is ready", &["1 t - - -", "2 d - - -"], "1", "", true),
            ("unknown node is remote", &["1 r - - -"], "1", "", true),
            ("zone hints", &["1 r - a -", "2 r here b -"], "1", "2", true),
            ("one hint missing", &["1 r - a -", "2 r - - -"], "1,2", "", true),
            ("no hint for our zone", &["1 r - b -", "2 r - c -"], "1,2", "", true),
            ("unready ones need no hint", &["1 r - a -", "2 r - b -", "3 u - - -"], "1", "", true),
            ("node hints before zone hints", &["1 r - a here", "2 r - a there"], "1", "", true),
            ("node hints for others only: zones", &["1 r - a there", "2 r - b there"], "1", "", true),
            ("the fallback knows no hints", &["1 t - b -", "2 t - a -"], "1,2", "", true),
            ("hints never narrow the local set", &["1 r here b -", "2 r - a -"], "2", "1", true),
        ] {
            let backends: Vec<Backend> = backends.iter().map(|text| backend(text)).collect();
            let node = NodeView { name: "here".into(), zone: Some("a".into()), ..NodeView::default() };
            let sets = categorize(&backends.iter().collect::<Vec<_>>(), &node);
            let text = |set: &[&Backend]| {
                set.iter().map(|backend| backend.addr.to_string().replace("10.0.0.", "")).collect::<Vec<_>>().join(",")
            };
            assert_eq!((text(&sets.cluster).as_str(), text(&sets.local).as_str()), (cluster, local), "{name}");
            assert_eq!(sets.has_any, has_any, "{name}");
        }
    }

    #[test]
    fn without_a_zone_label_zone_hints_are_ignored() {
        let backends = [backend("1 r - a -"), backend("2 r - b -")];
        for zone in [None, Some(String::new())] {
            let node = NodeView { name: "here".into(), zone, ..NodeView::default() };
            assert_eq!(categorize(&backends.iter().collect::<Vec<_>>(), &node).cluster.len(), 2);
        }
    }
}
