//! Debian's package of a kernel. In: a version. Out: its image and the modules that the laboratory needs, in an order in which they
//! can be loaded. The package is unpacked into a folder, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// What the laboratory and the agent use that Debian builds as modules.
const MODULES: [&str; 4] = ["veth", "bridge", "sch_ingress", "cls_bpf"];

/// A kernel to boot.
pub struct Kernel {
    /// The image.
    pub image: PathBuf,
    /// Modules, each behind those that it depends on.
    pub modules: Vec<PathBuf>,
}

/// Downloads and unpacks the newest package of this version, unless that was done before.
pub fn fetch(version: &str, folder: &Path) -> Result<Kernel> {
    let package = newest(version)?;
    let ready = folder.join(&package);
    if !ready.exists() {
        // Half of a package, or an older one.
        fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let mut download = Command::new("apt-get");
        // As root, apt would give up its rights to download, and then could not write here.
        download.args(["--quiet", "--option", "APT::Sandbox::User=root", "download", &package]).current_dir(folder);
        process::run(&format!("downloading {package}"), &mut download)?;
        unpack(folder, &package).with_context(|| format!("unpacking {package}"))?;
    }
    let mut modules: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(&ready).with_context(|| format!("reading {}", ready.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "ko") {
            modules.push(path);
        }
    }
    modules.sort();
    Ok(Kernel { image: ready.join("vmlinuz"), modules })
}

/// The package with the highest number among those that apt knows. Unsigned: a virtual machine doesn't ask for a signature, and for
/// 6.12 Debian 12 has no other.
fn newest(version: &str) -> Result<String> {
    let pattern = format!("^linux-image-{}\\.[0-9]+[^ ]*-amd64-unsigned$", version.replace('.', "\\."));
    let output = Command::new("apt-cache")
        .args(["search", "--names-only", &pattern])
        .output()
        .context("running apt-cache: kernels are packages of Debian")?;
    ensure!(output.status.success(), "apt-cache: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let names = text.lines().filter_map(|line| line.split_whitespace().next());
    let plain = names.filter(|name| !name.contains("-cloud-") && !name.contains("-rt-"));
    plain.max_by_key(|name| numbers(name)).map(str::to_owned).with_context(|| {
        format!("Linux {version} is not to be had: no package of apt's lists matches {pattern} (`apt-get update`)")
    })
}

/// All numbers in a name: `6.1.0-9` is before `6.1.0-10`.
fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// Takes what is needed out of the package in `folder`; the rest is removed.
fn unpack(folder: &Path, package: &str) -> Result<()> {
    let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let archive = fs::read_dir(folder)?.flatten().map(|entry| entry.path()).find(is_package);
    let archive = archive.context("apt-get download left no package")?;
    let tree = folder.join("tree");
    process::run("unpacking the kernel", Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&tree))?;
    let image = only_file(&tree.join("boot"), "vmlinuz-")?;
    let modules = only_file(&tree.join("lib/modules"), "")?;
    let chosen = folder.join("chosen");
    fs::create_dir(&chosen)?;
    fs::rename(image, chosen.join("vmlinuz"))?;
    let mut order = Vec::new();
    for name in MODULES {
        load_order(&modules, name, &mut order)?;
    }
    for (number, (name, bytes)) in order.iter().enumerate() {
        fs::write(chosen.join(format!("{number:02}-{name}.ko")), bytes)?;
    }
    fs::remove_dir_all(&tree)?;
    fs::remove_file(&archive)?;
    // Last: what has this name is complete.
    fs::rename(chosen, folder.join(package))?;
    Ok(())
}

fn only_file(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut found = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    found.next().map(|entry| entry.path()).with_context(|| format!("there is no {prefix}* in {}", folder.display()))
}

/// Adds a module behind those that it names in its `.modinfo`; what is built in needs nothing. The package has no `modules.dep`:
/// its installation would make it.
fn load_order(modules: &Path, name: &str, order: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    if order.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let Some(path) = find(modules, name) else {
        let builtin = fs::read_to_string(modules.join("modules.builtin")).unwrap_or_default();
        let is_builtin = builtin.lines().any(|line| stem(line.rsplit('/').next().unwrap_or(line)) == name);
        if is_builtin {
            return Ok(());
        }
        bail!("this kernel has no module {name}");
    };
    let bytes = read(&path)?;
    for dependency in dependencies(&bytes) {
        load_order(modules, &dependency, order)?;
    }
    order.push((name.to_owned(), bytes));
    Ok(())
}

fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(folder).ok()?.flatten().find_map(|entry| {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            return find(&entry.path(), name);
        }
        let file = entry.file_name().to_string_lossy().into_owned();
        (file.contains(".ko") && stem(&file) == name).then(|| entry.path())
    })
}

/// The module in a file name; the kernel writes `-` and `_` alike.
fn stem(file: &str) -> String {
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// A module's bytes, uncompressed.
fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output().context("running xz")?;
        ensure!(output.status.success(), "xz {}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
        return Ok(output.stdout);
    }
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// What the entry `depends=` says.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = module.get(start + KEY.len()..).unwrap_or_default();
    let value = value.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(value);
    text.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::{dependencies, numbers, stem};

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(numbers("linux-image-6.1.0-9-amd64-unsigned") < numbers("linux-image-6.1.0-10-amd64-unsigned"));
        assert!(
            numbers("linux-image-6.12.113+deb12-amd64-unsigned") < numbers("linux-image-6.12.115+deb12-amd64-unsigned")
        );
    }

    #[test]
    fn a_modules_dependencies_are_read_from_its_bytes() {
        assert_eq!(dependencies(b"ELF\0license=GPL\0depends=llc,nf-x\0name=bridge\0"), ["llc", "nf_x"]);
        assert!(dependencies(b"ELF\0license=GPL\0depends=\0name=veth\0").is_empty());
        assert_eq!(stem("sch-ingress.ko.xz"), "sch_ingress");
    }
}
