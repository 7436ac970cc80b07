//! Every scenario of the bench works, on a cluster and on ext4, and counts the device's commands. Needs root, loop devices,
//! the programs and what `cargo xtask setup` installs.
#![allow(clippy::unwrap_used)]

use clusterfs_tests::bench::place::Place;
use clusterfs_tests::bench::{Measured, Scale, measure, scenarios};

fn flushes(measured: &[Measured], scenario: &str, place: &str, nodes: usize) -> f64 {
    let found = measured.iter().find(|m| m.scenario.name == scenario && m.place == place && m.nodes == nodes);
    found.unwrap().rounds[0].io.flushes
}

#[test]
fn every_scenario_measures_something() {
    let store = tempfile::tempdir().unwrap();
    let places = ["clusterfs", "ext4"].map(|spec| Place::new(spec, store.path()).unwrap());
    let measured = measure(&places, &[], Scale::Smoke, 1, |name| eprintln!("{name}")).unwrap();
    let expected: usize = scenarios::all().map(|s| s.nodes.len() + usize::from(s.nodes.contains(&1))).sum();
    assert_eq!(measured.len(), expected);
    for m in &measured {
        let rate = m.rounds[0].rate;
        assert!(rate.is_finite() && rate > 0.0, "{} on {} with {} nodes: {rate}", m.scenario.name, m.place, m.nodes);
    }
    for place in ["clusterfs", "ext4"] {
        assert!(flushes(&measured, "deliver-2k", place, 1) >= 1.0, "a message is promised without a flush on {place}");
    }
    let flag = measured.iter().find(|m| m.scenario.name == "handover" && m.nodes == 2).unwrap();
    assert!(flag.rounds[0].io.compare_and_writes >= 1.0, "a handover without a change of the lock block");
}
