//! healthCheckNodePorts: a server for each Service that has one (`kube-proxy.md` §7).
//!
//! In: ports and counts of local endpoints as the agent has written them, the addresses to listen at. Out: a server for each
//! Service and family, opened, closed and tried again as they change. Never here: how endpoints are counted.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Router,
    body::Body,
    http::{HeaderName, HeaderValue, Response, StatusCode},
};
use tokio::{sync::mpsc, time::interval};
use tracing::debug;

use super::{
    answer::{JSON, answer},
    health::{Family, Health, Moment},
    listen::{self, Server},
    troubles::{Trouble, Troubles},
};
use crate::{model::ObjectName, plan::HealthCheck};

/// What load balancers weigh nodes by.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checks {
    /// Services with what their port answers from now on; nothing: it has none any more.
    pub services: BTreeMap<ObjectName, Option<HealthCheck>>,
    /// Where to listen from now on, unspecified for every address of the family; none: where it is now.
    pub addresses: Option<Vec<IpAddr>>,
}

/// The server of one Service in one family.
#[derive(Debug)]
struct Check {
    port: u16,
    endpoints: Arc<AtomicUsize>,
    /// None: it could not be opened.
    servers: Option<Vec<Server>>,
}

/// All of them.
#[derive(Debug)]
pub struct NodePorts {
    health: Arc<Health>,
    troubles: Troubles,
    addresses: Vec<IpAddr>,
    checks: BTreeMap<(ObjectName, Family), Check>,
}

impl NodePorts {
    /// None yet.
    #[must_use]
    pub fn new(health: Arc<Health>, troubles: Troubles) -> Self {
        Self { health, troubles, addresses: Vec::new(), checks: BTreeMap::new() }
    }

    /// Follows until nobody changes anything any more.
    pub async fn follow(mut self, mut changes: mpsc::UnboundedReceiver<Checks>) {
        let mut again = interval(listen::RETRY);
        loop {
            tokio::select! {
                change = changes.recv() => match change {
                    Some(change) => self.change(change).await,
                    None => return,
                },
                _ = again.tick() => self.open_all(),
            }
        }
    }

    /// Closes before it opens: a port may go from one Service to another.
    async fn change(&mut self, change: Checks) {
        if let Some(addresses) = change.addresses.filter(|addresses| *addresses != self.addresses) {
            self.addresses = addresses;
            for check in self.checks.values_mut() {
                for server in check.servers.take().into_iter().flatten() {
                    server.close().await;
                }
            }
        }
        let mut wanted = Vec::new();
        for (name, check) in change.services {
            for family in Family::ALL {
                let key = (name.clone(), family);
                let count = check.and_then(|check| match family {
                    Family::V4 => check.v4,
                    Family::V6 => check.v6,
                });
                let new = check.zip(count);
                if let Some(old) = self.checks.get(&key) {
                    match new {
                        Some((check, count)) if check.port == old.port => {
                            old.endpoints.store(count, Ordering::Relaxed);
                            continue;
                        }
                        Some(_) | None => self.close(&key).await,
                    }
                }
                wanted.extend(new.map(|(check, count)| (key, check.port, count)));
            }
        }
        for (key, port, count) in wanted {
            self.checks.insert(key, Check { port, endpoints: Arc::new(AtomicUsize::new(count)), servers: None });
        }
        self.open_all();
    }

    async fn close(&mut self, key: &(ObjectName, Family)) {
        let Some(check) = self.checks.remove(key) else { return };
        debug!(service = %key.0, port = check.port, "health check closed");
        for server in check.servers.into_iter().flatten() {
            server.close().await;
        }
        self.troubles.resolve(&subject(key));
    }

    /// Opens those that are not, which is every one that is new and every one that failed.
    fn open_all(&mut self) {
        let Self { health, troubles, addresses, checks } = self;
        for (key, check) in checks.iter_mut().filter(|(_, check)| check.servers.is_none()) {
            let (name, family) = key;
            let router = router(name, check.endpoints.clone(), health.clone());
            let of_family = addresses.iter().filter(|addr| addr.is_ipv4() == (*family == Family::V4));
            let servers: Result<Vec<Server>, _> =
                of_family.map(|addr| Server::open(SocketAddr::new(*addr, check.port), router.clone())).collect();
            match servers {
                Ok(servers) => {
                    debug!(service = %name, port = check.port, "health check opened");
                    check.servers = Some(servers);
                    troubles.resolve(&subject(key));
                }
                // Those that were opened are dropped with the rest, and so closed.
                Err(error) => troubles.report(&subject(key), trouble(key, check.port, &error)),
            }
        }
    }
}

fn subject((name, family): &(ObjectName, Family)) -> String {
    format!("healthCheckNodePort of {name}, {}", family.as_str())
}

fn trouble((name, family): &(ObjectName, Family), port: u16, error: &std::io::Error) -> Trouble {
    Trouble {
        reason: "FailedToStartServiceHealthcheck",
        action: "Listen",
        service: Some(name.clone()),
        message: format!(
            "spec.healthCheckNodePort: cannot listen on port {port} ({}): {error}; \
             end what listens there or choose another port; trying again",
            family.as_str()
        ),
    }
}

/// One answer for every path and method.
fn router(name: &ObjectName, endpoints: Arc<AtomicUsize>, health: Arc<Health>) -> Router {
    let name = name.clone();
    Router::new().fallback(move || {
        let count = endpoints.load(Ordering::Relaxed);
        let healthy = health.is_healthy(Moment::now());
        let response = respond(&name, count, healthy);
        async { response }
    })
}

fn respond(service: &ObjectName, count: usize, healthy: bool) -> Response<Body> {
    let status = if count != 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let (namespace, name) = (service.namespace(), service.name());
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\
         \t\"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
    );
    let mut response = answer(status, JSON, body);
    response.headers_mut().insert(WEIGHT, HeaderValue::from(count));
    response
}
