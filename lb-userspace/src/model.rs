//! The state of the cluster, joined: what a Service is, and which endpoints it has.
//!
//! In: objects as the source read them. Out: for a Service, its [`Backend`]s. Never here: what this node does with them.

pub mod object;

pub use object::{EndpointSlice, Node, ObjectName, Pod, Service, ServiceCidr};
