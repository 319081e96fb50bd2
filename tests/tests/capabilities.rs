//! What the agent may do where it is deployed: the capabilities of the DaemonSet, and nothing else that root has.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tests::cluster::{By, Cluster, clients, one_service_a_kind};
use tests::{Agent, Lab, Protocol, Topology, agent};

/// What the DaemonSet adds to nothing.
fn granted() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize/daemonset.yaml");
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains("drop: [\"ALL\"]"), "the DaemonSet drops all that it doesn't name");
    let (_, list) = text.split_once("add: [").expect("the DaemonSet adds capabilities");
    let (list, _) = list.split_once(']').unwrap();
    list.split(',').map(|name| name.trim().trim_matches('"').to_lowercase()).collect()
}

/// A program that is the agent with these capabilities, below a `/proc/sys` that can't be written, as in a container; and before it the
/// init container, which may do all.
fn with_capabilities(folder: &Path, capabilities: &[String]) -> PathBuf {
    let path = folder.join("fairlead");
    let bounds: Vec<String> = capabilities.iter().map(|name| format!(",+{name}")).collect();
    let agent = agent::find_binary().unwrap();
    let agent = agent.display();
    let script = format!(
        "#!/bin/sh
if [ \"$1\" = run ]; then
    {agent} \"$@\" --init-only >&2 || exit
    exec unshare --mount sh -c 'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec \"$@\"' sh \
        setpriv --inh-caps=-all --bounding-set=-all{bounds} {agent} \"$@\"
fi
exec setpriv --inh-caps=-all --bounding-set=-all{bounds} {agent} \"$@\"
",
        bounds = bounds.concat(),
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn with_the_capabilities_of_the_daemon_set_everyone_is_served_also_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let binary = with_capabilities(folder.path(), &granted());
    for attach in ["tcx", "clsact"] {
        let topology = Topology { binary: Some(binary.clone()), ..Topology::default() };
        let mut cluster = Cluster::new(topology, &["--attach", attach], one_service_a_kind);
        let status = fs::read_to_string(format!("/proc/{}/status", cluster.agents[0].pid().unwrap())).unwrap();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
        let effective = u64::from_str_radix(effective, 16).unwrap();
        assert_eq!(effective.count_ones() as usize, granted().len(), "{attach}: {status}");
        for round in ["started", "restarted"] {
            for (name, client) in clients(&cluster.lab) {
                for by in
                    [By::ClusterIp, By::NodePort(1)].into_iter().filter(|by| name != "outside" || *by != By::ClusterIp)
                {
                    for to in by.addresses(11) {
                        for protocol in [Protocol::Tcp, Protocol::Udp] {
                            client.ask(protocol, to).unwrap_or_else(|error| {
                                panic!("{attach}, {round}: {name} to {to}, {protocol:?}: {error}")
                            });
                        }
                    }
                }
            }
            // Devices that come later are attached to as well, and the command line may read what there is.
            cluster.lab.rewire(cluster.lab.pod(1, 1)).unwrap();
            let status = cluster.agents[0].cli_json(&["status"]);
            assert_eq!(status["problems"], serde_json::json!([]), "{attach}, {round}");
            assert_eq!(reserved(&cluster.lab), "61000-65095", "{attach}, {round}");
            cluster.agents.iter_mut().for_each(Agent::kill);
            cluster.agents.iter_mut().for_each(Agent::restart);
        }
        for agent in &mut cluster.agents {
            agent.terminate();
            agent.cleanup();
        }
        assert_eq!(reserved(&cluster.lab), "", "{attach}");
    }
}

/// The ports of node 1 that are kept from its own choice.
fn reserved(lab: &Lab) -> String {
    let read = || fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap();
    lab.node(1).netns.run(read).trim().to_owned()
}

#[test]
fn none_of_the_capabilities_of_the_daemon_set_can_be_left_out() {
    let granted = granted();
    for without in &granted {
        let folder = tempfile::tempdir().unwrap();
        let rest: Vec<String> = granted.iter().filter(|name| *name != without).cloned().collect();
        let binary = Some(with_capabilities(folder.path(), &rest));
        let lab = Lab::new(Topology { nodes: 1, binary, ..Topology::default() });
        one_service_a_kind(&lab);
        let mut agent = Agent::new(&lab, lab.node(1), lab.manifests().path(), &[]).unwrap();
        agent.spawn().unwrap();
        let error = agent.wait_ready(Duration::from_secs(20)).expect_err("it can't do its work");
        let message = format!("{error:#}");
        let said = format!("it lacks CAP_{}; ", without.to_uppercase());
        assert!(message.contains(&said), "without {without}, it is said what is missing: {message}");
    }
}
