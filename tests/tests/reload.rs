//! A configuration file that changes under a running agent: it takes effect, and no packet notices more than that.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::cluster::{By, TARGET, refused, web};
use tests::manifest::{PodObject, node_object};
use tests::traffic::client::echo_on;
use tests::traffic::http;
use tests::{Agent, Client, Lab, Protocol, Topology};

/// A folder as a kubelet mounts a ConfigMap: the file is a link through a link, and the latter is replaced.
fn mount(folder: &Path, version: u32, text: &str) {
    let data = folder.join(format!("..{version}"));
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("config.conf"), text).unwrap();
    symlink(format!("..{version}"), folder.join("..data_tmp")).unwrap();
    fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
    if version == 0 {
        symlink("..data/config.conf", folder.join("config.conf")).unwrap();
    }
}

fn configuration(more: Value) -> String {
    let mut all = json!({"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"});
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all.to_string()
}

/// Ends who asks, also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until something is so.
fn wait(what: &str, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_configuration_that_changes_takes_effect_and_no_connection_notices() {
    let lab = Lab::new(Topology { cni_rules: true, ..Topology::default() });
    let _servers: Vec<_> = lab.pods().map(|pod| lab.serve(pod, TARGET)).collect();
    lab.manifests().write_list("nodes.json", lab.nodes.iter().map(node_object));
    lab.manifests().write("web.json", web());
    for pod in lab.pods() {
        lab.manifests().write(&format!("pod-{}.json", pod.name), PodObject::of(pod).label("app", "web"));
    }
    let folder = lab.folder().join("configmap");
    fs::create_dir(&folder).unwrap();
    mount(&folder, 0, &configuration(json!({"mode": "iptables"})));
    let file = folder.join("config.conf").display().to_string();
    let agent = Agent::start(&lab, lab.node(1), &["--config", &file]);
    let pid = agent.pid();

    let (pod, node) = (lab.client(lab.pod(1, 1)), Client::new(&lab.node(1).netns));
    let outside = lab.outside_client().with_timeout(Duration::from_millis(500));
    let metrics = SocketAddr::from(([127, 0, 0, 1], 10249));
    let mode = || http::ask(&node, metrics, "GET /proxyMode", &[]).map(|answer| answer.body).unwrap_or_default();
    let node_ports_answer = || By::NodePort(1).addresses(10).map(|to| outside.ask(Protocol::Tcp, to).is_ok());
    assert_eq!((mode(), node_ports_answer()), ("iptables".to_owned(), [true, true]));

    let over = AtomicBool::new(false);
    let (asked, mut failed) = (AtomicU32::new(0), Vec::new());
    let mut streams = By::ClusterIp.addresses(10).map(|to| pod.connect(to).unwrap());
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut failed = Vec::new();
            while !over.load(Ordering::Relaxed) {
                for to in By::ClusterIp.addresses(10) {
                    for protocol in [Protocol::Tcp, Protocol::Udp] {
                        asked.fetch_add(1, Ordering::Relaxed);
                        if let Err(error) = pod.ask(protocol, to) {
                            failed.push(format!("{protocol:?} {to}: {error}"));
                        }
                    }
                }
                thread::sleep(Duration::from_millis(2));
            }
            failed
        });

        let guard = Over(&over);
        // What depends on the mode, and where NodePorts are.
        let elsewhere = json!({"mode": "nftables", "nodePortAddresses": ["192.0.2.0/24", "2001:db8::/32"]});
        mount(&folder, 1, &configuration(elsewhere));
        wait("the mode is another", || mode() == "nftables");
        wait("NodePorts are nowhere", || {
            By::NodePort(1).addresses(10).iter().all(|to| refused(&outside.ask(Protocol::Tcp, *to)))
        });

        // What can't be is said, and changes nothing.
        let before = agent.log_since_start().len();
        mount(&folder, 2, &configuration(json!({"mode": "userspace"})));
        wait("it is said", || agent.log_since_start()[before..].contains("what it said before stays in force"));
        assert!(agent.log_since_start()[before..].contains("mode"), "{}", &agent.log_since_start()[before..]);
        assert_eq!(mode(), "nftables");
        assert!(By::NodePort(1).addresses(10).iter().all(|to| refused(&outside.ask(Protocol::Tcp, *to))));

        // And back.
        mount(&folder, 3, &configuration(json!({"mode": "iptables"})));
        wait("NodePorts are back", || node_ports_answer() == [true, true]);
        wait("the mode is back", || mode() == "iptables");
        drop(guard);
        failed = asking.join().unwrap();
    });
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), asked.into_inner(), failed.join("\n"));
    for stream in &mut streams {
        echo_on(stream, 10_000, 7).unwrap();
    }
    assert_eq!(agent.pid(), pid);
    assert!(Path::new(&format!("/proc/{}", pid.unwrap())).exists(), "it is the same process");
}
