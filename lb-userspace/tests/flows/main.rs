//! Every packet of `data/flows.json`: decided in memory, by the command `fairlead explain`, by the programs in the kernel, and by
//! sockets of the node. The last two as root.

#![cfg(test)]

mod affinity;
mod cases;
mod command;
#[path = "../shared/content.rs"]
mod content;
mod kernel;
mod machine;
mod memory;
mod node;
#[path = "../shared/objects.rs"]
mod objects;
mod pipeline;
