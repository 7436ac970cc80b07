//! A bounded run of the fuzzing that `clusterfs-fuzz` does for longer: fixed seeds, and a few that are new each time and printed.
#![allow(clippy::unwrap_used)]

use std::time::{SystemTime, UNIX_EPOCH};

use clusterfs_tests::fuzz::watch::Counting;
use clusterfs_tests::fuzz::{
    formats::Corpus, golden, noise::Noise, requests::Requests, volume::Repaired, volume::Target,
};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The fixed seeds, then as many fresh ones.
fn seeds(fixed: u64, fresh: u64) -> impl Iterator<Item = u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let first = now % 1_000_000_000 * 1000;
    println!("fresh seeds: {first} and the {} after it", fresh.saturating_sub(1));
    (1..=fixed).chain(first..first + fresh)
}

#[test]
fn structures() {
    let corpus = Corpus::new(&[golden("clean").unwrap(), golden("one-dead").unwrap()]);
    assert!(corpus.blocks() > 50);
    for seed in seeds(20_000, 2_000) {
        corpus.case(seed).unwrap();
    }
}

#[test]
fn volumes() {
    let target = Target::new(golden("one-dead").unwrap());
    assert!(target.kinds() >= 8);
    // The last four: slot blocks that had lost a life, lock blocks that name lives which never were.
    let regressions = [241, 1053, 1192, 1490];
    let outcomes: Vec<_> = seeds(150, 30).chain(regressions).map(|seed| target.case(seed).unwrap()).collect();
    assert!(outcomes.iter().any(|o| o.found) && outcomes.iter().any(|o| o.read), "nothing was reached");
}

#[test]
fn repairs() {
    let target = Target::new(golden("one-dead").unwrap());
    let outcomes: Vec<_> = seeds(60, 10).map(|seed| target.repair(seed).unwrap()).collect();
    let sound = outcomes.iter().filter(|o| **o == Repaired::Sound).count();
    assert!(sound > outcomes.len() / 2, "hardly anything was repaired: {outcomes:?}");
}

#[test]
fn new_volumes_over_old_ones() {
    let target = Target::new(golden("one-dead").unwrap());
    for seed in seeds(20, 5) {
        target.remake(seed).unwrap();
    }
}

#[test]
fn noise() {
    let noise = Noise::new(golden("clean").unwrap()).unwrap();
    for seed in seeds(30, 5) {
        noise.case(seed).unwrap();
    }
}

#[test]
fn requests() {
    let requests = Requests::new(golden("clean").unwrap());
    let taken: u64 = seeds(60, 10).map(|seed| requests.case(seed).unwrap()).sum();
    assert!(taken > 5_000, "only {taken} messages got past the parser");
}
