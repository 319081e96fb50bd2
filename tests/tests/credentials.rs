//! The agent as a pod has it: the API server by the environment, token and CA by the files of a service account, which kubelet replaces.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tests::cluster::{TARGET, cluster_ips};
use tests::manifest::{Service, SliceEndpoint, endpoint_slice};
use tests::{Agent, ControlPlane, Lab, Protocol, Server, Topology};

/// How soon a change has to be effective while the API server answers.
const SOON: Duration = Duration::from_secs(10);
/// How soon an agent has to take files that were replaced: tokens and CAs are read again once a minute, requests made at longer and
/// longer intervals.
const RETURN: Duration = Duration::from_secs(150);

/// Replaces token and CA as kubelet does: a new folder, and a link that is renamed.
fn write_account(folder: &Path, version: u32, token: &str, authority: &Path) {
    let data = folder.join(format!("..{version}"));
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("token"), token).unwrap();
    fs::write(data.join("namespace"), "kube-system").unwrap();
    fs::copy(authority, data.join("ca.crt")).unwrap();
    symlink(format!("..{version}"), folder.join("..new")).unwrap();
    fs::rename(folder.join("..new"), folder.join("..data")).unwrap();
    for name in ["token", "namespace", "ca.crt"] {
        if version == 1 {
            symlink(format!("..data/{name}"), folder.join(name)).unwrap();
        }
    }
}

struct World {
    agent: Agent,
    _servers: Vec<Server>,
    plane: ControlPlane,
    lab: Lab,
}

impl World {
    /// Sends the Service to a pod, by slices of both families.
    fn send_to(plane: &ControlPlane, lab: &Lab, pod: u8) {
        let pod = lab.pod(1, pod);
        for (address, family) in [(pod.v4.into(), "v4"), (pod.v6.into(), "v6")] {
            let endpoint = SliceEndpoint { address, node: pod.node.clone(), serving: true, terminating: false };
            let ports = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];
            plane.api().put(endpoint_slice(&format!("web-{family}"), "web", &ports, &[endpoint]));
        }
    }

    fn expect(&self, what: &str, pod: &str, limit: Duration) {
        let client = self.lab.client(self.lab.pod(1, 2)).with_timeout(Duration::from_millis(500));
        for to in cluster_ips(10) {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                client
                    .ask_until(protocol, to, limit, |answer| answer.as_ref().is_ok_and(|answer| answer.by == pod))
                    .unwrap_or_else(|error| panic!("{what}: {protocol:?} {to} is not {pod}'s: {error}"));
            }
        }
    }

    fn expect_problems(&self, what: &str, limit: Duration, wanted: impl Fn(&str) -> bool) {
        let start = Instant::now();
        loop {
            let problems = self.agent.cli_json(&["status"])["problems"].to_string();
            if wanted(&problems) {
                return;
            }
            assert!(start.elapsed() < limit, "{what}: {problems}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

#[test]
fn tokens_and_authorities_of_a_pod_are_taken_as_they_are_replaced() {
    let lab = Lab::new(Topology { nodes: 1, ..Topology::default() });
    let servers = lab.pods().map(|pod| lab.serve(pod, TARGET)).collect();
    let plane = ControlPlane::start(&lab);
    let api = plane.api();
    api.put(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "agent", "namespace": "kube-system"}}));
    api.put(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "agent"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
        "subjects": [{"kind": "ServiceAccount", "name": "agent", "namespace": "kube-system"}],
    }));
    api.put(Service::new("web").dual_stack(10).port("tcp", "TCP", 80, TARGET).port("udp", "UDP", 80, TARGET));
    World::send_to(&plane, &lab, 1);
    let account = lab.folder().join("account");
    fs::create_dir(&account).unwrap();
    let token = plane.token_of_account("kube-system", "agent").unwrap();
    write_account(&account, 1, &token, &plane.authority());
    let agent = Agent::start_in_pod(&lab, lab.node(1), &account, &[]);
    let mut world = World { agent, _servers: servers, plane, lab };
    world.expect("at first", "p1-1", SOON);
    world.expect_problems("at first", SOON, |problems| problems == "[]");

    world.plane.revoke_tokens().unwrap();
    world.expect_problems("the token is refused", RETURN, |problems| {
        problems.contains("doesn't accept our credentials")
    });
    world.expect("the token is refused", "p1-1", SOON);
    let token = world.plane.token_of_account("kube-system", "agent").unwrap();
    write_account(&account, 2, &token, &world.plane.authority());
    World::send_to(&world.plane, &world.lab, 2);
    world.expect("another token", "p1-2", RETURN);
    world.expect_problems("another token", RETURN, |problems| problems == "[]");

    world.plane.replace_authority().unwrap();
    world.expect_problems("nobody knows the CA", RETURN, |problems| problems.contains("can't be reached"));
    world.expect("nobody knows the CA", "p1-2", SOON);
    write_account(&account, 3, &token, &world.plane.authority());
    World::send_to(&world.plane, &world.lab, 1);
    world.expect("another CA", "p1-1", RETURN);
    world.expect_problems("another CA", RETURN, |problems| problems == "[]");
}
