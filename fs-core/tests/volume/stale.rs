//! The device acknowledges a write and loses it: an older state of the block stays in its place, sound in itself. Nobody may believe
//! it: whoever needs the block gets an error that names it, and fsck says so and repairs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::common::{WHO, check_clean, dir, disk, file, mount, try_mount};
use blockdev::BlockDevice;
use blockdev::sim::{SimConfig, SimDisk, SimImage, WriteFault};
use cluster::{LockBlock, LockId};
use fs_core::check::Options;
use fs_core::{FsError, ROOT_INO, Rename, Volume, WriteOptions};
use journal::block::{BlockError, version};

const SIZE: u64 = 48 << 20;
const BLOCK: u64 = 4096;
const DIRS: usize = 3;

/// Contents by directory and name.
type Files = BTreeMap<(usize, String), Vec<u8>>;

fn body(d: usize, n: usize, life: usize) -> Vec<u8> {
    format!("message {n} of box {d} in its life {life} ").into_bytes().repeat(if n.is_multiple_of(5) { 200 } else { 8 })
}

async fn write(v: &Volume, ino: u64, body: &[u8]) {
    v.write(ino, 0, body, WriteOptions::default()).await.expect("write");
}

async fn add(v: &Volume, dirs: &[u64], files: &mut Files, d: usize, n: usize) {
    let name = format!("m{n}");
    let f = v.mknod(WHO, dirs[d], name.as_bytes(), file(), false).await.expect("create").value.ino;
    write(v, f, &body(d, n, 0)).await;
    files.insert((d, name), body(d, n, 0));
}

/// Mailboxes large enough for trees of two levels.
async fn volume() -> (Arc<SimDisk>, Files, Vec<u64>) {
    let disk = disk(SIZE).await;
    let v = mount(&disk, "a").await;
    let (mut files, mut dirs) = (Files::new(), Vec::new());
    for d in 0..DIRS {
        dirs.push(v.mkdir(WHO, ROOT_INO, format!("box{d}").as_bytes(), dir()).await.expect("mkdir").value.ino);
        for n in 0..100 {
            add(&v, &dirs, &mut files, d, n).await;
        }
    }
    v.unmount().await.expect("unmount");
    (disk, files, dirs)
}

/// Every kind of change, all over the trees.
async fn change(v: &Volume, dirs: &[u64], files: &mut Files) {
    for (d, at) in dirs.iter().enumerate() {
        for n in (0..100).step_by(7) {
            let old = format!("m{n}");
            let ino = v.lookup(*at, old.as_bytes()).await.expect("lookup").value.expect("there").ino;
            match n % 3 {
                0 => {
                    let new = format!("renamed{n}");
                    v.rename(*at, old.as_bytes(), *at, new.as_bytes(), Rename::NoReplace).await.expect("rename");
                    let body = files.remove(&(d, old)).expect("known");
                    files.insert((d, new), body);
                }
                1 => {
                    v.unlink(*at, old.as_bytes()).await.expect("unlink");
                    files.remove(&(d, old));
                }
                _ => {
                    write(v, ino, &body(d, n, 1)).await;
                    files.insert((d, old), body(d, n, 1));
                }
            }
        }
        for n in 100..120 {
            add(v, dirs, files, d, n).await;
        }
    }
}

fn on(image: &SimImage) -> Arc<SimDisk> {
    let mut cfg = SimConfig::new(SIZE, 7);
    cfg.fencing = blockdev::FencingKind::ProcessLock;
    SimDisk::from_snapshot(cfg, image)
}

fn block(image: &SimImage, n: u64) -> Vec<u8> {
    let mut b = vec![0; BLOCK as usize];
    image.read(n * BLOCK, &mut b);
    b
}

/// Domain headers and tree nodes of which `now` has another state than `before`: block, kind, owner.
fn changed(before: &SimImage, now: &SimImage) -> Vec<(u64, u8, u32)> {
    let all = (1..SIZE / BLOCK).map(|n| (n, block(before, n), block(now, n)));
    let same = |a: &[u8], b: &[u8]| a[..32] != [0; 32] && a[..28] == b[..28] && a.starts_with(b"CLFS");
    all.filter(|(_, a, b)| matches!(a[4], 1 | 2) && same(a, b) && a != b)
        .map(|(n, a, _)| (n, a[4], u32::from_le_bytes(a[24..28].try_into().expect("4 bytes"))))
        .collect()
}

