//! A node that stood still for longer than its lease: the others take over what it held, and when it wakes up it becomes a
//! node again by itself, its mount point in place, and shows what the others did. Needs root and the programs:
//! `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::load::{assert_once, deliver_during, make_boxes, read_when_back, returns};
use clusterfs_tests::sys::{Map, stat};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const LIMIT: Duration = Duration::from_secs(200);
/// A silent node is taken over after lease and two heartbeats: 2.7 s.
const LEASE: [&str; 4] = ["--lease", "2s", "--queue-time", "0"];
/// A takeover and whatever this machine adds.
const TAKEOVER: Duration = Duration::from_secs(6);

fn start(nodes: usize) -> Cluster {
    let c = Cluster::formatted_with(nodes + 1, 1 << 30, LIMIT, &LEASE).unwrap();
    (0..nodes).for_each(|n| c.mount(n).unwrap());
    c
}

fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "it does not happen that {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn write_synced(path: &Path, what: &str) {
    let mut f = File::create(path).unwrap();
    f.write_all(what.as_bytes()).unwrap();
    f.sync_all().unwrap();
}

fn rejoined(c: &Cluster, node: usize, times: usize) {
    until("the node is a member again", || {
        (c.log_text(node).matches("a member of the volume again").count() >= times).then_some(())
    });
}

#[test]
fn a_node_that_stood_still_is_taken_over_and_comes_back() {
    let c = start(2);
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    fs::create_dir(a.join("box")).unwrap();
    fs::create_dir(a.join("other")).unwrap();
    write_synced(&a.join("box/read"), "as it was");
    write_synced(&a.join("box/gone"), "to be removed");
    write_synced(&a.join("box/kept"), "kept open");
    File::open(a.join("box")).unwrap().sync_all().unwrap();
    // All of it cached by node 0's kernel, some of it open.
    let mut read = File::open(a.join("box/read")).unwrap();
    assert_eq!(fs::read(a.join("box/read")).unwrap(), b"as it was");
    let map = Map::new(&read, 9, false).unwrap();
    assert_eq!(map.read(0, 9), b"as it was");
    let kept = File::options().read(true).write(true).open(a.join("box/kept")).unwrap();
    let mut unsynced = File::create(a.join("box/unsynced")).unwrap();
    unsynced.write_all(b"never acknowledged as durable").unwrap();

    c.suspend(0).unwrap();
    let started = Instant::now();
    write_synced(&b.join("box/read"), "as it is!");
    println!("what the silent node held was had after {:.1?}", started.elapsed());
    assert!(started.elapsed() < TAKEOVER, "{:?}", started.elapsed());
    fs::remove_file(b.join("box/gone")).unwrap();
    write_synced(&b.join("box/new"), "made meanwhile");
    assert!(!b.join("box/unsynced").exists() || stat(&b.join("box/unsynced")).unwrap().st_size == 0);

    c.resume(0).unwrap();
    rejoined(&c, 0, 1);
    assert_eq!(fs::read(a.join("box/read")).unwrap(), b"as it is!");
    let mut text = String::new();
    read.seek(SeekFrom::Start(0)).unwrap();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "as it is!", "a descriptor from before");
    assert_eq!(map.read(0, 9), b"as it is!", "a memory map from before");
    assert!(!a.join("box/gone").exists());
    assert_eq!(fs::read(a.join("box/new")).unwrap(), b"made meanwhile");

    // What was lost is not vouched for: not through the old descriptor, nor, once, to who made it.
    assert!(unsynced.sync_all().is_err());
    assert!(unsynced.sync_all().is_err());
    let dir = File::open(a.join("box")).unwrap();
    assert!(dir.sync_all().is_err());
    assert!(dir.sync_all().is_ok());
    // Elsewhere everything goes on at once.
    write_synced(&a.join("other/file"), "after the return");
    assert_eq!(fs::read(b.join("other/file")).unwrap(), b"after the return");
    // And in both directions.
    fs::write(b.join("other/file"), "from the other side").unwrap();
    assert_eq!(fs::read(a.join("other/file")).unwrap(), b"from the other side");

    // A file open from before is still one that must not be freed when the other node removes its name.
    fs::remove_file(b.join("box/kept")).unwrap();
    let mut text = String::new();
    (&kept).read_to_string(&mut text).unwrap();
    assert_eq!(text, "kept open");
    drop((read, map, kept, unsynced, dir));
    c.finish_after_faults();
}

/// Nodes stand still, one after the other and two at once, under delivery. A delivery that failed is made again, as mail
/// servers do; acknowledged ones are there once.
#[test]
fn nodes_stand_still_under_delivery() {
    const NODES: usize = 4;
    const BOXES: [&str; 3] = ["anna", "ben", "team"];
    let seed = std::env::var("CLUSTERFS_SEED").map_or(1, |s| s.parse().expect("CLUSTERFS_SEED is a number"));
    println!("CLUSTERFS_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let c = start(NODES);
    make_boxes(&c.mount_point(0), &BOXES).unwrap();
    let delivered = deliver_during(&c, NODES, &BOXES, seed, || {
        for round in 0..5 {
            std::thread::sleep(Duration::from_millis(rng.random_range(200..1500)));
            let first = rng.random_range(0..NODES);
            let victims = if round % 2 == 0 { vec![first] } else { vec![first, (first + 1) % NODES] };
            victims.iter().try_for_each(|v| c.suspend(*v))?;
            std::thread::sleep(Duration::from_millis(rng.random_range(1000..5000)));
            victims.iter().try_for_each(|v| c.resume(*v))?;
        }
        // Whoever lapsed comes back and delivers again.
        std::thread::sleep(Duration::from_secs(4));
        Ok(())
    })
    .unwrap();
    let returns = returns(&c, NODES);
    println!("{} delivered, {} failed, {returns} times a node came back", delivered.ids.len(), delivered.failed);
    assert!(returns > 0, "no node ever lapsed: this test shows nothing");
    (0..NODES).for_each(|n| assert_once(&c, n, &BOXES, &delivered.ids, read_when_back));
    c.finish_after_faults();
}
