//! `cargo xtask check`: what can be said about the source and the object without running it, and what programs and changes cost; or
//! with `--kernel` how the agent does on kernels that are not this machine's. Every check runs, also after one failed. None of it is
//! part of `cargo xtask test`: a kernel alone takes minutes.

pub mod budget;
pub mod change;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::interrupt;
use crate::kernels;
use crate::loops;
use crate::process;
use crate::setup;
use crate::stack::{self, Chain};
use crate::workspace;

/// What to check.
#[derive(Args)]
pub struct Options {
    /// Instead of that, boot this kernel of Debian in a virtual machine and try the agent there, which takes minutes; several can be
    /// given
    #[arg(long, value_name = "VERSION", value_parser = clap::builder::PossibleValuesParser::new(kernels::KNOWN))]
    kernel: Vec<String>,
    /// Instead of that, make what the verifier has to do today the budget for kernels of this machine's series (xtask/budgets.json); with
    /// --kernel, for those of that series
    #[arg(long)]
    write_budgets: bool,
}

/// Returns what is worth saying beside `ok`.
type Check<'a> = Box<dyn Fn() -> Result<String> + 'a>;

/// Returns what is worth saying beside `ok`.
pub type CheckOfObject = fn() -> Result<String>;

/// What the verifier of this machine's kernel doesn't say of the object, or says in words that nobody understands.
pub const OF_THE_OBJECT: [(&str, CheckOfObject); 3] = [
    ("no panic in the eBPF object", no_panics),
    ("stack of the programs", stack_fits),
    ("loops of the programs", loops_are_followed),
];

/// Runs all checks; the exit code is 0 if none found anything.
pub fn run(options: &Options) -> Result<ExitCode> {
    interrupt::catch();
    setup::ensure()?;
    // One after another: two cargos at once wait for each other.
    let mut checks: Vec<(String, Check)> = Vec::new();
    if options.write_budgets && options.kernel.is_empty() {
        checks.push(("budgets".to_owned(), Box::new(budget::write)));
    } else if options.kernel.is_empty() {
        checks.push(("format".to_owned(), Box::new(format)));
        checks.push(("lints".to_owned(), Box::new(lints)));
        for (name, check) in OF_THE_OBJECT {
            checks.push((name.to_owned(), Box::new(check)));
        }
        if workspace::is_root() {
            checks.push(("verified instructions".to_owned(), Box::new(budget::check)));
            checks.push(("what a change costs".to_owned(), Box::new(change::check)));
        }
    }
    for version in &options.kernel {
        checks.push((format!("Linux {version}"), Box::new(|| kernels::check(version, options.write_budgets))));
    }
    let mut failed = 0;
    for (name, check) in checks {
        interrupt::check()?;
        match check() {
            Ok(detail) => println!("ok      {name}{detail}"),
            Err(error) => {
                println!("FAILED  {name}: {error:#}");
                failed += 1;
            }
        }
    }
    if !workspace::is_root() {
        println!("not tested  verified instructions, what a change costs: run `cargo xtask check` as root");
    }
    for version in kernels::KNOWN.iter().filter(|version| !options.kernel.iter().any(|asked| asked == *version)) {
        println!("not tested  Linux {version}: `cargo xtask check --kernel {version}`");
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn format() -> Result<String> {
    process::run("cargo fmt", &mut workspace::cargo(&["fmt", "--all", "--check"]))?;
    Ok(String::new())
}

fn lints() -> Result<String> {
    let arguments = ["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    process::run("cargo clippy", &mut workspace::cargo(&arguments))?;
    Ok(String::new())
}

/// A panic compiles and then makes the verifier refuse the program with a message that says nothing about it.
fn no_panics() -> Result<String> {
    workspace::build_agent()?;
    let object = object();
    ensure!(object.exists(), "there is no object at {}", object.display());
    let text = ask_llvm("llvm-nm", &[], &object)?;
    let panics: Vec<&str> = text.lines().filter(|line| line.contains("panic")).collect();
    if !panics.is_empty() {
        bail!("an index, a division or an unwrap is left in the programs; symbols:\n{}", panics.join("\n"));
    }
    Ok(format!(" ({} symbols)", text.lines().count()))
}

fn object() -> PathBuf {
    match std::env::var_os("LB_EBPF_OBJECT") {
        Some(path) => PathBuf::from(path),
        None => workspace::target().join("ebpf/bpfel-unknown-none/release/lb"),
    }
}

/// The verifier of this machine's kernel may allow more than that of another.
fn stack_fits() -> Result<String> {
    workspace::build_agent()?;
    let text = ask_llvm("llvm-objdump", &["--disassemble", "--reloc"], &object())?;
    let Chain { bytes, functions } = stack::deepest(&text)?;
    let functions: Vec<String> = functions.iter().map(|(name, own)| format!("{name} {own}")).collect();
    let chain = functions.join(" > ");
    ensure!(bytes <= stack::LIMIT, "{bytes} bytes of {} as Linux 6.1 counts them: {chain}", stack::LIMIT);
    Ok(format!(" ({bytes} bytes of {} as Linux 6.1 counts them: {chain})", stack::LIMIT))
}

fn loops_are_followed() -> Result<String> {
    workspace::build_agent()?;
    let refused = loops::refused(&ask_llvm("llvm-objdump", &["--disassemble"], &object())?)?;
    ensure!(
        refused.is_empty(),
        "Linux 6.1 refuses loops; see `cold_path` in lb_common::decide: {}",
        refused.join(", ")
    );
    Ok(String::new())
}

fn ask_llvm(program: &str, arguments: &[&str], object: &Path) -> Result<String> {
    let debian = Path::new("/usr/lib/llvm-22/bin").join(program);
    let path = if debian.exists() { Some(debian) } else { workspace::find_program(program) };
    let path = path.with_context(|| format!("{program} is in no folder of PATH; install LLVM's binary tools"))?;
    let output = Command::new(&path).args(arguments).arg(object).output();
    let output = output.with_context(|| format!("running {}", path.display()))?;
    ensure!(output.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
