//! The binary with Kubernetes' parts. In: the Go module in `tests/cluster`. Out: one program, compiled once and kept outside the
//! checkout. Never here: a download from anywhere but the Go module proxy, which Go itself asks.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// What all parts call themselves: the release of k8s.io/kubernetes in go.mod.
const MODULE: &str = "\tk8s.io/kubernetes v";

/// The compiler that is fetched where the installed one is older, as a module.
const TOOLCHAIN: &str = "golang.org/toolchain@v0.0.1-go1.26.8.linux-amd64";

/// The oldest compiler that takes go.mod, as `go1.MINOR`.
const OLDEST: u32 = 26;

/// From here on Go fetches a newer compiler by itself.
const FETCHES_ITSELF: u32 = 21;

/// The binary, compiled first if it isn't there or is another recipe's. The first time takes minutes.
pub fn ensure() -> Result<PathBuf> {
    ensure_by(|command| {
        eprintln!("Compiling etcd, kube-apiserver, kube-controller-manager and others; minutes, the first time");
        let output = command.output().context("running go")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the Kubernetes parts don't compile ({}):\n{said}", output.status);
        Ok(())
    })
}

/// The same, with the compilation in someone else's hands.
pub fn ensure_by(compile: impl FnOnce(&mut Command) -> Result<()>) -> Result<PathBuf> {
    let binary = folder()?.join("kube");
    let stamp = folder()?.join("kube.recipe");
    let lock = File::create(folder()?.join("lock")).context("creating the lock of the Kubernetes parts")?;
    lock.lock().context("waiting for another build of the Kubernetes parts")?;
    let recipe = recipe()?;
    if !binary.exists() || fs::read_to_string(&stamp).ok().as_ref() != Some(&recipe) {
        compile(&mut command(&binary)?)?;
        fs::write(&stamp, recipe).context("noting what was compiled")?;
    }
    Ok(binary)
}

/// A Go compiler of any version, in PATH or where its own installation puts it.
pub fn go() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain([PathBuf::from("/usr/local/go/bin"), "/usr/lib/go/bin".into()]);
    places.map(|folder| folder.join("go")).find(|program| program.is_file())
}

fn command(binary: &Path) -> Result<Command> {
    let Some(go) = go() else {
        bail!("Go is missing, which compiles Kubernetes' control plane; `cargo xtask setup --cluster` installs it")
    };
    let minor = minor(&go)?;
    let go = if minor < FETCHES_ITSELF { fetched(&go)? } else { go };
    let text = fs::read_to_string(source().join("go.mod")).context("reading tests/cluster/go.mod")?;
    let release = text.lines().find_map(|line| line.strip_prefix(MODULE)).context("go.mod names no Kubernetes")?;
    let (major, rest) = release.split_once('.').context("a release has two dots")?;
    let patch = rest.split('.').next().unwrap_or_default();
    let mut flags = "-s -w".to_owned();
    // Unset, the parts call themselves v0.0.0-master.
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        for (name, value) in [("gitVersion", &*format!("v{release}")), ("gitMajor", major), ("gitMinor", patch)] {
            flags += &format!(" -X {package}.{name}={value}");
        }
    }
    let mut command = Command::new(go);
    command.args(["build", "-trimpath", "-buildvcs=false", "-ldflags", &flags, "-o"]).arg(binary).arg(".");
    command.current_dir(source()).env("CGO_ENABLED", "0");
    if (FETCHES_ITSELF..OLDEST).contains(&minor) {
        command.env("GOTOOLCHAIN", "auto");
    }
    Ok(command)
}

/// The minor version of a compiler.
fn minor(go: &Path) -> Result<u32> {
    let output = Command::new(go).args(["env", "GOVERSION"]).current_dir("/").output().context("running go")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let minor = text.trim().strip_prefix("go1.").and_then(|rest| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    });
    minor.with_context(|| format!("{} says no version: {text}", go.display()))
}

/// A compiler from the module proxy, fetched by one that can't do that by itself yet.
fn fetched(go: &Path) -> Result<PathBuf> {
    let mut command = Command::new(go);
    command.args(["mod", "download", "-json", TOOLCHAIN]).current_dir("/").env("GOFLAGS", "-mod=mod");
    let output = command.output().context("running go")?;
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let Some(folder) = answer["Dir"].as_str().map(PathBuf::from) else {
        bail!("{TOOLCHAIN} can't be fetched: {}{answer}", String::from_utf8_lossy(&output.stderr));
    };
    // Modules are unpacked without the right to be run.
    let tools = folder.join("pkg/tool");
    let mut programs = vec![folder.join("bin/go")];
    for platform in fs::read_dir(&tools).into_iter().flatten().flatten() {
        programs.extend(fs::read_dir(platform.path()).into_iter().flatten().flatten().map(|entry| entry.path()));
    }
    for program in &programs {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(program, mode).with_context(|| format!("making {} a program", program.display()))?;
    }
    Ok(folder.join("bin/go"))
}

/// The Go module.
fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster")
}

/// What the binary is made from, in a word.
fn recipe() -> Result<String> {
    let mut hasher = DefaultHasher::new();
    for name in ["go.mod", "go.sum", "main.go"] {
        fs::read(source().join(name)).with_context(|| format!("reading tests/cluster/{name}"))?.hash(&mut hasher);
    }
    Ok(format!("{:x}", hasher.finish()))
}

fn folder() -> Result<PathBuf> {
    let cache = match std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    let folder = cache.join("fairlead-cluster/bin");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    Ok(folder)
}
