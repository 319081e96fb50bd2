//! What the cluster says, as a stream of [`Change`]s.
//!
//! In: an API server, or a folder of manifests. Out: [`Update`]s: a complete first list, from an API server in parts, then differences.
//! Never here: what the objects mean to each other.

mod ahead;
pub mod api;
mod check;
mod content;
mod folder;
pub mod manifests;
mod parse;
mod store;
#[cfg(test)]
mod tests;

use std::{fmt, path::PathBuf};

pub use self::{
    api::{ApiServer, Requests},
    manifests::{Manifests, read_all},
};
use crate::model::{Change, printable};

/// Where a source is.
#[derive(Clone, Debug)]
pub enum Place {
    /// A folder of manifests.
    Manifests(PathBuf),
    /// An API server.
    ApiServer(api::Options),
}

/// A source of either kind.
pub enum Source {
    /// A folder of manifests.
    Manifests(Box<Manifests>),
    /// An API server.
    ApiServer(Box<ApiServer>),
}

impl Source {
    /// Begins to watch; requests to an API server are counted.
    ///
    /// # Errors
    ///
    /// When the place is not to be found. An API server that doesn't answer is waited for.
    pub async fn open(place: &Place, requests: &Requests) -> anyhow::Result<Self> {
        Ok(match place {
            Place::Manifests(dir) => Self::Manifests(Box::new(Manifests::open(dir)?)),
            Place::ApiServer(options) => Self::ApiServer(Box::new(ApiServer::open(options, requests).await?)),
        })
    }

    /// Waits for a change; none means that there will be no more. No change is lost if the wait is given up.
    pub async fn next(&mut self) -> Option<Update> {
        match self {
            Self::Manifests(manifests) => manifests.next().await,
            Self::ApiServer(server) => server.next().await,
        }
    }
}

/// What a source has to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// Objects that are new, different or gone, in the order in which they are to be applied.
    pub changes: Vec<Change>,
    /// Everything that is wrong now, in a fixed order.
    pub problems: Vec<Problem>,
    /// Objects of kinds that nobody here reads.
    pub skipped: usize,
    /// Whether the list that a source begins with is complete with this. Updates before it are parts of that list.
    pub first: bool,
}

/// Something that can't be used. What was said before it stays in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file or folder; empty where objects come from an API server.
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
        let file = (!self.file.as_os_str().is_empty()).then(|| self.file.display().to_string());
        let document = self.document.map(|document| format!("document {document}"));
        let place = [file, document, self.object.clone(), self.field.clone()];
        let place: Vec<String> = place.into_iter().flatten().collect();
        let place = if place.is_empty() { String::new() } else { place.join(", ") + ": " };
        write!(f, "{}{}", printable(&place), printable(&self.message))
    }
}
