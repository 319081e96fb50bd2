//! `cargo xtask setup`: what building and testing need. In: the machine. Out: the same with what was missing, or the commands that a
//! person has to run. Asks nothing; does nothing in a blink where everything is there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use tests::control_plane::parts;
use tests::kubelet;

use crate::process;
use crate::workspace;

const LLVM: &str = "/usr/lib/llvm-22";

/// The core library that Debian builds for BPF, and the compiler that it fits.
const DEBIAN_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none";

/// How to set up.
#[derive(Args)]
pub struct Options {
    /// Only say what is missing; exit with 1 if something is
    #[arg(long)]
    dry_run: bool,
    /// Also what `cargo xtask check --kernel` needs
    #[arg(long)]
    kernels: bool,
    /// Also what a real control plane is compiled with
    #[arg(long)]
    cluster: bool,
}

/// Something that has to be there.
struct Need {
    /// Debian's packages that bring it.
    packages: &'static [&'static str],
    /// What it is for.
    why: &'static str,
    /// Whether it is there.
    found: bool,
}

/// The subcommand.
pub fn run(options: &Options) -> Result<ExitCode> {
    if options.dry_run {
        let mut optional = if options.kernels { virtual_machine_needs() } else { Vec::new() };
        optional.extend(if options.cluster { cluster_needs() } else { Vec::new() });
        let missing: Vec<Need> = needs().into_iter().chain(optional).filter(|need| !need.found).collect();
        missing.iter().for_each(describe);
        let linker = linker_is_missing();
        if linker {
            println!("bpf-linker: {LINKER_WHY}");
        }
        if missing.is_empty() && !linker {
            println!("Everything is there.");
            return Ok(ExitCode::SUCCESS);
        }
        return Ok(ExitCode::FAILURE);
    }
    let mut installed = ensure()? | (options.kernels && ensure_virtual_machines()?);
    installed |= options.cluster && ensure_cluster()?;
    if !installed {
        println!("Everything is there.");
    }
    Ok(ExitCode::SUCCESS)
}

/// Installs what is missing; true if something was.
pub fn ensure() -> Result<bool> {
    let missing: Vec<Need> = needs().into_iter().filter(|need| !need.found).collect();
    let linker = linker_is_missing();
    if missing.is_empty() && !linker {
        return Ok(false);
    }
    if !is_debian() {
        bail!(
            "something is missing, and only Debian's way to install it is known here.\n{}",
            instructions(&missing, linker)
        );
    }
    if !missing.is_empty() {
        missing.iter().for_each(describe);
        install_packages(&missing)?;
    }
    if linker {
        println!("Installing bpf-linker from its crate: {LINKER_WHY}");
        process::run("building bpf-linker", &mut linker_command()).context(
            "bpf-linker can't be installed; the three ways to an eBPF object are named in README.md, Toolchain",
        )?;
    }
    if linker_is_missing() {
        bail!("bpf-linker was installed, yet it is in no folder of PATH and not in cargo's own");
    }
    if let Some(need) = needs().into_iter().find(|need| !need.found) {
        bail!("still missing after the installation of {}: {}", need.packages.join(" "), need.why);
    }
    Ok(true)
}

/// Installs what booting kernels needs and isn't there; true if something was missing. Only who asks for a kernel gets it.
pub fn ensure_virtual_machines() -> Result<bool> {
    ensure_some(virtual_machine_needs(), "kernels to boot are packages of Debian; the missing programs")
}

/// Installs what a real control plane is compiled with and isn't there; true if something was missing.
pub fn ensure_cluster() -> Result<bool> {
    ensure_some(cluster_needs(), "install Go 1.26 or newer and openssl from your distribution; what is missing")
}

/// Installs what a node with a real kubelet needs and isn't there; true if something was missing.
pub fn ensure_nodes() -> Result<bool> {
    ensure_some(
        node_needs(),
        "install containerd, runc and the plugins of container networks from your distribution; what is missing",
    )
}

/// Installs what libFuzzer is compiled with and isn't there; true if something was missing.
pub fn ensure_fuzzer() -> Result<bool> {
    let needs = vec![Need {
        packages: &["g++"],
        why: "libFuzzer is compiled by a C++ compiler",
        found: workspace::find_program("c++").is_some(),
    }];
    ensure_some(needs, "install a C++ compiler from your distribution")
}

