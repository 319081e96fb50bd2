//! The folder of pins, and the mounts that it needs.
//!
//! In: `--bpffs` and `--cgroup`. Out: paths, a lock that one agent at a time holds, an open cgroup. Nothing is pinned here.
//!
//! ```text
//! <bpffs>/v<layout>/maps/<generation>/<MAP>   what the agent writes; a larger generation replaces the one before
//! <bpffs>/v<layout>/flows/<MAP>               flow state, kept for life
//! <bpffs>/v<layout>/links/<hook>-<ifindex>    links, and empty folders that stand for clsact filters and qdiscs
//! <bpffs>/v<layout>/reserved/<first>-<last>   empty folders that stand for ports that the agent has reserved
//! ```

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use lb_common::layout::LAYOUT_VERSION;
use rustix::{
    fs::{FlockOperation, flock, statfs},
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

/// `BPF_FS_MAGIC`.
const BPF_FS: i64 = 0xcafe_4a11;
/// Where bpffs is mounted by convention.
const SYSTEM_BPFFS: &str = "/sys/fs/bpf";
/// Where cgroup v2 is mounted if nobody has done so.
const PRIVATE_CGROUP: &str = "/run/fairlead/cgroup";
/// Inode of the root of cgroup v2: kernfs numbers from 1. In a cgroup namespace the root that is seen is another folder.
const ROOT_CGROUP_INODE: u64 = 1;
/// Name of the folder that says which ports were reserved.
pub const RESERVED: &str = "reserved";
/// Source of the mounts that the agent makes: how `cleanup` knows them.
const MOUNT_SOURCE: &str = "fairlead";

/// The folder of pins, locked.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    /// The lock is on the folder itself, so that agents in other containers meet it too.
    lock: File,
    is_private: bool,
}

impl Drop for Folder {
    /// A process that is just being made has the lock too, until it executes its program.
    fn drop(&mut self) {
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }
}

impl Folder {
    /// Makes the folder and its mount where they are missing, and locks it.
    pub fn open(root: &Path) -> Result<Self> {
        mount_bpffs(root)?;
        let lock = lock(root)?;
        let folder = Self { root: root.to_owned(), lock, is_private: is_private(root) };
        for dir in [folder.maps(), folder.flows(), folder.links()] {
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(folder)
    }

    fn version(&self) -> PathBuf {
        version_of(&self.root)
    }

    /// Whether the pins are in a bpffs that ends with this process's container, and the data plane with them.
    pub fn is_private(&self) -> bool {
        self.is_private
    }

    /// The path that was given.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where generations of control tables are.
    pub fn maps(&self) -> PathBuf {
        self.version().join("maps")
    }

    /// One generation of control tables.
    pub fn generation(&self, number: u64) -> PathBuf {
        self.maps().join(number.to_string())
    }

    /// A generation that is not complete. (bpffs has no names with dots.)
    pub fn unfinished(&self, number: u64) -> PathBuf {
        self.maps().join(format!("new-{number}"))
    }

    /// Where flow state is.
    pub fn flows(&self) -> PathBuf {
        self.version().join("flows")
    }

    /// Where links are.
    pub fn links(&self) -> PathBuf {
        self.version().join("links")
    }

    /// Where the ports are that were added to the host's reserved ones.
    pub fn reserved(&self) -> PathBuf {
        self.version().join(RESERVED)
    }

    /// Complete generations, the oldest first. More than one: an agent died while tables grew.
    pub fn generations(&self) -> Result<Vec<u64>> {
        generations_in(&self.root)
    }
}

fn version_of(root: &Path) -> PathBuf {
    root.join(format!("v{LAYOUT_VERSION}"))
}

/// The folder of the newest complete generation, and that of flow state, for those who only read.
pub fn current(root: &Path) -> Result<(PathBuf, PathBuf, PathBuf)> {
    let newest = generations_in(root)?.pop().with_context(|| {
        format!("no tables are pinned in {}: has an agent with this version run here (--bpffs)?", root.display())
    })?;
    let version = version_of(root);
    Ok((version.join("maps").join(newest.to_string()), version.join("flows"), version.join("links")))
}

fn generations_in(root: &Path) -> Result<Vec<u64>> {
    let mut numbers: Vec<u64> =
        names(&version_of(root).join("maps"))?.iter().filter_map(|name| name.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Names in a folder; none where it does not exist. Names with a dot are the kernel's own in bpffs, and left out.
pub fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", dir.display())),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", dir.display()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.contains('.') {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.f_type == BPF_FS)
}

fn mount_bpffs(root: &Path) -> Result<()> {
    let system = Path::new(SYSTEM_BPFFS);
    let at = if root.starts_with(system) { system } else { root };
    if !root.ancestors().any(is_bpffs) {
        if at == root {
            fs::create_dir_all(root).with_context(|| format!("cannot make {} (--bpffs)", root.display()))?;
        }
        mount(MOUNT_SOURCE, at, "bpf", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, Some(c"mode=0700"))
            .with_context(|| {
                format!("cannot mount bpffs at {}: mount it before, or run with CAP_SYS_ADMIN", at.display())
            })?;
    }
    fs::create_dir_all(root).with_context(|| format!("cannot make {} (--bpffs)", root.display()))
}

/// Whether an agent has mounted the bpffs that has this folder, in a mount namespace that is not the machine's: of a container that
/// is not shown the host's.
fn is_private(root: &Path) -> bool {
    let text = |process: &str| fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
    let (own, first) = (text("self"), text("1"));
    let is_ours =
        |mount: &Mount<'_>| mount.source == MOUNT_SOURCE && mount.kind == "bpf" && root.starts_with(&mount.point);
    // The first process of a container's PID namespace, where it has one, is its own.
    let lasts = |mount: &Mount<'_>| std::process::id() != 1 && mounts(&first).any(|other| other.id == mount.id);
    mounts(&own).find(is_ours).is_some_and(|mount| !first.is_empty() && !lasts(&mount))
}

fn lock(root: &Path) -> Result<File> {
    let dir = File::open(root).with_context(|| format!("cannot open {} (--bpffs)", root.display()))?;
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(dir),
        Err(error) if error == rustix::io::Errno::WOULDBLOCK => {
            let folder = dir.metadata().with_context(|| format!("cannot stat {}", root.display()))?;
            let (major, minor) = (rustix::fs::major(folder.dev()), rustix::fs::minor(folder.dev()));
            let file = format!("{major:02x}:{minor:02x}:{}", folder.ino());
            let holder = fs::read_to_string("/proc/locks").ok().and_then(|locks| holder(&locks, &file));
            bail!(
                "another agent has {} (--bpffs): {}; stop it first, or give this one a folder of its own",
                root.display(),
                holder.map_or_else(|| "a process that is not visible from here".to_owned(), describe),
            )
        }
        Err(error) => Err(error).with_context(|| format!("cannot lock {} (--bpffs)", root.display())),
    }
}

/// The process that holds a lock on a file, given as device and inode, from the text of `/proc/locks`.
fn holder(locks: &str, wanted: &str) -> Option<u32> {
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (kind, pid, file) = (fields.next()?, fields.nth(2)?, fields.next()?);
        let same = kind == "FLOCK" && file == wanted;
        same.then(|| pid.parse().ok()).flatten()
    })
}

