//! One network namespace under `/run/netns`. In: a name. Out: threads, sockets and child processes inside it.
//! Never here: a change of the namespace of a thread that someone else goes on using.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::command;

/// Where iproute2 keeps its namespaces.
pub const FOLDER: &str = "/run/netns";

/// A handle to a namespace; it does not own it, [`crate::Lab`] does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Names a namespace that exists or will.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Its name, as `ip netns exec` takes it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that keeps it alive.
    pub fn path(&self) -> PathBuf {
        Path::new(FOLDER).join(&self.name)
    }

    /// Runs `work` in a thread of its own inside the namespace. A socket made there stays there, wherever it is used later.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                self.enter().unwrap_or_else(|error| panic!("entering namespace {}: {error}", self.name));
                work()
            });
            worker.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload))
        })
    }

    /// Starts a thread inside the namespace that outlives the call.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let netns = self.clone();
        thread::spawn(move || {
            netns.enter().unwrap_or_else(|error| panic!("entering namespace {}: {error}", netns.name));
            work()
        })
    }

    /// Lets `command` start its program inside the namespace.
    pub fn apply(&self, command: &mut Command) -> io::Result<()> {
        let file = File::open(self.path())?;
        // SAFETY: between fork and exec only setns(2) runs, on a descriptor that the closure owns; it allocates nothing.
        unsafe {
            command.pre_exec(move || {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(io::Error::from)
            });
        }
        Ok(())
    }

    /// Reads a setting below `/proc/sys`, such as `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = Path::new("/proc/sys").join(key);
        let text = self.run(|| fs::read_to_string(&path)).with_context(|| format!("reading {key} in {}", self.name))?;
        Ok(text.trim().to_owned())
    }

    /// Writes settings below `/proc/sys`, in order.
    pub fn set_sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (key, value) in settings {
                fs::write(Path::new("/proc/sys").join(key), value)
                    .with_context(|| format!("writing {key}={value} in {}", self.name))?;
            }
            Ok(())
        })
    }

    /// Runs `ip` lines in the namespace.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        command::ip_batch(Some(&self.name), lines)
    }

    /// Runs a program in the namespace and returns what it printed.
    pub fn exec(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut all = vec!["netns", "exec", self.name.as_str(), program];
        all.extend_from_slice(arguments);
        command::run("ip", &all)
    }

    /// The processes whose network namespace this is.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let text = command::run("ip", &["netns", "pids", &self.name])?;
        Ok(text.lines().filter_map(|line| line.trim().parse().ok()).collect())
    }

    fn enter(&self) -> io::Result<()> {
        let file = File::open(self.path())?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(io::Error::from)
    }
}
