//! Every packet of `data/flows.json`: decided in memory, and by the command `fairlead explain`.

#[cfg(test)]
mod cases;
#[cfg(test)]
mod command;
#[cfg(test)]
mod memory;
