//! Addresses and networks as kube-proxy reads them.
//!
//! In: text from objects and configuration. Out: addresses. Stored objects may hold IPv4 octets with leading zeros, which
//! kube-proxy reads as decimal, and IPv4 addresses in IPv6 form, which count as IPv4 (`kube-proxy.md` §1.1).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use lb_common::{addr::Addr, layout::PrefixKey};

/// The address that a text means.
#[must_use]
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if !text.contains(':') {
        return parse_v4(text).map(IpAddr::V4);
    }
    // The last part of an IPv6 address may be written as IPv4, with the same leading zeros.
    if let Some((head, tail)) = text.rsplit_once(':').filter(|(_, tail)| tail.contains('.')) {
        let strict = format!("{head}:{}", parse_v4(tail)?);
        return strict.parse().ok().map(canonical);
    }
    text.parse().ok().map(canonical)
}

/// The network that a text means, without host bits. Spaces around it are no harm.
#[must_use]
pub fn parse_net(text: &str) -> Option<IpNet> {
    let (addr, len) = text.trim().split_once('/')?;
    if len.is_empty() || !len.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let len: u8 = len.parse().ok()?;
    let addr = parse_ip(addr)?;
    let mapped = addr.is_ipv4() && text.contains(':');
    let len = if mapped { len.checked_sub(96)? } else { len };
    Some(IpNet::new(addr, len).ok()?.trunc())
}

/// The network of one address.
#[must_use]
pub fn host(addr: IpAddr) -> IpNet {
    addr.into()
}

/// A network as key of the longest-prefix tables.
#[must_use]
pub fn prefix_key(service: u32, net: IpNet) -> PrefixKey {
    let family = if net.addr().is_ipv4() { 96 } else { 0 };
    PrefixKey { prefix_len: 32 + family + u32::from(net.prefix_len()), service, addr: Addr::from(net.network()) }
}

/// Whether two addresses are of one family.
#[must_use]
pub const fn same_family(a: &IpAddr, b: &IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}

fn parse_v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *octet = part.parse().ok()?;
    }
    parts.next().is_none().then(|| octets.into())
}

fn canonical(addr: Ipv6Addr) -> IpAddr {
    addr.to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_zeros_are_decimal_and_mapped_addresses_are_v4() {
        for (text, want) in [
            ("172.30.0.041", Some("172.30.0.41")),
            ("010.000.000.001", Some("10.0.0.1")),
            ("::ffff:1.2.3.4", Some("1.2.3.4")),
            ("::ffff:001.2.3.04", Some("1.2.3.4")),
            ("fd00::1", Some("fd00::1")),
            ("1.2.3", None),
            ("1.2.3.4.5", None),
            ("1.2.3.256", None),
            ("+1.2.3.4", None),
            ("1..3.4", None),
            ("", None),
            ("None", None),
        ] {
            assert_eq!(parse_ip(text).map(|addr| addr.to_string()).as_deref(), want, "{text}");
        }
    }

    #[test]
    fn networks_lose_host_bits_and_spaces() {
        for (text, want) in [
            (" 203.0.113.000/025", Some("203.0.113.0/25")),
            ("10.1.2.3/8 ", Some("10.0.0.0/8")),
            ("::ffff:10.1.2.3/104", Some("10.0.0.0/8")),
            ("fd00::1/64", Some("fd00::/64")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("10.0.0.0/33", None),
            ("10.0.0.0", None),
            ("10.0.0.0/", None),
            ("10.0.0.0/+8", None),
            ("::ffff:10.0.0.0/8", None),
        ] {
            assert_eq!(parse_net(text).map(|net| net.to_string()).as_deref(), want, "{text}");
        }
    }

    #[test]
    fn keys_count_the_bits_of_the_128_bit_form() {
        let key = |text| prefix_key(7, parse_net(text).unwrap()).prefix_len;
        assert_eq!([key("10.0.0.0/8"), key("0.0.0.0/0"), key("fd00::/64"), key("::1/128")], [136, 128, 96, 160]);
    }
}
