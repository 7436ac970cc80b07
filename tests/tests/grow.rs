//! An image file is enlarged under two mounts, and the volume on it with `clusterfs grow`. The same of a block device and of an iSCSI disk. Needs root,
//! the programs and the packages that `cargo xtask setup` installs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::iscsi_target::Target;
use clusterfs_tests::sys::statfs;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(200);
const SMALL: u64 = 64 << 20;
const LARGE: u64 = 320 << 20;
const PIECE: usize = 1 << 20;

fn piece(who: u8, n: usize) -> Vec<u8> {
    (0..PIECE).map(|i| (i / 4096) as u8 ^ who ^ n as u8).collect()
}

/// Writes until the volume is full, or so many pieces are written.
fn fill(path: &Path, who: u8, pieces: usize) -> usize {
    let mut f = File::create(path).unwrap();
    for n in 0..pieces {
        let end = (n * PIECE) as u64;
        if let Err(e) = f.write_all(&piece(who, n)).and_then(|()| f.sync_all()) {
            assert_eq!(e.kind(), ErrorKind::StorageFull, "{e}");
            f.set_len(end).unwrap();
            return n;
        }
    }
    pieces
}

fn assert_filled(path: &Path, who: u8, pieces: usize) {
    let mut f = File::open(path).unwrap();
    let mut buf = vec![0; PIECE];
    for n in 0..pieces {
        f.read_exact(&mut buf).unwrap();
        assert!(buf == piece(who, n), "{}: piece {n}", path.display());
    }
    assert_eq!(f.read(&mut buf).unwrap(), 0);
}

fn size_of(mount: &Path) -> u64 {
    let s = statfs(mount).unwrap();
    s.f_blocks * s.f_bsize as u64
}

fn enlarge(c: &Cluster, size: u64) {
    OpenOptions::new().write(true).open(c.image()).unwrap().set_len(size).unwrap();
}

fn grow(c: &Cluster) -> Value {
    serde_json::from_str(&c.program("clusterfs", &["grow", "--json"]).unwrap()).unwrap()
}

