//! The agent under test, as a process. In: a node, flags. Out: a handle that kills, stops, restarts and questions it.
//! On drop it is killed; while a test panics, the end of its log is shown.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::control_plane::PORT;
use crate::lab::{Lab, Node};
use crate::netns::Netns;
use crate::topology::SWITCH_V4;

/// How much of a log is shown when a test fails.
const SHOWN_LOG: usize = 60;

/// One agent, running or not.
#[derive(Debug)]
pub struct Agent {
    binary: PathBuf,
    node: String,
    netns: Netns,
    bpffs: PathBuf,
    arguments: Vec<String>,
    account: Option<PathBuf>,
    log: PathBuf,
    log_start: u64,
    child: Option<Child>,
}

impl Agent {
    /// Starts an agent on the lab's manifests and waits until it is ready.
    pub fn start(lab: &Lab, node: &Node, flags: &[&str]) -> Self {
        let mut agent = Self::new(lab, node, lab.manifests().path(), flags)
            .unwrap_or_else(|error| panic!("preparing the agent of {}: {error:#}", node.name));
        agent.restart();
        agent
    }

    /// Starts an agent on an API server and waits until it is ready.
    pub fn start_on_api_server(lab: &Lab, node: &Node, kubeconfig: &Path, flags: &[&str]) -> Self {
        let mut agent = Self::prepare(lab, node, Some(("--kubeconfig", kubeconfig)), lab.cgroup(), flags)
            .unwrap_or_else(|error| panic!("preparing the agent of {}: {error:#}", node.name));
        agent.restart();
        agent
    }

    /// Starts an agent on an API server and waits for nothing.
    pub fn spawn_on_api_server(lab: &Lab, node: &Node, kubeconfig: &Path, flags: &[&str]) -> Result<Self> {
        let mut agent = Self::prepare(lab, node, Some(("--kubeconfig", kubeconfig)), lab.cgroup(), flags)?;
        agent.spawn()?;
        Ok(agent)
    }

    /// Starts an agent with a kube-proxy's configuration file, and waits for nothing.
    pub fn spawn_with_config(lab: &Lab, node: &Node, config: &Path) -> Result<Self> {
        let mut agent = Self::prepare(lab, node, Some(("--config", config)), lab.cgroup(), &[])?;
        agent.spawn()?;
        Ok(agent)
    }

    /// Starts an agent on an API server and waits until it is ready; also for processes in other cgroups than the lab's, as Pods' are.
    pub fn build(lab: &Lab, node: &Node, kubeconfig: &Path, flags: &[&str]) -> Result<Self> {
        let root = lab.cgroup().parent().context("a lab's cgroup is below the root")?;
        let mut agent = Self::prepare(lab, node, Some(("--kubeconfig", kubeconfig)), root, flags)?;
        agent.spawn()?;
        agent.wait_ready(Duration::from_secs(20))?;
        Ok(agent)
    }

    /// Starts an agent as a pod's process that finds the API server by its environment and the files of a service account, which are in
    /// the folder `account`, and waits until it is ready.
    pub fn start_in_pod(lab: &Lab, node: &Node, account: &Path, flags: &[&str]) -> Self {
        let mut agent = Self::prepare(lab, node, None, lab.cgroup(), flags)
            .unwrap_or_else(|error| panic!("preparing the agent of {}: {error:#}", node.name));
        agent.account = Some(account.to_owned());
        agent.restart();
        agent
    }

    /// Prepares an agent on a folder of manifests without starting it.
    pub fn new(lab: &Lab, node: &Node, manifests: &Path, flags: &[&str]) -> Result<Self> {
        Self::prepare(lab, node, Some(("--manifests", manifests)), lab.cgroup(), flags)
    }

    fn prepare(lab: &Lab, node: &Node, source: Option<(&str, &Path)>, cgroup: &Path, flags: &[&str]) -> Result<Self> {
        let binary = match &lab.topology().binary {
            Some(path) => path.clone(),
            None => find_binary()?,
        };
        let bpffs = lab.bpffs(node);
        let text = |path: &Path| path.display().to_string();
        let mut arguments = vec!["run".to_owned()];
        arguments.extend(source.into_iter().flat_map(|(flag, place)| [flag.to_owned(), text(place)]));
        arguments.extend(["--hostname-override".to_owned(), node.name.clone()]);
        arguments.extend(["--bpffs".to_owned(), text(&bpffs)]);
        arguments.extend(["--cgroup".to_owned(), text(cgroup)]);
        arguments.extend(["--log-format".to_owned(), "json".to_owned()]);
        arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let log = lab.folder().join("log").join(format!("{}.log", node.name));
        let node_name = node.name.clone();
        Ok(Self {
            binary,
            node: node_name,
            netns: node.netns.clone(),
            bpffs,
            arguments,
            account: None,
            log,
            log_start: 0,
            child: None,
        })
    }

    /// Starts the process again, after it was killed or stopped, and waits until it is ready.
    pub fn restart(&mut self) {
        self.spawn().and_then(|()| self.wait_ready(Duration::from_secs(20))).unwrap_or_else(|error| {
            panic!("the agent of {} does not come up: {error:#}", self.node);
        });
    }

    /// Starts the process without waiting for anything.
    pub fn spawn(&mut self) -> Result<()> {
        if self.child.is_some() {
            bail!("the agent of {} runs already", self.node);
        }
        let log = File::options().create(true).append(true).open(&self.log).context("opening the agent's log")?;
        self.log_start = log.metadata()?.len();
        let mut command = match &self.account {
            None => self.command(),
            Some(account) => self.command_of_pod(account)?,
        };
        // A group of its own, so that Ctrl-C at the terminal is for us to act on.
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        self.child = Some(command.spawn().with_context(|| format!("starting {}", self.binary.display()))?);
        Ok(())
    }

