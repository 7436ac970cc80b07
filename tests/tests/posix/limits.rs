//! As much as there may be of something.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::sys::{self, errno};

/// Bytes of attributes that one file may have for certain.
const XATTRS: usize = 65_536;

#[test]
fn attributes_of_64_kib() {
    let c = Cluster::start(2);
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    fs::write(a.join("one"), b"").unwrap();
    fs::write(a.join("many"), b"").unwrap();
    let value = |i: usize, len: usize| -> Vec<u8> { (0..len).map(|n| (n * 7 + i) as u8).collect() };
    sys::set_xattr(&a.join("one"), "user.one", &value(0, XATTRS), 0).unwrap();
    for i in 0..64 {
        sys::set_xattr(&a.join("many"), &format!("user.number-{i}"), &value(i, XATTRS / 64), 0).unwrap();
    }
    let long = format!("user.{}", "n".repeat(250));
    sys::set_xattr(&a.join("many"), &long, b"", libc::XATTR_CREATE).unwrap();
    for m in [&b, &a] {
        assert!(sys::xattr(&m.join("one"), "user.one").unwrap() == value(0, XATTRS));
        let names = sys::xattrs(&m.join("many")).unwrap();
        assert_eq!(names.len(), 65);
        for i in 0..64 {
            assert!(sys::xattr(&m.join("many"), &format!("user.number-{i}")).unwrap() == value(i, XATTRS / 64));
        }
        assert_eq!(sys::xattr(&m.join("many"), &long).unwrap(), b"");
    }
    assert_eq!(errno(sys::set_xattr(&b.join("one"), "user.two", &value(0, XATTRS + 1), 0)), libc::E2BIG);
    assert_eq!(errno(sys::set_xattr(&b.join("one"), &(long + "n"), b"", 0)), libc::ERANGE);
    sys::remove_xattr(&b.join("one"), "user.one").unwrap();
    assert!(sys::xattrs(&a.join("one")).unwrap().is_empty());
    fs::remove_file(a.join("many")).unwrap();
    c.finish();
}

/// Of 20,000 files, half of them without a name. Several processes hold them, since one may have 20,000 here.
#[test]
fn a_hundred_thousand_open_files() {
    const OPEN: usize = 100_000;
    const FILES: usize = OPEN / 5;
    const HOLDERS: usize = 8;
    let c = Cluster::start(2);
    let started = Instant::now();
    let dir = |node: usize, n: usize| c.mount_point(node).join(format!("d{n}"));
    let mut holders: Vec<Child> = (0..HOLDERS)
        .map(|n| {
            let mut hold = Command::new(env!("CARGO_BIN_EXE_clusterfs-hold"));
            hold.arg(dir(0, n)).arg((FILES / HOLDERS).to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
            c.spawn(hold).unwrap()
        })
        .collect();
    for h in &mut holders {
        let mut said = String::new();
        BufReader::new(h.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
        assert_eq!(said, "open\n");
    }
    println!("{OPEN} open files of {FILES} in {:?}", started.elapsed());
    // The other node takes over what they lie in, removes names, and they outlive it.
    for n in 0..HOLDERS {
        fs::write(dir(1, n).join("other"), b"other").unwrap();
        fs::remove_file(dir(1, n).join("0")).unwrap();
    }
    let started = Instant::now();
    for mut h in holders {
        drop(h.stdin.take());
        assert!(h.wait().unwrap().success(), "an open file has changed");
    }
    println!("read and closed in {:?}", started.elapsed());
    for n in 0..HOLDERS {
        assert_eq!(fs::read_dir(dir(1, n)).unwrap().count(), FILES / HOLDERS / 2);
    }
    c.finish();
}
