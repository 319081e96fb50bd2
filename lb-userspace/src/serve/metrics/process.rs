//! The process as Go's client describes it: names and help texts are its.
//!
//! In: `/proc/self`. Out: numbers, read when somebody asks.

use std::{fs, time::Duration};

use anyhow::Result;
use prometheus::{Counter, Gauge};
use rustix::param::{clock_ticks_per_second, page_size};

use super::Maker;

/// Metrics of this process.
#[derive(Debug)]
pub(super) struct Process {
    cpu: Counter,
    open_fds: Gauge,
    max_fds: Gauge,
    virtual_memory: Gauge,
    max_virtual_memory: Gauge,
    resident_memory: Gauge,
    start: Gauge,
    received: Counter,
    sent: Counter,
}

impl Process {
    pub(super) fn new(maker: &Maker) -> Result<Self> {
        let counter = |name: &str, help: &str| -> Result<Counter> { maker.add(Counter::new(name, help)?) };
        Ok(Self {
            cpu: counter("process_cpu_seconds_total", "Total user and system CPU time spent in seconds.")?,
            open_fds: maker.gauge("process_open_fds", "Number of open file descriptors.")?,
            max_fds: maker.gauge("process_max_fds", "Maximum number of open file descriptors.")?,
            virtual_memory: maker.gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.")?,
            max_virtual_memory: maker
                .gauge("process_virtual_memory_max_bytes", "Maximum amount of virtual memory available in bytes.")?,
            resident_memory: maker.gauge("process_resident_memory_bytes", "Resident memory size in bytes.")?,
            start: maker
                .gauge("process_start_time_seconds", "Start time of the process since unix epoch in seconds.")?,
            received: counter(
                "process_network_receive_bytes_total",
                "Number of bytes received by the process over the network.",
            )?,
            sent: counter(
                "process_network_transmit_bytes_total",
                "Number of bytes sent by the process over the network.",
            )?,
        })
    }

    /// Reads everything. What can't be read stays as it was.
    pub(super) fn read(&self) {
        let file = |name: &str| fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
        self.read_stat(&file("stat"));
        for (gauge, name) in [(&self.max_fds, "Max open files"), (&self.max_virtual_memory, "Max address space")] {
            if let Some(limit) = limit(&file("limits"), name) {
                gauge.set(limit);
            }
        }
        if let Ok(folder) = fs::read_dir("/proc/self/fd") {
            self.open_fds.set(number(folder.count() as u64));
        }
        let netstat = file("net/netstat");
        for (counter, name) in [(&self.received, "InOctets"), (&self.sent, "OutOctets")] {
            if let Some(bytes) = ip_octets(&netstat, name) {
                set(counter, bytes);
            }
        }
        if let Some(start) = start_time() {
            self.start.set(start);
        }
    }

    fn read_stat(&self, stat: &str) {
        let Some(fields) = fields(stat) else { return };
        let ticks = number(clock_ticks_per_second());
        set(&self.cpu, (fields.user + fields.system) / ticks);
        self.virtual_memory.set(fields.virtual_memory);
        self.resident_memory.set(fields.resident_pages * number(page_size() as u64));
    }
}

/// Counters of the machine are read as they stand.
pub(super) fn set(counter: &Counter, value: f64) {
    counter.reset();
    counter.inc_by(value);
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
pub(super) const fn number(value: u64) -> f64 {
    value as f64
}

/// What of `/proc/self/stat` is shown.
struct Fields {
    user: f64,
    system: f64,
    start_ticks: f64,
    virtual_memory: f64,
    resident_pages: f64,
}

/// proc_pid_stat(5). The name before the last parenthesis may hold anything.
fn fields(stat: &str) -> Option<Fields> {
    let (_, rest) = stat.rsplit_once(')')?;
    let rest: Vec<&str> = rest.split_whitespace().collect();
    // The first of these is field 3.
    let field = |number: usize| rest.get(number - 3)?.parse().ok();
    Some(Fields {
        user: field(14)?,
        system: field(15)?,
        start_ticks: field(22)?,
        virtual_memory: field(23)?,
        resident_pages: field(24)?,
    })
}

/// When the process started, in seconds of Unix time.
pub(in crate::serve) fn start_time() -> Option<f64> {
    let fields = fields(&fs::read_to_string("/proc/self/stat").ok()?)?;
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let boot = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse::<u64>().ok()?;
    Some(Duration::from_secs(boot).as_secs_f64() + fields.start_ticks / number(clock_ticks_per_second()))
}

/// The soft limit of this name; Go's client writes the largest number for `unlimited`.
fn limit(limits: &str, name: &str) -> Option<f64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(number(u64::MAX)),
        text => text.parse().ok(),
    }
}

/// A value of `IpExt` in `/proc/net/netstat`: a line of names, a line of numbers.
fn ip_octets(netstat: &str, name: &str) -> Option<f64> {
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("IpExt:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let place = names.split_whitespace().position(|it| it == name)?;
    values.split_whitespace().nth(place)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_read_as_the_manual_says() {
        let stat =
            "42 (a ) b) S 1 42 42 0 -1 4194560 900 0 0 0 250 50 0 0 20 0 3 0 7000 123456 789 18446744073709551615";
        let fields = fields(stat).unwrap();
        assert_eq!((fields.user, fields.system, fields.start_ticks), (250.0, 50.0, 7000.0));
        assert_eq!((fields.virtual_memory, fields.resident_pages), (123_456.0, 789.0));
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024      4096   files\n\
                      Max address space         unlimited unlimited bytes\n";
        assert_eq!(limit(limits, "Max open files"), Some(1024.0));
        assert_eq!(limit(limits, "Max address space"), Some(number(u64::MAX)));
        let netstat = "TcpExt: InOctets\nTcpExt: 1\nIpExt: InNoRoutes InOctets OutOctets\nIpExt: 0 12 34\n";
        assert_eq!((ip_octets(netstat, "InOctets"), ip_octets(netstat, "OutOctets")), (Some(12.0), Some(34.0)));
        assert!(start_time().unwrap() > 1e9);
    }
}
