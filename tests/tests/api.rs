//! The agent on a real API server, with Kubernetes' own controllers: what they make of Pods and Services is what connections do,
//! whatever happens to the API server in between.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::cluster::{By, TARGET, addressed, load_balancer, own_addresses, refused, web};
use tests::control_plane::Api;
use tests::manifest::{PodObject, Service, SliceEndpoint, endpoint_slice, node_object};
use tests::traffic::client::ask_on;
use tests::traffic::http;
use tests::{Agent, ControlPlane, Lab, Pod, Protocol, Server, Topology};

/// How soon a change has to be effective while the API server answers: the controllers gather changes for some time.
const SOON: Duration = Duration::from_secs(10);

/// How soon an agent has to notice that the API server is back: it asks at longer and longer intervals.
const RETURN: Duration = Duration::from_secs(60);

const SERVICES: &str = "/api/v1/namespaces/default/services";
const PODS: &str = "/api/v1/namespaces/default/pods";

/// A lab with a control plane, a server in every pod, and an agent on each node; what needs others ends before them.
struct World {
    agents: Vec<Agent>,
    _servers: Vec<Server>,
    plane: ControlPlane,
    api: Api,
    lab: Lab,
}

impl World {
    /// A world without agents, in which a Service `web` selects all pods.
    fn new(nodes: u8) -> Self {
        let lab = Lab::new(Topology { nodes, ..Topology::default() });
        let servers = lab.pods().map(|pod| lab.serve(pod, TARGET)).collect();
        let plane = ControlPlane::start(&lab);
        let api = plane.api();
        api.put(web());
        lab.pods().for_each(|pod| api.put(pod_object(pod, "web")));
        let endpoints = lab.pods().count();
        api.until("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", |list| {
            let of_web = |slice: &&Value| slice["metadata"]["labels"]["kubernetes.io/service-name"] == "web";
            let slices = list["items"].as_array().into_iter().flatten().filter(of_web);
            let ready = |slice: &Value| slice["endpoints"].as_array().map_or(0, Vec::len);
            slices.map(ready).sum::<usize>() == 2 * endpoints
        });
        Self { agents: Vec::new(), _servers: servers, plane, api, lab }
    }

    fn start_agents(&mut self, user: &str) {
        let kubeconfig = self.plane.kubeconfig(user);
        for node in &self.lab.nodes {
            self.agents.push(Agent::start_on_api_server(&self.lab, node, &kubeconfig, &[]));
        }
    }

    /// Asks the Service until only these answer, by both families.
    fn expect_answers(&self, by: By, expected: &[&str], limit: Duration) {
        let client = self.lab.outside_client().with_timeout(Duration::from_millis(500));
        for to in by.addresses(10) {
            let start = Instant::now();
            loop {
                let tally = client.tally(Protocol::Tcp, to, 30);
                let names = tally.as_ref().map(|tally| tally.keys().map(String::as_str).collect::<Vec<_>>());
                if names.as_ref().is_ok_and(|names| names == expected) {
                    break;
                }
                assert!(start.elapsed() < limit, "{to}: {tally:?}, expected {expected:?}");
            }
        }
    }

    /// What `/healthz` and `/livez` of the first agent say, where they are answered.
    fn health(&self) -> [Option<u16>; 2] {
        let node = self.lab.node(1);
        let client = self.lab.host_client(node);
        let code = |path| http::ask(&client, (node.v4(), 10256).into(), path, &[]).map(|answer| answer.code).ok();
        ["GET /healthz", "GET /livez"].map(code)
    }

