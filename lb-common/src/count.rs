//! What is counted of each Service port, on each CPU.
//!
//! In: what became of a packet or a socket. Out: counters that go up. A packet is counted where the side that it comes from
//! is rewritten back or forth: requests on their way in, answers on their way out, each once.

use crate::{reason::Reason, tables::State};

/// Counters of one Service port, found by its id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceCounters {
    /// Connections that began: of devices' packets, and of the node's own sockets.
    pub connections: u64,
    /// Packets from clients.
    pub request_packets: u64,
    /// Their bytes, from the IP header on.
    pub request_bytes: u64,
    /// Packets from endpoints.
    pub reply_packets: u64,
    /// Their bytes, from the IP header on.
    pub reply_bytes: u64,
}

impl ServiceCounters {
    /// What two CPUs have counted.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            connections: self.connections.wrapping_add(other.connections),
            request_packets: self.request_packets.wrapping_add(other.request_packets),
            request_bytes: self.request_bytes.wrapping_add(other.request_bytes),
            reply_packets: self.reply_packets.wrapping_add(other.reply_packets),
            reply_bytes: self.reply_bytes.wrapping_add(other.reply_bytes),
        }
    }
}

/// Counts a packet of a connection, if it is one. `service` is what [`crate::path::Scratch::flow`] names behind the hook.
#[inline(always)]
pub fn packet<S: State>(reason: Reason, service: u32, bytes: usize, state: &mut S) {
    if !matches!(reason, Reason::Established | Reason::Reply | Reason::NewFlow | Reason::MidFlow) {
        return;
    }
    let Some(counters) = state.service_counters(service) else { return };
    if matches!(reason, Reason::Reply) {
        counters.reply_packets = counters.reply_packets.wrapping_add(1);
        counters.reply_bytes = counters.reply_bytes.wrapping_add(bytes as u64);
        return;
    }
    if matches!(reason, Reason::NewFlow) {
        counters.connections = counters.connections.wrapping_add(1);
    }
    counters.request_packets = counters.request_packets.wrapping_add(1);
    counters.request_bytes = counters.request_bytes.wrapping_add(bytes as u64);
}

/// Counts a connection of a socket, whose packets nobody sees.
#[inline(always)]
pub fn connection<S: State>(service: u32, state: &mut S) {
    if let Some(counters) = state.service_counters(service) {
        counters.connections = counters.connections.wrapping_add(1);
    }
}

const _: () = assert!(size_of::<ServiceCounters>() == 40);

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, and the size assertion above leaves no room for padding.
unsafe impl aya::Pod for ServiceCounters {}
