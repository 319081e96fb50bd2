//! The image that Pods of Kubernetes' own tests run, made without a registry. In: agnhost, and programs that this machine has. Out: an
//! archive that containerd imports, with one layer.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::command;
use crate::control_plane::parts;

/// What the tests of this release call it.
pub fn name() -> Result<String> {
    let e2e = parts::ensure(&parts::E2E)?.display().to_string();
    Ok(command::run(&e2e, &["--list-images"])?.trim().to_owned())
}

/// What Pods are asked to run besides agnhost, where busybox has nothing of that name, knows fewer flags, or crashes (Debian's static
/// `wget`, once it looks for a host).
const PROGRAMS: [&str; 8] = ["bash", "curl", "wget", "nc.openbsd", "dig", "ip", "ss", "conntrack"];

/// Makes it in a folder.
pub fn build(folder: &Path) -> Result<PathBuf> {
    let root = folder.join("root");
    for name in ["bin", "sbin", "usr/bin", "usr/sbin", "etc", "tmp", "root", "var/run", "proc", "sys", "dev"] {
        let path = root.join(name);
        fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
    }
    for (file, text) in [
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
        ("etc/group", "root:x:0:\n"),
        ("etc/nsswitch.conf", "hosts: files dns\n"),
    ] {
        fs::write(root.join(file), text).with_context(|| format!("writing {file}"))?;
    }
    fs::copy(parts::ensure(&parts::AGNHOST)?, root.join("agnhost")).context("copying agnhost")?;
    // The tests start some of its servers under this name.
    symlink("agnhost", root.join("agnhost-2")).context("linking agnhost")?;
    for program in PROGRAMS {
        copy_with_libraries(program, &root)?;
    }
    copy(&found("busybox")?, &root.join("bin/busybox"))?;
    // Links to the shell, not to busybox's: that runs its own `nc`, which knows fewer flags, even where another comes first.
    for (link, target) in [("bin/bash", "../usr/bin/bash"), ("bin/sh", "../usr/bin/bash"), ("usr/bin/nc", "nc.openbsd")]
    {
        symlink(target, root.join(link)).with_context(|| format!("linking {link}"))?;
    }
    for applet in command::run("busybox", &["--list"])?.lines() {
        let taken = |folder: &str| root.join(folder).join(applet).symlink_metadata().is_ok();
        if !taken("bin") && !taken("usr/bin") {
            symlink("busybox", root.join("bin").join(applet)).with_context(|| format!("linking {applet}"))?;
        }
    }
    let configuration = json!({
        "Entrypoint": ["/agnhost"],
        "Cmd": ["pause"],
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "WorkingDir": "/",
    });
    pack(folder, &root, &name()?, configuration)
}

/// A program at its name, and the libraries it is linked to where it looks for them.
fn copy_with_libraries(program: &str, root: &Path) -> Result<()> {
    let path = found(program)?;
    copy(&path, &root.join("usr/bin").join(program))?;
    let listed = command::run("ldd", &[&path.display().to_string()])?;
    let libraries: BTreeSet<&str> = listed.split_whitespace().filter(|word| word.starts_with('/')).collect();
    for library in libraries {
        copy(Path::new(library), &root.join(library.trim_start_matches('/')))?;
    }
    Ok(())
}

/// Also what a link points to, as a file.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a file is in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    fs::copy(from, to).with_context(|| format!("copying {}", from.display())).map(drop)
}

fn found(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    let mut places = std::env::split_paths(&path).chain(more).map(|folder| folder.join(program));
    places
        .find(|file| file.is_file())
        .with_context(|| format!("{program} is missing, which Pods of Kubernetes' tests run"))
}

/// An archive in a folder: one layer, which is what is below a root, its configuration, and a list of both.
pub fn pack(folder: &Path, root: &Path, name: &str, configuration: Value) -> Result<PathBuf> {
    let text = |path: &Path| path.display().to_string();
    let tar = |archive: &str, from: &Path, what: &[&str]| {
        let (archive, from) = (text(&folder.join(archive)), text(from));
        let same = ["--create", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "--sort=name"];
        command::run("tar", &[&same, ["--file", &archive, "--directory", &from].as_slice(), what].concat()).map(drop)
    };
    tar("layer.tar", root, &["."])?;
    let configuration = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": configuration,
        "rootfs": {"type": "layers", "diff_ids": [digest(&folder.join("layer.tar"))?]},
    });
    fs::write(folder.join("config.json"), configuration.to_string()).context("writing the image's configuration")?;
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    fs::write(folder.join("manifest.json"), manifest.to_string()).context("writing the image's manifest")?;
    tar("image.tar", folder, &["manifest.json", "config.json", "layer.tar"])?;
    Ok(folder.join("image.tar"))
}

fn digest(file: &Path) -> Result<String> {
    let printed = command::run("sha256sum", &[&file.display().to_string()])?;
    let sum = printed.split_whitespace().next().context("sha256sum prints a sum")?;
    Ok(format!("sha256:{sum}"))
}
