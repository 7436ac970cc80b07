//! A small volume is put together by hand; every kind of damage to it must be named.

mod image;

use std::sync::Arc;

use blockdev::BlockDevice;
use blockdev::sim::{SimConfig, SimDisk};
use cluster::{LockId, SlotState};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::format::item::{
    Dirent, ExtentItem, FLAG_INLINE, Inode, Key, Kind, encode_xattr_piece, ino, name_cookie, xattr_offset,
};
use image::{BOX, BOX_FILES, Image, run};

async fn check_image(image: &Image) -> Report {
    let dev: Arc<dyn BlockDevice> = image.render().await.open_raw();
    check_with(&dev, Options { read_contents: true }, None).await.unwrap()
}

#[test]
fn a_healthy_volume_is_clean() {
    run(async {
        let r = check_image(&Image::healthy()).await;
        assert_eq!(r.violations, [], "{:?}", r.notes);
        assert!(r.is_clean());
        assert_eq!((r.dirs, r.symlinks, r.specials, r.orphans), (3, 1, 1, 1));
        assert_eq!(r.files, 3 + BOX_FILES);
        // Root, the mailbox, and the slot domain that was used.
        assert_eq!(r.domains, 3);
        assert!(r.blocks_used > 20);
        assert!(r.tree_nodes > 4, "the mailbox has a tree of more than one level");
        assert!(r.notes.iter().any(|n| n.contains("1 unlinked")), "{:?}", r.notes);
    });
}

/// Applies a damage and wants it named, without a flood of consequences.
fn damage(name: &str, change: impl FnOnce(&mut Image), expect: &[&str]) {
    run(async {
        let mut image = Image::healthy();
        change(&mut image);
        let r = check_image(&image).await;
        let lines: Vec<String> = r.violations.iter().map(ToString::to_string).collect();
        for e in expect {
            assert!(lines.iter().any(|l| l.contains(e)), "{name}: wanted \"{e}\" in {lines:#?}");
        }
        assert!(lines.len() <= expect.len() + 3, "{name}: {lines:#?}");
        assert_eq!(r.violation_count, lines.len() as u64);
    });
}

fn inode_of(image: &mut Image, domain: u32, local: u64, change: impl FnOnce(&mut Inode)) {
    let v = image.items(domain).get_mut(&Key::new(local, Kind::Inode, 0)).unwrap();
    let mut i = Inode::decode(v).unwrap();
    change(&mut i);
    *v = i.encode().to_vec();
}

fn entry(image: &mut Image, domain: u32, dir: u64, name: &[u8], target: u64, file_type: u8, add: bool) {
    let e = Dirent { ino: target, file_type, name: name.to_vec() };
    image.items(domain).insert(Key::new(dir, Kind::Dirent, name_cookie(name)), e.encode());
    if add {
        inode_of(image, domain, dir, |i| i.size += 1);
    }
}

