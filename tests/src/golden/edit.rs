//! Changes single things of a volume's image, with all checksums right: by `docs/FORMAT.md`, not by the code under test.

use std::ops::Range;

use cluster::{LockId, LockValue};
use fs_core::format::group::fresh_header;
use fs_core::format::item::{Key, Kind, ino_domain, ino_local, name_cookie};
use fs_core::format::layout::VolumeLayout;
use fs_core::format::superblock::Superblock;
use journal::block::{BlockHeader, seal};

pub const BLOCK: usize = 4096;
const LEVEL: usize = 64;
const ITEMS: usize = 66;
const HEAP: usize = 68;
const GARBAGE: usize = 70;
const SLOTS: usize = 72;

/// An image and what is needed to find things in it. Generating damage of a volume that is whole may panic: a person is there.
pub struct Image {
    pub bytes: Vec<u8>,
    pub superblock: Superblock,
}

/// A tree's node: its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeAt(pub u64);

impl Image {
    pub fn new(bytes: Vec<u8>) -> Self {
        let superblock = Superblock::decode(&bytes[..BLOCK]).expect("a superblock");
        Self { bytes, superblock }
    }

    pub fn layout(&self) -> VolumeLayout {
        self.superblock.layout()
    }

    fn u16(&self, at: usize) -> usize {
        usize::from(u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]))
    }

    fn put16(&mut self, at: usize, v: usize) {
        self.bytes[at..at + 2].copy_from_slice(&(v as u16).to_le_bytes());
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    pub fn flip(&mut self, at: u64) {
        self.bytes[at as usize] ^= 0x10;
    }

    pub fn zero(&mut self, range: Range<u64>) {
        self.bytes[range.start as usize..range.end as usize].fill(0);
    }

    /// Changes a metadata block and makes its checksum right.
    pub fn block(&mut self, number: u64, change: impl FnOnce(&mut [u8])) {
        let b = &mut self.bytes[number as usize * BLOCK..][..BLOCK];
        let h = BlockHeader::decode(b).expect("a metadata block");
        change(b);
        seal(b, h.tenure, h.record);
    }

    /// Gives a block the version that it had so many changes ago.
    pub fn older(&mut self, number: u64, changes: i64) {
        self.block(number, |b| add32(b, 28, -changes));
    }

    /// Changes the superblock and its copies, and their checksums.
    pub fn superblocks(&mut self, change: impl Fn(&mut [u8])) {
        for n in std::iter::once(0).chain(self.layout().superblock_copies()) {
            let b = &mut self.bytes[n as usize * BLOCK..][..BLOCK];
            change(b);
            // Where it was before version 3.
            let summed = if b[8] < 3 { 216 } else { 240 };
            let sum = blake3::hash(&b[..summed]);
            b[summed..summed + 32].copy_from_slice(sum.as_bytes());
        }
    }

    /// What a growth that was cut off before its last write leaves: a larger device, new groups, and copies of the superblock that know of them.
    pub fn growth_cut_off(&mut self, more: usize) {
        let sb = Superblock::decode(&self.bytes[..BLOCK]).expect("a superblock");
        self.bytes.resize(self.bytes.len() + more, 0);
        let blocks = (self.bytes.len() / BLOCK) as u64;
        let layout = sb.layout().with_blocks(blocks);
        for g in sb.groups..layout.groups {
            let at = layout.group_header(g) as usize * BLOCK;
            self.bytes[at..at + BLOCK].copy_from_slice(&fresh_header(&layout, g));
            let len = layout.group_extent(g).len;
            let value = LockValue { root: len, next_local: len, version: 0 };
            let areas = layout.cluster();
            let lock = cluster::initial_lock_block(&areas, LockId::Group(g), value);
            let at = areas.lock_block(LockId::Group(g)).expect("a lock of the volume") as usize;
            self.bytes[at..at + lock.len()].copy_from_slice(&lock);
        }
        let new = Superblock { blocks, groups: layout.groups, generation: sb.generation + 1, ..sb };
        for n in layout.superblock_copies() {
            let b = &mut self.bytes[n as usize * BLOCK..][..BLOCK];
            b.fill(0);
            new.encode(b);
        }
    }

    /// Changes a record of the cluster, and its checksum.
    pub fn record(&mut self, at: u64, change: impl FnOnce(&mut [u8])) {
        let r = &mut self.bytes[at as usize..][..512];
        change(r);
        let sum = blake3::hash(&r[..496]);
        r[496..].copy_from_slice(&sum.as_bytes()[..16]);
    }

    pub fn lock_block(&self, id: cluster::LockId) -> u64 {
        self.layout().cluster().lock_block(id).expect("a lock of the volume")
    }

    /// The block of a domain's header.
    pub fn header(&self, domain: u32) -> u64 {
        self.u64(self.lock_block(cluster::LockId::Domain(domain)) as usize + 56)
    }

    /// The nodes from the root of a domain's tree to the leaf that a key belongs to.
    pub fn path(&self, domain: u32, key: &Key) -> Vec<NodeAt> {
        let header = self.header(domain) as usize * BLOCK;
        let mut at = self.u64(header + 64);
        let mut path = vec![NodeAt(at)];
        while self.u16(at as usize * BLOCK + LEVEL) > 1 {
            let node = NodeAt(at);
            let n = (0..self.count(node)).take_while(|i| self.key(node, *i) <= *key).count().max(1) - 1;
            at = self.u64(self.body(node, n) + 17);
            path.push(NodeAt(at));
        }
        path
    }

    pub fn leaf(&self, domain: u32, key: &Key) -> NodeAt {
        *self.path(domain, key).last().expect("a root")
    }

    fn count(&self, n: NodeAt) -> usize {
        self.u16(n.0 as usize * BLOCK + ITEMS)
    }

    /// Offset of an item's body in the image.
    fn body(&self, n: NodeAt, i: usize) -> usize {
        n.0 as usize * BLOCK + self.u16(n.0 as usize * BLOCK + SLOTS + 2 * i)
    }

    fn key(&self, n: NodeAt, i: usize) -> Key {
        Key::decode(&self.bytes[self.body(n, i)..][..17]).expect("17 bytes")
    }

    fn find(&self, domain: u32, key: &Key) -> (NodeAt, usize) {
        let n = self.leaf(domain, key);
        let i = (0..self.count(n)).find(|i| self.key(n, *i) == *key);
        (n, i.unwrap_or_else(|| panic!("domain {domain} has no {key:?}")))
    }

    pub fn value(&self, domain: u32, key: &Key) -> Vec<u8> {
        let (n, i) = self.find(domain, key);
        let body = self.body(n, i);
        self.bytes[body + 19..][..self.u16(body + 17)].to_vec()
    }

    /// Puts another value of the same length in an item's place.
    pub fn set(&mut self, domain: u32, key: &Key, value: &[u8]) {
        let (n, i) = self.find(domain, key);
        let body = self.body(n, i) % BLOCK;
        self.block(n.0, |b| {
            assert_eq!(usize::from(u16::from_le_bytes([b[body + 17], b[body + 18]])), value.len());
            b[body + 19..][..value.len()].copy_from_slice(value);
        });
    }

    pub fn remove(&mut self, domain: u32, key: &Key) {
        let (n, i) = self.find(domain, key);
        let at = n.0 as usize * BLOCK;
        let len = 19 + self.value(domain, key).len();
        let count = self.count(n);
        self.bytes.copy_within(at + SLOTS + 2 * (i + 1)..at + SLOTS + 2 * count, at + SLOTS + 2 * i);
        self.put16(at + SLOTS + 2 * (count - 1), 0);
        self.put16(at + ITEMS, count - 1);
        self.put16(at + GARBAGE, self.u16(at + GARBAGE) + len);
        self.block(n.0, |_| {});
    }

    /// Adds an item to a leaf that has room for it.
    pub fn add(&mut self, domain: u32, key: &Key, value: &[u8]) {
        let n = self.leaf(domain, key);
        let at = n.0 as usize * BLOCK;
        let (count, heap) = (self.count(n), self.u16(at + HEAP));
        let start =
            heap.checked_sub(19 + value.len()).filter(|s| *s >= SLOTS + 2 * (count + 1)).expect("room in the leaf");
        self.bytes[at + start..][..17].copy_from_slice(&key.encode());
        self.put16(at + start + 17, value.len());
        self.bytes[at + start + 19..][..value.len()].copy_from_slice(value);
        let i = (0..count).take_while(|i| self.key(n, *i) < *key).count();
        self.bytes.copy_within(at + SLOTS + 2 * i..at + SLOTS + 2 * count, at + SLOTS + 2 * (i + 1));
        self.put16(at + SLOTS + 2 * i, start);
        self.put16(at + ITEMS, count + 1);
        self.put16(at + HEAP, start);
        self.block(n.0, |_| {});
    }

    /// Adds to a number of a domain's header: its offset in the block, 8 bytes.
    pub fn count_in_header(&mut self, domain: u32, at: usize, by: i64) {
        let header = self.header(domain);
        self.block(header, |b| add64(b, at, by));
    }

    /// The entry of a name: its key and value.
    pub fn entry(&self, dir: u64, name: &[u8]) -> (Key, Vec<u8>) {
        let key = Key::new(ino_local(dir), Kind::Dirent, name_cookie(name));
        (key, self.value(ino_domain(dir), &key))
    }

    /// The inode that a path of names leads to.
    pub fn at(&self, path: &str) -> u64 {
        let mut ino = fs_core::ROOT_INO;
        for name in path.split('/').filter(|n| !n.is_empty()) {
            let (_, value) = self.entry(ino, name.as_bytes());
            ino = u64::from_le_bytes(value[..8].try_into().expect("8 bytes"));
        }
        ino
    }

    /// Changes an inode's 112 bytes.
    pub fn inode(&mut self, number: u64, change: impl FnOnce(&mut [u8])) {
        let key = Key::new(ino_local(number), Kind::Inode, 0);
        let mut value = self.value(ino_domain(number), &key);
        change(&mut value);
        self.set(ino_domain(number), &key, &value);
    }

    /// Adds a name to a directory, and counts it there; of a directory also as a subdirectory with its link.
    pub fn add_name(&mut self, dir: u64, name: &[u8], target: u64, file_type: u8) {
        let key = Key::new(ino_local(dir), Kind::Dirent, name_cookie(name));
        let value = [&target.to_le_bytes()[..], &[file_type], name].concat();
        self.add(ino_domain(dir), &key, &value);
        self.inode(dir, |i| count_name(i, file_type, 1));
    }

    pub fn remove_name(&mut self, dir: u64, name: &[u8]) {
        let (key, value) = self.entry(dir, name);
        self.remove(ino_domain(dir), &key);
        self.inode(dir, |i| count_name(i, value[8], -1));
    }
}

/// Size of a directory counts names; links and the field at 100 count directories.
fn count_name(inode: &mut [u8], file_type: u8, by: i64) {
    add64(inode, 16, by);
    if file_type == 4 {
        add32(inode, 12, by);
        add32(inode, 100, by);
    }
}

pub fn add64(b: &mut [u8], at: usize, by: i64) {
    let v = u64::from_le_bytes(b[at..at + 8].try_into().expect("8 bytes"));
    b[at..at + 8].copy_from_slice(&v.wrapping_add_signed(by).to_le_bytes());
}

pub fn add32(b: &mut [u8], at: usize, by: i64) {
    let v = u32::from_le_bytes(b[at..at + 4].try_into().expect("4 bytes"));
    b[at..at + 4].copy_from_slice(&v.wrapping_add_signed(by as i32).to_le_bytes());
}
