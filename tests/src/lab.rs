//! A cluster in network namespaces, joined to each other only. In: a [`Topology`]. Out: nodes, pods, an outside client, a place for
//! manifests and agents. On drop, also after a panic, everything is gone.

mod wiring;

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::cgroup::Cgroup;
use crate::command;
use crate::folder::Folder;
use crate::manifest::Manifests;
use crate::netns::Netns;
use crate::residue;
use crate::topology::{self, Topology};
use crate::traffic::client::Client;
use crate::traffic::server::Server;

/// What the names of all our namespaces start with.
pub const NETNS_PREFIX: &str = "fl-";

/// A node's namespace and what is in it.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name, as in `--hostname-override`.
    pub name: String,
    /// Its number, from 1.
    pub number: u8,
    /// Its namespace.
    pub netns: Netns,
    /// Its pods, in order.
    pub pods: Vec<Pod>,
}

impl Node {
    /// Its address on the common network.
    pub fn v4(&self) -> Ipv4Addr {
        topology::node_v4(self.number)
    }

    /// Its address on the common network.
    pub fn v6(&self) -> Ipv6Addr {
        topology::node_v6(self.number)
    }
}

/// A pod: a namespace with one interface.
#[derive(Clone, Debug)]
pub struct Pod {
    /// `p<node>-<number>`.
    pub name: String,
    /// The name of its node.
    pub node: String,
    /// Its namespace.
    pub netns: Netns,
    /// Its device on the node.
    pub host_device: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

/// A running cluster.
#[derive(Debug)]
pub struct Lab {
    /// The nodes, in order.
    pub nodes: Vec<Node>,
    /// A machine on the nodes' network that is no part of the cluster.
    pub outside: Netns,
    /// The bridge between them.
    pub switch: Netns,
    topology: Topology,
    cgroup: Cgroup,
    folder: Folder,
}

impl Lab {
    /// Builds the cluster. Panics with the reason when it can't: nothing can be tested then.
    pub fn new(topology: Topology) -> Self {
        Self::build(topology).unwrap_or_else(|error| panic!("building the lab: {error:#}"))
    }

    /// Builds the cluster, leaving nothing behind where that fails.
    pub fn build(topology: Topology) -> Result<Self> {
        let folder = Folder::create()?;
        let cgroup = Cgroup::enter()?;
        let netns = |what: &str| Netns::named(format!("{NETNS_PREFIX}{}-{what}", folder.id()));
        let nodes = (1..=topology.nodes)
            .map(|number| {
                let name = format!("node{number}");
                let pods = (1..=topology.pods_per_node)
                    .map(|pod| Pod {
                        name: format!("p{number}-{pod}"),
                        node: name.clone(),
                        netns: netns(&format!("p{number}-{pod}")),
                        host_device: format!("vp{pod}"),
                        v4: topology::pod_v4(number, pod),
                        v6: topology::pod_v6(number, pod),
                    })
                    .collect();
                Node { netns: netns(&name), name, number, pods }
            })
            .collect();
        // From here on Drop cleans up, whatever fails.
        let lab = Self { nodes, outside: netns("client"), switch: netns("switch"), topology, cgroup, folder };
        lab.make_folders()?;
        wiring::build(&lab)?;
        Ok(lab)
    }

    /// What was asked for.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// What sets its names apart from those of other labs.
    pub fn id(&self) -> &str {
        self.folder.id()
    }

    /// The lab's temporary folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The cgroup that host clients, that is the threads of this process, are in.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// The bpffs of one node's agent.
    pub fn bpffs(&self, node: &Node) -> PathBuf {
        self.folder().join(format!("bpf-{}", node.name))
    }

    /// The folder that all agents read.
    pub fn manifests(&self) -> Manifests {
        Manifests::at(self.folder().join("manifests"))
    }

    /// A node by number, from 1.
    pub fn node(&self, number: u8) -> &Node {
        &self.nodes[usize::from(number) - 1]
    }

    /// A pod by the numbers of its node and its own, from 1.
    pub fn pod(&self, node: u8, pod: u8) -> &Pod {
        &self.node(node).pods[usize::from(pod) - 1]
    }

    /// All pods, node by node.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes.iter().flat_map(|node| &node.pods)
    }

    /// A client in a pod.
    pub fn client(&self, pod: &Pod) -> Client {
        Client::new(&pod.netns)
    }

