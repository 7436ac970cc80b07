//! The suite `pjdfstest`: 398 cases of what system calls on names and attributes do, and which error they end with.
//! tests/pjdfstest.toml says which are left out, and why.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::exercise::{settings, tool};

/// Bytes that the suite adds to its directory's path before it makes names of its own.
const SUITES_OWN: usize = 22;

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    passed: usize,
    failed: usize,
    skipped: Vec<String>,
}

/// A directory to run the suite in. It builds the longest path there is from components of 127 bytes, and miscounts if what
/// is left for the last one is nothing.
fn directory(mount: &Path) -> PathBuf {
    let longest = libc::PATH_MAX as usize - 1 - SUITES_OWN;
    let fits = |d: &PathBuf| (longest - d.as_os_str().len()) % 127 > 1;
    let dir = (0..).map(|n| mount.join(format!("suite{}", "x".repeat(n)))).find(fits).unwrap();
    fs::create_dir(&dir).unwrap();
    dir
}

fn run(c: &Cluster, dir: &Path, config: &Path, cases: &[&str]) -> Outcome {
    let other = c.path().join("other-filesystem");
    fs::create_dir_all(&other).unwrap();
    let tool = tool("pjdfstest").unwrap_or_else(|e| panic!("{e}"));
    let out = Command::new(tool).arg("-c").arg(config).arg("-p").arg(dir).arg("-s").arg(&other).args(cases).output();
    let out = out.unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let with = |word: &str| -> Vec<String> {
        let lines = text.lines().filter(|l| l.ends_with(word));
        lines.map(|l| l.split(' ').next().unwrap().to_string()).collect()
    };
    let (failed, passed) = (with(" FAILED"), with(" ok").len());
    for name in &failed {
        let why = text.lines().skip_while(|l| !l.starts_with(&format!("{name} "))).skip(1);
        println!("{name} failed: {}", why.take_while(|l| !l.starts_with("Backtrace")).collect::<Vec<_>>().join("\n"));
    }
    let summary = text.lines().find(|l| l.starts_with("Summary"));
    let ended = String::from_utf8_lossy(&out.stderr).into_owned();
    println!("{}", summary.unwrap_or_else(|| panic!("the suite did not get to its end: {}: {ended}", out.status)));
    assert_eq!(out.status.success(), failed.is_empty(), "{}: {ended}", out.status);
    Outcome { passed, failed: failed.len(), skipped: with(" skipped") }
}

/// Reads everything below a directory, over and over, whatever becomes of it meanwhile.
fn look_at_everything(dir: &Path, stop: &AtomicBool, seen: &AtomicUsize) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for e in entries.flatten() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let Ok(what) = e.metadata() else { continue };
        seen.fetch_add(1, Ordering::Relaxed);
        if what.is_dir() {
            look_at_everything(&e.path(), stop, seen);
        } else if what.is_file() {
            let _ = fs::read(e.path());
        }
    }
}

#[test]
fn the_suite_passes_while_another_node_looks_on() {
    let c = Cluster::start(2);
    let dir = directory(&c.mount_point(0));
    let theirs = c.mount_point(1).join(dir.file_name().unwrap());
    let (stop, seen) = (AtomicBool::new(false), AtomicUsize::new(0));
    let outcome = std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                look_at_everything(&theirs, &stop, &seen);
            }
        });
        // Also stops the other thread if the suite cannot be run.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        run(&c, &dir, &settings("pjdfstest.toml"), &[])
    });
    assert_eq!(outcome.failed, 0, "cases of the suite failed");
    let unexpected: Vec<_> = outcome.skipped.iter().filter(|n| !n.contains("::erofs_")).collect();
    assert_eq!(unexpected, ["link::link_count_max"], "skipped");
    assert!(outcome.passed >= 384, "only {} cases", outcome.passed);
    let seen = seen.load(Ordering::Relaxed);
    assert!(seen > 500, "the other node saw {seen} files only");
    c.finish();
}

#[test]
fn the_suite_passes_on_a_read_only_mount() {
    let c = Cluster::start(1);
    let config = c.path().join("remount.toml");
    let text = fs::read_to_string(settings("pjdfstest.toml")).unwrap();
    assert!(text.contains("allow_remount = false"));
    fs::write(&config, text.replace("allow_remount = false", "allow_remount = true")).unwrap();
    let outcome = run(&c, &directory(&c.mount_point(0)), &config, &["::erofs_"]);
    assert_eq!(outcome, Outcome { passed: 13, failed: 0, skipped: Vec::new() });
    c.finish();
}
