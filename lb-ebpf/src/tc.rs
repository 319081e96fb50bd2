//! The TC hooks.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::{bpf_redirect, bpf_redirect_neigh},
    macros::classifier,
    programs::TcContext,
};
use lb_common::{
    count,
    packet::Packet as _,
    path::{self, Action, Hook, Scratch},
    reason::{Reason, Verdict},
    tables::State as _,
};

use crate::{
    maps::{LINK_HEADER, NETNS_COOKIE, REPLY_MARK, REPLY_MARK_MASK, SCRATCH},
    skb::Skb,
    state::Maps,
};

/// So many bytes must be readable for a TCP packet without options.
const HEADERS_V4: usize = 20 + 20;
const HEADERS_V6: usize = 40 + 20;

/// `pkt_type` of a frame for this host (`include/uapi/linux/if_packet.h`).
const PACKET_HOST: u32 = 0;
/// `pkt_type` of a frame for another host.
const PACKET_OTHERHOST: u32 = 3;

/// Bits of `tc_index` that are ours. Cilium has flags in the five below (`TC_INDEX_F_*` in its `bpf/lib/common.h`).
const HINT: u32 = 0xffe0;
/// Of these, what says that egress has changed the packet for the last time, on its way from a bridge or a bond to a port; without it,
/// ingress has translated the packet.
const FINISHED: u32 = 0x20;

/// What a packet has in [`HINT`] that ingress has translated. It survives until the packet leaves, unless another classifier has a use for
/// the field, and also on the way to another node of this kernel (kind): each has its own, but for one pair in 1,023.
#[inline(always)]
fn translated() -> u32 {
    // Cookies count up: multiplied, their lower bits change the upper ones (Knuth, volume 3, section 6.4).
    let own = (NETNS_COOKIE.load() as u32).wrapping_mul(0x9e37_79b1) >> 16 & HINT & !FINISHED;
    if own == 0 { HINT & !FINISHED } else { own }
}

#[inline(always)]
fn set_hint(skb: *mut __sk_buff, hint: u32) {
    // SAFETY: the context is valid as long as the program runs.
    unsafe { (*skb).tc_index = (*skb).tc_index & !HINT | hint };
}

/// Packets that enter the host.
#[classifier]
pub fn ingress(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let Some(hook) = hook(skb) else { return TC_ACT_UNSPEC };
    if !is_for_host(skb, &hook) {
        Maps::count(Reason::NotForHost);
        return TC_ACT_UNSPEC;
    }
    if hook.finished {
        // It was here before, and comes back.
        set_hint(skb, 0);
    }
    let mut packet = Skb { skb };
    packet.pull(hook.link_header + if hook.v6 { HEADERS_V6 } else { HEADERS_V4 });
    let Some(scratch) = scratch() else { return TC_ACT_UNSPEC };
    if REPLY_MARK_MASK.load() != 0 && path::answers_outside(&packet, &hook, scratch, &mut Maps::of_packet(skb)) {
        // SAFETY: the context is valid as long as the program runs.
        unsafe { (*skb).mark = (*skb).mark & !REPLY_MARK_MASK.load() | REPLY_MARK.load() };
    }
    let action = path::ingress(&mut packet, &hook, scratch, &mut Maps::of_packet(skb));
    if action.reason().verdict() == Verdict::Translate {
        set_hint(skb, translated());
    }
    #[cfg(feature = "program-log")]
    crate::log::packet(&ctx, "in", &hook, action.reason());
    finish(action, &hook, skb)
}

/// Packets that leave the host.
#[classifier]
pub fn egress(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let Some(hook) = hook(skb) else { return TC_ACT_UNSPEC };
    let mut packet = Skb { skb };
    packet.pull(hook.link_header + if hook.v6 { HEADERS_V6 } else { HEADERS_V4 });
    let Some(scratch) = scratch() else { return TC_ACT_UNSPEC };
    let action = path::egress(&mut packet, &hook, scratch, &mut Maps::of_packet(skb));
    if matches!(action.reason(), Reason::Reply | Reason::Masqueraded | Reason::IcmpError) {
        set_hint(skb, translated() | FINISHED);
    }
    #[cfg(feature = "program-log")]
    crate::log::packet(&ctx, "out", &hook, action.reason());
    finish(action, &hook, skb)
}