#[test]
fn damaged_inodes_are_named() {
    damage("links", |i| inode_of(i, 1, 2, |n| n.links = 2), &["number 2): should have 2 names, has 1"]);
    damage("links across domains", |i| inode_of(i, BOX, 10, |n| n.links = 3), &["should have 3 names, has 2"]);
    damage("too few links", |i| inode_of(i, BOX, 10, |n| n.links = 1), &["has more names than its 1 links"]);
    damage("dir links", |i| inode_of(i, 1, 1, |n| n.links = 2), &["1 subdirectories make 3"]);
    damage("dir size", |i| inode_of(i, BOX, 2, |n| n.size += 1), &["entries, has"]);
    damage("subdirs", |i| inode_of(i, BOX, 1, |n| n.subdirs = 7), &["counts 7 subdirectories"]);
    damage("blocks", |i| inode_of(i, 1, 3, |n| n.blocks = 9), &["counts 9 blocks, its extents have 5"]);
    damage("mode", |i| inode_of(i, 1, 2, |n| n.mode = 0o644), &["mode 644 is of no file type", "another file type"]);
    damage("inline size", |i| inode_of(i, 1, 2, |n| n.size = 2), &["inline file of 2 bytes has 5"]);
    damage("inline flag", |i| inode_of(i, 1, 2, |n| n.flags = 0), &["inline contents, but says"]);
    damage("inline flag with blocks", |i| inode_of(i, 1, 3, |n| n.flags = FLAG_INLINE), &["inline and has blocks"]);
    damage("symlink", |i| inode_of(i, 1, 4, |n| n.size = 99), &["symbolic link of 99 bytes has a target of"]);
    damage("no links", |i| inode_of(i, 1, 2, |n| n.links = 0), &["no orphan", "should have 0 names, has 1"]);
    damage(
        "inode gone",
        |i| {
            i.items(BOX).remove(&Key::new(20, Kind::Inode, 0));
        },
        &["name \"m20\": refers to", "has items (kind 3), but no inode", "its header counts"],
    );
    damage("parent", |i| inode_of(i, BOX, 2, |n| n.parent = ino(1, 1)), &["whose parent is"]);
    damage(
        "parent across domains",
        |i| inode_of(i, BOX, 1, |n| n.parent = ino(BOX, 2)),
        &["whose parent is", "own ancestor"],
    );
    damage("unknown item", |i| i.put(1, Key { object: 2, kind: 99, offset: 0 }, b"x"), &["item of unknown kind 99"]);
    damage("bad inode", |i| i.put(1, Key::new(2, Kind::Inode, 0), b"short"), &["inode: too short"]);
    damage(
        "xattr",
        |i| i.put(1, Key::new(2, Kind::Xattr, 5), &encode_xattr_piece(b"user.a", 1, b"")),
        &["hash of another"],
    );
    let half = encode_xattr_piece(b"user.x", 2, b"half");
    damage(
        "xattr pieces",
        move |i| i.put(1, Key::new(2, Kind::Xattr, xattr_offset(b"user.x")), &half),
        &["has 1 of 2 pieces"],
    );
}

#[test]
fn damaged_names_are_named() {
    damage(
        "missing here",
        |i| entry(i, 1, 1, b"lost", ino(1, 77), 8, true),
        &["\"lost\": refers to", "which is not there"],
    );
    damage("missing there", |i| entry(i, 1, 1, b"lost", ino(BOX, 7777), 8, true), &["\"lost\": refers to"]);
    damage("missing domain", |i| entry(i, 1, 1, b"lost", ino(40, 1), 8, true), &["\"lost\": refers to"]);
    damage("type", |i| entry(i, 1, 1, b"inline", ino(1, 2), 12, false), &["\"inline\": has another file type"]);
    damage(
        "hash",
        |i| {
            let v = i.items(1).remove(&Key::new(1, Kind::Dirent, name_cookie(b"inline"))).unwrap();
            i.put(1, Key::new(1, Kind::Dirent, name_cookie(b"inline") + 5000), &v);
        },
        &["cannot be found"],
    );
    damage(
        "twice",
        |i| {
            let v = i.items(1)[&Key::new(1, Kind::Dirent, name_cookie(b"inline"))].clone();
            i.put(1, Key::new(1, Kind::Dirent, name_cookie(b"inline") + 1), &v);
            inode_of(i, 1, 1, |n| n.size += 1);
            inode_of(i, 1, 2, |n| n.links = 2);
        },
        &["\"inline\": is there twice"],
    );
    damage(
        "second name of a directory",
        |i| {
            entry(i, 1, 1, b"again", ino(BOX, 1), 4, true);
            inode_of(i, 1, 1, |n| (n.subdirs, n.links) = (2, 4));
        },
        &["should have 1 names, has 2"],
    );
    damage("bad name", |i| i.put(1, Key::new(1, Kind::Dirent, 1 << 20), b"12345678Xa/b"), &["bad name"]);
    damage("entry in a file", |i| entry(i, 1, 2, b"x", ino(1, 3), 8, false), &["not a directory"]);
    damage(
        "loop",
        |i| {
            // The mailbox loses its name, and hangs under its own child.
            i.items(1).remove(&Key::new(1, Kind::Dirent, name_cookie(b"box")));
            inode_of(i, 1, 1, |n| (n.size, n.subdirs, n.links) = (n.size - 1, 0, 2));
            entry(i, BOX, 2, b"box", ino(BOX, 1), 4, true);
            inode_of(i, BOX, 2, |n| (n.subdirs, n.links) = (1, 3));
            inode_of(i, BOX, 1, |n| n.parent = ino(BOX, 2));
        },
        &["own ancestor"],
    );
    damage(
        "orphan without inode",
        |i| {
            i.put(1, Key::new(0, Kind::Orphan, 55), b"");
            i.header(1).orphans += 1;
        },
        &["orphan 55 has no inode"],
    );
    damage("record", |i| i.put(1, Key::new(0, Kind::DeferredFree, 55), &[0; 8]), &["does not belong here"]);
}

