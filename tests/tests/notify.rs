//! Who watches by inotify is woken by changes that another node makes: in time, and at a bounded cost.
//!
//! Needs root, the programs and the packages: `cargo xtask test`, `cargo xtask setup`.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::inotify::Inotify;
use clusterfs_tests::load::make_boxes;
use clusterfs_tests::mail::{Mailer, MboxLock, append_mbox, deliver_maildir, read_maildir, read_mbox};
use clusterfs_tests::servers::accounts::Store;
use clusterfs_tests::servers::site::{Queue, Settings, Site};
use clusterfs_tests::sys::xattr;

/// From the end of a delivery until the other node's watcher knows.
const IN_TIME: Duration = Duration::from_secs(1);
const ROUNDS: usize = 4;
/// What Dovecot watches for, which most others do too.
const EVENTS: u32 = libc::IN_CREATE | libc::IN_DELETE | libc::IN_MOVE | libc::IN_CLOSE | libc::IN_MODIFY;

fn mailer() -> Mailer {
    Mailer::new(1).largest(20 << 10).without_from_lines()
}

/// A counter of a node's locks.
fn locks(c: &Cluster, node: usize, name: &str) -> u64 {
    let report = xattr(&c.mount_point(node), "trusted.clusterfs.report").unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    report["locks"][name].as_u64().unwrap()
}

/// How late this machine wakes a thread that sleeps, at worst.
fn noise<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    const NAP: Duration = Duration::from_millis(5);
    let (stop, stopped) = channel::<()>();
    std::thread::scope(|s| {
        let noise = s.spawn(move || {
            let mut worst = Duration::ZERO;
            loop {
                let started = Instant::now();
                // The other end is dropped, also by a panic.
                if stopped.recv_timeout(NAP) != Err(RecvTimeoutError::Timeout) {
                    return worst;
                }
                worst = worst.max(started.elapsed().saturating_sub(NAP));
            }
        });
        let stop = stop;
        let done = work();
        drop(stop);
        (done, noise.join().unwrap())
    })
}

/// Each of some deliveries on node 0 wakes a watcher of `watched` on node 1, which then finds what was delivered.
fn each_delivery_wakes(c: &Cluster, watched: &Path, mut deliver: impl FnMut(), count: impl Fn() -> usize) {
    let watcher = Inotify::watch(watched, EVENTS).unwrap();
    let before = count();
    for round in 1..=ROUNDS {
        // Whatever looking caused.
        while !watcher.events(Duration::from_millis(300)).unwrap().is_empty() {}
        let (took, noise) = noise(|| {
            deliver();
            let delivered = Instant::now();
            loop {
                assert!(!watcher.events(Duration::from_secs(5)).unwrap().is_empty(), "nobody woke the watcher");
                if count() == before + round {
                    break;
                }
            }
            delivered.elapsed()
        });
        println!("round {round}: the watcher knew after {took:.0?}, noise {noise:.0?}");
        assert!(took <= IN_TIME + noise, "the watcher knew after {took:?}, noise {noise:?}");
    }
    // Looking is no change: nothing is passed to and fro when no more comes.
    let passed = |n| locks(c, n, "handovers");
    std::thread::sleep(Duration::from_secs(2));
    let quiet = [passed(0), passed(1)];
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!([passed(0), passed(1)], quiet, "domains are passed to and fro for nothing");
}

#[test]
fn new_mail_in_a_maildir() {
    let c = Cluster::start(2);
    make_boxes(&c.mount_point(0), &["anna"]).unwrap();
    let [here, there] = [0, 1].map(|n| c.mount_point(n).join("anna"));
    let mut mail = mailer();
    let deliver = || drop(deliver_maildir(&here, &mail.message()).unwrap());
    each_delivery_wakes(&c, &there.join("new"), deliver, || read_maildir(&there).unwrap().len());
    c.finish();
}

#[test]
fn an_mbox_grows_in_a_watched_directory() {
    let c = Cluster::start(2);
    fs::create_dir(c.mount_point(0).join("mail")).unwrap();
    let [here, there] = [0, 1].map(|n| c.mount_point(n).join("mail"));
    fs::write(here.join("anna"), "").unwrap();
    let mut mail = mailer();
    let deliver = || append_mbox(&here.join("anna"), &mail.message(), MboxLock::Flock).unwrap();
    each_delivery_wakes(&c, &there, deliver, || read_mbox(&there.join("anna")).unwrap().len());
    let mut mail = Mailer::new(2);
    let deliver = || append_mbox(&here.join("anna"), &mail.message(), MboxLock::Dotlock).unwrap();
    each_delivery_wakes(&c, &there.join("anna"), deliver, || read_mbox(&there.join("anna")).unwrap().len());
    c.finish();
}

