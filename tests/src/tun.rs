//! A cable of IP packets without Ethernet headers: a tun device in each of two namespaces, and a thread that carries packets between them.
//! In: two namespaces and names. Out: two devices, until dropped.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::netns::Netns;

/// A pair of tun devices, joined.
#[derive(Debug)]
pub struct Cable {
    stop: Arc<AtomicBool>,
    carrier: Option<JoinHandle<()>>,
}

impl Cable {
    /// Makes both devices and starts carrying.
    pub fn new(ends: [(&Netns, &str); 2]) -> io::Result<Self> {
        let [a, b] = ends.map(|(netns, name)| netns.run(|| open(name)));
        let (mut a, mut b) = (a?, b?);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let carrier = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                carry(&mut a, &mut b);
            }
        });
        Ok(Self { stop, carrier: Some(carrier) })
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(carrier) = self.carrier.take() {
            let _ = carrier.join();
        }
    }
}

fn open(name: &str) -> io::Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const IFF_TUN: u16 = 1;
    const IFF_NO_PI: u16 = 0x1000;
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&(IFF_TUN | IFF_NO_PI).to_ne_bytes());
    // SAFETY: the request is a `struct ifreq` of 40 bytes that lives through the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

/// Waits for packets a while and hands each to the other side. One that can't be delivered is lost, as on any cable.
fn carry(a: &mut File, b: &mut File) {
    let limit = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    let (mut from_a, mut from_b) = (false, false);
    {
        let mut events = [PollFd::new(&*a, PollFlags::IN), PollFd::new(&*b, PollFlags::IN)];
        if poll(&mut events, Some(&limit)).is_ok() {
            from_a = events[0].revents().contains(PollFlags::IN);
            from_b = events[1].revents().contains(PollFlags::IN);
        }
    }
    let mut packet = [0; 65_536];
    for (ready, from, to) in [(from_a, &*a, &*b), (from_b, &*b, &*a)] {
        let (mut from, mut to) = (from, to);
        if ready && let Ok(length) = from.read(&mut packet) {
            let _ = to.write(&packet[..length]);
        }
    }
}
