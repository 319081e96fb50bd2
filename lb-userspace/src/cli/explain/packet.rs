//! A packet that starts a connection, as people and tools write it.

use std::net::IpAddr;

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::model::{address::parse_ip, object::Protocol};

/// A packet that starts a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its source address.
    pub from: IpAddr,
    /// Its destination address.
    pub to: IpAddr,
    /// Its destination port.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
    /// The interface by which it enters the node, if it matters.
    pub from_interface: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    from: String,
    to: String,
    port: u16,
    protocol: String,
    #[serde(default)]
    from_interface: Option<String>,
}

impl Packet {
    /// Reads a line of JSON.
    ///
    /// # Errors
    ///
    /// It is not the object that `fairlead explain --help` shows.
    pub fn from_json(line: &str) -> anyhow::Result<Self> {
        let Line { from, to, port, protocol, from_interface } = serde_json::from_str(line).context(
            r#"not a packet; write it like {"from":"10.0.0.2","to":"172.30.0.41","port":80,"protocol":"TCP"}"#,
        )?;
        Ok(Self {
            from: address("from", &from)?,
            to: address("to", &to)?,
            port,
            protocol: protocol_of(&protocol)?,
            from_interface,
        })
    }
}

/// The source among the words of a command line; a port is of no importance.
///
/// # Errors
///
/// It is not an IP address.
pub fn source(text: &str) -> anyhow::Result<IpAddr> {
    address("from", split(text).0)
}

/// The destination among the words of a command line.
///
/// # Errors
///
/// It is not an IP address with a port.
pub fn destination(text: &str) -> anyhow::Result<(IpAddr, u16)> {
    let (to, port) = split(text);
    let port = port.with_context(|| format!("`{to}` has no port; write it like 10.96.0.10:53 or [fd00::10]:53"))?;
    let number = port.parse().with_context(|| format!("`{port}` is not a port; write a number up to 65535"))?;
    Ok((address("to", to)?, number))
}

/// Address and port; an IPv6 address with a port stands in brackets.
fn split(text: &str) -> (&str, Option<&str>) {
    if let Some((addr, rest)) = text.strip_prefix('[').and_then(|text| text.split_once(']')) {
        return (addr, rest.strip_prefix(':'));
    }
    match text.split_once(':') {
        Some((addr, port)) if !port.contains(':') => (addr, Some(port)),
        Some(_) | None => (text, None),
    }
}

fn address(field: &str, text: &str) -> anyhow::Result<IpAddr> {
    parse_ip(text).with_context(|| format!("{field}: `{text}` is not an IP address"))
}

/// A protocol by its name.
///
/// # Errors
///
/// Services have no such protocol.
pub fn protocol_of(text: &str) -> anyhow::Result<Protocol> {
    let known = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    match known.into_iter().find(|protocol| protocol.to_string().eq_ignore_ascii_case(text)) {
        Some(protocol) => Ok(protocol),
        None => bail!("protocol: `{text}` is not known; write TCP, UDP or SCTP"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_read_from_words() {
        for (from, to, want) in [
            ("10.0.0.1:40000", "10.96.0.10:53", Some(("10.0.0.1", "10.96.0.10"))),
            ("10.0.0.1", "10.96.0.10:53", Some(("10.0.0.1", "10.96.0.10"))),
            ("fd00::1", "[fd00::10]:53", Some(("fd00::1", "fd00::10"))),
            ("[fd00::1]:1", "[fd00::10]:53", Some(("fd00::1", "fd00::10"))),
            ("10.0.0.1", "10.96.0.10", None),
            ("10.0.0.1", "fd00::10", None),
            ("10.0.0.1", "10.96.0.10:dns", None),
            ("here", "10.96.0.10:53", None),
        ] {
            let ends = source(from).and_then(|from| Ok((from, destination(to)?))).ok();
            let found = ends.map(|(from, (to, port))| (from.to_string(), to.to_string(), port));
            assert_eq!(found, want.map(|(from, to)| (from.to_owned(), to.to_owned(), 53)), "{from} {to}");
        }
        for (text, want) in [("tcp", Some(Protocol::Tcp)), ("Udp", Some(Protocol::Udp)), ("icmp", None)] {
            assert_eq!(protocol_of(text).ok(), want);
        }
    }

    #[test]
    fn a_line_that_is_no_packet_says_what_one_looks_like() {
        for line in ["", "{}", "[]", r#"{"from":"10.0.0.2","to":"172.30.0.41","port":80,"protocol":"TCP","form":1}"#] {
            let error = Packet::from_json(line).unwrap_err();
            assert!(error.to_string().contains("write it like"), "{error}");
        }
    }
}
