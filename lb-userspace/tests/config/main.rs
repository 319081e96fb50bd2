//! What the real kube-proxy makes of command lines and files, and what we make of them.
//!
//! `tests/data/config/cases.json` has the questions, `answers.json` the answers of kube-proxy 1.37.2 (`--write-config-to`):
//! a file's text, or null where it refused. Ours must be the same text, or a refusal, unless the case names a row of the
//! table of differences in `docs/configuration.md`; then it must not. To ask a kube-proxy again:
//! `FAIRLEAD_KUBE_PROXY=/path/to/kube-proxy cargo test -p lb-userspace --test config`.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::{fs, path::Path, process::Command};

use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    args: Vec<String>,
    file: Option<String>,
    difference: Option<String>,
}

impl Case {
    fn name(&self) -> String {
        format!("{}\n{}", self.args.join(" "), self.file.as_deref().unwrap_or_default())
    }
}

/// The configuration that a program writes, if it writes one.
fn ask(program: &Path, case: &Case) -> Option<String> {
    let dir = tempfile::tempdir().unwrap();
    let (config, written) = (dir.path().join("config.conf"), dir.path().join("written"));
    let mut command = Command::new(program);
    if let Some(file) = &case.file {
        fs::write(&config, file).unwrap();
        command.arg("--config").arg(&config);
    }
    let output = command.args(&case.args).arg("--write-config-to").arg(&written).output().unwrap();
    let text = fs::read_to_string(&written).ok();
    assert_eq!(output.status.success(), text.is_some(), "{}: {output:?}", case.name());
    if text.is_none() {
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.is_empty(), "{}: a refusal says why: {said}", case.name());
    }
    text
}

fn data(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/config").join(name)
}

#[test]
fn command_lines_and_files_make_what_kube_proxy_makes_of_them() {
    let cases: Vec<Case> = serde_json::from_str(&fs::read_to_string(data("cases.json")).unwrap()).unwrap();
    if let Some(program) = std::env::var_os("FAIRLEAD_KUBE_PROXY") {
        let answers: Vec<Option<String>> = cases.iter().map(|case| ask(Path::new(&program), case)).collect();
        fs::write(data("answers.json"), serde_json::to_string_pretty(&answers).unwrap() + "\n").unwrap();
    }
    let answers: Vec<Option<String>> =
        serde_json::from_str(&fs::read_to_string(data("answers.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), answers.len(), "ask a kube-proxy again");
    let documented = include_str!("../../../docs/configuration.md");
    let mut wrong = Vec::new();
    for (case, theirs) in cases.iter().zip(&answers) {
        let ours = ask(Path::new(env!("CARGO_BIN_EXE_fairlead")), case);
        let different = ours != *theirs;
        match &case.difference {
            Some(row) if !documented.contains(&format!("| {row} |")) => wrong.push(format!("not documented: {row}")),
            Some(_) if !different => wrong.push(format!("no difference any more: {}", case.name())),
            None if different => wrong.push(format!(
                "{}\n--- kube-proxy\n{}\n--- fairlead\n{}",
                case.name(),
                lines_apart(theirs, &ours),
                lines_apart(&ours, theirs)
            )),
            Some(_) | None => {}
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n\n"));
}

/// The lines of the first that the second doesn't have.
fn lines_apart(one: &Option<String>, other: &Option<String>) -> String {
    let Some(one) = one else { return "(refused)".to_owned() };
    let other: Vec<&str> = other.as_deref().unwrap_or_default().lines().collect();
    if other.is_empty() {
        return "(written)".to_owned();
    }
    one.lines().filter(|line| !other.contains(line)).collect::<Vec<_>>().join("\n")
}
