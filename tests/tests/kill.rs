//! Nodes die in the middle of deliveries: the others go on within seconds, and nothing that was acknowledged is lost.
//!
//! Moments and victims come from a seed, which is printed; CLUSTERFS_SEED=N plays it again. Needs root and the programs:
//! `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::load::{assert_once, make_boxes, noise};
use clusterfs_tests::mail::{
    Mailer, MboxLock, Message, MoveBy, append_mbox, deliver_maildir_by, mark_seen, read_maildir, read_torn_mbox,
};
use clusterfs_tests::sys;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const NODES: usize = 4;
const ROUNDS: usize = 4;
const BOXES: [&str; 4] = ["anna", "ben", "carla", "team"];
/// The longest that a death may keep a survivor waiting.
const STALL: Duration = Duration::from_secs(3);

fn seed() -> u64 {
    let seed = std::env::var("CLUSTERFS_SEED").map_or(1, |s| s.parse().expect("CLUSTERFS_SEED is a number"));
    println!("CLUSTERFS_SEED={seed}");
    seed
}

/// What one thread of the load did.
#[derive(Default)]
struct Delivered {
    /// Acknowledged in maildirs, in any order, and in an mbox of its own, in order.
    ids: Vec<String>,
    mbox: PathBuf,
    in_mbox: Vec<String>,
    seen: usize,
    longest: Duration,
    error: Option<io::Error>,
}

/// A mixed load until told to stop or until the node is gone: deliveries to all maildirs in turn, to an mbox, and messages that
/// any node delivered marked as seen.
fn deliver(root: &Path, seed: u64, stop: &AtomicBool) -> Delivered {
    let mut d = Delivered { mbox: format!("mbox-{seed}").into(), ..Delivered::default() };
    for (i, m) in Mailer::new(seed).largest(100 << 10).enumerate() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let started = Instant::now();
        let result = d.step(root, i, i + seed as usize, m);
        d.longest = d.longest.max(started.elapsed());
        if let Err(e) = result {
            d.error = Some(e);
            break;
        }
    }
    d
}

impl Delivered {
    fn step(&mut self, root: &Path, i: usize, turn: usize, m: Message) -> io::Result<()> {
        let maildir = root.join(BOXES[turn % BOXES.len()]);
        match i % 5 {
            3 => {
                append_mbox(&root.join(&self.mbox), &m, MboxLock::Dotlock)?;
                self.in_mbox.push(m.id);
            }
            4 => {
                if let Some(message) = fs::read_dir(maildir.join("new"))?.next() {
                    match mark_seen(&message?.path()) {
                        // Another node was faster.
                        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                        done => self.seen += done.map(|_| 1)?,
                    }
                }
            }
            _ => {
                let how = if i.is_multiple_of(3) { MoveBy::Link } else { MoveBy::Rename };
                deliver_maildir_by(&maildir, &m, how)?;
                self.ids.push(m.id);
            }
        }
        Ok(())
    }
}

/// All that was acknowledged so far.
#[derive(Default)]
struct Acknowledged {
    ids: Vec<String>,
    mboxes: Vec<(PathBuf, Vec<String>)>,
}

impl Acknowledged {
    fn add(&mut self, done: Vec<Delivered>) {
        for d in done {
            self.ids.extend(d.ids);
            if !d.in_mbox.is_empty() {
                self.mboxes.push((d.mbox, d.in_mbox));
            }
        }
    }

    fn len(&self) -> usize {
        self.ids.len() + self.mboxes.iter().map(|(_, ids)| ids.len()).sum::<usize>()
    }

