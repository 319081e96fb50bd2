//! What the agent says of itself when it is asked.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{kernel::devices::findings::Bridge, source::Problem};

/// The agent's state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Whether the first list is effective, and nothing has failed since.
    pub ready: bool,
    /// The node's name.
    pub node: String,
    /// The agent's process.
    pub pid: u32,
    /// The agent's version.
    pub version: String,
    /// When it started, in seconds of Unix time.
    pub started: u64,
    /// How programs are attached to devices.
    pub attach: String,
    /// Objects by kind.
    pub objects: BTreeMap<String, usize>,
    /// Objects of kinds that nobody reads.
    pub skipped: usize,
    /// The last change that led to writes.
    pub last_change: Option<LastChange>,
    /// Everything that is wrong now.
    pub problems: Vec<String>,
    /// Names of devices by ifindex.
    pub devices: BTreeMap<u32, String>,
    /// How requests between ports of one bridge go.
    #[serde(default)]
    pub bridges: Vec<Bridge>,
    /// bpf(2) calls that changed or read tables.
    pub bpf_calls: u64,
    /// Entries set or removed.
    pub entries_written: u64,
    /// Bytes of their keys and values.
    #[serde(default)]
    pub bytes_written: u64,
    /// What the source can't use.
    #[serde(skip)]
    pub source_problems: Vec<Problem>,
}

/// A change that led to writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct LastChange {
    /// When, in seconds of Unix time.
    pub at: u64,
    /// Microseconds within that second.
    pub at_microseconds: u32,
    /// How many writes.
    pub writes: usize,
    /// From the change being taken in to the last write.
    pub microseconds: u64,
}

/// What only the agent knows of a Service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceReport {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its type, or `Headless`.
    pub kind: String,
    /// What an ExternalName Service stands for.
    pub external_name: Option<String>,
}
