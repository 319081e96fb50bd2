//! The steps of the demonstration, in order. Each says what it does, does it with real connections, shows what came out, and fails if
//! that isn't what a Service promises.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tests::traffic::client::echo_on;
use tests::{Answer, Client, Protocol};

use super::cluster::{CLUSTER_IPS, Cluster, LOAD_BALANCER_IPS, sample};
use super::page::{Page, time};
use crate::interrupt;

/// Questions for one bar chart.
const QUESTIONS: usize = 60;

/// The files of the endpoints.
const POD_FILES: [&str; 3] = ["pod-web-1.yaml", "pod-web-2.yaml", "pod-web-3.yaml"];

/// Two nodes, their agents.
pub fn start(page: &mut Page, cluster: &mut Cluster) -> Result<()> {
    page.heading(
        "A small cluster",
        "Network namespaces, joined to each other and to nothing else:\n\
         node1: pods web-1 and client     node2: pods web-2 and web-3     and a client outside the cluster.\n\
         An agent on each node reads the same folder of manifests.",
    );
    let took = cluster.start_agents()?;
    page.good(&format!("both agents are ready, {} after their start", time(took)));
    Ok(())
}

/// What the agent says it serves.
pub fn services(page: &mut Page, cluster: &Cluster) -> Result<()> {
    page.heading("The Services", "$ fairlead services");
    page.block(&cluster.ask_agent(&["services"])?);
    interrupt::check()
}

/// Every kind of address, from everywhere, over both families and protocols.
pub fn connections(page: &mut Page, cluster: &Cluster) -> Result<()> {
    page.heading(
        "Connections",
        &format!("{QUESTIONS} connections to each address, each from a new port; who answered how often?"),
    );
    let places = [
        ("ClusterIP, from the client pod", cluster.pod_client(), addresses(CLUSTER_IPS)?, 80, 53),
        (
            "ClusterIP, from the node itself (translated at the socket)",
            cluster.lab.host_client(cluster.lab.node(1)),
            addresses(CLUSTER_IPS)?,
            80,
            53,
        ),
        ("NodePort of node2, from outside", cluster.lab.outside_client(), cluster.node_addresses(2), 30080, 30053),
        ("LoadBalancer address, from outside", cluster.lab.outside_client(), addresses(LOAD_BALANCER_IPS)?, 80, 53),
    ];
    for (title, client, ips, tcp, udp) in places {
        page.line(title);
        for (protocol, name, port) in [(Protocol::Tcp, "TCP", tcp), (Protocol::Udp, "UDP", udp)] {
            for ip in ips {
                interrupt::check()?;
                let to = SocketAddr::new(ip, port);
                let tally =
                    client.tally(protocol, to, QUESTIONS).with_context(|| format!("{title}: {name} to {to}"))?;
                page.row(&format!("  {name} {to}"), &cluster.endpoints, &tally);
                for endpoint in &cluster.endpoints {
                    ensure!(tally.contains_key(endpoint), "{endpoint} never answered at {to} over {name}");
                }
            }
        }
        page.line("");
    }
    Ok(())
}

/// A label is changed, and changed back.
pub fn label(page: &mut Page, cluster: &Cluster) -> Result<()> {
    page.heading(
        "A Pod leaves the Service and comes back",
        "In pod-web-2.yaml the label `app: web` becomes `app: parked`.",
    );
    let (client, to) = (cluster.pod_client(), cluster_ip()?);
    let file = POD_FILES[1];
    let text = sample(file)?;
    let leaver = &cluster.endpoints[1];

    cluster.write(file, &text.replace("app: web", "app: parked"))?;
    let gone = quiet_after(&client, to, leaver)?;
    let tally = client.tally(Protocol::Tcp, to, QUESTIONS)?;
    page.chart(
        &format!("without {leaver}; the last connection that it got began {} after the change", time(gone)),
        &cluster.endpoints,
        &tally,
    );
    ensure!(!tally.contains_key(leaver), "{leaver} still gets connections");

    cluster.write(file, &text)?;
    let back = client
        .ask_until(Protocol::Tcp, to, Duration::from_secs(5), |answer| answered_by(answer, leaver))
        .with_context(|| format!("{leaver} does not come back"))?;
    let tally = client.tally(Protocol::Tcp, to, QUESTIONS)?;
    page.line("");
    page.chart(&format!("changed back; {leaver} answered {} later", time(back)), &cluster.endpoints, &tally);
    Ok(())
}

/// No endpoint is left: refusals, at once.
pub fn scale_to_nothing(page: &mut Page, cluster: &Cluster) -> Result<()> {
    page.heading(
        "The Service is scaled to nothing",
        "All its Pods are deleted. Nobody waits for a timeout: the kernel refuses the connection.",
    );
    for file in POD_FILES {
        cluster.remove(file)?;
    }
    let clients = [
        ("the client pod", cluster.pod_client(), CLUSTER_IPS),
        ("node1", cluster.lab.host_client(cluster.lab.node(1)), CLUSTER_IPS),
        ("outside", cluster.lab.outside_client(), LOAD_BALANCER_IPS),
    ];
    for (from, client, ips) in clients {
        for ip in addresses(ips)? {
            for (protocol, name, port) in [(Protocol::Tcp, "TCP", 80), (Protocol::Udp, "UDP", 53)] {
                interrupt::check()?;
                let to = SocketAddr::new(ip, port);
                client
                    .ask_until(protocol, to, Duration::from_secs(5), is_refused)
                    .with_context(|| format!("{name} from {from} to {to} is not refused"))?;
                let took = fastest_refusal(&client, protocol, to)?;
                page.good(&format!("{:<14} {:<24} connection refused in {}", from, format!("{name} {to}"), time(took)));
            }
        }
    }
    for file in POD_FILES {
        cluster.write(file, &sample(file)?)?;
    }
    let client = cluster.pod_client();
    let back = client.ask_until(Protocol::Tcp, cluster_ip()?, Duration::from_secs(5), Result::is_ok)?;
    page.good(&format!("scaled up again: the first connection succeeds {} later", time(back)));
    wait_for_all(cluster)
}

