//! What sockets of the node itself have been told: the pairs by which answers become the frontend's again.

use crate::addr::{Addr, Port};

/// How many frontends an unconnected socket can talk to at once before the oldest pair is overwritten.
pub const PAIRS: usize = 16;

/// A frontend that a socket talks to, and the endpoint that stands for it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    /// What the process said.
    pub frontend: Addr,
    /// Where its packets go.
    pub endpoint: Addr,
    /// What the process said.
    pub frontend_port: Port,
    /// Where its packets go.
    pub endpoint_port: Port,
    /// Id of the endpoint.
    pub endpoint_id: u32,
    /// Generation of that id.
    pub generation: u32,
    /// Not 0 where the pair is in use.
    pub used: u32,
}

/// The storage of one socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pairs {
    /// The pairs; which is next to be overwritten is `next`.
    pub pairs: [Pair; PAIRS],
    /// Counts up.
    pub next: u32,
    /// Always 0.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<Pair>() == 48);
    assert!(size_of::<Pairs>() == 48 * PAIRS + 8);
};