    /// On `node` each message is there once and whole. An mbox may end with one that its writer was killed over.
    fn check(&self, c: &Cluster, node: usize) {
        assert_once(c, node, &BOXES, &self.ids, read_maildir);
        for (mbox, ids) in &self.mboxes {
            let path = c.mount_point(node).join(mbox);
            let (found, torn) =
                read_torn_mbox(&path).unwrap_or_else(|e| panic!("node {node}: {}: {e}", path.display()));
            let more = found.len() + usize::from(torn.is_some());
            assert!(found.starts_with(ids), "node {node}: {}: {ids:?} acknowledged, {found:?} there", path.display());
            assert!(more <= ids.len() + 1, "node {node}: {}: too much", path.display());
        }
    }
}

fn start() -> Cluster {
    let c = Cluster::start(NODES);
    make_boxes(&c.mount_point(0), &BOXES).unwrap();
    c
}

#[test]
fn a_node_dies_at_any_moment_and_comes_back() {
    let mut rng = StdRng::seed_from_u64(seed());
    let c = start();
    let mut acknowledged = Acknowledged::default();
    for round in 0..ROUNDS {
        let victim = rng.random_range(0..NODES);
        let moment = Duration::from_millis(rng.random_range(50..1200));
        let stop = AtomicBool::new(false);
        let (done, noise) = std::thread::scope(|s| {
            let threads: Vec<_> = (0..NODES)
                .map(|n| {
                    let (root, stop) = (c.mount_point(n), &stop);
                    let seed = (1000 + round * NODES + n) as u64;
                    s.spawn(move || deliver(&root, seed, stop))
                })
                .collect();
            let noise = s.spawn(|| noise(&stop));
            std::thread::sleep(moment);
            let killed = c.kill9(victim);
            std::thread::sleep(Duration::from_secs(4));
            stop.store(true, Ordering::Relaxed);
            killed.unwrap();
            let done: Vec<Delivered> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            (done, noise.join().unwrap())
        });
        let counts: Vec<_> = done.iter().map(|d| (d.ids.len(), d.in_mbox.len(), d.seen)).collect();
        let waits: Vec<Duration> = done.iter().map(|d| d.longest).collect();
        println!(
            "round {round}: node {victim} killed after {moment:?}; delivered, in an mbox, seen {counts:?}, longest waits {waits:.0?}, noise {noise:.0?}"
        );
        for (n, d) in done.iter().enumerate() {
            if n == victim {
                assert!(d.error.is_some(), "the killed node went on delivering");
            } else {
                assert!(d.error.is_none(), "node {n}: {:?}", d.error);
                assert!(d.longest <= STALL + noise, "node {n} waited {:?}, noise {noise:?}", d.longest);
                assert!(!d.ids.is_empty(), "node {n} delivered nothing");
            }
        }
        acknowledged.add(done);
        let survivor = (victim + 1) % NODES;
        acknowledged.check(&c, survivor);
        c.mount(victim).unwrap();
        acknowledged.check(&c, victim);
    }
    println!("{} acknowledged messages, none lost", acknowledged.len());
    c.finish();
}

#[test]
fn all_nodes_die_at_once() {
    let mut rng = StdRng::seed_from_u64(seed() + 1);
    let c = start();
    let mut acknowledged = Acknowledged::default();
    for round in 0..3 {
        let moment = Duration::from_millis(rng.random_range(100..1500));
        let stop = AtomicBool::new(false);
        let done: Vec<Delivered> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..NODES)
                .map(|n| {
                    let (root, stop) = (c.mount_point(n), &stop);
                    let seed = (2000 + round * NODES + n) as u64;
                    s.spawn(move || deliver(&root, seed, stop))
                })
                .collect();
            std::thread::sleep(moment);
            let killed: Vec<_> = (0..NODES).map(|n| c.kill9(n)).collect();
            stop.store(true, Ordering::Relaxed);
            killed.into_iter().for_each(|k| k.unwrap());
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        acknowledged.add(done);
        // What is checked is the volume as it will be once the journals are replayed.
        let report = c.program("fsck.clusterfs", &["-n"]).unwrap();
        println!(
            "round {round}: all killed after {moment:?}, {} acknowledged so far; {}",
            acknowledged.len(),
            report.trim()
        );
        let started = Instant::now();
        c.mount(0).unwrap();
        println!("mounted again in {:?}", started.elapsed());
        acknowledged.check(&c, 0);
        (1..NODES).for_each(|n| c.mount(n).unwrap());
        acknowledged.check(&c, NODES - 1);
    }
    c.finish();
}

