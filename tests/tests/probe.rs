//! `clusterfs probe` on iSCSI targets, and disks that somebody else has reserved. Needs root, the programs and the packages that
//! `cargo xtask setup` installs.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use clusterfs_tests::cluster::{Cluster, programs};
use clusterfs_tests::iscsi_target::stranger::{EXCLUSIVE_ACCESS, Stranger, WRITE_EXCLUSIVE};
use clusterfs_tests::iscsi_target::{Kind, Shape, Target};
use serde_json::Value;

const SIZE: u64 = 256 << 20;
const LIMIT: Duration = Duration::from_secs(100);

fn probe(args: &[&str]) -> Output {
    Command::new(programs().unwrap().join("clusterfs")).arg("probe").args(args).output().unwrap()
}

fn stdout(out: &Output) -> String {
    String::from_utf8(out.stdout.clone()).unwrap() + &String::from_utf8_lossy(&out.stderr)
}

fn json(url: &str, more: &[&str]) -> (Value, i32) {
    let out = probe(&[&["--json", url], more].concat());
    let report = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", stdout(&out)));
    (report, out.status.code().unwrap())
}

fn level<'a>(report: &'a Value, check: &str) -> (&'a str, &'a str) {
    let all = report["findings"].as_array().unwrap();
    let f = all.iter().find(|f| f["check"] == check).unwrap_or_else(|| panic!("no {check} in {report:#}"));
    (f["level"].as_str().unwrap(), f["text"].as_str().unwrap())
}

fn registrations(url: &str) -> String {
    let (report, _) = json(url, &[]);
    level(&report, "registered").1.to_string()
}

fn blank(target: &Target) -> bool {
    fs::read(target.lun()).unwrap().iter().all(|b| *b == 0)
}

/// tgt, made to accept COMPARE AND WRITE: everything that a node needs.
#[test]
fn a_target_that_does_all() {
    for block_size in [512, 4096] {
        let target = Target::with(SIZE, Shape { block_size, ..Shape::local(Kind::Tgt).unwrap() }).unwrap();
        let (r, code) = json(&target.url(), &[]);
        println!("{r:#}");
        assert_eq!(code, 0, "{r:#}");
        assert_eq!((&r["sector_size"], &r["size"]), (&block_size.into(), &SIZE.into()));
        assert_eq!(
            (&r["compare_and_write"], &r["reservations"], &r["written"]),
            (&true.into(), &true.into(), &false.into())
        );
        assert!(r["verdict"].as_str().unwrap().contains("--write tries it"), "{r:#}");
        let (r, code) = json(&target.url(), &["--write"]);
        println!("{r:#}");
        assert_eq!(code, 0, "{r:#}");
        assert_eq!(r["verdict"], "fit for several hosts; a dead node is fenced");
        assert!(level(&r, "compare-and-write race").1.starts_with("800 increments by 4 connections"), "{r:#}");
        for check in ["compare-and-write race", "miscompare", "durable writes", "fencing", "put back"] {
            assert_eq!(level(&r, check).0, "ok", "{r:#}");
        }
        assert!(blank(&target), "the check left something behind");
        assert_eq!(registrations(&target.url()), "nobody");
        let text = stdout(&probe(&[&target.url()]));
        assert!(text.contains("IET VIRTUAL-DISK") && text.contains("\nverdict: fit for several hosts"), "{text}");
    }
}

/// Debian's tgt announces COMPARE AND WRITE, and refuses it.
#[test]
fn a_target_that_announces_what_it_refuses() {
    let target = Target::with(SIZE, Shape::local(Kind::PlainTgt).unwrap()).unwrap();
    for more in [&[][..], &["--write"]] {
        let (r, code) = json(&target.url(), more);
        assert_eq!((code, level(&r, "compare-and-write").0), (1, "fail"), "{r:#}");
        assert!(level(&r, "compare-and-write").1.contains("announces COMPARE AND WRITE and refuses it"), "{r:#}");
        assert_eq!(r["verdict"], "not fit: compare-and-write");
    }
    assert!(blank(&target));
}

/// tgt with many I/O threads compares and writes without a lock between them. Whether two of them meet is chance, so it may try
/// again; so far the first attempt was always enough.
#[test]
fn a_target_whose_compare_and_write_is_not_atomic() {
    let target = Target::with(SIZE, Shape::local(Kind::ThreadedTgt).unwrap()).unwrap();
    let (r, code) = json(&target.url(), &[]);
    assert_eq!(code, 0, "it says nothing of that: {r:#}");
    let mut attempts = (0..5).map(|_| json(&target.url(), &["--write"]));
    let (r, _) = attempts.find(|(_, code)| *code == 1).expect("called fit five times");
    assert_eq!(r["verdict"], "not fit: compare-and-write race", "{r:#}");
    assert!(level(&r, "compare-and-write race").1.contains("it is not atomic"), "{r:#}");
    assert_eq!(level(&r, "put back").0, "ok", "{r:#}");
    assert!(blank(&target));
    assert_eq!(registrations(&target.url()), "nobody");
}

/// Debian's istgt looks right, and damages its list of registrations when one is removed: only the attempt shows it.
#[test]
fn a_target_whose_fencing_hits_the_wrong_ones() {
    let target = Target::with(SIZE, Shape::local(Kind::Istgt("None")).unwrap()).unwrap();
    let (r, code) = json(&target.url(), &[]);
    assert_eq!(code, 0, "{r:#}");
    let (r, code) = json(&target.url(), &["--write"]);
    println!("{r:#}");
    assert_eq!(code, 1, "{r:#}");
    assert_eq!(level(&r, "compare-and-write race").0, "ok", "{r:#}");
    assert_eq!(level(&r, "fencing").0, "fail", "{r:#}");
    assert!(r["verdict"].as_str().unwrap().starts_with("not fit: fencing"), "{r:#}");
    assert_eq!(level(&r, "put back").0, "ok", "{r:#}");
    assert!(blank(&target));
}