    /// Waits until they say this.
    fn expect_health(&self, wanted: [Option<u16>; 2], what: &str) {
        let start = Instant::now();
        while self.health() != wanted {
            assert!(start.elapsed() < SOON, "{what}: {:?}", self.health());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the first agent's problems are as wanted.
    fn expect_problems(&self, what: &str, limit: Duration, wanted: impl Fn(&str) -> bool) {
        let start = Instant::now();
        loop {
            let problems = self.agents[0].cli_json(&["status"])["problems"].to_string();
            if wanted(&problems) {
                return;
            }
            assert!(start.elapsed() < limit, "{what}: {problems}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn pod_object(pod: &Pod, app: &str) -> PodObject {
    PodObject::of(pod).label("app", app)
}

#[test]
fn connections_do_what_the_controllers_make_of_pods() {
    let mut world = World::new(2);
    world.start_agents("proxy");
    let all = ["p1-1", "p1-2", "p2-1", "p2-2"];
    for by in [By::NodePort(1), By::NodePort(2), By::LoadBalancer] {
        world.expect_answers(by, &all, SOON);
    }
    // Pods, and the nodes themselves, by ClusterIP.
    let clients = [world.lab.client(world.lab.pod(1, 1)), world.lab.host_client(world.lab.node(2))];
    for client in &clients {
        for to in By::ClusterIp.addresses(10) {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let tally = client.tally(protocol, to, 60).unwrap();
                assert_eq!(tally.keys().map(String::as_str).collect::<Vec<_>>(), all, "{protocol:?} {to}");
            }
        }
    }
    // The Service of the API server itself: its slice is written by no controller. (It knows no way back to pods.)
    clients[1].connect(SocketAddr::from(([10, 96, 0, 1], 443))).unwrap();
    // As kube-proxy's, each agent has said that it started.
    world.api.until("/apis/events.k8s.io/v1/namespaces/default/events", |list| {
        let started = |event: &&Value| event["reason"] == "Starting" && event["regarding"]["kind"] == "Node";
        list["items"].as_array().into_iter().flatten().filter(started).count() == 2
    });
    world.api.patch(&format!("{PODS}/p1-1"), &json!({"metadata": {"labels": {"app": "other"}}}));
    world.expect_answers(By::LoadBalancer, &all[1..], SOON);
    let not_ready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    world.api.patch(&format!("{PODS}/p1-2/status"), &not_ready);
    world.expect_answers(By::LoadBalancer, &all[2..], SOON);
    world.api.delete(&format!("{PODS}/p2-1"));
    world.expect_answers(By::LoadBalancer, &all[3..], SOON);
    // The other way: the Service is what changes.
    world.api.patch(&format!("{SERVICES}/web"), &json!({"spec": {"selector": {"app": "other"}}}));
    world.expect_answers(By::NodePort(2), &all[..1], SOON);
    let client = world.lab.client(world.lab.pod(2, 2)).with_timeout(Duration::from_millis(500));
    world.api.patch(&format!("{SERVICES}/web"), &json!({"spec": {"selector": {"app": "nobody"}}}));
    for to in By::ClusterIp.addresses(10) {
        client.ask_until(Protocol::Tcp, to, SOON, refused).unwrap();
    }
    world.api.delete(&format!("{SERVICES}/web"));
    let gone = |agent: &Agent| agent.cli_json(&["services"]).to_string().contains("\"web\"");
    let start = Instant::now();
    while world.agents.iter().any(gone) {
        assert!(start.elapsed() < SOON, "the Service is still there");
    }
}

#[test]
fn connections_go_on_while_the_api_server_is_away() {
    let mut world = World::new(1);
    world.start_agents("proxy");
    world.expect_answers(By::LoadBalancer, &["p1-1", "p1-2"], SOON);
    let to = By::LoadBalancer.addresses(10)[0];
    let mut open = world.lab.outside_client().connect(to).unwrap();
    let before = ask_on(&mut open).unwrap();
    world.plane.kill_api_server();
    world.expect_problems("the API server is away", SOON, |problems| problems.contains("can't be reached"));
    assert_eq!(ask_on(&mut open).unwrap(), before);
    world.expect_answers(By::NodePort(1), &["p1-1", "p1-2"], SOON);
    assert_eq!(world.health(), [Some(200), Some(200)], "nothing is late");
    // An agent that starts meanwhile leaves everything as it is, too. It can't know yet whether it still should get connections.
    world.agents[0].kill();
    world.agents[0].spawn().unwrap();
    thread::sleep(Duration::from_secs(2));
    world.expect_health([Some(503), Some(200)], "it waits for its Node");
    world.expect_answers(By::NodePort(1), &["p1-1", "p1-2"], SOON);
    assert_eq!(ask_on(&mut open).unwrap(), before);
    world.plane.start_api_server().unwrap();
    world.agents[0].wait_ready(RETURN).unwrap();
    world.expect_problems("the API server is back", RETURN, |problems| problems == "[]");
    world.api.patch(&format!("{PODS}/p1-1"), &json!({"metadata": {"labels": {"app": "other"}}}));
    world.expect_answers(By::LoadBalancer, &["p1-2"], RETURN);
    assert_eq!(ask_on(&mut open).unwrap(), before);
    world.expect_health([Some(200), Some(200)], "all is well again");
}

#[test]
fn a_node_that_is_deleted_gets_no_new_connections_also_after_a_restart() {
    let mut world = World::new(1);
    world.start_agents("proxy");
    world.expect_health([Some(200), Some(200)], "at first");
    let node = format!("/api/v1/nodes/{}", world.lab.node(1).name);
    world.api.delete(&node);
    world.expect_health([Some(503), Some(200)], "the Node is deleted");
    world.agents[0].kill();
    world.agents[0].spawn().unwrap();
    // It is alive all the time, though nothing may be written for half a minute (`kube-proxy.md` §12).
    world.expect_health([Some(503), Some(200)], "an agent that never saw the Node");
}

#[test]
fn an_agent_that_waits_for_its_node_is_alive_however_long_that_takes() {
    let world = World::new(1);
    let node = world.lab.node(1);
    world.api.delete(&format!("/api/v1/nodes/{}", node.name));
    let flags = ["--proxy-mode=iptables", "--iptables-sync-period=1s"];
    let mut agent = Agent::spawn_on_api_server(&world.lab, node, &world.plane.kubeconfig("proxy"), &flags).unwrap();
    world.expect_health([Some(503), Some(200)], "it waits");
    // What is not done after two periods is late.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        assert_eq!(world.health(), [Some(503), Some(200)], "after {:?}", start.elapsed());
        thread::sleep(Duration::from_millis(100));
    }
    world.api.put(node_object(node));
    agent.wait_ready(RETURN).unwrap();
    world.expect_health([Some(200), Some(200)], "its Node is there");
}

#[test]
fn what_happened_in_a_history_that_is_gone_is_made_up_for() {
    let mut world = World::new(1);
    world.api.put(addressed(Service::new("old").selector("app", "web"), 11));
    world.start_agents("proxy");
    world.expect_answers(By::LoadBalancer, &["p1-1", "p1-2"], SOON);
    // The agent sleeps through a deletion and a creation, and the API server that it watched forgets them.
    let agent = Pid::from_raw(world.agents[0].pid().unwrap().cast_signed()).unwrap();
    kill_process(agent, Signal::STOP).unwrap();
    world.plane.kill_api_server();
    world.plane.start_api_server().unwrap();
    world.api.delete(&format!("{SERVICES}/old"));
    world.api.put(addressed(Service::new("new").selector("app", "web"), 12));
    world.plane.compact();
    world.plane.kill_api_server();
    world.plane.start_api_server().unwrap();
    kill_process(agent, Signal::CONT).unwrap();
    let start = Instant::now();
    loop {
        let services = world.agents[0].cli_json(&["services"]).to_string();
        if services.contains("\"new\"") && !services.contains("\"old\"") && services.contains("\"web\"") {
            break;
        }
        assert!(start.elapsed() < RETURN, "{services}");
        thread::sleep(Duration::from_millis(100));
    }
    let client = world.lab.outside_client();
    client.ask_until(Protocol::Tcp, By::LoadBalancer.addresses(12)[0], RETURN, Result::is_ok).unwrap();
    world.expect_problems("nothing is wrong", RETURN, |problems| problems == "[]");
}

#[test]
fn both_sources_of_endpoints_give_the_same_picture() {
    let world = World::new(2);
    let api = &world.api;
    api.put(addressed(Service::new("local").selector("app", "web").spec("externalTrafficPolicy", "Local"), 11));
    api.put(addressed(Service::new("unready").selector("app", "unready").spec("publishNotReadyAddresses", true), 12));
    api.patch(&format!("{PODS}/p2-1"), &json!({"metadata": {"labels": {"app": "unready"}}}));
    let not_ready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    api.patch(&format!("{PODS}/p2-1/status"), &not_ready);
    api.put(addressed(Service::new("by-hand"), 13));
    let endpoint = SliceEndpoint {
        address: world.lab.pod(1, 1).v4.into(),
        node: "node1".into(),
        serving: true,
        terminating: false,
    };
    api.put(endpoint_slice("by-hand-1", "by-hand", &[("tcp", "TCP", TARGET)], &[endpoint]));
    api.put(addressed(Service::new("none").selector("app", "none"), 14));
    api.put(addressed(Service::new("another-proxys"), 15));
    let label = json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}}});
    api.patch(&format!("{SERVICES}/another-proxys"), &label);
    let picture = |user: &str, flags: &[&str]| -> Vec<Value> {
        let mut pictures = Vec::new();
        for node in &world.lab.nodes {
            let mut agent = Agent::start_on_api_server(&world.lab, node, &world.plane.kubeconfig(user), flags);
            // The controllers may still be gathering the last change.
            thread::sleep(Duration::from_secs(2));
            pictures.extend([agent.cli_json(&["services"]), agent.cli_json(&["endpoints"])]);
            let problems = agent.cli_json(&["status"])["problems"].clone();
            assert_eq!(problems, json!([]), "{flags:?}");
            agent.terminate();
            agent.cleanup();
        }
        pictures
    };
    let slices = picture("proxy", &[]);
    let pods = picture("admin", &["--endpoints", "pod-selector"]);
    for (slices, pods) in slices.iter().zip(&pods) {
        assert_eq!(format!("{slices:#}"), format!("{pods:#}"));
    }
    let text = slices[0].to_string();
    assert!(text.contains("by-hand") && text.contains("kubernetes") && !text.contains("another-proxys"), "{text}");
}