fn ensure_some(needs: Vec<Need>, elsewhere: &str) -> Result<bool> {
    let missing: Vec<Need> = needs.into_iter().filter(|need| !need.found).collect();
    if missing.is_empty() {
        return Ok(false);
    }
    if !is_debian() {
        bail!("{elsewhere}:\n{}", list(&missing));
    }
    missing.iter().for_each(describe);
    install_packages(&missing)?;
    Ok(true)
}

fn cluster_needs() -> Vec<Need> {
    vec![
        Need {
            packages: &["golang-go"],
            why: "Kubernetes' control plane, which tests run, is compiled by Go (one that is too old fetches a newer one)",
            found: parts::go().is_some(),
        },
        Need {
            packages: &["openssl"],
            why: "the control plane of tests has certificates",
            found: workspace::find_program("openssl").is_some(),
        },
        Need {
            packages: &["iptables"],
            why: "the real kube-proxy, which tests compare with, writes its rules by it",
            found: ["iptables-save", "ip6tables-save"].into_iter().all(|name| workspace::find_program(name).is_some()),
        },
    ]
}

fn node_needs() -> Vec<Need> {
    let has = |program: &str| workspace::find_program(program).is_some();
    vec![
        Need {
            packages: &["containerd", "runc"],
            why: "a kubelet runs Pods by it",
            found: has("containerd") && has("runc"),
        },
        Need {
            packages: &["containernetworking-plugins"],
            why: "Pods get their devices and addresses by them",
            found: Path::new(kubelet::CNI).join("ptp").exists(),
        },
        Need {
            packages: &["iptables", "conntrack"],
            why: "kubelet, the network of Pods and kube-proxy use them",
            found: has("iptables") && has("conntrack"),
        },
        Need {
            packages: &["busybox-static", "curl", "wget", "netcat-openbsd", "bind9-dnsutils"],
            why: "Pods of Kubernetes' tests run them",
            found: ["busybox", "curl", "wget", "nc.openbsd", "dig"].into_iter().all(has),
        },
        Need {
            packages: &["util-linux", "mount"],
            why: "a node has namespaces of its own for processes and mounts",
            found: ["unshare", "nsenter", "mount"].into_iter().all(has),
        },
    ]
}

fn virtual_machine_needs() -> Vec<Need> {
    let has = |program: &str| workspace::find_program(program).is_some();
    vec![
        Need {
            packages: &["qemu-system-x86"],
            why: "`cargo xtask check --kernel` boots kernels in virtual machines",
            found: has("qemu-system-x86_64"),
        },
        Need { packages: &["xz-utils"], why: "modules of some kernels are compressed with `xz`", found: has("xz") },
    ]
}

const LINKER_WHY: &str = "it links Rust's LLVM bitcode into the eBPF object, and must be of the compiler's LLVM major";

fn needs() -> Vec<Need> {
    let has = |program: &str| workspace::find_program(program).is_some();
    let mut needs = vec![
        Need { packages: &["iproute2"], why: "tests and demo make network namespaces with `ip`", found: has("ip") },
        Need { packages: &["nftables"], why: "tests put a CNI's netfilter rules beside the agent", found: has("nft") },
        Need { packages: &["ethtool"], why: "tests switch offloads of devices", found: has("ethtool") },
        Need { packages: &["procps"], why: "`cargo xtask cluster down` ends processes by `kill`", found: has("kill") },
        Need { packages: &["curl"], why: "people explore a demo that is kept with `curl`", found: has("curl") },
        Need { packages: &["gcc", "libc6-dev"], why: "Rust programs are linked by `cc`", found: has("cc") },
    ];
    if !has_other_toolchain() {
        needs.push(Need {
            packages: &["rustc-web", "libstd-rust-web-dev-bpf"],
            why: "a Rust compiler with a core library for eBPF",
            found: Path::new(DEBIAN_CORE).exists() && Path::new("/usr/bin/rustc").exists(),
        });
        if linker_is_missing() {
            needs.push(Need {
                packages: &["llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "g++"],
                why: "bpf-linker is built against the LLVM that this compiler uses",
                found: Path::new(LLVM).join("lib/libPolly.a").exists() && has("c++"),
            });
        }
        needs.push(Need {
            packages: &["llvm-22"],
            why: "`cargo xtask check` looks for panics in the object with llvm-nm",
            found: Path::new(LLVM).join("bin/llvm-nm").exists(),
        });
    }
    needs
}

/// A ready object or a compiler chosen by hand, or one with core's sources, as the agent's build script takes them.
fn has_other_toolchain() -> bool {
    if std::env::var_os("LB_EBPF_OBJECT").is_some() || std::env::var_os("LB_EBPF_RUSTC").is_some() {
        return true;
    }
    if Path::new(DEBIAN_CORE).exists() {
        return false;
    }
    workspace::find_program("bpf-linker").is_some() && (current_has_sources() || nightly_has_sources())
}

const SOURCES: &str = "lib/rustlib/src/rust/library/core";

fn current_has_sources() -> bool {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let Ok(output) = Command::new(rustc).args(["--print", "sysroot"]).output() else { return false };
    Path::new(String::from_utf8_lossy(&output.stdout).trim()).join(SOURCES).exists()
}

fn nightly_has_sources() -> bool {
    let rustup = std::env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".rustup")));
    let Some(entries) = rustup.and_then(|home| fs::read_dir(home.join("toolchains")).ok()) else { return false };
    entries
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with("nightly") && entry.path().join(SOURCES).exists())
}

