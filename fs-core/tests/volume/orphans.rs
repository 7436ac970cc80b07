//! Files without a name that some node has open: they stay usable, and their space comes back once nobody has them open,
//! whoever dies in between.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{WHO, check_clean, config, dir, disk, file, mount, mount_on};
use fs_core::{FsError, MountConfig, ROOT_INO, Volume, WriteOptions};

const SIZE: usize = 1 << 20;

/// A directory with one large file, open on `opener`.
async fn open_file(opener: &Volume) -> (u64, u64) {
    let d = opener.mkdir(WHO, ROOT_INO, b"box", dir()).await.expect("mkdir").value.ino;
    let f = opener.mknod(WHO, d, b"msg", file(), true).await.expect("create").value.ino;
    opener.write(f, 0, &[9; SIZE], WriteOptions::default()).await.expect("write");
    opener.fsync(f, false).await.expect("fsync");
    (d, f)
}

/// Waits until the inode is freed; that its blocks are, too, is for the check of the whole volume to see.
async fn goes(v: &Arc<Volume>, f: u64) {
    for _ in 0..100 {
        if matches!(v.getattr(f).await, Err(FsError::Stale)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the unnamed file is still there");
}

/// What follows a last close is done before the node leaves: afterwards nobody would look for it.
#[tokio::test(start_paused = true)]
async fn closed_just_before_an_unmount() {
    let disk = disk(64 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let (d, f) = open_file(&a).await;
    b.unlink(d, b"msg").await.expect("unlink");
    a.release(f).await;
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
    let raw: Arc<dyn blockdev::BlockDevice> = disk.open_raw();
    let report = fs_core::check::check(&raw, None).await.expect("check");
    assert_eq!((report.orphans, report.files), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn unlinked_elsewhere_and_closed() {
    let disk = disk(64 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let (d, f) = open_file(&a).await;
    b.unlink(d, b"msg").await.expect("unlink");
    assert_eq!(a.read(f, 0, SIZE as u32).await.expect("open files stay readable").value, [9; SIZE]);
    a.write(f, 0, b"more", WriteOptions::default()).await.expect("and writable");
    assert_eq!(a.getattr(f).await.expect("getattr").value.inode.links, 0);
    a.release(f).await;
    goes(&b, f).await;
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

#[tokio::test(start_paused = true)]
async fn the_opener_dies() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("a");
    let (a, b) = (mount_on(dev.clone(), "a").await, mount(&disk, "b").await);
    let (d, f) = open_file(&a).await;
    b.unlink(d, b"msg").await.expect("unlink");
    assert_eq!(a.read(f, 0, 10).await.expect("open files stay readable").value, [9; 10]);
    dev.crash();
    b.mknod(WHO, d, b"next", file(), false).await.expect("the domain is used again");
    goes(&b, f).await;
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

/// The unlinker holds the domain all the time, under a grant that says that the dead one has files open.
#[tokio::test(start_paused = true)]
async fn the_opener_dies_and_the_unlinker_keeps_the_domain() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("a");
    let (a, b) = (mount_on(dev.clone(), "a").await, mount(&disk, "b").await);
    let (d, f) = open_file(&a).await;
    b.unlink(d, b"msg").await.expect("unlink");
    dev.crash();
    tokio::time::sleep(Duration::from_secs(5)).await;
    goes(&b, f).await;
    b.unmount().await.expect("unmount");
    none_left(&disk).await;
}

/// The same, and the file is removed when the opener has long been gone.
#[tokio::test(start_paused = true)]
async fn unlinked_after_the_death_of_the_opener() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("a");
    let (a, b) = (mount_on(dev.clone(), "a").await, mount(&disk, "b").await);
    let (d, f) = open_file(&a).await;
    b.mknod(WHO, d, b"next", file(), false).await.expect("b holds the domain");
    dev.crash();
    tokio::time::sleep(Duration::from_secs(5)).await;
    b.unlink(d, b"msg").await.expect("unlink");
    goes(&b, f).await;
    b.unmount().await.expect("unmount");
    none_left(&disk).await;
}

#[tokio::test(start_paused = true)]
async fn the_unlinker_dies() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("b");
    let (a, b) = (mount(&disk, "a").await, mount_on(dev.clone(), "b").await);
    let (d, f) = open_file(&a).await;
    b.unlink(d, b"msg").await.expect("unlink");
    b.sync().await.expect("sync");
    dev.crash();
    assert_eq!(a.read(f, 0, SIZE as u32).await.expect("open files stay readable").value, [9; SIZE]);
    a.release(f).await;
    goes(&a, f).await;
    a.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

/// Whoever recovers a node frees its unnamed files before he leaves.
#[tokio::test(start_paused = true)]
async fn the_recoverer_leaves_at_once() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("a");
    let (a, b) = (mount_on(dev.clone(), "a").await, mount(&disk, "b").await);
    let (d, f) = open_file(&a).await;
    a.unlink(d, b"msg").await.expect("unlink");
    a.sync().await.expect("sync");
    assert!(a.getattr(f).await.is_ok(), "open here");
    dev.crash();
    b.mknod(WHO, d, b"next", file(), false).await.expect("the domain is used again");
    b.unmount().await.expect("unmount");
    none_left(&disk).await;
}

/// The recoverer may change nothing: then whoever mounts next does, in whatever slot.
#[tokio::test(start_paused = true)]
async fn the_recoverer_only_reads() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("a");
    let a = mount_on(dev.clone(), "a").await;
    let read_only = MountConfig { read_only: true, ..config(disk.open("b"), "b") };
    let b = Volume::mount(read_only).await.expect("mount");
    let (d, f) = open_file(&a).await;
    a.unlink(d, b"msg").await.expect("unlink");
    a.sync().await.expect("sync");
    assert!(a.getattr(f).await.is_ok(), "open here");
    dev.crash();
    b.getattr(d).await.expect("recovered");
    let slot = b.node().slot;
    b.unmount().await.expect("unmount");
    let b = mount(&disk, "b").await;
    assert_eq!(b.node().slot, slot, "the dead node's slot stays vacant");
    b.unmount().await.expect("unmount");
    none_left(&disk).await;
}

async fn none_left(disk: &Arc<blockdev::sim::SimDisk>) {
    check_clean(disk, 0).await;
    let raw: Arc<dyn blockdev::BlockDevice> = disk.open_raw();
    let report = fs_core::check::check(&raw, None).await.expect("check");
    assert_eq!((report.orphans, report.bytes), (0, 0));
}

/// The next exclusive holder may lose the domain before it has cleaned up: then the one after it does.
#[tokio::test(start_paused = true)]
async fn cleaning_up_is_handed_on() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("a");
    let (a, b, c) = (mount_on(dev.clone(), "a").await, mount(&disk, "b").await, mount(&disk, "c").await);
    let (d, f) = open_file(&a).await;
    b.unlink(d, b"msg").await.expect("unlink");
    assert_eq!(a.read(f, 0, 10).await.expect("open files stay readable").value, [9; 10]);
    dev.crash();
    for i in b'a'..b'u' {
        // A result kept would keep its node's lock.
        let made = |v: Arc<Volume>, name: [u8; 2]| async move { v.mknod(WHO, d, &name, file(), false).await.map(drop) };
        let (one, other) = tokio::join!(made(b.clone(), [b'n', i]), made(c.clone(), [b'o', i]));
        one.expect("b works on");
        other.expect("c works on");
    }
    goes(&b, f).await;
    b.unmount().await.expect("unmount");
    c.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

/// Free blocks of the volume, once what was freed counts.
async fn free(v: &Arc<Volume>) -> u64 {
    v.sync().await.expect("sync");
    v.statfs().await.expect("statfs").free
}

/// Waits until the space of the file is back without a look at its directory.
async fn space_is_back(v: &Arc<Volume>, before: u64) {
    const ALMOST: u64 = 40;
    let mut now = 0;
    for _ in 0..100 {
        now = free(v).await;
        if now + ALMOST >= before {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{before} blocks were free, now {now}");
}

/// Nobody touches the directory any more: the recovery brings the space back.
#[tokio::test(start_paused = true)]
async fn the_opener_dies_and_nobody_comes_by() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("a");
    let (a, b) = (mount_on(dev.clone(), "a").await, mount(&disk, "b").await);
    b.mkdir(WHO, ROOT_INO, b"warm", dir()).await.map(drop).expect("mkdir");
    a.mkdir(WHO, ROOT_INO, b"warm too", dir()).await.map(drop).expect("mkdir");
    let before = free(&b).await;
    let (d, f) = open_file(&a).await;
    b.unlink(d, b"msg").await.map(drop).expect("unlink");
    assert_eq!(a.read(f, 0, 10).await.expect("open files stay readable").value, [9; 10]);
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert_eq!(a.read(f, 0, 10).await.expect("as long as they are open").value, [9; 10]);
    dev.crash();
    space_is_back(&b, before).await;
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

#[tokio::test(start_paused = true)]
async fn who_unlinked_has_left_before_the_opener_dies() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("a");
    let (a, b, c) = (mount_on(dev.clone(), "a").await, mount(&disk, "b").await, mount(&disk, "c").await);
    c.mkdir(WHO, ROOT_INO, b"warm", dir()).await.map(drop).expect("mkdir");
    let before = free(&c).await;
    let (d, f) = open_file(&a).await;
    b.unlink(d, b"msg").await.map(drop).expect("unlink");
    b.unmount().await.expect("unmount");
    assert_eq!(a.read(f, 0, 10).await.expect("open files stay readable").value, [9; 10]);
    dev.crash();
    space_is_back(&c, before).await;
    c.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

/// Whenever who unlinked leaves: before the death is known, while the dead one is recovered, after it.
#[tokio::test(start_paused = true)]
async fn who_unlinked_leaves_as_the_opener_dies() {
    for after in (0..80).map(|n| Duration::from_millis(n * 50)) {
        let disk = disk(64 << 20).await;
        disk.set_latency(5_000..=20_000);
        let dev = disk.open("a");
        let (a, b, c) = (mount_on(dev.clone(), "a").await, mount(&disk, "b").await, mount(&disk, "c").await);
        let (d, f) = open_file(&a).await;
        b.unlink(d, b"msg").await.map(drop).expect("unlink");
        assert_eq!(a.read(f, 0, 10).await.expect("open files stay readable").value, [9; 10]);
        dev.crash();
        tokio::time::sleep(after).await;
        b.unmount().await.expect("unmount");
        tokio::time::sleep(Duration::from_secs(10)).await;
        c.unmount().await.expect("unmount");
        println!("who unlinked left after {after:?}");
        none_left(&disk).await;
    }
}

#[tokio::test(start_paused = true)]
async fn opener_and_unlinker_die_together() {
    for survivors in [1, 0] {
        let disk = disk(64 << 20).await;
        let (dev_a, dev_b) = (disk.open("a"), disk.open("b"));
        let (a, b) = (mount_on(dev_a.clone(), "a").await, mount_on(dev_b.clone(), "b").await);
        let mut c = mount(&disk, "c").await;
        c.mkdir(WHO, ROOT_INO, b"warm", dir()).await.map(drop).expect("mkdir");
        let before = free(&c).await;
        let (d, f) = open_file(&a).await;
        b.unlink(d, b"msg").await.map(drop).expect("unlink");
        assert_eq!(a.read(f, 0, 10).await.expect("open files stay readable").value, [9; 10]);
        // One without a name from the start, of the other node.
        let g = b.tmpfile(WHO, ROOT_INO, file()).await.expect("tmpfile").value.ino;
        b.write(g, 0, &[8; SIZE], WriteOptions::default()).await.map(drop).expect("write");
        b.fsync(g, false).await.expect("fsync");
        dev_a.crash();
        dev_b.crash();
        if survivors == 0 {
            c.unmount().await.expect("unmount");
            c = mount(&disk, "d").await;
        }
        space_is_back(&c, before).await;
        c.unmount().await.expect("unmount");
        check_clean(&disk, 0).await;
    }
}
