//! What the cluster says, as a stream of [`Change`]s.
//!
//! In: a folder of manifests. Out: [`Update`]s: a complete first list, then differences. Never here: what the objects mean to
//! each other.

mod ahead;
mod check;
mod content;
mod folder;
pub mod manifests;
mod parse;
mod store;
#[cfg(test)]
mod tests;

use std::{fmt, path::PathBuf};

pub use self::manifests::{Manifests, read_all};
use crate::model::Change;

/// What a source has to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// Objects that are new, different or gone, in the order in which they are to be applied.
    pub changes: Vec<Change>,
    /// Everything that is wrong now, in the order of the files.
    pub problems: Vec<Problem>,
    /// Objects of kinds that nobody here reads.
    pub skipped: usize,
    /// Whether this is the complete list that a source begins with.
    pub first: bool,
}

/// Something that can't be used. What was said before it stays in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file or folder.
    pub file: PathBuf,
    /// The document within the file, counted from 1.
    pub document: Option<usize>,
    /// Kind and name of the object, as far as they can be told.
    pub object: Option<String>,
    /// The way to the field.
    pub field: Option<String>,
    /// What is wrong and what helps.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(document) = self.document {
            write!(f, ", document {document}")?;
        }
        if let Some(object) = &self.object {
            write!(f, ", {object}")?;
        }
        if let Some(field) = &self.field {
            write!(f, ", {field}")?;
        }
        write!(f, ": {}", self.message)
    }
}
