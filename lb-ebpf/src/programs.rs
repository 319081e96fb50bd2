//! Entry points.

use crate::maps::*;
use aya_ebpf::{
    EbpfContext as _,
    macros::{cgroup_sock_addr, classifier},
    programs::{SockAddrContext, TcContext},
};

#[classifier]
pub fn ingress(ctx: TcContext) -> i32 {
    -1
}
#[classifier]
pub fn egress(_ctx: TcContext) -> i32 {
    let k = 0;
    core::hint::black_box((
        SLOTS.get(k),
        ENDPOINTS.get(k),
        SETTINGS.get(k),
        FRONTEND_BITS.get(k),
        ENDPOINT_BITS.get(k),
        COUNTERS.get(k),
        LINK_HEADER.load(),
        MASQUERADE_FIRST.load(),
        MASQUERADE_PORTS.load(),
        NETNS_COOKIE.load(),
        SOCKET_LB_ALL.load(),
        IPV6_CHECKSUM_FLAG.load(),
    ));
    let a = [1u32; 12];
    unsafe {
        core::hint::black_box((
            FRONTENDS.get(&*a.as_ptr().cast::<lb_common::layout::FrontendKey>()),
            NODE_ADDRESSES.get(&*a.as_ptr().cast::<lb_common::addr::Addr>()),
            DEVICES.get(&1),
            FLOWS.get(&*a.as_ptr().cast::<lb_common::flow::FlowKey>()),
            NEW_FLOWS.get(&*a.as_ptr().cast::<lb_common::flow::FlowKey>()),
            FRAGMENTS.get(&*a.as_ptr().cast::<lb_common::flow::FragmentKey>()),
        ));
        core::hint::black_box((
            LOCAL_CIDRS.get(&*a.as_ptr().cast()),
            SOURCE_RANGES.get(&*a.as_ptr().cast()),
            SERVICE_CIDRS.get(&*a.as_ptr().cast()),
        ));
    }
    -1
}
macro_rules! hook { ($($n:ident)*) => { $(#[cgroup_sock_addr($n)] pub fn $n(ctx: SockAddrContext) -> i32 { core::hint::black_box(unsafe { SOCKETS.get_ptr_mut(&ctx) }); 1 })* } }
hook!(connect4 connect6 sendmsg4 sendmsg6 recvmsg4 recvmsg6 getpeername4 getpeername6);
