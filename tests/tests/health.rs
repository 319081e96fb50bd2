//! What load balancers and kubelet ask a node, over real sockets: health checks of Services follow their endpoints, and writes
//! that fail are seen by everyone who asks.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount_remount};
use serde_json::Value;
use tests::cluster::{Cluster, TARGET};
use tests::manifest::{PodObject, Service, node_object};
use tests::{Client, Topology};

/// How soon a change has to be seen; far above what it takes.
const SOON: Duration = Duration::from_secs(5);
/// kube-proxy's default; what isn't written after two of them is late.
const SYNC_PERIOD: Duration = Duration::from_secs(30);
const CHECK: u16 = 30_999;

/// Two nodes with two pods each; Service `web` with policy Local and a health check.
fn cluster() -> Cluster {
    Cluster::new(Topology { nodes: 2, pods_per_node: 2, ..Topology::default() }, &[], |lab| {
        lab.manifests().write("web.json", web(CHECK));
        for pod in lab.pods() {
            lab.manifests().write(&format!("pod-{}.json", pod.name), PodObject::of(pod).label("app", "web"));
        }
    })
}

fn web(health_check: u16) -> Service {
    Service::new("web")
        .selector("app", "web")
        .dual_stack(10)
        .node_port("tcp", "TCP", 80, TARGET, 30_010)
        .load_balancer(&[IpAddr::from([10, 99, 1, 10])])
        .spec("externalTrafficPolicy", "Local")
        .spec("healthCheckNodePort", health_check)
}

/// Code, header of the weight, body.
fn ask(client: &Client, to: SocketAddr, path: &str) -> Option<(u16, Option<String>, String)> {
    let mut stream = client.connect(to).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let code = head.split(' ').nth(1)?.parse().ok()?;
    let weight = head
        .lines()
        .find_map(|line| line.to_lowercase().strip_prefix("x-load-balancing-endpoint-weight: ").map(str::to_owned));
    Some((code, weight, body.to_owned()))
}

/// Waits until asking gives this.
fn wait<T: PartialEq + std::fmt::Debug>(what: &str, want: &T, attempt: impl Fn() -> T) {
    wait_for(SOON, what, want, attempt);
}

