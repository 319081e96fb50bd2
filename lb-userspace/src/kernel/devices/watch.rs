//! Following the links and addresses of the network namespace.
//!
//! In: rtnetlink's dumps and events. Out: a complete [`Snapshot`] whenever something has changed. Lost events (ENOBUFS) mean
//! a new dump.

use std::{fs, net::IpAddr, time::Duration};

use anyhow::{Context as _, Result};
use futures::{FutureExt as _, StreamExt as _, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    MulticastGroup, new_multicast_connection,
    packet_core::{NLM_F_ACK, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
        link::{InfoBridge, InfoData, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    },
    sys::{AsyncSocket as _, SocketAddr},
};
use tokio::{task::JoinHandle, time::timeout};
use tracing::warn;

use super::{Address, Link, LinkLayer, Snapshot, kind};
use crate::kernel::netlink;

/// Room for events, in bytes: a thousand devices that come at once.
const BUFFER: usize = 4 << 20;
/// The kernel tells nobody when br_netfilter is loaded or switched (inotify is silent about sysctls, and so is netlink). It is
/// looked at this often, at the price of two failing or short reads, and whenever a device changes.
const BRIDGE_NETFILTER_INTERVAL: Duration = Duration::from_secs(1);

/// A subscription to changes.
#[derive(Debug)]
pub struct Watch {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    connection: JoinHandle<()>,
    snapshot: Snapshot,
    births: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Watch {
    /// Subscribes in the thread's network namespace. Within a Tokio runtime.
    pub fn open() -> Result<Self> {
        Self::with_buffer(BUFFER)
    }

    /// The same, with room for this many bytes of events.
    pub fn with_buffer(bytes: usize) -> Result<Self> {
        let (mut connection, _, messages) =
            new_multicast_connection(&[MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])
                .context("cannot subscribe to rtnetlink")?;
        connection.socket_mut().socket_mut().set_rx_buf_sz(i32::try_from(bytes)?).context("cannot size the buffer")?;
        let connection = tokio::spawn(connection);
        let mut watch = Self { messages, connection, snapshot: Snapshot::default(), births: 0 };
        watch.scan()?;
        Ok(watch)
    }

    /// The state that is known.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Waits for a change. Losing the future loses no change.
    pub async fn changed(&mut self) -> Result<&Snapshot> {
        loop {
            let mut changed = self.set_bridge_netfilter();
            if !changed {
                match timeout(BRIDGE_NETFILTER_INTERVAL, self.messages.next()).await {
                    Ok(Some((message, _))) => changed = self.take(message.payload)?,
                    Ok(None) => anyhow::bail!("the subscription to rtnetlink has ended"),
                    Err(_) => continue,
                }
            }
            while let Some(Some((message, _))) = self.messages.next().now_or_never() {
                changed |= self.take(message.payload)?;
            }
            if changed {
                return Ok(&self.snapshot);
            }
        }
    }

    fn set_bridge_netfilter(&mut self) -> bool {
        // Absent: br_netfilter is not loaded.
        let read = |name: &str| {
            fs::read_to_string(format!("/proc/sys/net/bridge/bridge-nf-call-{name}"))
                .is_ok_and(|text| text.trim() != "0")
        };
        let now = [read("iptables"), read("ip6tables")];
        std::mem::replace(&mut self.snapshot.bridge_netfilter, now) != now
    }

    fn scan(&mut self) -> Result<()> {
        self.snapshot = Snapshot::default();
        self.set_bridge_netfilter();
        let links = netlink::dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).context("cannot list links")?;
        let addresses = netlink::dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))
            .context("cannot list addresses")?;
        for message in links.into_iter().chain(addresses) {
            self.set(message);
        }
        Ok(())
    }

    fn take(&mut self, payload: NetlinkPayload<RouteNetlinkMessage>) -> Result<bool> {
        match payload {
            NetlinkPayload::InnerMessage(message) => Ok(self.set(message)),
            NetlinkPayload::Overrun(_) => {
                warn!("events of rtnetlink were lost; listing links and addresses again");
                self.scan()?;
                Ok(true)
            }
            NetlinkPayload::Done(_) | NetlinkPayload::Error(_) | NetlinkPayload::Noop | _ => Ok(false),
        }
    }

    /// Takes a message in. Answers whether it changed anything.
    #[expect(clippy::wildcard_enum_match_arm, reason = "every other message is about something else")]
    fn set(&mut self, message: RouteNetlinkMessage) -> bool {
        match message {
            RouteNetlinkMessage::NewLink(message) => {
                let Some(mut link) = link(message) else { return false };
                if link.peer == Some(0) {
                    // Told in the middle of making the pair. The answer comes when that is done.
                    link.peer = ask(link.ifindex).and_then(|link| link.peer).filter(|peer| *peer != 0);
                }
                let before = self.snapshot.links.get(&link.ifindex);
                link.birth = before.map_or_else(
                    || {
                        self.births += 1;
                        self.births
                    },
                    |before| before.birth,
                );
                let changed = before != Some(&link);
                self.snapshot.links.insert(link.ifindex, link);
                changed
            }
            // Of a bridge port that leaves its bridge, the bridge says the same in its own family.
            RouteNetlinkMessage::DelLink(message) if message.header.interface_family == AddressFamily::Unspec => {
                self.snapshot.addresses.retain(|address| address.ifindex != message.header.index);
                self.snapshot.links.remove(&message.header.index).is_some()
            }
            RouteNetlinkMessage::NewAddress(message) => {
                let Some(new) = address(&message) else { return false };
                let known = &mut self.snapshot.addresses;
                match known.iter_mut().find(|known| (known.ifindex, known.addr) == (new.ifindex, new.addr)) {
                    Some(known) => std::mem::replace(known, new) != new,
                    None => {
                        known.push(new);
                        true
                    }
                }
            }
            RouteNetlinkMessage::DelAddress(message) => {
                let Some(gone) = address(&message) else { return false };
                let before = self.snapshot.addresses.len();
                self.snapshot.addresses.retain(|known| (known.ifindex, known.addr) != (gone.ifindex, gone.addr));
                before != self.snapshot.addresses.len()
            }
            _ => false,
        }
    }
}