/// Looks at everything: it is as it should be, or an error names a block. Gives those blocks, and what could be read.
async fn look(v: &Volume, dirs: &[u64], files: &Files) -> (BTreeSet<u64>, BTreeSet<(usize, String)>) {
    let (mut named, mut good) = (BTreeSet::new(), BTreeSet::new());
    let mut told = |e: FsError| match e {
        FsError::Block { block, why: BlockError::Version { expected, found }, .. } if expected != found => {
            named.insert(block);
        }
        // A new node that was lost with it.
        FsError::Block { block, why: BlockError::Magic, .. } => {
            named.insert(block);
        }
        e => panic!("an error that names no stale block: {e}"),
    };
    for (d, at) in dirs.iter().enumerate() {
        match v.readdir(*at, 0, 10_000, true).await {
            Ok(list) => {
                let names: Vec<String> =
                    list.value.iter().map(|e| String::from_utf8_lossy(&e.name).into_owned()).collect();
                let known = names.iter().filter(|n| !n.starts_with('.')).all(|n| files.contains_key(&(d, n.clone())));
                let count = files.keys().filter(|k| k.0 == d).count();
                assert!(known && names.iter().filter(|n| !n.starts_with('.')).count() == count, "an old listing");
            }
            Err(e) => told(e),
        }
    }
    for ((d, name), body) in files {
        let found = match v.lookup(dirs[*d], name.as_bytes()).await {
            Ok(found) => found.value.unwrap_or_else(|| panic!("{name} is missing without an error")).ino,
            Err(e) => {
                told(e);
                continue;
            }
        };
        match v.read(found, 0, 1 << 20).await {
            Ok(got) => {
                assert_eq!(got.value, *body, "old contents without an error");
                good.insert((*d, name.clone()));
            }
            Err(e) => told(e),
        }
    }
    (named, good)
}

async fn violations(disk: &Arc<SimDisk>) -> Vec<String> {
    let raw: Arc<dyn BlockDevice> = disk.open_raw();
    let report = fs_core::check::check(&raw, None).await.expect("check");
    report.violations.iter().map(|v| format!("{v:?}")).collect()
}

/// What is there after a repair that may lose something.
async fn repaired(disk: &Arc<SimDisk>, dirs: &[u64], files: &Files) -> BTreeSet<(usize, String)> {
    let dev: Arc<dyn BlockDevice> = disk.open("fsck");
    let done = fs_core::repair::run(&dev, true, Options::default(), 1, None).await.expect("repair");
    assert_eq!(done.report.violations, []);
    check_clean(disk, 0).await;
    let v = mount(disk, "b").await;
    let mut good = BTreeSet::new();
    for ((d, name), body) in files {
        let Some(found) = v.lookup(dirs[*d], name.as_bytes()).await.expect("lookup").value else { continue };
        if v.read(found.ino, 0, 1 << 20).await.expect("read").value == *body {
            good.insert((*d, name.clone()));
        }
    }
    v.unmount().await.expect("unmount");
    good
}

/// Each block in turn is left in its older state.
#[tokio::test(start_paused = true)]
async fn a_lost_write_is_an_error_and_fsck_repairs() {
    let (disk, mut files, dirs) = volume().await;
    let before = disk.snapshot();
    let v = mount(&disk, "a").await;
    change(&v, &dirs, &mut files).await;
    v.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
    let now = disk.snapshot();
    let mailboxes: BTreeSet<u32> = dirs.iter().map(|d| (d >> 40) as u32).collect();
    let (mut leaves, mut inner, mut headers) = (0, 0, 0);
    for (n, kind, owner) in changed(&before, &now) {
        let old = block(&before, n);
        if kind == 1 && (old[64..72] == [0; 8] || block(&now, n)[64..72] == [0; 8]) {
            // Of a slot's own domain: without a root node before or after, nothing tells the header's age.
            assert!(!mailboxes.contains(&owner));
            continue;
        }
        let stale = || {
            let disk = on(&now);
            disk.write_raw(n * BLOCK, &old);
            disk
        };
        let disk = stale();
        let said = violations(&disk).await;
        assert!(said.iter().any(|s| s.contains("version")), "fsck says {said:?} of block {n}");
        if !mailboxes.contains(&owner) {
            // A mount may need it itself, and is refused then.
            let (disk, dirs) = (stale(), dirs.clone());
            if let Ok(v) = try_mount(&disk, "b").await {
                look(&v, &dirs, &files).await;
            }
            assert_eq!(repaired(&stale(), &dirs, &files).await.len(), files.len(), "block {n}");
            continue;
        }
        let v = mount(&disk, "b").await;
        let (named, good) = look(&v, &dirs, &files).await;
        drop(v);
        assert_eq!(named.len(), 1, "block {n}: errors name {named:?}");
        // A header's age is told by the root node, which is newer.
        assert!(kind == 1 || named.contains(&n), "block {n} is stale, errors name {named:?}");
        let kept = repaired(&stale(), &dirs, &files).await;
        let lost: Vec<_> = good.difference(&kept).collect();
        assert!(lost.is_empty(), "block {n}: the repair lost {lost:?}");
        match (kind, old[64]) {
            (1, _) => headers += 1,
            (_, 1) => leaves += 1,
            _ => inner += 1,
        }
        if (kind, old[64]) != (2, 1) {
            assert_eq!(kept.len(), files.len(), "block {n} holds no items, so none is lost with it");
        }
    }
    assert!(leaves > 20 && inner >= DIRS && headers == DIRS, "{leaves} leaves, {inner} inner nodes, {headers} headers");
}

