//! A volume grows with its device: while nodes work on it, while it is full, cut off at any moment, and twice at once.

use std::sync::Arc;
use std::time::Duration;

use blockdev::sim::{SimConfig, SimDisk};
use blockdev::{BlockDevice, FencingKind};
use cluster::LockId;
use fs_core::check::Options;
use fs_core::format::superblock::Superblock;
use fs_core::grow::{GrowError, Grown, grow};
use fs_core::{FsError, ROOT_INO, Volume, WriteOptions};

use crate::common::{WHO, check_clean, disk, file, mount, mount_on};

const SMALL: u64 = 48 << 20;
const LARGE: u64 = 160 << 20;
const PIECE: usize = 256 << 10;

fn contents(name: &[u8], piece: usize) -> Vec<u8> {
    vec![name.iter().fold(piece as u8, |s, b| s.wrapping_mul(31).wrapping_add(*b)); PIECE]
}

/// Writes until so many pieces are written, or the volume is full; gives the number of pieces.
async fn write(v: &Volume, name: &[u8], pieces: usize) -> usize {
    let f = v.mknod(WHO, ROOT_INO, name, file(), true).await.expect("create").value.ino;
    let mut written = 0;
    while written < pieces {
        match v.write(f, (written * PIECE) as u64, &contents(name, written), WriteOptions::default()).await {
            Ok(_) => written += 1,
            Err(FsError::NoSpace) => break,
            Err(e) => panic!("write: {e}"),
        }
    }
    v.fsync(f, false).await.expect("what was accepted has its place");
    v.release(f).await;
    written
}

async fn assert_contents(v: &Volume, name: &[u8], pieces: usize) {
    let f = v.lookup(ROOT_INO, name).await.expect("lookup").value.expect("is there").ino;
    for n in 0..pieces {
        let read = v.read(f, (n * PIECE) as u64, PIECE as u32).await.expect("read").value;
        assert!(read == contents(name, n), "piece {n}");
    }
}

async fn grow_on(disk: &Arc<SimDisk>, seed: u64) -> Result<Grown, GrowError> {
    let dev: Arc<dyn BlockDevice> = disk.open("grower");
    grow(&dev, seed).await
}

fn superblock(disk: &SimDisk) -> Superblock {
    Superblock::decode(&disk.read_raw(0, 4096)).expect("a superblock")
}

/// Blocks for files, as the layout has it.
fn managed(disk: &SimDisk) -> u64 {
    let l = superblock(disk).layout();
    (0..l.groups).map(|g| l.group_extent(g).len).sum()
}

fn copy(disk: &SimDisk, seed: u64) -> Arc<SimDisk> {
    let cfg = SimConfig { fencing: FencingKind::ProcessLock, ..SimConfig::new(0, seed) };
    SimDisk::from_snapshot(cfg, &disk.snapshot())
}

