//! Connections that are older than the first start: the host's conntrack sends them on, not we.
//!
//! In: the host's conntrack, the programs' clock. Out: until when such connections may exist. Pinned with the settings, so
//! that it survives restarts; a reboot, which ends all connections, ends the pins too.

use std::fs;

use lb_common::flow::IDLE_TCP;
use rustix::time::{ClockId, clock_gettime};

/// The programs' clock: `bpf_ktime_get_coarse_ns` is CLOCK_MONOTONIC, and they count units of 2^30 ns.
pub fn programs_now() -> u32 {
    let time = clock_gettime(ClockId::Monotonic);
    let nanoseconds =
        u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0);
    (nanoseconds >> 30) as u32
}

/// Until when connections may exist that are older than this moment, by the programs' clock: as long as conntrack remembers one
/// without a packet (conntrack.tcpEstablishedTimeout). 0 where it knows none.
pub fn older_connections_until() -> u32 {
    let known = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
    match known.ok().and_then(|text| text.trim().parse::<u64>().ok()) {
        None | Some(0) => 0,
        Some(_) => programs_now().wrapping_add(IDLE_TCP).max(1),
    }
}
