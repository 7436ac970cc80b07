//! The device of real mounts fails: with errors, with silence, by being full. Every acknowledged message is there once, the
//! nodes come back by themselves. Moments and victims come from a seed, which is printed; CLUSTERFS_SEED=N plays it again.
//! Needs root and the programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::{Cluster, umount};
use clusterfs_tests::faulty::{Fault, FaultyDevice};
use clusterfs_tests::load::{Delivered, assert_once, deliver_during, make_boxes, read_when_back, returns};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const NODES: usize = 4;
const BOXES: [&str; 3] = ["anna", "ben", "team"];
const LIMIT: Duration = Duration::from_secs(200);
const LEASE: [&str; 4] = ["--lease", "2s", "--queue-time", "0"];

fn seed() -> u64 {
    let seed = std::env::var("CLUSTERFS_SEED").map_or(1, |s| s.parse().expect("CLUSTERFS_SEED is a number"));
    println!("CLUSTERFS_SEED={seed}");
    seed
}

fn start(image: &Path, nodes: usize) -> Cluster {
    let c = Cluster::formatted_on(image, nodes + 1, LIMIT, &LEASE).unwrap();
    (0..nodes).for_each(|n| c.mount(n).unwrap());
    make_boxes(&c.mount_point(0), &BOXES).unwrap();
    c
}

fn verify(c: &Cluster, nodes: usize, all: &Delivered) {
    println!("{} delivered, {} failed, {} times a node came back", all.ids.len(), all.failed, returns(c, nodes));
    (0..nodes).for_each(|n| assert_once(c, n, &BOXES, &all.ids, read_when_back));
}

#[test]
fn one_node_after_the_other_gets_errors_or_silence() {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    let device = FaultyDevice::new(1 << 30).unwrap();
    let c = start(&device.image(), NODES);
    let all = deliver_during(&c, NODES, &BOXES, seed, || {
        for round in 0..6 {
            std::thread::sleep(Duration::from_millis(rng.random_range(300..1000)));
            let victim = c.pid(rng.random_range(0..NODES)).ok_or("no such node")?;
            let fault = match round % 3 {
                0 => Fault::Errors,
                1 => Fault::Silence,
                _ => Fault::Some { one_in: rng.random_range(2..10) },
            };
            device.fail(victim, fault);
            std::thread::sleep(Duration::from_millis(rng.random_range(200..4000)));
            device.heal(victim);
        }
        std::thread::sleep(Duration::from_secs(4));
        Ok(())
    })
    .unwrap();
    println!("{} commands failed", device.failed());
    assert!(device.failed() > 0 && returns(&c, NODES) > 0, "no node ever noticed: this test shows nothing");
    verify(&c, NODES, &all);
    c.finish_after_faults();
}

/// The device is gone for all nodes for longer than their leases: nobody can judge anybody, and all come back.
#[test]
fn the_device_is_gone_for_all() {
    let seed = seed();
    let device = FaultyDevice::new(1 << 30).unwrap();
    let c = start(&device.image(), NODES);
    let pids: Vec<u32> = (0..NODES).map(|n| c.pid(n).unwrap()).collect();
    let all = deliver_during(&c, NODES, &BOXES, seed, || {
        for fault in [Fault::Silence, Fault::Errors] {
            std::thread::sleep(Duration::from_secs(1));
            pids.iter().for_each(|p| device.fail(*p, fault));
            std::thread::sleep(Duration::from_secs(4));
            pids.iter().for_each(|p| device.heal(*p));
            std::thread::sleep(Duration::from_secs(4));
        }
        Ok(())
    })
    .unwrap();
    verify(&c, NODES, &all);
    c.finish_after_faults();
}

/// A filesystem in memory, which says when it is full.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(dir.path()));
        Self(dir)
    }

    fn grow(&self, size: &str) {
        run(Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(self.0.path()));
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        if let Err(e) = umount(self.0.path(), libc::MNT_DETACH) {
            eprintln!("{}: {e}", self.0.path().display());
        }
    }
}

fn run(command: &mut Command) {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// A sparse image whose filesystem is full: deliveries get errors, and go on by themselves when there is room again.
#[test]
fn the_filesystem_under_the_image_is_full() {
    const TWO: usize = 2;
    let seed = seed();
    let room = Tmpfs::new("24m");
    let image = room.0.path().join("lun.img");
    File::create(&image).unwrap().set_len(1 << 30).unwrap();
    let c = start(&image, TWO);
    let full = deliver_during(&c, TWO, &BOXES, seed, || {
        let end = Instant::now() + Duration::from_secs(60);
        while !(0..TWO).any(|n| c.log_text(n).contains("No space left on device")) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        // Others notice, and those that lapsed try to come back.
        std::thread::sleep(Duration::from_secs(3));
        room.grow("900m");
        std::thread::sleep(Duration::from_secs(6));
        Ok(())
    })
    .unwrap();
    assert!(full.failed > 0, "it was never full: this test shows nothing");
    verify(&c, TWO, &full);
    c.finish_after_faults();
}
