//! Whether this kernel can run the agent's programs.
//!
//! In: nothing. Out: what the kernel is, what it makes of each program. Nothing is pinned, attached or left.

use std::fs;

use anyhow::{Context as _, Result};

use super::{
    Options,
    links::Mechanism,
    object::{self, Constants, Trial},
};

/// How many connections the maps of a trial have room for.
const FLOWS: u32 = 1024;

/// What was found.
#[derive(Debug)]
pub struct Preflight {
    /// The kernel's release.
    pub release: String,
    /// How programs would be attached to devices.
    pub mechanism: Mechanism,
    /// What came of loading each program.
    pub trials: Vec<Trial>,
}

/// Loads every program, as an agent without options would.
///
/// # Errors
///
/// When there is nothing to be said about single programs: the kernel or the process lacks what all of them need.
pub fn preflight() -> Result<Preflight> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's release")?;
    let options = Options { flows: FLOWS, ..Options::default() };
    Ok(Preflight {
        release: release.trim().to_owned(),
        mechanism: Mechanism::available(),
        trials: object::try_all(&Constants::new(&options)?, &options)?,
    })
}
