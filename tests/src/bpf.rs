//! bpf(2) for what tests do to a kernel: small programs of others, entries that vanish. In: descriptors, paths. Out: descriptors, numbers.
//! Never here: what a map's bytes mean.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

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
        let [a, b, c, d, e, f, g, h] = (value as u64).to_ne_bytes();
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

/// An array of one 64-bit number.
pub fn create_counter() -> io::Result<OwnedFd> {
    const MAP_CREATE: i32 = 0;
    const ARRAY: u32 = 2;
    // SAFETY: no pointers.
    unsafe { EMPTY.word(0, ARRAY).word(4, 4).word(8, 8).word(12, 1).call(MAP_CREATE) }.map(own)
}

/// The number in such an array.
pub fn read_counter(map: &OwnedFd) -> io::Result<u64> {
    const MAP_LOOKUP: i32 = 1;
    let (key, mut value) = (0_u32, 0_u64);
    // SAFETY: key and value are as large as the map says, and live through the call.
    unsafe { EMPTY.fd(0, map).pointer(8, &raw const key).pointer(16, &raw mut value).call(MAP_LOOKUP) }?;
    Ok(value)
}

/// What a classifier does with the five lowest bits of `tc_index`, where Cilium has flags of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flags {
    /// Nothing.
    #[default]
    Ignore,
    /// Makes `tc_index` this.
    Set(i32),
    /// Counts only packets that have these.
    Want(i32),
}

/// A classifier named `foreign`: `counter[0] += 1; return verdict`.
pub fn load_counting_program(counter: &OwnedFd, verdict: i32, flags: Flags) -> io::Result<OwnedFd> {
    const PROG_LOAD: i32 = 5;
    const SCHED_CLS: u32 = 3;
    // code, registers (source in the high half), offset, immediate (`include/uapi/linux/bpf.h`)
    let instruction = |code: u8, registers: u8, offset: i16, immediate: i32| {
        let [a, b] = offset.to_ne_bytes();
        let [c, d, e, f] = immediate.to_ne_bytes();
        u64::from_ne_bytes([code, registers, a, b, c, d, e, f])
    };
    // `tc_index` in `struct __sk_buff`.
    const TC_INDEX: i16 = 44;
    let first = match flags {
        Flags::Ignore => Vec::new(),
        Flags::Set(value) => vec![
            instruction(0xb7, 0x02, 0, value),    // r2 = value
            instruction(0x63, 0x21, TC_INDEX, 0), // ctx->tc_index = r2
        ],
        Flags::Want(value) => vec![
            instruction(0x61, 0x12, TC_INDEX, 0), // r2 = ctx->tc_index
            instruction(0x57, 0x02, 0, 0x1f),     // r2 &= 0x1f
            instruction(0x15, 0x02, 2, value),    // if r2 == value skip two
            instruction(0xb7, 0x00, 0, verdict),  // r0 = verdict
            instruction(0x95, 0, 0, 0),           // exit
        ],
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
    let program = [&first[..], &program].concat();
    let count = u32::try_from(program.len()).map_err(io::Error::other)?;
    let attr = EMPTY.word(0, SCHED_CLS).word(4, count).pointer(8, program.as_ptr()).pointer(16, c"GPL".as_ptr());
    let attr = attr.word(48, u32::from_ne_bytes(*b"fore")).word(52, u32::from_ne_bytes(*b"ign\0"));
    // SAFETY: instructions and licence live through the call, and there are as many as said.
    unsafe { attr.call(PROG_LOAD) }.map(own)
}

/// Attaches a classifier by TCX, first or last; it goes with the descriptor.
pub fn attach_tcx(program: &OwnedFd, ifindex: u32, ingress: bool, first: bool) -> io::Result<OwnedFd> {
    const LINK_CREATE: i32 = 28;
    const BEFORE: u32 = 1 << 3;
    const AFTER: u32 = 1 << 4;
    let attach_type = if ingress { 46 } else { 47 };
    let flags = if first { BEFORE } else { AFTER };
    let attr = EMPTY.fd(0, program).word(4, ifindex).word(8, attach_type).word(12, flags);
    // SAFETY: no pointers.
    unsafe { attr.call(LINK_CREATE) }.map(own)
}

/// Pins a program.
pub fn pin(program: &OwnedFd, path: &Path) -> io::Result<()> {
    const OBJ_PIN: i32 = 6;
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path lives through the call.
    unsafe { EMPTY.pointer(0, path.as_ptr()).fd(8, program).call(OBJ_PIN) }.map(drop)
}

/// A pinned hash map, whose keys are bytes to us.
#[derive(Debug)]
pub struct PinnedMap(OwnedFd);

/// Longer than any key.
const LONGEST_KEY: usize = 256;
/// A key, and what follows it.
pub type Key = [u8; LONGEST_KEY];
/// Longer than any value of a map that is no per-CPU map.
const LONGEST_VALUE: usize = 128;

impl PinnedMap {
    /// Opens what is pinned at a path.
    pub fn open(path: &Path) -> io::Result<Self> {
        const OBJ_GET: i32 = 7;
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the path lives through the call.
        unsafe { EMPTY.pointer(0, path.as_ptr()).call(OBJ_GET) }.map(|fd| Self(own(fd)))
    }

    /// All keys, in no order.
    pub fn keys(&self) -> io::Result<Vec<Key>> {
        const MAP_GET_NEXT_KEY: i32 = 4;
        let mut keys: Vec<Key> = Vec::new();
        loop {
            let before = keys.last().map_or(std::ptr::null(), |key| key.as_ptr());
            let mut next = [0_u8; LONGEST_KEY];
            let attr = EMPTY.fd(0, &self.0).pointer(8, before).pointer(16, next.as_mut_ptr());
            // SAFETY: both keys have room for more than the map's, and live through the call.
            match unsafe { attr.call(MAP_GET_NEXT_KEY) } {
                Ok(_) => keys.push(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
                Err(error) => return Err(error),
            }
        }
    }

    /// What is there under a key, or nothing.
    pub fn get(&self, key: &Key) -> io::Result<Option<[u8; LONGEST_VALUE]>> {
        const MAP_LOOKUP: i32 = 1;
        let mut value = [0_u8; LONGEST_VALUE];
        let attr = EMPTY.fd(0, &self.0).pointer(8, key.as_ptr()).pointer(16, value.as_mut_ptr());
        // SAFETY: key and value have room for more than the map's, and live through the call.
        match unsafe { attr.call(MAP_LOOKUP) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes an entry.
    pub fn remove(&self, key: &Key) -> io::Result<()> {
        const MAP_DELETE: i32 = 3;
        // SAFETY: the key is longer than the map's, and lives through the call.
        unsafe { EMPTY.fd(0, &self.0).pointer(8, key.as_ptr()).call(MAP_DELETE) }.map(drop)
    }
}
