//! Which object stands in which file, and what it said when last seen.
//!
//! In: files that may have changed. Out: the difference, an object once. Of an object only a hash is kept. The first file by path
//! order that names an object has it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::Path,
    sync::{Arc, Mutex},
};

use super::{
    Problem, Update, ahead,
    content::{Content, Stamp},
    parse::{self, Parsed},
};
use crate::model::{Change, Interner, Kind, Object, ObjectName};

type Key = (Kind, ObjectName);

/// The files and their objects.
#[derive(Default)]
pub(super) struct Store {
    interner: Mutex<Interner>,
    files: BTreeMap<Arc<Path>, FileState>,
    /// Looked up for every object that is read, and never listed.
    owners: HashMap<Key, Owner>,
    /// Objects that several files name, and the files that come after the owner.
    rivals: BTreeMap<Key, BTreeSet<Arc<Path>>>,
    /// Files that have problems of their own.
    troubled: BTreeSet<Arc<Path>>,
    skipped: usize,
    /// Objects that are to be told.
    upserts: Vec<Change>,
    /// Hashes of objects that have just lost their last file, which is to be told unless another file turns out to have them.
    released: BTreeMap<Key, u64>,
    /// Files that inherited an object from another file.
    heirs: BTreeSet<Arc<Path>>,
}

#[derive(Default)]
struct FileState {
    stamp: Option<Stamp>,
    /// The objects that it names and the documents that do, sorted.
    objects: Vec<(Key, u32)>,
    problems: Vec<Problem>,
    skipped: usize,
}

struct Owner {
    file: Arc<Path>,
    /// Of what was told last.
    hash: u64,
}

/// What came of looking at a file.
enum Found {
    Whole(Parsed, Option<Stamp>),
    Busy,
    Gone,
    Failed(io::Error),
}

/// Reads one file; several threads do so at a time.
fn look(path: &Path, interner: &Mutex<Interner>) -> Found {
    match Content::read(path) {
        Content::Whole(bytes, stamp) => Found::Whole(parse::parse(path, &bytes, interner), stamp),
        Content::Busy => Found::Busy,
        Content::Gone => Found::Gone,
        Content::Failed(error) => Found::Failed(error),
    }
}

impl Store {
    /// Whether the file is known in this very state.
    pub(super) fn is_current(&self, path: &Path, stamp: Stamp) -> bool {
        self.files.get(path).is_some_and(|file| file.stamp == Some(stamp))
    }

    /// Whether the file has been read, or it is known why it can't be.
    pub(super) fn knows(&self, path: &Path) -> bool {
        self.files.contains_key(path)
    }

    /// Files of this folder and of those below it.
    pub(super) fn files_under(&self, folder: &Path) -> impl Iterator<Item = Arc<Path>> {
        let from = self.files.range::<Path, _>((std::ops::Bound::Included(folder), std::ops::Bound::Unbounded));
        from.map(|(path, _)| path.clone()).take_while(move |path| path.starts_with(folder))
    }

    /// Reads files that may have changed, in this order, and those that inherit from them.
    pub(super) fn read(&mut self, paths: &[&Path]) {
        let interner = std::mem::take(&mut self.interner);
        ahead::each(
            paths,
            |path| look(path, &interner),
            |path, found| {
                self.take_in(path, found);
                while let Some(heir) = self.heirs.pop_first() {
                    self.take_in(&heir, look(&heir, &interner));
                }
            },
        );
        self.interner = interner;
    }

    /// Forgets a file that is gone.
    pub(super) fn remove(&mut self, path: &Path) {
        self.forget(path);
        while let Some(heir) = self.heirs.pop_first() {
            self.read(&[&heir]);
        }
    }

    /// Hands over the changes since the last time, with the problems of now.
    pub(super) fn take(&mut self, folders: &BTreeMap<Arc<Path>, Problem>) -> Update {
        let mut changes = std::mem::take(&mut self.upserts);
        let gone = std::mem::take(&mut self.released).into_keys();
        changes.extend(gone.map(|(kind, name)| Change::Delete(kind, name)));
        let files = self.troubled.iter().filter_map(|path| self.files.get(path)).flat_map(|file| &file.problems);
        let mut problems: Vec<Problem> = files.chain(folders.values()).cloned().collect();
        for (key, rivals) in &self.rivals {
            let Some(Owner { file, .. }) = self.owners.get(key) else { continue };
            problems.extend(rivals.iter().map(|rival| Problem {
                file: rival.to_path_buf(),
                document: self.files.get(rival).and_then(|state| state.document(key)),
                object: Some(format!("{} {}", key.0, key.1)),
                field: None,
                message: format!("{} has the same object and counts; remove one of the two", file.display()),
            }));
        }
        problems.sort();
        Update { changes, problems, skipped: self.skipped, first: false }
    }