/// One link, as it is now.
fn ask(ifindex: u32) -> Option<Link> {
    let mut question = LinkMessage::default();
    question.header.index = ifindex;
    let answers = netlink::request(RouteNetlinkMessage::GetLink(question), NLM_F_ACK).ok()?;
    answers.into_iter().find_map(|answer| {
        let RouteNetlinkMessage::NewLink(message) = answer else { return None };
        link(message)
    })
}

#[expect(clippy::wildcard_enum_match_arm, reason = "links have many attributes that do not matter here")]
fn link(message: LinkMessage) -> Option<Link> {
    if message.header.interface_family != AddressFamily::Unspec {
        return None;
    }
    let mut link = Link {
        ifindex: message.header.index,
        name: String::new(),
        kind: None,
        layer: LinkLayer::new(message.header.link_layer_type.into()),
        up: message.header.flags.contains(LinkFlags::Up),
        master: None,
        mac: None,
        peer: None,
        lower: None,
        nf_call: [false; 2],
        birth: 0,
    };
    let mut elsewhere = false;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Controller(master) => link.master = Some(master).filter(|master| *master != 0),
            LinkAttribute::Address(mac) => link.mac = mac.try_into().ok(),
            LinkAttribute::Link(peer) => link.peer = Some(peer),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(infos) => infos.into_iter().for_each(|info| take_info(&mut link, info)),
            _ => {}
        }
    }
    // VLAN, macvlan and tunnels name their lower device in the same attribute.
    let is_one_of = |kinds: &[&str]| link.kind.as_deref().is_some_and(|kind| kinds.contains(&kind));
    if is_one_of(&kind::SHARING) {
        link.lower = link.peer;
    }
    if elsewhere || !is_one_of(&kind::PAIRS) {
        link.peer = None;
    }
    (!link.name.is_empty()).then_some(link)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "links have many attributes that do not matter here")]
fn take_info(link: &mut Link, info: LinkInfo) {
    match info {
        LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
        LinkInfo::Data(InfoData::Bridge(settings)) => {
            for setting in settings {
                match setting {
                    InfoBridge::NfCallIpTables(on) => link.nf_call[0] = on,
                    InfoBridge::NfCallIp6Tables(on) => link.nf_call[1] = on,
                    _ => {}
                }
            }
        }
        _ => {}
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "addresses have attributes that do not matter here")]
fn address(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut addr, mut flags) = (None, None, AddressFlags::empty());
    let header = &message.header;
    for attribute in &message.attributes {
        match attribute {
            // Of a point-to-point device, `Address` is the other end's.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => addr = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let addr: IpAddr = local.or(addr)?;
    let bad = AddressFlags::Deprecated | AddressFlags::Tentative | AddressFlags::Dadfailed;
    Some(Address {
        ifindex: header.index,
        addr,
        global: header.scope == AddressScope::Universe,
        secondary: flags.contains(AddressFlags::Secondary) || header.flags.contains(AddressHeaderFlags::Secondary),
        unusable: flags.intersects(bad),
    })
}
