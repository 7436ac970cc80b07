//! fsck of real volumes in image files: fresh, used, mounted, damaged.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use blockdev::BlockDevice;
use blockdev::image::{ImageFile, OpenMode};
use fs_core::format::superblock::Superblock;
use fs_core::{
    Atime, Caller, MountConfig, NewNode, NoKernelCache, ROOT_INO, Rename, Time, Volume, WallClock, WriteOptions,
    XattrSet,
};

const WHO: Caller = Caller { uid: 1000, gid: 1000 };
const SIZE: u64 = 256 << 20;

struct Clock;

impl WallClock for Clock {
    fn now(&self) -> Time {
        Time { secs: 1_700_000_000, nanos: 0 }
    }
}

fn new(mode: u32) -> NewNode {
    NewNode { mode, umask: 0, rdev: 0 }
}

async fn make(dir: &Path) -> PathBuf {
    let path = dir.join("volume");
    ImageFile::create(&path, SIZE).unwrap();
    let dev: Arc<dyn BlockDevice> = ImageFile::open(&path, OpenMode::ReadWrite).unwrap();
    let opts = mkfs::FormatOptions { nodes: Some(3), ..mkfs::FormatOptions::seeded(5) };
    mkfs::format(&dev, &opts, &mut |_| {}).await.unwrap();
    path
}

async fn mount(path: &Path) -> Arc<Volume> {
    let cfg = MountConfig {
        device: ImageFile::open(path, OpenMode::ReadWrite).unwrap(),
        net: None,
        clock: Arc::new(Clock),
        kernel: Arc::new(NoKernelCache),
        host_name: "mail1".into(),
        seed: 1,
        read_only: false,
        atime: Atime::Never,
        cache_bytes: 16 << 20,
        dirty_bytes: 8 << 20,
    };
    Volume::mount(cfg).await.unwrap()
}

/// A few mailboxes, links and renames across them, large and small files, attributes, removals, an open unlinked file.
async fn use_volume(v: &Volume) {
    let mut parts = Vec::new();
    for i in 0..8 {
        let top = v.mkdir(WHO, ROOT_INO, format!("user{i}").as_bytes(), new(0o755)).await.unwrap().value.ino;
        for name in ["new", "cur", "tmp"] {
            parts.push(v.mkdir(WHO, top, name.as_bytes(), new(0o755)).await.unwrap().value.ino);
        }
        v.symlink(WHO, top, b"link", &vec![b'x'; 100 + 400 * i]).await.unwrap();
        v.mknod(WHO, top, b"pipe", new(0o010600), false).await.unwrap();
        v.setxattr(top, b"user.long", &vec![7; 5000], XattrSet::Any).await.unwrap();
    }
    for i in 0..600usize {
        let dir = parts[i % parts.len()];
        let name = format!("message{i}");
        let f = v.mknod(WHO, dir, name.as_bytes(), new(0o100600), false).await.unwrap().value.ino;
        v.write(f, 0, &vec![i as u8; (i * 37) % 20_000], WriteOptions::default()).await.unwrap();
        let to = parts[(i * 7 + 1) % parts.len()];
        match i % 5 {
            0 => drop(v.rename(dir, name.as_bytes(), to, name.as_bytes(), Rename::Replace).await.unwrap()),
            1 => drop(v.link(f, to, format!("again{i}").as_bytes()).await.unwrap()),
            2 => drop(v.unlink(dir, name.as_bytes()).await.unwrap()),
            _ => {}
        }
    }
    let big = v.mknod(WHO, ROOT_INO, b"mbox", new(0o100600), false).await.unwrap().value.ino;
    for i in 0..40u64 {
        v.write(big, i * 300_000, &vec![i as u8; 200_000], WriteOptions::default()).await.unwrap();
    }
    let held = v.mknod(WHO, ROOT_INO, b"held", new(0o100600), true).await.unwrap().value.ino;
    v.write(held, 0, &[1; 9000], WriteOptions::default()).await.unwrap();
    v.unlink(ROOT_INO, b"held").await.unwrap();
    v.sync().await.unwrap();
}

fn fsck(args: &[&str], path: &Path) -> (i32, String) {
    let o: Output = Command::new(env!("CARGO_BIN_EXE_fsck-clusterfs")).args(args).arg(path).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr));
    (o.status.code().unwrap(), text)
}

#[tokio::test(flavor = "multi_thread")]
async fn fresh_mounted_used_and_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path()).await;
    let (code, text) = fsck(&["-n", "-f"], &path);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("clusterfs: clean, 0 files (0 bytes), 1 directories"), "{text}");
    let (code, text) = fsck(&[], &path);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("nothing was changed"), "{text}");

    let v = mount(&path).await;
    let (code, text) = fsck(&["-n"], &path);
    assert_eq!(code, 8, "{text}");
    assert!(text.contains("mounted by mail1 (slot 0)"), "{text}");

    use_volume(&v).await;
    // What has been synced is there after a crash: the copy has no living owner.
    let copy = dir.path().join("crashed");
    std::fs::copy(&path, &copy).unwrap();
    let (code, text) = fsck(&["-n", "-f"], &copy);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("node 0.1 on mail1 ended without unmounting"), "{text}");
    assert!(text.contains("1 unlinked files wait"), "{text}");

    let bad = dir.path().join("bad-journal");
    std::fs::copy(&copy, &bad).unwrap();
    bad_journal(&bad);
    preen(&copy);
    let (code, text) = fsck(&["-p"], &path);
    assert_eq!(code, 8, "a mounted volume is left alone: {text}");

    v.unmount().await.unwrap();
    let (code, text) = fsck(&["-n", "-f"], &path);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("8 symbolic links, 8 others"), "{text}");
    assert!(text.contains(", 33 directories"), "{text}");
    damage(&path, dir.path());
}

