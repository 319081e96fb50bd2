//! What others ask over HTTP: is this node well, where are a Service's endpoints, how does it go.
//!
//! In: what the agent says of its writes, its Node and its Services. Out: kube-proxy's answers on kube-proxy's ports
//! (`kube-proxy.md` §7–§9). A thread of its own serves them: an agent that is stuck is seen as unhealthy, and nobody who asks
//! delays a change. Never here: what is healthy decides nothing about packets.

pub mod answer;
pub mod health;
pub mod listen;
pub mod metrics;
pub mod node_ports;
pub mod pages;
pub mod troubles;

#[cfg(test)]
mod tests;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, atomic::AtomicU64},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::sync::{mpsc, oneshot};

use self::{
    health::Health,
    metrics::Metrics,
    node_ports::{Checks, NodePorts},
    pages::Pages,
    troubles::{Trouble, Troubles},
};
use crate::{events::Events, plan::node::ProxyMode};

/// What of kube-proxy's configuration concerns its HTTP servers. The default is kube-proxy's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `healthzBindAddress`: `/healthz` and `/livez`. None: not served.
    pub healthz: Option<SocketAddr>,
    /// `metricsBindAddress`: `/metrics` and the other pages. None: not served.
    pub metrics: Option<SocketAddr>,
    /// The mode, which `/proxyMode` answers and which metrics depend on.
    pub mode: ProxyMode,
    /// The configuration in force, for `/configz`.
    pub configuration: serde_json::Value,
    /// Flags with their values, for `/flagz`.
    pub flags: Vec<(String, String)>,
    /// `bindAddressHardFail`: the agent ends when an address can't be bound.
    pub hard_fail: bool,
    /// `syncPeriod` of the mode in force: what isn't effective after two of them makes the node unhealthy.
    pub sync_period: Duration,
    /// Whether the programs count by Service port.
    pub service_metrics: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            healthz: Some(SocketAddr::from(([0, 0, 0, 0], 10256))),
            metrics: Some(SocketAddr::from(([127, 0, 0, 1], 10249))),
            mode: ProxyMode::default(),
            configuration: serde_json::Value::Object(serde_json::Map::new()),
            flags: Vec::new(),
            hard_fail: false,
            sync_period: Duration::from_secs(30),
            service_metrics: true,
        }
    }
}

/// The servers, as the agent has them. They end when this is dropped.
#[derive(Debug)]
pub struct Serve {
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    troubles: Troubles,
    checks: mpsc::UnboundedSender<Checks>,
    fatal: mpsc::Receiver<Trouble>,
    /// Dropping it ends the thread.
    _running: oneshot::Sender<()>,
}

impl Serve {
    /// Begins to serve, in a thread of its own. Addresses that can't be bound are tried again, and said in `events`. `bpffs` is
    /// where metrics find the programs' counters.
    ///
    /// # Errors
    ///
    /// When there can be no thread.
    pub fn start(options: Options, bpffs: PathBuf, events: Events) -> Result<Self> {
        let health = Arc::new(Health::new(options.sync_period * 2));
        let metrics = Arc::new(Metrics::new(options.mode, bpffs, options.service_metrics)?);
        let troubles = Troubles::new(events);
        let (checks, changed) = mpsc::unbounded_channel();
        let (failed, fatal) = mpsc::channel(1);
        let (running, ended) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let node_ports = NodePorts::new(health.clone(), troubles.clone());
        let services = services(options, &health, &metrics, &failed);
        let report_to = troubles.clone();
        let work = async move {
            for (service, router) in services {
                tokio::spawn(listen::serve(service, router, report_to.clone()));
            }
            tokio::spawn(node_ports.follow(changed));
            // An error is what is waited for: the other end is gone.
            let _ = ended.await;
        };
        thread::Builder::new()
            .name("http".to_owned())
            .spawn(move || runtime.block_on(work))
            .context("starting the thread of the HTTP servers")?;
        Ok(Self { health, metrics, troubles, checks, fatal, _running: running })
    }

    /// What the agent says of its writes and its Node.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// What is wrong with the servers now.
    #[must_use]
    pub fn troubles(&self) -> Vec<Trouble> {
        self.troubles.list()
    }

    /// Notes something that is wrong for as long as the agent lives.
    pub fn report(&self, subject: &str, trouble: Trouble) {
        self.troubles.report(subject, trouble);
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

/// The two servers that live as long as the agent, if they are wanted.
fn services(
    options: Options,
    health: &Arc<Health>,
    metrics: &Arc<Metrics>,
    failed: &mpsc::Sender<Trouble>,
) -> Vec<(listen::Service, axum::Router)> {
    let Options { healthz, metrics: bound, mode, configuration, flags, hard_fail, sync_period: _, service_metrics: _ } =
        options;
    let service =
        |address, name, reason| listen::Service { address, name, reason, fatal: hard_fail.then(|| failed.clone()) };
    let pages = Pages { metrics: metrics.clone(), mode, configuration, flags, pings: AtomicU64::new(0) };
    let healthz = healthz.map(|address| {
        let service = service(address, "healthz", "FailedToStartProxierHealthcheck");
        (service, health::router(health.clone(), metrics.clone()))
    });
    let bound =
        bound.map(|address| (service(address, "metrics", "FailedToStartMetricServer"), pages::router(Arc::new(pages))));
    healthz.into_iter().chain(bound).collect()
}