#[test]
fn damaged_space_is_named() {
    let extent = |start, len| ExtentItem { start, len, unwritten: false }.encode().to_vec();
    damage(
        "two owners",
        move |i| {
            let (start, _) = i.file_extent;
            i.put(1, Key::new(2, Kind::Extent, 0), &extent(start, 1));
            inode_of(i, 1, 2, |n| (n.blocks, n.flags) = (1, 0));
            i.items(1).remove(&Key::new(2, Kind::Inline, 0));
        },
        &["belong to something else too"],
    );
    damage(
        "overlap in the file",
        move |i| {
            let (start, _) = i.file_extent;
            i.put(1, Key::new(3, Kind::Extent, 1), &extent(start + 2, 3));
        },
        &["overlaps the one before"],
    );
    damage(
        "outside",
        move |i| i.put(1, Key::new(3, Kind::Extent, 4), &extent(3, 3)),
        &["outside the allocation groups"],
    );
    damage(
        "lost block",
        |i| {
            let (start, _) = i.file_extent;
            i.in_use.remove(&(start + 1));
        },
        &["marked as free, but in use"],
    );
    damage(
        "leak",
        |i| {
            let b = *i.in_use.iter().next_back().unwrap() + 200;
            i.in_use.extend(b..b + 3);
        },
        &["marked as in use, but nothing refers to it"],
    );
    damage("group count", |i| i.free_blocks_off = 5, &["free blocks, its bitmaps"]);
    damage(
        "bitmap versions",
        |i| i.bitmap_versions = 3,
        &["the versions of its bitmaps add up to 0, its header says 3"],
    );
    damage("domain count", |i| i.free_domains_off = 5, &["free domain numbers, its bitmap"]);
    damage("inodes", |i| i.header(1).inodes = 99, &["counts 99 inodes"]);
    damage("orphans", |i| i.header(BOX).orphans = 99, &["counts 99 orphans"]);
    damage("next number", |i| i.header(1).next_local = 3, &["its next inode is number 3, but it has"]);
    damage("nodes", |i| i.header(BOX).nodes = 1, &["header counts", "tree nodes"]);
    damage("domain without header", |i| i.no_root.push(BOX), &["in use, but has no header block"]);
    damage(
        "domain free",
        |i| i.hidden_domains.push(BOX),
        &["\"box\": refers to inode", "\"message\": refers to inode", "nothing refers to it"],
    );
    damage("root domain free", |i| i.hidden_domains.push(1), &["is not marked as in use, but always is"]);
}

