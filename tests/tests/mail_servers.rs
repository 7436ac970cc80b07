//! Dovecot and Postfix on two nodes of one volume: mail comes in, is read, flagged, moved and expunged on both at once.
//!
//! Needs root, the programs and the packages: `cargo xtask test`, `cargo xtask setup`.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::{Cluster, umount};
use clusterfs_tests::mail::{Mailer, read_mbox};
use clusterfs_tests::servers::accounts::{GID, Store, UID, USERS, home, make_homes};
use clusterfs_tests::servers::agents::Agent;
use clusterfs_tests::servers::postfix::{BY_LOCAL, BY_VIRTUAL};
use clusterfs_tests::servers::site::{Queue, Settings, Site};
use clusterfs_tests::servers::traffic::{Ledger, Mail, Outcome};
use clusterfs_tests::sys::chown;

const NODES: usize = 2;
const TRAFFIC: Duration = Duration::from_secs(2);
/// Dovecot's settings for one kind of locks on everything; `fcntl` is its default for indexes.
const DOTLOCKS: &str = "lock_method = dotlock\nmbox_read_locks = dotlock\nmbox_write_locks = dotlock";
const FCNTL: &str = "lock_method = fcntl\nmbox_read_locks = fcntl\nmbox_write_locks = fcntl";
const FLOCK: &str = "lock_method = flock\nmbox_read_locks = flock\nmbox_write_locks = flock";

/// All kinds of clients of one node, until told to stop: the first error of each.
fn traffic(site: &Site, ledger: &Ledger, node: usize, mail: Mail, stop: &AtomicBool) -> Vec<Outcome> {
    std::thread::scope(|s| {
        let send = s.spawn(|| ledger.send(site, node, mail, stop));
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
        let all: Vec<_> =
            (0..NODES).map(|n| s.spawn(move || traffic(site, ledger, n, Mail::usual(n as u64), stop))).collect();
        std::thread::sleep(TRAFFIC);
        stop.store(true, Ordering::Relaxed);
        for outcome in all.into_iter().flat_map(|t| t.join().unwrap()) {
            outcome.unwrap();
        }
    });
    let stopped = Instant::now();
    site.drain();
    println!("{} messages accepted, delivered {:.0?} later", ledger.accepted(), stopped.elapsed());
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
    // local(8) looks once a second, 20 times unless told otherwise: too few for a lock that IMAP clients take all the time.
    let postfix = "virtual_mailbox_lock = dotlock\nmailbox_delivery_lock = dotlock\ndeliver_lock_attempts = 100";
    mboxes(DOTLOCKS, postfix);
}

#[test]
fn mboxes_with_fcntl() {
    mboxes(FCNTL, "virtual_mailbox_lock = fcntl\nmailbox_delivery_lock = fcntl");
}

#[test]
fn mboxes_with_flock() {
    mboxes(FLOCK, "virtual_mailbox_lock = flock\nmailbox_delivery_lock = flock");
}