/// The placing itself is lost, while two nodes work: the one that gets the domain does not believe what it finds.
#[tokio::test(start_paused = true)]
async fn a_placing_that_is_lost_is_seen_by_the_next_holder() {
    let (disk, files, dirs) = volume().await;
    let image = disk.snapshot();
    let mailbox = (dirs[0] >> 40) as u32;
    let mut seen = 0;
    let nodes = {
        let disk = on(&image);
        let v = mount(&disk, "a").await;
        change(&v, &dirs, &mut files.clone()).await;
        v.unmount().await.expect("unmount");
        changed(&image, &disk.snapshot())
    };
    for (n, ..) in nodes.into_iter().filter(|(_, kind, owner)| *kind == 2 && *owner == mailbox) {
        let disk = on(&image);
        let mut files = files.clone();
        let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
        let old = disk.read_raw(n * BLOCK, BLOCK as usize);
        change(&a, &dirs, &mut files).await;
        a.sync().await.expect("sync");
        if disk.read_raw(n * BLOCK, BLOCK as usize) != old {
            // Placed before its time: not what this is about.
            continue;
        }
        disk.arm_write(n * BLOCK..(n + 1) * BLOCK, WriteFault::Lost);
        let (named, _) = look(&b, &dirs, &files).await;
        assert!(!named.is_empty(), "block {n} was lost on its way, and nobody noticed");
        seen += 1;
    }
    assert!(seen > 5, "{seen} placings were lost");
}

/// All blocks of a group are left as they were: each is sound, and they fit together. The lock block knows better, once the group has been
/// given to another node.
#[tokio::test(start_paused = true)]
async fn a_group_of_which_all_writes_were_lost() {
    let (disk, mut files, dirs) = volume().await;
    let before = disk.snapshot();
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    change(&a, &dirs, &mut files).await;
    // It needs all there is, and gets what the other had changed.
    let filler = b.mknod(WHO, ROOT_INO, b"filler", file(), false).await.expect("create").value.ino;
    while b.write(filler, 0, &[1; 1 << 20], WriteOptions { append: true, ..WriteOptions::default() }).await.is_ok() {}
    b.unlink(ROOT_INO, b"filler").await.expect("unlink");
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
    let now = disk.snapshot();
    let raw: Arc<dyn BlockDevice> = disk.open_raw();
    let layout = fs_core::read_superblock(raw.as_ref()).await.expect("superblock").layout();
    let areas = layout.cluster();
    let known = |g: u32| {
        let id = LockId::Group(g);
        let sector = disk.read_raw(areas.lock_block(id).expect("a group"), areas.stride as usize);
        LockBlock::decode(&sector, layout.volume, id).expect("a lock block").value.version
    };
    let older = |g: u32| u64::from(version(&block(&before, layout.group_header(g)))) < known(g);
    let given: Vec<u32> = (0..layout.groups).filter(|g| older(*g)).collect();
    assert!(!given.is_empty(), "no group has gone from one node to the other");
    for g in given {
        let all = layout.group_header(g)..layout.group_bitmap(g, layout.bitmap_blocks);
        let disk = on(&now);
        all.for_each(|n| disk.write_raw(n * BLOCK, &block(&before, n)));
        let said = violations(&disk).await;
        assert!(said.iter().any(|s| s.contains("version")), "fsck says {said:?} of group {g}");
        let v = mount(&disk, "c").await;
        let full = v.mknod(WHO, ROOT_INO, b"filler", file(), false).await.map(|m| m.value.ino);
        let mut errors = Vec::new();
        if let Ok(f) = full {
            let append = WriteOptions { append: true, ..WriteOptions::default() };
            while errors.is_empty() {
                errors.extend(v.write(f, 0, &[2; 1 << 20], append).await.map(drop).err());
            }
        }
        // Where there are other groups they are used; nothing of this one is.
        drop(v);
        let mut kept = repaired(&disk, &dirs, &files).await;
        kept.retain(|k| files.contains_key(k));
        assert_eq!(kept.len(), files.len(), "group {g}: files were written over; writing ended with {errors:?}");
    }
}
