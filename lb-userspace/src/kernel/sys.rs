//! bpf(2) as safe functions: the commands that aya lacks, and those that are simpler without it.
//!
//! In: descriptors and bytes. Out: descriptors, bytes, `io::Error`. The only `unsafe` code of the agent is here; nothing here
//! knows what the bytes mean.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use aya::Pod;

/// Commands of bpf(2), `enum bpf_cmd`.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Command {
    MapCreate = 0,
    MapUpdate = 2,
    MapDelete = 3,
    ProgLoad = 5,
    ObjPin = 6,
    ObjGet = 7,
    ProgTestRun = 10,
    ObjGetInfo = 15,
    ProgQuery = 16,
    MapLookupBatch = 24,
    MapUpdateBatch = 26,
    MapDeleteBatch = 27,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

/// What the kernel says where a map type lacks a command (`ENOTSUPP`, which libc does not name).
const ENOTSUPP: i32 = 524;

/// The argument of bpf(2), as 64-bit words: every command's structure is a sequence of 32- and 64-bit fields.
#[repr(C, align(8))]
struct Attr([u32; 32]);

impl Attr {
    fn new() -> Self {
        Self([0; 32])
    }

    fn u32(mut self, offset: usize, value: u32) -> Self {
        self.0[offset / 4] = value;
        self
    }

    fn u64(mut self, offset: usize, value: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = value.to_ne_bytes();
        self.0[offset / 4] = u32::from_ne_bytes([a, b, c, d]);
        self.0[offset / 4 + 1] = u32::from_ne_bytes([e, f, g, h]);
        self
    }

    fn fd(self, offset: usize, fd: BorrowedFd<'_>) -> Self {
        self.u32(offset, fd.as_raw_fd().cast_unsigned())
    }

    fn bytes(self, offset: usize, bytes: &[u8]) -> Self {
        self.u64(offset, bytes.as_ptr() as u64)
    }

    fn bytes_mut(self, offset: usize, bytes: &mut [u8]) -> Self {
        self.u64(offset, bytes.as_mut_ptr() as u64)
    }

    /// # Safety
    ///
    /// Every pointer in the structure must be valid for what the command does with it.
    unsafe fn call(&mut self, command: Command) -> io::Result<i64> {
        // SAFETY: the structure outlives the call and is as large as said; the caller answers for the pointers in it.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command as u32, ptr::from_mut(&mut self.0), size_of_val(&self.0)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }

    /// # Safety
    ///
    /// As [`Attr::call`], and the command must answer with a new descriptor.
    unsafe fn call_for_fd(&mut self, command: Command) -> io::Result<OwnedFd> {
        // SAFETY: the caller answers for the pointers.
        let fd = unsafe { self.call(command) }?;
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: a descriptor that the kernel has just made is ours alone.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The bytes of values without padding.
pub fn bytes_of<T: Pod>(values: &[T]) -> &[u8] {
    // SAFETY: `Pod` promises that any byte of a value is initialised, and bytes have no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The value that stands in these bytes.
///
/// # Panics
///
/// If the length is not the value's.
pub fn value_of<T: Pod>(bytes: &[u8]) -> T {
    assert_eq!(bytes.len(), size_of::<T>(), "the caller cuts by the value's size");
    // SAFETY: the length was checked, and `Pod` promises that all bytes make a value.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

/// Gives free memory back to the system, where the C library is one that keeps it.
pub fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number; whatever is in use stays.
    let _ = unsafe { libc::malloc_trim(0) };
}

fn path_of(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Opens what is pinned at a path.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = path_of(path)?;
    // SAFETY: the string outlives the call.
    unsafe { Attr::new().bytes(0, path.as_bytes_with_nul()).call_for_fd(Command::ObjGet) }
}

/// Pins a map or link at a path.
pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_of(path)?;
    // SAFETY: the string outlives the call.
    unsafe { Attr::new().bytes(0, path.as_bytes_with_nul()).fd(8, fd).call(Command::ObjPin) }.map(drop)
}

fn info<const N: usize>(fd: BorrowedFd<'_>) -> io::Result<[u32; N]> {
    let mut info = [0_u64; 16];
    assert!(N * 4 <= size_of_val(&info), "the buffer holds every field that is asked for");
    // SAFETY: the buffer is as long as said; u64 elements align it for the kernel's structures.
    unsafe {
        Attr::new().fd(0, fd).u32(4, 16 * 8).u64(8, info.as_mut_ptr() as u64).call(Command::ObjGetInfo)?;
    }
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes_of(&info).chunks_exact(4)) {
        *word = value_of(bytes);
    }
    Ok(words)
}

/// What the kernel knows of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapShape {
    /// `enum bpf_map_type`.
    pub map_type: u32,
    /// Id.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// How many entries it may have.
    pub max_entries: u32,
    /// Flags it was created with.
    pub flags: u32,
}

/// A map, its shape, and how often the kernel was called about it.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    shape: MapShape,
}

