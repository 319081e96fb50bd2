//! kube-proxy's configuration: its file, its command line, and what of both is in force.
//!
//! In: the text of a `KubeProxyConfiguration`, or flags. Out: a [`Config`] with every default filled in, what is wrong with
//! it, and what of it has no effect here. Never here: reading files, logging, and what a setting means for packets, which is
//! `plan`'s business.
//!
//! The way is kube-proxy's own (`kube-proxy.md` §15, §16): the file ([`file`]) or the flags ([`flags`]) → [`defaults`] →
//! [`Config`] → [`validate`]; [`write`] is the way back.

mod defaults;
mod duration;
pub mod file;
pub mod flags;
pub mod logging;
mod node;
mod number;
mod validate;
mod write;

use std::net::SocketAddr;

pub use self::{
    duration::GoDuration,
    file::{Conntrack, KubeProxyConfiguration},
    number::boolean,
    write::yaml,
};
use crate::{model::address::parse_ip, plan::node::ProxyMode};

/// What is in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// All that stands in the file under one name whatever the mode is. What the sections of the modes share is in the three
    /// fields below, and empty here.
    pub fields: KubeProxyConfiguration,
    /// `syncPeriod` of the mode's section.
    pub sync_period: GoDuration,
    /// `minSyncPeriod` of the mode's section.
    pub min_sync_period: GoDuration,
    /// `masqueradeAll` of the mode's section; that of iptables for ipvs.
    pub masquerade_all: bool,
}

impl Config {
    /// What the text of a configuration file says, with what a reader should be told about it.
    ///
    /// # Errors
    ///
    /// The text can't be read. Whether what it says is possible is asked by [`Self::problems`].
    pub fn of_file(text: &str) -> anyhow::Result<(Self, Vec<String>)> {
        let (file, mut warnings) = KubeProxyConfiguration::parse(text)?;
        warnings.extend(file.without_effect());
        Ok((Self::of(file).completed(), warnings))
    }

    /// What is in force where nothing is said.
    #[must_use]
    pub fn of_nothing() -> Self {
        Self::of(KubeProxyConfiguration::default()).completed()
    }

    /// Fills in the defaults, and takes the part of the mode out of its section.
    fn of(mut file: KubeProxyConfiguration) -> Self {
        defaults::fill(&mut file);
        let mode = mode_of(&file.mode);
        let (sync_period, min_sync_period) = match mode {
            Some(ProxyMode::Ipvs) => (file.ipvs.sync_period, file.ipvs.min_sync_period),
            Some(ProxyMode::Nftables) => (file.nftables.sync_period, file.nftables.min_sync_period),
            Some(ProxyMode::Iptables) | None => (file.iptables.sync_period, file.iptables.min_sync_period),
        };
        let masquerade_all =
            if mode == Some(ProxyMode::Nftables) { file.nftables.masquerade_all } else { file.iptables.masquerade_all };
        let mut config = Self { fields: file, sync_period, min_sync_period, masquerade_all };
        config.empty_sections();
        config
    }

    fn empty_sections(&mut self) {
        let file = &mut self.fields;
        file.port_range.clear();
        for (sync, min) in [
            (&mut file.iptables.sync_period, &mut file.iptables.min_sync_period),
            (&mut file.ipvs.sync_period, &mut file.ipvs.min_sync_period),
            (&mut file.nftables.sync_period, &mut file.nftables.min_sync_period),
        ] {
            (*sync, *min) = (GoDuration::ZERO, GoDuration::ZERO);
        }
        file.iptables.masquerade_all = false;
        file.nftables.masquerade_all = false;
    }

    /// Fills in the defaults that depend on the platform, which kube-proxy does after file and flags are read.
    fn completed(mut self) -> Self {
        defaults::complete(&mut self.fields);
        self
    }

    /// The mode, whose defaults hold. One that doesn't exist is iptables here, and a problem.
    #[must_use]
    pub fn mode(&self) -> ProxyMode {
        mode_of(&self.fields.mode).unwrap_or_default()
    }

    /// Where health checks are answered; nowhere if it is off.
    #[must_use]
    pub fn healthz_address(&self) -> Option<SocketAddr> {
        socket_address(&self.fields.healthz_bind_address)
    }

    /// Where metrics are served; nowhere if it is off.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        socket_address(&self.fields.metrics_bind_address)
    }

    /// The node's name as the configuration has it, if it has one: trimmed, in small letters.
    #[must_use]
    pub fn node_name(&self) -> Option<String> {
        let name = self.fields.hostname_override.trim().to_lowercase();
        Some(name).filter(|name| !name.is_empty())
    }
}

/// The mode of this name; empty is iptables.
fn mode_of(text: &str) -> Option<ProxyMode> {
    match text {
        "" | "iptables" => Some(ProxyMode::Iptables),
        "ipvs" => Some(ProxyMode::Ipvs),
        "nftables" => Some(ProxyMode::Nftables),
        _ => None,
    }
}

/// Splits `host:port` and `[host]:port`.
fn split_host_port(text: &str) -> Option<(&str, &str)> {
    let (host, port) = text.rsplit_once(':')?;
    match host.strip_prefix('[') {
        Some(host) => Some((host.strip_suffix(']')?, port)),
        None => (!host.contains(':')).then_some((host, port)),
    }
}

/// `address:port` of an address that has no port yet. What is no address stays, and is a problem later.
fn with_port(text: &str, port: i32) -> String {
    match (split_host_port(text), parse_ip(text)) {
        (None, Some(_)) if text.contains(':') => format!("[{text}]:{port}"),
        (None, Some(_)) => format!("{text}:{port}"),
        (Some(_), _) | (None, None) => text.to_owned(),
    }
}

fn socket_address(text: &str) -> Option<SocketAddr> {
    let (host, port) = split_host_port(text)?;
    Some(SocketAddr::new(parse_ip(host)?, port.parse().ok().filter(|port| *port != 0)?))
}

#[cfg(test)]
mod tests;
