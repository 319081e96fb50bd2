//! An API server, watched.
//!
//! In: where the API server is, and which node this is. Out: [`Update`]s: parts of the first list until Services, endpoints and
//! the node's own Node have been listed, then one for each bundle of events. Never here: a store of objects; they become
//! [`Change`](crate::model::Change)s and are dropped, only their names are kept, to know at a relist which of them are gone.

mod ask;
pub mod connection;
mod fold;
mod follow;
mod raw;
mod requests;
#[cfg(test)]
mod tests;
mod trouble;

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use tokio::{sync::mpsc, task::JoinSet, time::Instant};

use self::{
    ask::Ask,
    fold::Fold,
    follow::{Signal, follow},
};
pub use self::{ask::Endpoints, connection::Address, requests::Requests};
use super::{Problem, Update};
use crate::model::Kind;

/// How long kube-proxy waits at its start for its Node to be there and to have addresses (`kube-proxy.md` §12).
const NODE_WAIT: Duration = Duration::from_secs(30);
/// How long what can be done without is waited for, from when the API server has answered for the Node: what is pinned of it stays until
/// its list is complete.
const OPTIONAL_WAIT: Duration = Duration::from_secs(5);
/// So many events are taken in before the rest of the agent hears of them, so that a flood is one change to it.
const BUNDLE: usize = 256;

/// What the operator says of the API server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it is, and how to be let in.
    pub address: Address,
    /// Where endpoints come from.
    pub endpoints: Endpoints,
    /// The name of this node.
    pub node: String,
    /// Whether nothing can be decided before the Node has its pod networks (`detectLocalMode: NodeCIDR`).
    pub pod_cidrs: bool,
}

/// The API server as a source.
pub struct ApiServer {
    signals: mpsc::Receiver<Signal>,
    /// The watches; they end with this.
    _watches: JoinSet<()>,
    /// Kinds without which nothing is written.
    needed: Vec<Kind>,
    /// Those that are waited for only as long as they may come.
    optional: Vec<Kind>,
    fold: Fold,
    /// What keeps a kind from being listed or watched.
    troubles: BTreeMap<Kind, Problem>,
    node: NodeWait,
    begun: bool,
    told: Vec<Problem>,
}

/// The wait for the node's own Node, without which its addresses and zone aren't known.
struct NodeWait {
    name: String,
    pod_cidrs: bool,
    /// When Nodes were first listed.
    since: Option<Instant>,
}

impl ApiServer {
    /// Begins to watch an API server, by `requests` that are counted.
    ///
    /// # Errors
    ///
    /// When it can't be told where the API server is. That it does not answer is no error: it is waited for.
    pub async fn open(options: &Options, requests: &Requests) -> Result<Self> {
        // Fails early on what no waiting helps against: a kubeconfig that is missing or unreadable.
        options.address.config().await?;
        let (sender, signals) = mpsc::channel(BUNDLE);
        let mut watches = JoinSet::new();
        let asks = ask::all(options.endpoints, &options.node);
        let (needed, optional): (Vec<_>, Vec<_>) = asks.iter().partition(|ask| ask.needed);
        let kinds = |asks: Vec<&Ask>| asks.into_iter().map(|ask| ask.kind).collect();
        let (needed, optional) = (kinds(needed), kinds(optional));
        for ask in asks {
            watches.spawn(follow(options.address.clone(), requests.clone(), ask, sender.clone()));
        }
        Ok(Self {
            signals,
            _watches: watches,
            needed,
            optional,
            fold: Fold::new(&options.node),
            troubles: BTreeMap::new(),
            node: NodeWait { name: options.node.clone(), pod_cidrs: options.pod_cidrs, since: None },
            begun: false,
            told: Vec::new(),
        })
    }

    /// Waits for a change. No change is lost if the wait is given up.
    pub async fn next(&mut self) -> Option<Update> {
        loop {
            tokio::select! {
                signal = self.signals.recv() => self.take_in(signal?),
                () = tokio::time::sleep_until(self.node.deadline()), if self.waits_for_node() => {}
                () = tokio::time::sleep_until(self.node.optional_deadline()), if self.waits_for_optional() => {}
            }
            for _ in 1..BUNDLE {
                let Ok(signal) = self.signals.try_recv() else { break };
                self.take_in(signal);
            }
            let changes = self.fold.take_changes();
            let problems = self.problems();
            let first = !self.begun && self.is_complete();
            if first || !changes.is_empty() || problems != self.told {
                self.begun |= first;
                self.told.clone_from(&problems);
                return Some(Update { changes, problems, skipped: 0, first });
            }
        }
    }

    fn take_in(&mut self, signal: Signal) {
        match signal {
            Signal::Event(kind, event) => {
                self.troubles.remove(&kind);
                self.fold.take(kind, *event);
                if self.node.since.is_none() && self.fold.is_listed(Kind::Node) {
                    self.node.since = Some(Instant::now());
                }
            }
            Signal::Answered(kind) => {
                self.troubles.remove(&kind);
            }
            Signal::Trouble(kind, problem) => {
                self.troubles.insert(kind, problem);
            }
        }
    }

    fn is_complete(&self) -> bool {
        self.needed.iter().all(|kind| self.fold.is_listed(*kind)) && !self.needs_node() && !self.lacks_optional()
    }

    /// Whether something may still come that can be done without: neither is it listed, nor has it been refused.
    fn lacks_optional(&self) -> bool {
        let may_come = |kind: &Kind| !self.fold.is_listed(*kind) && !self.troubles.contains_key(kind);
        self.optional.iter().any(may_come) && Instant::now() < self.node.optional_deadline()
    }

    fn waits_for_optional(&self) -> bool {
        !self.begun && self.node.since.is_some() && self.lacks_optional()
    }

    /// Whether the Node has yet to come, or to get what can't be done without.
    fn needs_node(&self) -> bool {
        let node = self.fold.own_node();
        let lacks_networks = self.node.pod_cidrs && !node.has_networks;
        // kube-proxy gives up on networks after five minutes, and is started again to wait for them once more.
        lacks_networks || (!node.has_address && Instant::now() < self.node.deadline())
    }

    fn waits_for_node(&self) -> bool {
        !self.begun && self.node.since.is_some() && Instant::now() < self.node.deadline()
    }

    fn problems(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self.fold.problems().chain(self.troubles.values()).cloned().collect();
        problems.extend(self.node_problem());
        problems.sort();
        // The same trouble of several watches is one.
        problems.dedup();
        problems
    }

    fn node_problem(&self) -> Option<Problem> {
        self.node.since?;
        let node = self.fold.own_node();
        let message = if !node.exists {
            "the cluster has no such Node; register it, or name another by --hostname-override"
        } else if !node.has_address {
            "has no InternalIP and no ExternalIP in status.addresses; NodePorts on the primary address need one"
        } else if self.node.pod_cidrs && !node.has_networks {
            "has no spec.podCIDRs, which detectLocalMode NodeCIDR needs; nothing is written before it has"
        } else {
            return None;
        };
        let object = Some(format!("{} {}", Kind::Node, self.node.name));
        Some(Problem { object, message: message.to_owned(), ..Problem::default() })
    }
}

impl NodeWait {
    fn deadline(&self) -> Instant {
        self.since.unwrap_or_else(Instant::now) + NODE_WAIT
    }

    /// How long what can be done without is waited for.
    fn optional_deadline(&self) -> Instant {
        self.since.unwrap_or_else(Instant::now) + OPTIONAL_WAIT
    }
}
