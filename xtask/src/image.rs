//! `cargo xtask image`: what a container's image is built from. In: the sources. Out: a folder with the static binary and the container
//! file, after the binary was tried where nothing else is. The image itself is built by whoever has a tool for it.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::process;
use crate::setup;
use crate::workspace;

/// glibc, linked in: its name service needs no other file for `/etc/hosts` and DNS (from glibc 2.34 on).
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// ELF's type of a program header that names a dynamic loader.
const INTERPRETER: usize = 3;
/// How long the agent may take to get ready where nothing is to do.
const PATIENCE: Duration = Duration::from_secs(30);

/// How to build it.
#[derive(Args)]
pub struct Options {}

/// The subcommand.
pub fn run(_: &Options) -> Result<ExitCode> {
    setup::ensure()?;
    let binary = build()?;
    let folder = workspace::target().join("image");
    fs::copy(workspace::root().join("deploy/Containerfile"), folder.join("Containerfile"))
        .context("copying deploy/Containerfile")?;
    if workspace::is_root() {
        try_alone(&folder)?;
        println!("The binary runs where there is no other file.");
    } else {
        println!("Not tried without other files: that takes root.");
    }
    let size = fs::metadata(&binary)?.len() >> 20;
    println!("{size} MiB, static. Build the image with a tool of yours:");
    println!("  podman build --tag REGISTRY/fairlead:{} {}", env!("CARGO_PKG_VERSION"), folder.display());
    Ok(ExitCode::SUCCESS)
}

/// The static binary, in a folder of its own: the release build, or the one that `FAIRLEAD_BIN` names.
pub fn build() -> Result<PathBuf> {
    let built = match std::env::var_os("FAIRLEAD_BIN") {
        Some(path) => path.into(),
        None => {
            let mut build = workspace::cargo(&["build", "--release", "--package", "lb-userspace", "--target", TARGET]);
            build.env("RUSTFLAGS", "-C target-feature=+crt-static");
            process::run("building the static agent (release)", &mut build)?;
            workspace::target().join(TARGET).join("release/fairlead")
        }
    };
    let bytes = fs::read(&built).with_context(|| format!("reading {}", built.display()))?;
    ensure!(!needs_a_loader(&bytes)?, "{} is not static: it names a dynamic loader", built.display());

    let folder = workspace::target().join("image");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let binary = folder.join("fairlead");
    fs::write(&binary, &bytes).with_context(|| format!("writing {}", binary.display()))?;
    if let Some(strip) = workspace::find_program("strip") {
        process::run("stripping it", Command::new(strip).arg(&binary))?;
    }
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755))?;
    Ok(binary)
}

/// Runs the binary in a folder that is the root to it: its version, and the agent until it is ready, in namespaces of its own with the
/// kernel's file systems and nothing else.
fn try_alone(folder: &Path) -> Result<()> {
    let root = folder.join("root");
    // What an attempt before left.
    let _ = fs::remove_dir_all(&root);
    for dir in ["manifests", "proc", "bpf"] {
        fs::create_dir_all(root.join(dir)).context("creating an empty root")?;
    }
    fs::copy(folder.join("fairlead"), root.join("fairlead")).context("copying the binary")?;
    let version = format!("fairlead {}\n", env!("CARGO_PKG_VERSION"));
    for way in ["version", "--version"] {
        let output = Command::new("chroot").arg(&root).args(["/fairlead", way]).output().context("running chroot")?;
        ensure!(output.status.success() && output.stdout == version.as_bytes(), "fairlead {way}: {output:?}");
    }

    let log = folder.join("run.log");
    let file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let script = "mount -t proc proc proc && mount -t bpf bpf bpf && ip link set lo up && exec chroot . /fairlead run \
        --manifests /manifests --hostname-override node --bpffs /bpf --socket-lb off --flows 1024";
    let mut child = Command::new("unshare")
        .args(["--net", "--mount", "--propagation", "private", "sh", "-c", script])
        .current_dir(&root)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .context("running unshare")?;
    let start = Instant::now();
    let is_ready = || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.lines().any(|line| line.split_whitespace().any(|word| word == "ready"))
    };
    while !is_ready() && child.try_wait()?.is_none() && start.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(20));
    }
    let ready = is_ready();
    // Its tables go with its bpffs, which nobody else sees.
    let _ = child.kill();
    child.wait()?;
    let said = fs::read_to_string(&log).unwrap_or_default();
    ensure!(ready, "fairlead run in an empty root: {said}");
    fs::remove_file(&log).context("removing a log")?;
    fs::remove_dir_all(&root).context("removing the empty root")
}

/// Whether a 64-bit ELF file has a program header that names a dynamic loader.
fn needs_a_loader(elf: &[u8]) -> Result<bool> {
    let number = |at: usize, length: usize| -> Result<usize> {
        let bytes = elf.get(at..at + length).context("the ELF file ends early")?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    };
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "no 64-bit little-endian ELF file");
    let (first, length, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for header in 0..count {
        if number(first + header * length, 4)? == INTERPRETER {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod unit {
    use super::needs_a_loader;

    #[test]
    fn a_dynamic_program_names_its_loader() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        assert!(needs_a_loader(&own).unwrap());
        assert!(needs_a_loader(&own[..40]).is_err());
        assert!(needs_a_loader(b"#!/bin/sh").is_err());
    }
}
