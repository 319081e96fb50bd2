//! The Fairlead agent, in the order in which data flows through it:
//! [`source`] → [`model`] → [`plan`] → [`image`] → [`kernel`].
//!
//! `model`, `plan` and `image` are pure: no I/O, no clock, no logging. [`agent`] drives them, [`serve`] says to others
//! how it goes, [`cli`] is the door.

pub mod agent;
pub mod cli;
pub mod config;
pub mod events;
pub mod image;
pub mod kernel;
pub mod model;
pub mod pipeline;
pub mod plan;
pub mod serve;
pub mod source;