/// A volume whose node died: -n changes nothing, -p recovers the node for good, a second -p has nothing to do.
fn preen(path: &Path) {
    let before = std::fs::read(path).unwrap();
    fsck(&["-n"], path);
    assert!(std::fs::read(path).unwrap() == before, "-n wrote something");
    let (code, text) = fsck(&["-p"], path);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("repaired: journal of node 0.1: replayed"), "{text}");
    let before = std::fs::read(path).unwrap();
    let (code, text) = fsck(&["-a", "--json"], path);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("\"clean\":true") && text.contains("\"repairs\":[]"), "{text}");
    assert!(!text.contains("ended without unmounting"), "{text}");
    assert!(std::fs::read(path).unwrap() == before, "-p of a clean volume wrote something");
    // Other damage is named and left.
    let used = (0..before.len() / 4096).find(|b| before[b * 4096..][..5] == *b"CLFS\x01").unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.write_at(&[0xff; 8], used as u64 * 4096 + 72).unwrap();
    drop(file);
    let before = std::fs::read(path).unwrap();
    let (code, text) = fsck(&["-p"], path);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("note: left: domain") && text.contains("run fsck.clusterfs -y"), "{text}");
    // Only the slots' own records may have changed.
    let after = std::fs::read(path).unwrap();
    let differs = before.chunks(4096).zip(after.chunks(4096)).filter(|(a, b)| a != b && a[..4] == *b"CLFS").count();
    assert_eq!(differs, 0, "-p changed a tree");
    let (code, text) = fsck(&["-y"], path);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("repaired: domain"), "{text}");
    let (code, text) = fsck(&["-y"], path);
    assert_eq!(code, 0, "a second run finds something: {text}");
}

/// A damaged cell of a volume with plain locks keeps everybody out, fsck's own repairs included, until it is lowered.
#[tokio::test]
async fn a_damaged_cell_is_lowered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plain");
    ImageFile::create(&path, SIZE).unwrap();
    let dev: Arc<dyn BlockDevice> = ImageFile::open(&path, OpenMode::ReadWrite).unwrap();
    let locks = mkfs::Locks::Plain;
    let opts = mkfs::FormatOptions { nodes: Some(3), locks, ..mkfs::FormatOptions::seeded(6) };
    let made = mkfs::format(&dev, &opts, &mut |_| {}).await.unwrap();
    drop(dev);
    let v = mount(&path).await;
    use_volume(&v).await;
    v.unmount().await.unwrap();
    drop(v);
    assert_eq!(fsck(&["-n"], &path).0, 0);
    let layout = made.superblock.layout().cluster();
    let cells = layout.plain.unwrap() + 3 * layout.stride;
    let file = File::options().write(true).open(&path).unwrap();
    for row in 0..16 {
        file.write_all_at(b"no cell", cells + (3 * row + 2) * layout.stride).unwrap();
    }
    let (code, text) = fsck(&["-n"], &path);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains(&format!("cell at byte {}", cells + 2 * layout.stride)), "{text}");
    let (code, text) = fsck(&["-p"], &path);
    assert_eq!(code, 1, "{text}");
    assert_eq!(fsck(&["-p"], &path).0, 0);
    mount(&path).await.unmount().await.unwrap();
}

/// A dead node's journal whose header is gone: -p leaves it, -y gives up what it held, once.
fn bad_journal(path: &Path) {
    let first = std::fs::read(path).unwrap()[..4096].to_vec();
    let journal = Superblock::decode(&first).unwrap().layout().journal(0);
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0; 8192], journal.offset).unwrap();
    drop(file);
    let (code, text) = fsck(&["-p"], path);
    assert_eq!(code, 4, "{text}");
    let (code, text) = fsck(&["-y"], path);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("of its records replayed, though"), "{text}");
    let (code, text) = fsck(&["-y"], path);
    assert_eq!(code, 0, "a second run finds something: {text}");
}

/// Bits flipped all over what is in use: never a crash, mostly named.
fn damage(path: &Path, dir: &Path) {
    let whole = std::fs::read(path).unwrap();
    let used: Vec<usize> = (0..whole.len() / 4096).filter(|b| whole[b * 4096..][..4] == *b"CLFS").collect();
    assert!(used.len() > 50);
    let copy = dir.join("damaged");
    std::fs::write(&copy, &whole).unwrap();
    let file = File::options().write(true).open(&copy).unwrap();
    let mut named = 0;
    for (i, block) in used.iter().enumerate().step_by(used.len() / 12) {
        let at = block * 4096 + 64 + (i * 131) % 4000;
        file.write_at(&[whole[at] ^ 0x20], at as u64).unwrap();
        let (code, text) = fsck(&["-n"], &copy);
        // A block that has been freed may hold anything.
        assert!(matches!(code, 0 | 4), "block {block}: {code}: {text}");
        if code == 4 {
            named += 1;
            assert!(text.contains(&format!("block {block}")), "{text}");
        }
        file.write_at(&whole[at..=at], at as u64).unwrap();
    }
    assert!(named >= 6, "only {named} of 13 damages were seen");
    file.set_len(SIZE / 3).unwrap();
    let (code, text) = fsck(&["-n"], &copy);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("truncated"), "{text}");
    let (code, text) = fsck(&["-y"], &copy);
    assert_eq!(code, 4, "{text}");
}
