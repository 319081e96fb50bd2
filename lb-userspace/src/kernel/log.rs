//! The lines that the programs log (`--program-log`). In: a loaded object. Out: records of the crate `log`, which `tracing` writes with
//! the agent's own. Never here: a program that wasn't built with the feature `program-log`.

use std::thread;

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya_log::EbpfLogger;
use rustix::event::{PollFd, PollFlags, poll};
use tracing::warn;

/// Writes what the object's programs log from now on. Its thread sleeps while they say nothing, and stays as long as the agent:
/// programs are replaced only when tables grow.
pub fn follow(mut object: Ebpf) -> Result<Ebpf> {
    let mut logger = EbpfLogger::init(&mut object).context("the programs have no log (AYA_LOGS)")?;
    thread::Builder::new().name("program-log".to_owned()).spawn(move || {
        loop {
            if let Err(error) = poll(&mut [PollFd::new(&logger, PollFlags::IN)], None)
                && error != rustix::io::Errno::INTR
            {
                warn!(%error, "the programs' log can't be read any more");
                return;
            }
            logger.flush();
        }
    })?;
    Ok(object)
}