/// A Service that says something by every field that its type may have.
fn everything() -> Service {
    Service::new("everything")
        .selector("app", "web")
        .dual_stack(77)
        .node_port("tcp", "TCP", 80, TARGET, 30_077)
        .node_port("udp", "UDP", 80, TARGET, 30_077)
        .load_balancer(&load_balancer(77))
        .spec("ipFamilyPolicy", "RequireDualStack")
        .spec("externalIPs", json!(["10.99.7.7", "fd00:99:7::7"]))
        .spec("loadBalancerIP", "10.99.1.77")
        .spec("loadBalancerClass", "example.org/fast")
        .spec("loadBalancerSourceRanges", json!(["10.99.0.0/24", "fd00:99::/64"]))
        .spec("allocateLoadBalancerNodePorts", true)
        .spec("externalTrafficPolicy", "Local")
        .spec("healthCheckNodePort", 30_777)
        .spec("internalTrafficPolicy", "Cluster")
        .spec("publishNotReadyAddresses", true)
        .spec("sessionAffinity", "ClientIP")
        .spec("sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 600}}))
        .spec("trafficDistribution", "PreferSameZone")
}

#[test]
fn a_service_with_every_field_set_means_what_they_say() {
    let mut world = World::new(2);
    let lab = &world.lab;
    world.api.put(everything());
    let path = format!("{SERVICES}/everything");
    // What says that it is no virtual address, and what is a name, have no frontends.
    let ingress = json!([
        {"ip": "10.99.1.77", "ipMode": "VIP", "ports": [{"port": 80, "protocol": "TCP"}]},
        {"ip": "fd00:99:1::4d", "ipMode": "VIP"},
        {"ip": "10.99.1.78", "ipMode": "Proxy"},
        {"hostname": "lb.example.org"},
    ]);
    world.api.patch(&format!("{path}/status"), &json!({"status": {"loadBalancer": {"ingress": ingress}}}));
    let not_ready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    world.api.patch(&format!("{PODS}/p1-2/status"), &not_ready);

    let schemas = world.api.get("/openapi/v3/api/v1").unwrap();
    let fields = &schemas["components"]["schemas"]["io.k8s.api.core.v1.ServiceSpec"]["properties"];
    let stored = world.api.get(&path).unwrap();
    let unset: Vec<&String> =
        fields.as_object().unwrap().keys().filter(|field| stored["spec"].get(field.as_str()).is_none()).collect();
    assert_eq!(unset, ["externalName"], "every field that a Service with frontends has is set");

    let kubeconfig = world.plane.kubeconfig("proxy");
    let flags = ["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
    for node in &lab.nodes {
        world.agents.push(Agent::start_on_api_server(lab, node, &kubeconfig, &flags));
    }
    // The controller writes hints once it has seen the nodes' zones.
    world.api.until("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", |list| {
        let ours = |slice: &&Value| slice["metadata"]["labels"]["kubernetes.io/service-name"] == "everything";
        let slices = list["items"].as_array().into_iter().flatten().filter(ours);
        let endpoints = slices.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        endpoints.filter(|endpoint| endpoint["hints"]["forZones"].is_array()).count() == 8
    });
    let own = |family: usize| -> Vec<String> {
        [1, 2].map(|pod| SocketAddr::new(own_addresses(lab, &format!("p1-{pod}"))[family], TARGET).to_string()).into()
    };
    let explained = |from: &str, to: &str| {
        ["tcp", "udp"].map(|protocol| world.agents[0].cli_json(&["explain", protocol, from, to]))
    };
    for (from, to, verdict, family) in [
        ("10.99.0.200", "10.99.1.77:80", "dnat", Some(0)),
        ("fd00:99::200", "[fd00:99:1::4d]:80", "dnat", Some(1)),
        ("10.99.0.200", "10.99.0.11:30077", "dnat", Some(0)),
        ("fd00:99::200", "[fd00:99::11]:30077", "dnat", Some(1)),
        ("10.99.0.200", "10.99.7.7:80", "dnat", Some(0)),
        ("10.244.1.11", "10.99.7.7:80", "dnat", Some(0)),
        ("fd00:10:244:1::11", "[fd00:99:7::7]:80", "dnat", Some(1)),
        ("10.244.1.11", "10.96.0.77:80", "dnat", Some(0)),
        ("fd00:10:244:1::11", "[fd00:10:96::4d]:80", "dnat", Some(1)),
        // Not within the source ranges.
        ("10.1.2.3", "10.99.1.77:80", "drop", None),
        ("10.244.1.11", "10.99.1.77:80", "drop", None),
        ("fd00:10:244:1::11", "[fd00:99:1::4d]:80", "drop", None),
        ("10.99.0.200", "10.99.1.78:80", "pass", None),
        ("10.244.1.11", "10.96.0.77:81", "reject", None),
    ] {
        let endpoints = json!(family.map(&own).unwrap_or_default());
        let is_right = |answer: &Value| {
            answer["verdict"] == verdict && answer["endpoints"] == endpoints && answer["masquerade"] == false
        };
        // The agent may hear of hints after others do.
        let start = Instant::now();
        while let Some(wrong) = explained(from, to).iter().find(|answer| !is_right(answer)) {
            assert!(start.elapsed() < SOON, "{from} to {to}: {wrong}, not {verdict} {endpoints}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    let (outside, pod) = (lab.outside_client(), lab.client(lab.pod(1, 1)));
    for (client, by) in [(&outside, By::LoadBalancer), (&outside, By::NodePort(1)), (&pod, By::ClusterIp)] {
        for to in by.addresses(77) {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let answers = client.ask_times(protocol, to, 20).unwrap_or_else(|error| panic!("{to}: {error}"));
                let names: BTreeSet<&str> = answers.iter().map(|answer| answer.by.as_str()).collect();
                assert_eq!(names.len(), 1, "{protocol:?} {to}: a client stays with its endpoint: {names:?}");
                assert!(names.iter().all(|name| name.starts_with("p1-")), "{protocol:?} {to}: {names:?}");
            }
        }
    }
    let stranger = pod.with_timeout(Duration::from_millis(300));
    for to in By::LoadBalancer.addresses(77) {
        let error = stranger.ask(Protocol::Tcp, to).unwrap_err();
        assert!(!refused(&Err(error)), "{to}: what is outside the source ranges is dropped");
    }
    for node in &lab.nodes {
        let client = lab.outside_client();
        let answer = http::ask(&client, (node.v4(), 30_777).into(), "GET /", &[]).unwrap();
        assert_eq!(answer.code, 200);
        let body: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!((&body["localEndpoints"], &body["service"]["name"]), (&json!(2), &json!("everything")), "{body}");
    }
    assert_eq!(world.agents[0].cli_json(&["status"])["problems"], json!([]));
}

#[test]
fn conntracks_settings_are_written_and_one_that_cannot_be_is_an_event() {
    let world = World::new(1);
    let node = world.lab.node(1);
    // The size of the table can't be written in a network namespace that is not the machine's first; a million is the most that is asked
    // for.
    let size: u64 = node.netns.sysctl("net/netfilter/nf_conntrack_max").unwrap().trim().parse().unwrap();
    let is_written = size < 1 << 20;
    let flags = [
        "--conntrack-max-per-core=100000000",
        "--conntrack-tcp-timeout-established=1h1m",
        "--conntrack-tcp-timeout-close-wait=2m",
        "--conntrack-tcp-be-liberal",
        "--conntrack-udp-timeout=44s",
        "--conntrack-udp-timeout-stream=222s",
    ];
    let settings =
        ["tcp_timeout_established", "tcp_timeout_close_wait", "tcp_be_liberal", "udp_timeout", "udp_timeout_stream"]
            .map(|name| format!("net/netfilter/nf_conntrack_{name}"));
    let set = || settings.each_ref().map(|name| node.netns.sysctl(name).unwrap().trim().to_owned());
    let wanted = ["3660", "120", "1", "44", "222"];
    let before = set();
    assert!(before.iter().zip(wanted).all(|(before, wanted)| before != wanted), "{before:?}");

    let kubeconfig = world.plane.kubeconfig("proxy");
    let agent = Agent::new(&world.lab, node, world.lab.manifests().path(), &[]).unwrap();
    let mut command = Command::new(agent.binary());
    command.args(["run", "--init-only", "--hostname-override", &node.name, "--kubeconfig"]).arg(&kubeconfig);
    command.arg("--bpffs").arg(agent.bpffs()).args(flags);
    node.netns.apply(&mut command).unwrap();
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(set(), wanted);
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.contains("conntrack.maxPerCore: cannot write"), is_written, "{size}: {said}");

    let reset: Vec<(&str, &str)> = settings.iter().map(String::as_str).zip(before.iter().map(String::as_str)).collect();
    node.netns.set_sysctls(&reset).unwrap();
    let agent = Agent::start_on_api_server(&world.lab, node, &kubeconfig, &flags);
    assert_eq!(set(), wanted);
    if is_written {
        let list = world.api.until("/apis/events.k8s.io/v1/namespaces/default/events", |list| {
            list.to_string().contains("FailedToSetConntrack")
        });
        let events = list["items"].as_array().unwrap();
        let event = events.iter().find(|event| event["reason"] == "FailedToSetConntrack").unwrap();
        assert_eq!((&event["type"], &event["regarding"]["kind"]), (&json!("Warning"), &json!("Node")), "{event}");
        let note = event["note"].as_str().unwrap();
        assert!(note.contains("conntrack.maxPerCore: cannot write") && note.contains("set the field to 0"), "{note}");
    }
    world.expect_answers(By::LoadBalancer, &["p1-1", "p1-2"], SOON);
    drop(agent);
}

#[test]
fn rights_that_are_revoked_are_named_in_status() {
    let mut world = World::new(1);
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "other"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "other"}],
    });
    world.api.put(binding.clone());
    world.start_agents("other");
    world.expect_answers(By::LoadBalancer, &["p1-1", "p1-2"], SOON);
    world.expect_problems("kube-proxy's role is enough", SOON, |problems| problems == "[]");
    world.api.delete("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/other");
    // A watch that runs is not asked again; the API server's restart ends it.
    world.plane.kill_api_server();
    world.plane.start_api_server().unwrap();
    for resource in ["services", "endpointslices.discovery.k8s.io", "nodes"] {
        let part = format!("grant verbs `list` and `watch` on {resource}");
        world.expect_problems(resource, RETURN, |problems| problems.contains(&part));
    }
    world.expect_answers(By::LoadBalancer, &["p1-1", "p1-2"], SOON);
    world.api.put(binding);
    world.expect_problems("granted again", RETURN, |problems| problems == "[]");
}