    /// A client in a node's own namespace.
    pub fn host_client(&self, node: &Node) -> Client {
        Client::new(&node.netns)
    }

    /// A client outside the cluster.
    pub fn outside_client(&self) -> Client {
        Client::new(&self.outside)
    }

    /// Serves TCP and UDP on a port of both addresses of a pod; answers carry the pod's name.
    pub fn serve(&self, pod: &Pod, port: u16) -> Server {
        let addresses = [SocketAddr::from((pod.v4, port)), SocketAddr::from((pod.v6, port))];
        Server::start(&pod.netns, &pod.name, &addresses)
            .unwrap_or_else(|error| panic!("serving port {port} in pod {}: {error:#}", pod.name))
    }

    /// Serves TCP and UDP on a port of both addresses of a node, as a hostNetwork pod does; answers carry the node's name.
    pub fn serve_on_node(&self, node: &Node, port: u16) -> Server {
        let addresses = [SocketAddr::from((node.v4(), port)), SocketAddr::from((node.v6(), port))];
        Server::start(&node.netns, &node.name, &addresses)
            .unwrap_or_else(|error| panic!("serving port {port} on {}: {error:#}", node.name))
    }

    /// Serves TCP and UDP on a port of both addresses of the outside machine, under the name `outside`.
    pub fn serve_outside(&self, port: u16) -> Server {
        let addresses =
            [SocketAddr::from((topology::OUTSIDE_V4, port)), SocketAddr::from((topology::OUTSIDE_V6, port))];
        Server::start(&self.outside, "outside", &addresses)
            .unwrap_or_else(|error| panic!("serving port {port} outside: {error:#}"))
    }

    /// Takes a pod's device away and makes another, as a CNI does for a Pod that starts again. Pods are wired by veths of their own.
    pub fn rewire(&self, pod: &Pod) -> Result<()> {
        let node = self.nodes.iter().find(|node| node.name == pod.node).context("a pod is on a node")?;
        node.netns.ip(&[format!("link delete {}", pod.host_device)])?;
        wiring::wire_ptp(node, std::slice::from_ref(pod))
    }

    /// Lets the switch find the nodes' Pods, as a control plane does that speaks to them. Otherwise it knows no way there.
    pub fn route_pods_from_switch(&self) -> Result<()> {
        wiring::route_pods_from_switch(self)
    }

    /// How many packets a counter of the node's CNI rules has seen: `invalid`, `masqueraded`.
    pub fn cni_counter(&self, node: &Node, counter: &str) -> u64 {
        wiring::cni_counter(&node.netns, counter).unwrap_or_else(|error| panic!("reading {counter}: {error:#}"))
    }

    fn make_folders(&self) -> Result<()> {
        for name in ["manifests", "log"] {
            let path = self.folder().join(name);
            fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        }
        for node in &self.nodes {
            let path = self.bpffs(node);
            fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
            mount("bpf", &path, "bpf", MountFlags::empty(), None)
                .with_context(|| format!("mounting bpffs at {}", path.display()))?;
        }
        Ok(())
    }

    fn all_netns(&self) -> Vec<String> {
        let own = [&self.switch, &self.outside].into_iter();
        let nodes = self.nodes.iter().map(|node| &node.netns);
        own.chain(nodes)
            .chain(self.pods().map(|pod| &pod.netns))
            .filter(|netns| netns.path().exists())
            .map(|netns| netns.name().to_owned())
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let names = self.all_netns();
        for name in &names {
            // Only what others started there: this process's own threads count as in the machine's namespace.
            if let Err(error) = residue::kill_processes_in(&Netns::named(name)) {
                eprintln!("lab: {error:#}");
            }
        }
        for node in &self.nodes {
            // Not mounted is fine: the lab may have failed half-way.
            let _ = unmount(self.bpffs(node), UnmountFlags::DETACH);
        }
        let lines: Vec<String> = names.iter().map(|name| format!("netns delete {name}")).collect();
        if let Err(error) = command::ip_batch(None, &lines) {
            eprintln!("lab: leaving namespaces behind: {error:#}");
        }
        if let Err(error) = fs::remove_dir_all(self.folder()) {
            eprintln!("lab: leaving {} behind: {error}", self.folder().display());
        }
    }
}
