//! Someone else's programs on a device: count every packet, then return what they are told to. In: a namespace, a device. Out: how many
//! packets they saw. Attached until dropped.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::netns::Netns;

/// On which side of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where packets enter.
    Ingress,
    /// Where packets leave.
    Egress,
}

/// Where in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// TCX, before all that are there.
    TcxFirst,
    /// TCX, behind all that are there.
    TcxLast,
    /// A filter of the clsact qdisc.
    Clsact,
}

/// What the program returns: go on to the next.
pub const NEXT: i32 = -1;
/// What the program returns: the packet passes, and nobody else is asked.
pub const OK: i32 = 0;

/// A counting program on a device.
#[derive(Debug)]
pub struct Foreign {
    counter: OwnedFd,
    /// The link, or the pin that `tc` took the program from.
    _link: Option<OwnedFd>,
    pin: Option<PathBuf>,
}

impl Foreign {
    /// Attaches to a device of a namespace. `bpffs` is a place for a pin.
    pub fn attach(netns: &Netns, device: &str, side: Side, place: Place, verdict: i32, bpffs: &Path) -> Self {
        Self::try_attach(netns, device, side, place, verdict, bpffs)
            .unwrap_or_else(|error| panic!("attaching to {device}, {side:?}, {place:?}: {error:#}"))
    }

    fn try_attach(netns: &Netns, device: &str, side: Side, place: Place, verdict: i32, bpffs: &Path) -> Result<Self> {
        let counter = create_counter().context("creating a map")?;
        let program = load(&counter, verdict).context("loading a program")?;
        let before = match place {
            Place::TcxFirst => true,
            Place::TcxLast => false,
            Place::Clsact => {
                let side_name = if side == Side::Ingress { "ingress" } else { "egress" };
                let pin = bpffs.join(format!("foreign-{device}-{side_name}"));
                pin_at(&program, &pin).with_context(|| format!("pinning at {}", pin.display()))?;
                // It may be there, as ours make one too.
                let _ = netns.exec("tc", &["qdisc", "add", "dev", device, "clsact"]);
                // `ip netns exec` has another /sys; the file is found by its path all the same.
                let path = pin.display().to_string();
                let words =
                    ["filter", "add", "dev", device, side_name, "pref", "100", "bpf", "da", "object-pinned", &path];
                netns.exec("tc", &words)?;
                return Ok(Self { counter, _link: None, pin: Some(pin) });
            }
        };
        let ifindex: u32 = {
            let text = netns.exec("cat", &[&format!("/sys/class/net/{device}/ifindex")])?;
            text.trim().parse().context("reading an ifindex")?
        };
        let link = netns.run(|| attach_tcx(&program, ifindex, side, before)).context("attaching")?;
        Ok(Self { counter, _link: Some(link), pin: None })
    }

    /// How many packets it has seen.
    pub fn seen(&self) -> u64 {
        read_counter(&self.counter).unwrap_or_else(|error| panic!("reading a counter: {error}"))
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Some(pin) = &self.pin {
            let _ = fs::remove_file(pin);
        }
    }
}

/// The argument of bpf(2), in 32-bit words.
#[repr(C, align(8))]
struct Attr([u32; 32]);

impl Attr {
    fn word(mut self, offset: usize, value: u32) -> Self {
        self.0[offset / 4] = value;
        self
    }

    fn fd(self, offset: usize, fd: &OwnedFd) -> Self {
        self.word(offset, fd.as_raw_fd().cast_unsigned())
    }

    fn pointer<T>(mut self, offset: usize, value: *const T) -> Self {
        let value = (value as u64).to_ne_bytes();
        let [a, b, c, d, e, f, g, h] = value;
        self.0[offset / 4] = u32::from_ne_bytes([a, b, c, d]);
        self.0[offset / 4 + 1] = u32::from_ne_bytes([e, f, g, h]);
        self
    }

    /// # Safety
    ///
    /// Every pointer in the structure must be valid for what the command does with it.
    unsafe fn call(mut self, command: i32) -> io::Result<i32> {
        // SAFETY: the structure outlives the call and is as large as said; the caller answers for the pointers in it.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, (&raw mut self.0).cast::<u8>(), size_of_val(&self.0)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
    }
}

