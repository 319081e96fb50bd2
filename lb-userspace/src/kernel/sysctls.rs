//! conntrack's settings (`kube-proxy.md` §10.2): a CNI's masquerading and the host's own connections still need them.
//!
//! In: what kube-proxy's configuration says. Out: writes below `/proc/sys` and `/sys`, and what could not be written, which
//! stops nothing.

use std::{fs, io, path::Path, time::Duration};

use tracing::info;

/// More than this isn't set, however many CPUs there are.
const MOST: u32 = 1 << 20;

/// `conntrack` of kube-proxy's configuration; what is 0 is left alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conntrack {
    /// `maxPerCore`.
    pub max_per_core: u32,
    /// `min`.
    pub min: u32,
    /// `tcpEstablishedTimeout`.
    pub tcp_established_timeout: Duration,
    /// `tcpCloseWaitTimeout`.
    pub tcp_close_wait_timeout: Duration,
    /// `tcpBeLiberal`.
    pub tcp_be_liberal: bool,
    /// `udpTimeout`.
    pub udp_timeout: Duration,
    /// `udpStreamTimeout`.
    pub udp_stream_timeout: Duration,
}

impl Conntrack {
    /// Writes what differs. `root` is `/`, but for tests. Every setting is tried; what failed is said with its remedy.
    #[must_use]
    pub fn apply(&self, root: &Path) -> Vec<String> {
        let folder = root.join("proc/sys/net/netfilter");
        let mut problems = Vec::new();
        if let Some(max) = self.max(cpus(root)) {
            let at_least = |path: &Path, value: u32| match read(path) {
                Ok(now) if now >= u64::from(value) => Ok(()),
                Ok(_) | Err(_) => write(path, value),
            };
            let files = [
                (folder.join("nf_conntrack_max"), max),
                (root.join("sys/module/nf_conntrack/parameters/hashsize"), max / 4),
            ];
            for (path, value) in files {
                problems.extend(at_least(&path, value).err().map(|error| problem(&path, value, "maxPerCore", &error)));
            }
        }
        let seconds = |duration: Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
        for (name, value, field) in [
            ("tcp_timeout_established", seconds(self.tcp_established_timeout), "tcpEstablishedTimeout"),
            ("tcp_timeout_close_wait", seconds(self.tcp_close_wait_timeout), "tcpCloseWaitTimeout"),
            ("tcp_be_liberal", u32::from(self.tcp_be_liberal), "tcpBeLiberal"),
            ("udp_timeout", seconds(self.udp_timeout), "udpTimeout"),
            ("udp_timeout_stream", seconds(self.udp_stream_timeout), "udpStreamTimeout"),
        ] {
            let path = folder.join(format!("nf_conntrack_{name}"));
            if value != 0 && read(&path).ok() != Some(u64::from(value)) {
                problems.extend(write(&path, value).err().map(|error| problem(&path, value, field, &error)));
            }
        }
        problems
    }

    /// The size of the table, if it has to be seen to.
    fn max(&self, cpus: u32) -> Option<u32> {
        let scaled = self.max_per_core.saturating_mul(cpus);
        // Beyond the cap, `min` doesn't count either: so does kube-proxy.
        let max = if scaled > MOST { MOST } else { scaled.max(self.min) };
        (self.max_per_core != 0).then_some(max)
    }
}

fn problem(path: &Path, value: u32, field: &str, error: &io::Error) -> String {
    format!(
        "conntrack.{field}: cannot write {value} to {}: {error}; set it on the node, or set the field to 0",
        path.display()
    )
}

fn read(path: &Path) -> io::Result<u64> {
    fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
}

fn write(path: &Path, value: u32) -> io::Result<()> {
    fs::write(path, value.to_string())?;
    info!(setting = %path.display(), value, "set");
    Ok(())
}

/// CPUs that are online, in the node, not in our cpuset: `0-3,8`.
fn cpus(root: &Path) -> u32 {
    let text = fs::read_to_string(root.join("sys/devices/system/cpu/online")).unwrap_or_default();
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        Some(last.checked_sub(first)? + 1)
    };
    let counted: u32 = text.trim().split(',').filter_map(count).sum();
    let ours =
        || std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX));
    if counted == 0 { ours() } else { counted }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 7] = [
        "proc/sys/net/netfilter/nf_conntrack_max",
        "sys/module/nf_conntrack/parameters/hashsize",
        "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established",
        "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait",
        "proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal",
        "proc/sys/net/netfilter/nf_conntrack_udp_timeout",
        "proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream",
    ];

    /// A machine with six CPUs and these values.
    fn machine(values: [u32; 7]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("sys/devices/system/cpu/online", "0-3,6-7\n");
        for (name, value) in NAMES.iter().zip(values) {
            put(name, &format!("{value}\n"));
        }
        root
    }

    fn values(root: &Path) -> Vec<u64> {
        NAMES.iter().map(|name| read(&root.join(name)).unwrap()).collect()
    }

    fn defaults() -> Conntrack {
        Conntrack {
            max_per_core: 32_768,
            min: 131_072,
            tcp_established_timeout: Duration::from_secs(86_400),
            tcp_close_wait_timeout: Duration::from_secs(3_600),
            ..Conntrack::default()
        }
    }

    #[test]
    fn kube_proxys_defaults_raise_the_table_and_set_two_timeouts() {
        let root = machine([65_536, 16_384, 432_000, 60, 0, 30, 120]);
        assert_eq!(defaults().apply(root.path()), Vec::<String>::new());
        assert_eq!(values(root.path()), [196_608, 49_152, 86_400, 3_600, 0, 30, 120]);
    }

    #[test]
    fn a_larger_table_stays_and_what_is_not_wanted_is_left_alone() {
        let root = machine([500_000, 200_000, 5, 6, 0, 30, 120]);
        let all = Conntrack {
            tcp_be_liberal: true,
            udp_timeout: Duration::from_secs(31),
            udp_stream_timeout: Duration::from_millis(121_900),
            ..defaults()
        };
        assert_eq!(all.apply(root.path()), Vec::<String>::new());
        assert_eq!(values(root.path()), [500_000, 200_000, 86_400, 3_600, 1, 31, 121]);
        let root = machine([1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(Conntrack { min: 131_072, ..Conntrack::default() }.apply(root.path()), Vec::<String>::new());
        assert_eq!(values(root.path()), [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn the_size_follows_cpus_between_a_floor_and_a_cap() {
        let max = |per_core, min, cpus| Conntrack { max_per_core: per_core, min, ..Conntrack::default() }.max(cpus);
        assert_eq!(max(32_768, 131_072, 2), Some(131_072));
        assert_eq!(max(32_768, 131_072, 8), Some(262_144));
        assert_eq!(max(32_768, 131_072, 64), Some(1 << 20));
        assert_eq!(max(32_768, 4_000_000, 64), Some(1 << 20));
        assert_eq!(max(0, 131_072, 64), None);
    }

    #[test]
    fn one_setting_that_cannot_be_written_stops_no_other() {
        let root = machine([1, 2, 3, 4, 0, 6, 7]);
        let path = root.path().join(NAMES[0]);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let problems = defaults().apply(root.path());
        assert!(
            problems.len() == 1 && problems[0].starts_with("conntrack.maxPerCore: cannot write 196608 to "),
            "{problems:?}"
        );
        assert_eq!(read(&root.path().join(NAMES[2])).unwrap(), 86_400);
    }
}