/// The same with another limit.
fn wait_for<T: PartialEq + std::fmt::Debug>(limit: Duration, what: &str, want: &T, attempt: impl Fn() -> T) {
    let start = Instant::now();
    loop {
        let found = attempt();
        if found == *want {
            return;
        }
        assert!(start.elapsed() < limit, "{what}: {found:?} instead of {want:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn health_checks_follow_the_endpoints_of_their_node() {
    let cluster = cluster();
    let outside = cluster.lab.outside_client();
    let weights = |port| {
        let addresses =
            cluster.lab.nodes.iter().flat_map(|node| [SocketAddr::from((node.v4(), port)), (node.v6(), port).into()]);
        let answers = addresses.map(|to| ask(&outside, to, "/"));
        answers.map(|answer| answer.map(|(code, weight, _)| (code, weight.unwrap_or_default()))).collect::<Vec<_>>()
    };
    let told = |first: Option<(u16, &str)>, second: Option<(u16, &str)>| {
        let one = |told: Option<(u16, &str)>| told.map(|(code, weight)| (code, weight.to_owned()));
        vec![one(first), one(first), one(second), one(second)]
    };
    wait("two pods a node", &told(Some((200, "2")), Some((200, "2"))), || weights(CHECK));
    cluster.relabel(1, 1, "other");
    wait("one is gone", &told(Some((200, "1")), Some((200, "2"))), || weights(CHECK));
    cluster.relabel(1, 2, "other");
    wait("both are gone", &told(Some((503, "0")), Some((200, "2"))), || weights(CHECK));
    cluster.relabel(1, 1, "web");
    wait("one is back", &told(Some((200, "1")), Some((200, "2"))), || weights(CHECK));
    cluster.lab.manifests().write("web.json", web(CHECK - 1));
    wait("another port", &told(Some((200, "1")), Some((200, "2"))), || weights(CHECK - 1));
    assert_eq!(weights(CHECK), [None, None, None, None]);
    cluster.lab.manifests().remove("web.json");
    wait("no Service", &told(None, None), || weights(CHECK - 1));
}

#[test]
fn a_node_that_goes_gets_no_new_connections_and_is_alive() {
    let cluster = cluster();
    let (node, outside) = (cluster.lab.node(1), cluster.lab.outside_client());
    let code = |path| ask(&outside, (node.v4(), 10256).into(), path).map(|answer| answer.0);
    wait("at first", &Some(200), || code("/healthz"));
    for (field, value) in [
        ("metadata", serde_json::json!({"deletionTimestamp": "2026-01-01T00:00:00Z"})),
        ("spec", serde_json::json!({"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]})),
    ] {
        let mut object = node_object(node);
        for (key, value) in value.as_object().unwrap() {
            object[field][key] = value.clone();
        }
        let nodes = [object, node_object(cluster.lab.node(2))];
        cluster.lab.manifests().write_list("nodes.json", nodes);
        wait(field, &Some(503), || code("/healthz"));
        assert_eq!(code("/livez"), Some(200), "{field}");
        assert_eq!(ask(&outside, (node.v4(), CHECK).into(), "/").map(|answer| answer.0), Some(200), "{field}");
        cluster.lab.manifests().write_list("nodes.json", cluster.lab.nodes.iter().map(node_object));
        wait(field, &Some(200), || code("/healthz"));
    }
}

/// Tables grow into a new folder; where the file system of pins is read-only, they can't.
#[test]
fn writes_that_fail_make_a_node_unhealthy_until_they_succeed() {
    let cluster = cluster();
    let (node, outside) = (cluster.lab.node(1), cluster.lab.outside_client());
    let bpffs = cluster.agents[0].bpffs().to_owned();
    let page = |path| {
        let (code, _, body) = ask(&outside, (node.v4(), 10256).into(), path)?;
        Some((code, serde_json::from_str::<Value>(&body).ok()?))
    };
    let codes = || {
        let check = ask(&outside, (node.v4(), CHECK).into(), "/").map(|answer| answer.0);
        [page("/healthz").map(|page| page.0), page("/livez").map(|page| page.0), check]
    };
    wait("at first", &[Some(200); 3], codes);
    let before = page("/healthz").unwrap().1;
    mount_remount(&bpffs, MountFlags::RDONLY, "").unwrap();
    let many = (0..3000_u16).map(|number| {
        let [high, low] = number.to_be_bytes();
        let service = Service::new(&format!("many-{number}"));
        service.cluster_ips(&[std::net::Ipv4Addr::new(10, 97, high, low).into()]).port("tcp", "TCP", 80, TARGET)
    });
    cluster.lab.manifests().write_list("many.json", many);
    wait_for(2 * SYNC_PERIOD + SOON, "late", &[Some(503); 3], codes);
    let late = page("/healthz").unwrap().1;
    assert_eq!(late["healthy"], false);
    assert_eq!(late["nodeEligible"], true);
    assert_eq!(late["status"]["IPv4"]["healthy"], false, "{late}");
    assert_eq!(late["status"]["IPv6"]["healthy"], true, "nothing of IPv6 waits: {late}");
    assert_eq!(late["status"]["IPv4"]["lastUpdated"], before["status"]["IPv4"]["lastUpdated"], "{late}");
    assert_eq!(page("/livez").unwrap().1["nodeEligible"], Value::Null);
    let check = ask(&outside, (node.v4(), CHECK).into(), "/").unwrap();
    assert!(check.1.as_deref() == Some("2") && check.2.contains("\"serviceProxyHealthy\": false"), "{check:?}");
    let said = cluster.agents[0].log_since_start().matches("the tables could not be written").count();
    assert_eq!(said, 1, "one cause is said once, however often it is tried");
    mount_remount(&bpffs, MountFlags::empty(), "").unwrap();
    wait("again", &[Some(200); 3], codes);
    let again = page("/livez").unwrap().1;
    assert!(
        again["status"]["IPv4"]["lastUpdated"].as_str() > late["status"]["IPv4"]["lastUpdated"].as_str(),
        "{again}"
    );
}
