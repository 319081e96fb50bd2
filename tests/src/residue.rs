//! What killed runs left behind. In: the machine. Out: a list of leftovers of labs that have no owner any more, and their removal.
//! Never here: anything of a lab whose owner lives, and anything whose name isn't ours.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use crate::cgroup;
use crate::command;
use crate::folder;
use crate::kubelet;
use crate::lab::NETNS_PREFIX;
use crate::netns::{self, Netns};

/// One leftover.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leftover {
    /// A process in a leftover namespace or cgroup.
    Process(i32),
    /// A bpffs or cgroup mount.
    Mount(PathBuf),
    /// A network namespace.
    Netns(String),
    /// A cgroup.
    Cgroup(PathBuf),
    /// A lab's temporary folder.
    Folder(PathBuf),
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Mount(path) => write!(f, "mount {}", path.display()),
            Self::Netns(name) => write!(f, "network namespace {name}"),
            Self::Cgroup(path) => write!(f, "cgroup {}", path.display()),
            Self::Folder(path) => write!(f, "folder {}", path.display()),
        }
    }
}

/// Everything that is left of labs without an owner, in the order in which it has to go.
pub fn find() -> Result<Vec<Leftover>> {
    let mut found = BTreeSet::new();
    for name in netns_of_labs() {
        if !folder::in_use(&lab_id(&name)) {
            found.extend(Netns::named(&name).processes()?.into_iter().map(Leftover::Process));
            found.insert(Leftover::Netns(name));
        }
    }
    for path in cgroups_of_labs() {
        if path.file_name().is_some_and(is_cgroup_in_use) {
            continue;
        }
        found.extend(processes_in_cgroup(&path).into_iter().map(Leftover::Process));
        found.insert(Leftover::Cgroup(path));
    }
    for (id, path) in kubelet::leftovers() {
        if !folder::in_use(&id) {
            found.insert(Leftover::Cgroup(path));
        }
    }
    let idle: Vec<PathBuf> = folder::all().iter().filter(|id| !folder::in_use(id)).map(|id| folder::of(id)).collect();
    found.extend(mounts_below(&idle)?.into_iter().map(Leftover::Mount));
    found.extend(idle.into_iter().map(Leftover::Folder));
    found.remove(&Leftover::Process(process::id().cast_signed()));
    Ok(found.into_iter().collect())
}

/// Removes what [`find`] finds and returns it; an error names what could not be removed.
pub fn clean() -> Result<Vec<Leftover>> {
    let leftovers = find()?;
    for leftover in &leftovers {
        remove(leftover).with_context(|| format!("removing {leftover}"))?;
    }
    let still = find()?;
    if let Some(first) = still.first() {
        bail!("{first} is still there after its removal");
    }
    Ok(leftovers)
}

/// Ends every process of others in a namespace and waits for it.
pub fn kill_processes_in(netns: &Netns) -> Result<()> {
    for pid in netns.processes()? {
        if pid != process::id().cast_signed() {
            kill(pid).with_context(|| format!("ending process {pid} in {}", netns.name()))?;
        }
    }
    Ok(())
}

fn remove(leftover: &Leftover) -> Result<()> {
    match leftover {
        Leftover::Process(pid) => kill(*pid)?,
        Leftover::Mount(path) => unmount(path, UnmountFlags::DETACH)?,
        Leftover::Netns(name) => {
            command::run("ip", &["netns", "delete", name])?;
        }
        Leftover::Cgroup(path) => kubelet::remove_cgroups(path)?,
        Leftover::Folder(path) => match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        },
    }
    Ok(())
}

fn kill(pid: i32) -> Result<()> {
    let Some(target) = Pid::from_raw(pid) else { return Ok(()) };
    match kill_process(target, Signal::KILL) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        other => other?,
    }
    // A child of ours stays a zombie until its handle is dropped; that is gone enough.
    for _ in 0..200 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        match stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with('Z')) {
            None | Some(true) => return Ok(()),
            Some(false) => thread::sleep(Duration::from_millis(10)),
        }
    }
    bail!("process {pid} does not end")
}

/// `<pid>-<n>` of `fl-<pid>-<n>-<what>`.
fn lab_id(netns: &str) -> String {
    let mut parts = netns.split('-').skip(1);
    format!("{}-{}", parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

fn netns_of_labs() -> Vec<String> {
    let Ok(entries) = fs::read_dir(netns::FOLDER) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            let id = name.strip_prefix(NETNS_PREFIX).unwrap_or_default();
            id.split('-').count() >= 3
                && id.split('-').take(2).all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
        })
        .collect();
    names.sort();
    names
}

fn cgroups_of_labs() -> Vec<PathBuf> {
    let Some(entries) = cgroup::mount_point().and_then(|root| fs::read_dir(root).ok()) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| pid_in(&entry.file_name()).is_some() || folder::id_in(&entry.file_name()).is_some())
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths
}

/// A process has one for its clients on nodes; a lab may have one of its own.
fn is_cgroup_in_use(name: &OsStr) -> bool {
    pid_in(name).is_some_and(cgroup::in_use) || folder::id_in(name).is_some_and(|id| folder::in_use(&id))
}

fn pid_in(name: &OsStr) -> Option<u32> {
    name.to_str()?.strip_prefix(folder::PREFIX)?.parse().ok()
}

fn processes_in_cgroup(path: &Path) -> Vec<i32> {
    let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn mounts_below(folders: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4).map(PathBuf::from));
    Ok(points.filter(|point| folders.iter().any(|folder| point.starts_with(folder))).collect())
}
