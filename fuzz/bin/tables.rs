#![no_main]

#[path = "../src/cluster.rs"]
mod cluster;
#[path = "../../lb-userspace/tests/shared/content.rs"]
mod content;
#[path = "../src/input.rs"]
mod input;
#[path = "../src/tables.rs"]
mod tables;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tables::run(bytes));
