//! What sockets were told, for the agent to read: iterators over the UDP and the TCP sockets of the reader's network
//! namespace.
//!
//! Out, for each socket with storage: its cookie, then its [`Pairs`].

use aya_ebpf::{
    bindings::seq_file,
    helpers::generated::{bpf_get_socket_cookie, bpf_seq_write, bpf_sk_storage_get},
};
use lb_common::socket::Pairs;

use crate::maps::SOCKETS;

/// `struct bpf_iter_meta`, as far as it is used.
#[repr(C)]
pub struct Meta {
    seq: *mut seq_file,
}

/// `struct bpf_iter__udp` and `struct bpf_iter__tcp`, as far as they are used and alike.
#[repr(C)]
pub struct Context {
    meta: *const Meta,
    socket: *mut core::ffi::c_void,
}

/// UDP sockets.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/udp")]
extern "C" fn told_udp(ctx: *const Context) -> i32 {
    tell(ctx)
}

/// TCP sockets; the kernel has no storage for those that are only half made, or that only wait.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
extern "C" fn told_tcp(ctx: *const Context) -> i32 {
    tell(ctx)
}

#[inline(always)]
fn tell(ctx: *const Context) -> i32 {
    // SAFETY: the context is valid as long as the program runs, its socket until the call for this one ends. The storage is
    // read while its socket may change it: what a connected socket was told at connect(2) no longer changes.
    unsafe {
        let Context { meta, socket } = *ctx;
        if socket.is_null() {
            return 0;
        }
        let pairs = bpf_sk_storage_get((&raw const SOCKETS).cast_mut().cast(), socket, core::ptr::null_mut(), 0);
        if pairs.is_null() {
            return 0;
        }
        let cookie = bpf_get_socket_cookie(socket);
        let seq = (*meta).seq;
        bpf_seq_write(seq, (&raw const cookie).cast(), size_of::<u64>() as u32);
        bpf_seq_write(seq, pairs, size_of::<Pairs>() as u32);
    }
    0
}