fn status(c: &Cluster) -> String {
    c.program("clusterfs", &["status", "--json"]).unwrap()
}

/// SIGTERM leaves nothing to be replayed, and nothing is lost, though nothing was synced.
#[test]
fn termination_is_an_unmount() {
    let c = start();
    let data = vec![7; 5 << 20];
    for n in 0..NODES {
        let root = c.mount_point(n);
        fs::write(root.join(format!("large-{n}")), &data).unwrap();
        fs::write(root.join(format!("small-{n}")), format!("of node {n}")).unwrap();
    }
    assert_eq!(status(&c).matches("\"live\"").count(), NODES);
    for n in 0..NODES {
        let started = Instant::now();
        c.terminate(n).unwrap();
        println!("node {n} ended {:.0?} after SIGTERM", started.elapsed());
    }
    let all = status(&c);
    assert_eq!(all.matches("\"clean\"").count(), NODES, "{all}");
    assert_eq!(
        all.matches("\"live\"").count() + all.matches("recover").count(),
        all.matches("recovered_by").count(),
        "{all}"
    );
    c.mount(1).unwrap();
    for n in 0..NODES {
        let root = c.mount_point(1);
        assert!(fs::read(root.join(format!("large-{n}"))).unwrap() == data);
        assert_eq!(fs::read_to_string(root.join(format!("small-{n}"))).unwrap(), format!("of node {n}"));
    }
    c.finish();
}

/// Who mounts read-only is not surprised by a replay.
#[test]
fn a_read_only_mount_of_an_unclean_volume_is_refused() {
    let c = Cluster::start(1);
    c.mount_with(1, "ro").unwrap();
    let root = c.mount_point(0);
    File::create(root.join("f")).unwrap().sync_all().unwrap();
    assert!(c.mount_point(1).join("f").exists());
    c.unmount(1).unwrap();
    c.kill9(0).unwrap();
    let refused = c.mount_with(1, "ro").unwrap_err().to_string();
    assert!(refused.contains("slot 0 was not unmounted") && refused.contains("fsck.clusterfs -p"), "{refused}");
    c.mount(0).unwrap();
    // A living node has replayed it.
    c.mount_with(1, "ro").unwrap();
    assert!(c.mount_point(1).join("f").exists());
    let e = File::create(c.mount_point(1).join("g")).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(libc::EROFS));
    c.finish();
}

/// A mount point in use is served until its users are done.
#[test]
fn termination_while_in_use() {
    let c = Cluster::start(1);
    let mut f = File::create(c.mount_point(0).join("f")).unwrap();
    let done = std::thread::scope(|s| {
        let ending = s.spawn(|| c.terminate(0));
        std::thread::sleep(Duration::from_millis(300));
        f.write_all(b"written after SIGTERM").unwrap();
        f.sync_all().unwrap();
        drop(f);
        ending.join().unwrap()
    });
    done.unwrap();
    c.mount(0).unwrap();
    assert_eq!(fs::read(c.mount_point(0).join("f")).unwrap(), b"written after SIGTERM");
    c.finish();
}

#[test]
fn unmount_writes_everything_back() {
    let c = Cluster::start(2);
    for round in 0..5u8 {
        let node = usize::from(round % 2);
        let root = c.mount_point(node);
        for i in 0..40u8 {
            fs::write(root.join(format!("{round}-{i}")), vec![i; usize::from(i) * 3000]).unwrap();
        }
        let mut open = File::create(root.join(format!("{round}-late"))).unwrap();
        open.write_all(&vec![round; 3 << 20]).unwrap();
        drop(open);
        let started = Instant::now();
        c.unmount(node).unwrap();
        println!("round {round}: unmounted with dirty files in {:.0?}", started.elapsed());
        let other = c.mount_point(1 - node);
        for i in 0..40u8 {
            assert!(fs::read(other.join(format!("{round}-{i}"))).unwrap() == vec![i; usize::from(i) * 3000]);
        }
        assert!(fs::read(other.join(format!("{round}-late"))).unwrap() == vec![round; 3 << 20]);
        c.mount(node).unwrap();
    }
    c.finish();
}

