//! What the operator says about the kernel: where things are pinned, what is attached how, how large tables are.

use std::path::PathBuf;

use super::maps::{DEFAULT_AFFINITIES, default_flows};

/// How programs are attached to devices (`--attach`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attach {
    /// TCX where the kernel has it (Linux 6.6).
    #[default]
    Auto,
    /// TCX.
    Tcx,
    /// Filters of the clsact qdisc.
    Clsact,
}

/// Whose sockets are translated (`--socket-lb`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SocketLb {
    /// Nobody's.
    Off,
    /// Those of the agent's network namespace.
    #[default]
    Host,
    /// Those of pods too.
    All,
}

/// Bits of a packet's mark. The default changes none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// What the bits become; no others are set in it.
    pub value: u32,
    /// Which bits.
    pub mask: u32,
}

/// What the operator says about the kernel.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder of pins (`--bpffs`).
    pub bpffs: PathBuf,
    /// The cgroup (`--cgroup`); found where not given.
    pub cgroup: Option<PathBuf>,
    /// How programs are attached to devices.
    pub attach: Attach,
    /// Whose sockets are translated.
    pub socket_lb: SocketLb,
    /// How many connections are remembered; only a new flow table obeys.
    pub flows: u32,
    /// How many clients stay with an endpoint; only a new table obeys.
    pub affinities: u32,
    /// First port that masquerading may take.
    pub masquerade_first: u32,
    /// How many ports from there on.
    pub masquerade_ports: u32,
    /// What answers to clients outside are marked with as they enter the host.
    pub reply_mark: Mark,
    /// From which level on the programs log: 0 nothing, 5 every packet.
    #[cfg(feature = "program-log")]
    pub program_log: u8,
    /// Whether what passes is counted by Service port.
    pub count_services: bool,
    /// Whether sockets with TCP connections are ended when their endpoint is gone; what becomes of packets is said in the tables.
    pub terminate_connections: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bpffs: "/sys/fs/bpf/fairlead".into(),
            cgroup: None,
            attach: Attach::default(),
            socket_lb: SocketLb::default(),
            flows: default_flows(),
            affinities: DEFAULT_AFFINITIES,
            masquerade_first: 61_000,
            masquerade_ports: 4_096,
            reply_mark: Mark::default(),
            #[cfg(feature = "program-log")]
            program_log: 0,
            count_services: true,
            terminate_connections: false,
        }
    }
}
