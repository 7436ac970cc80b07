//! What a call has promised is there when the node that made it is killed in the next moment.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use clusterfs_tests::cluster::Cluster;

/// Does `work` on node 0, kills it, and returns a cluster of which node 1 is left.
fn killed_after(work: impl FnOnce(&Path)) -> Cluster {
    let c = Cluster::start(2);
    work(&c.mount_point(0));
    c.kill9(0).unwrap();
    c
}

/// A write with the flags of one call only.
fn write_with(file: &File, data: &[u8], flags: i32) {
    let part = libc::iovec { iov_base: data.as_ptr() as *mut libc::c_void, iov_len: data.len() };
    // SAFETY: one buffer, as long as said, that the call only reads.
    let n = unsafe { libc::pwritev2(file.as_raw_fd(), &part, 1, 0, flags) };
    assert_eq!(n, data.len() as isize);
}

#[test]
fn synchronous_writes() {
    const KINDS: [(&str, i32); 3] =
        [("dsync", libc::O_DSYNC), ("sync", libc::O_SYNC), ("direct", libc::O_DSYNC | libc::O_DIRECT)];
    let c = killed_after(|m| {
        for (name, flags) in KINDS {
            let dir = m.join(name);
            fs::create_dir(&dir).unwrap();
            let open =
                |f: &str| File::options().append(true).create(true).custom_flags(flags).open(dir.join(f)).unwrap();
            let mut first = open("first");
            for i in 0..20u8 {
                first.write_all(&[i; 3000]).unwrap();
            }
            open("second").write_all(b"whole").unwrap();
        }
        let ordinary = File::create(m.join("ordinary")).unwrap();
        write_with(&ordinary, b"this one is durable", libc::RWF_DSYNC);
    });
    let m = c.mount_point(1);
    for (name, _) in KINDS {
        let got = fs::read(m.join(name).join("first")).unwrap();
        assert_eq!(got.len(), 60_000, "{name}");
        assert!(got.chunks(3000).enumerate().all(|(i, p)| p.iter().all(|b| usize::from(*b) == i)), "{name}");
        assert_eq!(fs::read(m.join(name).join("second")).unwrap(), b"whole");
    }
    assert_eq!(fs::read(m.join("ordinary")).unwrap(), b"this one is durable");
    c.finish();
}

#[test]
fn names_after_fsync_of_a_directory() {
    let c = killed_after(|m| {
        let dir = m.join("d");
        fs::create_dir(&dir).unwrap();
        File::create(dir.join("made")).unwrap();
        fs::rename(dir.join("made"), dir.join("renamed")).unwrap();
        fs::hard_link(dir.join("renamed"), m.join("linked")).unwrap();
        std::os::unix::fs::symlink("renamed", dir.join("symlink")).unwrap();
        File::create(dir.join("removed")).unwrap();
        fs::remove_file(dir.join("removed")).unwrap();
        File::open(&dir).unwrap().sync_all().unwrap();
    });
    let m = c.mount_point(1);
    assert!(m.join("d/renamed").exists() && m.join("linked").exists());
    assert_eq!(fs::read_link(m.join("d/symlink")).unwrap(), Path::new("renamed"));
    assert!(!m.join("d/made").exists() && !m.join("d/removed").exists());
    c.finish();
}

/// The kernel does not tell a FUSE filesystem of sync(2) and syncfs(2): this is what does their work.
#[test]
fn everything_after_fsync_of_the_root() {
    let data = |i: u32| vec![i as u8; 2000 * (i as usize + 1)];
    let c = killed_after(|m| {
        for i in 0..30 {
            let dir = m.join(format!("d{}", i % 5));
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(format!("f{i}")), data(i)).unwrap();
        }
        File::open(m).unwrap().sync_all().unwrap();
    });
    for i in 0..30 {
        let got = fs::read(c.mount_point(1).join(format!("d{}/f{i}", i % 5))).unwrap();
        assert!(got == data(i), "file {i}: {} bytes", got.len());
    }
    c.finish();
}

/// ... without any fsync, on a mount that was told so.
#[test]
fn every_change_of_a_directory_with_dirsync() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 4] = [
        ("made", |d| drop(File::create(d.join("made")).unwrap())),
        ("directory", |d| fs::create_dir(d.join("directory")).unwrap()),
        ("linked", |d| fs::hard_link(d.join("made"), d.join("linked")).unwrap()),
        ("removed", |d| fs::remove_file(d.join("linked")).unwrap()),
    ];
    let c = Cluster::formatted(3, 1 << 30).unwrap();
    c.mount(1).unwrap();
    let there = c.mount_point(1);
    for (name, change) in changes {
        c.mount_with(0, "dirsync").unwrap();
        change(&c.mount_point(0));
        c.kill9(0).unwrap();
        match name {
            "removed" => assert!(!there.join("linked").exists()),
            _ => assert!(there.join(name).exists(), "{name}"),
        }
    }
    c.finish();
}
