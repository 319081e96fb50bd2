//! The first process of a virtual machine. In: a kernel without anything else. Out: a report on the second serial port, and the
//! machine switched off. Never run outside of one: it mounts, loads modules and ends the machine.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::manifest::{PodObject, Service, node_object};
use tests::{Agent, Answer, Client, Lab, Protocol, Topology, topology};

use super::report::{Program, Report, Round, Tried};

/// Where the agent is.
pub const AGENT: &str = "/bin/fairlead";
/// Where modules are, named so that their order is the one to load them in.
pub const MODULES: &str = "/modules";

/// The port that endpoints listen on.
const TARGET: u16 = 8080;
/// The last number of the ClusterIPs of the Service with endpoints.
const WEB: u16 = 10;
/// That of the one without.
const EMPTY: u16 = 11;
/// The NodePort of the Service.
const NODE_PORT: u16 = 30_080;

/// An emulated processor is slow, and a slow answer is no failure here.
const PATIENCE: Duration = Duration::from_secs(20);

/// Everything; does not return while it is the first process.
pub fn run() -> Result<ExitCode> {
    ensure!(std::process::id() == 1, "this is only for the first process of a virtual machine");
    let mut report = Report::default();
    // A thread of its own: what panics there is a sentence in the report, not the end of the kernel.
    let result = std::thread::scope(|scope| scope.spawn(|| work(&mut report)).join());
    report.error = match result {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{error:#}")),
        Err(panic) => Some(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned())),
    };
    if let Err(error) = fs::write("/dev/ttyS1", report.to_line() + "\n") {
        eprintln!("cannot report: {error}");
    }
    // SAFETY: no pointers; the last line has left when the descriptor was closed, and nothing here is to be kept. qemu runs with
    // `-no-reboot`, so that this ends it.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_RESTART) };
    Ok(ExitCode::FAILURE)
}

fn work(report: &mut Report) -> Result<()> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run"), ("tmpfs", "/tmp")] {
        mount(kind, place)?;
    }
    // The kernel may have done that one itself.
    if !Path::new("/dev/ttyS1").exists() {
        mount("devtmpfs", "/dev")?;
    }
    mount("cgroup2", "/sys/fs/cgroup")?;
    mount("bpf", "/sys/fs/bpf")?;
    report.kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    load_modules()?;
    // SAFETY: the only other thread waits for this one; nobody reads the environment meanwhile.
    unsafe { std::env::set_var("PATH", "/bin") };

    let lab = Lab::build(Topology { binary: Some(PathBuf::from(AGENT)), ..Topology::default() })?;
    let _servers = [lab.serve(lab.pod(1, 1), TARGET), lab.serve(lab.pod(2, 1), TARGET)];
    write_manifests(&lab);
    // The second adopts what the first left, and where the two differ, changes one mechanism for the other.
    for asked in ["auto", "clsact"] {
        println!("round: --attach {asked}");
        round(&lab, asked, report).with_context(|| format!("--attach {asked}"))?;
    }
    clean_up(&lab, report)
}

/// `fairlead cleanup`, and whether the data plane is gone.
fn clean_up(lab: &Lab, report: &mut Report) -> Result<()> {
    let agent = Agent::new(lab, lab.node(1), lab.manifests().path(), &[])?;
    let output = agent.cli(&["cleanup"]);
    ensure!(output.status.success(), "fairlead cleanup: {}", String::from_utf8_lossy(&output.stderr));
    let pins = fs::read_dir(agent.bpffs())?.count();
    ensure!(pins == 0, "fairlead cleanup leaves {pins} pins");
    let [address, _] = cluster_ip(WEB);
    for (from, client) in [("a pod", lab.client(lab.pod(1, 2))), ("the node", lab.host_client(lab.node(1)))] {
        let answer = client.with_timeout(Duration::from_secs(1)).ask(Protocol::Tcp, address);
        ensure!(answer.is_err(), "after fairlead cleanup {from} still reaches the Service: {answer:?}");
    }
    report.cleaned = true;
    Ok(())
}

fn mount(kind: &str, place: &str) -> Result<()> {
    let text = |text: &str| std::ffi::CString::new(text).context("a name with a NUL");
    let (kind_text, place_text) = (text(kind)?, text(place)?);
    // SAFETY: three strings that live through the call, and no data.
    let result =
        unsafe { libc::mount(kind_text.as_ptr(), place_text.as_ptr(), kind_text.as_ptr(), 0, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()).with_context(|| format!("mounting {kind}")) }
}

fn load_modules() -> Result<()> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(MODULES).context("reading the folder of modules")? {
        paths.push(entry?.path());
    }
    paths.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    for path in paths {
        let file = File::open(&path)?;
        // SAFETY: a descriptor that is open, an empty string of parameters, no flags.
        let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if result != 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("loading {}", path.display()));
        }
    }
    Ok(())
}

