#![no_main]

#[path = "../src/input.rs"]
mod input;
#[path = "../src/packet.rs"]
mod packet;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| packet::run(bytes));
