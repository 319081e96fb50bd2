//! What the programs count, and how full their maps are.
//!
//! In: what is pinned, read when somebody asks and not more often than every ten seconds where that means walking over all
//! flows. Out: numbers. Nothing is asked of the agent, so that nobody delays it.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use lb_common::{
    flow::{Kind, flow_flags},
    reason::{Reason, Verdict},
};
use prometheus::{CounterVec, GaugeVec, Opts};

use super::{Maker, process, services::Services};
use crate::kernel::pinned::Pinned;

/// How long a walk over all flows is good for.
const FRESH: Duration = Duration::from_secs(10);

/// Metrics of the data plane.
#[derive(Debug)]
pub(super) struct Kernel {
    bpffs: PathBuf,
    walked: Mutex<Option<Instant>>,
    packets: CounterVec,
    entries: GaugeVec,
    room: GaugeVec,
    evictions: CounterVec,
    masquerade_ports: GaugeVec,
    /// Nothing where nothing is counted.
    services: Option<Services>,
}

impl Kernel {
    pub(super) fn new(maker: &Maker, bpffs: PathBuf, services: bool) -> Result<Self> {
        let packets = Opts::new("fairlead_packets_total", "Packets by what was done with them and why");
        let evictions =
            Opts::new("fairlead_map_evictions_total", "Entries of a flow table that others took the place of");
        Ok(Self {
            bpffs,
            walked: Mutex::default(),
            packets: maker.add(CounterVec::new(packets, &["reason", "verdict"])?)?,
            entries: maker.gauges("fairlead_map_entries", "Entries in a BPF map", &["map"])?,
            room: maker.gauges("fairlead_map_max_entries", "Entries that a BPF map has room for", &["map"])?,
            evictions: maker.add(CounterVec::new(evictions, &["map"])?)?,
            masquerade_ports: maker.gauges(
                "fairlead_masquerade_ports_used",
                "Node addresses and ports by which masqueraded connections leave, each counted once",
                &["ip_family"],
            )?,
            services: services.then(|| Services::new(maker)).transpose()?,
        })
    }

    /// Reads everything. Before the first tables are made there is nothing.
    pub(super) fn read(&self) {
        let Ok(pinned) = Pinned::open(&self.bpffs) else { return };
        if let Ok(counters) = pinned.counters() {
            for (reason, count) in Reason::ALL.iter().zip(counters) {
                let counter = self.packets.with_label_values(&[reason.as_str(), verdict(*reason)]);
                process::set(&counter, process::number(count));
            }
        }
        if let Some(services) = &self.services
            && let (Ok(names), Ok(counters)) = (pinned.services(), pinned.service_counters())
        {
            services.show(&names, &counters);
        }
        let mut walked = self.walked.lock().unwrap_or_else(PoisonError::into_inner);
        if walked.is_none_or(|at| at.elapsed() >= FRESH) {
            self.walk(&pinned);
            *walked = Some(Instant::now());
        }
    }

    fn walk(&self, pinned: &Pinned) {
        for fill in pinned.fill().into_iter().flatten() {
            self.entries.with_label_values(&[fill.name]).set(process::number(fill.used));
            self.room.with_label_values(&[fill.name]).set(f64::from(fill.room));
            if let Some(evicted) = fill.evicted {
                let counter = self.evictions.with_label_values(&[fill.name]);
                // A difference of counts that go on meanwhile: a few less than before are none.
                let most = counter.get().max(process::number(evicted));
                process::set(&counter, most);
            }
        }
        let (mut v4, mut v6) = (BTreeSet::new(), BTreeSet::new());
        let read = pinned.flows(|key, flow| {
            if key.kind == Kind::Masqueraded as u8 && flow.flags & flow_flags::MASQUERADE != 0 {
                let of_family = if key.near.is_v4() { &mut v4 } else { &mut v6 };
                of_family.insert((key.near, key.near_port, key.proto));
            }
        });
        if read.is_ok() {
            for (family, used) in [("IPv4", v4.len()), ("IPv6", v6.len())] {
                self.masquerade_ports.with_label_values(&[family]).set(process::number(used as u64));
            }
        }
    }
}

const fn verdict(reason: Reason) -> &'static str {
    match reason.verdict() {
        Verdict::Pass => "pass",
        Verdict::Translate => "translate",
        Verdict::Refuse => "refuse",
        Verdict::Drop => "drop",
    }
}
