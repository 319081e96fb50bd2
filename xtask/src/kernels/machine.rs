//! A virtual machine from start to end. In: a kernel, its first file system. Out: what the guest reported. Never here: a machine that
//! outlives the call, a network, or hardware acceleration, which few build machines have.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::report::Report;
use crate::interrupt;

/// Without acceleration a boot takes half a minute and the rest as much again; on a busy machine several times that.
const LIMIT: Duration = Duration::from_secs(420);

/// How much of the console is shown when something went wrong.
const SHOWN: usize = 40;

/// Boots, waits for the end, reads the report.
pub fn boot(version: &str, image: &Path, archive: &Path, folder: &Path) -> Result<Report> {
    let (console, report) = (folder.join("console.log"), folder.join("report.json"));
    for file in [&console, &report] {
        fs::write(file, "").with_context(|| format!("creating {}", file.display()))?;
    }
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    command.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1G"]);
    command.arg("-kernel").arg(image).arg("-initrd").arg(archive);
    command.args(["-append", "console=ttyS0 loglevel=5 panic=-1 mitigations=off rdinit=/init -- guest"]);
    for file in [&console, &report] {
        command.arg("-serial").arg(format!("file:{}", file.display()));
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    // SAFETY: prctl(2) allocates nothing and touches no memory of ours.
    unsafe {
        command.pre_exec(|| {
            // However this process ends, the machine ends with it.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let start = Instant::now();
    let child = command.spawn().context("starting qemu-system-x86_64; `cargo xtask setup --kernels` installs it")?;
    let ended = wait(version, child, start);
    let text = fs::read_to_string(&report).unwrap_or_default();
    let found = text.lines().rev().find_map(|line| Report::parse(line.trim()));
    match (ended, found) {
        (Ok(()), Some(report)) => Ok(report),
        (Err(error), _) if interrupt::came() => Err(error),
        (ended, _) => {
            let why = ended.err().map_or("it ended without a report".to_owned(), |error| format!("{error:#}"));
            let text = String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).replace('\r', "");
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
            bail!("{why}; the end of its console ({}):\n{tail}", console.display())
        }
    }
}

fn wait(version: &str, mut child: Child, start: Instant) -> Result<()> {
    let mut shown = Duration::ZERO;
    let result = loop {
        match child.try_wait()? {
            Some(status) if status.success() => break Ok(()),
            Some(status) => break Err(anyhow::anyhow!("qemu ended with {status}: {}", complaint(&mut child))),
            None => {}
        }
        if start.elapsed() > LIMIT {
            break Err(anyhow::anyhow!("the virtual machine was stopped after {} s", LIMIT.as_secs()));
        }
        if let Err(error) = interrupt::check() {
            break Err(error);
        }
        if start.elapsed() > shown + Duration::from_secs(15) {
            shown = start.elapsed();
            eprintln!("Linux {version} in a virtual machine, without acceleration: {} s …", shown.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    };
    // Already ended is fine.
    let _ = child.kill();
    let _ = child.wait();
    result
}

fn complaint(child: &mut Child) -> String {
    use std::io::Read;
    let mut text = String::new();
    if let Some(stderr) = &mut child.stderr {
        // What can't be read is not said.
        let _ = stderr.read_to_string(&mut text);
    }
    text
}
