//! Locks by reads and writes alone (`mkfs.clusterfs --locks=plain`) on real mounts: mail goes from node to node, nodes die under
//! delivery, the others go on after the time that docs/LOCKS.md gives, and nothing that was acknowledged is lost. Needs root and
//! the programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::load::{assert_once, make_boxes, noise};
use clusterfs_tests::loop_device::LoopDevice;
use clusterfs_tests::mail::{Mailer, deliver_maildir, read_maildir};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const NODES: usize = 3;
const LIMIT: Duration = Duration::from_secs(200);
const BOXES: [&str; 3] = ["anna", "ben", "team"];
const PLAIN: [&str; 5] = ["--locks=plain", "--lease", "2s", "--queue-time", "1s"];
/// No sooner may a dead node's locks be had: lease and queue time. Its last heartbeat may be one heartbeat (a third of a second)
/// older than its death.
const NO_SOONER: Duration = Duration::from_millis(3000 - 667);
/// Lease, two heartbeats and queue time; then a look per heartbeat, replay and whatever else the one who waits waits for.
const TAKEOVER: Duration = Duration::from_millis(3667 + 2000);

fn start() -> Cluster {
    let c = Cluster::formatted_with(NODES + 1, 1 << 30, LIMIT, &PLAIN).unwrap();
    (0..NODES).for_each(|n| c.mount(n).unwrap());
    make_boxes(&c.mount_point(0), &BOXES).unwrap();
    c
}

fn seed() -> u64 {
    let seed = std::env::var("CLUSTERFS_SEED").map_or(1, |s| s.parse().expect("CLUSTERFS_SEED is a number"));
    println!("CLUSTERFS_SEED={seed}");
    seed
}

fn write_synced(path: &Path, what: &str) {
    let mut f = File::create(path).unwrap();
    f.write_all(what.as_bytes()).unwrap();
    f.sync_all().unwrap();
}

#[test]
fn mail_delivered_on_one_node_is_read_on_the_others() {
    let c = start();
    let mut ids = Vec::new();
    for (i, m) in Mailer::new(seed()).largest(50 << 10).take(60).enumerate() {
        let (writer, reader) = (i % NODES, (i + 1) % NODES);
        let name = deliver_maildir(&c.mount_point(writer).join(BOXES[i % BOXES.len()]), &m).unwrap();
        let there = c.mount_point(reader).join(name.strip_prefix(c.mount_point(writer)).unwrap());
        assert!(there.exists(), "node {reader} does not see {}", there.display());
        ids.push(m.id);
    }
    (0..NODES).for_each(|n| assert_once(&c, n, &BOXES, &ids, read_maildir));
    let told = c.program("clusterfs", &["info"]).unwrap();
    assert!(told.contains("incompatible 0x1,"), "these are not plain locks: {told}");
    c.finish();
}

/// What one node delivered: acknowledged messages, the longest wait for one, and how it ended.
struct Delivered {
    ids: Vec<String>,
    longest: Duration,
    error: Option<std::io::Error>,
}

fn deliver(root: &Path, seed: u64, first: usize, stop: &AtomicBool) -> Delivered {
    let mut d = Delivered { ids: Vec::new(), longest: Duration::ZERO, error: None };
    for (i, m) in Mailer::new(seed).largest(50 << 10).enumerate() {
        if stop.load(Relaxed) {
            break;
        }
        let started = Instant::now();
        let done = deliver_maildir(&root.join(BOXES[(i + first) % BOXES.len()]), &m);
        d.longest = d.longest.max(started.elapsed());
        match done {
            Ok(_) => d.ids.push(m.id),
            Err(e) => {
                d.error = Some(e);
                break;
            }
        }
    }
    d
}

