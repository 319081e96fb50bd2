//! Session affinity: which endpoint a client was given last, and whether it still counts.
//!
//! In: what is remembered of a client, the endpoint's entry, the clock. Out: whether the client goes there again. Which client
//! that is, and when it is remembered, is said by the hooks ([`crate::path`], [`crate::socket`]).
//! (Source: `kube-proxy.md` §6.)

use crate::{addr::Addr, layout::Endpoint};

/// The API's default for `timeoutSeconds`, three hours.
pub const DEFAULT_TIMEOUT: u32 = 10_800;

/// Of whom an endpoint is remembered: a client and a Service port, whichever of its frontends the client connected to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AffinityKey {
    /// The client's address, or what [`node_client`] says.
    pub client: Addr,
    /// Id of the Service port.
    pub service: u32,
}

/// What is remembered: the endpoint, and when a connection last began.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// Id of the endpoint.
    pub endpoint_id: u32,
    /// Generation of that id.
    pub generation: u32,
    /// When the client's last connection began, in [`ticks`] of the programs' clock.
    pub seen: u32,
}

impl Affinity {
    /// Whether the client goes to this endpoint again: it is still the one remembered, of this Service port, in the set that
    /// the frontend chooses from (`eligible`, a bit of [`crate::layout::endpoint_flags`]), and the time is not over.
    #[must_use]
    #[inline(always)]
    pub const fn holds(&self, endpoint: &Endpoint, wanted: &Wanted, now: u32) -> bool {
        endpoint.generation == self.generation
            && endpoint.service == wanted.service
            && endpoint.flags & wanted.eligible != 0
            && self.age(now) <= ticks(wanted.timeout)
    }

    /// Ticks since the client's last connection began. Another CPU may have seen it a moment after `now`.
    #[must_use]
    #[inline(always)]
    pub const fn age(&self, now: u32) -> u32 {
        let age = now.wrapping_sub(self.seen);
        if age.cast_signed() < 0 { 0 } else { age }
    }
}

/// What a frontend asks of a remembered endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Id of the Service port.
    pub service: u32,
    /// Seconds for which a client is remembered; 0: no client is.
    pub timeout: u32,
    /// The bit of [`crate::layout::endpoint_flags`] that endpoints of the range have.
    pub eligible: u16,
}

/// Nanoseconds of the kernel's monotonic clock as ticks of 2^26 ns (67 ms): a timeout of one second is fifteen of them, and they
/// wrap around after nine years.
#[must_use]
#[inline(always)]
pub const fn ticks_of_nanoseconds(nanoseconds: u64) -> u32 {
    (nanoseconds >> 26) as u32
}

/// Seconds as ticks.
#[must_use]
#[inline(always)]
pub const fn ticks(seconds: u32) -> u32 {
    ticks_of_nanoseconds(seconds as u64 * 1_000_000_000)
}

/// Ticks as seconds.
#[must_use]
pub const fn seconds(ticks: u32) -> u64 {
    ((ticks as u64) << 26) / 1_000_000_000
}

/// The client that all sockets of the node are, in the family of `addr`: `::4:0:0:0:0` or `::6:0:0:0:0`, which no packet has as
/// its source. It stands for the source of a socket that is not bound: the kernel chooses that behind the hook, by the route to where
/// the hook sends the socket.
#[must_use]
#[inline(always)]
pub const fn node_client(addr: &Addr) -> Addr {
    let family: u32 = if addr.is_v4() { 4 } else { 6 };
    Addr { words: [0, family.to_be(), 0, 0] }
}

const _: () = {
    assert!(size_of::<AffinityKey>() == 20);
    assert!(size_of::<Affinity>() == 12);
};

#[cfg(feature = "user")]
mod pod {
    use super::{Affinity, AffinityKey};

    // SAFETY: `repr(C)`, integers only, and the size assertions above leave no room for padding.
    unsafe impl aya::Pod for AffinityKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Affinity {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::endpoint_flags;

    #[test]
    fn an_endpoint_is_remembered_while_it_is_the_same_eligible_and_in_time() {
        let endpoint = Endpoint {
            service: 7,
            generation: 3,
            flags: endpoint_flags::SERVING | endpoint_flags::IN_CLUSTER,
            ..Endpoint::default()
        };
        let wanted = Wanted { service: 7, timeout: DEFAULT_TIMEOUT, eligible: endpoint_flags::IN_CLUSTER };
        let affinity = Affinity { endpoint_id: 1, generation: 3, seen: u32::MAX - 5 };
        let later = |seconds: u32| affinity.seen.wrapping_add(ticks(seconds));
        for (name, endpoint, wanted, now, expected) in [
            ("just now", endpoint, wanted, later(0), true),
            ("to the last second, past the clock's end", endpoint, wanted, later(10_800), true),
            ("too late", endpoint, wanted, later(10_801), false),
            ("noted by another CPU a moment later", endpoint, wanted, affinity.seen.wrapping_sub(1), true),
            ("the longest timeout", endpoint, Wanted { timeout: 86_400, ..wanted }, later(86_400), true),
            ("the shortest", endpoint, Wanted { timeout: 1, ..wanted }, later(2), false),
            ("another use of the id", Endpoint { generation: 4, ..endpoint }, wanted, later(0), false),
            ("another Service's", Endpoint { service: 8, ..endpoint }, wanted, later(0), false),
            ("gone", Endpoint { flags: 0, ..endpoint }, wanted, later(0), false),
            (
                "not in the Local set",
                endpoint,
                Wanted { eligible: endpoint_flags::IN_LOCAL, ..wanted },
                later(0),
                false,
            ),
        ] {
            assert_eq!(affinity.holds(&endpoint, &wanted, now), expected, "{name}");
        }
    }

    #[test]
    fn the_node_is_one_client_in_each_family_and_no_packet_source() {
        let clients = [Addr::UNSPECIFIED_V4, Addr::UNSPECIFIED_V6].map(|addr| node_client(&addr));
        for client in clients {
            assert!(!client.is_v4() && !client.same(&Addr::UNSPECIFIED_V6) && !client.is_loopback());
        }
        assert!(!clients[0].same(&clients[1]));
    }

    #[test]
    fn seconds_and_ticks_are_one_to_the_other() {
        for seconds in [1, 10, 10_800, 86_400] {
            assert!(super::seconds(ticks(seconds)).abs_diff(u64::from(seconds)) <= 1);
        }
    }
}
