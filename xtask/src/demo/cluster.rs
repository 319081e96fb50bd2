//! The cluster that the demonstration runs on. In: the agent's binary and the sample manifests. Out: two nodes with an agent each,
//! three endpoint pods, a client pod, an outside client.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::manifest::write_by_rename;
use tests::{Agent, Client, Lab, Pod, Server, Topology};

use crate::workspace;

/// The port that the endpoint pods listen on.
const TARGET_PORT: u16 = 8080;

/// The addresses of the Service in the sample manifests.
pub const CLUSTER_IPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];

/// Its LoadBalancer addresses.
pub const LOAD_BALANCER_IPS: [&str; 2] = ["10.99.1.10", "fd00:99:1::10"];

/// A running demonstration; agents end before the network that they are in.
pub struct Cluster {
    agents: Vec<Agent>,
    _servers: Vec<Server>,
    /// The network.
    pub lab: Lab,
    /// The names of the endpoints.
    pub endpoints: Vec<String>,
}

impl Cluster {
    /// Builds the network, starts the servers, lays out the manifests.
    pub fn build() -> Result<Self> {
        let lab = Lab::build(Topology { binary: Some(workspace::agent()), ..Topology::default() })?;
        let mut servers = Vec::new();
        let mut endpoints = Vec::new();
        for (pod, name) in [(lab.pod(1, 1), "web-1"), (lab.pod(2, 1), "web-2"), (lab.pod(2, 2), "web-3")] {
            let addresses = [SocketAddr::from((pod.v4, TARGET_PORT)), SocketAddr::from((pod.v6, TARGET_PORT))];
            servers.push(Server::start(&pod.netns, name, &addresses)?);
            endpoints.push(name.to_owned());
        }
        let cluster = Self { agents: Vec::new(), _servers: servers, lab, endpoints };
        for entry in fs::read_dir(samples()).context("reading the sample manifests")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            cluster.write(&name, &sample(&name)?)?;
        }
        Ok(cluster)
    }

    /// Starts an agent on each node; returns the time until both are ready.
    pub fn start_agents(&mut self) -> Result<Duration> {
        let start = Instant::now();
        for node in &self.lab.nodes {
            let mut agent = Agent::new(&self.lab, node, self.lab.manifests().path(), &[])?;
            agent.spawn()?;
            self.agents.push(agent);
        }
        for agent in &mut self.agents {
            agent.wait_ready(Duration::from_secs(15)).context("an agent does not come up")?;
        }
        Ok(start.elapsed())
    }

    /// The agent of a node, by number from 1.
    pub fn agent(&mut self, node: usize) -> Result<&mut Agent> {
        self.agents.get_mut(node - 1).context("there is no such agent")
    }

    /// What the command line says about node 1.
    pub fn ask_agent(&self, arguments: &[&str]) -> Result<String> {
        let agent = self.agents.first().context("no agent was started")?;
        let output = agent.cli(arguments);
        ensure!(
            output.status.success(),
            "`fairlead {}` failed: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Stops the agents and removes their data plane.
    pub fn stop(&mut self) -> Result<()> {
        for mut agent in self.agents.drain(..) {
            if agent.pid().is_some() {
                agent.terminate();
            }
            let output = agent.cli(&["cleanup"]);
            ensure!(output.status.success(), "`fairlead cleanup`: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Replaces a manifest in one step.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.lab.manifests().path().join(file);
        write_by_rename(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(())
    }

    /// Removes a manifest.
    pub fn remove(&self, file: &str) -> Result<()> {
        let path = self.lab.manifests().path().join(file);
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }

    /// The pod without a server.
    pub fn client_pod(&self) -> &Pod {
        self.lab.pod(1, 2)
    }

    /// A client in that pod.
    pub fn pod_client(&self) -> Client {
        self.lab.client(self.client_pod())
    }

    /// Both addresses of a node.
    pub fn node_addresses(&self, node: u8) -> [IpAddr; 2] {
        [self.lab.node(node).v4().into(), self.lab.node(node).v6().into()]
    }
}

/// A sample manifest as it is shipped.
pub fn sample(file: &str) -> Result<String> {
    let path = samples().join(file);
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

fn samples() -> PathBuf {
    workspace::root().join("tests/data/demo")
}
