//! The pages of the real kube-proxy and of the agent, after the same things happened to the same cluster: what dashboards and alerts
//! read of the one they find in the other.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tests::cluster::{By, Cluster, TARGET, addressed, web};
use tests::kube_proxy::{CLUSTER_CIDR, KubeProxy};
use tests::manifest::{PodObject, Service};
use tests::traffic::http::ask;
use tests::{Agent, Client, ControlPlane, Lab, Netns, Protocol, Topology};

const SERVICES: &str = "/api/v1/namespaces/default/services";
const PODS: &str = "/api/v1/namespaces/default/pods";

/// Metrics of kube-proxy's that are not there until something failed, or that a kernel setting may hide; `docs/metrics.md` names them.
const ONLY_SOMETIMES: [&str; 4] = [
    "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
    "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
    "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
];

/// Those whose values follow from the objects alone.
const BY_OBJECTS: [&str; 1] = ["kubeproxy_sync_proxy_rules_no_local_endpoints_total"];

/// A family of metrics as a page shows it.
#[derive(Debug, Default, PartialEq)]
struct Family {
    kind: String,
    help: String,
    /// Names with labels, without values; buckets are among them.
    series: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct Page {
    families: BTreeMap<String, Family>,
    values: BTreeMap<String, f64>,
}

impl Page {
    /// What stands at the address that `metricsBindAddress` has where nothing is said.
    fn of(netns: &Netns) -> Self {
        let to = SocketAddr::from(([127, 0, 0, 1], 10249));
        let answer = ask(&Client::new(netns), to, "GET /metrics", &[]).unwrap();
        assert_eq!(answer.code, 200);
        Self::parse(&answer.body)
    }

    fn parse(text: &str) -> Self {
        let mut page = Self::default();
        let mut current = String::new();
        for line in text.lines() {
            if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
                name.clone_into(&mut current);
                help.clone_into(&mut page.families.entry(current.clone()).or_default().help);
            } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                name.clone_into(&mut current);
                kind.clone_into(&mut page.families.entry(current.clone()).or_default().kind);
            } else if let Some((series, value)) = line.rsplit_once(' ') {
                // Which build it is, is another matter.
                let shown = if current == "kubernetes_build_info" { label_names(series) } else { series.to_owned() };
                page.families.entry(current.clone()).or_default().series.insert(shown);
                page.values.insert(series.to_owned(), value.parse().unwrap_or(f64::NAN));
            }
        }
        page
    }
}

/// The names of a series' labels.
fn label_names(series: &str) -> String {
    let labels = series.split_once('{').map_or("", |(_, labels)| labels.trim_end_matches('}'));
    labels.split("\",").filter_map(|label| label.split_once('=')).map(|(name, _)| name).collect::<Vec<_>>().join(",")
}

/// Whether kube-proxy's have to be the agent's.
fn is_compared(name: &str) -> bool {
    name.starts_with("kubeproxy_") || name.starts_with("process_") || name == "kubernetes_build_info"
}

#[test]
fn in_iptables_mode_dashboards_find_what_kube_proxy_shows() {
    compare("iptables");
}

#[test]
fn in_nftables_mode_dashboards_find_what_kube_proxy_shows() {
    compare("nftables");
}

fn compare(mode: &str) {
    let lab = Lab::new(Topology { cni_rules: true, ..Topology::default() });
    let plane = ControlPlane::start(&lab);
    let kubeconfig = plane.kubeconfig("proxy");
    let (mode_flag, cidr) = (format!("--proxy-mode={mode}"), format!("--cluster-cidr={CLUSTER_CIDR}"));
    let flags = [&*mode_flag, &*cidr, "--detect-local-mode=ClusterCIDR"];
    let _agent = Agent::start_on_api_server(&lab, lab.node(1), &kubeconfig, &flags);
    let proxy = KubeProxy::start(&lab, lab.node(2), &kubeconfig, mode).unwrap();

    // What is older than a proxy has no part in its latencies, and when a Service was made is known in whole seconds.
    proxy.wait_written(lab.node(2), &["10.96.0.1"]).unwrap();
    thread::sleep(Duration::from_secs(2));

    // The same for both: Services come, change and go, and so do Pods; one Service has endpoints, and none on either node.
    let api = plane.api();
    api.put(web());
    let local = Service::new("local").selector("app", "remote").dual_stack(11);
    let local = local.node_port("tcp", "TCP", 80, TARGET, 30_011);
    api.put(local.spec("externalTrafficPolicy", "Local").spec("internalTrafficPolicy", "Local"));
    lab.pods().for_each(|pod| api.put(PodObject::of(pod).label("app", "web")));
    let remote = ["10.244.9.11".parse().unwrap(), "fd00:10:244:9::11".parse().unwrap()];
    api.put(PodObject::new("remote", "node9", &remote).label("app", "remote"));
    api.put(addressed(Service::new("short").selector("app", "web"), 12));
    proxy.wait_written(lab.node(2), &["10.96.0.12", "fd00:10:96::c", "10.244.1.11", "fd00:10:244:1::11"]).unwrap();
    api.patch(&format!("{PODS}/p1-1"), &json!({"metadata": {"labels": {"app": "other"}}}));
    api.delete(&format!("{SERVICES}/short"));

    // kube-proxy writes its partial changes at intervals.
    let start = Instant::now();
    loop {
        let [ours, theirs] = [1, 2].map(|node| Page::of(&lab.node(node).netns));
        let wrong = differences(&ours, &theirs);
        if wrong.is_empty() {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(45), "{mode}:\n{}", wrong.join("\n"));
        thread::sleep(Duration::from_secs(1));
    }
}

