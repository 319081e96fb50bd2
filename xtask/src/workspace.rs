//! Where things are, and commands of cargo that start there.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::process;

/// The top folder of the repository.
pub fn root() -> PathBuf {
    // Where cargo runs this from counts first: a folder may have been moved since it was built.
    let own = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&own).parent().unwrap_or(Path::new(".")).to_owned()
}

/// The folder that cargo builds into.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root().join(folder),
        None => root().join("target"),
    }
}

/// The agent as the release profile builds it, or the one that `FAIRLEAD_BIN` names.
pub fn agent() -> PathBuf {
    match std::env::var_os("FAIRLEAD_BIN") {
        Some(path) => PathBuf::from(path),
        None => target().join("release").join("fairlead"),
    }
}

/// Builds it, unless one is named.
pub fn build_agent() -> Result<()> {
    if std::env::var_os("FAIRLEAD_BIN").is_some() {
        return Ok(());
    }
    process::run("building the agent (release)", &mut cargo(&["build", "--release", "--package", "lb-userspace"]))
}

/// Cargo in the top folder, with the tools that setup installs on its path.
pub fn cargo(arguments: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(arguments).current_dir(root());
    if let Some(path) = path_with_tools() {
        command.env("PATH", path);
    }
    // What cargo says about xtask itself is not true of what it starts.
    for (name, _) in std::env::vars_os() {
        let own =
            name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"));
        if own {
            command.env_remove(name);
        }
    }
    command
}

/// `PATH` and, at its end, the folder that `cargo install` writes to.
pub fn path_with_tools() -> Option<std::ffi::OsString> {
    let path = std::env::var_os("PATH")?;
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))?;
    std::env::join_paths(std::env::split_paths(&path).chain([home.join("bin")])).ok()
}

/// The first file of this name on the path.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = path_with_tools().unwrap_or_default();
    // Administrators' tools are often not on the path of others, yet can be run.
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Whether the process may do what namespaces and BPF need.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}
