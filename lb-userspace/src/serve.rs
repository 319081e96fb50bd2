//! What others ask over HTTP: is this node well, where are a Service's endpoints, how does it go.
//!
//! In: what the agent says of its writes, its Node and its Services. Out: kube-proxy's answers on kube-proxy's ports
//! (`kube-proxy.md` §7–§9). A thread of its own serves them: an agent that is stuck is seen as unhealthy, and nobody who asks
//! delays a change. Never here: what is healthy decides nothing about packets.

pub mod answer;
pub mod health;
pub mod listen;
pub mod node_ports;
pub mod troubles;

#[cfg(test)]
mod tests;

use std::{net::SocketAddr, sync::Arc, thread, time::Duration};

use anyhow::{Context as _, Result};
use tokio::sync::{mpsc, oneshot};

use crate::events::Events;

use self::{
    health::Health,
    node_ports::{Checks, NodePorts},
    troubles::{Trouble, Troubles},
};

/// What of kube-proxy's configuration concerns its HTTP servers. The default is kube-proxy's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `healthzBindAddress`: `/healthz` and `/livez`. None: not served.
    pub healthz: Option<SocketAddr>,
    /// `bindAddressHardFail`: the agent ends when an address can't be bound.
    pub hard_fail: bool,
    /// `syncPeriod` of the mode in force: what isn't effective after two of them makes the node unhealthy.
    pub sync_period: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            healthz: Some(SocketAddr::from(([0, 0, 0, 0], 10256))),
            hard_fail: false,
            sync_period: Duration::from_secs(30),
        }
    }
}

/// The servers, as the agent has them. They end when this is dropped.
#[derive(Debug)]
pub struct Serve {
    health: Arc<Health>,
    troubles: Troubles,
    checks: mpsc::UnboundedSender<Checks>,
    fatal: mpsc::Receiver<Trouble>,
    /// Dropping it ends the thread.
    _running: oneshot::Sender<()>,
}

impl Serve {
    /// Begins to serve, in a thread of its own. Addresses that can't be bound are tried again, and said in events.
    ///
    /// # Errors
    ///
    /// When there can be no thread.
    pub fn start(options: Options, events: Events) -> Result<Self> {
        let health = Arc::new(Health::new(options.sync_period * 2));
        let troubles = Troubles::new(events);
        let (checks, changed) = mpsc::unbounded_channel();
        let (failed, fatal) = mpsc::channel(1);
        let (running, ended) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let parts = (health.clone(), troubles.clone());
        thread::Builder::new()
            .name("http".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    let (health, troubles) = parts;
                    if let Some(address) = options.healthz {
                        let service = listen::Service {
                            address,
                            name: "healthz",
                            reason: "FailedToStartProxierHealthcheck",
                            fatal: options.hard_fail.then(|| failed.clone()),
                        };
                        tokio::spawn(listen::serve(service, health::router(health.clone()), troubles.clone()));
                    }
                    tokio::spawn(NodePorts::new(health, troubles).follow(changed));
                    // An error is what is waited for: the other end is gone.
                    let _ = ended.await;
                });
            })
            .context("starting the thread of the HTTP servers")?;
        Ok(Self { health, troubles, checks, fatal, _running: running })
    }

    /// What the agent says of its writes and its Node.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// What is wrong with the servers now.
    #[must_use]
    pub fn troubles(&self) -> Vec<Trouble> {
        self.troubles.list()
    }

    /// Says where health checks are answered from now on, and with what.
    pub fn set_checks(&self, checks: Checks) {
        // The thread lives as long as this.
        let _ = self.checks.send(checks);
    }

    /// Waits for a trouble with which the agent has to end (`bindAddressHardFail`).
    pub async fn fatal(&mut self) -> Trouble {
        match self.fatal.recv().await {
            Some(trouble) => trouble,
            None => std::future::pending().await,
        }
    }
}
