//! What the process may do. Without one of these, what the kernel says when it refuses names another trouble or none.

use std::fs;

use anyhow::{Context as _, Result, ensure};

/// Bits of capabilities (`include/uapi/linux/capability.h`), by name. To the BPF subsystem CAP_SYS_ADMIN is the first and the last, but
/// devices and their filters are for CAP_NET_ADMIN alone.
const NEEDED: [(&str, u64); 3] = [
    ("CAP_BPF", 1 << 39 | SYS_ADMIN),
    ("CAP_NET_ADMIN", 1 << 12),
    // The verifier takes for harmless only from those what could tell of the kernel's memory.
    ("CAP_PERFMON", 1 << 38 | SYS_ADMIN),
];
const SYS_ADMIN: u64 = 1 << 21;

/// Finds out whether all is there that programs and maps take.
///
/// # Errors
///
/// Something is missing; which, and what gives it.
pub fn check() -> Result<()> {
    let status = fs::read_to_string("/proc/self/status").context("cannot read what this process may do")?;
    let missing = missing(&status);
    ensure!(
        missing.is_empty(),
        "this process may not load BPF programs: it lacks {}; run it as root, or add it in securityContext.capabilities",
        missing.join(", ")
    );
    Ok(())
}

/// What a process lacks whose `/proc/PID/status` this is. Where it doesn't say, nothing: the kernel will.
fn missing(status: &str) -> Vec<&'static str> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(effective) = effective.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()) else {
        return Vec::new();
    };
    NEEDED.into_iter().filter(|(_, any)| effective & any == 0).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::missing;

    #[test]
    fn what_is_missing_is_named() {
        for (effective, expected) in [
            ("000001ffffffffff", &[][..]),
            ("000000c000001000", &[]),
            ("0000000000201000", &[]),
            ("0000000000200000", &["CAP_NET_ADMIN"]),
            ("0000008000001000", &["CAP_PERFMON"]),
            ("0000004000001000", &["CAP_BPF"]),
            ("0000000000000000", &["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]),
            ("nothing that we know", &[]),
        ] {
            assert_eq!(
                missing(&format!("Name:\tfairlead\nCapEff:\t{effective}\nCapBnd:\t0\n")),
                expected,
                "{effective}"
            );
        }
    }
}
