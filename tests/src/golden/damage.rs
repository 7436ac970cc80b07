//! Each kind of damage that a volume can have, done to a golden volume.

use cluster::LockId;
use fs_core::ROOT_INO;
use fs_core::format::item::{Key, Kind, ino_domain, ino_local};

use super::edit::{BLOCK, Image, add32, add64};

const B: u64 = BLOCK as u64;
/// By so many bytes a volume was to grow.
const MORE: usize = 24 << 20;

/// One kind of damage.
pub struct Case {
    pub name: &'static str,
    /// What is wrong, in a line.
    pub title: &'static str,
    /// The golden volume that it is done to.
    pub base: &'static str,
    pub make: fn(&mut Image),
}

const fn clean(name: &'static str, title: &'static str, make: fn(&mut Image)) -> Case {
    Case { name, title, base: "clean", make }
}

const fn crashed(name: &'static str, title: &'static str, make: fn(&mut Image)) -> Case {
    Case { name, title, base: "one-dead", make }
}

/// A message with contents in blocks, and one with contents in its tree.
const LARGE: &str = "node0/new/149.message,S=14453";
const OTHER: &str = "node1/new/149.message,S=14453";
const SMALL: &str = "node0/new/3.message,S=291";
const SMALL_NAME: &[u8] = b"3.message,S=291";

/// The domain of node0's mailbox.
fn mailbox(v: &Image) -> u32 {
    ino_domain(v.at("node0"))
}

fn extent(number: u64) -> Key {
    Key::new(ino_local(number), Kind::Extent, 0)
}

/// Records of a journal that count: offset in the image, oldest first.
fn records(v: &Image, slot: u16) -> Vec<u64> {
    let region = v.layout().journal(slot);
    let field = |at: u64| u64::from_le_bytes(v.bytes[at as usize..][..8].try_into().expect("8 bytes"));
    let header = [0, B].map(|c| region.offset + c).into_iter().max_by_key(|at| field(at + 24)).expect("two copies");
    let (first, life) = (field(header + 40), field(header + 16) >> 32);
    let all = (region.offset + 2 * B..region.offset + region.len).step_by(512);
    let mut found: Vec<(u64, u64)> = all
        .filter(|at| v.bytes[*at as usize..].starts_with(b"CLJR") && field(at + 16) >> 32 == life)
        .map(|at| (field(at + 24), at))
        .filter(|(n, _)| *n >= first)
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, at)| at).collect()
}