impl Map {
    /// Takes a descriptor of a map.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let [map_type, id, key_size, value_size, max_entries, flags] = info(fd.as_fd())?;
        Ok(Self { fd, shape: MapShape { map_type, id, key_size, value_size, max_entries, flags } })
    }

    /// Creates a map. `shape.id` is not looked at.
    pub fn create(name: &str, shape: MapShape) -> io::Result<Self> {
        let mut attr = Attr::new()
            .u32(0, shape.map_type)
            .u32(4, shape.key_size)
            .u32(8, shape.value_size)
            .u32(12, shape.max_entries)
            .u32(16, shape.flags);
        let mut text = [0_u8; 16];
        for (to, from) in text.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        for (index, word) in text.chunks_exact(4).enumerate() {
            attr = attr.u32(28 + 4 * index, value_of(word));
        }
        // SAFETY: no pointers.
        Self::new(unsafe { attr.call_for_fd(Command::MapCreate) }?)
    }

    /// Opens a pinned map.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::new(open_pin(path)?)
    }

    /// Its shape.
    pub fn shape(&self) -> MapShape {
        self.shape
    }

    /// Its descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes of a value as the kernel reads and writes them: those of per-CPU maps for all CPUs.
    pub fn stride(&self) -> usize {
        let size = self.shape.value_size as usize;
        if self.shape.map_type == map_type::PERCPU_ARRAY { size.next_multiple_of(8) * possible_cpus() } else { size }
    }

    fn count(&self, keys: &[u8]) -> usize {
        assert_eq!(keys.len() % self.shape.key_size as usize, 0, "whole keys");
        keys.len() / self.shape.key_size as usize
    }

    /// Sets one entry.
    pub fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert!(self.count(key) == 1 && value.len() == self.stride(), "one key and one value");
        // SAFETY: key and value have the sizes that the kernel will read.
        unsafe { Attr::new().fd(0, self.fd()).bytes(8, key).bytes(16, value).call(Command::MapUpdate) }.map(drop)
    }

    /// Removes one entry.
    pub fn delete(&self, key: &[u8]) -> io::Result<()> {
        assert_eq!(self.count(key), 1, "one key");
        // SAFETY: the key has the size that the kernel will read.
        unsafe { Attr::new().fd(0, self.fd()).bytes(8, key).call(Command::MapDelete) }.map(drop)
    }

    /// Sets entries in order. Answers how many were set before an error.
    pub fn update_batch(&self, keys: &[u8], values: &[u8]) -> (usize, io::Result<()>) {
        assert_eq!(self.count(keys) * self.stride(), values.len(), "a value for each key");
        self.batch(Command::MapUpdateBatch, keys, Some(values))
    }

    /// Removes entries in order. Answers how many were removed before an error.
    pub fn delete_batch(&self, keys: &[u8]) -> (usize, io::Result<()>) {
        self.batch(Command::MapDeleteBatch, keys, None)
    }

    fn batch(&self, command: Command, keys: &[u8], values: Option<&[u8]>) -> (usize, io::Result<()>) {
        let count = self.count(keys);
        let Ok(said) = u32::try_from(count) else { return (0, Err(io::Error::from(io::ErrorKind::InvalidInput))) };
        let mut attr =
            Attr::new().bytes(16, keys).bytes(24, values.unwrap_or_default()).u32(32, said).fd(36, self.fd());
        // SAFETY: the callers checked that keys, and values where the command reads them, are as long as `count` says.
        let result = unsafe { attr.call(command) }.map(drop);
        // Errors found before the first entry leave the count as it was given.
        let done = match &result {
            Ok(()) => count,
            Err(error) if is_unsupported(error) || attr.0[8] == said => 0,
            Err(_) => attr.0[8] as usize,
        };
        (done, result)
    }

    /// Every entry, in chunks. Entries that change meanwhile may be seen or not, or twice. Answers how many calls it took.
    pub fn read(&self, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<u64> {
        let (key_size, stride) = (self.shape.key_size as usize, self.stride());
        let mut chunk = 4096_usize.min(self.shape.max_entries as usize).max(1);
        let mut cursor: Option<Vec<u8>> = None;
        let mut calls = 0;
        loop {
            let mut keys = vec![0; chunk * key_size];
            let mut values = vec![0; chunk * stride];
            // A bucket number for hashes, a key for all others.
            let mut next = vec![0; key_size.max(8)];
            let mut attr = Attr::new()
                .bytes_mut(8, &mut next)
                .bytes_mut(16, &mut keys)
                .bytes_mut(24, &mut values)
                .u32(32, u32::try_from(chunk).map_err(io::Error::other)?)
                .fd(36, self.fd());
            if let Some(cursor) = &cursor {
                attr = attr.bytes(0, cursor);
            }
            calls += 1;
            // SAFETY: both cursors hold at least a key, and the buffers hold `chunk` keys and values.
            let result = unsafe { attr.call(Command::MapLookupBatch) };
            let ended = match result {
                Ok(_) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    chunk *= 2; // one bucket holds more than there is room for
                    continue;
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                Err(error) => return Err(error),
            };
            let count = (attr.0[8] as usize).min(chunk);
            for (key, value) in keys.chunks_exact(key_size).zip(values.chunks_exact(stride)).take(count) {
                each(key, value);
            }
            if ended {
                return Ok(calls);
            }
            cursor = Some(next);
        }
    }
}