/// This CPU's memory to work in. TC programs of one hook don't interrupt each other.
#[inline(always)]
fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: the map's value, of this CPU alone; the kernel makes it zero, which is a valid value.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// Where the packet is, if it is IP. A VLAN's packet is the VLAN device's.
#[inline(always)]
fn hook(skb: *mut __sk_buff) -> Option<Hook> {
    const IPV4: u32 = 0x0800_u16.to_be() as u32;
    const IPV6: u32 = 0x86dd_u16.to_be() as u32;
    // SAFETY: the context is valid as long as the program runs.
    let (protocol, vlan, device) = unsafe { ((*skb).protocol, (*skb).vlan_present, (*skb).ifindex) };
    let v6 = match protocol {
        IPV4 => false,
        IPV6 => true,
        _ => return None,
    };
    if vlan != 0 {
        return None;
    }
    // SAFETY: as above.
    let (hint, from_node) = unsafe { ((*skb).tc_index & HINT, (*skb).ingress_ifindex == 0) };
    let (translated, finished) = (hint == translated(), hint == translated() | FINISHED);
    Some(Hook { device, link_header: LINK_HEADER.load() as usize, v6, translated, finished, from_node })
}

/// Whether a frame is this host's: by its type, or on a port of a bridge by the bridge's MAC address.
#[inline(always)]
fn is_for_host(skb: *mut __sk_buff, hook: &Hook) -> bool {
    // SAFETY: as above.
    match unsafe { (*skb).pkt_type } {
        PACKET_HOST => true,
        PACKET_OTHERHOST => is_for_bridge(skb, hook),
        _ => false,
    }
}

#[inline(never)]
fn is_for_bridge(skb: *mut __sk_buff, hook: &Hook) -> bool {
    let maps = Maps::of_packet(skb);
    let Some(device) = maps.device(hook.device) else { return false };
    if device.bridge == 0 {
        return false;
    }
    let Some([a, b, c]) = (Skb { skb }).read::<[u16; 3]>(0) else { return false };
    let [d, e, f, g, h, i, _, _] = device.bridge_mac;
    a == u16::from_ne_bytes([d, e]) && b == u16::from_ne_bytes([f, g]) && c == u16::from_ne_bytes([h, i])
}

/// The verdict for the kernel. What is not ours, and what we have changed, goes on to the programs behind us.
#[inline(always)]
fn finish(action: Action, hook: &Hook, skb: *mut __sk_buff) -> i32 {
    // What is no Service's is most of the traffic, and others count it.
    if action.reason() != Reason::NotService {
        tally(skb, action.reason());
    }
    match action {
        Action::Next(_) => TC_ACT_UNSPEC,
        Action::Drop(_) => TC_ACT_SHOT,
        // SAFETY: helpers without pointers.
        Action::Answer(_) => (unsafe { bpf_redirect(hook.device, 0) }) as i32,
        // SAFETY: the parameters may be absent (Linux 5.10).
        Action::Bridge(bridge, _) => (unsafe { bpf_redirect_neigh(bridge, core::ptr::null_mut(), 0, 0) }) as i32,
    }
}

/// Counts a packet by its reason, and for its Service port. Apart, and finding everything anew, for the stack's sake.
#[inline(never)]
fn tally(skb: *mut __sk_buff, reason: Reason) {
    Maps::count(reason);
    let Some(scratch) = scratch() else { return };
    let bytes = (Skb { skb }).len().wrapping_sub(LINK_HEADER.load() as usize);
    count::packet(reason, scratch.flow.service, bytes, &mut Maps::of_packet(skb));
}