fn write_manifests(lab: &Lab) {
    let manifests = lab.manifests();
    manifests.write_list("nodes.json", lab.nodes.iter().map(node_object));
    let web = Service::new("web").selector("app", "web").dual_stack(WEB);
    let web = web.node_port("tcp", "TCP", 80, TARGET, NODE_PORT).node_port("udp", "UDP", 80, TARGET, NODE_PORT);
    manifests.write("web.json", web);
    let empty = Service::new("empty").selector("app", "none").dual_stack(EMPTY);
    manifests.write("empty.json", empty.port("tcp", "TCP", 80, TARGET).port("udp", "UDP", 80, TARGET));
    for pod in [lab.pod(1, 1), lab.pod(2, 1)] {
        manifests.write(&format!("{}.json", pod.name), PodObject::of(pod).label("app", "web"));
    }
}

/// One agent from its start to its end, and connections while it runs.
fn round(lab: &Lab, asked: &str, report: &mut Report) -> Result<()> {
    let node = lab.node(1);
    let flags = ["--attach", asked, "--flows", "8192", "--log-level", "info,fairlead=debug"];
    let mut agent = Agent::new(lab, node, lab.manifests().path(), &flags)?;
    agent.spawn()?;
    let ready = agent.wait_ready(Duration::from_secs(120));
    let log = agent.log_since_start();
    if report.programs.is_empty() {
        report.programs = log.lines().filter_map(loaded).collect();
    }
    ready?;
    let status = agent.cli_json(&["status"]);
    let programs = status["attached"].as_array().cloned().unwrap_or_default();
    let mut mechanisms: Vec<&str> = programs
        .iter()
        .filter(|program| !program["device"].is_null())
        .filter_map(|program| program["mechanism"].as_str())
        .collect();
    mechanisms.sort_unstable();
    mechanisms.dedup();
    let connections = connections(lab);
    report.rounds.push(Round {
        asked: asked.to_owned(),
        mechanism: mechanisms.join("+"),
        attached: programs.len(),
        connections,
    });
    agent.kill();
    Ok(())
}

/// A log line that says that a program was loaded.
fn loaded(line: &str) -> Option<Program> {
    let json: Value = serde_json::from_str(line).ok()?;
    let fields = &json["fields"];
    (fields["message"] == "program loaded").then_some(())?;
    let form = if fields["ethernet"] == false { " (no Ethernet)" } else { "" };
    Some(Program {
        name: format!("{}{form}", fields["program"].as_str()?),
        verified: fields["verified"].as_u64()?,
        milliseconds: fields["milliseconds"].as_u64()?,
    })
}

/// Everything that is tried, over both families: from a pod, from the node's sockets, from outside.
fn connections(lab: &Lab) -> Vec<Tried> {
    use Protocol::{Tcp, Udp, UdpUnconnected};
    let pod = lab.client(lab.pod(1, 2)).with_timeout(PATIENCE);
    let node = lab.host_client(lab.node(1)).with_timeout(PATIENCE);
    let outside = lab.outside_client().with_timeout(PATIENCE);
    let mut tried = Vec::new();
    let mut try_both = |what: String, to: [SocketAddr; 2], ask: &dyn Fn(SocketAddr) -> Option<String>| {
        tried.push(Tried { what, wrong: to.map(ask) });
    };
    for (from, client) in [("a pod", &pod), ("the node", &node)] {
        for protocol in [Tcp, Udp, UdpUnconnected] {
            let what = format!("{} from {from} to a ClusterIP", spoken(protocol));
            try_both(what, cluster_ip(WEB), &|to| both_answer(client, protocol, to));
        }
        for protocol in [Tcp, Udp] {
            let what = format!("{} from {from}, refused without endpoints", spoken(protocol));
            try_both(what, cluster_ip(EMPTY), &|to| refused(&client.ask(protocol, to)));
        }
    }
    let nodes = [SocketAddr::from((topology::node_v4(1), NODE_PORT)), (topology::node_v6(1), NODE_PORT).into()];
    for protocol in [Tcp, Udp] {
        let what = format!("{} from outside to a NodePort", spoken(protocol));
        try_both(what, nodes, &|to| both_answer(&outside, protocol, to));
    }
    try_both("256 KiB each way, pod to ClusterIP".to_owned(), cluster_ip(WEB), &|to| {
        pod.stream(to, 256 << 10).err().map(|error| error.to_string())
    });
    tried
}

fn cluster_ip(number: u16) -> [SocketAddr; 2] {
    let [high, low] = number.to_be_bytes();
    [([10, 96, high, low], 80).into(), ([0xfd00, 0x10, 0x96, 0, 0, 0, 0, number], 80).into()]
}

fn spoken(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "connected UDP",
        Protocol::UdpUnconnected => "UDP",
    }
}

/// Asks until the endpoint of this node and the one of the other have answered; says what is wrong.
fn both_answer(client: &Client, protocol: Protocol, to: SocketAddr) -> Option<String> {
    let mut seen = BTreeSet::new();
    for _ in 0..64 {
        match client.ask(protocol, to) {
            Ok(Answer { by, .. }) => seen.insert(by),
            Err(error) => return Some(error.to_string()),
        };
        if seen.len() == 2 {
            return None;
        }
    }
    Some(format!("of two endpoints only {seen:?} answered 64 times"))
}

fn refused(answer: &io::Result<Answer>) -> Option<String> {
    match answer {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => None,
        Err(error) => Some(format!("not refused: {error}")),
        Ok(answer) => Some(format!("not refused: {answer:?}")),
    }
}
