//! Why a packet met its fate: the verdict's cause, the counter's index and the metric's label are one thing.

/// What happens to a packet, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It is not ours, and goes on as it is.
    Pass,
    /// It is ours, and goes on with another address.
    Translate,
    /// It is refused at once.
    Refuse,
    /// It ends here, in silence.
    Drop,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $verdict:ident $name:ident = $label:literal,)*) => {
        /// The cause of a verdict.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Reason { $($(#[$doc])* $name,)* }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The metric's label.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// What it is the cause of.
            #[must_use]
            #[inline(always)]
            pub const fn verdict(self) -> Verdict {
                match self { $(Self::$name => Verdict::$verdict,)* }
            }
        }
    };
}

reasons! {
    /// No frontend, no flow of ours.
    Pass NotService = "not_service",
    /// Not for this host: multicast, broadcast, another host's frame.
    Pass NotForHost = "not_for_host",
    /// A ClusterIP that is the node's own address, or localhost from outside: left to the host.
    Pass OwnAddress = "own_address",
    /// Headers that can't be read.
    Pass Unreadable = "unreadable",
    /// The middle of a connection of which nothing is known, to an address that others use too.
    Pass MidFlowForeign = "mid_flow_foreign",
    /// A new connection.
    Translate NewFlow = "new_flow",
    /// A packet of a known connection.
    Translate Established = "established",
    /// The middle of a connection that was forgotten, to the endpoint that the table names.
    Translate MidFlow = "mid_flow",
    /// An answer, its source became the frontend again.
    Translate Reply = "reply",
    /// A request, its source became the node's.
    Translate Masqueraded = "masqueraded",
    /// An answer to a masqueraded request, its destination became the client again.
    Translate MasqueradeReply = "masquerade_reply",
    /// An ICMP error about a connection of ours.
    Translate IcmpError = "icmp_error",
    /// No endpoint anywhere.
    Refuse NoEndpoints = "no_endpoints",
    /// A ClusterIP has no such port.
    Refuse UnknownPort = "unknown_port",
    /// Policy Local, and all endpoints are elsewhere.
    Drop NoLocalEndpoints = "no_local_endpoints",
    /// The source is in none of the Service's source ranges.
    Drop SourceRange = "source_range",
    /// An address of a ServiceCIDR that no Service has.
    Drop Unallocated = "unallocated",
    /// The middle of a forgotten connection to a frontend that has no endpoints.
    Drop MidFlowNoEndpoints = "mid_flow_no_endpoints",
    /// The flow table took no new entry.
    Drop FlowTableFull = "flow_table_full",
    /// No free port to masquerade with.
    Drop NoMasqueradePort = "no_masquerade_port",
    /// No address to masquerade with on the device.
    Drop NoMasqueradeAddress = "no_masquerade_address",
    /// A later fragment whose first was never seen.
    Drop FragmentWithoutFirst = "fragment_without_first",
    /// More refusals than the limit allows.
    Drop RefusalLimit = "refusal_limit",
    /// An ICMP redirect about a translated connection.
    Drop IcmpRedirect = "icmp_redirect",
    /// The headers could not be written, or a table that the agent writes is inconsistent.
    Drop Internal = "internal",
    /// A TCP connection whose endpoint is gone, where such connections end (`--terminate-connections`).
    Refuse EndpointGone = "endpoint_gone",
    /// A pod's socket, to a frontend that asks for the pod's address: it has none before its packets are sent.
    Pass LeftToPackets = "left_to_packets",
}

/// How many reasons there are.
pub const REASONS: usize = Reason::ALL.len();
