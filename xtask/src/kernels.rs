//! `cargo xtask check --kernel VERSION`: the agent on kernels of Debian, each booted in a virtual machine. In: versions, the agent.
//! Out: a table of what that kernel's verifier said of each program and of the connections that got through.
//!
//! Everything stays below `target/kernels`; no kernel is installed, and no virtual machine outlives this process.

mod archive;
pub mod guest;
mod machine;
mod package;
mod report;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use self::archive::Archive;
use self::report::Report;
use crate::check::budget;
use crate::setup;
use crate::workspace;

/// The kernels that there is a package for, by what `--kernel` calls them.
pub const KNOWN: [&str; 2] = ["6.1", "6.12"];

/// Boots one kernel and prints its table; an error if something in it isn't as it should be. `write_budgets`: what its verifier has to do
/// becomes the budget of its series.
pub fn check(version: &str, write_budgets: bool) -> Result<String> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("kernels are booted on x86_64 machines only");
    }
    setup::ensure_virtual_machines()?;
    workspace::build_agent()?;
    let folder = workspace::target().join("kernels").join(version);
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let kernel = package::fetch(version, &folder)?;
    let archive = folder.join("initramfs.cpio");
    pack(&kernel, &archive)?;
    let outcome = machine::boot(version, &kernel.image, &archive, &folder);
    // Tens of megabytes that the next run makes anew in a second.
    fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
    let report: Report = outcome?;
    report.print();
    let verdict = report.verdict()?;
    if write_budgets {
        budget::keep(&report.kernel, report.counts())?;
        return Ok(verdict);
    }
    Ok(format!("{verdict}; {}", budget::judge(&report.kernel, &report.counts())?))
}

/// What the virtual machine finds when it starts: this program as its first process, the agent, `ip`, modules.
fn pack(kernel: &package::Kernel, to: &PathBuf) -> Result<()> {
    let mut archive = Archive::new();
    let own = std::env::current_exe().context("finding this program")?;
    let ip = workspace::find_program("ip").context("`ip` is in no folder of PATH; run `cargo xtask setup`")?;
    for (file, name) in [(own, "/init"), (workspace::agent(), guest::AGENT), (ip, "/bin/ip")] {
        archive.program(&file, name)?;
    }
    for (number, module) in kernel.modules.iter().enumerate() {
        archive.file(&format!("{}/{number:02}.ko", guest::MODULES), 0o644, &fs::read(module)?);
    }
    for folder in ["/proc", "/sys", "/dev", "/run", "/tmp"] {
        archive.folder(folder);
    }
    fs::write(to, archive.finish()).with_context(|| format!("writing {}", to.display()))
}