#[test]
fn a_volume_is_looked_at_and_not_written_to() {
    let target = Target::start(SIZE).unwrap();
    let url = target.url();
    let c = Cluster::formatted_on(Path::new(&url), 3, LIMIT, &[]).unwrap();
    c.mount(0).unwrap();
    let file = c.mount_point(0).join("file");
    fs::write(&file, "mail").unwrap();
    fs::File::open(&file).unwrap().sync_all().unwrap();
    let (r, code) = json(&url, &[]);
    assert_eq!(code, 0, "{r:#}");
    assert!(level(&r, "contents").1.contains("a clusterfs volume"), "{r:#}");
    assert!(level(&r, "registered").1.starts_with("1 nodes"), "{r:#}");
    let (r, code) = json(&url, &["--write"]);
    assert_eq!((code, level(&r, "scratch").0), (1, "fail"), "{r:#}");
    assert!(level(&r, "scratch").1.contains("a clusterfs volume"), "{r:#}");
    fs::write(&file, "more mail").unwrap();
    fs::File::open(&file).unwrap().sync_all().unwrap();
    c.finish();
}

/// A kernel block device: what the kernel says of it, and the check itself. The image below is not written to past the device.
#[test]
fn a_kernel_block_device() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let losetup = |args: &[&str]| {
        let out = Command::new("losetup").args(args).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).trim().to_string()
    };
    let device = losetup(&["--find", "--show", "--direct-io=on", image.to_str().unwrap()]);
    let done = [probe(&["--json", "--write", &device]), probe(&["--json", "--write", image.to_str().unwrap()])];
    losetup(&["-d", &device]);
    let [r, below] = done.each_ref().map(|out| serde_json::from_slice::<Value>(&out.stdout).unwrap());
    println!("{r:#}");
    assert_eq!(done[0].status.code(), Some(0), "{r:#}");
    assert_eq!((&r["kind"], &r["size"], &r["written"]), (&"block device".into(), &SIZE.into(), &true.into()));
    assert!(r["kernel"]["write_cache"].as_str().unwrap().starts_with("write "), "{r:#}");
    assert_eq!(level(&r, "compare-and-write").0, "warn", "{r:#}");
    let verdict = r["verdict"].as_str().unwrap();
    assert!(verdict.starts_with("fit for one host") && verdict.contains("--locks=plain"), "{verdict}");
    assert_eq!(done[1].status.code(), Some(1), "{below:#}");
    assert!(level(&below, "scratch").1.contains("is set up as /dev/loop"), "{below:#}");
    assert!(fs::read(&image).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn usage_errors_and_devices_that_are_not_there() {
    assert_eq!(probe(&[]).status.code(), Some(2));
    assert_eq!(probe(&["--frobnicate", "x"]).status.code(), Some(2));
    let out = probe(&["/no/such/device"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(stdout(&out).contains("/no/such/device: no such file"), "{}", stdout(&out));
}

/// One line that names the key and what to do, from everybody who would write; nothing is changed. Once the other one has gone,
/// all is well.
#[test]
fn a_disk_reserved_by_another_program_is_refused() {
    const KEY: u64 = 0x0123_4567_89ab_cdef;
    let target = Target::start(SIZE).unwrap();
    let url = target.url();
    let c = Cluster::formatted_on(Path::new(&url), 3, LIMIT, &[]).unwrap();
    for (round, kind) in [None, Some(WRITE_EXCLUSIVE), Some(EXCLUSIVE_ACCESS)].into_iter().enumerate() {
        let mut other = Stranger::register(target.address(), 1, KEY).unwrap();
        if let Some(kind) = kind {
            other.reserve(kind).unwrap();
        }
        let before = fs::read(target.lun()).unwrap();
        let refused = c.mount(0).unwrap_err().to_string();
        // The log of all rounds so far, a line each.
        let lines: Vec<&str> = refused.lines().filter(|l| l.contains("clusterfs: ")).collect();
        assert_eq!(lines.len(), round + 1, "{refused}");
        let line = lines[round];
        println!("{line}");
        for what in ["0x123456789abcdef", "another program", "sg_persist --clear", &url] {
            assert!(line.contains(what), "{line}");
        }
        let programs: [(&str, &[&str]); 3] =
            [("mkfs.clusterfs", &["-q"]), ("mkfs.clusterfs", &["-q", "--force"]), ("fsck.clusterfs", &["-p"])];
        for (program, args) in programs {
            let refused = c.program(program, args).unwrap_err().to_string();
            assert!(refused.contains("0x123456789abcdef") && refused.contains("sg_persist --clear"), "{refused}");
        }
        let (r, code) = json(&url, &[]);
        assert_eq!((code, level(&r, "registered").0), (1, "fail"), "{r:#}");
        assert!(level(&r, "registered").1.contains("key 0x123456789abcdef"), "{r:#}");
        assert!(fs::read(target.lun()).unwrap() == before, "something was written");
        other.clear().unwrap();
        drop(other);
        c.mount(0).unwrap();
        fs::write(c.mount_point(0).join("file"), "mail").unwrap();
        c.unmount(0).unwrap();
    }
    c.finish_after_faults();
}
