//! Dovecot and Postfix on two nodes of one volume: mail comes in, is read, flagged, moved and expunged on both at once.
//!
//! Needs root, the programs and the packages: `cargo xtask test`, `cargo xtask setup`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::mail::{Mailer, read_mbox};
use clusterfs_tests::servers::accounts::{GID, Store, UID, USERS, home, make_homes};
use clusterfs_tests::servers::agents::Agent;
use clusterfs_tests::servers::site::{Queue, Settings, Site};
use clusterfs_tests::servers::traffic::{Ledger, Outcome};
use clusterfs_tests::sys::chown;

const NODES: usize = 2;
const TRAFFIC: Duration = Duration::from_secs(5);
/// Dovecot's settings for one kind of locks on everything; `fcntl` is its default for indexes.
const DOTLOCKS: &str = "lock_method = dotlock\nmbox_read_locks = dotlock\nmbox_write_locks = dotlock";
const FCNTL: &str = "lock_method = fcntl\nmbox_read_locks = fcntl\nmbox_write_locks = fcntl";
const FLOCK: &str = "lock_method = flock\nmbox_read_locks = flock\nmbox_write_locks = flock";

/// All kinds of clients of one node, until told to stop: the first error of each.
fn traffic(site: &Site, ledger: &Ledger, node: usize, seed: u64, stop: &AtomicBool) -> Vec<Outcome> {
    std::thread::scope(|s| {
        let send = s.spawn(|| ledger.send(site, node, seed, stop));
        let work = s.spawn(|| ledger.work(site, node, stop));
        let idle = s.spawn(|| ledger.idle(site, node, USERS[node], stop));
        [send, work, idle].map(|t| t.join().unwrap()).into()
    })
}

/// Traffic on all nodes, then the account.
fn both_nodes_serve_all(settings: Settings) {
    let site = Site::start(NODES, settings);
    let ledger = Ledger::default();
    ledger.make_folders(&site).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let (site, ledger, stop) = (&site, &ledger, &stop);
        let all: Vec<_> = (0..NODES).map(|n| s.spawn(move || traffic(site, ledger, n, n as u64, stop))).collect();
        std::thread::sleep(TRAFFIC);
        stop.store(true, Ordering::Relaxed);
        for outcome in all.into_iter().flat_map(|t| t.join().unwrap()) {
            outcome.unwrap();
        }
    });
    site.drain();
    println!("{} messages accepted", ledger.accepted());
    assert!(ledger.accepted() > 20, "hardly any mail came in");
    ledger.check(&site, &BTreeSet::new());
    site.finish();
}

fn maildirs(dovecot: &'static str) {
    both_nodes_serve_all(Settings { store: Store::Maildir, queue: Queue::Volume, dovecot, postfix: "" });
}

fn mboxes(dovecot: &'static str, postfix: &'static str) {
    both_nodes_serve_all(Settings { store: Store::Mbox, queue: Queue::Local, dovecot, postfix });
}

#[test]
fn maildirs_with_dotlocks() {
    maildirs(DOTLOCKS);
}

#[test]
fn maildirs_with_fcntl() {
    maildirs(FCNTL);
}

#[test]
fn maildirs_with_flock() {
    maildirs(FLOCK);
}

#[test]
fn mboxes_with_dotlocks() {
    mboxes(DOTLOCKS, "virtual_mailbox_lock = dotlock\nmailbox_delivery_lock = dotlock");
}

#[test]
fn mboxes_with_fcntl() {
    mboxes(FCNTL, "virtual_mailbox_lock = fcntl\nmailbox_delivery_lock = fcntl");
}

#[test]
fn mboxes_with_flock() {
    mboxes(FLOCK, "virtual_mailbox_lock = flock\nmailbox_delivery_lock = flock");
}

/// The mount of node 1 is killed under its servers, which go down with it; node 0 serves on. Node 1 comes back.
#[test]
fn a_node_dies_and_comes_back() {
    // Without it local(8) and virtual(8) return messages to their senders when the mailbox gives an I/O error.
    let postfix = "soft_bounce = yes";
    let settings = Settings { store: Store::Maildir, queue: Queue::Local, dovecot: "", postfix };
    let site = Site::start(NODES, settings);
    let ledger = Ledger::default();
    ledger.make_folders(&site).unwrap();
    let (stop, never) = (AtomicBool::new(false), AtomicBool::new(false));
    let interrupted = std::thread::scope(|s| {
        let (site, ledger, stop, never) = (&site, &ledger, &stop, &never);
        let survivor = s.spawn(move || traffic(site, ledger, 0, 10, stop));
        let victim = s.spawn(move || traffic(site, ledger, 1, 11, never));
        std::thread::sleep(Duration::from_secs(3));
        site.cluster.kill9(1).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let interrupted = site.kill_servers(1).unwrap();
        let ended = victim.join().unwrap();
        assert!(ended.iter().all(Result::is_err), "the dead node's clients went on: {ended:?}");
        std::thread::sleep(Duration::from_secs(3));
        site.cluster.mount(1).unwrap();
        site.start_servers(1).unwrap();
        let returned = s.spawn(move || traffic(site, ledger, 1, 12, stop));
        std::thread::sleep(Duration::from_secs(3));
        stop.store(true, Ordering::Relaxed);
        for outcome in [survivor, returned].into_iter().flat_map(|t| t.join().unwrap()) {
            outcome.unwrap();
        }
        interrupted
    });
    site.drain();
    println!("{} messages accepted, {} deliveries interrupted", ledger.accepted(), interrupted.len());
    ledger.check(&site, &interrupted);
    site.finish();
}

/// Deliveries to one mbox from both nodes at once; every message is there once, on both.
fn agents_share_an_mbox(agent: Agent) {
    const EACH: usize = 8;
    const WORKERS: usize = 4;
    let c = Cluster::start(NODES);
    make_homes(&c.mount_point(0)).unwrap();
    let of_node = |node: usize| home(&c.mount_point(node), USERS[0]).join("mbox");
    let mut accepted: Vec<String> = std::thread::scope(|s| {
        let deliver = |worker: usize| {
            let (mbox, dir) = (of_node(worker % NODES), c.path().join(format!("agent{}", worker % NODES)));
            fs::create_dir_all(&dir).unwrap();
            chown(&dir, UID, GID).unwrap();
            let mail = Mailer::new(worker as u64).largest(20 << 10).without_from_lines().take(EACH);
            mail.map(|m| agent.deliver(&c, &dir, &mbox, &m).map(|()| m.id).unwrap()).collect::<Vec<_>>()
        };
        let all: Vec<_> = (0..WORKERS).map(|w| s.spawn(move || deliver(w))).collect();
        all.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    accepted.sort();
    assert_eq!(accepted.len(), WORKERS * EACH);
    for node in 0..NODES {
        let mut there = read_mbox(&of_node(node)).unwrap();
        there.sort();
        assert_eq!(there, accepted, "node {node}");
        assert_only_mboxes(&home(&c.mount_point(node), USERS[0]));
    }
    c.finish();
}

/// No lock and no temporary file was left behind.
fn assert_only_mboxes(dir: &Path) {
    let names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["mbox"]);
}

#[test]
fn procmail_on_both_nodes() {
    agents_share_an_mbox(Agent::Procmail);
}

#[test]
fn maildrop_on_both_nodes() {
    agents_share_an_mbox(Agent::Maildrop);
}
