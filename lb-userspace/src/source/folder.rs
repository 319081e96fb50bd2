//! The folder and its sub-folders: what is a manifest, and what is watched.
//!
//! In: the folder, and what inotify says about it. Out: the manifests that are there. A folder is watched before it is listed, so
//! that nothing falls between the two.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use super::{Problem, content::Stamp};

/// Whether a file of this name is read: JSON and YAML, but not what is hidden and not what editors leave while they work.
pub(super) fn is_manifest(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(OsStr::to_str) else { return false };
    let extension = Path::new(name).extension().and_then(OsStr::to_str);
    !is_hidden(path) && !name.starts_with('#') && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// Whether the name begins with a dot; mounted ConfigMaps keep their versions in such folders.
pub(super) fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// Identity of a folder.
type Inode = (u64, u64);

/// A folder of manifests.
pub(super) struct Folder {
    root: PathBuf,
    /// None where nobody wants to hear of changes.
    watcher: Option<RecommendedWatcher>,
    watched: BTreeMap<PathBuf, Inode>,
    /// Files elsewhere to which symbolic links of ours lead, and those links.
    targets: BTreeMap<PathBuf, BTreeSet<PathBuf>>,
    /// The folders of those files.
    elsewhere: BTreeMap<PathBuf, Inode>,
    /// The nearest folder above the root that exists: it tells when the root comes back.
    above: Option<PathBuf>,
}

/// What a walk through the folder met.
#[derive(Default)]
pub(super) struct Listing {
    /// Manifests; those without a stamp can't be looked at.
    pub files: BTreeMap<PathBuf, Option<Stamp>>,
    /// Folders that can't be listed.
    pub unreadable: BTreeMap<Arc<Path>, Problem>,
    folders: BTreeSet<PathBuf>,
    links: Vec<PathBuf>,
    seen: BTreeSet<Inode>,
}

impl Folder {
    pub(super) const fn new(root: PathBuf, watcher: Option<RecommendedWatcher>) -> Self {
        Self {
            root,
            watcher,
            watched: BTreeMap::new(),
            targets: BTreeMap::new(),
            elsewhere: BTreeMap::new(),
            above: None,
        }
    }

    /// Whether this is a folder in which manifests are looked for.
    pub(super) fn contains(&self, folder: &Path) -> bool {
        self.watched.contains_key(folder)
    }

    /// Whether the path is the root or leads to it.
    pub(super) fn leads_to_root(&self, path: &Path) -> bool {
        self.root.starts_with(path)
    }

    /// The links that lead to this file.
    pub(super) fn links_to(&self, path: &Path) -> impl Iterator<Item = &PathBuf> {
        self.targets.get(path).into_iter().flatten()
    }

    /// A folder of this name came, went or is another: what is known of it no longer holds.
    pub(super) fn forget(&mut self, path: &Path) {
        let stale: Vec<_> = self.watched.keys().filter(|folder| folder.starts_with(path)).cloned().collect();
        for folder in stale {
            self.unwatch(&folder);
        }
        if self.above.as_deref() == Some(path) {
            self.above = None;
        }
    }

    /// Walks through everything, and watches what it meets.
    pub(super) fn list(&mut self) -> Listing {
        let mut listing = Listing::default();
        self.watch_above();
        self.walk(self.root.clone(), &mut listing);
        let gone: Vec<_> = self.watched.keys().filter(|folder| !listing.folders.contains(*folder)).cloned().collect();
        for folder in gone {
            self.unwatch(&folder);
        }
        self.watch_targets(&listing.links);
        listing
    }

    fn walk(&mut self, folder: PathBuf, listing: &mut Listing) {
        let result = self.walk_one(&folder, listing);
        let Err(error) = result else { return };
        // A sub-folder that went while we came is no problem; the root that is missing is one.
        if folder != self.root && error.kind() == io::ErrorKind::NotFound {
            return;
        }
        let problem = Problem {
            file: folder.clone(),
            message: format!("the folder can't be read: {error}; what was in it stays in force until it can"),
            ..Problem::default()
        };
        listing.unreadable.insert(folder.into(), problem);
    }

    fn walk_one(&mut self, folder: &Path, listing: &mut Listing) -> io::Result<()> {
        let metadata = fs::metadata(folder)?;
        let inode = (metadata.dev(), metadata.ino());
        // Symbolic links may lead in circles, or twice to one place.
        if !listing.seen.insert(inode) {
            return Ok(());
        }
        listing.folders.insert(folder.to_owned());
        self.watch(folder, inode)?;
        let mut entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        entries.sort();
        for path in entries {
            if is_hidden(&path) {
                continue;
            }
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => self.walk(path, listing),
                Ok(metadata) if metadata.is_file() && is_manifest(&path) => {
                    if path.is_symlink() {
                        listing.links.push(path.clone());
                    }
                    listing.files.insert(path, Some(Stamp::of(&metadata)));
                }
                Err(_) if is_manifest(&path) => {
                    listing.files.insert(path, None);
                }
                Ok(_) | Err(_) => {}
            }
        }
        Ok(())
    }

    fn watch(&mut self, folder: &Path, inode: Inode) -> io::Result<()> {
        if self.watched.get(folder) == Some(&inode) {
            return Ok(());
        }
        self.unwatch(folder);
        if let Some(watcher) = &mut self.watcher {
            watcher.watch(folder, RecursiveMode::NonRecursive).map_err(watch_error)?;
        }
        self.watched.insert(folder.to_owned(), inode);
        Ok(())
    }

    fn unwatch(&mut self, folder: &Path) {
        if self.watched.remove(folder).is_some()
            && let Some(watcher) = &mut self.watcher
        {
            // A folder that is gone took its watch along.
            let _ = watcher.unwatch(folder);
        }
    }

    /// Watches the files to which symbolic links lead. A link whose target can't be watched is still read when the link changes.
    fn watch_targets(&mut self, links: &[PathBuf]) {
        self.targets.clear();
        let mut wanted = BTreeMap::new();
        for link in links {
            let Ok(target) = fs::canonicalize(link) else { continue };
            let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else { continue };
            let Ok(inode) = fs::metadata(parent).map(|metadata| (metadata.dev(), metadata.ino())) else { continue };
            // inotify has one watch an inode, and speaks of it by the name that it got first from us.
            let above = self.above.as_ref().filter(|above| same_folder(above, inode));
            let known = self.watched.iter().find(|(_, watched)| **watched == inode).map(|(folder, _)| folder).or(above);
            let folder = known.cloned().unwrap_or_else(|| {
                wanted.insert(parent.to_owned(), inode);
                parent.to_owned()
            });
            self.targets.entry(folder.join(name)).or_default().insert(link.clone());
        }
        let Some(watcher) = &mut self.watcher else { return };
        for (folder, inode) in std::mem::take(&mut self.elsewhere) {
            if wanted.get(&folder) == Some(&inode) {
                self.elsewhere.insert(folder, inode);
            } else if !self.watched.values().any(|watched| *watched == inode) {
                let _ = watcher.unwatch(&folder);
            }
        }
        for (folder, inode) in wanted {
            if !self.elsewhere.contains_key(&folder) && watcher.watch(&folder, RecursiveMode::NonRecursive).is_ok() {
                self.elsewhere.insert(folder, inode);
            }
        }
    }

    /// Watches the nearest folder above the root. Where there is none to be watched, only the root's own return is missed.
    fn watch_above(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        let above = self.root.ancestors().skip(1).find(|folder| folder.is_dir()).map(Path::to_owned);
        if above == self.above {
            return;
        }
        if let Some(old) = self.above.take() {
            let _ = watcher.unwatch(&old);
        }
        self.above = above.filter(|above| watcher.watch(above, RecursiveMode::NonRecursive).is_ok());
    }
}

fn same_folder(folder: &Path, inode: Inode) -> bool {
    fs::metadata(folder).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == inode)
}

fn watch_error(error: notify::Error) -> io::Error {
    match error.kind {
        notify::ErrorKind::Io(error) => error,
        notify::ErrorKind::PathNotFound => io::ErrorKind::NotFound.into(),
        notify::ErrorKind::MaxFilesWatch => {
            io::Error::other("no inotify watch is left (raise it with `sysctl fs.inotify.max_user_watches=524288`)")
        }
        notify::ErrorKind::Generic(_) | notify::ErrorKind::WatchNotFound | notify::ErrorKind::InvalidConfig(_) => {
            io::Error::other(error.to_string())
        }
    }
}
