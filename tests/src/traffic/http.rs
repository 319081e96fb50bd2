//! One request over HTTP. In: who asks, where, for what. Out: the answer, as it was said.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::client::Client;

/// What a server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Three digits.
    pub code: u16,
    /// Headers by their names in small letters.
    pub headers: BTreeMap<String, String>,
    /// What follows.
    pub body: String,
}

/// Asks with a method and a path, `GET /healthz`, and headers of one's own, each a line.
pub fn ask(client: &Client, to: SocketAddr, request: &str, headers: &[&str]) -> Result<Answer> {
    let mut stream = client.connect(to).with_context(|| format!("connecting to {to}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    stream.write_all(format!("{request} HTTP/1.0\r\nHost: localhost\r\n{headers}\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text).with_context(|| format!("{request} at {to}"))?;
    let (head, body) = text.split_once("\r\n\r\n").context("an answer has a head")?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("an answer has a code")?;
    let headers = head.lines().skip(1).filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    Ok(Answer { code, headers, body: body.to_owned() })
}