/// A busy mailbox is taken back about once a second if it is watched, and not at all if it is not.
#[test]
fn watching_costs_little_and_not_watching_nothing() {
    const TIME: Duration = Duration::from_secs(4);
    let c = Cluster::start(2);
    make_boxes(&c.mount_point(0), &["anna"]).unwrap();
    let [here, there] = [0, 1].map(|n| c.mount_point(n).join("anna"));
    let mut mail = mailer();
    let mut busy = || {
        // The kernel of node 1 knows the mailbox.
        read_maildir(&there).unwrap();
        deliver_maildir(&here, &mail.message()).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let before = locks(&c, 1, "acquires");
        let end = Instant::now() + TIME;
        let mut delivered = 0;
        while Instant::now() < end {
            deliver_maildir(&here, &mail.message()).unwrap();
            delivered += 1;
        }
        (delivered, locks(&c, 1, "acquires") - before)
    };
    let (delivered, acquires) = busy();
    println!("not watched: {delivered} deliveries, {acquires} acquires on the other node");
    // Asking for the report looks at the root.
    assert!(acquires <= 1, "{delivered} deliveries, {acquires} acquires");
    let watcher = Inotify::watch(&there.join("new"), EVENTS).unwrap();
    let (delivered, acquires) = busy();
    println!("watched: {delivered} deliveries, {acquires} acquires on the other node");
    // One each 0.75 s.
    assert!((1..=6).contains(&acquires), "{delivered} deliveries, {acquires} acquires");
    drop(watcher);
    c.finish();
}

/// Waking goes through the mount, and yet neither keeps it busy nor keeps a killed daemon from ending.
#[test]
fn a_mount_ends_while_watchers_are_woken() {
    let c = Cluster::start(2);
    make_boxes(&c.mount_point(0), &["anna"]).unwrap();
    let [here, there] = [0, 1].map(|n| c.mount_point(n).join("anna"));
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let delivering = s.spawn(|| {
            let mut mail = mailer();
            while !stop.load(Ordering::Relaxed) {
                deliver_maildir(&here, &mail.message()).unwrap();
            }
        });
        for round in 0..4 {
            let watcher = Inotify::watch(&there.join("new"), EVENTS).unwrap();
            read_maildir(&there).unwrap();
            while watcher.events(Duration::from_secs(10)).unwrap().is_empty() {}
            // The next waking is due.
            std::thread::sleep(Duration::from_millis(740));
            if round % 2 == 0 {
                c.unmount(1).unwrap()
            } else {
                c.kill9(1).unwrap()
            }
            drop(watcher);
            c.mount(1).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        delivering.join().unwrap();
    });
    c.finish();
}

/// IDLE on one node, LMTP on the other. Dovecot itself waits half a second between a watch's event and a look.
fn idle_sees_deliveries(store: Store) {
    let dovecot = "lock_method = dotlock\nmbox_read_locks = dotlock\nmbox_write_locks = dotlock";
    let site = Site::start(2, Settings { store, queue: Queue::Local, dovecot, postfix: "" });
    let mut client = site.imap(1, "anna").unwrap();
    client.select("INBOX").unwrap();
    let mut lmtp = site.lmtp(0).unwrap();
    let mut mail = mailer();
    for round in 1..=ROUNDS as u32 {
        let (took, noise) = noise(|| {
            std::thread::scope(|s| {
                let idle = s.spawn(|| {
                    let seen = client.idle_until(round, Duration::from_secs(10)).unwrap();
                    (seen, Instant::now())
                });
                std::thread::sleep(Duration::from_millis(1000));
                lmtp.send(&mail.message(), "anna@lmtp.example").unwrap();
                let delivered = Instant::now();
                let (seen, at) = idle.join().unwrap();
                assert_eq!(seen, round, "IDLE does not tell of new mail");
                at.saturating_duration_since(delivered)
            })
        });
        println!("round {round}: IDLE told of new mail after {took:.0?}, noise {noise:.0?}");
        assert!(took <= IN_TIME + noise, "IDLE told of new mail after {took:?}, noise {noise:?}");
    }
    site.finish();
}

#[test]
fn idle_on_a_maildir() {
    idle_sees_deliveries(Store::Maildir);
}

#[test]
fn idle_on_an_mbox() {
    idle_sees_deliveries(Store::Mbox);
}
