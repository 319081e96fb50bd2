//! The machine's settings that a kubelet changes and that no namespace keeps apart. In: the machine. Out: the same, put back on drop.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// What a kubelet writes when it starts (`setupKernelTunables` in its container manager), below `/proc/sys`.
const KEYS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// What they were. Taken before the first kubelet starts, dropped after the last has ended.
#[derive(Debug)]
pub struct Settings {
    values: Vec<(&'static str, String)>,
}

impl Settings {
    /// Notes them.
    pub fn note() -> Result<Self> {
        let read = |key| {
            Ok((key, fs::read_to_string(Path::new("/proc/sys").join(key)).with_context(|| format!("reading {key}"))?))
        };
        Ok(Self { values: KEYS.into_iter().map(read).collect::<Result<_>>()? })
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        for (key, value) in &self.values {
            if let Err(error) = fs::write(Path::new("/proc/sys").join(key), value) {
                eprintln!("lab: {key} stays as a kubelet set it: {error}");
            }
        }
    }
}
