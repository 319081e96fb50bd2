//! The folder of pins as the subcommands read it.

use std::{fmt, path::PathBuf};

use clap::{Args, ValueEnum};

use crate::kernel::pinned::Pinned;

/// Which folder of pins is meant.
#[derive(Args, Clone, Debug)]
pub struct Folder {
    /// The folder with the pinned maps and links
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/fairlead", env = "FAIRLEAD_BPFFS")]
    pub bpffs: PathBuf,
}

/// How a list is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs: a JSON array or object.
    Json,
}

/// Which rows of a list are wanted.
#[derive(Args, Clone, Debug, Default)]
pub struct Selection {
    /// Only this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Only the Service of this name
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// How the list is written
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

impl Selection {
    /// Whether a Service is wanted.
    pub fn wants(&self, namespace: &str, name: &str) -> bool {
        self.namespace.as_deref().is_none_or(|wanted| wanted == namespace)
            && self.name.as_deref().is_none_or(|wanted| wanted == name)
    }
}

/// Nothing is pinned: exit code 3.
#[derive(Debug)]
pub struct NothingPinned(PathBuf);

impl fmt::Display for NothingPinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "nothing is pinned in {}; start an agent with `fairlead run --bpffs {0}`, or name its folder with --bpffs",
            self.0.display()
        )
    }
}

impl std::error::Error for NothingPinned {}

impl Folder {
    /// Opens what is pinned.
    pub fn open(&self) -> anyhow::Result<Pinned> {
        match Pinned::open(&self.bpffs) {
            Ok(pinned) => Ok(pinned),
            Err(_) if !self.has_pins() => Err(NothingPinned(self.bpffs.clone()).into()),
            Err(error) => Err(error),
        }
    }

    fn has_pins(&self) -> bool {
        // The kernel puts files of its own into every bpffs (`maps.debug`).
        let is_dir = |entry: std::io::Result<std::fs::DirEntry>| entry.is_ok_and(|entry| entry.path().is_dir());
        std::fs::read_dir(&self.bpffs).is_ok_and(|mut entries| entries.any(is_dir))
    }
}