#[tokio::test(start_paused = true)]
async fn two_nodes_fill_what_the_volume_grew_by() {
    let disk = disk(SMALL).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    // Full to the last block that users get.
    let first = write(&a, b"first", usize::MAX).await;
    assert_eq!(write(&b, b"none", 1).await, 0);
    disk.enlarge(LARGE);
    assert_eq!(write(&b, b"nor now", 1).await, 0, "a larger device alone changes nothing");
    let before = managed(&disk);
    let grown = grow_on(&disk, 5).await.expect("grow");
    assert_eq!((grown.from, grown.to, grown.beyond), (SMALL / 4096, LARGE / 4096, 0));
    let more = (managed(&disk) - before) as usize * 4096;
    assert!(more > (LARGE - SMALL) as usize * 9 / 10, "{more} bytes more");
    for v in [&a, &b] {
        let s = v.statfs().await.expect("statfs");
        assert_eq!(s.blocks, managed(&disk));
        assert!(s.free * 4096 > more as u64 * 9 / 10, "{} blocks are free", s.free);
    }
    // Each as much as the volume had before, then one as much as there is.
    let (of_a, of_b) = (write(&a, b"of a", first).await, write(&b, b"of b", first / 2).await);
    assert_eq!((of_a, of_b), (first, first / 2));
    let rest = write(&a, b"rest", usize::MAX).await;
    let all = (of_a + of_b + rest) * PIECE;
    assert!(all > more * 8 / 10, "{all} bytes found room in {more}");
    for (name, pieces) in [(&b"first"[..], first), (b"of a", of_a), (b"of b", of_b), (b"rest", rest)] {
        assert_contents(&a, name, pieces).await;
        assert_contents(&b, name, pieces).await;
    }
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

/// It has no reason to look: it finds blocks, locks and domains in the new part by their numbers.
#[tokio::test(start_paused = true)]
async fn a_node_that_has_not_noticed_uses_what_others_put_there() {
    let disk = disk(SMALL).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    // Both have a group to work in.
    for (v, name) in [(&a, b"a"), (&b, b"b")] {
        write(v, name, 1).await;
    }
    disk.enlarge(LARGE);
    grow_on(&disk, 5).await.expect("grow");
    let pieces = (SMALL as usize + (SMALL as usize) / 2) / PIECE;
    assert_eq!(write(&a, b"large", pieces).await, pieces);
    a.mkdir(WHO, ROOT_INO, b"dir", crate::common::dir()).await.expect("mkdir");
    assert_contents(&b, b"large", pieces).await;
    b.unlink(ROOT_INO, b"large").await.expect("unlink");
    b.rmdir(ROOT_INO, b"dir").await.expect("rmdir");
    b.sync().await.expect("sync");
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
    let c = mount(&disk, "c").await;
    let pieces = (SMALL as usize * 2) / PIECE;
    assert_eq!(write(&c, b"again", pieces).await, pieces, "its blocks are free again");
    c.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

/// Of a node that used the new part and died the journal is replayed by one that has not noticed.
#[tokio::test(start_paused = true)]
async fn who_has_not_noticed_recovers_who_has() {
    let disk = disk(SMALL).await;
    let b = mount(&disk, "b").await;
    write(&b, b"b", 1).await;
    disk.enlarge(LARGE);
    grow_on(&disk, 5).await.expect("grow");
    let dev = disk.open("a");
    let a = mount_on(dev.clone(), "a").await;
    let pieces = (SMALL as usize * 3 / 2) / PIECE;
    assert_eq!(write(&a, b"large", pieces).await, pieces);
    dev.crash();
    drop(a);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_contents(&b, b"large", pieces).await;
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

/// Little by little, so that the last group becomes longer and longer, while a node has it.
#[tokio::test(start_paused = true)]
async fn the_last_group_becomes_longer() {
    let disk = disk(SMALL).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let mut size = SMALL;
    let mut names = Vec::new();
    for n in 0..12u8 {
        for (v, who) in [(&a, b'a'), (&b, b'b')] {
            let name = [who, b'0' + n];
            names.push((name, write(v, &name, if n % 3 == 2 { usize::MAX } else { 3 }).await));
        }
        size += (900 << 10) / 4096 * 4096;
        disk.enlarge(size);
        grow_on(&disk, 50 + u64::from(n)).await.expect("grow");
        let s = b.statfs().await.expect("statfs");
        assert_eq!(s.blocks, managed(&disk));
        if n % 4 == 3 {
            let before = managed(&disk);
            let free = a.statfs().await.expect("statfs").free;
            assert!(free <= before && free.abs_diff(s.free) < 1024, "{free} and {} of {before} are free", s.free);
        }
    }
    for (name, pieces) in names {
        assert_contents(&b, &name, pieces).await;
    }
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

#[tokio::test(start_paused = true)]
async fn cut_off_at_any_moment_the_volume_is_the_old_one_or_the_new_one() {
    let start = disk(SMALL).await;
    let v = mount(&start, "a").await;
    let pieces = write(&v, b"f", 20).await;
    v.unmount().await.expect("unmount");
    start.enlarge(LARGE);
    let (mut old, mut new, mut ahead) = (0, 0, 0);
    for n in 1.. {
        let disk = copy(&start, n);
        let dev = disk.open("grower");
        dev.crash_at(n);
        let handle: Arc<dyn BlockDevice> = dev.clone();
        let ended = tokio::select! {
            biased;
            () = dev.crashed() => None,
            ended = grow(&handle, 5) => Some(ended),
        };
        if let Some(ended) = ended {
            ended.expect("grow");
            assert!(old > 10 && new > 0 && ahead > 0, "{old} times old, {new} times new, {ahead} times a copy ahead");
            break;
        }
        drop((handle, dev));
        // Every other time the device loses power, too.
        if n % 2 == 0 {
            disk.crash_all();
            disk.power_loss();
        } else {
            disk.settle();
        }
        let grew = superblock(&disk).blocks == LARGE / 4096;
        if grew {
            new += 1
        } else {
            old += 1
        }
        // The node that grew it died; nothing else is worth a word but copies that are ahead.
        check_clean(&disk, n).await;
        let raw: Arc<dyn BlockDevice> = disk.open_raw();
        let report = fs_core::check::check(&raw, None).await.expect("check");
        ahead += u32::from(report.notes.iter().any(|x| x.contains("was cut off")));
        drop(raw);
        if n % 3 == 0 {
            let fsck: Arc<dyn BlockDevice> = disk.open("fsck");
            let outcome = fs_core::repair::run(&fsck, false, Options::default(), 9, None).await.expect("fsck -p");
            assert!(outcome.left.is_empty() && outcome.report.is_clean(), "{n}: {outcome:?}");
            assert!(!outcome.report.notes.iter().any(|x| x.contains("was cut off")), "{n}: {:?}", outcome.report.notes);
        }
        let v = mount(&disk, "b").await;
        assert_contents(&v, b"f", pieces).await;
        assert_eq!(v.statfs().await.expect("statfs").blocks, managed(&disk));
        // Once more, while a node has it mounted.
        grow_on(&disk, 77).await.unwrap_or_else(|e| panic!("crash at {n}, again: {e}"));
        assert_eq!(superblock(&disk).blocks, LARGE / 4096);
        if n % 5 == 0 {
            let pieces = SMALL as usize * 2 / PIECE;
            assert_eq!(write(&v, b"large", pieces).await, pieces);
        }
        v.unmount().await.expect("unmount");
        check_clean(&disk, n).await;
        let raw: Arc<dyn BlockDevice> = disk.open_raw();
        let report = fs_core::check::check(&raw, None).await.expect("check");
        assert!(report.notes.is_empty(), "{n}: {:?}", report.notes);
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_superblock_is_written_from_a_copy_that_is_ahead() {
    let disk = disk(SMALL).await;
    let v = mount(&disk, "a").await;
    let pieces = write(&v, b"f", 20).await;
    v.unmount().await.expect("unmount");
    let old = disk.read_raw(0, 4096);
    disk.enlarge(LARGE);
    grow_on(&disk, 5).await.expect("grow");
    for superblock in [vec![0xa5; 4096], [&b"CLUSTRFS"[..], &[7; 4088]].concat()] {
        let disk = copy(&disk, 3);
        disk.write_raw(0, &superblock);
        let fsck: Arc<dyn BlockDevice> = disk.open("fsck");
        let outcome = fs_core::repair::run(&fsck, false, Options::default(), 9, None).await;
        if superblock[0] == 0xa5 {
            assert!(outcome.is_err(), "what is somebody else's stays: {outcome:?}");
            continue;
        }
        assert!(outcome.expect("fsck -p").report.is_clean());
        let v = mount(&disk, "b").await;
        assert_contents(&v, b"f", pieces).await;
        assert_eq!(v.statfs().await.expect("statfs").blocks, managed(&disk));
        v.unmount().await.expect("unmount");
    }
    // As it is between the copies and the superblock: the superblock counts while it can be read.
    disk.write_raw(0, &old);
    let fsck: Arc<dyn BlockDevice> = disk.open("fsck");
    let outcome = fs_core::repair::run(&fsck, false, Options::default(), 9, None).await.expect("fsck -p");
    assert!(outcome.report.is_clean() && outcome.report.notes.is_empty(), "{outcome:?}");
    assert_eq!(disk.read_raw(7 * 4096, 4096), old);
}

#[tokio::test(start_paused = true)]
async fn of_two_at_once_one_does_it() {
    let disk = disk(SMALL).await;
    let v = mount(&disk, "a").await;
    disk.enlarge(LARGE);
    let both = tokio::join!(grow_on(&disk, 5), grow_on(&disk, 6));
    let grew = [&both.0, &both.1].into_iter().filter(|g| g.as_ref().is_ok_and(|g| g.from < g.to)).count();
    assert_eq!(grew, 1, "{both:?}");
    for other in [both.0, both.1] {
        assert!(matches!(other, Ok(_) | Err(GrowError::UnderWay)), "{other:?}");
    }
    assert_eq!(superblock(&disk).generation, 1);
    let again = grow_on(&disk, 7).await.expect("nothing to do");
    assert_eq!(again.from, again.to);
    v.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

/// Another program hangs while it has the volume's lock.
#[tokio::test(start_paused = true)]
async fn who_waits_for_another_that_grows_is_told() {
    let disk = disk(SMALL).await;
    disk.enlarge(LARGE);
    let sb = superblock(&disk);
    let dev: Arc<dyn BlockDevice> = disk.open("other");
    let layout = sb.layout();
    let node = cluster::Node::join(cluster::JoinConfig {
        device: dev.clone(),
        layout: layout.cluster(),
        timeouts: sb.timeouts,
        hint_key: sb.hint_key,
        net: None,
        host_name: "clusterfs grow".into(),
        recoverer: Arc::new(fs_core::JournalRecoverer::new(dev, layout)),
        seed: 3,
    })
    .await
    .expect("join");
    node.acquire(LockId::Domain(0), cluster::Mode::Exclusive).await.expect("the volume's lock");
    assert!(matches!(grow_on(&disk, 5).await, Err(GrowError::UnderWay)));
    assert_eq!(superblock(&disk), sb);
    node.leave().await.expect("leave");
    grow_on(&disk, 6).await.expect("now");
    check_clean(&disk, 0).await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_grow_says_why() {
    let whole = disk(SMALL).await;
    let short = SimDisk::new(SimConfig { fencing: FencingKind::ProcessLock, ..SimConfig::new(SMALL / 2, 1) });
    short.write_raw(0, &whole.read_raw(0, SMALL as usize / 2));
    let smaller = grow_on(&short, 5).await;
    assert!(matches!(smaller, Err(GrowError::Smaller { have, need }) if (have, need) == (SMALL / 2, SMALL)));
    whole.enlarge(LARGE);
    let all = [mount(&whole, "a").await, mount(&whole, "b").await, mount(&whole, "c").await, mount(&whole, "d").await];
    assert!(matches!(grow_on(&whole, 5).await, Err(GrowError::Full { nodes: 4 })));
    for v in all {
        v.unmount().await.expect("unmount");
    }
    grow_on(&whole, 6).await.expect("nobody has it mounted");
    check_clean(&whole, 0).await;
    whole.write_raw(100, &[9; 8]);
    assert!(matches!(grow_on(&whole, 5).await, Err(GrowError::Superblock(_))));
}

/// No further than mkfs left room for.
#[tokio::test(start_paused = true)]
async fn a_volume_grows_to_its_largest_size_and_no_further() {
    let disk = SimDisk::new(SimConfig { fencing: FencingKind::ProcessLock, ..SimConfig::new(SMALL, 1) });
    let raw: Arc<dyn BlockDevice> = disk.open_raw();
    let opts = mkfs::FormatOptions { max_size: Some(64 << 20), ..mkfs::FormatOptions::seeded(7) };
    mkfs::format(&raw, &opts, &mut |_| {}).await.expect("mkfs");
    disk.enlarge(LARGE);
    let grown = grow_on(&disk, 5).await.expect("grow");
    assert_eq!(grown.to, superblock(&disk).layout().max_blocks());
    assert!(grown.to * 4096 >= 64 << 20 && grown.to + grown.beyond == LARGE / 4096 && grown.beyond > 0, "{grown:?}");
    let again = grow_on(&disk, 6).await.expect("nothing to do");
    assert_eq!((again.from, again.to, again.beyond), (grown.to, grown.to, grown.beyond));
    let v = mount(&disk, "a").await;
    let pieces = write(&v, b"all", usize::MAX).await;
    assert!(pieces * PIECE > 50 << 20, "{pieces} pieces");
    v.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_volume_with_plain_locks_grows() {
    let disk = SimDisk::new(SimConfig { fencing: FencingKind::None, ..SimConfig::new(SMALL, 1) });
    let raw: Arc<dyn BlockDevice> = disk.open_raw();
    let opts = mkfs::FormatOptions { locks: mkfs::Locks::Plain, ..mkfs::FormatOptions::seeded(7) };
    mkfs::format(&raw, &opts, &mut |_| {}).await.expect("mkfs");
    let a = mount(&disk, "a").await;
    disk.enlarge(LARGE);
    grow_on(&disk, 5).await.expect("grow");
    let pieces = SMALL as usize * 2 / PIECE;
    assert_eq!(write(&a, b"large", pieces).await, pieces);
    a.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}
