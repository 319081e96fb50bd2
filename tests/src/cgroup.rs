//! The cgroup that host clients live in. In: nothing. Out: a cgroup v2 folder with this process inside, until the last lab of the process is gone.
//! Never here: programs; the agent attaches them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::folder;

static CURRENT: Mutex<Option<Place>> = Mutex::new(None);

/// A share in this process's cgroup; when the last one is dropped, the process goes back to where it was.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

#[derive(Debug)]
struct Place {
    shares: usize,
    path: PathBuf,
    before: PathBuf,
    private_mount: Option<PathBuf>,
}

impl Cgroup {
    /// Moves the process into a cgroup of its own, or shares the one that an earlier lab of the process made.
    pub fn enter() -> Result<Self> {
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = &mut *current {
            place.shares += 1;
            return Ok(Self { path: place.path.clone() });
        }
        let (root, private_mount) = match mount_point() {
            Some(root) => (root, None),
            None => {
                let place = std::env::temp_dir().join(format!("{}cgroup-{}", folder::PREFIX, process::id()));
                fs::create_dir_all(&place).with_context(|| format!("creating {}", place.display()))?;
                mount("cgroup2", &place, "cgroup2", MountFlags::empty(), None)
                    .with_context(|| format!("mounting cgroup v2 at {}", place.display()))?;
                (place.clone(), Some(place))
            }
        };
        let before = root.join(own_group()?.trim_start_matches('/'));
        let path = root.join(format!("{}{}", folder::PREFIX, process::id()));
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("creating cgroup {}", path.display()));
            }
            _ => {}
        }
        move_into(process::id(), &path)?;
        *current = Some(Place { shares: 1, path: path.clone(), before, private_mount });
        Ok(Self { path })
    }

    /// The folder to give to an agent as `--cgroup`.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Held to the end, so that a lab that starts now doesn't enter a group that is on its way out.
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = &mut *current else { return };
        place.shares -= 1;
        if place.shares > 0 {
            return;
        }
        if let Err(error) = move_all(&place.path, &place.before).and_then(|()| remove(&place.path)) {
            eprintln!("lab: leaving a cgroup behind: {error:#}");
        }
        if let Some(mounted) = &place.private_mount {
            // A failure shows up in the residue check.
            let _ = unmount(mounted, UnmountFlags::DETACH);
            let _ = fs::remove_dir(mounted);
        }
        *current = None;
    }
}

/// Whether the process that a lab's cgroup is named after still needs it.
pub fn in_use(owner: u32) -> bool {
    if owner == process::id() {
        return CURRENT.lock().unwrap_or_else(PoisonError::into_inner).is_some();
    }
    Path::new("/proc").join(owner.to_string()).exists()
}

/// Where cgroup v2 is mounted, if it is.
pub fn mount_point() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    text.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next()? == "cgroup2").then_some(())?;
        left.split(' ').nth(4).map(PathBuf::from)
    })
}

/// Removes an empty cgroup; the kernel may take a moment to let go of processes that just ended.
pub fn remove(path: &Path) -> Result<()> {
    let mut last = Ok(());
    for _ in 0..50 {
        last = fs::remove_dir(path);
        match &last {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => thread::sleep(Duration::from_millis(20)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            _ => break,
        }
    }
    last.with_context(|| format!("removing cgroup {}", path.display()))
}

/// Also moves what a person put there to explore a lab.
fn move_all(from: &Path, to: &Path) -> Result<()> {
    move_into(process::id(), to)?;
    let text = fs::read_to_string(from.join("cgroup.procs")).unwrap_or_default();
    for pid in text.lines().filter_map(|line| line.parse().ok()) {
        // One that has just ended can't be moved and needn't be.
        let _ = move_into(pid, to);
    }
    Ok(())
}

fn move_into(pid: u32, group: &Path) -> Result<()> {
    fs::write(group.join("cgroup.procs"), pid.to_string())
        .with_context(|| format!("moving process {pid} into cgroup {}", group.display()))
}

fn own_group() -> Result<String> {
    let text = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
    Ok(text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_owned())
}
