//! The cgroups of a node's Pods. In: a name. Out: a folder of that name in every hierarchy that a kubelet uses, removed with all below on
//! drop, from cgroup v2 too, where the runtime makes one by itself beside those of v1. Never here: processes; a kubelet and its runtime put
//! them there, and are gone before.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cgroup;

/// What the names of these folders start with.
const PREFIX: &str = "fairlead-kubelet-";

/// A node's cgroups.
#[derive(Debug)]
pub struct Cgroups {
    name: String,
}

impl Cgroups {
    /// Makes them. The name starts with that of the lab.
    pub fn create(name: &str) -> Result<Self> {
        let old = old_hierarchies();
        let cgroups = Self { name: format!("{PREFIX}{name}") };
        for hierarchy in &old {
            let folder = hierarchy.join(&cgroups.name);
            fs::create_dir(&folder).with_context(|| format!("creating {}", folder.display()))?;
            // A new cpuset is empty, and nothing could run in it.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(all) = fs::read_to_string(hierarchy.join(file)) {
                    fs::write(folder.join(file), all).with_context(|| format!("writing {file}"))?;
                }
            }
        }
        if old.is_empty() {
            let root = cgroup::mount_point().context("neither cgroup v1 nor v2 is mounted")?;
            for controller in fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default().split_whitespace()
            {
                // One that is refused is missed by the kubelet if it needs it.
                let _ = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
            }
            let folder = root.join(&cgroups.name);
            fs::create_dir(&folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        Ok(cgroups)
    }

    /// The name of the root, as a kubelet takes it.
    pub fn root(&self) -> String {
        format!("/{}", self.name)
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for hierarchy in old_hierarchies().into_iter().chain(cgroup::mount_point()) {
            if let Err(error) = remove(&hierarchy.join(&self.name)) {
                eprintln!("lab: leaving cgroups behind: {error:#}");
            }
        }
    }
}

/// Cgroups of kubelets, each with the id of its lab.
pub fn leftovers() -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    for hierarchy in old_hierarchies().into_iter().chain(cgroup::mount_point()) {
        for entry in fs::read_dir(&hierarchy).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            found.extend(lab_id(&name).map(|id| (id, entry.path())));
        }
    }
    found
}

/// `<pid>-<n>` of `fairlead-kubelet-<pid>-<n>-<node>`.
fn lab_id(name: &str) -> Option<String> {
    let mut parts = name.strip_prefix(PREFIX)?.split('-');
    let (pid, n, _node) = (parts.next()?, parts.next()?, parts.next()?);
    Some(format!("{pid}-{n}"))
}

/// Removes a cgroup and all below it.
pub fn remove(path: &Path) -> Result<()> {
    match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        Ok(entries) => {
            for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
                remove(&entry.path())?;
            }
        }
    }
    cgroup::remove(path)
}

/// Where the hierarchies of cgroup v1 are mounted; a machine of today has none.
fn old_hierarchies() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted = text.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next()? == "cgroup").then_some(())?;
        left.split(' ').nth(4).map(PathBuf::from)
    });
    mounted.collect()
}

#[cfg(test)]
mod unit {
    use super::lab_id;

    #[test]
    fn a_cgroup_tells_the_lab_of_its_kubelet() {
        assert_eq!(lab_id("fairlead-kubelet-12-3-node1"), Some("12-3".to_owned()));
        for other in ["fairlead-lab-12", "fairlead-kubelet-12-3", "kubelet-12-3-node1"] {
            assert_eq!(lab_id(other), None, "{other}");
        }
    }
}
