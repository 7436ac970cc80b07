//! SCSI disks of the kernel, in a guest with a kernel of its own: disks of LIO, the kernel's target, by several paths. Needs root,
//! the programs and the package `user-mode-linux`: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use clusterfs_tests::cluster::programs;
use clusterfs_tests::uml::Guest;

const GUEST: &str = env!("CARGO_BIN_EXE_clusterfs-guest");
const LIMIT: Duration = Duration::from_secs(150);

fn guest(scenario: &[&str]) {
    let guest = Guest::start(Path::new(GUEST), scenario, &[], LIMIT).unwrap();
    println!("{}", guest.finish().unwrap_or_else(|e| panic!("{e}")));
}

/// Transfers, compare-and-write, registrations, fencing, permits: the backend without a volume.
#[test]
fn a_scsi_disk_of_the_kernel() {
    guest(&["device"]);
}

/// Two nodes on one LUN. One stands still and is fenced within seconds; it comes back as a new member.
#[test]
fn two_nodes_on_one_lun() {
    let bin = programs().unwrap().canonicalize().unwrap();
    guest(&["volume", bin.to_str().unwrap()]);
}

#[test]
fn paths_come_and_go() {
    guest(&["multipath"]);
}
