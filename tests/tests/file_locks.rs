//! File locks of processes on several mounts: exclusion, release, and signals to who waits, for a lock or for anything else.
//! Needs root and the programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::faulty::{Fault, FaultyDevice};

const EINTR: &str = "4";
const EIO: &str = "5";
const EAGAIN: &str = "11";
/// The machine may be busy with other things.
const SOON: Duration = Duration::from_secs(2);

/// A process of `clusterfs-locks`, killed with the test.
struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    forked: Vec<i32>,
}

impl Process {
    fn start(args: &[&str], file: &Path, more: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_clusterfs-locks"));
        command.args(args).arg(file).args(more).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output, forked: Vec::new() }
    }

    /// Holds a lock.
    fn hold(kind: &str, file: &Path) -> Self {
        let mut p = Self::start(&["hold", kind], file, &[]);
        assert_eq!(p.answer(), "ok", "{kind}");
        p
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn tell(&mut self, what: &str) -> String {
        writeln!(self.input, "{what}").unwrap();
        self.answer()
    }

    fn fork(&mut self) {
        let child = self.tell("fork").parse().unwrap();
        self.forked.push(child);
    }

    /// How long the process takes to die of SIGKILL.
    fn kill(&mut self) -> Duration {
        let start = Instant::now();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        start.elapsed()
    }

    fn end_forked(&mut self) {
        for pid in self.forked.drain(..) {
            // SAFETY: numbers; the process is one that this test made and nobody has waited for.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end_forked();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn once(args: &[&str], file: &Path) -> String {
    Process::start(args, file, &[]).answer()
}

fn try_lock(kind: &str, file: &Path) -> String {
    once(&["try", kind], file)
}

fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    start.elapsed()
}

/// A file in a directory of its own, as the nodes see it.
fn shared_file(c: &Cluster, nodes: usize, dir: &str) -> Vec<PathBuf> {
    fs::create_dir(c.mount_point(0).join(dir)).unwrap();
    let all: Vec<_> = (0..nodes).map(|n| c.mount_point(n).join(dir).join("file")).collect();
    fs::write(&all[0], 0u64.to_le_bytes()).unwrap();
    all
}

#[test]
fn counters_under_every_kind_of_lock_count_everything() {
    const TIMES: u64 = 100;
    for (nodes, processes) in [(2, 2), (4, 2)] {
        let c = Cluster::start(nodes);
        std::thread::scope(|s| {
            for kind in ["fcntl-w", "ofd-w", "flock-x", "excl", "link"] {
                let files = shared_file(&c, nodes, kind);
                s.spawn(move || {
                    let start = Instant::now();
                    let times = TIMES.to_string();
                    let work = |n: usize| Process::start(&["count", kind], files[n % nodes].as_path(), &[&times]);
                    let mut all: Vec<_> = (0..nodes * processes).map(work).collect();
                    all.iter_mut().for_each(|p| assert_eq!(p.answer(), "ok", "{kind}"));
                    let want = TIMES * (nodes * processes) as u64;
                    for f in &files {
                        assert_eq!(fs::read(f).unwrap(), want.to_le_bytes(), "{kind}");
                    }
                    let each = start.elapsed().as_secs_f64() * 1000.0 / want as f64;
                    println!("{nodes} nodes, {kind}: {want} locks, {each:.1} ms each");
                });
            }
        });
        c.finish();
    }
}

#[test]
fn locks_are_told_and_end_as_on_one_host() {
    let c = Cluster::start(2);
    let f = shared_file(&c, 2, "box");
    let (here, there) = (&f[0], &f[1]);
    for kind in ["fcntl-w", "ofd-w", "flock-x"] {
        let mut p = Process::hold(kind, here);
        for file in [here, there] {
            assert_eq!(try_lock(kind, file), EAGAIN, "{kind}");
        }
        assert_eq!(p.tell("unlock"), "ok");
        assert_eq!(try_lock(kind, there), "ok", "{kind}");
        assert_eq!(try_lock(kind, here), "ok", "{kind}");
    }
    // fcntl and flock do not meet.
    let both = (Process::hold("fcntl-w", here), Process::hold("flock-x", there));
    assert_eq!(once(&["test", "fcntl-r"], here), format!("w 0 0 {}", both.0.child.id()));
    assert_eq!(once(&["test", "fcntl-r"], there), "w 0 0 0", "a process of another host has no number");
    drop(both);
    assert_eq!(once(&["test", "fcntl-w"], there), "free");
    // Readers share.
    let readers = (Process::hold("fcntl-r", here), Process::hold("fcntl-r", there));
    assert_eq!(try_lock("fcntl-r", here), "ok");
    assert_eq!(try_lock("fcntl-w", there), EAGAIN);
    drop(readers);
    // Any close of the file ends the process's fcntl locks, but not those of an open file.
    for (kind, after) in [("fcntl-w", "ok"), ("ofd-w", EAGAIN), ("flock-x", EAGAIN)] {
        let mut p = Process::hold(kind, here);
        assert_eq!(p.tell("open-close"), "ok");
        assert_eq!(try_lock(kind, there), after, "{kind}");
    }
    // A child that keeps the descriptor keeps the open file's locks, not the process's.
    for (kind, after) in [("fcntl-w", "ok"), ("flock-x", EAGAIN), ("ofd-w", EAGAIN)] {
        let mut p = Process::hold(kind, here);
        p.fork();
        p.kill();
        assert_eq!(try_lock(kind, there), after, "{kind}");
        p.end_forked();
        until("the last close frees the lock", SOON, || try_lock(kind, there) == "ok");
    }
    c.finish();
}

#[test]
fn a_waiter_is_woken_and_a_dead_node_holds_nothing() {
    let c = Cluster::start(3);
    let f = shared_file(&c, 3, "box");
    for kind in ["fcntl-w", "flock-x"] {
        let mut holder = Process::hold(kind, &f[0]);
        let mut waiter = Process::start(&["hold", kind], &f[1], &[]);
        std::thread::sleep(Duration::from_millis(300));
        let start = Instant::now();
        assert_eq!(holder.tell("unlock"), "ok");
        assert_eq!(waiter.answer(), "ok");
        println!("{kind}: woken after {:.1?}", start.elapsed());
        assert!(start.elapsed() < SOON);
    }
    // The node dies, its lock with it; who waited on another node for it gets it.
    let holders = (Process::hold("fcntl-w", &f[0]), Process::hold("flock-x", &f[0]));
    let mut waiters = ["fcntl-w", "flock-x"].map(|kind| Process::start(&["hold", kind], &f[2], &[]));
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    c.kill9(0).unwrap();
    waiters.iter_mut().for_each(|w| assert_eq!(w.answer(), "ok"));
    println!("free {:.1?} after the node's death", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    drop((holders, waiters));
    c.finish();
}

/// Two processes that are about to do something that will wait.
fn ready(kind: &str, file: &Path) -> [Process; 2] {
    ["300", "60000"].map(|ms| {
        let mut p = Process::start(&["timed", kind], file, &[ms]);
        assert_eq!(p.answer(), "open", "{kind}");
        p
    })
}

/// They begin; one gets an alarm after 300 ms, the other is killed.
fn both_ways_out(kind: &str, [mut alarmed, mut killed]: [Process; 2], at_most: Duration) {
    let answer = alarmed.tell("begin");
    let (error, ms) = answer.split_once(' ').unwrap_or_else(|| panic!("{kind}: {answer:?}"));
    assert_eq!(error, EINTR, "{kind}: {answer}");
    println!("{kind}: EINTR after {ms} ms");
    assert!(Duration::from_millis(ms.parse().unwrap()) < at_most, "{kind}: {ms} ms");
    writeln!(killed.input, "begin").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let took = killed.kill();
    println!("{kind}: dead after {took:.1?}");
    assert!(took < Duration::from_millis(800), "{kind}: {took:?}");
}

#[test]
fn a_signal_ends_every_wait() {
    let c = Cluster::start(2);
    let f = shared_file(&c, 2, "box");
    for kind in ["fcntl-w", "flock-x", "ofd-w"] {
        let holder = Process::hold(kind, &f[0]);
        for file in &f {
            both_ways_out(kind, ready(kind, file), SOON);
        }
        drop(holder);
        // Nothing of those who gave up is left.
        until("the lock is free", SOON, || try_lock(kind, &f[1]) == "ok");
    }
    // The directory's lock is held by a node that stands still.
    let new = f[1].with_file_name("new");
    let waits = [("stat", &f[1]), ("create", &new), ("fcntl-w", &f[1])].map(|(kind, file)| (kind, ready(kind, file)));
    fs::write(f[0].with_file_name("other"), b"x").unwrap();
    c.suspend(0).unwrap();
    for (kind, processes) in waits {
        both_ways_out(kind, processes, 2 * SOON);
    }
    c.resume(0).unwrap();
    until("the node goes on", 5 * SOON, || try_lock("fcntl-w", &f[1]) == "ok");
    assert!(!f[0].with_file_name("new").exists(), "nothing was done");
    c.finish();
}

#[test]
fn a_signal_ends_an_fsync_that_hangs() {
    let device = FaultyDevice::new(256 << 20).unwrap();
    let c = Cluster::formatted_on(&device.image(), 3, Duration::from_secs(100), &[]).unwrap();
    c.mount(0).unwrap();
    let f = shared_file(&c, 1, "box");
    fs::File::open(&f[0]).unwrap().sync_all().unwrap();
    let node = c.pid(0).unwrap();
    let processes = ready("fsync", &f[0]);
    device.fail(node, Fault::Silence);
    both_ways_out("fsync", processes, SOON);
    device.heal(node);
    until("the node is back", Duration::from_secs(40), || c.log_text(0).contains("a member of the volume again"));
    until("and works", SOON, || fs::write(f[0].with_file_name("new"), b"x").is_ok());
    c.finish_after_faults();
}

/// Of a node that stood still for longer than its lease, others get the locks. Who held one there finds out when he writes, and locks
/// anew like everybody else.
#[test]
fn a_lapsed_node_holds_nothing() {
    let c =
        Cluster::formatted_with(3, 1 << 30, Duration::from_secs(200), &["--lease", "2s", "--queue-time", "0"]).unwrap();
    (0..2).for_each(|n| c.mount(n).unwrap());
    let f = shared_file(&c, 2, "box");
    for kind in ["fcntl-w", "ofd-w", "flock-x"] {
        let mut p = Process::hold(kind, &f[0]);
        assert_eq!(try_lock(kind, &f[1]), EAGAIN, "{kind}");
        c.suspend(0).unwrap();
        let took = until("the other node gets the lock", Duration::from_secs(15), || try_lock(kind, &f[1]) == "ok");
        let mut other = Process::hold(kind, &f[1]);
        c.resume(0).unwrap();
        assert_eq!(p.tell("write"), EIO, "{kind}: its lock is another's");
        until("the node is back", Duration::from_secs(15), || try_lock(kind, &f[0]) == EAGAIN);
        assert_eq!(other.tell("unlock"), "ok");
        until("the lock is free", SOON, || try_lock(kind, &f[0]) == "ok");
        println!("{kind}: taken over after {took:.1?}");
    }
    c.finish_after_faults();
}
