//! Every packet of `data/flows.json`: decided in memory, and by the command `fairlead explain`.

#![cfg(test)]

mod cases;
mod command;
#[path = "../shared/content.rs"]
mod content;
mod memory;
#[path = "../shared/objects.rs"]
mod objects;
mod pipeline;
