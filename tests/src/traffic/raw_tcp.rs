//! An end of TCP that says only what it is told to say: the kernel of its namespace doesn't know the connection, and is kept from
//! saying so. In: a namespace, an address and port, flags. Out: the segments that arrive.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, ipproto, socket_with};

use crate::command;
use crate::netns::Netns;
use crate::traffic::packet;
use crate::traffic::socket::set_option;

/// Tells what we send from what the kernel sends.
const MARK: i32 = 0x7c9;

/// One end.
#[derive(Debug)]
pub struct RawTcp {
    socket: OwnedFd,
    local: SocketAddr,
}

/// A segment that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Who sent it, as it looks here.
    pub from: SocketAddr,
    /// Its flags.
    pub flags: u8,
    /// Its sequence number.
    pub sequence: u32,
}

impl RawTcp {
    /// Takes an address and port of the namespace, on which nobody may listen.
    pub fn new(netns: &Netns, local: SocketAddr) -> Result<Self> {
        let rules = format!(
            "add table inet raw-tcp
             add chain inet raw-tcp output {{ type filter hook output priority filter; }}
             add rule inet raw-tcp output meta mark != {MARK} tcp sport {} tcp flags & rst == rst drop\n",
            local.port()
        );
        command::run_with_input("ip", &["netns", "exec", netns.name(), "nft", "-f", "-"], &rules)?;
        let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = netns
            .run(|| socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::TCP)))
            .context("making a raw socket")?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_MARK, MARK)?;
        bind(&socket, &SocketAddr::new(local.ip(), 0)).with_context(|| format!("binding a raw socket to {local}"))?;
        Ok(Self { socket, local })
    }

    /// Its address and port.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Sends a segment without data.
    pub fn send(&self, to: SocketAddr, flags: u8, sequence: u32) -> io::Result<()> {
        let acknowledged = if flags & packet::ACK == 0 { 0 } else { 1 };
        let segment = packet::tcp(self.local, to, flags, sequence, acknowledged);
        rustix::net::sendto(&self.socket, &segment, SendFlags::empty(), &SocketAddr::new(to.ip(), 0))?;
        Ok(())
    }

    /// The next segment to this port; [`ErrorKind::TimedOut`] where none comes.
    pub fn receive(&self, within: Duration) -> Result<Segment> {
        let start = Instant::now();
        let mut buffer = [0; 2048];
        loop {
            let left = within.saturating_sub(start.elapsed());
            let limit = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            if poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&limit))? == 0 {
                return Err(io::Error::from(ErrorKind::TimedOut).into());
            }
            let (length, _, from) = rustix::net::recvfrom(&self.socket, &mut buffer, RecvFlags::DONTWAIT)?;
            let from = SocketAddr::try_from(from.context("a segment from nobody")?)?;
            let header = if self.local.is_ipv4() { usize::from(buffer[0] & 15) * 4 } else { 0 };
            let segment = buffer.get(header..length).context("a short packet")?;
            if let Some(segment) = self.read(from, segment)? {
                return Ok(segment);
            }
        }
    }

    /// Whether nothing comes for a while.
    pub fn hears_nothing(&self, for_: Duration) -> bool {
        self.receive(for_).is_err()
    }

    fn read(&self, from: SocketAddr, segment: &[u8]) -> Result<Option<Segment>> {
        let [s0, s1, d0, d1, q0, q1, q2, q3, _, _, _, _, _, flags, ..] = *segment else { return Ok(None) };
        if u16::from_be_bytes([d0, d1]) != self.local.port() {
            return Ok(None);
        }
        let from = SocketAddr::new(from.ip(), u16::from_be_bytes([s0, s1]));
        ensure!(packet::is_intact(from, self.local, segment), "a segment from {from} with a wrong checksum");
        Ok(Some(Segment { from, flags, sequence: u32::from_be_bytes([q0, q1, q2, q3]) }))
    }
}
