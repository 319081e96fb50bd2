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
    seen: BTreeSet<Inode>,
}

impl Folder {
    pub(super) const fn new(root: PathBuf, watcher: Option<RecommendedWatcher>) -> Self {
        Self { root, watcher, watched: BTreeMap::new(), above: None }
    }

    /// Whether this is a folder in which manifests are looked for.
    pub(super) fn contains(&self, folder: &Path) -> bool {
        self.watched.contains_key(folder)
    }

    /// Whether the path is the root or leads to it.
    pub(super) fn leads_to_root(&self, path: &Path) -> bool {
        self.root.starts_with(path)
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
