//! Every packet of `data/flows.json`: decided in memory, and by the command `fairlead explain`.

mod cases;
mod command;
mod memory;
