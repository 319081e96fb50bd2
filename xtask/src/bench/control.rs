//! `cargo xtask bench control`: what many Services cost Fairlead, and kube-proxy in both modes. In: sizes. Out: tables as Markdown. All
//! are fed by the same server, ask for the same objects, and are looked at from the same pod: by its connections. What only Fairlead can
//! tell, its writes, is a table of its own.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use tests::bpf::{Key, PinnedMap};
use tests::command;
use tests::control_plane::parts;
use tests::kube_proxy::CLUSTER_CIDR;
use tests::manifest::Service;
use tests::{Agent, Client, KubeProxy, Lab, Protocol, Topology, WatchServer, residue, scale};

use crate::check::change::{mebibytes, processor, release};
use crate::interrupt;
use crate::process;
use crate::setup;
use crate::workspace;

/// What endpoints listen on.
const TARGET: u16 = 8080;
/// Longer than kube-proxy's default for the time between two syncs, so that no change waits for the one before.
const PAUSE: Duration = Duration::from_millis(1200);
/// Fairlead waits for nothing; so long everything that a change leads to takes at most.
const SHORT_PAUSE: Duration = Duration::from_millis(50);
/// How long a connection is waited for before another is tried: while nothing answers, it is what a start is measured by.
const TRY: Duration = Duration::from_millis(20);

/// What to measure.
#[derive(Args)]
pub struct Options {
    /// Numbers of Services and of endpoints of each
    #[arg(long, value_delimiter = ',', default_value = "1000x4,10000x4,5000x50")]
    sizes: Vec<Size>,
    /// How often everything is measured, one after the other
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// How many changes of an endpoint are measured in each by connections
    #[arg(long, default_value_t = 15)]
    changes: usize,
    /// How many changes are measured by looking at Fairlead's table of frontends
    #[arg(long, default_value_t = 300)]
    writes: usize,
    /// After how many seconds a start is given up
    #[arg(long, default_value_t = 120)]
    patience: u64,
}

/// A cluster to measure in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size {
    services: u32,
    endpoints: u32,
}

impl FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (services, endpoints) = text.split_once('x').context("write SERVICESxENDPOINTS, such as 10000x4")?;
        let size = Self { services: services.parse()?, endpoints: endpoints.parse()? };
        ensure!((3..=1 << 16).contains(&size.services), "3 to 65536 Services can be numbered");
        ensure!((1..=100).contains(&size.endpoints), "a slice has 1 to 100 endpoints");
        Ok(size)
    }
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Proxy {
    Fairlead,
    KubeProxy(&'static str),
}

const PROXIES: [Proxy; 3] = [Proxy::Fairlead, Proxy::KubeProxy("nftables"), Proxy::KubeProxy("iptables")];

impl Proxy {
    fn name(self) -> String {
        match self {
            Self::Fairlead => "Fairlead".to_owned(),
            Self::KubeProxy(mode) => format!("kube-proxy, {mode}"),
        }
    }
}

/// One that runs, until it is dropped.
enum Running {
    Fairlead(Agent),
    KubeProxy(KubeProxy),
}

impl Running {
    fn memory(&self) -> Result<(u64, u64)> {
        let pid = match self {
            Self::Fairlead(agent) => agent.pid().context("the agent has ended")?,
            Self::KubeProxy(proxy) => proxy.pid(),
        };
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("reading a process's memory")?;
        Ok((mebibytes(&status, "VmRSS"), mebibytes(&status, "VmHWM")))
    }
}

/// What was measured once.
struct Measured {
    /// From the start of the process until the first, the middle and the last Service answer.
    start: Option<Duration>,
    /// At the end, and at most.
    memory: (u64, u64),
    /// From an event being sent to a connection that reaches the new endpoint, in order.
    changes: Vec<Duration>,
    /// What only Fairlead can tell.
    writes: Option<Writes>,
}

/// How changes are written.
struct Writes {
    /// From an event being sent to the table of frontends being another, in order.
    times: Vec<Duration>,
    /// bpf(2) calls and entries of all of them.
    calls: u64,
    entries: u64,
}

/// The subcommand.
pub fn run(options: &Options) -> Result<ExitCode> {
    ensure!(workspace::is_root(), "network namespaces are made and programs loaded: run `cargo xtask bench` as root");
    interrupt::catch();
    setup::ensure()?;
    setup::ensure_cluster()?;
    parts::ensure_by(&parts::KUBE, |command| process::run("compiling the control plane", command))?;
    residue::clean()?;
    workspace::build_agent()?;
    println!("On {}, Linux {}.\n", processor(), release()?);
    println!("| Services × endpoints | | start to effective | memory, at most | a change: median | slowest |");
    println!("|---|---|---|---|---|---|");
    let mut writes = Vec::new();
    for _ in 0..options.rounds {
        for size in &options.sizes {
            for proxy in PROXIES {
                let measured = measure(options, *size, proxy).with_context(|| proxy.name())?;
                println!("{}", row(options, *size, proxy, &measured));
                writes.extend(measured.writes.map(|writes| (*size, writes)));
            }
        }
    }
    println!(
        "\n| Services × endpoints | an event to Fairlead's table: median | 9 of 10 within | slowest | bpf(2) calls | entries |"
    );
    println!("|---|---|---|---|---|---|");
    for (Size { services, endpoints }, writes) in &writes {
        let count = writes.times.len();
        let [median, most, slowest] = [count / 2, count * 9 / 10, count - 1].map(|at| milliseconds(&writes.times[at]));
        let [calls, entries] = [writes.calls, writes.entries].map(|number| number as f64 / count as f64);
        println!("| {services} × {endpoints} | {median} | {most} | {slowest} | {calls:.1} | {entries:.1} |");
    }
    Ok(ExitCode::SUCCESS)
}

fn milliseconds(duration: &Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f32() * 1000.0)
}

