//! A mail load on all nodes of a cluster, that goes on through faults, and the count of what it delivered.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, Result};
use crate::mail::{Mailer, Stored, deliver_maildir, make_maildir, read_maildir};

/// How long a mailbox may be unreadable after the last fault: a node that lapsed comes back meanwhile.
const RETURN: Duration = Duration::from_secs(30);

/// What a load did: messages acknowledged as durable, and deliveries that got an error (and would be tried again).
#[derive(Default)]
pub struct Delivered {
    pub ids: Vec<String>,
    pub failed: usize,
}

pub fn make_boxes(root: &Path, boxes: &[&str]) -> io::Result<()> {
    boxes.iter().try_for_each(|b| make_maildir(&root.join(b)))
}

/// Delivers on nodes 0 to `nodes` - 1, to all boxes in turn and with messages from `seed`, while `faults` runs.
pub fn deliver_during(
    c: &Cluster,
    nodes: usize,
    boxes: &[&str],
    seed: u64,
    faults: impl FnOnce() -> Result<()>,
) -> Result<Delivered> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let threads: Vec<_> = (0..nodes)
            .map(|n| {
                let (root, stop) = (c.mount_point(n), &stop);
                s.spawn(move || deliver_until(stop, &root, boxes, n, Mailer::new(100 * seed + n as u64)))
            })
            .collect();
        let result = faults();
        stop.store(true, Ordering::Relaxed);
        let mut all = Delivered::default();
        for t in threads {
            let one = t.join().map_err(|_| "a delivering thread panicked")?;
            all.ids.extend(one.ids);
            all.failed += one.failed;
        }
        result.map(|()| all)
    })
}

fn deliver_until(stop: &AtomicBool, root: &Path, boxes: &[&str], first: usize, mailer: Mailer) -> Delivered {
    let mut d = Delivered::default();
    for (i, m) in mailer.largest(50 << 10).enumerate() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        match deliver_maildir(&root.join(boxes[(i + first) % boxes.len()]), &m) {
            Ok(_) => d.ids.push(m.id),
            Err(_) => {
                d.failed += 1;
                // As a queue does, though not for minutes.
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    d
}

/// On `node` each of `acknowledged` is there exactly once and whole, and nothing is there twice. `read` is [`read_maildir`],
/// or [`read_when_back`] where the node may be on its way back.
///
/// # Panics
/// If not.
pub fn assert_once(
    c: &Cluster,
    node: usize,
    boxes: &[&str],
    acknowledged: &[String],
    read: fn(&Path) -> io::Result<Vec<Stored>>,
) {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for b in boxes {
        let path = c.mount_point(node).join(b);
        // Reading verifies each message's checksum.
        for stored in read(&path).unwrap_or_else(|e| panic!("node {node}: {}: {e}", path.display())) {
            *seen.entry(stored.id).or_default() += 1;
        }
    }
    let lost: Vec<_> = acknowledged.iter().filter(|id| !seen.contains_key(*id)).collect();
    assert!(lost.is_empty(), "node {node}: {} of {} acknowledged are lost: {lost:?}", lost.len(), acknowledged.len());
    let twice: Vec<_> = seen.iter().filter(|(_, n)| **n > 1).collect();
    assert!(twice.is_empty(), "node {node}: there more than once: {twice:?}");
}

/// As [`read_maildir`], after waiting for the node's return.
pub fn read_when_back(path: &Path) -> io::Result<Vec<Stored>> {
    let end = Instant::now() + RETURN;
    loop {
        match read_maildir(path) {
            Err(e) if e.raw_os_error() == Some(libc::EIO) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

/// How often a node became a member again.
pub fn returns(c: &Cluster, nodes: usize) -> usize {
    (0..nodes).map(|n| c.log_text(n).matches("a member of the volume again").count()).sum()
}

/// How late this machine wakes a thread that sleeps: what a stall may be longer for no fault of ours.
pub fn noise(stop: &AtomicBool) -> Duration {
    const NAP: Duration = Duration::from_millis(5);
    let mut worst = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        std::thread::sleep(NAP);
        worst = worst.max(started.elapsed() - NAP);
    }
    worst
}
