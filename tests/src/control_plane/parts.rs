//! The programs of other projects that tests run. In: the Go modules in `tests/cluster`. Out: each program, compiled once and kept outside
//! the checkout. Never here: a download from anywhere but the Go module proxy, which Go itself asks.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// A program that is compiled from a Go module.
#[derive(Debug)]
pub struct Part {
    /// The program's name.
    pub name: &'static str,
    /// The module's folder below `tests/cluster`.
    module: &'static str,
    /// The package, as Go names it from there.
    package: &'static str,
    /// Whether the package is a test, of which a program is made.
    test: bool,
    /// What else it is made from, besides the module's own two files.
    sources: &'static [&'static str],
}

/// etcd, API server, controllers, scheduler, kubelet and kube-proxy: the first argument says which.
pub const KUBE: Part = Part { name: "kube", module: "", package: ".", test: false, sources: &["main.go"] };

/// kubectl of the same release.
pub const KUBECTL: Part = Part { name: "kubectl", module: "kubectl", package: ".", test: false, sources: &["main.go"] };

/// What renders charts.
pub const HELM: Part =
    Part { name: "helm", module: "helm", package: "helm.sh/helm/v3/cmd/helm", test: false, sources: &[] };

/// Kubernetes' own tests of its network.
pub const E2E: Part =
    Part { name: "e2e.test", module: "", package: "./e2e", test: true, sources: &["e2e/e2e_test.go"] };

/// What runs in the pods of these tests.
pub const AGNHOST: Part =
    Part { name: "agnhost", module: "", package: "k8s.io/kubernetes/test/images/agnhost", test: false, sources: &[] };

/// The cluster's name server.
pub const COREDNS: Part = Part { name: "coredns", module: "dns", package: ".", test: false, sources: &["main.go"] };

/// What all parts call themselves: the release of k8s.io/kubernetes in go.mod.
const MODULE: &str = "\tk8s.io/kubernetes v";

/// The compiler that is fetched where the installed one is older, as a module.
const TOOLCHAIN: &str = "golang.org/toolchain@v0.0.1-go1.26.8.linux-amd64";

/// The oldest compiler that takes go.mod, as `go1.MINOR`.
const OLDEST: u32 = 26;

/// From here on Go fetches a newer compiler by itself.
const FETCHES_ITSELF: u32 = 21;

/// The program, compiled first if it isn't there or is another recipe's. The first time takes minutes.
pub fn ensure(part: &Part) -> Result<PathBuf> {
    ensure_by(part, |command| {
        eprintln!("Compiling {}; minutes, the first time", part.name);
        let output = command.output().context("running go")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} doesn't compile ({}):\n{said}", part.name, output.status);
        Ok(())
    })
}

/// The same, with the compilation in someone else's hands.
pub fn ensure_by(part: &Part, compile: impl FnOnce(&mut Command) -> Result<()>) -> Result<PathBuf> {
    let binary = folder()?.join(part.name);
    let stamp = folder()?.join(format!("{}.recipe", part.name));
    let lock = File::create(folder()?.join("lock")).context("creating the lock of the Kubernetes parts")?;
    lock.lock().context("waiting for another build of the Kubernetes parts")?;
    let recipe = recipe(part)?;
    if !binary.exists() || fs::read_to_string(&stamp).ok().as_ref() != Some(&recipe) {
        compile(&mut command(part, &binary)?)?;
        fs::write(&stamp, recipe).context("noting what was compiled")?;
    }
    Ok(binary)
}

/// Where Go has unpacked the sources of Kubernetes.
pub fn kubernetes() -> Result<PathBuf> {
    let mut command = Command::new(compiler()?);
    command.args(["list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes"]).current_dir(source(""));
    let output = command.output().context("running go")?;
    ensure!(output.status.success(), "go lists no k8s.io/kubernetes: {}", String::from_utf8_lossy(&output.stderr));
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// A Go compiler of any version, in PATH or where its own installation puts it.
pub fn go() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain([PathBuf::from("/usr/local/go/bin"), "/usr/lib/go/bin".into()]);
    places.map(|folder| folder.join("go")).find(|program| program.is_file())
}

/// A compiler that takes our modules, or fetches one that does.
fn compiler() -> Result<PathBuf> {
    let Some(go) = go() else {
        bail!("Go is missing, which compiles Kubernetes' control plane; `cargo xtask setup --cluster` installs it")
    };
    if minor(&go)? < FETCHES_ITSELF { fetched(&go) } else { Ok(go) }
}

fn command(part: &Part, binary: &Path) -> Result<Command> {
    let go = compiler()?;
    let text = fs::read_to_string(source("").join("go.mod")).context("reading tests/cluster/go.mod")?;
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
    let mut command = Command::new(&go);
    command.args(if part.test { ["test", "-c"].as_slice() } else { &["build"] });
    command.args(["-trimpath", "-buildvcs=false", "-ldflags", &flags, "-o"]).arg(binary).arg(part.package);
    command.current_dir(source(part.module)).env("CGO_ENABLED", "0");
    if (FETCHES_ITSELF..OLDEST).contains(&minor(&go)?) {
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

/// A Go module's folder.
fn source(module: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster").join(module)
}

/// What the program is made from, in a word.
fn recipe(part: &Part) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    for name in ["go.mod", "go.sum"].iter().chain(part.sources) {
        let path = source(part.module).join(name);
        fs::read(&path).with_context(|| format!("reading {}", path.display()))?.hash(&mut hasher);
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
