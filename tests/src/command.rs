//! Runs the system's network commands. In: arguments. Out: what they printed, or an error that holds it. Never here: a shell.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `program` to its end and returns its standard output.
pub fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running `{program}`; `cargo xtask setup` installs what is missing"))?;
    checked(&format!("{program} {}", arguments.join(" ")), output)
}

/// Runs `program` with `input` on its standard input.
pub fn run_with_input(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let what = format!("{program} {}", arguments.join(" "));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running `{program}`; `cargo xtask setup` installs what is missing"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).with_context(|| format!("writing to `{what}`"))?;
    }
    let output = child.wait_with_output().with_context(|| format!("waiting for `{what}`"))?;
    checked(&what, output).with_context(|| format!("input was:\n{input}"))
}

/// Runs lines of `ip` commands as one batch, in a namespace or in the machine's own.
pub fn ip_batch(netns: Option<&str>, lines: &[String]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let input = lines.join("\n") + "\n";
    match netns {
        Some(name) => run_with_input("ip", &["-n", name, "-batch", "-"], &input)?,
        None => run_with_input("ip", &["-batch", "-"], &input)?,
    };
    Ok(())
}

fn checked(what: &str, output: Output) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    bail!("`{what}` failed ({}): {}{text}", output.status, String::from_utf8_lossy(&output.stderr))
}
