//! The temporary folder of one lab, locked while its owner lives, so that a later run can tell leftovers from labs in use.
//!
//! It is the first thing a lab makes and the last it removes: a namespace, cgroup or mount of ours without a locked folder is a leftover.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

/// What every name of ours on the file system starts with.
pub const PREFIX: &str = "fairlead-lab-";

static NEXT: AtomicU32 = AtomicU32::new(1);

/// The labs of this process, from before their folder is made until after it is gone.
static OWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// A lab's own folder, there until this is dropped; `id` is part of every name that the lab gives to something global: a namespace
/// (`fl-<id>-…`), a cgroup (the folder's own name), a mount within the folder.
#[derive(Debug)]
pub struct Folder {
    id: String,
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// Makes and locks a folder that no other lab has.
    pub fn create() -> Result<Self> {
        let id = format!("{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        own(|ids| ids.insert(id.clone()));
        Self::create_as(id.clone()).inspect_err(|_| {
            own(|ids| ids.remove(&id));
        })
    }

    fn create_as(id: String) -> Result<Self> {
        let path = of(&id);
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        // It gets its name when it is locked: nobody sees it unlocked while the owner lives.
        let unnamed = path.join(".lock");
        let lock = File::create(&unnamed).context("creating the lab's lock")?;
        lock.try_lock().context("locking the lab's folder")?;
        fs::rename(unnamed, path.join("lock")).context("naming the lab's lock")?;
        Ok(Self { id, path, _lock: lock })
    }

    /// `<pid>-<n>`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What can't be removed is found as a leftover.
        let _ = fs::remove_dir_all(&self.path);
        own(|ids| ids.remove(&self.id));
    }
}

/// The folder that a lab with this id has or had.
pub fn of(id: &str) -> PathBuf {
    std::env::temp_dir().join(format!("{PREFIX}{id}"))
}

/// Whether the lab with this id still has an owner; one without a lock is on its way in or out while its process lives.
pub fn in_use(id: &str) -> bool {
    let pid = id.split('-').next().unwrap_or_default();
    if pid == process::id().to_string() {
        return own(|ids| ids.contains(id));
    }
    match File::open(of(id).join("lock")) {
        Ok(file) => file.try_lock().is_err(),
        Err(_) => Path::new("/proc").join(pid).exists(),
    }
}

fn own<T>(work: impl FnOnce(&mut BTreeSet<String>) -> T) -> T {
    work(&mut OWN.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The ids of all lab folders, in use or not.
pub fn all() -> Vec<String> {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return Vec::new() };
    let mut ids: Vec<String> = entries.flatten().filter_map(|entry| id_in(&entry.file_name())).collect();
    ids.sort();
    ids
}

/// The id of the lab that has a folder or a cgroup of this name.
pub fn id_in(name: &OsStr) -> Option<String> {
    let name = OsString::from(name).into_string().ok()?;
    let id = name.strip_prefix(PREFIX)?;
    let (pid, n) = id.split_once('-')?;
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (number(pid) && number(n)).then(|| id.to_owned())
}