fn describe(pid: u32) -> String {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ");
    format!("process {pid} ({command})")
}

/// A cgroup, held open.
#[derive(Debug)]
pub struct Cgroup {
    /// Where it is.
    pub path: PathBuf,
    /// Its descriptor.
    pub fd: OwnedFd,
    /// Whether it holds not all processes, and nobody asked for that: a cgroup namespace hides the others.
    pub is_partial: bool,
}

/// A mount, from `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct Mount<'a> {
    /// No two mounts have the same, whichever namespace they are in.
    id: &'a str,
    root: &'a str,
    point: String,
    kind: &'a str,
    source: &'a str,
}

fn mounts(text: &str) -> impl Iterator<Item = Mount<'_>> {
    text.lines().filter_map(|line| {
        let (place, what) = line.split_once(" - ")?;
        let mut place = place.split(' ');
        let mut what = what.split(' ');
        Some(Mount {
            id: place.next()?,
            root: place.nth(2)?,
            point: unescape(place.next()?),
            kind: what.next()?,
            source: what.next()?,
        })
    })
}

/// Blanks and backslashes stand as `\040` in mountinfo.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// The cgroup under which sockets are translated: the given one, else where cgroup v2 is mounted, else a mount of our own.
pub fn cgroup(given: Option<&Path>) -> Result<Cgroup> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => {
            let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
            let found = mounts(&text).filter(|m| m.kind == "cgroup2").min_by_key(|m| m.root != "/").map(|m| m.point);
            match found {
                Some(point) => point.into(),
                None => mount_cgroup()?,
            }
        }
    };
    let dir = File::open(&path).with_context(|| format!("cannot open the cgroup {} (--cgroup)", path.display()))?;
    let inode = dir.metadata().with_context(|| format!("cannot stat the cgroup {}", path.display()))?.ino();
    Ok(Cgroup { is_partial: given.is_none() && inode != ROOT_CGROUP_INODE, path, fd: dir.into() })
}

fn mount_cgroup() -> Result<PathBuf> {
    let path = PathBuf::from(PRIVATE_CGROUP);
    fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    mount(MOUNT_SOURCE, &path, "cgroup2", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)
        .with_context(|| format!("cannot mount cgroup v2 at {}: mount it and name it by --cgroup", path.display()))?;
    Ok(path)
}

/// Removes the folder, and the mounts if the agent made them and nothing else is in them.
pub fn remove(folder: Folder) -> Result<()> {
    let root = folder.root.clone();
    let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let ours: Vec<PathBuf> =
        mounts(&text).filter(|mount| mount.source == MOUNT_SOURCE).map(|mount| mount.point.into()).collect();
    let is_mount = mounts(&text).any(|mount| Path::new(&mount.point) == root);
    if !is_mount {
        fs::remove_dir(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    drop(folder);
    for point in ours {
        let of_the_folder = root.starts_with(&point) && names(&point)?.is_empty();
        if of_the_folder || point == Path::new(PRIVATE_CGROUP) {
            unmount(&point, UnmountFlags::empty()).with_context(|| format!("cannot unmount {}", point.display()))?;
            if point != Path::new(SYSTEM_BPFFS) {
                fs::remove_dir(&point).with_context(|| format!("cannot remove {}", point.display()))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_found_by_device_and_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 00:2a:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 4321 00:2a:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 9 00:2b:77 0 EOF\n";
        for (file, pid) in [("00:2a:77", Some(4321)), ("00:2b:77", Some(9)), ("00:2b:79", None)] {
            assert_eq!(holder(locks, file), pid);
        }
    }

    #[test]
    fn mounts_are_read_with_optional_fields_and_blanks() {
        let text = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n\
                    31 23 0:27 /x /a\\040b rw - bpf fairlead rw\n";
        let found: Vec<_> = mounts(text).collect();
        assert_eq!(
            found[0],
            Mount { id: "30", root: "/", point: "/sys/fs/cgroup".into(), kind: "cgroup2", source: "cgroup2" }
        );
        assert_eq!(found[1], Mount { id: "31", root: "/x", point: "/a b".into(), kind: "bpf", source: "fairlead" });
    }
}
