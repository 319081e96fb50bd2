//! A folder of manifests, watched.
//!
//! In: a folder. Out: an [`Update`] with everything, then one for each change. A file is read when a writer has closed it, when
//! it was put there by rename or link, and never while it is open for writing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use notify::{
    Event, EventKind,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};

use super::{
    Problem, Update,
    folder::{Folder, Listing, is_hidden, is_manifest},
    store::Store,
};

/// Editors and renames take a name away and give it back at once: so long is waited before an object counts as gone.
const RETURN: Duration = Duration::from_millis(2);

/// The manifests of a folder.
pub struct Manifests {
    folder: Folder,
    store: Store,
    events: mpsc::UnboundedReceiver<Signal>,
    /// Received, and not acted upon yet.
    pending: Vec<Signal>,
    unreadable: BTreeMap<Arc<Path>, Problem>,
    told: Option<(Vec<Problem>, usize)>,
}

/// What inotify has to say, as far as it matters.
enum Signal {
    /// A file is complete, or gone.
    File(PathBuf),
    /// A name appeared, disappeared or stands for something else.
    Name(PathBuf),
    /// Signals were lost.
    Lost,
}

impl Manifests {
    /// Begins to watch a folder.
    ///
    /// # Errors
    ///
    /// When there is no such folder, or it can't be watched.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let root = existing(dir)?;
        let (sender, events) = mpsc::unbounded_channel();
        let watcher = notify::recommended_watcher(move |event| {
            for signal in signals(event) {
                // The receiver goes when the agent does.
                let _ = sender.send(signal);
            }
        })
        .context("inotify is not to be had; raise it with `sysctl fs.inotify.max_user_instances=1024`")?;
        let folder = Folder::new(root, Some(watcher));
        Ok(Self {
            folder,
            store: Store::default(),
            events,
            pending: Vec::new(),
            unreadable: BTreeMap::new(),
            told: None,
        })
    }

    /// Waits for a change. The first call gives everything at once. No change is lost if the wait is given up.
    pub async fn next(&mut self) -> Option<Update> {
        if self.told.is_none() {
            self.unreadable = first_scan(&mut self.folder, &mut self.store);
            let update = self.store.take(&self.unreadable);
            self.told = Some((update.problems.clone(), update.skipped));
            return Some(Update { first: true, ..update });
        }
        loop {
            if self.pending.is_empty() {
                let signal = self.events.recv().await?;
                self.pending.push(signal);
            }
            self.drain();
            let patience = Instant::now() + RETURN;
            while self.pending.iter().any(|signal| self.is_gone(signal)) {
                let Ok(signal) = timeout_at(patience, self.events.recv()).await else { break };
                self.pending.push(signal?);
                self.drain();
            }
            let signals = std::mem::take(&mut self.pending);
            self.take_in(signals);
            let update = self.store.take(&self.unreadable);
            let now = Some((update.problems.clone(), update.skipped));
            if !update.changes.is_empty() || now != self.told {
                self.told = now;
                return Some(update);
            }
        }
    }

    /// Whether a name behind which there were objects stands for nothing now. For others, such as the one that a file had before it
    /// was complete, nobody has to wait.
    fn is_gone(&self, signal: &Signal) -> bool {
        let Signal::Name(path) = signal else { return false };
        let mattered = self.store.knows(path)
            || self.folder.contains(path)
            || self.folder.leads_to_root(path)
            || self.folder.links_to(path).next().is_some()
            || path.file_name().is_some_and(|name| name == "..data");
        mattered && fs::symlink_metadata(path).is_err()
    }

    fn drain(&mut self) {
        while let Ok(signal) = self.events.try_recv() {
            self.pending.push(signal);
        }
    }

    fn take_in(&mut self, signals: Vec<Signal>) {
        let mut files = BTreeSet::new();
        let mut rescan = false;
        for signal in signals {
            if let Signal::File(path) | Signal::Name(path) = &signal {
                files.extend(self.folder.links_to(path).cloned());
            }
            match signal {
                Signal::Lost => rescan = true,
                Signal::File(path) => {
                    rescan |= self.unreadable.contains_key(&*path);
                    files.insert(path);
                }
                Signal::Name(path) => {
                    if self.folder.leads_to_root(&path) || self.folder.contains(&path) {
                        self.folder.forget(&path);
                        rescan = true;
                    } else if is_hidden(&path) {
                        // `..data`, through which the files of a mounted ConfigMap are seen.
                        rescan |= path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".."));
                    } else if path.is_dir() || path.is_symlink() {
                        // A link may lead to files that have to be watched where they are.
                        rescan = true;
                    } else {
                        files.insert(path);
                    }
                }
            }
        }
        let ours = |path: &&PathBuf| is_manifest(path) && path.parent().is_some_and(|it| self.folder.contains(it));
        self.store.read(&files.iter().filter(ours).map(PathBuf::as_path).collect::<Vec<_>>());
        if rescan {
            self.unreadable = scan(&mut self.folder, &mut self.store).unreadable;
        }
    }
}

