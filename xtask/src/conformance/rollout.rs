//! A rolling update of the agent's DaemonSet while everyone asks. In: nodes whose agents are pods of `deploy/`. Out: the result, as of a
//! spec: failed if a question wasn't answered, or if a new agent has something to complain about.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use tests::cluster::{By, addressed};
use tests::manifest::{Service, SliceEndpoint, endpoint_slice};
use tests::topology::{OUTSIDE_V4, OUTSIDE_V6};
use tests::traffic::client::echo_on;
use tests::{Client, ControlPlane, Lab, Node, Protocol, Server};

use super::daemonset::DaemonSet;
use super::specs::{Outcome, Spec};
use crate::interrupt;

/// The number of the Service that is asked.
const NUMBER: u16 = 250;
/// What its endpoints listen on.
const TARGET: u16 = 8080;
/// How long the Service's first answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long an answer may take while containers start on a busy machine.
const SLOW: Duration = Duration::from_secs(10);
/// How long an update may take.
const LONGEST: Duration = Duration::from_secs(180);

/// Updates it.
pub fn run(lab: &Lab, plane: &ControlPlane, daemon_set: DaemonSet) -> Spec {
    let (start, name) = (Instant::now(), "a rolling update of the DaemonSet while everyone asks".to_owned());
    let (outcome, reason) = match update_while_asked(lab, plane, daemon_set) {
        Ok(answered) => {
            println!("  {name}: {answered} questions, all of them answered");
            (Outcome::Passed, String::new())
        }
        Err(error) => {
            println!("  {name}: {error:#}");
            (Outcome::Failed, format!("{error:#}"))
        }
    };
    Spec { name, outcome, seconds: start.elapsed().as_secs_f64(), reason }
}

/// Returns how many questions were answered meanwhile.
fn update_while_asked(lab: &Lab, plane: &ControlPlane, daemon_set: DaemonSet) -> Result<u64> {
    let _servers = serve(lab, plane);
    let ways = ways(lab);
    for (name, client, to) in &ways {
        let wait = client.ask_until(Protocol::Tcp, *to, PATIENCE, Result::is_ok);
        wait.with_context(|| format!("{name} asks {to} before the update"))?;
    }
    let before = pods(plane, daemon_set)?;
    let over = AtomicBool::new(false);
    let (updated, answers) = thread::scope(|scope| {
        let askers: Vec<_> = ways.iter().map(|way| scope.spawn(|| ask_while(way, &over))).collect();
        let updated = update(plane, daemon_set);
        over.store(true, Ordering::Relaxed);
        let answers: Vec<Result<u64>> =
            askers.into_iter().map(|asker| asker.join().unwrap_or_else(|_| Err(anyhow!("panicked")))).collect();
        (updated, answers)
    });
    updated?;
    let answered = answers.into_iter().sum::<Result<u64>>()?;
    let after = pods(plane, daemon_set)?;
    let is_new = before.is_disjoint(&after) && [&before, &after].iter().all(|pods| pods.len() == lab.nodes.len());
    ensure!(is_new, "{before:?} became {after:?}");
    for pod in &after {
        let exec = ["exec", "--namespace=kube-system", pod, "--", "fairlead", "status", "--output=json"];
        let output = plane.kubectl(&exec, "")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "fairlead status in {pod}: {said}");
        let status: Value = serde_json::from_slice(&output.stdout).context("reading the status")?;
        ensure!(status["problems"] == json!([]), "{pod}: {}", status["problems"]);
    }
    Ok(answered)
}

