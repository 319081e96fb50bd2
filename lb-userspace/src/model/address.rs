//! Addresses and networks as stored objects write them.
//!
//! In: text that an older API server let through: IPv4 octets with leading zeros are decimal, spaces are trimmed, and an
//! IPv4-mapped IPv6 address is IPv4. Out: the canonical form.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// An address.
#[must_use]
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    if text.contains(':') { parse_v6(text).map(|addr| addr.to_canonical()) } else { parse_v4(text).map(IpAddr::V4) }
}

/// A network; bits behind the prefix are cleared.
#[must_use]
pub fn parse_cidr(text: &str) -> Option<IpNet> {
    let (addr, length) = text.trim().split_once('/')?;
    let length = parse_decimal(length, 128)?;
    if addr.contains(':') {
        let addr = parse_v6(addr)?;
        match addr.to_ipv4_mapped() {
            // Whole IPv4 addresses lie behind 96 bits; a shorter prefix covers more than IPv4.
            Some(v4) if length >= 96 => Some(Ipv4Net::new(v4, (length - 96) as u8).ok()?.trunc().into()),
            Some(_) | None => Some(Ipv6Net::new(addr, length as u8).ok()?.trunc().into()),
        }
    } else {
        Some(Ipv4Net::new(parse_v4(addr)?, length as u8).ok()?.trunc().into())
    }
}

fn parse_v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = parse_decimal(parts.next()?, 255)? as u8;
    }
    parts.next().is_none().then(|| octets.into())
}

fn parse_v6(text: &str) -> Option<Ipv6Addr> {
    match text.parse() {
        Ok(addr) => Some(addr),
        Err(_) => {
            // The dotted end may have leading zeros, too.
            let at = text.rfind(':')? + 1;
            format!("{}{}", &text[..at], parse_v4(&text[at..])?).parse().ok()
        }
    }
}

fn parse_decimal(text: &str, max: u32) -> Option<u32> {
    if text.is_empty() || text.len() > 10 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|number| *number <= max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_kube_proxy_reads_them() {
        for (text, expected) in [
            ("10.0.0.1", Some("10.0.0.1")),
            ("172.30.0.041", Some("172.30.0.41")),
            (" 010.000.000.008 ", Some("10.0.0.8")),
            ("::ffff:1.2.3.4", Some("1.2.3.4")),
            ("::ffff:1.2.3.004", Some("1.2.3.4")),
            ("FD00::A", Some("fd00::a")),
            ("", None),
            ("None", None),
            ("1.2.3", None),
            ("1.2.3.4.5", None),
            ("1.2.3.256", None),
            ("1.2.3.+4", None),
            ("1..2.3", None),
            ("fe80::1%eth0", None),
            ("10.0.0.1/32", None),
        ] {
            assert_eq!(parse_ip(text).map(|addr| addr.to_string()).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn networks_are_read_as_kube_proxy_reads_them() {
        for (text, expected) in [
            ("203.0.113.000/025", Some("203.0.113.0/25")),
            (" 10.1.2.3/8 ", Some("10.0.0.0/8")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("fd00::1/64", Some("fd00::/64")),
            ("::ffff:10.0.0.0/104", Some("10.0.0.0/8")),
            ("10.0.0.0", None),
            ("10.0.0.0/33", None),
            ("10.0.0.0/", None),
            ("fd00::/129", None),
            ("10.0.0.0/-1", None),
        ] {
            assert_eq!(parse_cidr(text).map(|net| net.to_string()).as_deref(), expected, "{text:?}");
        }
    }
}
