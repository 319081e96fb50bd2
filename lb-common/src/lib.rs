//! What the kernel programs and the agent must agree on.
//!
//! In the order in which a packet meets them: header reading ([`parse`]), the policy ([`decide`]), what is
//! remembered about a connection ([`flow`]), header writing ([`rewrite`], [`icmp`], [`refuse`]). All of it runs against
//! two traits, [`packet::Packet`] for the bytes and [`tables::Tables`] for the state, so the same code runs in the kernel,
//! in `fairlead explain`, under proptest and under the fuzzer.
//!
//! Nothing here allocates, prints, or knows of Kubernetes.
#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod addr;
pub mod affinity;
pub mod checksum;
pub mod count;
pub mod decide;
pub mod flow;
pub mod hash;
pub mod icmp;
pub mod layout;
pub mod packet;
pub mod parse;
pub mod path;
pub mod reason;
pub mod refuse;
pub mod rewrite;
pub mod sctp;
pub mod socket;
pub mod tables;

#[cfg(any(test, feature = "user"))]
pub mod astray;
#[cfg(any(test, feature = "user"))]
pub mod memory;