    fn take_in(&mut self, path: &Path, found: Found) {
        match found {
            Found::Gone => self.forget(path),
            // Its end will be announced.
            Found::Busy => {}
            Found::Failed(error) => {
                let problem = Problem {
                    file: path.to_owned(),
                    message: format!("can't be read: {error}; what it said before stays in force until it can"),
                    ..Problem::default()
                };
                let path = self.shared(path);
                let file = self.files.entry(path.clone()).or_default();
                file.stamp = None;
                file.problems = vec![problem];
                self.troubled.insert(path);
            }
            Found::Whole(parsed, stamp) => self.set(path, parsed, stamp),
        }
    }

    fn shared(&self, path: &Path) -> Arc<Path> {
        self.files.get_key_value(path).map_or_else(|| path.into(), |(path, _)| path.clone())
    }

    fn set(&mut self, path: &Path, parsed: Parsed, stamp: Option<Stamp>) {
        let path = self.shared(path);
        let old = self.files.remove(&path).unwrap_or_default();
        let mut problems = parsed.problems;
        let mut objects: BTreeMap<Key, u32> = BTreeMap::new();
        for (document, object) in parsed.objects {
            let key = (object.kind(), object.name());
            if let Some(earlier) = objects.get(&key) {
                problems.push(Problem {
                    file: path.to_path_buf(),
                    document: Some(document),
                    object: Some(format!("{} {}", key.0, key.1)),
                    field: None,
                    message: format!("document {earlier} has the same object and counts; remove one of the two"),
                });
                continue;
            }
            self.claim(&key, &path, object);
            objects.insert(key, document as u32);
        }
        for (document, kind, name) in parsed.kept {
            let key = (kind, name);
            if old.document(&key).is_some() {
                objects.entry(key).or_insert(document as u32);
            }
        }
        for (key, document) in old.objects {
            if parsed.unidentified {
                objects.entry(key).or_insert(document);
            } else if !objects.contains_key(&key) {
                self.release(&key, &path);
            }
        }
        self.skipped = self.skipped - old.skipped + parsed.skipped;
        if problems.is_empty() {
            self.troubled.remove(&path);
        } else {
            self.troubled.insert(path.clone());
        }
        let objects = objects.into_iter().collect();
        self.files.insert(path, FileState { stamp, objects, problems, skipped: parsed.skipped });
    }

    fn forget(&mut self, path: &Path) {
        let Some((path, file)) = self.files.remove_entry(path) else { return };
        self.skipped -= file.skipped;
        self.troubled.remove(&path);
        for (key, _) in &file.objects {
            self.release(key, &path);
        }
    }

    /// A file names an object.
    fn claim(&mut self, key: &Key, path: &Arc<Path>, object: Object) {
        let mut hasher = DefaultHasher::new();
        object.hash(&mut hasher);
        let hash = hasher.finish();
        let Some(owner) = self.owners.get_mut(key) else {
            self.owners.insert(key.clone(), Owner { file: path.clone(), hash });
            if self.released.remove(key) != Some(hash) {
                self.upserts.push(Change::Upsert(object));
            }
            return;
        };
        if *path > owner.file {
            self.rivals.entry(key.clone()).or_default().insert(path.clone());
            return;
        }
        if *path < owner.file {
            let rivals = self.rivals.entry(key.clone()).or_default();
            rivals.remove(path);
            rivals.insert(std::mem::replace(&mut owner.file, path.clone()));
        }
        if owner.hash != hash {
            owner.hash = hash;
            self.upserts.push(Change::Upsert(object));
        }
    }

    /// A file names an object no more.
    fn release(&mut self, key: &Key, path: &Arc<Path>) {
        let Some(owner) = self.owners.get_mut(key) else { return };
        let mut rivals = self.rivals.remove(key).unwrap_or_default();
        if owner.file != *path {
            rivals.remove(path);
        } else if let Some(heir) = rivals.pop_first() {
            // What the heir says is not kept. The object stays as it is until the heir has been read again.
            owner.file = heir.clone();
            self.heirs.insert(heir);
        } else {
            self.released.insert(key.clone(), owner.hash);
            self.owners.remove(key);
        }
        if !rivals.is_empty() {
            self.rivals.insert(key.clone(), rivals);
        }
    }
}

impl FileState {
    fn document(&self, key: &Key) -> Option<usize> {
        let at = self.objects.binary_search_by(|(candidate, _)| candidate.cmp(key)).ok()?;
        Some(self.objects[at].1 as usize)
    }
}