    /// Waits for the log line that says `ready`; an agent that ends before is an error with its last words.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        while !self.log_since_start().lines().any(says_ready) {
            if let Some(status) = self.child.as_mut().context("the agent is not running")?.try_wait()? {
                self.child = None;
                bail!("it ended with {status}; its log:\n{}", self.log_tail());
            }
            if start.elapsed() > limit {
                bail!("not ready after {limit:?}; its log:\n{}", self.log_tail());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// SIGKILL; the data plane stays.
    pub fn kill(&mut self) {
        self.end(Signal::KILL).unwrap_or_else(|error| panic!("killing the agent of {}: {error:#}", self.node));
    }

    /// SIGTERM, and its exit status.
    pub fn terminate(&mut self) -> ExitStatus {
        self.end(Signal::TERM).unwrap_or_else(|error| panic!("stopping the agent of {}: {error:#}", self.node))
    }

    /// Runs the command line with the agent's `--bpffs`, in the node's namespace, whether the agent runs or not.
    pub fn cli(&self, arguments: &[&str]) -> Output {
        let (subcommand, rest) = arguments.split_first().expect("a subcommand");
        self.command()
            .args([subcommand, "--bpffs"])
            .arg(&self.bpffs)
            .args(rest)
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("running {} {subcommand}: {error}", self.binary.display()))
    }

    /// The same, as JSON.
    pub fn cli_json(&self, arguments: &[&str]) -> Value {
        let output = self.cli(&[arguments, &["--output", "json"]].concat());
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "fairlead {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("fairlead {arguments:?}: {error} in {text}"))
    }

    /// Removes the data plane.
    pub fn cleanup(&self) {
        let output = self.cli(&["cleanup"]);
        assert!(output.status.success(), "fairlead cleanup: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The binary under test.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Where its pins are.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// What the process said since its last start.
    pub fn log_since_start(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let start = usize::try_from(self.log_start).unwrap_or(0).min(bytes.len());
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        self.netns
            .apply(&mut command)
            .unwrap_or_else(|error| panic!("opening namespace {}: {error}", self.netns.name()));
        command
    }

    /// The binary where a service account's files are where Pods have them, which only it sees.
    fn command_of_pod(&self, account: &Path) -> Result<Command> {
        let script = "mount -t tmpfs tmpfs /run && mkdir -p \"$SECRETS\" && mount --bind \"$ACCOUNT\" \"$SECRETS\" && exec \"$@\"";
        let mut command = Command::new("unshare");
        self.netns.apply(&mut command)?;
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(&self.binary);
        command.env("SECRETS", "/run/secrets/kubernetes.io/serviceaccount").env("ACCOUNT", account);
        command.env("KUBERNETES_SERVICE_HOST", SWITCH_V4.to_string());
        command.env("KUBERNETES_SERVICE_PORT", PORT.to_string());
        Ok(command)
    }

    fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        let mut child = self.child.take().context("it is not running")?;
        kill_process(Pid::from_child(&child), signal)?;
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > Duration::from_secs(10) {
                // Nothing may be left, whatever the test says.
                let _ = child.kill();
                let _ = child.wait();
                return Err(anyhow!("still there 10 s after {signal:?}"));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(SHOWN_LOG)..].join("\n")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if thread::panicking() {
            let _ = writeln!(std::io::stderr(), "--- log of the agent of {}:\n{}", self.node, self.log_tail());
        }
    }
}

/// A log line, JSON or text, whose message is `ready`.
fn says_ready(line: &str) -> bool {
    match serde_json::from_str::<Value>(line) {
        Ok(json) => [&json["fields"]["message"], &json["message"]].iter().any(|message| *message == "ready"),
        Err(_) => line.split_whitespace().any(|word| word == "ready"),
    }
}

/// `FAIRLEAD_BIN`, or `fairlead` in the target folder that this program was built into, same profile first.
pub fn find_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("FAIRLEAD_BIN") {
        return Ok(PathBuf::from(path));
    }
    let here = std::env::current_exe().context("finding this program")?;
    let profile = here
        .ancestors()
        .skip(1)
        .find(|folder| folder.file_name().is_some_and(|name| name == "debug" || name == "release"))
        .context("this program is in no target folder; set FAIRLEAD_BIN")?;
    let mut candidates = vec![profile.join("fairlead")];
    candidates.extend(profile.parent().map(|target| target.join("release").join("fairlead")));
    candidates
        .into_iter()
        .find(|path| path.exists())
        .context("no agent is built; run `cargo build --release -p lb-userspace` or set FAIRLEAD_BIN")
}

#[cfg(test)]
mod tests {
    use super::says_ready;

    #[test]
    fn a_log_line_says_ready_by_its_message_only() {
        let cases = [
            (r#"{"level":"INFO","fields":{"message":"ready"}}"#, true),
            (r#"{"level":"INFO","message":"ready"}"#, true),
            (r#"{"level":"INFO","fields":{"message":"not ready yet"}}"#, false),
            ("2026-01-01T00:00:00Z INFO fairlead: ready", true),
            ("2026-01-01T00:00:00Z INFO fairlead: starting", false),
        ];
        for (line, expected) in cases {
            assert_eq!(says_ready(line), expected, "{line}");
        }
    }
}