/// Files that were removed, replaced or cut on one node while open on another: whoever dies, the other goes on with them, and their
/// space comes back with the last who has them open, not before.
#[test]
fn open_files_without_a_name_outlive_either_node() {
    const SIZE: usize = 40 << 20;
    let c = Cluster::start(3);
    let data = vec![5; SIZE];
    let free = || {
        let s = sys::statfs(&c.mount_point(2)).unwrap();
        s.f_bfree * s.f_bsize as u64
    };
    // Of groups that others have, df tells what they last placed, every 5 s. Trees and what is set aside for them may differ.
    let comes_to = |bytes: u64| {
        let began = Instant::now();
        while free().abs_diff(bytes) > 3 << 20 {
            assert!(began.elapsed() < Duration::from_secs(12), "{} bytes are free, not {bytes}", free());
            std::thread::sleep(Duration::from_millis(50));
        }
        began.elapsed()
    };
    let (empty, file) = (free(), SIZE as u64);
    for (victim, survivor) in [(0, 1), (1, 0)] {
        let (me, other) = (c.mount_point(0), c.mount_point(1));
        for name in ["removed", "replaced", "cut"] {
            fs::write(me.join(name), &data).unwrap();
            File::open(me.join(name)).unwrap().sync_all().unwrap();
        }
        comes_to(empty - 3 * file);
        let open = ["removed", "replaced", "cut"].map(|n| [&me, &other].map(|m| File::open(m.join(n)).unwrap()));
        fs::remove_file(me.join("removed")).unwrap();
        fs::write(me.join("new"), b"new").unwrap();
        fs::rename(me.join("new"), me.join("replaced")).unwrap();
        File::options().write(true).open(me.join("cut")).unwrap().set_len(1000).unwrap();
        File::open(&me).unwrap().sync_all().unwrap();
        // What was cut off is nobody's; the others are whoever's has them open.
        comes_to(empty - 2 * file);
        c.kill9(victim).unwrap();
        let [removed, replaced, cut] = &open;
        let mut got = Vec::new();
        for (file, want) in [(removed, &data[..]), (replaced, &data[..]), (cut, &data[..1000])] {
            got.clear();
            io::Read::read_to_end(&mut &file[survivor], &mut got).unwrap();
            assert!(got == want, "{} bytes of {}", got.len(), want.len());
        }
        assert_eq!(fs::read(c.mount_point(survivor).join("replaced")).unwrap(), b"new");
        comes_to(empty - 2 * file);
        // Before, the dead one counts as having them open.
        let began = Instant::now();
        while !c.program("clusterfs", &["status"]).unwrap().contains("free slots: 2") {
            assert!(began.elapsed() < Duration::from_secs(10), "node {victim} is not recovered");
            std::thread::sleep(Duration::from_millis(50));
        }
        // Until the survivor knows, too: it looks once a second.
        std::thread::sleep(Duration::from_secs(3));
        drop(open);
        for name in ["replaced", "cut"] {
            fs::remove_file(c.mount_point(survivor).join(name)).unwrap();
        }
        // Frees into groups that it does not have wait up to 30 s, but not beyond its end.
        c.unmount(survivor).unwrap();
        let took = comes_to(empty);
        println!("node {victim} killed: the space was back {took:.1?} after the other had left");
        c.mount(victim).unwrap();
        c.mount(survivor).unwrap();
    }
    c.finish();
}
