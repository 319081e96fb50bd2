//! Tests against the kernel, as root: each in a network namespace, a bpffs and a cgroup of its own.

mod adoption;
mod attaching;
mod content;
mod counters;
mod following;
mod kube_proxy;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use ::tests::{folder::Folder as Dir, lab::NETNS_PREFIX};
use rustix::{
    mount::{UnmountFlags, unmount},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::*;

/// What a test has for itself.
struct Lab {
    dir: Dir,
    cgroup: PathBuf,
    namespaces: Vec<String>,
}

impl Lab {
    fn bpffs(&self) -> PathBuf {
        self.dir.path().join("bpffs")
    }

    fn options(&self) -> Options {
        Options { bpffs: self.bpffs(), cgroup: Some(self.cgroup.clone()), flows: 4096, ..Options::default() }
    }

    fn open(&self) -> Kernel {
        Kernel::open(self.options()).unwrap()
    }

    fn links(&self) -> Vec<String> {
        folder::names(&self.bpffs().join("v1/links")).unwrap()
    }

    /// Another network namespace: the name that `ip netns` knows it by.
    fn namespace(&mut self) -> String {
        let name = format!("{NETNS_PREFIX}{}-{}", self.dir.id(), self.namespaces.len());
        self.namespaces.push(name.clone());
        run(&format!("ip netns add {name}"));
        name
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in &self.namespaces {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
        let _ = cleanup::cleanup(&self.bpffs());
        let _ = unmount(self.bpffs(), UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.cgroup);
    }
}

impl Kernel {
    fn take_programs(&mut self) -> Programs {
        self.tables_for(Capacity::default).unwrap();
        self.tables.take().unwrap().programs
    }
}

/// Runs a test in a network namespace of its own, on a thread of its own.
fn lab(test: impl FnOnce(&mut Lab) + Send + 'static) {
    let result = thread::spawn(move || {
        let dir = Dir::create().unwrap();
        let unified = folder::cgroup(None).unwrap().path;
        let cgroup = unified.join(dir.path().file_name().unwrap());
        fs::create_dir(&cgroup).unwrap();
        let mut lab = Lab { dir, cgroup, namespaces: Vec::new() };
        let own = lab.namespace();
        enter(&own);
        run("ip link set lo up");
        test(&mut lab);
    })
    .join();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// Moves the thread into a network namespace.
fn enter(namespace: &str) {
    let namespace = fs::File::open(Path::new("/run/netns").join(namespace)).unwrap();
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
}

/// Runs a command line in the thread's network namespace.
fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// The devices of the namespace at this moment.
fn ports() -> Vec<Port> {
    runtime().block_on(async { devices::watch::Watch::open().unwrap().snapshot().ports() })
}
