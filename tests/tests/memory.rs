//! The daemon's memory stays within what its options say while trees of small files are made and walked. `CLUSTERFS_SCALE=full`:
//! a million files instead of 60,000. Needs root and the programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use clusterfs_tests::cluster::Cluster;

const DIRECTORIES: u64 = 60;
const CACHE: u64 = 8 << 20;
const DIRTY: u64 = 8 << 20;
/// Journal of an 8 GiB volume for 2 nodes: blocks that it logged and has not placed, and the records themselves, in memory.
const JOURNAL: u64 = 2 * (64 << 20);
/// Program, threads' stacks, request buffers.
const BASE: u64 = 48 << 20;
/// For each inode that the kernel knows.
const INODE: u64 = 128;

fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

fn make(root: &Path, per_directory: u64) {
    for d in 0..DIRECTORIES {
        let dir = root.join(format!("d{d}"));
        fs::create_dir(&dir).unwrap();
        for i in 0..per_directory {
            fs::File::create(dir.join(format!("message{i}"))).unwrap().write_all(&[b'x'; 700]).unwrap();
        }
    }
}

fn walk(root: &Path) -> u64 {
    let mut files = 0;
    for d in fs::read_dir(root).unwrap() {
        for f in fs::read_dir(d.unwrap().path()).unwrap() {
            assert_eq!(f.unwrap().metadata().unwrap().len(), 700);
            files += 1;
        }
    }
    files
}

#[test]
fn memory_is_bounded() {
    let full = std::env::var("CLUSTERFS_SCALE").as_deref() == Ok("full");
    let (files, limit) = if full { (1_020_000, 3600) } else { (60_000, 150) };
    let c = Cluster::formatted_for(2, 8 << 30, Duration::from_secs(limit)).unwrap();
    let options = format!("cache={CACHE},dirty={DIRTY}");
    c.mount_with(0, &options).unwrap();
    make(&c.mount_point(0), files / DIRECTORIES);
    let making = peak(c.pid(0).unwrap());
    assert_eq!(walk(&c.mount_point(0)), files);
    c.mount_with(1, &options).unwrap();
    assert_eq!(walk(&c.mount_point(1)), files);
    let peaks = [0, 1].map(|n| peak(c.pid(n).unwrap()) >> 20);
    let may = (CACHE + DIRTY + JOURNAL + BASE + files * INODE) >> 20;
    println!(
        "{files} files: {} MiB while making them, {peaks:?} MiB after walking them, {may} MiB allowed",
        making >> 20
    );
    assert!(peaks.iter().all(|p| *p <= may), "{peaks:?} MiB, {may} MiB are allowed");
    c.finish();
}
