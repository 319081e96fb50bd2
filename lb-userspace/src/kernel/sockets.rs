//! Ends connected sockets that speak to nobody any more, so that their processes connect anew (SOCK_DIAG).
//!
//! In: the tables, the storage that the socket programs keep. Out: sockets with ECONNABORTED. Which ones is said by
//! [`astray`]; never unconnected ones, never those of programs that are not ours.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Read as _},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
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
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags},
    message::SockDiagDestroy,
};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage},
    sys::protocols::NETLINK_SOCK_DIAG,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{netlink, object::Programs, sys};
use crate::image::{Write, service_name};

/// Where the namespaces of pods have names.
const NAMED: &str = "/run/netns";

/// The states in which one side may still wait for the other; UDP has the first only.
const CONNECTED: StateFlags = StateFlags::ESTABLISHED
    .union(StateFlags::SYN_SENT)
    .union(StateFlags::FIN_WAIT1)
    .union(StateFlags::FIN_WAIT2)
    .union(StateFlags::CLOSE_WAIT);

/// Whether writes may have led connected sockets astray: an endpoint that is gone, another frontend or other addresses for NodePorts.
/// `tcp`: whether TCP connections end with their endpoint. `memory` is what the tables hold once the writes are done.
#[must_use]
pub fn concerns(writes: &[Write], tcp: bool, memory: &Memory) -> bool {
    let udp = |key: &FrontendKey| key.proto == protocol::UDP;
    writes.iter().any(|write| match write {
        Write::Frontend(key, _) => udp(key),
        // A Service that goes as a whole takes its frontends along: its endpoints' `service` names nothing any more.
        Write::RemoveFrontend(key) => udp(key) || tcp && key.proto == protocol::TCP,
        Write::Endpoint(_, endpoint) if endpoint.flags == 0 => {
            let name = memory.services.get(&endpoint.service).and_then(service_name);
            name.is_some_and(|name| name.ends_with("/UDP") || tcp && name.ends_with("/TCP"))
        }
        Write::NodeAddress(..) | Write::RemoveNodeAddress(_) => true,
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
        | Write::Device(..)
        | Write::RemoveDevice(_)
        | Write::Settings(_) => false,
    })
}

/// Ends the sockets of this network namespace that are astray; with `pods`, also those of every other one that can be
/// found, and with `tcp` TCP connections too. Answers how many. One namespace that fails does not save the others.
pub fn end_astray(programs: &mut Programs, pods: bool, tcp: bool, memory: &Memory) -> Result<usize> {
    let mut ended = end_here(programs, false, tcp, memory)?;
    if pods {
        // A thread of its own, since it does not come back from where it goes.
        let others = std::thread::scope(|scope| scope.spawn(|| end_elsewhere(programs, tcp, memory)).join());
        ended += others.map_err(|_| anyhow!("the thread that enters namespaces ended early"))??;
    }
    Ok(ended)
}

fn end_elsewhere(programs: &mut Programs, tcp: bool, memory: &Memory) -> Result<usize> {
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
        match entered.map_err(anyhow::Error::from).and_then(|()| end_here(programs, true, tcp, memory)) {
            Ok(here) => ended += here,
            Err(error) => failed = Some(error.context(format!("network namespace {}", path.display()))),
        }
    }
    failed.map_or(Ok(ended), Err)
}

fn end_here(programs: &mut Programs, is_pod: bool, tcp: bool, memory: &Memory) -> Result<usize> {
    let mut ended = 0;
    let protocols = [Some((protocol::UDP, "UDP")), tcp.then_some((protocol::TCP, "TCP"))];
    for (proto, name) in protocols.into_iter().flatten() {
        let told = told(programs, proto)?;
        if told.is_empty() && (is_pod || proto == protocol::TCP) {
            continue;
        }
        for family in [libc::AF_INET, libc::AF_INET6] {
            for socket in dump(family as u8, proto).with_context(|| format!("cannot list {name} sockets"))? {
                let id = &socket.header.socket_id;
                let peer = Ends { addr: id.destination_address.into(), port: Port::new(id.destination_port), proto };
                let pairs = told.get(&u64::from_ne_bytes(id.cookie));
                if astray(&peer, pairs, is_pod, memory).is_some() {
                    ended += usize::from(end(&socket, proto)?);
                }
            }
        }
    }
    Ok(ended)
}

/// Ends a socket, unless it was closed or connected to someone else meanwhile.
fn end(socket: &InetResponse, proto: u8) -> Result<bool> {
    match destroy(socket, proto) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
        Err(error) => {
            let id = &socket.header.socket_id;
            let to = std::net::SocketAddr::new(id.destination_address, id.destination_port);
            Err(error).context(format!("cannot end the socket that is connected to {to}"))
        }
    }
}

/// What the sockets of this namespace were told, by cookie.
fn told(programs: &mut Programs, proto: u8) -> Result<BTreeMap<u64, Pairs>> {
    const COOKIE: usize = size_of::<u64>();
    let mut bytes = Vec::new();
    programs.told(proto == protocol::TCP)?.read_to_end(&mut bytes).context("cannot read what sockets were told")?;
    let records = bytes.chunks_exact(COOKIE + size_of::<Pairs>()).map(|record| record.split_at(COOKIE));
    Ok(records.map(|(cookie, pairs)| (sys::value_of(cookie), sys::value_of(pairs))).collect())
}

fn question(family: u8, protocol: u8, socket_id: SocketId) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol,
        extensions: ExtensionFlags::empty(),
        states: CONNECTED,
        socket_id,
    })
}

/// The connected sockets of this namespace.
fn dump(family: u8, protocol: u8) -> io::Result<Vec<InetResponse>> {
    let id = if i32::from(family) == libc::AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    let mut request = NetlinkMessage::from(question(family, protocol, id));
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let bytes = netlink::serialize(request);
    let answers = loop {
        match netlink::exchange(NETLINK_SOCK_DIAG, &bytes) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            result => break result?,
        }
    };
    let sockets = answers.into_iter().filter_map(|answer| match answer {
        SockDiagMessage::InetResponse(response) => Some(*response),
        SockDiagMessage::InetRequest(_) | SockDiagMessage::UnixRequest(_) | SockDiagMessage::UnixResponse(_) => None,
    });
    Ok(sockets.collect())
}

fn destroy(socket: &InetResponse, protocol: u8) -> io::Result<()> {
    let question = question(socket.header.family, protocol, socket.header.socket_id.clone());
    let mut request = NetlinkMessage::from(SockDiagDestroy::new(question));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    netlink::exchange::<SockDiagMessage>(NETLINK_SOCK_DIAG, &netlink::serialize(request)).map(drop)
}