/// The agent dies under load.
pub fn kill(page: &mut Page, cluster: &mut Cluster) -> Result<()> {
    page.heading(
        "The agent is killed",
        "SIGKILL in the middle of a stream of connections, then a new agent takes over. The data plane is in the kernel and stays there.",
    );
    let (client, to) = (cluster.pod_client(), cluster_ip()?);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let short = scope.spawn(|| short_connections(&client, to, &stop));
        let long = scope.spawn(|| long_connection(&client, to, &stop));
        let events = kill_and_restart(page, cluster);
        stop.store(true, Ordering::Relaxed);
        let short = short.join().map_err(|_| anyhow::anyhow!("the stream of connections panicked"))?;
        let long = long.join().map_err(|_| anyhow::anyhow!("the long connection panicked"))?;
        events?;
        let (made, broken) = short;
        page.line(&format!("{made} connections were made meanwhile, {} failed", broken.len()));
        if let Some(first) = broken.first() {
            bail!("a connection failed while the agent was away: {first}");
        }
        let rounds = long.context("the connection that was open all the time broke")?;
        page.good(&format!("none broke; one that was open all the time carried {rounds} requests of 16 KiB"));
        Ok(())
    })
}

fn kill_and_restart(page: &Page, cluster: &mut Cluster) -> Result<()> {
    interrupt::sleep(Duration::from_secs(1))?;
    let agent = cluster.agent(1)?;
    let pid = agent.pid().context("the agent ended by itself")?;
    agent.kill();
    page.line(&format!("1.0 s  kill -9 {pid}: node1 has no agent"));
    interrupt::sleep(Duration::from_secs(1))?;
    let start = Instant::now();
    let agent = cluster.agent(1)?;
    agent.spawn()?;
    agent.wait_ready(Duration::from_secs(15)).context("the new agent does not come up")?;
    page.line(&format!("2.0 s  a new agent adopts what is in the kernel, ready after {}", time(start.elapsed())));
    interrupt::sleep(Duration::from_secs(1))
}

/// As many connections as come to about 500 a second, until told to stop; how many, and what went wrong.
fn short_connections(client: &Client, to: SocketAddr, stop: &AtomicBool) -> (usize, Vec<io::Error>) {
    let (mut made, mut broken) = (0, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        match client.ask_times(Protocol::Tcp, to, 10) {
            Ok(answers) => made += answers.len(),
            Err(error) => broken.push(error),
        }
        thread::sleep(Duration::from_millis(15));
    }
    (made, broken)
}

fn long_connection(client: &Client, to: SocketAddr, stop: &AtomicBool) -> io::Result<u64> {
    let mut stream = client.connect(to)?;
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        echo_on(&mut stream, 16 * 1024, rounds)?;
        rounds += 1;
        thread::sleep(Duration::from_millis(5));
    }
    Ok(rounds)
}

/// Asks until `server` has been silent for a while; the time from now to the start of the last connection that it got.
fn quiet_after(client: &Client, to: SocketAddr, server: &str) -> Result<Duration> {
    let start = Instant::now();
    let mut last = Duration::ZERO;
    while start.elapsed() < last + Duration::from_millis(300) {
        interrupt::check()?;
        ensure!(start.elapsed() < Duration::from_secs(5), "{server} still gets connections after 5 s");
        let began = start.elapsed();
        if client.ask(Protocol::Tcp, to)?.by == server {
            last = began;
        }
    }
    Ok(last)
}

/// Of ten refusals the fastest: the others show how busy this machine is.
fn fastest_refusal(client: &Client, protocol: Protocol, to: SocketAddr) -> Result<Duration> {
    let mut fastest = Duration::MAX;
    for _ in 0..10 {
        let (took, result) = client.ask_timed(protocol, to);
        ensure!(is_refused(&result), "{to} was refused before, and then: {result:?}");
        fastest = fastest.min(took);
    }
    Ok(fastest)
}

fn wait_for_all(cluster: &Cluster) -> Result<()> {
    let client = cluster.pod_client();
    for endpoint in &cluster.endpoints {
        client
            .ask_until(Protocol::Tcp, cluster_ip()?, Duration::from_secs(5), |answer| answered_by(answer, endpoint))
            .with_context(|| format!("{endpoint} does not come back"))?;
    }
    Ok(())
}

fn answered_by(answer: &io::Result<Answer>, name: &str) -> bool {
    answer.as_ref().is_ok_and(|answer| answer.by == name)
}

fn is_refused(answer: &io::Result<Answer>) -> bool {
    answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

fn cluster_ip() -> Result<SocketAddr> {
    let [v4, _] = addresses(CLUSTER_IPS)?;
    Ok(SocketAddr::new(v4, 80))
}

fn addresses(texts: [&str; 2]) -> Result<[IpAddr; 2]> {
    Ok([texts[0].parse()?, texts[1].parse()?])
}