/// A Service whose endpoints are the nodes themselves and the machine outside.
fn serve(lab: &Lab, plane: &ControlPlane) -> Vec<Server> {
    let mut servers: Vec<Server> = lab.nodes.iter().map(|node| lab.serve_on_node(node, TARGET)).collect();
    servers.push(lab.serve_outside(TARGET));
    let api = plane.api();
    api.put(addressed(Service::new("rollout"), NUMBER));
    let ports = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];
    for v4 in [true, false] {
        let endpoint = |node: &Node| SliceEndpoint {
            address: if v4 { node.v4().into() } else { node.v6().into() },
            node: node.name.clone(),
            serving: true,
            terminating: false,
        };
        let address = if v4 { OUTSIDE_V4.into() } else { OUTSIDE_V6.into() };
        let outside = SliceEndpoint { address, node: String::new(), serving: true, terminating: false };
        let endpoints: Vec<SliceEndpoint> = [outside].into_iter().chain(lab.nodes.iter().map(endpoint)).collect();
        let name = if v4 { "rollout-v4" } else { "rollout-v6" };
        let mut slice = endpoint_slice(name, "rollout", &ports, &endpoints);
        if let Some(outside) = slice["endpoints"][0].as_object_mut() {
            outside.remove("nodeName");
        }
        api.put(slice);
    }
    servers
}

/// Who asks, from where, which address.
type Way = (String, Client, SocketAddr);

fn ways(lab: &Lab) -> Vec<Way> {
    let nodes = lab.nodes.iter().map(|node| (node.name.clone(), lab.host_client(node), By::ClusterIp));
    let ports = lab.nodes.iter().map(|node| ("outside".to_owned(), lab.outside_client(), By::NodePort(node.number)));
    let balanced = ("outside".to_owned(), lab.outside_client(), By::LoadBalancer);
    let all = nodes.chain(ports).chain([balanced]);
    let of = |(name, client, by): (String, Client, By)| {
        by.addresses(NUMBER).map(|to| (name.clone(), client.clone().with_timeout(SLOW), to))
    };
    all.flat_map(of).collect()
}

/// Asks until it is over, over new connections and over one that stays open; returns how often.
fn ask_while((name, client, to): &Way, over: &AtomicBool) -> Result<u64> {
    let told = |what: &str, asked: u64| format!("{name} asks {to}, {what}, after {asked} answers");
    let mut open = client.connect(*to).with_context(|| told("open", 0))?;
    let mut asked = 0;
    while !over.load(Ordering::Relaxed) {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            client.ask(protocol, *to).with_context(|| told(&format!("{protocol:?}"), asked))?;
            asked += 1;
        }
        echo_on(&mut open, 1000, asked).with_context(|| told("open", asked))?;
        asked += 1;
        thread::sleep(Duration::from_millis(20));
    }
    Ok(asked)
}

fn update(plane: &ControlPlane, daemon_set: DaemonSet) -> Result<()> {
    let name = daemon_set.name();
    let output = plane.kubectl(&["rollout", "restart", "--namespace=kube-system", &format!("daemonset/{name}")], "")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "kubectl rollout restart: {said}");
    let (api, start) = (plane.api(), Instant::now());
    loop {
        interrupt::check()?;
        let object = api.get(&format!("/apis/apps/v1/namespaces/kube-system/daemonsets/{name}"))?;
        let status = &object["status"];
        let wanted = &status["desiredNumberScheduled"];
        let is_done = status["observedGeneration"] == object["metadata"]["generation"]
            && ["updatedNumberScheduled", "numberAvailable"].iter().all(|count| status[*count] == *wanted);
        if is_done {
            return Ok(());
        }
        ensure!(start.elapsed() < LONGEST, "{name} is not updated after {LONGEST:?}: {status}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// The names of the DaemonSet's pods.
fn pods(plane: &ControlPlane, daemon_set: DaemonSet) -> Result<BTreeSet<String>> {
    let list = plane.api().get("/api/v1/namespaces/kube-system/pods")?;
    let ours = |pod: &&Value| pod["metadata"]["ownerReferences"][0]["name"] == daemon_set.name();
    let lasts = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
    let pods = list["items"].as_array().context("a list")?.iter().filter(ours).filter(lasts);
    Ok(pods.filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned)).collect())
}
