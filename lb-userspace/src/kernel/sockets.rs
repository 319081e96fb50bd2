//! Ends connected sockets that speak to nobody any more, so that their processes connect anew (SOCK_DIAG).
//!
//! In: the tables, the storage that the socket programs keep. Out: sockets with ECONNABORTED. Which ones is said by
//! [`astray`]; never unconnected ones, never those of programs that are not ours.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    os::unix::fs::MetadataExt as _,
};

use anyhow::{Context as _, Result, anyhow};
use lb_common::{
    addr::Port,
    astray::astray,
    layout::{FrontendKey, protocol},
    memory::Memory,
    socket::{Ends, Pairs},
};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    inet::{InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
    message::SockDiagDestroy,
};
use rtnetlink::{
    packet_core::{DefaultNla, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, Nla as _, NlasIterator},
    sys::protocols::NETLINK_SOCK_DIAG,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{netlink, sys};
use crate::image::{Write, service_name};

/// Attributes of `linux/inet_diag.h` and `linux/sock_diag.h` that the message crate does not know.
mod attribute {
    /// A request for socket storage.
    pub const REQUEST_STORAGES: u16 = 2;
    /// Of which map.
    pub const REQUEST_MAP_FD: u16 = 1;
    /// The storages in an answer.
    pub const STORAGES: u16 = 20;
    /// One of them.
    pub const STORAGE: u16 = 1;
    /// Its content.
    pub const MAP_VALUE: u16 = 3;
    /// Set in the type of an attribute that holds attributes.
    pub const NESTED: u16 = 1 << 15;
}

/// Where the namespaces of pods have names.
const NAMED: &str = "/run/netns";

/// Whether writes may have led connected UDP sockets astray: an endpoint that is gone, another frontend or another address for NodePorts.
/// `memory` is what the tables hold once the writes are done.
#[must_use]
pub fn concerns(writes: &[Write], memory: &Memory) -> bool {
    let udp = |key: &FrontendKey| key.proto == protocol::UDP;
    writes.iter().any(|write| match write {
        Write::Frontend(key, _) | Write::RemoveFrontend(key) => udp(key),
        // A Service that goes as a whole takes its frontends along.
        Write::Endpoint(_, endpoint) if endpoint.flags == 0 => {
            let name = memory.services.get(&endpoint.service).and_then(service_name);
            name.is_some_and(|name| name.ends_with("/UDP"))
        }
        Write::NodeAddress(..) => true,
        Write::Endpoint(..)
        | Write::Slots(..)
        | Write::Service(..)
        | Write::RemoveService(_)
        | Write::SourceRange(_)
        | Write::RemoveSourceRange(_)
        | Write::FrontendBit(_)
        | Write::EndpointBit(_)
        | Write::ClearFrontendBit(_)
        | Write::ClearEndpointBit(_)
        | Write::LocalCidr(_)
        | Write::RemoveLocalCidr(_)
        | Write::ServiceCidr(_)
        | Write::RemoveServiceCidr(_)
        | Write::RemoveNodeAddress(_)
        | Write::Device(..)
        | Write::RemoveDevice(_)
        | Write::Settings(_) => false,
    })
}

/// Ends the sockets of this network namespace that are astray; with `pods`, also those of every other one that can be found. Answers
/// how many. One namespace or socket that fails does not save the others.
pub fn end_astray(storage: BorrowedFd<'_>, pods: bool, memory: &Memory) -> Result<usize> {
    let mut ended = end_here(storage, false, memory)?;
    if pods {
        // A thread of its own, since it does not come back from where it goes.
        let others = std::thread::scope(|scope| scope.spawn(|| end_elsewhere(storage, memory)).join());
        ended += others.map_err(|_| anyhow!("the thread that enters namespaces ended early"))??;
    }
    Ok(ended)
}

fn end_elsewhere(storage: BorrowedFd<'_>, memory: &Memory) -> Result<usize> {
    let mut ended = 0;
    let mut failed = None;
    let mut seen: BTreeSet<(u64, u64)> =
        fs::metadata("/proc/self/ns/net").map(|file| (file.dev(), file.ino())).into_iter().collect();
    let processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.path().join("ns/net"));
    let named = fs::read_dir(NAMED).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in processes.chain(named) {
        // A process may be gone, and much in /proc is none.
        let Ok(file) = fs::File::open(&path) else { continue };
        let Ok(identity) = file.metadata() else { continue };
        if !seen.insert((identity.dev(), identity.ino())) {
            continue;
        }
        let entered = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network));
        match entered.map_err(anyhow::Error::from).and_then(|()| end_here(storage, true, memory)) {
            Ok(here) => ended += here,
            Err(error) => failed = Some(error.context(format!("network namespace {}", path.display()))),
        }
    }
    failed.map_or(Ok(ended), Err)
}