/// Damages bytes of a healthy volume and wants a violation that says so.
fn raw(name: &str, at: impl FnOnce(&Image) -> u64, expect: &str) {
    run(async {
        let image = Image::healthy();
        let disk = image.render().await;
        let at = at(&image);
        let byte = disk.read_raw(at, 1)[0];
        disk.write_raw(at, &[byte ^ 0x40]);
        let dev: Arc<dyn BlockDevice> = disk.open_raw();
        let r = check(&dev, None).await.unwrap();
        let lines: Vec<String> = r.violations.iter().map(ToString::to_string).collect();
        assert!(lines.iter().any(|l| l.contains(expect)), "{name}: wanted \"{expect}\" in {lines:#?}");
        assert!(lines.len() < 6, "{name}: {lines:#?}");
    });
}

#[test]
fn damaged_blocks_are_named() {
    let layout = |i: &Image| i.sb.layout();
    raw("superblock", |_| 50, "its copy in block");
    raw("near copy", |i| layout(i).superblock_copies()[0] * 4096 + 50, "copy of the superblock");
    raw("copy", |i| layout(i).superblock_copies()[1] * 4096 + 50, "copy of the superblock");
    raw(
        "lock of nobody",
        |i| layout(i).cluster().lock_block(LockId::Domain(0)).unwrap() + 20,
        "lock block of domain 0",
    );
    raw("group header", |i| layout(i).group_header(0) * 4096 + 100, "group 0, header in block");
    raw("bitmap", |i| layout(i).group_bitmap(0, 0) * 4096 + 100, "group 0, bitmap in block");
    run(async {
        let image = Image::healthy();
        let disk = image.render().await;
        let region = image.sb.layout().journal(1);
        disk.write_raw(region.offset, &[0; 8192]);
        let dev: Arc<dyn BlockDevice> = disk.open_raw();
        let r = check(&dev, None).await.unwrap();
        assert_eq!(r.violations.len(), 1, "{:?}", r.violations);
        assert_eq!(r.violations[0].place, "journal of slot 1");
    });
    raw("slot", |i| layout(i).cluster().slot_block(1) + 20, "slot 1");
    raw("group lock", |i| layout(i).cluster().lock_block(LockId::Group(0)).unwrap() + 20, "lock block of group 0");
    raw("domain lock", |i| layout(i).cluster().lock_block(LockId::Domain(BOX)).unwrap() + 20, "lock block of domain 4");
    raw("domain header", |i| i.header_block(BOX) * 4096 + 70, "domain 4, header in block");
    raw("tree node", |i| i.first_node() * 4096 + 4000, "tree of domain 1: checksum");
}

#[test]
fn unreadable_contents_are_named_if_asked_for() {
    run(async {
        let image = Image::healthy();
        let disk = image.render().await;
        let (bad, _) = image.file_extent;
        disk.fail_reads((bad + 1) * 4096..(bad + 2) * 4096);
        let dev: Arc<dyn BlockDevice> = disk.open("fsck");
        assert!(check(&dev, None).await.unwrap().is_clean());
        let r = check_with(&dev, Options { read_contents: true }, None).await.unwrap();
        assert_eq!(r.violations.len(), 1, "{:?}", r.violations);
        assert_eq!(r.violations[0].place, format!("block {}", bad + 1));
    });
}

#[test]
fn a_truncated_volume_is_named() {
    run(async {
        let disk = Image::healthy().render().await;
        let half = disk.geometry().size / 2;
        let short = SimDisk::new(SimConfig::new(half, 1));
        short.write_raw(0, &disk.read_raw(0, half as usize));
        let dev: Arc<dyn BlockDevice> = short.open_raw();
        let r = check(&dev, None).await.unwrap();
        assert!(r.violations[0].text.contains("truncated"), "{:?}", r.violations);
    });
}

