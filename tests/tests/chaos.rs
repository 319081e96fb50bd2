//! Whatever happens to agents, API server, devices and objects at once: a short run of `cargo xtask chaos`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tests::chaos::{Options, run};

#[test]
fn whatever_happens_connections_to_lasting_endpoints_go_on_and_every_frontend_is_right_in_the_end() {
    // Another seed every run; a failure names it, and FAIRLEAD_SEED brings it back.
    let seed = match std::env::var("FAIRLEAD_SEED") {
        Ok(text) => text.parse().expect("FAIRLEAD_SEED is a number"),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64),
    };
    let report = run(&Options { length: Duration::from_secs(45), seed, binary: None }, |_| {}, || Ok(()))
        .unwrap_or_else(|error| panic!("{error:#}"));
    println!("{report:?}");
    assert!(report.events.iter().map(|(_, count)| count).sum::<u32>() > 50, "little happened: {report:?}");
    assert!(report.answered > 1000, "few asked: {report:?}");
    assert!(report.forwarded > 100, "little was compared: {report:?}");
}
