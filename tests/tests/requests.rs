//! What this node's kernel already knows costs the daemon nothing: a second `ls -l` of a large directory asks for no
//! attribute and no name. Needs root and the programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;

const ENTRIES: usize = 10_000;

/// As `ls -l`: the listing, then the attributes of every entry.
fn list(dir: &Path) -> u64 {
    let names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(names.len(), ENTRIES);
    names.iter().map(|p| fs::symlink_metadata(p).unwrap().len()).sum()
}

/// What mount.clusterfs logs on SIGUSR1.
fn counts(c: &Cluster, node: usize) -> BTreeMap<String, u64> {
    const MARK: &str = "requests of the kernel so far: ";
    let told = || c.log_text(node).matches(MARK).count();
    let before = told();
    let pid = c.pid(node).unwrap() as libc::pid_t;
    // SAFETY: a child of this process that has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGUSR1) }, 0);
    let deadline = Instant::now() + Duration::from_secs(10);
    while told() == before {
        assert!(Instant::now() < deadline, "no counters after SIGUSR1");
        std::thread::sleep(Duration::from_millis(5));
    }
    let log = c.log_text(node);
    let line = log.rsplit(MARK).next().unwrap().lines().next().unwrap();
    line.split_whitespace()
        .map(|p| p.split_once('=').unwrap())
        .map(|(k, n)| (k.to_string(), n.parse().unwrap()))
        .collect()
}

#[test]
fn a_repeated_listing_asks_for_no_attributes() {
    let c = Cluster::start(2);
    let made = c.mount_point(0).join("d");
    fs::create_dir(&made).unwrap();
    for i in 0..ENTRIES {
        fs::write(made.join(format!("message-{i:05}")), [b'x'; 3]).unwrap();
    }
    // On the node that made them, and on one that reads them for the first time.
    for node in [0, 1] {
        let dir = c.mount_point(node).join("d");
        let cold = counts(&c, node);
        let times: Vec<Duration> = (0..3)
            .map(|_| {
                let started = Instant::now();
                assert_eq!(list(&dir), 3 * ENTRIES as u64);
                started.elapsed()
            })
            .collect();
        let before = counts(&c, node);
        let looked_up = before.get("lookup").unwrap_or(&0) - cold.get("lookup").unwrap_or(&0);
        assert!(looked_up <= 2, "node {node} was asked for {looked_up} names that it had listed");
        let started = Instant::now();
        list(&dir);
        let took = started.elapsed();
        let after = counts(&c, node);
        let asked = |kind: &str| after.get(kind).unwrap_or(&0) - before.get(kind).unwrap_or(&0);
        println!(
            "node {node}: {ENTRIES} entries listed in {times:.0?}, then in {took:.0?} with {after:?}, before {before:?}"
        );
        // Reading a directory changes its own access time.
        assert!(asked("getattr") <= 1, "node {node} asked again for {} attributes", asked("getattr"));
        assert_eq!(asked("lookup"), 0, "node {node} asked again for names");
        let listing = asked("readdir") + asked("readdirplus");
        assert!(listing < 500, "{listing} requests for one listing");
    }
    // What another node changes is asked for again.
    fs::write(c.mount_point(0).join("d/message-00007"), b"longer").unwrap();
    assert_eq!(fs::metadata(c.mount_point(1).join("d/message-00007")).unwrap().len(), 6);
    c.finish();
}
