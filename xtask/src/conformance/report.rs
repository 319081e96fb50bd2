//! The results of all runs side by side. In: each run's specs. Out: a table, a summary, and whether something is wrong with the agent.

use std::collections::BTreeSet;

use super::specs::{Outcome, Spec};

/// All runs so far.
#[derive(Default)]
pub struct Report {
    runs: Vec<Run>,
}

struct Run {
    name: String,
    ours: bool,
    specs: Vec<Spec>,
}

impl Run {
    fn outcome(&self, name: &str) -> Option<Outcome> {
        self.specs.iter().find(|spec| spec.name == name).map(|spec| spec.outcome)
    }

    fn count(&self, outcome: Outcome) -> usize {
        self.specs.iter().filter(|spec| spec.outcome == outcome).count()
    }
}

impl Report {
    /// Adds a run; `ours` says that the agent is what was tested. One of kube-proxy comes after the agent's of the same mode.
    pub fn add(&mut self, name: String, ours: bool, specs: Vec<Spec>) {
        self.runs.push(Run { name, ours, specs });
    }

    /// A table if there is something to compare, and a summary.
    pub fn print(&self) {
        if self.runs.len() > 1 {
            println!();
            let names: Vec<&str> = self.runs.iter().map(|run| &*run.name).collect();
            println!("| spec | {} |", names.join(" | "));
            println!("|---{}|", "|---".repeat(names.len()));
            for name in self.names() {
                let cells = self.runs.iter().map(|run| run.outcome(name).map_or("-", Outcome::name));
                println!("| {name} | {} |", cells.collect::<Vec<_>>().join(" | "));
            }
        }
        println!();
        for run in &self.runs {
            let counts = [Outcome::Passed, Outcome::Failed, Outcome::Skipped].map(|outcome| run.count(outcome));
            println!("{}: {} passed, {} failed, {} skipped", run.name, counts[0], counts[1], counts[2]);
        }
    }

    /// Whether the agent passes whatever it has to. Where kube-proxy ran beside it, that is what kube-proxy passes; otherwise each spec
    /// that didn't skip itself (`may_skip`), or each at all.
    pub fn is_good(&self, may_skip: bool) -> bool {
        self.runs.iter().enumerate().filter(|(_, run)| run.ours).all(|(index, run)| {
            let beside = self.runs.get(index + 1).filter(|next| !next.ours);
            run.specs.iter().all(|spec| match (spec.outcome, beside) {
                (Outcome::Passed, _) => true,
                (Outcome::Failed | Outcome::Skipped, Some(other)) => {
                    other.outcome(&spec.name).is_some_and(|outcome| outcome != Outcome::Passed)
                }
                (Outcome::Skipped, None) => may_skip,
                (Outcome::Failed, None) => false,
            })
        })
    }

    fn names(&self) -> BTreeSet<&str> {
        self.runs.iter().flat_map(|run| &run.specs).map(|spec| &*spec.name).collect()
    }
}

#[cfg(test)]
mod unit {
    use super::super::specs::{Outcome, Spec};
    use super::Report;

    fn report(runs: &[(bool, Outcome)]) -> Report {
        let mut report = Report::default();
        for (ours, outcome) in runs {
            let spec = Spec { name: "spec".to_owned(), outcome: *outcome, seconds: 1.0, reason: String::new() };
            report.add("run".to_owned(), *ours, vec![spec]);
        }
        report
    }

    #[test]
    fn the_agent_has_to_pass_what_kube_proxy_passes() {
        use Outcome::{Failed, Passed, Skipped};
        for (runs, may_skip, good) in [
            (&[(true, Passed)][..], false, true),
            (&[(true, Failed)], true, false),
            (&[(true, Skipped)], false, false),
            (&[(true, Skipped)], true, true),
            (&[(true, Failed), (false, Failed)], true, true),
            (&[(true, Failed), (false, Passed)], true, false),
            (&[(true, Skipped), (false, Passed)], true, false),
            (&[(true, Passed), (false, Failed)], false, true),
            (&[(true, Passed), (true, Failed)], false, false),
        ] {
            assert_eq!(report(runs).is_good(may_skip), good, "{runs:?} {may_skip}");
        }
    }
}
