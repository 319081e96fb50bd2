//! Keys and certificates of a control plane. In: a folder. Out: a CA, the API server's certificate, the key that signs tokens of
//! service accounts. They are worth nothing outside the lab.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::subject_names;
use crate::command;

/// Makes the CA, and the API server's certificate by it.
pub fn make_authority(folder: &Path) -> Result<()> {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    fs::write(folder.join("names"), format!("subjectAltName={}", subject_names())).context("writing names")?;
    openssl(folder, &format!("req -x509 {key} -days 30 -subj /CN=lab-ca -keyout @ca.key -out @ca.crt"))?;
    openssl(folder, &format!("req {key} -subj /CN=kube-apiserver -keyout @api.key -out @api.csr"))?;
    openssl(
        folder,
        "x509 -req -in @api.csr -CA @ca.crt -CAkey @ca.key -CAcreateserial -days 30 -out @api.crt -extfile @names",
    )
}

/// Makes the key that signs tokens.
pub fn make_accounts(folder: &Path) -> Result<()> {
    openssl(folder, "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out @accounts.key")?;
    openssl(folder, "pkey -in @accounts.key -pubout -out @accounts.pub")
}

/// Runs a line in which `@` stands before the names of files.
fn openssl(folder: &Path, line: &str) -> Result<()> {
    let path = |name: &str| folder.join(name).display().to_string();
    let words: Vec<String> = line.split(' ').map(|word| word.strip_prefix('@').map_or(word.to_owned(), path)).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    command::run("openssl", &words).map(drop)
}