/// Ends the traffic of a test that fails, which would otherwise wait for it.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The mount of node 1 is killed under its servers, which go down with it; node 0 serves on. Node 1 comes back. `victim`: the
/// traffic of node 1 until then.
fn a_node_dies(
    settings: Settings,
    pause: Duration,
    victim: impl FnOnce(&Site, &Ledger, &AtomicBool) -> Vec<Outcome> + Send,
) {
    let site = Site::start(NODES, settings);
    let ledger = Ledger::default();
    ledger.make_folders(&site).unwrap();
    let (stop, never) = (AtomicBool::new(false), AtomicBool::new(false));
    let interrupted = std::thread::scope(|s| {
        let (site, ledger, stop, never) = (&site, &ledger, &stop, &never);
        let _when_it_fails = [Stops(stop), Stops(never)];
        let usual = |seed| Mail { pause, ..Mail::usual(seed) };
        let survivor = s.spawn(move || traffic(site, ledger, 0, usual(10), stop));
        let victim = s.spawn(move || victim(site, ledger, never));
        std::thread::sleep(Duration::from_secs(3));
        site.cluster.kill9(1).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let interrupted = site.kill_servers(1).unwrap();
        let ended = victim.join().unwrap();
        assert!(ended.iter().all(Result::is_err), "the dead node's clients went on: {ended:?}");
        ledger.died(1, NODES);
        std::thread::sleep(Duration::from_secs(3));
        site.cluster.mount(1).unwrap();
        site.start_servers(1).unwrap();
        let returned = s.spawn(move || traffic(site, ledger, 1, usual(12), stop));
        std::thread::sleep(Duration::from_secs(3));
        site.remove_stale_locks(0).unwrap();
        std::thread::sleep(Duration::from_secs(2));
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

#[test]
fn a_node_dies_and_comes_back() {
    // Without it local(8) and virtual(8) return messages to their senders when the mailbox gives an I/O error.
    let postfix = "soft_bounce = yes";
    let settings = Settings { store: Store::Maildir, queue: Queue::Local, dovecot: "", postfix };
    let mail = Mail::usual(11);
    a_node_dies(settings, mail.pause, |site, ledger, stop| traffic(site, ledger, 1, mail, stop));
}

/// The node that dies only delivers, and each message by one write: of a larger one an mbox may keep a part, and a Dovecot that dies
/// while it moves messages within an mbox leaves a mixture, on any filesystem.
#[test]
fn a_node_dies_and_comes_back_with_mboxes() {
    let postfix =
        "soft_bounce = yes\nvirtual_mailbox_lock = fcntl\nmailbox_delivery_lock = fcntl\ndeliver_lock_attempts = 100";
    let settings = Settings { store: Store::Mbox, queue: Queue::Local, dovecot: FCNTL, postfix };
    // Every change of an mbox reads all of it: more mail would only make a long queue.
    let pause = Duration::from_millis(200);
    let mail = Mail { routes: &[BY_VIRTUAL, BY_LOCAL], largest: 2 << 10, pause: pause / 4, ..Mail::usual(11) };
    a_node_dies(settings, pause, |site, ledger, stop| vec![ledger.send(site, 1, mail, stop)]);
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

/// What a process has started, itself and by others.
fn descendants(of: u32) -> BTreeSet<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for pid in fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse::<u32>().ok()) {
        if let Some((_, parent)) = stat_of(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let (mut found, mut next) = (BTreeSet::new(), vec![of]);
    while let Some(pid) = next.pop() {
        let its = children.remove(&pid).unwrap_or_default();
        found.extend(its.iter().copied());
        next.extend(its);
    }
    found
}

/// A process's state and its parent; none if there is no such process (any more).
fn stat_of(pid: u32) -> Option<(char, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn name_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

#[test]
fn servers_end_with_a_killed_test() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_clusterfs-site"));
    let mut test = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut dir = String::new();
    BufReader::new(test.stdout.take().unwrap()).read_line(&mut dir).unwrap();
    let dir = PathBuf::from(dir.trim());
    assert!(dir.is_absolute(), "no site was started");
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut started = BTreeSet::new();
    let mut missing = vec!["mount.clusterfs", "master", "qmgr", "dovecot", "log"];
    while !missing.is_empty() && Instant::now() < deadline {
        started = descendants(test.id());
        let names: Vec<_> = started.iter().map(|pid| name_of(*pid)).collect();
        missing.retain(|expected| names.iter().all(|n| n != expected));
        std::thread::sleep(Duration::from_millis(20));
    }
    test.kill().unwrap();
    test.wait().unwrap();
    let lives = |pid: &&u32| stat_of(**pid).is_some_and(|(state, _)| state != 'Z');
    let deadline = Instant::now() + Duration::from_secs(10);
    while started.iter().any(|pid| lives(&pid)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let left: Vec<_> = started.iter().filter(lives).map(|pid| (*pid, name_of(*pid))).collect();
    for (pid, _) in &left {
        // SAFETY: no memory is involved; it is one of those that the site started, still there.
        unsafe { libc::kill(*pid as libc::pid_t, libc::SIGKILL) };
    }
    umount(&dir.join("node0"), libc::MNT_DETACH).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    assert!(left.is_empty(), "these outlive the test: {left:?}");
    assert!(missing.is_empty(), "these were not started: {missing:?}");
}

#[test]
fn procmail_on_both_nodes() {
    agents_share_an_mbox(Agent::Procmail);
}

#[test]
fn maildrop_on_both_nodes() {
    agents_share_an_mbox(Agent::Maildrop);
}
