//! The demonstration: three nodes share a volume, mail goes in on all of them, one is killed, nothing is lost.
//!
//! Every claim that is printed is checked; the first that does not hold ends the demonstration with exit code 1.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::{Cluster, Error, Result};
use clusterfs_tests::mail::{
    Mailer, MboxLock, Stored, append_mbox, deliver_maildir, make_maildir, mark_seen, read_maildir, read_mbox,
};

const NODES: [usize; 3] = [1, 2, 3];
const VICTIM: usize = 3;
const USERS: [&str; 3] = ["anna", "ben", "carla"];
/// Every node delivers here as well.
const SHARED: &str = "team";
const MBOX: &str = "archive.mbox";
/// Messages per node in the first part.
const FIRST: usize = 100;
const SIZE: u64 = 2 << 30;
const LIMIT: Duration = Duration::from_secs(300);
/// How long the survivors go on after the kill.
const GO_ON: Duration = Duration::from_secs(6);

/// What one node's delivery agent did.
#[derive(Default)]
struct Delivered {
    maildir: Vec<String>,
    mbox: Vec<String>,
    bytes: u64,
    longest: Duration,
    /// Why it ended, if not by plan.
    error: Option<std::io::Error>,
}

impl Delivered {
    fn time<T>(&mut self, work: impl FnOnce() -> std::io::Result<T>) -> std::io::Result<T> {
        let started = Instant::now();
        let result = work();
        self.longest = self.longest.max(started.elapsed());
        result
    }
}

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nThe demonstration failed: {e}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<()> {
    let lab = Cluster::ended_by_signals(LIMIT)?;
    println!("1. One shared device: a sparse image file of 2 GiB, made a volume for up to 4 nodes.");
    blockdev::image::ImageFile::create(lab.image(), SIZE)?;
    let made = lab.program("mkfs.clusterfs", &["-L", "demo", "--nodes", "4"])?;
    made.lines().skip(1).for_each(|l| println!("   {l}"));

    println!("2. Three nodes mount it, each a process of its own; no server anywhere.");
    for n in NODES {
        lab.mount(n)?;
        println!("   node {n}: process {} on {}", lab.pid(n).unwrap_or(0), lab.mount_point(n).display());
    }

    let first = deliver_everywhere(&lab)?;
    show_everywhere(&lab, &first)?;
    let second = kill_one(&lab)?;
    let all: Vec<&Delivered> = first.iter().chain(&second).collect();
    check_survivors(&lab, &all)?;

    println!("7. Node {VICTIM} comes back and sees the same.");
    lab.mount(VICTIM)?;
    check_node(&lab, VICTIM, &all)?;

    println!("8. All unmount; the volume is checked.");
    for n in NODES {
        lab.unmount(n)?;
    }
    let report = lab.program("fsck.clusterfs", &["-n"])?;
    report.lines().for_each(|l| println!("   {l}"));
    println!("Done: every promise held.");
    Ok(())
}

/// Part 3: every node delivers to its user, now and then to the shared mbox.
fn deliver_everywhere(lab: &Cluster) -> Result<Vec<Delivered>> {
    println!("3. Mail comes in on all three at once: {FIRST} messages each, every tenth also into one shared mbox.");
    let root = lab.mount_point(1);
    for user in USERS.iter().chain([&SHARED]) {
        make_maildir(&root.join(user))?;
    }
    let started = Instant::now();
    let done: Vec<Delivered> = std::thread::scope(|s| {
        let nodes = NODES.map(|n| {
            let root = lab.mount_point(n);
            s.spawn(move || first_delivery(n, &root))
        });
        nodes.into_iter().map(|t| t.join().unwrap_or_default()).collect()
    });
    let took = started.elapsed().as_secs_f64();
    for (n, d) in NODES.iter().zip(&done) {
        if let Some(e) = &d.error {
            return Err(format!("node {n}: {e}\n{}", lab.log_text(*n)).into());
        }
        let (count, user) = (d.maildir.len(), USERS[n - 1]);
        println!(
            "   node {n}: {count} messages, {} KiB, to {user}; longest wait {} ms",
            d.bytes >> 10,
            d.longest.as_millis()
        );
    }
    let count: usize = done.iter().map(|d| d.maildir.len() + d.mbox.len()).sum();
    println!("   {count} acknowledged deliveries in {took:.1} s");
    Ok(done)
}

fn first_delivery(node: usize, root: &Path) -> Delivered {
    let mut d = Delivered::default();
    for (i, m) in Mailer::new(node as u64).largest(1 << 20).take(FIRST).enumerate() {
        let sent = d.time(|| deliver_maildir(&root.join(USERS[node - 1]), &m).map(drop));
        let filed = sent.and_then(|()| {
            d.maildir.push(m.id.clone());
            d.bytes += m.bytes.len() as u64;
            if i % 10 > 0 {
                return Ok(());
            }
            d.time(|| append_mbox(&root.join(MBOX), &m, MboxLock::Dotlock))?;
            d.mbox.push(m.id.clone());
            Ok(())
        });
        if let Err(e) = filed {
            d.error = Some(e);
            break;
        }
    }
    d
}

