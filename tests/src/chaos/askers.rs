//! Who asks all the time for the Service whose endpoints last. In: a lab. Out: how many were answered, and what failed.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cluster::By;
use crate::lab::Lab;
use crate::traffic::client::{Answer, Client, Protocol, ask_on};

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

/// How it is asked.
#[derive(Clone, Copy, Debug)]
enum What {
    /// A new connection.
    Connection,
    /// A datagram from a new socket.
    Datagram,
    /// The connection that is never closed.
    Open,
}

/// What came of questions.
#[derive(Default)]
pub struct Asked {
    /// Those that were answered.
    pub answered: u64,
    /// Those that were not: when it was asked, who asked how, and what it saw.
    pub failed: Vec<(Instant, String)>,
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
    fn ask(&mut self, what: What) -> io::Result<Answer> {
        match what {
            What::Connection => self.client.ask(Protocol::Tcp, self.to),
            What::Datagram => self.client.ask(Protocol::Udp, self.to),
            What::Open => ask_on(&mut self.open),
        }
    }

    /// Asks until all is over.
    pub fn run(mut self, over: &AtomicBool) -> Asked {
        let mut asked = Asked::default();
        while !over.load(Ordering::Relaxed) {
            for what in [What::Connection, What::Datagram, What::Open] {
                let start = Instant::now();
                match self.ask(what) {
                    Ok(_) => asked.answered += 1,
                    Err(error) => asked.failed.push((start, format!("{}, {what:?}: {error}", self.name))),
                }
            }
            thread::sleep(PAUSE);
        }
        asked
    }
}

impl Asked {
    /// Takes what another heard.
    pub fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.failed.extend(other.failed);
    }
}
