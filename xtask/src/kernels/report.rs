//! What a guest found out. In: one line of JSON from it. Out: a table for people, and whether all is as it should be.

use anyhow::{Result, bail};
use serde_json::{Value, json};

/// A guest's findings.
#[derive(Debug, Default)]
pub struct Report {
    /// `uname -r`.
    pub kernel: String,
    /// Programs in the order in which they were loaded.
    pub programs: Vec<Program>,
    /// One for each way to attach.
    pub rounds: Vec<Round>,
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
    /// What was tried, and what went wrong with it.
    pub connections: Vec<(String, Option<String>)>,
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
                            .filter_map(|tried| Some((text(&tried["what"])?, text(&tried["wrong"]))))
                            .collect(),
                    })
                })
                .collect(),
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
                    round.connections.iter().map(|(what, wrong)| json!({"what": what, "wrong": wrong})).collect();
                json!({
                    "asked": round.asked,
                    "mechanism": round.mechanism,
                    "attached": round.attached,
                    "connections": connections,
                })
            })
            .collect();
        json!({"kernel": self.kernel, "programs": programs, "rounds": rounds, "error": self.error}).to_string()
    }

    /// Prints the tables.
    pub fn print(&self) {
        println!("\nLinux {} in a virtual machine (times are of an emulated processor)\n", self.kernel);
        println!("  {:<24} {:>10} {:>9}  result", "program", "verified", "load");
        for Program { name, verified, milliseconds } in &self.programs {
            println!("  {name:<24} {verified:>10} {milliseconds:>6} ms  loaded");
        }
        for round in &self.rounds {
            println!("\n  --attach {}: by {}, {} programs attached", round.asked, round.mechanism, round.attached);
            for (what, wrong) in &round.connections {
                match wrong {
                    None => println!("    ok      {what}"),
                    Some(wrong) => println!("    FAILED  {what}: {wrong}"),
                }
            }
        }
        if let Some(error) = &self.error {
            println!("\n  It ended with: {error}");
        }
        println!();
    }

    /// What `cargo xtask check` says of it in a line.
    pub fn verdict(&self) -> Result<String> {
        if self.error.is_some() {
            bail!("it did not come to its end; the table above says why");
        }
        let tried = self.rounds.iter().flat_map(|round| &round.connections);
        let (wrong, right): (Vec<_>, Vec<_>) = tried.partition(|(_, wrong)| wrong.is_some());
        if !wrong.is_empty() || right.is_empty() || self.programs.is_empty() {
            bail!("{} of {} connections failed", wrong.len(), wrong.len() + right.len());
        }
        let ways: Vec<&str> = self.rounds.iter().map(|round| round.mechanism.as_str()).collect();
        let most = self.programs.iter().map(|program| program.verified).max().unwrap_or(0);
        Ok(format!(
            " ({}: {} programs, at most {most} instructions verified; {} connections, by {})",
            self.kernel,
            self.programs.len(),
            right.len(),
            ways.join(" and ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::{Program, Report, Round};

    #[test]
    fn a_report_survives_its_way_as_a_line() {
        let report = Report {
            kernel: "6.1.0".into(),
            programs: vec![Program { name: "ingress".into(), verified: 9, milliseconds: 3 }],
            rounds: vec![Round {
                asked: "auto".into(),
                mechanism: "clsact".into(),
                attached: 4,
                connections: vec![("tcp".into(), None), ("udp".into(), Some("timed out".into()))],
            }],
            error: None,
        };
        let line = report.to_line();
        let read = Report::parse(&line).unwrap();
        assert_eq!(format!("{read:?}"), format!("{report:?}"));
        assert!(read.verdict().is_err());
        assert!(Report::parse("Linux version 6.1").is_none());
    }
}
