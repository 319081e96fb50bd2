//! Why a packet met its fate: the verdict's cause, the counter's index and the metric's label are one thing.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $label:literal,)*) => {
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
        }
    };
}

reasons! {
    /// Passed: no frontend, no flow of ours.
    NotService = "not_service",
    /// Passed: not for this host (multicast, broadcast, another host's frame), or not IP.
    NotForHost = "not_for_host",
    /// Passed: headers that can't be read.
    Unreadable = "unreadable",
    /// Passed: the middle of a connection of which nothing is known, to an address that others use too.
    MidFlowForeign = "mid_flow_foreign",
    /// Translated: a new connection.
    NewFlow = "new_flow",
    /// Translated: a packet of a known connection.
    Established = "established",
    /// Translated: the middle of a connection that was forgotten, to the endpoint that the table names.
    MidFlow = "mid_flow",
    /// Translated: an answer, its source became the frontend again.
    Reply = "reply",
    /// Translated: a request, its source became the node's.
    Masqueraded = "masqueraded",
    /// Translated: an answer to a masqueraded request, its destination became the client again.
    MasqueradeReply = "masquerade_reply",
    /// Translated: an ICMP error about a connection of ours.
    IcmpError = "icmp_error",
    /// Refused: no endpoint anywhere.
    NoEndpoints = "no_endpoints",
    /// Refused: a ClusterIP has no such port.
    UnknownPort = "unknown_port",
    /// Dropped: policy Local, and all endpoints are elsewhere.
    NoLocalEndpoints = "no_local_endpoints",
    /// Dropped: the source is in none of the Service's source ranges.
    SourceRange = "source_range",
    /// Dropped: an address of a ServiceCIDR that no Service has.
    Unallocated = "unallocated",
    /// Dropped: the middle of a forgotten connection to a frontend that has no endpoints.
    MidFlowNoEndpoints = "mid_flow_no_endpoints",
    /// Dropped: the flow table took no new entry.
    FlowTableFull = "flow_table_full",
    /// Dropped: no free port to masquerade with.
    NoMasqueradePort = "no_masquerade_port",
    /// Dropped: no address to masquerade with on the device.
    NoMasqueradeAddress = "no_masquerade_address",
    /// Dropped: a later fragment whose first was never seen.
    FragmentWithoutFirst = "fragment_without_first",
    /// Dropped: more refusals than the limit allows.
    RefusalLimit = "refusal_limit",
    /// Dropped: an ICMP redirect about a translated connection.
    IcmpRedirect = "icmp_redirect",
    /// Dropped: the headers could not be written, or a table that the agent writes is inconsistent.
    Internal = "internal",
}

/// How many reasons there are.
pub const REASONS: usize = Reason::ALL.len();
