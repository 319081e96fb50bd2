//! A few words of nfnetlink and of ipvs' netlink, for which no program needs to be installed.
//!
//! In: names. Out: whether there was something of that name; it is gone then. A kernel without the subsystem has nothing.

use std::io;

use rtnetlink::sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_GENERIC, NETLINK_NETFILTER},
};

/// Of `linux/netfilter/nfnetlink.h`, `nf_tables.h`, `ipset/ip_set.h`.
const SUBSYSTEM_IPSET: u16 = 6;
const SUBSYSTEM_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const DELETE_TABLE: u16 = 2;
const GET_CHAIN: u16 = 4;
const DESTROY_SET: u16 = 3;
const IPSET_PROTOCOL: u8 = 6;
/// ipset's own error: a rule uses the set.
const IPSET_IN_USE: i32 = 4104;
/// Of `linux/genetlink.h` and `linux/ip_vs.h`.
const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const IPVS_FLUSH: u8 = 17;

const HEADER: usize = 16;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const EXCLUSIVE: u16 = 0x200;

/// Deletes a table of nftables with all that is in it.
pub(super) fn delete_table(family: i32, name: &str) -> io::Result<bool> {
    let edge = |kind| message(kind, REQUEST, &family_header(0, SUBSYSTEM_NFTABLES), &[]);
    let kind = SUBSYSTEM_NFTABLES << 8 | DELETE_TABLE;
    let delete = message(kind, REQUEST | ACK, &family_header(family, 0), &[(1, &text(name))]);
    found(ask(NETLINK_NETFILTER, &[edge(BATCH_BEGIN), delete, edge(BATCH_END)].concat()))
}

/// Whether nftables, and so iptables of that kind, has this chain.
pub(super) fn has_chain(family: i32, table: &str, chain: &str) -> io::Result<bool> {
    let kind = SUBSYSTEM_NFTABLES << 8 | GET_CHAIN;
    let attributes: [(u16, &[u8]); 2] = [(1, &text(table)), (3, &text(chain))];
    found(ask(NETLINK_NETFILTER, &message(kind, REQUEST, &family_header(family, 0), &attributes)))
}

/// Destroys a set.
pub(super) fn destroy_set(name: &str) -> io::Result<bool> {
    let kind = SUBSYSTEM_IPSET << 8 | DESTROY_SET;
    let attributes: [(u16, &[u8]); 2] = [(1, &[IPSET_PROTOCOL]), (2, &text(name))];
    // Without EXCLUSIVE, the kernel answers as if a set that isn't there had been destroyed.
    let flags = REQUEST | ACK | EXCLUSIVE;
    match ask(NETLINK_NETFILTER, &message(kind, flags, &family_header(libc::AF_INET, 0), &attributes)) {
        Err(error) if error.raw_os_error() == Some(IPSET_IN_USE) => {
            Err(io::Error::other("a rule uses it; remove the rule, then try again"))
        }
        result => found(result),
    }
}

/// Removes all virtual servers of ipvs, as kube-proxy does.
pub(super) fn flush_ipvs() -> io::Result<bool> {
    let question = message(CONTROLLER, REQUEST, &[GET_FAMILY, 1, 0, 0], &[(FAMILY_NAME, &text("IPVS"))]);
    let answer = match ask(NETLINK_GENERIC, &question) {
        Err(error) if is_absent(&error) => return Ok(false),
        result => result?,
    };
    let Some(id) = attribute(answer.get(HEADER + 4..).unwrap_or_default(), FAMILY_ID) else { return Ok(false) };
    let id = id.try_into().map(u16::from_ne_bytes).map_err(io::Error::other)?;
    found(ask(NETLINK_GENERIC, &message(id, REQUEST | ACK, &[IPVS_FLUSH, 1, 0, 0], &[])))
}

fn found(result: io::Result<Vec<u8>>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// There is no such thing, or no such subsystem.
fn is_absent(error: &io::Error) -> bool {
    const ABSENT: [i32; 4] = [libc::ENOENT, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT, libc::EAFNOSUPPORT];
    error.raw_os_error().is_some_and(|code| ABSENT.contains(&code))
}

/// `nfgenmsg`.
fn family_header(family: i32, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family.to_le_bytes()[0], 0, high, low]
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn message(kind: u16, flags: u16, header: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut message = vec![0; HEADER];
    message[4..6].copy_from_slice(&kind.to_ne_bytes());
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    message.extend(header);
    for (kind, value) in attributes {
        // Attributes are short names.
        message.extend((value.len() as u16 + 4).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(*value);
        message.resize(message.len().next_multiple_of(4), 0);
    }
    let length = message.len() as u32;
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message
}

/// Sends messages of which one is to be answered, and returns the answer.
fn ask(protocol: isize, messages: &[u8]) -> io::Result<Vec<u8>> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(messages, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let kind = answer.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    let code = answer.get(HEADER..HEADER + 4).map(|code| i32::from_ne_bytes([code[0], code[1], code[2], code[3]]));
    match (kind.map(i32::from), code) {
        (Some(libc::NLMSG_ERROR), Some(code)) if code != 0 => Err(io::Error::from_raw_os_error(-code)),
        (Some(_), Some(_)) => Ok(answer),
        (_, None) | (None, _) => Err(io::Error::other("the kernel's answer is too short")),
    }
}

/// The value of an attribute.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        if kind == wanted {
            return attributes.get(4..length);
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}