fn row(options: &Options, size: Size, proxy: Proxy, measured: &Measured) -> String {
    let start = match measured.start {
        Some(start) => format!("{:.2} s", start.as_secs_f32()),
        None => format!("not in {} s", options.patience),
    };
    let median = measured.changes.get(measured.changes.len() / 2).map_or("–".to_owned(), milliseconds);
    let slowest = measured.changes.last().map_or("–".to_owned(), milliseconds);
    let (now, most) = measured.memory;
    let Size { services, endpoints } = size;
    format!("| {services} × {endpoints} | {} | {start} | {now} MiB, {most} MiB | {median} | {slowest} |", proxy.name())
}

fn measure(options: &Options, size: Size, proxy: Proxy) -> Result<Measured> {
    interrupt::check()?;
    let topology = Topology { nodes: 1, pods_per_node: 3, binary: Some(workspace::agent()), ..Topology::default() };
    let lab = Lab::build(topology)?;
    let server = WatchServer::start(&lab)?;
    let probes = [0, size.services / 2, size.services - 1];
    for service in 0..size.services {
        server.put(service_object(service));
        let ready = probes.contains(&service).then(|| lab.pod(1, 1).v4.into());
        server.put(slice(size, service, ready));
    }
    let _servers = [1, 2].map(|pod| lab.serve(lab.pod(1, pod), TARGET));
    let client = lab.client(lab.pod(1, 3)).with_timeout(TRY);
    let patience = Duration::from_secs(options.patience);
    let node = lab.node(1);
    let begin = Instant::now();
    let running = match proxy {
        Proxy::Fairlead => {
            let cidr = format!("--cluster-cidr={CLUSTER_CIDR}");
            let flags = [&*cidr, "--detect-local-mode=ClusterCIDR", "--proxy-mode=nftables"];
            Running::Fairlead(Agent::spawn_on_api_server(&lab, node, server.kubeconfig(), &flags)?)
        }
        Proxy::KubeProxy(mode) => Running::KubeProxy(KubeProxy::start(&lab, node, server.kubeconfig(), mode)?),
    };
    let mut start = Some(begin);
    for service in probes {
        let left = patience.saturating_sub(begin.elapsed());
        if until(&client, service, left, "p1-1").is_err() {
            start = None;
            break;
        }
    }
    let start = start.map(|begin| begin.elapsed());
    thread::sleep(PAUSE);
    let mut changes = Vec::new();
    for number in 0..if start.is_some() { options.changes } else { 0 } {
        interrupt::check()?;
        thread::sleep(PAUSE);
        let service = probes[number % probes.len()];
        let pod = lab.pod(1, if (number / probes.len()).is_multiple_of(2) { 2 } else { 1 });
        let object = slice(size, service, Some(pod.v4.into()));
        let begin = Instant::now();
        server.put(object);
        until(&client, service, Duration::from_secs(60), &pod.name)?;
        changes.push(begin.elapsed());
    }
    changes.sort();
    let writes = match &running {
        Running::Fairlead(agent) if start.is_some() && options.writes > 0 => {
            Some(measure_writes(options, size, &lab, &server, agent)?)
        }
        Running::Fairlead(_) | Running::KubeProxy(_) => None,
    };
    Ok(Measured { start, memory: running.memory()?, changes, writes })
}

