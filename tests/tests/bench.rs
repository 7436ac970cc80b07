//! Every scenario of the bench works, on a cluster and on ext4, and counts the device's commands. Needs root, loop devices,
//! the programs and what `cargo xtask setup` installs.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

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

/// What mentions a directory: mounts, and files behind loop devices.
fn uses_of(dir: &str) -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let loops = Command::new("losetup").args(["--noheadings", "--output", "BACK-FILE"]).output().unwrap();
    let loops = String::from_utf8(loops.stdout).unwrap();
    mounts.lines().chain(loops.lines()).filter(|l| l.contains(dir)).map(str::to_string).collect()
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    let store = tempfile::tempdir().unwrap();
    let dir = store.path().to_str().unwrap();
    let args = ["run", "deliver-2k", "--on", "clusterfs", "--on", "ext4", "--rounds", "1000", "--store", dir];
    let mut run = Command::new(env!("CARGO_BIN_EXE_clusterfs-bench"));
    let mut run = run.args(args).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(run.stderr.take().unwrap()).lines();
    assert!(said.next().unwrap().unwrap().starts_with("deliver-2k"));
    let used = uses_of(dir).len();
    // SAFETY: a child that has not been waited for.
    unsafe { libc::kill(run.id() as libc::pid_t, libc::SIGINT) };
    let status = run.wait().unwrap();
    let said: Vec<String> = said.map(|l| l.unwrap()).collect();
    assert!(!status.success() && said.iter().any(|l| l.contains("ended by a signal")), "{status}: {said:?}");
    assert!(used >= 2, "nothing was mounted");
    assert_eq!(uses_of(dir), [""; 0]);
}
