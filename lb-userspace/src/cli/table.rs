//! Tables and names as all lists have them.

use std::net::IpAddr;

use anyhow::Result;
use comfy_table::{Table, presets::NOTHING};
use lb_common::{
    addr::{Addr, Port},
    layout::{FrontendKey, ServiceName},
};
use serde::Serialize;

use super::pins::Output;
use crate::{image::service_name, model::object::Protocol};

/// A table with these headings, which a terminal's width doesn't break.
pub fn new(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(headings.iter().map(|heading| heading.to_uppercase()));
    table
}

/// A table's lines, without the spaces that would stand at their ends.
pub fn text(table: &Table) -> String {
    table.lines().flat_map(|line| [line.trim_end().to_owned(), "\n".to_owned()]).collect()
}

/// Prints a table.
pub fn print(table: &Table) {
    print!("{}", text(table));
}

/// A list as it is asked for.
pub fn list<R: Serialize>(rows: &[R], output: Output, table: impl FnOnce(&[R]) -> Table) -> Result<String> {
    Ok(match output {
        Output::Json => serde_json::to_string_pretty(rows)? + "\n",
        Output::Table => text(&table(rows)),
    })
}

/// Namespace, name, port name and protocol of a Service port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServicePort {
    /// The namespace.
    pub namespace: String,
    /// The Service's name.
    pub name: String,
    /// The port's name.
    pub port: String,
    /// The protocol.
    pub protocol: String,
}

impl ServicePort {
    /// The Service port whose name a table has.
    pub fn of(bytes: &ServiceName) -> Option<Self> {
        let (name, protocol) = service_name(bytes)?.rsplit_once('/')?;
        let (service, port) = name.rsplit_once(':')?;
        let (namespace, name) = service.split_once('/')?;
        Some(Self { namespace: namespace.into(), name: name.into(), port: port.into(), protocol: protocol.into() })
    }
}

/// `10.96.0.10:53`, `[fd00::1]:53`; a NodePort is `*:30053`, or `[*]:30053` for IPv6.
pub fn frontend(key: &FrontendKey) -> String {
    if key.addr.same(&Addr::UNSPECIFIED_V4) {
        format!("*:{}", key.port.number())
    } else if key.addr.same(&Addr::UNSPECIFIED_V6) {
        format!("[*]:{}", key.port.number())
    } else {
        socket(&key.addr, key.port)
    }
}

/// `10.244.1.7:8080`, `[fd00::7]:8080`.
pub fn socket(addr: &Addr, port: Port) -> String {
    match IpAddr::from(*addr) {
        IpAddr::V4(addr) => format!("{addr}:{}", port.number()),
        IpAddr::V6(addr) => format!("[{addr}]:{}", port.number()),
    }
}

/// `TCP`, `UDP`, `SCTP`, or the number.
pub fn protocol(number: u8) -> String {
    Protocol::from_number(number).map_or_else(|| number.to_string(), |protocol| protocol.to_string())
}

/// Durations as people say them: `4s`, `3m20s`, `2h5m`, `3d4h`.
pub fn age(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m{s}s"),
        (0, h, m, _) => format!("{h}h{m}m"),
        (d, h, _, _) => format!("{d}d{h}h"),
    }
}