/// Changes the endpoint of one Service again and again, and looks without a pause at the entry in the kernel that switches packets over.
fn measure_writes(options: &Options, size: Size, lab: &Lab, server: &WatchServer, agent: &Agent) -> Result<Writes> {
    let service = size.services / 2;
    let mut changes = 0_u32;
    let mut change = || {
        changes += 1;
        let pod = lab.pod(1, if changes.is_multiple_of(2) { 2 } else { 1 });
        let object = slice(size, service, Some(pod.v4.into()));
        let begin = Instant::now();
        server.put(object);
        begin
    };
    // The series before may have ended with the same endpoint.
    change();
    thread::sleep(PAUSE);
    let (table, key) = switch(agent, || {
        change();
        thread::sleep(PAUSE);
    })?;
    let count = || -> Result<[u64; 2]> {
        let status = agent.cli_json(&["status"]);
        let number = |name: &str| status["agent"][name].as_u64().with_context(|| format!("no number agent.{name}"));
        Ok([number("bpfCalls")?, number("entriesWritten")?])
    };
    let before = count()?;
    let mut times = Vec::new();
    // Looking without a pause takes one of the processors: whoever has work must get it at once.
    // This runs on the process's first thread, which has its number.
    let me = std::process::id().to_string();
    command::run("chrt", &["--idle", "--pid", "0", &me])?;
    for _ in 0..options.writes {
        interrupt::check()?;
        thread::sleep(SHORT_PAUSE);
        let old = table.get(&key)?;
        let begin = change();
        while table.get(&key)? == old {
            ensure!(begin.elapsed() < Duration::from_secs(5), "the entry of Service {service} stays as it is");
        }
        times.push(begin.elapsed());
    }
    command::run("chrt", &["--other", "--pid", "0", &me])?;
    thread::sleep(SHORT_PAUSE);
    let after = count()?;
    times.sort();
    Ok(Writes { times, calls: after[0] - before[0], entries: after[1] - before[1] })
}

/// The entry that is another after each change: which endpoint a slot of the Service leads to, or which slots its frontend has.
fn switch(agent: &Agent, mut change: impl FnMut()) -> Result<(PinnedMap, Key)> {
    for name in ["SLOTS", "FRONTENDS"] {
        let path = find(agent.bpffs(), name).with_context(|| format!("no table {name} is pinned"))?;
        let table = PinnedMap::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let keys = table.keys()?;
        let all = || keys.iter().map(|key| table.get(key)).collect::<std::io::Result<Vec<_>>>();
        let mut rows = Vec::new();
        for _ in 0..3 {
            rows.push(all()?);
            change();
        }
        let is_switched = |at: &usize| rows[0][*at] != rows[1][*at] && rows[1][*at] != rows[2][*at];
        let found = (0..keys.len()).find(is_switched).map(|at| keys[at]);
        drop(rows);
        if let Some(key) = found {
            return Ok((table, key));
        }
    }
    bail!("no entry is another after each change")
}

/// The first file of this name in a folder and those below it.
fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    entries.sort();
    let own = entries.iter().find(|path| path.file_name().is_some_and(|own| own == name)).cloned();
    own.or_else(|| entries.iter().rev().find_map(|path| find(path, name)))
}

/// Asks a Service until this pod answers.
fn until(client: &Client, service: u32, limit: Duration, pod: &str) -> Result<()> {
    let to = SocketAddr::from((scale::cluster_ip(service), 80));
    client
        .netns()
        .run(|| {
            let begin = Instant::now();
            loop {
                let answer = client.ask(Protocol::Tcp, to);
                if answer.as_ref().is_ok_and(|answer| answer.by == pod) {
                    return Ok(());
                }
                if begin.elapsed() > limit {
                    return Err(anyhow!("{to} is not answered by {pod}: {answer:?}"));
                }
            }
        })
        .map(drop)
}

fn service_object(service: u32) -> Value {
    Service::new(&format!("service-{service}"))
        .cluster_ips(&[scale::cluster_ip(service).into()])
        .port("http", "TCP", 80, TARGET)
        .into()
}

/// A slice of full length. Where a pod of the lab is given, it alone is ready, so that one connection tells.
fn slice(size: Size, service: u32, ready: Option<IpAddr>) -> Value {
    let first = service * size.endpoints;
    let endpoints: Vec<Value> = (0..size.endpoints)
        .map(|number| {
            let mut address = IpAddr::from(scale::endpoint_v4(first + number));
            let mut is_ready = ready.is_none();
            if let (0, Some(pod)) = (number, ready) {
                (address, is_ready) = (pod, true);
            }
            json!({
                "addresses": [address],
                "nodeName": format!("node{}", number % 100 + 1),
                "conditions": {"ready": is_ready, "serving": is_ready, "terminating": false},
            })
        })
        .collect();
    let name = format!("service-{service}");
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": format!("{name}-1"), "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": TARGET}],
        "endpoints": endpoints,
    })
}

#[cfg(test)]
mod tests_of_control {
    use super::{Size, slice};

    #[test]
    fn a_size_is_two_numbers_that_can_be() {
        assert_eq!("10000x4".parse::<Size>().unwrap(), Size { services: 10_000, endpoints: 4 });
        for text in ["10000", "2x4", "70000x4", "5x0", "5x101", "ax4"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_slice_is_of_full_length_and_one_of_a_probe_is_ready() {
        let size = Size { services: 10, endpoints: 50 };
        for (pod, expected) in [(None, 50), (Some([10, 0, 0, 1].into()), 1)] {
            let slice = slice(size, 3, pod);
            let endpoints = slice["endpoints"].as_array().unwrap();
            let ready = endpoints.iter().filter(|endpoint| endpoint["conditions"]["ready"] == true).count();
            assert_eq!((endpoints.len(), ready), (50, expected));
        }
    }
}
