//! Ctrl-C and SIGTERM as an error at the next step, so that everything is cleaned up on the way out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on the signals only set a flag.
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler: extern "C" fn(libc::c_int) = note;
        // SAFETY: the handler stores to an atomic and does nothing else, which is allowed in a signal handler.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Whether a signal came.
pub fn came() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// An error once a signal came.
pub fn check() -> Result<()> {
    if came() {
        bail!("interrupted; everything was cleaned up");
    }
    Ok(())
}

/// Sleeps, and wakes early for a signal.
pub fn sleep(time: Duration) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < time {
        check()?;
        thread::sleep(Duration::from_millis(20).min(time));
    }
    check()
}