/// Who asks Service `web` on node 1 how often, over TCP and over UDP, at one address of each family.
const ASKED: [(&str, By, u16, u16); 3] =
    [("a pod", By::ClusterIp, 5, 7), ("the node", By::ClusterIp, 3, 4), ("outside", By::NodePort(1), 2, 3)];

#[test]
fn connections_packets_and_bytes_of_a_service_port_are_counted_unless_a_flag_says_no() {
    for flags in [&[][..], &["--service-metrics=false"]] {
        let cluster = Cluster::web(Topology::default(), flags);
        let lab = &cluster.lab;
        for (who, by, tcp, udp) in ASKED {
            let client = match who {
                "a pod" => lab.client(lab.pod(1, 1)),
                "the node" => lab.host_client(lab.node(1)),
                _ => lab.outside_client(),
            };
            for to in by.addresses(10) {
                (0..tcp).for_each(|_| _ = client.ask(Protocol::Tcp, to).unwrap());
                (0..udp).for_each(|_| _ = client.ask(Protocol::Udp, to).unwrap());
            }
        }
        let page = Page::of(&lab.node(1).netns);
        let value = |series: &str| *page.values.get(series).unwrap_or_else(|| panic!("{series} is missing"));
        let at_least = |series: &str, least: f64| assert!(value(series) >= least, "{series} {}", value(series));
        at_least(r#"fairlead_packets_total{reason="new_flow",verdict="translate"}"#, 34.0);
        at_least(r#"fairlead_packets_total{reason="established",verdict="translate"}"#, 34.0);
        at_least(r#"fairlead_map_entries{map="FLOWS"}"#, 34.0);
        at_least(r#"fairlead_map_max_entries{map="FLOWS"}"#, value(r#"fairlead_map_entries{map="FLOWS"}"#));
        assert_eq!(value(r#"fairlead_map_evictions_total{map="FLOWS"}"#), 0.0);
        for family in ["IPv4", "IPv6"] {
            let used = value(&format!(r#"fairlead_masquerade_ports_used{{ip_family="{family}"}}"#));
            assert!(
                (1.0..=17.0).contains(&used),
                "{family}: {used}; 5 from outside, and what comes back of the pod's 12"
            );
        }
        if !flags.is_empty() {
            let counted: Vec<_> = page.values.keys().filter(|series| series.starts_with("fairlead_service_")).collect();
            assert!(counted.is_empty(), "{counted:?}");
            continue;
        }
        let of = |protocol: &str| {
            format!(
                r#"namespace="default",port_name="{}",protocol="{protocol}",service="web""#,
                protocol.to_lowercase()
            )
        };
        assert_eq!(value(&format!("fairlead_service_connections_total{{{}}}", of("TCP"))), 20.0);
        assert_eq!(value(&format!("fairlead_service_connections_total{{{}}}", of("UDP"))), 28.0);
        for direction in ["request", "reply"] {
            let [packets, bytes] = ["packets", "bytes"].map(|what| {
                move |protocol: &str| {
                    format!(r#"fairlead_service_{what}_total{{direction="{direction}",{}}}"#, of(protocol))
                }
            });
            // SYN or its answer, what is said, FIN, at 40 bytes at least.
            at_least(&packets("TCP"), 14.0 * 3.0);
            at_least(&bytes("TCP"), 40.0 * value(&packets("TCP")));
            assert_eq!(value(&packets("UDP")), 20.0, "{direction}: those of the node's own sockets are not seen");
        }
        // "who", behind headers of 28 and of 48 bytes.
        assert_eq!(
            value(&format!(r#"fairlead_service_bytes_total{{direction="request",{}}}"#, of("UDP"))),
            10.0 * (31.0 + 51.0)
        );
    }
}

fn differences(ours: &Page, theirs: &Page) -> Vec<String> {
    let mut wrong = Vec::new();
    let names: BTreeSet<&String> = ours.families.keys().chain(theirs.families.keys()).collect();
    for name in names.into_iter().filter(|name| is_compared(name) && !ONLY_SOMETIMES.contains(&name.as_str())) {
        match (ours.families.get(name), theirs.families.get(name)) {
            (Some(ours), Some(theirs)) => {
                if (&ours.kind, &ours.help) != (&theirs.kind, &theirs.help) {
                    let [ours, theirs] = [ours, theirs].map(|family| format!("{} {:?}", family.kind, family.help));
                    wrong.push(format!("{name} is {ours}, and kube-proxy's {theirs}"));
                }
                let only = |one: &Family, other: &Family| {
                    one.series.difference(&other.series).cloned().collect::<Vec<_>>().join(" ")
                };
                if ours.series != theirs.series {
                    wrong.push(format!(
                        "{name}: only ours: {}; only kube-proxy's: {}",
                        only(ours, theirs),
                        only(theirs, ours)
                    ));
                }
            }
            (Some(_), None) => wrong.push(format!("{name} is only ours")),
            (None, Some(_)) => wrong.push(format!("{name} is only kube-proxy's")),
            (None, None) => {}
        }
    }
    for (series, value) in &theirs.values {
        let is_one = BY_OBJECTS.iter().any(|name| series.starts_with(name));
        if is_one && ours.values.get(series) != Some(value) {
            wrong.push(format!("{series} is {:?}, and kube-proxy's {value}", ours.values.get(series)));
        }
    }
    let name = "rest_client_requests_total";
    if !(ours.families.contains_key(name) && theirs.families.contains_key(name)) {
        wrong.push(format!("{name} is not on both pages"));
    }
    wrong
}
