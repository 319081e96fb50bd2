//! Small questions about addresses and networks that several parts of the plan ask.

use std::net::IpAddr;

use ipnet::IpNet;

/// The network of one address.
#[must_use]
pub fn host(addr: IpAddr) -> IpNet {
    addr.into()
}

/// Whether two addresses are of one family.
#[must_use]
pub const fn same_family(a: &IpAddr, b: &IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}
