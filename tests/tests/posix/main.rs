//! What POSIX and Linux say of a filesystem, on real mounts: the suite `pjdfstest`, the exerciser `fsx`, what neither looks
//! at, and what programs do that map their files. docs/SEMANTICS.md promises it.
//!
//! Needs root, the programs and the tools: `cargo xtask setup`.
#![allow(clippy::unwrap_used)]

mod contents;
mod durable;
mod index_files;
mod limits;
mod suite;

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::exercise;

/// Operations of `fsx` on each node; `cargo xtask exercise` does a million.
const FSX_OPERATIONS: u64 = 4000;
const SHARED_OPERATIONS: u64 = 500;

#[test]
fn every_way_to_a_file_agrees_on_two_nodes_at_once() {
    let c = Cluster::start(2);
    exercise::fsx(&c, &[0, 1], FSX_OPERATIONS, 1).unwrap_or_else(|e| panic!("{e}"));
    c.finish();
}

#[test]
fn every_way_to_a_file_agrees_between_nodes() {
    let c = Cluster::start(2);
    exercise::shared_file(&c, &[0, 1], SHARED_OPERATIONS, 1).unwrap_or_else(|e| panic!("{e}"));
    c.finish();
}
