//! The crash simulator on fixed seeds, on a few fresh ones, and its own repeatability.

use clusterfs_tests::sim::{fresh_seed, run};

/// Seeds that once showed a bug, with what it was.
const REGRESSIONS: &[(u64, &str)] = &[
    (12, "fsync of a file in a domain that another node had taken left this node's other changes undone"),
    (45, "a revocation whose flush freed a block of another node's group tried again for ever"),
    (31, "what ran in the background beside an unmount left a record that nobody replayed"),
    (227, "rmdir changed the lock block of the removed directory's domain before the removal was durable"),
    (10027, "a hole punched into short contents that had grown by truncate was not made"),
    (10054, "mkdir turned in a circle while the group of the next domain number was being given up"),
    (
        661,
        "the owner of a slot and the node that had recovered it took the slot's domain and a group from each other for ever",
    ),
    (3918, "the same, during an unmount"),
    (30461, "a loss of power undid the taking of one lock of a record that itself survived: half of it was replayed"),
    (1650, "an unmount waited for compare-and-writes whose outcome had been unknown long before"),
    (2380, "a node that had failed in the background was taken for one that lived"),
    (6813, "a node hung until just before the device stalled, together longer than its lease"),
    (82, "a node that failed in the middle of a revocation turned in a circle"),
    (65, "unnamed files of dead nodes stayed: the node that had recovered them left before it had freed them"),
    (76, "unnamed files stayed: the grant of their domain was older than the death of the node that had them open"),
    (7691, "blocks of a dead node's journal were read one after the other, and the others waited for seconds"),
    (5023, "on a full volume a group was kept for an operation when nobody was promised anything of it any more"),
    (4885, "on a full volume a write that needs three blocks went round all groups for the one that was left in each"),
    (
        8337,
        "on a full volume an operation that needs more than is free was given the group that it had again and again",
    ),
    (2806, "changes let in one by one made a record together that was too large for the smallest journal"),
    (7449, "two nodes took a group and a domain from each other, each for an operation that needs both"),
];

fn all_pass(seeds: impl IntoIterator<Item = u64>) {
    let (mut crashes, mut verified) = (0, 0);
    for seed in seeds {
        let totals = run(seed, false).unwrap_or_else(|f| panic!("{f}\nto see it all: clusterfs-sim --seed {seed}"));
        crashes += totals.crashes;
        verified += totals.verified;
    }
    println!("{crashes} crashes, {verified} trees and messages verified after them");
}

#[test]
fn fixed_seeds_1() {
    all_pass(1..=30);
}

#[test]
fn fixed_seeds_2() {
    all_pass(31..=60);
}

#[test]
fn fixed_seeds_3() {
    all_pass(61..=90);
}

#[test]
fn fixed_seeds_4() {
    all_pass(91..=120);
}

#[test]
fn seeds_that_once_failed() {
    for (seed, what) in REGRESSIONS {
        if let Err(f) = run(*seed, false) {
            panic!("{f}\nthis seed once failed because {what}");
        }
    }
}

#[test]
fn fresh_seeds() {
    let first = fresh_seed();
    println!("seeds {first} to {}", first + 9);
    all_pass(first..first + 10);
}

/// Otherwise a failing seed could not be looked at.
#[test]
fn a_seed_always_does_the_same() {
    for seed in [3, 7, 19] {
        let once = run(seed, false).expect("passes");
        let again = run(seed, false).expect("passes");
        assert_eq!(once, again, "seed {seed}");
        assert!(once.operations > 100 && once.crashes > 0, "seed {seed} does too little: {once:?}");
    }
    assert_ne!(run(3, false).expect("passes").digest, run(7, false).expect("passes").digest);
}