fn linker_is_missing() -> bool {
    std::env::var_os("LB_EBPF_OBJECT").is_none() && workspace::find_program("bpf-linker").is_none()
}

fn is_debian() -> bool {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let values = text.lines().filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")));
    values.flat_map(|value| value.trim_matches('"').split(' ')).any(|word| word == "debian")
}

fn install_packages(missing: &[Need]) -> Result<()> {
    let packages: Vec<&str> = missing.iter().flat_map(|need| need.packages.iter().copied()).collect();
    process::run("apt-get update", &mut apt(&["update"]))?;
    let arguments = [["install", "--yes", "--no-install-recommends"].as_slice(), &packages].concat();
    process::run(&format!("installing {} packages", packages.len()), &mut apt(&arguments)).with_context(|| {
        format!("Debian 12 and its security updates have all of these\n{}", instructions(missing, false))
    })
}

fn apt(arguments: &[&str]) -> Command {
    let mut command = if workspace::is_root() {
        Command::new("apt-get")
    } else {
        let mut command = Command::new("sudo");
        command.args(["--non-interactive", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        command
    };
    command.args(["--quiet", "--option", "DPkg::Lock::Timeout=300"]).args(arguments);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn linker_command() -> Command {
    let mut command = workspace::cargo(&["install", "bpf-linker", "--no-default-features", "--features", "llvm-22"]);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(PathBuf::from(LLVM).join("bin")).chain(std::env::split_paths(&path));
    if let Ok(path) = std::env::join_paths(folders) {
        command.env("PATH", path);
    }
    command.env("LLVM_PREFIX", LLVM);
    // The target folder of this workspace is no place for it.
    command.env_remove("CARGO_TARGET_DIR");
    command
}

fn describe(need: &Need) {
    println!("Missing: {}: {}", need.packages.join(" "), need.why);
}

fn list(missing: &[Need]) -> String {
    missing.iter().map(|need| format!("  {}: {}\n", need.packages.join(" "), need.why)).collect()
}

fn instructions(missing: &[Need], linker: bool) -> String {
    let mut text = format!("Missing:\n{}", list(missing));
    if linker {
        text += &format!("  bpf-linker: {LINKER_WHY}\n");
    }
    text += "On Debian 12:\n";
    let packages: Vec<&str> = missing.iter().flat_map(|need| need.packages.iter().copied()).collect();
    if !packages.is_empty() {
        text += &format!("  apt-get install {}\n", packages.join(" "));
    }
    text += &format!(
        "  PATH={LLVM}/bin:$PATH LLVM_PREFIX={LLVM} cargo install bpf-linker --no-default-features --features llvm-22\n"
    );
    text += "Elsewhere: iproute2, nftables, ethtool and a C linker from your distribution, then\n";
    text += "  rustup toolchain install nightly --component rust-src\n";
    text += "  cargo install bpf-linker     (needs the LLVM of that compiler; `cargo binstall bpf-linker` brings it)";
    text
}
