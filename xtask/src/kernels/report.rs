//! What a guest found out. In: one line of JSON from it. Out: a table for people, and whether all is as it should be.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::check::budget::Counts;

/// A guest's findings.
#[derive(Debug, Default)]
pub struct Report {
    /// `uname -r`.
    pub kernel: String,
    /// Programs in the order in which they were loaded.
    pub programs: Vec<Program>,
    /// One for each way to attach.
    pub rounds: Vec<Round>,
    /// Whether `fairlead cleanup` left nothing.
    pub cleaned: bool,
    /// What ended it early.
    pub error: Option<String>,
}

/// A program as the verifier saw it.
#[derive(Debug)]
pub struct Program {
    /// Its name, and which of its two forms.
    pub name: String,
    /// Instructions that the verifier walked through; loops and branches count each time.
    pub verified: u64,
    /// How long loading took, in milliseconds.
    pub milliseconds: u64,
}

/// Connections while programs were attached in one way.
#[derive(Debug, Default)]
pub struct Round {
    /// `--attach`.
    pub asked: String,
    /// What came of it.
    pub mechanism: String,
    /// How many programs are attached.
    pub attached: usize,
    /// What was tried.
    pub connections: Vec<Tried>,
}

/// A kind of connection.
#[derive(Debug)]
pub struct Tried {
    /// What it is.
    pub what: String,
    /// What went wrong with it, over IPv4 and over IPv6.
    pub wrong: [Option<String>; 2],
}

impl Report {
    /// Reads what [`Report::to_line`] wrote.
    pub fn parse(line: &str) -> Option<Self> {
        let json: Value = serde_json::from_str(line).ok()?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        Some(Self {
            kernel: text(&json["kernel"])?,
            programs: list(&json["programs"])
                .iter()
                .filter_map(|program| {
                    Some(Program {
                        name: text(&program["name"])?,
                        verified: program["verified"].as_u64()?,
                        milliseconds: program["milliseconds"].as_u64()?,
                    })
                })
                .collect(),
            rounds: list(&json["rounds"])
                .iter()
                .filter_map(|round| {
                    Some(Round {
                        asked: text(&round["asked"])?,
                        mechanism: text(&round["mechanism"])?,
                        attached: usize::try_from(round["attached"].as_u64()?).ok()?,
                        connections: list(&round["connections"])
                            .iter()
                            .filter_map(|tried| {
                                let wrong = [text(&tried["wrong"][0]), text(&tried["wrong"][1])];
                                Some(Tried { what: text(&tried["what"])?, wrong })
                            })
                            .collect(),
                    })
                })
                .collect(),
            cleaned: json["cleaned"] == true,
            error: text(&json["error"]),
        })
    }

    /// One line of JSON.
    pub fn to_line(&self) -> String {
        let programs: Vec<Value> = self
            .programs
            .iter()
            .map(|program| {
                json!({"name": program.name, "verified": program.verified, "milliseconds": program.milliseconds})
            })
            .collect();
        let rounds: Vec<Value> = self
            .rounds
            .iter()
            .map(|round| {
                let connections: Vec<Value> =
                    round.connections.iter().map(|tried| json!({"what": tried.what, "wrong": tried.wrong})).collect();
                json!({
                    "asked": round.asked,
                    "mechanism": round.mechanism,
                    "attached": round.attached,
                    "connections": connections,
                })
            })
            .collect();
        json!({
            "kernel": self.kernel,
            "programs": programs,
            "rounds": rounds,
            "cleaned": self.cleaned,
            "error": self.error,
        })
        .to_string()
    }

    /// Prints the tables.
    pub fn print(&self) {
        println!("\nLinux {} in a virtual machine (times are of an emulated processor)\n", self.kernel);
        println!("  {:<24} {:>21} {:>10}  result", "program", "instructions verified", "load");
        for Program { name, verified, milliseconds } in &self.programs {
            println!("  {name:<24} {verified:>21} {milliseconds:>7} ms  loaded");
        }
        for round in &self.rounds {
            let Round { asked, mechanism, attached, connections } = round;
            println!("\n  {:<55} IPv4    IPv6", format!("--attach {asked}: {attached} programs, by {mechanism}"));
            for Tried { what, wrong: [v4, v6] } in connections {
                let word = |wrong: &Option<String>| if wrong.is_none() { "ok" } else { "FAILED" };
                println!("  {what:<55} {:<7} {}", word(v4), word(v6));
                for wrong in [v4, v6].into_iter().flatten() {
                    println!("      {wrong}");
                }
            }
        }
        if self.cleaned {
            println!("\n  fairlead cleanup: nothing is left");
        }
        if let Some(error) = &self.error {
            println!("\n  It ended with: {error}");
        }
        println!();
    }

    /// What the verifier had to do for each program.
    pub fn counts(&self) -> Counts {
        self.programs.iter().map(|program| (program.name.clone(), program.verified)).collect()
    }

    /// What `cargo xtask check` says of it in a line.
    pub fn verdict(&self) -> Result<String> {
        if self.error.is_some() || !self.cleaned {
            bail!("it did not come to its end; see above");
        }
        let tried = || self.rounds.iter().flat_map(|round| &round.connections).flat_map(|tried| &tried.wrong);
        let failed = tried().filter(|wrong| wrong.is_some()).count();
        if failed > 0 || tried().count() == 0 {
            bail!("{failed} of {} kinds of connections failed; see above", tried().count());
        }
        let Some(most) = self.programs.iter().map(|program| program.verified).max() else {
            bail!("the agent's log names no program that was loaded");
        };
        let ways: BTreeSet<&str> = self.rounds.iter().map(|round| round.mechanism.as_str()).collect();
        let ways: Vec<&str> = ways.into_iter().collect();
        Ok(format!(
            " ({}): {} programs loaded, at most {most} instructions verified; {} kinds of connections passed, by {}",
            self.kernel,
            self.programs.len(),
            tried().count(),
            ways.join(" and ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::{Program, Report, Round, Tried};

    #[test]
    fn a_report_survives_its_way_as_a_line() {
        let report = Report {
            kernel: "6.1.0".into(),
            programs: vec![Program { name: "ingress".into(), verified: 9, milliseconds: 3 }],
            rounds: vec![Round {
                asked: "auto".into(),
                mechanism: "clsact".into(),
                attached: 4,
                connections: vec![Tried { what: "tcp".into(), wrong: [None, Some("timed out".into())] }],
            }],
            cleaned: true,
            error: None,
        };
        let line = report.to_line();
        let read = Report::parse(&line).unwrap();
        assert_eq!(format!("{read:?}"), format!("{report:?}"));
        assert!(read.verdict().is_err());
        assert!(Report::parse("Linux version 6.1").is_none());
    }
}