#[test]
fn a_mounted_volume_is_refused_and_a_dead_node_is_not() {
    run(async {
        let mut image = Image::healthy();
        image.slot_state = SlotState::Live;
        let disk = image.render().await;
        let dev: Arc<dyn BlockDevice> = disk.open_raw();
        let owner = disk.open("mail1");
        owner.register(blockdev::FenceKey { slot: 0, incarnation: 1 }).await.unwrap();
        let e = check(&dev, None).await.unwrap_err();
        assert_eq!(e.to_string(), "the volume is mounted by mail1 (slot 0): unmount it there first");
        owner.unregister().await.unwrap();
        let r = check(&dev, None).await.unwrap();
        assert!(r.notes.iter().any(|n| n.contains("node 0.1 on mail1")), "{:?}", r.notes);
    });
}

/// A node died with a change in its journal that makes the volume whole.
async fn crashed(lock_held: bool) -> Report {
    let healthy = Image::healthy();
    let mut image = Image::healthy();
    image.header(BOX).inodes = 99;
    image.slot_state = SlotState::Live;
    image.lock_holder = lock_held.then_some((0, 1));
    let at = image.header_block(BOX);
    let good = healthy.render().await.read_raw(at * 4096, 4096);
    let disk = image.render().await;
    let dev: Arc<dyn BlockDevice> = disk.open_raw();
    let region = image.sb.layout().journal(0);
    let journal =
        journal::Journal::open(dev.clone(), region, cluster::NodeId { slot: 0, incarnation: 1 }).await.unwrap();
    let new = Arc::new(journal::Block::copy_of(&good));
    let change = journal::Change { block: at, lock: LockId::Domain(BOX), tenure: 1, new, old: None };
    journal.install(journal::Install { changes: vec![change], ..Default::default() });
    journal.commit().await.unwrap();
    check(&dev, None).await.unwrap()
}

#[test]
fn a_dead_nodes_journal_is_seen_as_replayed() {
    run(async {
        let r = crashed(true).await;
        assert_eq!(r.violations, []);
        assert!(r.notes.iter().any(|n| n.contains("1 records to replay, 1 blocks differ")), "{:?}", r.notes);
        // A change made under a lock that is not held any more is not replayed (I5).
        let r = crashed(false).await;
        assert!(r.violations.iter().any(|v| v.text.contains("counts 99 inodes")), "{:?}", r.violations);
    });
}

#[test]
fn a_holder_from_the_future_is_named() {
    damage("holder", |i| i.lock_holder = Some((0, 9)), &["names node 0.9"]);
    damage("slot", |i| i.lock_holder = Some((7, 1)), &["names slot 7"]);
}

#[test]
fn garbage_is_an_error_or_violations_but_never_a_panic() {
    run(async {
        let zero = SimDisk::new(SimConfig::new(1 << 20, 1));
        let dev: Arc<dyn BlockDevice> = zero.open_raw();
        assert!(matches!(check(&dev, None).await, Err(CheckError::Superblock(SuperblockError::Absent))));

        let mut rng = StdRng::seed_from_u64(7);
        let mut noise = vec![0u8; 1 << 20];
        rng.fill(&mut noise[..]);
        zero.write_raw(0, &noise);
        assert!(check(&dev, None).await.is_err());

        // Bit flips behind the superblock, in what is in use; with the checksums of tree nodes made good again, so that the
        // damage gets past them.
        let image = Image::healthy();
        let clean = image.render().await.snapshot();
        let end = (image.in_use.iter().next_back().unwrap() + 1) * 4096;
        for round in 0..150 {
            let disk = SimDisk::from_snapshot(SimConfig::new(0, 1), &clean);
            for _ in 0..rng.random_range(1..20) {
                let at = rng.random_range(4096..end);
                let n: u8 = rng.random();
                disk.write_raw(at, &[n]);
                let block = at / 4096;
                let mut b = disk.read_raw(block * 4096, 4096);
                if b[..4] == *b"CLFS" {
                    journal::block::seal(&mut b, 1, 1);
                    disk.write_raw(block * 4096, &b);
                }
            }
            let dev: Arc<dyn BlockDevice> = disk.open_raw();
            let r = check(&dev, None).await;
            assert!(r.is_ok(), "round {round}: {r:?}");
        }
    });
}
