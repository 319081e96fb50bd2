//! The test laboratory: small clusters in network namespaces, real sockets in them, agents under test beside them.
//!
//! In: a topology (`Topology`), manifests, an agent binary. Out: a [`Lab`] whose clients and servers use the kernel's own stack.
//! Never here: a link between these namespaces and an interface of the machine, and any knowledge of how the agent works inside.

pub mod agent;
pub mod bpf;
pub mod cgroup;
pub mod chaos;
pub mod cluster;
pub mod command;
pub mod control_plane;
pub mod folder;
pub mod foreign;
pub mod kube_proxy;
pub mod kubelet;
pub mod lab;
pub mod manifest;
pub mod netns;
pub mod residue;
pub mod scale;
pub mod topology;
pub mod traffic;
pub mod tun;
pub mod watch_server;

/// Beside the tests of the plan and the tables, which are held against it too.
#[path = "../../lb-userspace/tests/naive/specification.rs"]
#[expect(clippy::unwrap_used, dead_code, reason = "it is a test's there, with all kinds of nodes")]
mod specification;

pub use self::agent::Agent;
pub use self::control_plane::ControlPlane;
pub use self::kube_proxy::KubeProxy;
pub use self::kubelet::Kubelet;
pub use self::lab::{Lab, Node, Pod};
pub use self::netns::Netns;
pub use self::topology::{Topology, Wiring};
pub use self::traffic::client::{Answer, Client, Protocol};
pub use self::traffic::server::Server;
pub use self::watch_server::WatchServer;
