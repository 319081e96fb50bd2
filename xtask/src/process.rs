//! Long commands with a sign of life. In: a command, what it does. Out: success, or an error with the end of what it printed.

use std::fs::{self, File};
use std::io::{IsTerminal, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::interrupt;

/// How many lines of a failed command's output are shown.
const SHOWN: usize = 40;

/// Runs a command to its end. Its output goes to a file; after two seconds the time it takes is shown.
pub fn run(what: &str, command: &mut Command) -> Result<()> {
    let log = std::env::temp_dir().join(format!("fairlead-xtask-{}.log", std::process::id()));
    let file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let result = run_logged(what, command, file, || last_line(&log));
    let text = fs::read_to_string(&log).unwrap_or_default();
    // Its content is in `text`; a file that can't be removed does no harm.
    let _ = fs::remove_file(&log);
    let status = result?;
    interrupt::check()?;
    if !status.success() {
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
        bail!("{what} failed ({status}); it said:\n{tail}\nthe command was: {command:?}");
    }
    Ok(())
}

fn run_logged(
    what: &str,
    command: &mut Command,
    log: File,
    last: impl Fn() -> String,
) -> Result<std::process::ExitStatus> {
    let terminal = std::io::stderr().is_terminal();
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("running {command:?}"))?;
    let mut shown = Duration::ZERO;
    let mut pause = Duration::from_millis(5);
    let mut err = std::io::stderr();
    loop {
        if let Some(status) = child.try_wait()? {
            let seconds = start.elapsed().as_secs_f32();
            if shown > Duration::ZERO {
                let clear = if terminal { "\r\x1b[K" } else { "" };
                writeln!(
                    err,
                    "{clear}{what}: {} after {seconds:.0} s",
                    if status.success() { "done" } else { "failed" }
                )?;
            }
            return Ok(status);
        }
        let elapsed = start.elapsed();
        let every = if terminal { Duration::from_millis(250) } else { Duration::from_secs(15) };
        if elapsed > Duration::from_secs(2) && (shown == Duration::ZERO || elapsed > shown + every) {
            shown = elapsed;
            if terminal {
                write!(err, "\r\x1b[K{what}: {} s  {}", elapsed.as_secs(), last())?;
                err.flush()?;
            } else {
                writeln!(err, "{what}: {} s …", elapsed.as_secs())?;
            }
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// The newest line, short enough to stay on one line of a terminal.
fn last_line(log: &std::path::Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(400)..]).into_owned();
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.trim().chars().filter(|c| !c.is_control()).take(60).collect()
}
