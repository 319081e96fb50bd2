//! A machine within the machine: a process namespace and a mount namespace beside a node's network namespace. In: the network namespace.
//! Out: commands that run inside. Whatever they start, mount or leave in `/run` is gone when the first process ends, which the kernel
//! sees to even if nobody else can: containers, their network namespaces, a kubelet's volumes.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::netns::Netns;

/// Where containerd listens, inside.
pub const SOCKET: &str = "/run/containerd/containerd.sock";

/// What programs write to at places that can't be changed: sockets and CNI's network namespaces, CNI's and a kubelet's notes, links to logs.
const PRIVATE: [&str; 3] = ["/run", "/var/lib", "/var/log"];

/// The namespaces, held by a process that waits.
#[derive(Debug)]
pub struct Machine {
    /// `unshare`, which ends with us, and takes its child along.
    holder: Child,
    /// The first process inside.
    init: u32,
}

impl Machine {
    /// Makes it.
    pub fn start(netns: &Netns) -> Result<Self> {
        let mut command = Command::new("unshare");
        netns.apply(&mut command)?;
        command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["sleep", "infinity"]).stdin(Stdio::null()).process_group(0);
        let holder = command.spawn().context("running unshare")?;
        let mut machine = Self { holder, init: 0 };
        machine.init = machine.first_process()?;
        for place in PRIVATE {
            let status = machine.command("mount").args(["-t", "tmpfs", "fairlead", place]).status();
            ensure!(status.context("running nsenter")?.success(), "{place} can't be made private");
        }
        // As a node has one, shared with its Pods; what they pin goes with the machine.
        let status = machine.command("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]).status();
        ensure!(status.context("running nsenter")?.success(), "no bpffs can be mounted at /sys/fs/bpf");
        Ok(machine)
    }

    /// A program to be run inside.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string(), "--mount", "--pid", "--net", "--"]).arg(program);
        command.process_group(0);
        command
    }

    /// Ends everything inside.
    pub fn end(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        // The first process dies by the holder's death, which it hears of a moment later.
        let path = format!("/proc/{}", self.init);
        let start = Instant::now();
        while fs::exists(&path).unwrap_or(false) && start.elapsed() < Duration::from_secs(20) {
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The holder's child, once that has its own root of processes and runs the program that waits.
    fn first_process(&self) -> Result<u32> {
        let holder = self.holder.id();
        let start = Instant::now();
        loop {
            let children = fs::read_to_string(format!("/proc/{holder}/task/{holder}/children")).unwrap_or_default();
            if let Some(pid) = children.split_whitespace().next().and_then(|word| word.parse::<u32>().ok())
                && fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep")
            {
                return Ok(pid);
            }
            ensure!(start.elapsed() < Duration::from_secs(10), "`unshare` starts no process in new namespaces");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}