/// Part 4: what one node delivered, all others have.
fn show_everywhere(lab: &Cluster, done: &[Delivered]) -> Result<()> {
    println!("4. Every node sees everything, byte by byte (each message carries a checksum).");
    for n in NODES {
        let root = lab.mount_point(n);
        let mut counts = Vec::new();
        for (user, d) in USERS.iter().zip(done) {
            let ids: BTreeSet<String> = stored(&root.join(user))?.into_iter().map(|s| s.id).collect();
            if ids != d.maildir.iter().cloned().collect() {
                return Err(format!("node {n} sees other mail for {user} than was delivered").into());
            }
            counts.push(format!("{user} {}", ids.len()));
        }
        let mbox = read_mbox(&root.join(MBOX))?;
        println!("   node {n}: {}, {MBOX} {}", counts.join(", "), mbox.len());
        let sent: BTreeSet<&String> = done.iter().flat_map(|d| &d.mbox).collect();
        if mbox.iter().collect::<BTreeSet<_>>() != sent || mbox.len() != sent.len() {
            return Err(format!("node {n} sees another {MBOX} than was written").into());
        }
    }
    println!("   some of anna's mail, delivered on node 1, as node 2 lists it:");
    let (one, two) = (lab.mount_point(1).join(USERS[0]), lab.mount_point(2).join(USERS[0]));
    let there = stored(&two)?;
    for s in there.iter().take(3) {
        println!("     {:>7} bytes  {}", s.len, s.path.file_name().unwrap_or_default().to_string_lossy());
    }
    if let Some(s) = there.first() {
        let seen = mark_seen(&s.path)?;
        let name = seen.file_name().unwrap_or_default();
        if !one.join("cur").join(name).exists() {
            return Err("node 1 does not see that node 2 marked a message as seen".into());
        }
        println!("   node 2 marks the first one as seen; node 1 sees it at once");
    }
    Ok(())
}

/// Part 5: node 3 dies in the middle of deliveries.
fn kill_one(lab: &Cluster) -> Result<Vec<Delivered>> {
    println!("5. All nodes deliver, to their own users and to {SHARED}; node {VICTIM} is killed (SIGKILL) meanwhile.");
    let stop = AtomicBool::new(false);
    let (done, killed) = std::thread::scope(|s| {
        let nodes = NODES.map(|n| {
            let (root, stop) = (lab.mount_point(n), &stop);
            s.spawn(move || deliver_until(n, &root, stop))
        });
        std::thread::sleep(Duration::from_millis(700));
        let killed = lab.kill9(VICTIM);
        std::thread::sleep(GO_ON);
        stop.store(true, Ordering::Relaxed);
        (nodes.map(|t| t.join().unwrap_or_default()), killed)
    });
    killed?;
    for (n, d) in NODES.iter().zip(&done) {
        match (&d.error, *n == VICTIM) {
            (None, true) => return Err("the killed node went on delivering".into()),
            (Some(e), false) => return Err(format!("node {n}: {e}\n{}", lab.log_text(*n)).into()),
            (Some(e), true) => println!("   node {n}: {} acknowledged, then: {e}", d.maildir.len()),
            (None, false) => {
                let (count, ms) = (d.maildir.len(), d.longest.as_millis());
                println!("   node {n}: {count} acknowledged, went on; longest wait for a delivery {ms} ms");
            }
        }
    }
    Ok(done.into())
}

/// The users in turn, so that survivors need what the dead node held.
fn deliver_until(node: usize, root: &Path, stop: &AtomicBool) -> Delivered {
    let mut d = Delivered::default();
    let boxes = [USERS[node - 1], SHARED, USERS[VICTIM - 1]];
    for (i, m) in Mailer::new(100 + node as u64).largest(200 << 10).enumerate() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        match d.time(|| deliver_maildir(&root.join(boxes[i % boxes.len()]), &m)) {
            Ok(_) => d.maildir.push(m.id),
            Err(e) => {
                d.error = Some(e);
                break;
            }
        }
    }
    d
}

/// Part 6: nothing that was acknowledged is missing, by anybody.
fn check_survivors(lab: &Cluster, all: &[&Delivered]) -> Result<()> {
    println!("6. The survivors have every acknowledged message, also those of the dead node.");
    NODES.iter().filter(|n| **n != VICTIM).try_for_each(|n| check_node(lab, *n, all))
}

fn check_node(lab: &Cluster, node: usize, all: &[&Delivered]) -> Result<()> {
    let root = lab.mount_point(node);
    let mut seen = BTreeSet::new();
    for user in USERS.iter().chain([&SHARED]) {
        for s in stored(&root.join(user))? {
            if !seen.insert(s.id) {
                return Err(format!("node {node}: {} is there twice", s.path.display()).into());
            }
        }
    }
    let acknowledged: BTreeSet<&String> = all.iter().flat_map(|d| &d.maildir).collect();
    let lost: Vec<_> = acknowledged.iter().filter(|id| !seen.contains(**id)).collect();
    if !lost.is_empty() {
        return Err(format!("node {node}: {} acknowledged messages are lost: {lost:?}", lost.len()).into());
    }
    let mbox: BTreeSet<String> = read_mbox(&root.join(MBOX))?.into_iter().collect();
    if let Some(id) = all.iter().flat_map(|d| &d.mbox).find(|id| !mbox.contains(*id)) {
        return Err(format!("node {node}: {id} is lost from {MBOX}").into());
    }
    let more = seen.len() - acknowledged.len();
    println!(
        "   node {node}: {} acknowledged messages, none lost; {more} whole ones not yet acknowledged",
        acknowledged.len()
    );
    Ok(())
}

/// A damaged message is an error with its name.
fn stored(maildir: &Path) -> Result<Vec<Stored>> {
    read_maildir(maildir).map_err(|e| -> Error { format!("{}: {e}", maildir.display()).into() })
}