pub const CASES: &[Case] = &[
    clean("superblock", "a flipped bit in the superblock", |v| v.flip(50)),
    clean("superblock-zeroed", "the superblock is zeros", |v| v.zero(0..B)),
    clean("superblock-near-copy", "a flipped bit in the superblock's copy near the start", |v| {
        v.flip(v.layout().superblock_copies()[0] * B + 50);
    }),
    clean("superblock-copy", "a flipped bit in the superblock's copy at the end", |v| {
        v.flip(v.layout().superblock_copies()[1] * B + 50);
    }),
    clean("superblock-both", "flipped bits in the superblock and in its copies", |v| {
        v.flip(50);
        v.layout().superblock_copies().into_iter().for_each(|at| v.flip(at * B + 51));
    }),
    clean("start-of-the-device-zeroed", "the superblock and its copy near the start are zeros", |v| {
        let near = v.layout().superblock_copies()[0];
        v.zero(0..(near + 1) * B);
    }),
    clean("growth-cut-off", "the volume was to grow; its superblock was not written any more", |v| {
        v.growth_cut_off(MORE);
    }),
    clean("growth-cut-off-and-superblock", "the volume was to grow; then its superblock was lost", |v| {
        v.growth_cut_off(MORE);
        v.flip(50);
    }),
    clean("newer-version", "a format version that does not exist yet", |v| v.superblocks(|b| b[8] = 4)),
    clean("older-version", "a format version that is not read any more", |v| v.superblocks(|b| b[8] = 1)),
    clean("feature-incompatible", "an unknown incompatible feature", |v| v.superblocks(|b| b[24] = 1)),
    clean("feature-read-only", "an unknown read-only-compatible feature", |v| v.superblocks(|b| b[32] = 1)),
    clean("feature-compatible", "an unknown compatible feature", |v| v.superblocks(|b| b[16] = 1)),
    clean("truncated", "the device has lost its second half", |v| v.bytes.truncate(v.bytes.len() / 2)),
    clean("slot-block", "a flipped bit in the slot block of a node that left in order", |v| {
        v.flip(v.layout().cluster().slot_block(1) + 33);
    }),
    crashed("slot-block-of-the-dead", "a flipped bit in the slot block of the node that died", |v| {
        v.flip(v.layout().cluster().slot_block(0) + 33);
    }),
    crashed("cluster-records-zeroed", "slot blocks, heartbeats and doorbells are zeros", |v| {
        let l = v.layout();
        v.zero(l.cluster_start * B..l.locks_start * B);
    }),
    clean("heartbeat", "a flipped bit in a heartbeat", |v| v.flip(v.layout().cluster().heartbeat(0) + 20)),
    clean("doorbell", "garbage in a doorbell cell", |v| v.flip(v.layout().cluster().doorbell_cell(0, 1) + 20)),
    clean("lock-block-of-domain", "a flipped bit in the lock block of a mailbox", |v| {
        v.flip(v.lock_block(LockId::Domain(mailbox(v))) + 30);
    }),
    crashed("lock-block-of-the-dead", "a flipped bit in the lock block of the dead node's mailbox", |v| {
        v.flip(v.lock_block(LockId::Domain(mailbox(v))) + 30);
    }),
    clean("lock-block-of-group", "a flipped bit in the lock block of a group", |v| {
        v.flip(v.lock_block(LockId::Group(0)) + 30);
    }),
    clean("lock-blocks-zeroed", "all lock blocks are zeros", |v| {
        let (l, areas) = (v.layout(), v.layout().cluster());
        v.zero(l.locks_start * B..l.journals_start * B);
        let len = u64::from(areas.domain_locks.per_group) * areas.stride;
        for g in 0..l.groups {
            let at = areas.domain_locks.first + u64::from(g) * areas.domain_locks.distance;
            v.zero(at..at + len);
        }
    }),
    clean("lock-holder", "a lock block that names a life that its slot has not had", |v| {
        let at = v.lock_block(LockId::Domain(mailbox(v)));
        v.record(at, |r| {
            r[96..102].copy_from_slice(&[99, 0, 0, 0, 2, 0]);
            r[102..480].fill(0);
        });
    }),
    clean("lock-value", "a lock block that leads to a block which is no header", |v| {
        let at = v.lock_block(LockId::Domain(mailbox(v)));
        let wrong = v.leaf(mailbox(v), &Key::MIN).0;
        v.record(at, |r| r[56..64].copy_from_slice(&wrong.to_le_bytes()));
    }),
    clean("group-header", "a flipped bit in a group's header", |v| v.flip(v.layout().group_header(0) * B + 100)),
    clean("group-bitmap", "a flipped bit in a group's bitmap", |v| v.flip(v.layout().group_bitmap(0, 0) * B + 100)),
    clean("group-headers-zeroed", "headers and bitmaps of all groups are zeros", |v| {
        let l = v.layout();
        for g in 0..l.groups {
            v.zero(l.group_header(g) * B..l.group_bitmap(g, l.bitmap_blocks) * B);
        }
    }),
    clean("start-of-a-group-zeroed", "header, bitmap and lock blocks of the first group are zeros", |v| {
        let at = v.layout().group_header(0) * B;
        v.zero(at..at + v.layout().group_meta() * B);
    }),
    clean("blocks-leaked", "blocks marked as in use that nothing refers to", |v| {
        let map = v.layout().group_bitmap(0, 0);
        v.block(map, |b| {
            let i = b[64..].iter().position(|x| *x == 0).expect("free blocks");
            b[64 + i] = 0x7e;
        });
    }),
    clean("blocks-wrongly-free", "blocks in use that are marked as free", |v| {
        let map = v.layout().group_bitmap(0, 0);
        v.block(map, |b| b[64 + 2] = 0);
    }),
    clean("domain-header", "a flipped bit in a domain's header", |v| v.flip(v.header(mailbox(v)) * B + 70)),
    clean("domain-counts", "wrong counts in a domain's header", |v| {
        let d = mailbox(v);
        v.count_in_header(d, 72, 5);
        v.count_in_header(d, 88, -1);
    }),
    clean("tree-inner", "a flipped bit in an inner node", |v| {
        let path = v.path(mailbox(v), &Key::MIN);
        assert!(path.len() > 1, "the tree has an inner node");
        v.flip(path[0].0 * B + 4000);
    }),
    clean("tree-leaf", "a flipped bit in a leaf", |v| {
        let key = Key::new(ino_local(v.at(SMALL)), Kind::Inode, 0);
        v.flip(v.leaf(mailbox(v), &key).0 * B + 4000);
    }),
    clean("tree-root-directory", "a flipped bit in the root directory's leaf", |v| {
        v.flip(v.leaf(1, &Key::new(1, Kind::Inode, 0)).0 * B + 4000);
    }),
    clean("tree-order", "two items of a leaf in the wrong order", |v| {
        let leaf = v.leaf(mailbox(v), &Key::MIN);
        v.block(leaf.0, |b| {
            b.swap(72, 74);
            b.swap(73, 75);
        });
    }),
    clean("stale-leaf", "a leaf of a mailbox as it was before a message came", |v| {
        let small = v.at(SMALL);
        let key = Key::new(ino_local(small), Kind::Inode, 0);
        let leaf = v.leaf(mailbox(v), &key);
        v.remove(mailbox(v), &key);
        v.older(leaf.0, 3);
    }),
    clean("stale-inner", "an inner node that is older than the leaves below it", |v| {
        let path = v.path(mailbox(v), &Key::MIN);
        assert!(path.len() > 1, "the tree has an inner node");
        v.older(path[0].0, 3);
    }),
    clean("stale-domain-header", "a domain's header that is older than its tree", |v| {
        let header = v.header(mailbox(v));
        v.block(header, |b| add64(b, 128, -3));
    }),
    clean("stale-bitmap", "a group's bitmap as it was before a file was made", |v| {
        let map = v.layout().group_bitmap(0, 0);
        v.block(map, |b| b[64 + 2] = 0);
        v.older(map, 1);
    }),
    clean("misdirected-write", "a leaf of one mailbox lies in the place of another's", |v| {
        let (from, to) = (v.leaf(mailbox(v), &Key::MIN), v.leaf(ino_domain(v.at("node1")), &Key::MIN));
        v.bytes.copy_within(from.0 as usize * BLOCK..(from.0 as usize + 1) * BLOCK, to.0 as usize * BLOCK);
    }),
    clean("blocks-of-two-files", "two files have the same blocks", |v| {
        let (large, other) = (v.at(LARGE), v.at(OTHER));
        let value = v.value(ino_domain(other), &extent(other));
        v.set(ino_domain(large), &extent(large), &value);
    }),
    clean("blocks-outside", "a file's blocks lie in the journals", |v| {
        let large = v.at(LARGE);
        let mut value = v.value(ino_domain(large), &extent(large));
        value[..8].copy_from_slice(&v.layout().journals_start.to_le_bytes());
        v.set(ino_domain(large), &extent(large), &value);
    }),
    clean("link-count", "an inode with a wrong number of links", |v| {
        let small = v.at(SMALL);
        v.inode(small, |i| add32(i, 12, 2));
    }),
    clean("inode-mode", "an inode of no file type", |v| {
        let small = v.at(SMALL);
        v.inode(small, |i| i[1] &= 0x0f);
    }),
    clean("orphan-missing", "an inode without links that is no orphan", |v| {
        let (small, new) = (v.at(SMALL), v.at("node0/new"));
        v.remove_name(new, SMALL_NAME);
        v.inode(small, |i| add32(i, 12, -1));
    }),
    clean("orphan-with-links", "an orphan that has a name", |v| {
        let small = v.at(SMALL);
        v.add(ino_domain(small), &Key::new(0, Kind::Orphan, ino_local(small)), &[]);
        v.count_in_header(ino_domain(small), 112, 1);
    }),
    clean("name-without-inode", "a name that leads nowhere", |v| {
        let new = v.at("node0/new");
        v.add_name(new, b"gone", new + 1_000_000, 8);
    }),
    clean("inode-without-name", "a file that no name leads to", |v| {
        let new = v.at("node0/new");
        v.remove_name(new, SMALL_NAME);
    }),
    clean("inode-lost", "a name and contents whose inode is gone", |v| {
        let small = v.at(SMALL);
        v.remove(ino_domain(small), &Key::new(ino_local(small), Kind::Inode, 0));
        v.count_in_header(ino_domain(small), 72, -1);
    }),
    clean("name-twice", "two directories lead to one", |v| v.add_name(ROOT_INO, b"again", v.at("node0"), 4)),
    clean("name-of-wrong-type", "a name that says another file type than its inode", |v| {
        let (key, mut value) = v.entry(v.at("node0/new"), SMALL_NAME);
        value[8] = 10;
        v.set(mailbox(v), &key, &value);
    }),
    clean("directory-loop", "a directory that lies in itself", |v| {
        let (top, tmp) = (v.at("node0"), v.at("node0/tmp"));
        v.remove_name(ROOT_INO, b"node0");
        v.add_name(tmp, b"loop", top, 4);
        v.inode(top, |i| i[88..96].copy_from_slice(&tmp.to_le_bytes()));
    }),
    crashed("journal-head", "both copies of the dead node's journal header are damaged", |v| {
        let at = v.layout().journal(0).offset;
        v.flip(at + 20);
        v.flip(at + B + 20);
    }),
    crashed("journal-head-once", "one copy of the dead node's journal header is damaged", |v| {
        v.flip(v.layout().journal(0).offset + 20);
    }),
    crashed("journal-middle", "a flipped bit in a record in the middle of the dead node's journal", |v| {
        let all = records(v, 0);
        v.flip(all[all.len() / 2] + 100);
    }),
    crashed("journal-end", "a flipped bit in the last record of the dead node's journal", |v| {
        let all = records(v, 0);
        v.flip(all[all.len() - 1] + 100);
    }),
    clean("journal-of-nobody", "a journal whose nodes have all left in order has no header", |v| {
        let at = v.layout().journal(2).offset;
        v.zero(at..at + 2 * B);
    }),
    clean("a-megabyte-zeroed", "the first megabyte of a group's contents is zeros", |v| {
        let at = v.layout().group_extent(0).start * B;
        v.zero(at..at + (1 << 20));
    }),
];
