//! Files, read whole or not at all.
//!
//! In: a path. Out: the bytes of a file that nobody is writing to, or why there are none.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    time::{Duration, SystemTime},
};

/// A timestamp of the file system may stand still this long while a file changes twice.
const COARSEST_CLOCK: Duration = Duration::from_millis(50);

/// `fcntl` command of Linux that chooses the signal of a lease; `libc` doesn't name it.
const F_SETSIG: libc::c_int = 10;

/// What tells two states of a file apart without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// What came of reading a file.
pub(super) enum Content {
    /// All of it; the stamp is missing where a further change might not show in it.
    Whole(Vec<u8>, Option<Stamp>),
    /// Someone is writing to it, and will have closed it when it is to be read.
    Busy,
    /// There is no such file.
    Gone,
    /// It can't be read.
    Failed(io::Error),
}

impl Content {
    pub(super) fn read(path: &Path) -> Self {
        match read(path) {
            Ok(content) => content,
            // A symbolic link that leads nowhere is there, and is a mistake.
            Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => Self::Gone,
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => Self::Gone,
            Err(error) => Self::Failed(error),
        }
    }
}

fn read(path: &Path) -> io::Result<Content> {
    if !fs::metadata(path)?.is_file() {
        return Ok(Content::Gone);
    }
    // Nothing that took the file's place meanwhile, such as a pipe, may hold us up.
    let mut file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if lease(&file) == Lease::Refused {
        return Ok(Content::Busy);
    }
    let before = file.metadata()?;
    let mut bytes = Vec::with_capacity(before.size() as usize + 1);
    file.read_to_end(&mut bytes)?;
    let after = file.metadata()?;
    if Stamp::of(&before) != Stamp::of(&after) {
        return Ok(Content::Busy);
    }
    let settled = after.modified().ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
    let stamp = settled.filter(|age| *age > COARSEST_CLOCK).map(|_| Stamp::of(&after));
    Ok(Content::Whole(bytes, stamp))
}

#[derive(PartialEq, Eq)]
enum Lease {
    Granted,
    Refused,
    /// The file system or the user has none: stamps before and after the reading have to do.
    Unknown,
}

/// Asks for a read lease: the kernel refuses it while anyone has the file open for writing, and holds a new writer back until
/// the file is closed here. That is the only way to tell a complete file (made by `link` or `rename`) from one in the making.
fn lease(file: &File) -> Lease {
    let fd = file.as_raw_fd();
    // A writer that comes meanwhile is announced by a signal. SIGIO, which it is by default, would end the process;
    // SIGURG is ignored unless someone asks for it.
    // SAFETY: the descriptor is open for the time of the call, and these commands take a number.
    if unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) } != 0 {
        return Lease::Unknown;
    }
    // SAFETY: as above.
    match unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) } {
        0 => Lease::Granted,
        _ if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => Lease::Refused,
        _ => Lease::Unknown,
    }
}
