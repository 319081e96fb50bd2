//! What the fuzzer runs (`fuzz/`), without the fuzzer: on inputs that once made it fail, and on random ones.

#![cfg(test)]

#[path = "../../../fuzz/src/cluster.rs"]
mod cluster;
#[path = "../shared/content.rs"]
mod content;
#[path = "../../../fuzz/src/input.rs"]
mod input;
#[path = "../../../fuzz/src/manifests.rs"]
mod manifests;
#[path = "../../../fuzz/src/packet.rs"]
mod packet;
#[path = "../../../fuzz/src/tables.rs"]
mod tables;

use std::{fs, path::Path};

use proptest::{collection::vec, prelude::*, test_runner::FileFailurePersistence};

#[test]
fn inputs_that_once_failed_do_not() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/regressions");
    let targets = [("manifests", manifests::run as fn(&[u8])), ("packet", packet::run), ("tables", tables::run)];
    for (target, run) in targets {
        // There is no folder as long as nothing has failed.
        for file in fs::read_dir(folder.join(target)).into_iter().flatten() {
            let path = file.unwrap().path();
            println!("{}", path.display());
            run(&fs::read(path).unwrap());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(2000),
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/fuzz/regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn frames_cross_a_node_and_their_answers_come_back(bytes in vec(any::<u8>(), 0..600)) {
        packet::run(&bytes);
    }

    #[test]
    fn manifests_of_any_kind_lead_to_the_tables_of_a_fresh_start(bytes in vec(any::<u8>(), 0..400)) {
        manifests::run(&bytes);
    }

    #[test]
    fn damaged_tables_are_read_and_mended(bytes in vec(any::<u8>(), 0..400)) {
        tables::run(&bytes);
    }
}
