//! Who asks all the time for the Service whose endpoints last. In: a lab. Out: how many were answered, and what failed.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cluster::By;
use crate::lab::Lab;
use crate::traffic::client::{Client, Protocol, ask_on};

/// Between two questions of one asker.
const PAUSE: Duration = Duration::from_millis(20);

/// A client of the Service with one address of it.
pub struct Asker {
    name: String,
    client: Client,
    to: SocketAddr,
    /// A connection that is never closed.
    open: TcpStream,
}

/// What came of questions.
#[derive(Default)]
pub struct Asked {
    /// Those that were answered.
    pub answered: u64,
    /// Those that were not, by who asked how and what it saw.
    pub failed: BTreeMap<String, u64>,
}

/// One of each kind: pods, nodes and others, by each kind of address, by both families.
pub fn of(lab: &Lab) -> Result<Vec<Asker>> {
    let clients = [
        ("p1-1", lab.client(lab.pod(1, 1)), By::ClusterIp),
        ("p2-1", lab.client(lab.pod(2, 1)), By::NodePort(1)),
        ("node1", lab.host_client(lab.node(1)), By::ClusterIp),
        ("node2", lab.host_client(lab.node(2)), By::NodePort(2)),
        ("outside", lab.outside_client(), By::NodePort(2)),
        ("outside", lab.outside_client(), By::LoadBalancer),
    ];
    let mut askers = Vec::new();
    for (name, client, by) in clients {
        for to in by.addresses(10) {
            let name = format!("{name} to {to}");
            let open = client.connect(to).with_context(|| name.clone())?;
            // A machine that is busy with a control plane answers late; that is no failure.
            askers.push(Asker { name, client: client.clone().with_timeout(Duration::from_secs(5)), to, open });
        }
    }
    Ok(askers)
}

impl Asker {
    /// Asks until all is over.
    pub fn run(mut self, over: &AtomicBool) -> Asked {
        let mut asked = Asked::default();
        while !over.load(Ordering::Relaxed) {
            let results = [
                ("a new connection", self.client.ask(Protocol::Tcp, self.to).map(drop)),
                ("a datagram", self.client.ask(Protocol::Udp, self.to).map(drop)),
                ("the open connection", ask_on(&mut self.open).map(drop)),
            ];
            for (what, result) in results {
                asked.take(&self.name, what, result);
            }
            thread::sleep(PAUSE);
        }
        asked
    }
}

impl Asked {
    fn take(&mut self, name: &str, what: &str, result: io::Result<()>) {
        match result {
            Ok(()) => self.answered += 1,
            Err(error) => *self.failed.entry(format!("{name}, {what}: {error}")).or_default() += 1,
        }
    }

    /// Takes what another heard.
    pub fn add(&mut self, other: Self) {
        self.answered += other.answered;
        for (what, count) in other.failed {
            *self.failed.entry(what).or_default() += count;
        }
    }
}

impl Display for Asked {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "these failed:")?;
        self.failed.iter().try_for_each(|(what, count)| write!(f, "\n{count} times {what}"))
    }
}