fn end_here(storage: BorrowedFd<'_>, is_pod: bool, memory: &Memory) -> Result<usize> {
    let mut ended = 0;
    for family in [libc::AF_INET, libc::AF_INET6] {
        for response in dump(family as u8, protocol::UDP, storage).context("cannot list UDP sockets")? {
            let id = &response.header.socket_id;
            let peer = Ends {
                addr: id.destination_address.into(),
                port: Port::new(id.destination_port),
                proto: protocol::UDP,
            };
            if astray(&peer, pairs_of(&response).as_ref(), is_pod, memory).is_none() {
                continue;
            }
            match destroy(&response, protocol::UDP) {
                Ok(()) => ended += 1,
                // It was closed or connected to someone else meanwhile.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => {}
                Err(error) => {
                    let to = std::net::SocketAddr::new(id.destination_address, id.destination_port);
                    return Err(error).context(format!("cannot end the socket that is connected to {to}"));
                }
            }
        }
    }
    Ok(ended)
}

fn question(family: u8, protocol: u8, id: SocketId) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol,
        extensions: netlink_packet_sock_diag::inet::ExtensionFlags::empty(),
        states: StateFlags::ESTABLISHED,
        socket_id: id,
    })
}

/// The connected sockets of this namespace, with the storage of the map.
fn dump(family: u8, protocol: u8, storage: BorrowedFd<'_>) -> io::Result<Vec<InetResponse>> {
    let id = if i32::from(family) == libc::AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    let mut request = NetlinkMessage::from(question(family, protocol, id));
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut bytes = netlink::serialize(request);
    let map = DefaultNla::new(attribute::REQUEST_MAP_FD, storage.as_raw_fd().to_ne_bytes().to_vec());
    append(&mut bytes, &DefaultNla::new(attribute::REQUEST_STORAGES | attribute::NESTED, emitted(&map)));
    let answers = loop {
        match netlink::exchange::<SockDiagMessage>(NETLINK_SOCK_DIAG, &bytes) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            result => break result?,
        }
    };
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            SockDiagMessage::InetResponse(response) => Some(*response),
            SockDiagMessage::InetRequest(_) | SockDiagMessage::UnixRequest(_) | SockDiagMessage::UnixResponse(_) => {
                None
            }
        })
        .collect())
}

fn emitted(attribute: &DefaultNla) -> Vec<u8> {
    use rtnetlink::packet_core::Emitable as _;
    let mut bytes = vec![0; attribute.buffer_len()];
    attribute.emit(&mut bytes);
    bytes
}

/// Adds an attribute to a serialised message.
fn append(message: &mut Vec<u8>, attribute: &DefaultNla) {
    message.extend(emitted(attribute));
    let len = u32::try_from(message.len()).unwrap_or(u32::MAX).to_ne_bytes();
    message.iter_mut().zip(len).for_each(|(byte, new)| *byte = new);
}

/// The value of the first attribute of a kind.
fn find(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(attributes).flatten().find(|found| found.kind() == kind).map(|found| found.value().to_vec())
}

/// What the socket was told of its peers.
fn pairs_of(response: &InetResponse) -> Option<Pairs> {
    let storages = response.nlas.iter().find_map(|nla| {
        let Nla::Other(other) = nla else { return None };
        let mut value = vec![0; other.value_len()];
        other.emit_value(&mut value);
        (other.kind() & !attribute::NESTED == attribute::STORAGES).then_some(value)
    })?;
    let value = find(&find(&storages, attribute::STORAGE)?, attribute::MAP_VALUE)?;
    (value.len() == size_of::<Pairs>()).then(|| sys::value_of(&value))
}

fn destroy(response: &InetResponse, protocol: u8) -> io::Result<()> {
    let id = response.header.socket_id.clone();
    let mut request = NetlinkMessage::from(SockDiagDestroy::new(question(response.header.family, protocol, id)));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    netlink::exchange::<SockDiagMessage>(NETLINK_SOCK_DIAG, &netlink::serialize(request)).map(drop)
}
