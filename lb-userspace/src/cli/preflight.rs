//! `fairlead preflight`.

use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;

use super::{pins::Output, table};
use crate::kernel::{
    links::Mechanism,
    object::Trial,
    preflight::{Preflight, preflight},
};

const EXAMPLES: &str = "\
Examples:
  fairlead preflight
  fairlead preflight --output json | jq '.programs[] | select(.error)'

Nothing is attached or pinned, and a running agent is not disturbed. The exit code is 1 if the kernel refuses a program.";

/// Try whether this kernel takes the programs, without attaching or leaving anything
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct PreflightArgs {
    /// How it is written
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Found {
    /// The kernel's release.
    kernel: String,
    /// What `--attach auto` would choose.
    attach: &'static str,
    programs: Vec<Program>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Program {
    program: &'static str,
    /// `ethernet` or `none`; sockets have no such thing.
    link_layer: Option<&'static str>,
    verified_instructions: Option<u32>,
    load_milliseconds: Option<u64>,
    /// Why it was refused, with the end of the verifier's log.
    error: Option<String>,
}

/// Tries, and prints what came of it.
pub fn run(args: &PreflightArgs) -> Result<()> {
    let found = Found::new(preflight()?);
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&found)?),
        Output::Table => found.print(),
    }
    found.verdict()
}

impl Found {
    fn new(preflight: Preflight) -> Self {
        let Preflight { release, mechanism, trials } = preflight;
        Self { kernel: release, attach: mechanism.name(), programs: trials.into_iter().map(Program::new).collect() }
    }

    fn print(&self) {
        println!("Kernel  {}", self.kernel);
        let remark = if self.attach == Mechanism::Tcx.name() { "" } else { " (TCX needs Linux 6.6)" };
        println!("Attach  {}{remark}\n", self.attach);
        let mut programs = table::new(&["program", "link layer", "verified instructions", "load"]);
        for program in &self.programs {
            let known = |number: Option<String>| number.unwrap_or_else(|| "unknown".to_owned());
            let (verified, load) = match &program.error {
                Some(_) => ("refused".to_owned(), String::new()),
                None => (
                    known(program.verified_instructions.map(|count| count.to_string())),
                    known(program.load_milliseconds.map(|milliseconds| format!("{milliseconds} ms"))),
                ),
            };
            programs.add_row([program.program, program.link_layer.unwrap_or("-"), &verified, &load]);
        }
        table::print(&programs);
    }

    /// An error that says why programs were refused.
    fn verdict(&self) -> Result<()> {
        let errors: Vec<&str> = self.programs.iter().filter_map(|program| program.error.as_deref()).collect();
        if errors.is_empty() {
            return Ok(());
        }
        bail!(
            "Linux {} refuses {} of {} programs; the README names those that were tested\n{}",
            self.kernel,
            errors.len(),
            self.programs.len(),
            errors.join("\n")
        )
    }
}

impl Program {
    fn new(trial: Trial) -> Self {
        let Trial { program, ethernet, result } = trial;
        let link_layer = match (program, ethernet) {
            ("ingress" | "egress", true) => Some("ethernet"),
            ("ingress" | "egress", false) => Some("none"),
            _ => None,
        };
        let (verified, error) = match result {
            Ok(verified) => (Some(verified), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        Self {
            program,
            link_layer,
            verified_instructions: verified.and_then(|verified| verified.instructions),
            load_milliseconds: verified.map(|verified| verified.milliseconds),
            error,
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::kernel::object::Verified;

    fn found(results: Vec<(&'static str, bool, Result<Verified>)>) -> Found {
        let trials =
            results.into_iter().map(|(program, ethernet, result)| Trial { program, ethernet, result }).collect();
        Found::new(Preflight { release: "6.1.0".into(), mechanism: Mechanism::Clsact, trials })
    }

    #[test]
    fn a_refused_program_is_an_error_with_what_the_verifier_said() {
        let verified = Verified { instructions: Some(7), milliseconds: 1 };
        assert!(found(vec![("ingress", true, Ok(verified))]).verdict().is_ok());
        let found = found(vec![("ingress", true, Ok(verified)), ("egress", false, Err(anyhow!("R1 !read_ok")))]);
        let text = found.verdict().unwrap_err().to_string();
        assert!(text.contains("6.1.0") && text.contains("1 of 2") && text.contains("R1 !read_ok"), "{text}");
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!(json["programs"][0]["verifiedInstructions"], 7);
        assert_eq!(json["programs"][1]["linkLayer"], "none");
    }

    #[test]
    fn programs_for_sockets_have_no_link_layer() {
        let verified = Verified { instructions: None, milliseconds: 1 };
        let found = found(vec![("connect4", true, Ok(verified)), ("ingress", true, Ok(verified))]);
        let layers: Vec<_> = found.programs.iter().map(|program| program.link_layer).collect();
        assert_eq!(layers, [None, Some("ethernet")]);
    }
}
