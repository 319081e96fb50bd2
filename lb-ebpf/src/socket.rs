//! The socket hooks, for clients in the node's own network namespace (and, if so configured, in every one).

use aya_ebpf::{
    helpers::generated::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use lb_common::{
    addr::{Addr, Port},
    reason::Verdict,
    socket::{self, Ends, Pairs},
};

use crate::{
    maps::{NETNS_COOKIE, SOCKET_LB_ALL, SOCKETS},
    state::Maps,
};

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const AF_INET: u32 = 2;

/// Which fields of the context hold the address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

macro_rules! hooks {
    ($($(#[$doc:meta])* $name:ident = $run:ident($family:expr);)*) => {$(
        $(#[$doc])*
        #[cgroup_sock_addr($name)]
        pub fn $name(ctx: SockAddrContext) -> i32 {
            $run(&ctx, $family)
        }
    )*};
}

hooks! {
    /// connect(2) over IPv4.
    connect4 = connect(Family::V4);
    /// connect(2) over IPv6, also to a mapped IPv4 address.
    connect6 = connect(Family::V6);
    /// sendto(2) of an unconnected UDP socket.
    sendmsg4 = send(Family::V4);
    /// The same over IPv6.
    sendmsg6 = send(Family::V6);
    /// recvfrom(2): the source that the process sees.
    recvmsg4 = receive(Family::V4);
    /// The same over IPv6.
    recvmsg6 = receive(Family::V6);
    /// getpeername(2).
    getpeername4 = receive(Family::V4);
    /// The same over IPv6.
    getpeername6 = receive(Family::V6);
}

/// The address and port that the context names.
#[inline(always)]
fn named(ctx: &SockAddrContext, family: Family) -> (Addr, Port) {
    let sock = ctx.sock_addr;
    // SAFETY: the context is valid. IPv6 words are read one by one: the verifier refuses a copy of all four.
    unsafe {
        let port = Port { be: (*sock).user_port as u16 };
        let addr = match family {
            Family::V4 => Addr::from_v4_word((*sock).user_ip4),
            Family::V6 => {
                let words = &raw const (*sock).user_ip6;
                let word = |i: usize| words.cast::<u32>().add(i).read_volatile();
                Addr { words: [word(0), word(1), word(2), word(3)] }
            }
        };
        (addr, port)
    }
}

/// The address that the socket is bound to, or unspecified.
#[inline(always)]
fn bound(ctx: &SockAddrContext) -> Addr {
    // SAFETY: the kernel gives programs of this type their socket, whose fields are read word by word.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if (*sk).family == AF_INET {
            return Addr::from_v4_word((*sk).src_ip4);
        }
        let words = (&raw const (*sk).src_ip6).cast::<u32>();
        let word = |i: usize| words.add(i).read_volatile();
        Addr { words: [word(0), word(1), word(2), word(3)] }
    }
}

/// Makes the context name another address and port.
#[inline(always)]
fn rename(ctx: &SockAddrContext, family: Family, addr: &Addr, port: Port) {
    let sock = ctx.sock_addr;
    // SAFETY: as for reading.
    unsafe {
        (*sock).user_port = u32::from(port.be);
        match family {
            Family::V4 => (*sock).user_ip4 = addr.v4_word(),
            Family::V6 => {
                let words = (&raw mut (*sock).user_ip6).cast::<u32>();
                words.write_volatile(addr.words[0]);
                words.add(1).write_volatile(addr.words[1]);
                words.add(2).write_volatile(addr.words[2]);
                words.add(3).write_volatile(addr.words[3]);
            }
        }
    }
}

/// Whether the socket is one that is translated here.
#[inline(always)]
fn is_ours(ctx: &SockAddrContext) -> bool {
    SOCKET_LB_ALL.load() != 0 || is_node(ctx)
}

/// Whether the socket is in the node's own network namespace.
#[inline(always)]
fn is_node(ctx: &SockAddrContext) -> bool {
    // SAFETY: a helper that takes the context.
    unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) == NETNS_COOKIE.load() }
}

#[inline(always)]
fn ends(ctx: &SockAddrContext, family: Family) -> Ends {
    let (addr, port) = named(ctx, family);
    // SAFETY: the context is valid.
    Ends { addr, port, proto: unsafe { (*ctx.sock_addr).protocol } as u8 }
}

/// The socket's storage, made if need be.
#[inline(always)]
fn storage(ctx: &SockAddrContext) -> Option<&mut Pairs> {
    // SAFETY: the storage belongs to the socket, which outlives the call. New storage is zero.
    unsafe { SOCKETS.get_or_insert_ptr_mut(ctx, None).as_mut() }
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, family: Family) -> i32 {
    if !is_ours(ctx) {
        return ALLOW;
    }
    // SAFETY: a helper without arguments.
    let hash = unsafe { bpf_get_prandom_u32() };
    apply(ctx, family, hash, true)
}

#[inline(always)]
fn send(ctx: &SockAddrContext, family: Family) -> i32 {
    if !is_ours(ctx) {
        return ALLOW;
    }
    // SAFETY: a helper that takes the context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) };
    apply(ctx, family, (cookie.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32, false)
}

#[inline(always)]
fn apply(ctx: &SockAddrContext, family: Family, hash: u32, connects: bool) -> i32 {
    let mut ends = ends(ctx, family);
    let is_node = is_node(ctx);
    if !socket::may_be_translated(&ends, is_node, &Maps::of_socket(ctx.sock_addr)) {
        return ALLOW;
    }
    match translate(ctx, &mut ends, is_node, hash, connects) {
        Verdict::Translate => {
            rename(ctx, family, &ends.addr, ends.port);
            ALLOW
        }
        Verdict::Refuse => {
            // Linux 5.18; returning 0 alone is EPERM to the process.
            // SAFETY: a helper without pointers.
            let _ = unsafe { bpf_set_retval(-ECONNREFUSED) };
            REFUSE
        }
        // EPERM, as from a packet filter's drop on the way out. connect(2) sends no packet over which a filter could fail: what
        // follows it is dropped on its way out.
        Verdict::Drop if !connects => REFUSE,
        Verdict::Pass | Verdict::Drop => ALLOW,
    }
}

#[inline(never)]
fn translate(ctx: &SockAddrContext, ends: &mut Ends, is_node: bool, hash: u32, connects: bool) -> Verdict {
    let mut maps = Maps::of_socket(ctx.sock_addr);
    let Some(pairs) = storage(ctx) else { return Verdict::Pass };
    let bound = bound(ctx);
    let reason = socket::translate(ends, &bound, is_node, hash, connects, pairs, &mut maps);
    Maps::count(reason);
    reason.verdict()
}

#[inline(always)]
fn receive(ctx: &SockAddrContext, family: Family) -> i32 {
    if !is_ours(ctx) {
        return ALLOW;
    }
    // SAFETY: the storage belongs to the socket, which outlives the call.
    let Some(pairs) = (unsafe { SOCKETS.get_ptr_mut(ctx).as_ref() }) else { return ALLOW };
    let (addr, port) = named(ctx, family);
    if let Some((addr, port)) = socket::restore(&addr, port, pairs) {
        rename(ctx, family, &addr, port);
    }
    ALLOW
}
