//! A socket buffer as `lb-common`'s packet.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM},
    helpers::generated::{bpf_l4_csum_replace, bpf_skb_change_tail, bpf_skb_pull_data, bpf_skb_store_bytes},
};
use lb_common::{
    addr::Addr,
    checksum::Difference,
    packet::{Covers, Packet, READ_LIMIT, Wire},
};

use crate::maps::IPV6_CHECKSUM_FLAG;

/// The socket buffer of a TC program.
pub struct Skb {
    pub skb: *mut __sk_buff,
}

impl Skb {
    /// First byte, and the one behind the last that can be read directly.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        // SAFETY: the context is valid as long as the program runs.
        unsafe { ((*self.skb).data as usize, (*self.skb).data_end as usize) }
    }

    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let (data, end) = self.bounds();
        // The verifier must see the bound, whatever the compiler has proven about the offset.
        let start = data + (core::hint::black_box(offset) & READ_LIMIT);
        if start + size_of::<T>() > end { None } else { Some(start as *mut T) }
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn len(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.skb).len as usize }
    }

    #[inline(always)]
    fn pull(&mut self, bytes: usize) {
        let bytes = core::hint::black_box(bytes) & READ_LIMIT;
        let (data, end) = self.bounds();
        if data + bytes > end {
            let len = self.len();
            // SAFETY: the context is valid. A failure leaves less to read, which readers notice.
            let _ = unsafe { bpf_skb_pull_data(self.skb, if len < bytes { len } else { bytes } as u32) };
        }
    }

    #[inline(always)]
    fn read<T: Wire>(&self, offset: usize) -> Option<T> {
        // SAFETY: `at` has checked the bounds; packets align their headers to 2, which is `Wire`'s most.
        Some(unsafe { *self.at::<T>(offset)? })
    }

    #[inline(always)]
    fn write<T: Wire>(&mut self, offset: usize, value: T) -> Option<()> {
        // SAFETY: as for `read`. The verifier makes the program unshare the buffer first.
        unsafe { *self.at::<T>(offset)? = value };
        Some(())
    }

    #[inline(always)]
    fn update_checksum(&mut self, offset: usize, difference: Difference, covers: Covers, udp: bool) -> Option<()> {
        let mut flags = if udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        match covers {
            Covers::PseudoHeader { v6: false } => flags |= u64::from(BPF_F_PSEUDO_HDR),
            Covers::PseudoHeader { v6: true } => flags |= u64::from(BPF_F_PSEUDO_HDR) | IPV6_CHECKSUM_FLAG.load(),
            Covers::Segment => {}
        }
        // SAFETY: the context is valid; the helper checks the offset.
        let result = unsafe { bpf_l4_csum_replace(self.skb, offset as u32, 0, u64::from(difference.wsum()), flags) };
        if result == 0 { Some(()) } else { None }
    }

    #[inline(always)]
    fn resize(&mut self, len: usize) -> Option<()> {
        // SAFETY: the context is valid; the helper checks the length.
        if unsafe { bpf_skb_change_tail(self.skb, len as u32, 0) } != 0 {
            return None;
        }
        self.pull(len);
        Some(())
    }

    #[inline(always)]
    fn write_v6(&mut self, offset: usize, addr: &Addr) -> Option<()> {
        if IPV6_CHECKSUM_FLAG.load() != 0 {
            return self.write(offset, lb_common::packet::halves(addr));
        }
        // Without BPF_F_IPV6 the checksum that a device computed over the whole packet must follow the address.
        // SAFETY: the context is valid, the helper checks the offset, and the address is on the stack or in a map.
        let result = unsafe {
            bpf_skb_store_bytes(
                self.skb,
                offset as u32,
                core::ptr::from_ref(addr).cast(),
                size_of::<Addr>() as u32,
                u64::from(BPF_F_RECOMPUTE_CSUM),
            )
        };
        if result == 0 { Some(()) } else { None }
    }
}