/// The manifests of a folder that nobody watches: they are read when somebody asks.
pub struct Unwatched {
    folder: Folder,
    store: Store,
    first: bool,
}

impl Unwatched {
    /// The manifests of a folder. Nothing is read yet.
    ///
    /// # Errors
    ///
    /// When there is no such folder.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        Ok(Self { folder: Folder::new(existing(dir)?, None), store: Store::default(), first: true })
    }

    /// The changes since the last time; everything, the first time.
    pub fn read(&mut self) -> Update {
        let unreadable = first_scan(&mut self.folder, &mut self.store);
        Update { first: std::mem::take(&mut self.first), ..self.store.take(&unreadable) }
    }
}

/// Reads a folder once.
///
/// # Errors
///
/// When there is no such folder.
pub fn read_all(dir: &Path) -> anyhow::Result<Update> {
    Ok(Unwatched::open(dir)?.read())
}

fn existing(dir: &Path) -> anyhow::Result<PathBuf> {
    let root = std::path::absolute(dir).with_context(|| format!("{}: no path", dir.display()))?;
    fs::read_dir(&root).with_context(|| {
        format!("{}: the folder of manifests can't be read; create it, or name another", dir.display())
    })?;
    Ok(root)
}

/// Reads everything, and names what can't be read, including files that are open for writing: who holds one open for long should
/// hear of it once.
fn first_scan(folder: &mut Folder, store: &mut Store) -> BTreeMap<Arc<Path>, Problem> {
    let listing = scan(folder, store);
    let mut problems = listing.unreadable;
    for path in listing.files.into_keys().filter(|path| !store.knows(path) && path.exists()) {
        let message = "open for writing; it is read when the writer closes it".into();
        problems.insert(path.as_path().into(), Problem { file: path, message, ..Problem::default() });
    }
    problems
}

/// Walks through the folder and reads what is not as it was.
fn scan(folder: &mut Folder, store: &mut Store) -> Listing {
    let listing = folder.list();
    let known: Vec<_> = store.files_under(Path::new("/")).collect();
    for path in known {
        let listed = listing.files.contains_key(&*path);
        if !listed && !listing.unreadable.keys().any(|folder| path.starts_with(folder)) {
            store.remove(&path);
        }
    }
    let stale = listing.files.iter().filter(|(path, stamp)| stamp.is_none_or(|stamp| !store.is_current(path, stamp)));
    let stale: Vec<_> = stale.map(|(path, _)| path.as_path()).collect();
    store.read(&stale);
    listing
}

/// What matters of an event. That a file was opened, or written to, doesn't: it will be closed.
fn signals(event: notify::Result<Event>) -> Vec<Signal> {
    let Ok(event) = event else { return vec![Signal::Lost] };
    if event.need_rescan() {
        return vec![Signal::Lost];
    }
    let signal: fn(PathBuf) -> Signal = match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) | EventKind::Modify(ModifyKind::Metadata(_)) => {
            Signal::File
        }
        // Reported a second time as one name that went and another that came.
        EventKind::Modify(ModifyKind::Name(RenameMode::Both)) => return Vec::new(),
        EventKind::Create(_) | EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) => Signal::Name,
        EventKind::Any | EventKind::Access(_) | EventKind::Modify(_) | EventKind::Other => return Vec::new(),
    };
    event.paths.into_iter().map(signal).collect()
}