#[test]
fn a_node_is_killed_under_delivery_and_waited_out() {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    let c = start();
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        let victim = rng.random_range(0..NODES);
        let moment = Duration::from_millis(rng.random_range(300..1500));
        let stop = AtomicBool::new(false);
        let (done, noise) = std::thread::scope(|s| {
            let threads: Vec<_> = (0..NODES)
                .map(|n| {
                    let (root, stop) = (c.mount_point(n), &stop);
                    let seed = 1000 * seed + (10 * round + n) as u64;
                    s.spawn(move || deliver(&root, seed, n, stop))
                })
                .collect();
            let noise = s.spawn(|| noise(&stop));
            std::thread::sleep(moment);
            let killed = c.kill9(victim);
            std::thread::sleep(TAKEOVER + Duration::from_secs(1));
            stop.store(true, Relaxed);
            killed.unwrap();
            (threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>(), noise.join().unwrap())
        });
        let counts: Vec<_> = done.iter().map(|d| d.ids.len()).collect();
        let waits: Vec<_> = done.iter().map(|d| d.longest).collect();
        println!(
            "round {round}: node {victim} killed after {moment:?}; delivered {counts:?}, longest waits {waits:.1?}, noise {noise:.0?}"
        );
        for (n, d) in done.into_iter().enumerate() {
            if n == victim {
                assert!(d.error.is_some(), "the killed node went on delivering");
            } else {
                assert!(d.error.is_none(), "node {n}: {:?}", d.error);
                assert!(d.longest <= TAKEOVER + noise, "node {n} waited {:?}, noise {noise:?}", d.longest);
            }
            assert!(!d.ids.is_empty(), "node {n} delivered nothing");
            acknowledged.extend(d.ids);
        }
        assert_once(&c, (victim + 1) % NODES, &BOXES, &acknowledged, read_maildir);
        c.mount(victim).unwrap();
        assert_once(&c, victim, &BOXES, &acknowledged, read_maildir);
    }
    println!("{} acknowledged messages, none lost", acknowledged.len());
    c.finish();
}

/// Nothing fences a node there: its death alone does not free what it held, also where this host's kernel knows that its process
/// is gone, as other hosts' kernels would not.
#[test]
fn what_a_dead_node_held_is_had_after_lease_and_queue_time() {
    let c = start();
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    fs::create_dir(a.join("held")).unwrap();
    write_synced(&a.join("held/file"), "by node 0");
    File::open(a.join("held")).unwrap().sync_all().unwrap();
    c.kill9(0).unwrap();
    let started = Instant::now();
    assert_eq!(fs::read_to_string(b.join("held/file")).unwrap(), "by node 0");
    let waited = started.elapsed();
    println!("what the dead node held was had after {waited:.1?}");
    assert!(waited >= NO_SOONER, "it was not waited out: {waited:?}");
    assert!(waited <= TAKEOVER, "{waited:?}");
    // All die: who mounts next waits them out too, replays, and has everything.
    write_synced(&b.join("held/second"), "by node 1");
    File::open(b.join("held")).unwrap().sync_all().unwrap();
    (1..NODES).for_each(|n| c.kill9(n).unwrap());
    c.mount(2).unwrap();
    assert_eq!(fs::read_to_string(c.mount_point(2).join("held/second")).unwrap(), "by node 1");
    c.finish();
}

/// Each host has a block device of its own over the same file: no lock and no page of one is seen by the others, and no datagram
/// goes between them. All that they agree on, they agree on by reading and writing the disk.
#[test]
fn hosts_that_share_nothing_but_the_disk() {
    let mut c = Cluster::formatted_with(NODES + 1, 256 << 20, LIMIT, &PLAIN).unwrap();
    let devices: Vec<_> = (0..NODES).map(|_| LoopDevice::new(&c.image()).unwrap()).collect();
    for (n, device) in devices.iter().enumerate() {
        c.devices.insert(n, device.path().to_owned());
        c.options.insert(n, format!("nohints,host=host{n}"));
    }
    // At once: they bid for the same slots.
    std::thread::scope(|s| {
        let mounts: Vec<_> = (0..NODES)
            .map(|n| {
                s.spawn({
                    let c = &c;
                    move || c.mount(n).map_err(|e| e.to_string())
                })
            })
            .collect();
        mounts.into_iter().for_each(|m| m.join().unwrap().unwrap());
    });
    make_boxes(&c.mount_point(0), &BOXES).unwrap();
    let stop = AtomicBool::new(false);
    let mut ids = Vec::new();
    let delivered = std::thread::scope(|s| {
        let threads: Vec<_> = (0..NODES)
            .map(|n| {
                let (root, stop) = (c.mount_point(n), &stop);
                s.spawn(move || deliver(&root, 70 + n as u64, n, stop))
            })
            .collect();
        std::thread::sleep(Duration::from_secs(3));
        c.kill9(0).unwrap();
        std::thread::sleep(TAKEOVER + Duration::from_secs(1));
        stop.store(true, Relaxed);
        threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
    });
    for (n, d) in delivered.into_iter().enumerate() {
        println!("host {n}: {} delivered, longest wait {:.1?}, {:?}", d.ids.len(), d.longest, d.error);
        assert!(!d.ids.is_empty(), "host {n} delivered nothing");
        assert_eq!(d.error.is_some(), n == 0, "host {n}");
        ids.extend(d.ids);
    }
    (1..NODES).for_each(|n| assert_once(&c, n, &BOXES, &ids, read_maildir));
    c.mount(0).unwrap();
    assert_once(&c, 0, &BOXES, &ids, read_maildir);
    c.finish();
}
