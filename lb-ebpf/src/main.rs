//! The kernel programs of Fairlead: one per hook, each only the adapter between the kernel and `lb-common`.
//!
//! On any other target than BPF this is an empty program, so that the workspace builds, tests and lints as a whole.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(all(target_arch = "bpf", feature = "program-log"))]
mod log;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod skb;
#[cfg(target_arch = "bpf")]
mod socket;
#[cfg(target_arch = "bpf")]
mod state;
#[cfg(target_arch = "bpf")]
mod tc;
#[cfg(target_arch = "bpf")]
mod told;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

/// Helpers that GPL-compatible programs alone may call are used (`bpf_skb_change_tail` and others are not restricted, but
/// the kernel wants an answer).
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // `cargo xtask check` finds no panic path in the object, so this is never linked.
    loop {}
}
