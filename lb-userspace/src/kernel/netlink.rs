//! Questions to netlink that are answered at once, among them rtnetlink's: dumps, clsact qdiscs, filters.
//!
//! In: an ifindex of the current network namespace. Out: messages, or nothing where what is to be removed is gone already.
//! Each question has a socket of its own; nothing is awaited.

use std::io;

use anyhow::{Context as _, Result};
use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage,
        NetlinkPayload, NetlinkSerializable,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// Sends a request and collects its answers. An interrupted dump is asked for again.
pub fn request(message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
    loop {
        match request_once(message.clone(), flags) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            result => return result,
        }
    }
}

fn request_once(message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | flags;
    exchange(NETLINK_ROUTE, &serialize(request))
}

/// The bytes of a message.
pub fn serialize<T: NetlinkSerializable>(mut message: NetlinkMessage<T>) -> Vec<u8> {
    message.header.sequence_number = 1;
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    buffer
}

/// Sends one message and collects its answers; EINTR where a dump is not of one moment.
pub fn exchange<T: NetlinkDeserializable>(protocol: isize, message: &[u8]) -> io::Result<Vec<T>> {
    /// The dump is not of one moment (`NLM_F_DUMP_INTR`).
    const INTERRUPTED: u16 = 0x10;
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(message, 0)?;
    let mut answers = Vec::new();
    let mut interrupted = false;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while rest.len() >= 16 {
            let answer = NetlinkMessage::<T>::deserialize(rest).map_err(io::Error::other)?;
            interrupted |= answer.header.flags & INTERRUPTED != 0;
            let len = (answer.header.length as usize).next_multiple_of(4).max(16);
            match answer.payload {
                NetlinkPayload::Done(_) if interrupted => return Err(io::Error::from_raw_os_error(libc::EINTR)),
                NetlinkPayload::Done(_) => return Ok(answers),
                NetlinkPayload::Error(error) => match error.code {
                    None => return Ok(answers),
                    Some(code) => return Err(io::Error::from_raw_os_error(code.get().abs())),
                },
                NetlinkPayload::InnerMessage(message) => answers.push(message),
                NetlinkPayload::Noop | NetlinkPayload::Overrun(_) | _ => {}
            }
            rest = rest.get(len..).unwrap_or_default();
        }
    }
}

/// Everything of one kind.
pub fn dump(message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    request(message, NLM_F_DUMP)
}

fn message(ifindex: u32, parent: TcHandle) -> Result<TcMessage> {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(ifindex).context("an ifindex beyond i32")?;
    message.header.parent = parent;
    Ok(message)
}

fn clsact(ifindex: u32) -> Result<TcMessage> {
    let mut message = message(ifindex, TcHandle::CLSACT)?;
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    Ok(message)
}

const fn parent(ingress: bool) -> TcHandle {
    let minor = if ingress { TcHandle::MIN_INGRESS } else { TcHandle::MIN_EGRESS };
    TcHandle { major: TcHandle::CLSACT.major, minor }
}

/// Adds the clsact qdisc; false if the device has it.
pub fn add_clsact(ifindex: u32) -> Result<bool> {
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    match request(RouteNetlinkMessage::NewQueueDiscipline(clsact(ifindex)?), flags) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).context("cannot add the clsact qdisc"),
    }
}

/// Removes the clsact qdisc unless someone's filters are in it.
pub fn remove_clsact_if_unused(ifindex: u32) -> Result<()> {
    for ingress in [true, false] {
        if !filters(ifindex, ingress)?.is_empty() {
            return Ok(());
        }
    }
    match request(RouteNetlinkMessage::DelQueueDiscipline(clsact(ifindex)?), NLM_F_ACK) {
        Err(error) if !is_gone(&error) => Err(error).context("cannot remove the clsact qdisc"),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Removes one filter.
pub fn remove_filter(ifindex: u32, ingress: bool, priority: u16, handle: u32) -> Result<()> {
    let mut message = message(ifindex, parent(ingress))?;
    message.header.handle = handle.into();
    message.header.info = u32::from(priority) << 16;
    match request(RouteNetlinkMessage::DelTrafficFilter(message), NLM_F_ACK) {
        Err(error) if !is_gone(&error) => Err(error).context("cannot remove our filter"),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// A filter of the clsact qdisc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Its preference.
    pub priority: u16,
    /// Its handle.
    pub handle: u32,
    /// Its kind, with the program's name if it is one: `bpf cil_from_netdev`, `flower`.
    pub name: String,
}

impl Filter {
    #[expect(clippy::wildcard_enum_match_arm, reason = "filters have attributes that do not matter here")]
    fn new(message: TcMessage) -> Self {
        let mut name = String::new();
        let mut program = None;
        for attribute in message.attributes {
            match attribute {
                TcAttribute::Kind(kind) => name = kind,
                TcAttribute::Options(options) => {
                    program = options.into_iter().find_map(|option| match option {
                        TcOption::Bpf(TcFilterBpfOption::ProgName(program)) => Some(program),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        if let Some(program) = program {
            name = format!("{name} {program}");
        }
        let priority = u16::try_from(message.header.info >> 16).unwrap_or(0);
        Self { priority, handle: u32::from(message.header.handle), name }
    }
}

/// The clsact filters of a device, in the order in which packets meet them.
pub fn filters(ifindex: u32, ingress: bool) -> Result<Vec<Filter>> {
    let answers = match dump(RouteNetlinkMessage::GetTrafficFilter(message(ifindex, parent(ingress))?)) {
        Ok(answers) => answers,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error).context("cannot list the device's filters"),
    };
    Ok(answers
        .into_iter()
        .filter_map(|answer| {
            let RouteNetlinkMessage::NewTrafficFilter(filter) = answer else { return None };
            // Handle 0 stands for the preference itself.
            let filter = Filter::new(filter);
            (filter.handle != 0).then_some(filter)
        })
        .collect())
}

/// The device, its qdisc or its filter is not there.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL))
}