/// Whether the kernel has no such command for this map type.
pub fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(ENOTSUPP)
}

/// `enum bpf_map_type`.
pub mod map_type {
    /// Hash.
    pub const HASH: u32 = 1;
    /// Array.
    pub const ARRAY: u32 = 2;
    /// Array with a value for each CPU.
    pub const PERCPU_ARRAY: u32 = 6;
    /// Hash that evicts.
    pub const LRU_HASH: u32 = 9;
    /// Longest prefix match.
    pub const LPM_TRIE: u32 = 11;
    /// Storage of sockets.
    pub const SK_STORAGE: u32 = 24;
}

/// `BPF_F_NO_PREALLOC`.
pub const NO_PREALLOC: u32 = 1;

/// How many CPUs per-CPU maps have a value for.
pub fn possible_cpus() -> usize {
    aya::util::nr_cpus().unwrap_or(1)
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// A device of the current network namespace.
    Device(u32),
    /// A cgroup.
    Cgroup(BorrowedFd<'a>),
}

/// `enum bpf_attach_type`.
pub mod attach_type {
    /// TCX, on the way in.
    pub const TCX_INGRESS: u32 = 46;
    /// TCX, on the way out.
    pub const TCX_EGRESS: u32 = 47;
    /// connect(2), IPv4.
    pub const CONNECT4: u32 = 10;
    /// connect(2), IPv6.
    pub const CONNECT6: u32 = 11;
    /// sendmsg(2), UDP over IPv4.
    pub const SENDMSG4: u32 = 14;
    /// sendmsg(2), UDP over IPv6.
    pub const SENDMSG6: u32 = 15;
    /// recvmsg(2), UDP over IPv4.
    pub const RECVMSG4: u32 = 19;
    /// recvmsg(2), UDP over IPv6.
    pub const RECVMSG6: u32 = 20;
    /// getpeername(2), IPv4.
    pub const GETPEERNAME4: u32 = 29;
    /// getpeername(2), IPv6.
    pub const GETPEERNAME6: u32 = 30;
}

/// Before all others (`BPF_F_BEFORE`).
pub const FIRST: u32 = 1 << 3;
/// Behind all others (`BPF_F_AFTER`).
pub const LAST: u32 = 1 << 4;

/// Attaches a program by a link.
pub fn link_create(program: BorrowedFd<'_>, target: Target<'_>, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    let attr = Attr::new().fd(0, program).u32(8, attach_type).u32(12, flags);
    let mut attr = match target {
        Target::Device(ifindex) => attr.u32(4, ifindex),
        Target::Cgroup(fd) => attr.fd(4, fd),
    };
    // SAFETY: no pointers.
    unsafe { attr.call_for_fd(Command::LinkCreate) }
}

/// Replaces the program of a link in one step.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers.
    unsafe { Attr::new().fd(0, link).fd(4, program).call(Command::LinkUpdate) }.map(drop)
}

