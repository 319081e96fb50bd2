//! What sockets of the node itself have been told: the pairs by which answers become the frontend's again.

use crate::{
    addr::{Addr, Port},
    decide::{Decision, Question, decide},
    reason::Reason,
    tables::Tables,
};

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

/// Where a socket of the node wants to send to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// The address.
    pub addr: Addr,
    /// The port.
    pub port: Port,
    /// IP protocol number.
    pub proto: u8,
}

/// Whether a frontend may be meant: asked before the socket gets storage.
#[inline(always)]
pub fn may_be_translated<T: Tables>(ends: &Ends, tables: &T) -> bool {
    tables.may_be_frontend(&ends.addr, ends.port)
        || tables.may_be_frontend(&ends.addr.unspecified(), ends.port)
        || tables.may_be_frontend(&ends.addr, Port::ZERO)
}

/// Where a socket sends to instead of a frontend: `ends` become the endpoint where the reason's verdict is
/// [`Verdict::Translate`](crate::reason::Verdict::Translate); a refusal is ECONNREFUSED.
///
/// `connects`: every connect chooses anew by `hash`. A datagram of an unconnected socket stays with the endpoint of the last
/// one to that frontend, as long as it serves.
#[inline(always)]
pub fn translate<T: Tables>(ends: &mut Ends, hash: u32, connects: bool, pairs: &mut Pairs, tables: &T) -> Reason {
    if !connects && let Some((addr, port)) = remembered(ends, pairs, tables) {
        (ends.addr, ends.port) = (addr, port);
        return Reason::Established;
    }
    // The address that the packet will have is not chosen yet: the node's, whichever it is.
    let question = Question {
        src: ends.addr.unspecified(),
        dst: ends.addr,
        dport: ends.port,
        proto: ends.proto,
        from_node: true,
        device: 0,
    };
    match decide(&question, hash, tables) {
        Decision::Forward(choice) => {
            let pair = Pair {
                frontend: ends.addr,
                endpoint: choice.endpoint.addr,
                frontend_port: ends.port,
                endpoint_port: choice.endpoint.port,
                endpoint_id: choice.id,
                generation: choice.endpoint.generation,
                used: 1,
            };
            remember(pair, pairs);
            (ends.addr, ends.port) = (choice.endpoint.addr, choice.endpoint.port);
            Reason::NewFlow
        }
        Decision::Reject(reason) | Decision::Drop(reason) | Decision::Pass(reason) => reason,
    }
}

#[inline(always)]
fn remembered<T: Tables>(ends: &Ends, pairs: &Pairs, tables: &T) -> Option<(Addr, Port)> {
    let mut i = 0;
    while i < PAIRS {
        let pair = &pairs.pairs[i];
        if pair.used != 0
            && pair.frontend_port.be == ends.port.be
            && pair.frontend.same(&ends.addr)
            && tables.endpoint(pair.endpoint_id).is_some_and(|endpoint| endpoint.serves(pair.generation))
        {
            return Some((pair.endpoint, pair.endpoint_port));
        }
        i += 1;
    }
    None
}

/// Takes the place of the same frontend, else of the oldest pair.
#[inline(always)]
fn remember(pair: Pair, pairs: &mut Pairs) {
    let mut i = 0;
    while i < PAIRS {
        let old = &mut pairs.pairs[i];
        if old.used != 0 && old.frontend_port.be == pair.frontend_port.be && old.frontend.same(&pair.frontend) {
            *old = pair;
            return;
        }
        i += 1;
    }
    if let Some(oldest) = pairs.pairs.get_mut(pairs.next as usize & (PAIRS - 1)) {
        *oldest = pair;
    }
    pairs.next = pairs.next.wrapping_add(1);
}

/// The frontend that an endpoint stands for, to this socket.
#[inline(always)]
#[must_use]
pub fn restore(addr: &Addr, port: Port, pairs: &Pairs) -> Option<(Addr, Port)> {
    let mut i = 0;
    while i < PAIRS {
        let pair = &pairs.pairs[i];
        if pair.used != 0 && pair.endpoint_port.be == port.be && pair.endpoint.same(addr) {
            return Some((pair.frontend, pair.frontend_port));
        }
        i += 1;
    }
    None
}

const _: () = {
    assert!(size_of::<Pair>() == 48);
    assert!(size_of::<Pairs>() == 48 * PAIRS + 8);
};
