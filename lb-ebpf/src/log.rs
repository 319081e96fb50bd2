//! A line in the agent's log for each packet, for those who change the programs. In: what was decided. Out: records in the ring
//! buffer `AYA_LOGS`; below the level that the programs were loaded with, nothing, and the verifier takes the code out.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::{debug, info, trace};
use lb_common::{
    path::Hook,
    reason::{Reason, Verdict},
};

/// Says what became of a packet. The cause is a number, as the texts are pointers, which a program can't hold in a table:
/// `Reason::ALL` counts from 0.
#[inline(always)]
pub fn packet(ctx: &TcContext, direction: &str, hook: &Hook, reason: Reason) {
    let (device, cause) = (hook.device, reason as u32);
    match reason.verdict() {
        Verdict::Pass => trace!(ctx, "{} device {}: passed, cause {}", direction, device, cause),
        Verdict::Translate => debug!(ctx, "{} device {}: translated, cause {}", direction, device, cause),
        Verdict::Refuse => info!(ctx, "{} device {}: refused, cause {}", direction, device, cause),
        Verdict::Drop => info!(ctx, "{} device {}: dropped, cause {}", direction, device, cause),
    }
}