#[test]
fn two_mounts_use_what_their_image_was_enlarged_by() {
    let c = Cluster::formatted(3, SMALL).unwrap();
    (0..2).for_each(|n| c.mount(n).unwrap());
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    let first = fill(&a.join("first"), 1, usize::MAX);
    let before = size_of(&b);
    enlarge(&c, LARGE);
    assert_eq!(size_of(&a), before, "a larger device alone changes nothing");
    let told = c.program("clusterfs", &["status"]).unwrap();
    assert!(told.contains("`clusterfs grow`"), "{told}");

    let grown = grow(&c);
    assert_eq!((&grown["grown"], &grown["old_size"], &grown["size"]), (&true.into(), &SMALL.into(), &LARGE.into()));
    let since = Instant::now();
    for m in [&a, &b] {
        while size_of(m) <= before {
            assert!(since.elapsed() < Duration::from_secs(5), "{} has its old size", m.display());
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(size_of(m) > LARGE - before / 2, "{}", size_of(m));
    }
    // Both at once, more than the volume had before; then one until it is full.
    let each = first * 3 / 2;
    std::thread::scope(|s| {
        s.spawn(|| assert_eq!(fill(&a.join("of a"), 2, each), each));
        s.spawn(|| assert_eq!(fill(&b.join("of b"), 3, each), each));
    });
    let rest = fill(&b.join("rest"), 4, usize::MAX);
    assert!(first + 2 * each + rest > (LARGE as usize / PIECE) * 8 / 10, "{first}, twice {each} and {rest} pieces");
    for m in [&a, &b] {
        for (name, who, pieces) in [("first", 1, first), ("of a", 2, each), ("of b", 3, each), ("rest", 4, rest)] {
            assert_filled(&m.join(name), who, pieces);
        }
    }
    let again = grow(&c);
    assert_eq!((&again["grown"], &again["size"]), (&false.into(), &LARGE.into()));
    c.finish();
}

#[test]
fn what_nobody_has_mounted_grows_too_and_what_cannot_says_why() {
    let c = Cluster::formatted(1, SMALL).unwrap();
    c.mount(0).unwrap();
    let pieces = fill(&c.mount_point(0).join("f"), 1, 20);
    enlarge(&c, LARGE);
    let full = c.program("clusterfs", &["grow"]).unwrap_err().to_string();
    assert!(full.contains("all 1 are in use"), "{full}");
    c.unmount(0).unwrap();
    let told = c.program("clusterfs", &["grow"]).unwrap();
    assert!(told.contains("grew from 64 MiB to 320 MiB"), "{told}");
    let info = c.program("clusterfs", &["info"]).unwrap();
    assert!(info.contains("has grown once"), "{info}");
    c.mount(0).unwrap();
    assert!(size_of(&c.mount_point(0)) > LARGE / 2);
    assert_filled(&c.mount_point(0).join("f"), 1, pieces);
    c.unmount(0).unwrap();
    enlarge(&c, SMALL);
    let shrunk = c.program("clusterfs", &["grow"]).unwrap_err().to_string();
    assert!(shrunk.contains("volumes do not shrink"), "{shrunk}");
    enlarge(&c, LARGE);
}

/// Killed while it works, at moments that fall anywhere: the volume has one of both sizes, and running it again completes it.
#[test]
fn a_growth_that_is_killed_can_be_run_again() {
    for delay in [0, 2, 5, 10, 20, 40, 80, 160] {
        let c = Cluster::formatted(3, SMALL).unwrap();
        c.mount(0).unwrap();
        let pieces = fill(&c.mount_point(0).join("f"), 1, 10);
        enlarge(&c, LARGE);
        let mut child = c.command("clusterfs").arg("grow").arg(c.image()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        // It may have ended.
        let _ = child.kill();
        child.wait().unwrap();
        let grown = grow(&c);
        assert_eq!(grown["size"], LARGE, "killed after {delay} ms: {grown}");
        let more = fill(&c.mount_point(0).join("more"), 2, 100);
        assert_eq!(more, 100);
        assert_filled(&c.mount_point(0).join("f"), 1, pieces);
        c.finish();
    }
}

/// A kernel block device: the host is told to look at its size again.
#[test]
fn a_block_device_is_enlarged_under_two_mounts() {
    let losetup = |args: &[&str]| {
        let out = std::process::Command::new("losetup").args(args).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).trim().to_string()
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SMALL).unwrap();
    let device = losetup(&["--find", "--show", "--direct-io=on", file.path().to_str().unwrap()]);
    let worked = std::panic::catch_unwind(|| {
        let c = Cluster::formatted_on(Path::new(&device), 3, LIMIT, &[]).unwrap();
        (0..2).for_each(|n| c.mount(n).unwrap());
        let (a, b) = (c.mount_point(0), c.mount_point(1));
        file.as_file().set_len(LARGE).unwrap();
        assert_eq!(grow(&c)["grown"], false, "the kernel has not looked yet");
        losetup(&["-c", &device]);
        assert_eq!(grow(&c)["size"], LARGE);
        let pieces = (SMALL as usize / PIECE) * 2;
        assert_eq!(fill(&a.join("of a"), 2, pieces), pieces);
        assert_filled(&b.join("of a"), 2, pieces);
        assert!(size_of(&b) > LARGE / 2);
        c.finish();
    });
    losetup(&["-d", &device]);
    if let Err(why) = worked {
        std::panic::resume_unwind(why);
    }
}

/// The target of the tests takes another size only when it starts, so that it is restarted under two mounts, which become nodes again.
#[test]
fn an_iscsi_disk_is_enlarged_under_two_mounts() {
    let mut target = Target::start(SMALL).unwrap();
    let c = Cluster::formatted_on(Path::new(&target.url()), 3, LIMIT, &["--lease", "2s"]).unwrap();
    (0..2).for_each(|n| c.mount(n).unwrap());
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    let first = fill(&a.join("first"), 1, 20);
    target.kill().unwrap();
    File::options().write(true).open(target.lun()).unwrap().set_len(LARGE).unwrap();
    target.run().unwrap();
    let since = Instant::now();
    for m in [&a, &b] {
        while std::fs::metadata(m.join("first")).is_err() {
            assert!(since.elapsed() < Duration::from_secs(30), "{} does not come back", m.display());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    assert_eq!(grow(&c)["size"], LARGE);
    assert!(size_of(&a) > LARGE / 2 && size_of(&b) > LARGE / 2);
    let pieces = (SMALL as usize / PIECE) * 3 / 2;
    std::thread::scope(|s| {
        s.spawn(|| assert_eq!(fill(&a.join("of a"), 2, pieces), pieces));
        s.spawn(|| assert_eq!(fill(&b.join("of b"), 3, pieces), pieces));
    });
    for (m, name, who, pieces) in [(&b, "of a", 2, pieces), (&a, "of b", 3, pieces), (&b, "first", 1, first)] {
        assert_filled(&m.join(name), who, pieces);
    }
    c.finish_after_faults();
}