/// Detaches a link, whoever else may hold it.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers.
    unsafe { Attr::new().fd(0, link).call(Command::LinkDetach) }.map(drop)
}

/// What the kernel knows of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkShape {
    /// Id.
    pub id: u32,
    /// Id of its program.
    pub program: u32,
    /// TCX: the device; 0 once that is gone.
    pub ifindex: u32,
}

/// What the kernel knows of a link.
pub fn link_shape(link: BorrowedFd<'_>) -> io::Result<LinkShape> {
    let [_, id, program, _, ifindex] = info(link)?;
    Ok(LinkShape { id, program, ifindex })
}

/// Ids of the programs, and of the links that hold them (0: none), at a TCX hook of a device, in their order.
pub fn query_tcx(ifindex: u32, attach_type: u32) -> io::Result<Vec<(u32, u32)>> {
    const MOST: usize = 64; // BPF_MPROG_MAX
    let (mut programs, mut links) = ([0_u32; MOST], [0_u32; MOST]);
    let mut attr = Attr::new()
        .u32(0, ifindex)
        .u32(4, attach_type)
        .u64(16, programs.as_mut_ptr() as u64)
        .u32(24, 64)
        .u64(40, links.as_mut_ptr() as u64);
    // SAFETY: both arrays have the length that is said.
    unsafe { attr.call(Command::ProgQuery)? };
    Ok(programs.into_iter().zip(links).take((attr.0[6] as usize).min(MOST)).collect())
}

/// Cookie of the current network namespace.
pub fn netns_cookie() -> io::Result<u64> {
    /// `SO_NETNS_COOKIE`, Linux 5.14.
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut len: libc::socklen_t = 8;
    // SAFETY: value and length point at variables that outlive the call, and the length is the value's.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            ptr::from_mut(&mut cookie).cast(),
            ptr::from_mut(&mut len),
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// `BPF_F_IPV6` if the kernel's `bpf_l4_csum_replace` knows it (Linux 6.16, and kernels that took the patch), else 0.
///
/// A program asks the helper itself, at an offset that it refuses: unknown flags are refused with EINVAL before the offset is
/// with EFAULT.
pub fn ipv6_checksum_flag() -> io::Result<u64> {
    const FLAG: u32 = 1 << 7;
    const SCHED_CLS: u32 = 3;
    let instruction = |code: u8, register: u8, immediate: u32| {
        u64::from(code) | u64::from(register) << 8 | u64::from(immediate) << 32
    };
    let program = [
        instruction(0xb7, 2, 0x1_0001), // r2 = offset, beyond 0xffff
        instruction(0xb7, 3, 0),        // r3 = from
        instruction(0xb7, 4, 0),        // r4 = to
        instruction(0xb7, 5, FLAG),     // r5 = flags
        instruction(0x85, 0, 11),       // call bpf_l4_csum_replace
        instruction(0x95, 0, 0),        // exit
    ];
    let license = b"GPL\0";
    let mut load = Attr::new().u32(0, SCHED_CLS).u32(4, 6).bytes(8, bytes_of(&program)).bytes(16, license);
    // SAFETY: program and licence outlive the call, and there are six instructions.
    let program = unsafe { load.call_for_fd(Command::ProgLoad) }?;
    let packet = [0_u8; 64];
    let mut run = Attr::new().fd(0, program.as_fd()).u32(8, 64).bytes(16, &packet).u32(32, 1);
    // SAFETY: the packet is as long as said, and no output is asked for.
    unsafe { run.call(Command::ProgTestRun)? };
    let answer = run.0[1].cast_signed();
    Ok(if answer == -libc::EFAULT { u64::from(FLAG) } else { 0 })
}
/// Makes a process that prints into a pipe end silently when nobody reads it any more, as other tools do.
pub fn end_with_the_reader() {
    // SAFETY: no handler of ours runs; before any thread is started.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