const EMPTY: Attr = Attr([0; 32]);

fn own(fd: i32) -> OwnedFd {
    // SAFETY: a descriptor that the kernel has just made is ours alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn create_counter() -> io::Result<OwnedFd> {
    const MAP_CREATE: i32 = 0;
    const ARRAY: u32 = 2;
    // SAFETY: no pointers.
    unsafe { EMPTY.word(0, ARRAY).word(4, 4).word(8, 8).word(12, 1).call(MAP_CREATE) }.map(own)
}

fn read_counter(map: &OwnedFd) -> io::Result<u64> {
    const MAP_LOOKUP: i32 = 1;
    let (key, mut value) = (0_u32, 0_u64);
    // SAFETY: key and value are as large as the map says, and live through the call.
    unsafe { EMPTY.fd(0, map).pointer(8, &raw const key).pointer(16, &raw mut value).call(MAP_LOOKUP) }?;
    Ok(value)
}

/// `counter[0] += 1; return verdict`.
fn load(counter: &OwnedFd, verdict: i32) -> io::Result<OwnedFd> {
    const PROG_LOAD: i32 = 5;
    const SCHED_CLS: u32 = 3;
    // code, registers (source in the high half), offset, immediate (`include/uapi/linux/bpf.h`)
    let instruction = |code: u8, registers: u8, offset: i16, immediate: i32| {
        let [a, b] = offset.to_ne_bytes();
        let [c, d, e, f] = immediate.to_ne_bytes();
        u64::from_ne_bytes([code, registers, a, b, c, d, e, f])
    };
    let program = [
        instruction(0x62, 0x0a, -4, 0),                  // *(u32 *)(r10 - 4) = 0
        instruction(0xbf, 0xa2, 0, 0),                   // r2 = r10
        instruction(0x07, 0x02, 0, -4),                  // r2 += -4
        instruction(0x18, 0x11, 0, counter.as_raw_fd()), // r1 = map
        instruction(0, 0, 0, 0),
        instruction(0x85, 0, 0, 1),          // r0 = bpf_map_lookup_elem(r1, r2)
        instruction(0x15, 0x00, 2, 0),       // if r0 == 0 skip two
        instruction(0xb7, 0x01, 0, 1),       // r1 = 1
        instruction(0xdb, 0x10, 0, 0),       // lock *(u64 *)(r0 + 0) += r1
        instruction(0xb7, 0x00, 0, verdict), // r0 = verdict
        instruction(0x95, 0, 0, 0),          // exit
    ];
    let count = u32::try_from(program.len()).map_err(io::Error::other)?;
    let attr = EMPTY.word(0, SCHED_CLS).word(4, count).pointer(8, program.as_ptr()).pointer(16, c"GPL".as_ptr());
    // Its name.
    let attr = attr.word(48, u32::from_ne_bytes(*b"fore")).word(52, u32::from_ne_bytes(*b"ign\0"));
    // SAFETY: instructions and licence live through the call, and there are as many as said.
    unsafe { attr.call(PROG_LOAD) }.map(own)
}

fn attach_tcx(program: &OwnedFd, ifindex: u32, side: Side, before: bool) -> io::Result<OwnedFd> {
    const LINK_CREATE: i32 = 28;
    const BEFORE: u32 = 1 << 3;
    const AFTER: u32 = 1 << 4;
    let attach_type = if side == Side::Ingress { 46 } else { 47 };
    let flags = if before { BEFORE } else { AFTER };
    let attr = EMPTY.fd(0, program).word(4, ifindex).word(8, attach_type).word(12, flags);
    // SAFETY: no pointers.
    unsafe { attr.call(LINK_CREATE) }.map(own)
}

fn pin_at(program: &OwnedFd, path: &Path) -> io::Result<()> {
    const OBJ_PIN: i32 = 6;
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path lives through the call.
    unsafe { EMPTY.pointer(0, path.as_ptr()).fd(8, program).call(OBJ_PIN) }.map(drop)
}
