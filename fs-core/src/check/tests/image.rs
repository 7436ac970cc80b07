//! A volume put together by hand, so that its parts can be wrong in a chosen way while all checksums are right.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use blockdev::sim::{SimConfig, SimDisk};
use cluster::{Entry, LockBlock, LockId, LockValue, Mode, SlotState, Timeouts, initial_lock_block, initial_slot_block};
use journal::block::{BlockHeader, BlockKind, seal};
use journal::{BLOCK_SIZE, Block};

use crate::error::{FsError, Result};
use crate::format::domain::DomainHeader;
use crate::format::group::{BITS_PER_BITMAP, DOMAIN_BITMAP, GroupHeader, set_bit};
use crate::format::item::{
    Dirent, ExtentItem, FLAG_INLINE, Inode, Key, Kind, encode_xattr_piece, ino, name_cookie, xattr_offset,
};
use crate::format::superblock::Superblock;
use crate::tree::{self, NodeRead, NodeWrite, Root};
use crate::volume::ROOT_INO;

/// The mailbox's domain; 2 and 3 are the slots'.
pub const BOX: u32 = 4;
pub const BOX_FILES: u64 = 300;

pub fn run(f: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(f)
}

struct Nodes {
    owner: LockId,
    nodes: BTreeMap<u64, Arc<Block>>,
    next: u64,
}

impl NodeRead for Nodes {
    fn damaged(&self, block: u64, why: &str) -> FsError {
        FsError::damaged(self.owner, format!("{block}: {why}"))
    }
    async fn node(&self, block: u64) -> Result<Arc<Block>> {
        Ok(self.nodes[&block].clone())
    }
    async fn prefetch(&self, _: &[u64]) -> Result<()> {
        Ok(())
    }
}

impl NodeWrite for Nodes {
    fn version(&self) -> u32 {
        1
    }
    async fn node_mut(&mut self, block: u64) -> Result<&mut Block> {
        Ok(Arc::make_mut(self.nodes.get_mut(&block).unwrap()))
    }
    async fn alloc_node(&mut self) -> Result<u64> {
        self.next += 1;
        self.nodes.insert(self.next, Arc::new(block(BlockKind::TreeNode, self.owner, self.next)));
        Ok(self.next)
    }
    fn free_node(&mut self, block: u64) {
        self.nodes.remove(&block);
    }
}

const UUID: [u8; 16] = [7; 16];

fn block(kind: BlockKind, owner: LockId, number: u64) -> Block {
    let mut b = Block::zeroed(BLOCK_SIZE);
    let volume = u64::from_le_bytes([7; 8]);
    BlockHeader { kind, owner, volume, block: number, version: 0, tenure: 0, record: 0 }.encode(&mut b);
    b
}

fn put(disk: &SimDisk, number: u64, mut b: Block) {
    seal(&mut b, 0, 1);
    disk.write_raw(number * 4096, &b);
}

struct Domain {
    header_block: u64,
    header: DomainHeader,
    items: BTreeMap<Key, Vec<u8>>,
}

pub struct Image {
    pub sb: Superblock,
    domains: BTreeMap<u32, Domain>,
    /// Blocks marked in use.
    pub in_use: BTreeSet<u64>,
    next: u64,
    /// Of file 3 of the root domain: (first block, length).
    pub file_extent: (u64, u32),
    pub free_blocks_off: u64,
    pub free_domains_off: u32,
    /// What the group headers say; the bitmaps say 0.
    pub bitmap_versions: u32,
    /// Lock blocks without a header's place.
    pub no_root: Vec<u32>,
    /// Domains that the domain bitmap leaves out.
    pub hidden_domains: Vec<u32>,
    pub slot_state: SlotState,
    /// A holder of the mailbox's lock: slot, incarnation.
    pub lock_holder: Option<(u16, u32)>,
}

fn file(mode: u32, links: u32, size: u64) -> Inode {
    Inode { mode, links, size, ..Inode::default() }
}

impl Image {
    fn empty() -> Self {
        let sb = Superblock {
            compat: 0,
            incompat: 0,
            ro_compat: 0,
            uuid: UUID,
            label: "test".into(),
            blocks: 0,
            sector_size: 512,
            nodes: 2,
            bitmap_blocks: 1,
            journal_blocks: 256,
            groups: 2,
            domains_per_group: 32,
            group_blocks: 800,
            timeouts: Timeouts::default(),
            hint_key: [1; 32],
            created: 0,
            generation: 0,
            max_groups: 4,
        };
        // The second group is a short one.
        let sb = Superblock { blocks: sb.layout().group_header(1) + sb.layout().group_meta() + 300, ..sb };
        let start = sb.layout().group_extent(0).start;
        Self {
            sb,
            domains: BTreeMap::new(),
            in_use: BTreeSet::new(),
            next: start,
            file_extent: (0, 0),
            free_blocks_off: 0,
            free_domains_off: 0,
            bitmap_versions: 0,
            no_root: Vec::new(),
            hidden_domains: Vec::new(),
            slot_state: SlotState::Free,
            lock_holder: None,
        }
    }

    fn alloc(&mut self, n: u64) -> u64 {
        let at = self.next;
        self.next += n;
        self.in_use.extend(at..at + n);
        at
    }

    fn add_domain(&mut self, d: u32) {
        let header_block = self.alloc(1);
        let domain = Domain { header_block, header: DomainHeader::default(), items: BTreeMap::new() };
        self.domains.insert(d, domain);
    }

    pub fn items(&mut self, d: u32) -> &mut BTreeMap<Key, Vec<u8>> {
        &mut self.domains.get_mut(&d).unwrap().items
    }

    pub fn put(&mut self, d: u32, key: Key, value: &[u8]) {
        self.items(d).insert(key, value.to_vec());
    }

    /// As it will be written; root and levels are filled in at rendering, and nodes unless set here.
    pub fn header(&mut self, d: u32) -> &mut DomainHeader {
        &mut self.domains.get_mut(&d).unwrap().header
    }

    pub fn header_block(&self, d: u32) -> u64 {
        self.domains[&d].header_block
    }

    /// The first node of the root domain's tree.
    pub fn first_node(&self) -> u64 {
        self.next + 1
    }

    fn add_inode(&mut self, d: u32, local: u64, i: Inode) {
        self.put(d, Key::new(local, Kind::Inode, 0), &i.encode());
    }

    fn add_name(&mut self, d: u32, dir: u64, name: &str, target: u64, file_type: u8) {
        let e = Dirent { ino: target, file_type, name: name.as_bytes().to_vec() };
        self.put(d, Key::new(dir, Kind::Dirent, name_cookie(name.as_bytes())), &e.encode());
    }

    /// A root directory with a file of each kind, and a mailbox.
    pub fn healthy() -> Self {
        let mut v = Self::empty();
        v.add_domain(1);
        // Names: inline, blocks, link, pipe, box, and a second name of a message.
        let root = Inode { subdirs: 1, parent: ROOT_INO, ..file(0o040755, 3, 6) };
        v.add_inode(1, 1, root);
        v.add_inode(1, 2, Inode { flags: FLAG_INLINE, ..file(0o100644, 1, 5) });
        v.put(1, Key::new(2, Kind::Inline, 0), b"hello");
        v.put(1, Key::new(2, Kind::Xattr, xattr_offset(b"user.note")), &encode_xattr_piece(b"user.note", 1, b"x"));
        v.add_inode(1, 3, Inode { blocks: 5, ..file(0o100644, 1, 20_000) });
        v.file_extent = (v.alloc(5), 5);
        let e = |start, len| ExtentItem { start, len, unwritten: false }.encode();
        let start = v.file_extent.0;
        v.put(1, Key::new(3, Kind::Extent, 0), &e(start, 2));
        v.put(1, Key::new(3, Kind::Extent, 2), &e(start + 2, 3));
        v.add_inode(1, 4, Inode { flags: FLAG_INLINE, ..file(0o120777, 1, 6) });
        v.put(1, Key::new(4, Kind::Inline, 0), b"target");
        v.add_inode(1, 5, file(0o010644, 1, 0));
        for (name, local, t) in [("inline", 2, 8), ("blocks", 3, 8), ("link", 4, 10), ("pipe", 5, 1)] {
            v.add_name(1, 1, name, ino(1, local), t);
        }
        v.add_name(1, 1, "box", ino(BOX, 1), 4);
        v.add_name(1, 1, "message", ino(BOX, 10), 8);

        v.add_domain(BOX);
        v.add_inode(BOX, 1, Inode { subdirs: 1, parent: ROOT_INO, ..file(0o040755, 3, 1) });
        v.add_name(BOX, 1, "new", ino(BOX, 2), 4);
        v.add_inode(BOX, 2, Inode { parent: ino(BOX, 1), ..file(0o040755, 2, BOX_FILES) });
        for local in 10..10 + BOX_FILES {
            let links = if local == 10 { 2 } else { 1 };
            v.add_inode(BOX, local, Inode { flags: FLAG_INLINE, ..file(0o100600, links, 3) });
            v.put(BOX, Key::new(local, Kind::Inline, 0), b"abc");
            v.add_name(BOX, 2, &format!("m{local}"), ino(BOX, local), 8);
        }
        // Unlinked, but open somewhere.
        v.add_inode(BOX, 5, file(0o100600, 0, 0));
        v.put(BOX, Key::new(0, Kind::Orphan, 5), b"");

        v.add_domain(2);
        let freed = v.alloc(4);
        v.put(2, Key::new(0, Kind::DeferredFree, freed), &4u64.to_le_bytes());
        v.put(2, Key::new(0, Kind::Leftover, BOX.into()), b"");
        for d in [1, BOX, 2] {
            let reserve = v.alloc(3);
            let dom = v.domains.get_mut(&d).unwrap();
            let inodes = dom.items.keys().filter(|k| k.kind == Kind::Inode as u8).count() as u64;
            let orphans = dom.items.keys().filter(|k| k.kind == Kind::Orphan as u8).count() as u64;
            dom.header = DomainHeader {
                inodes,
                orphans,
                next_local: 1000,
                reserve_next: reserve,
                reserve_len: 3,
                ..DomainHeader::default()
            };
        }
        v
    }

    /// Puts the trees where the free blocks begin, and writes everything.
    pub async fn render(&self) -> Arc<SimDisk> {
        let l = self.sb.layout();
        let disk = SimDisk::new(SimConfig::new(self.sb.blocks * 4096, 1));
        let mut b = vec![0; 4096];
        self.sb.encode(&mut b);
        disk.write_raw(0, &b);
        for at in l.superblock_copies() {
            disk.write_raw(at * 4096, &b);
        }
        let c = l.cluster();
        for s in 0..self.sb.nodes {
            disk.write_raw(c.slot_block(s), &initial_slot_block(&c, s));
            let region = l.journal(s);
            disk.write_raw(region.offset, &journal::initial_header(region));
        }
        let mut slot = cluster::SlotBlock::decode(&initial_slot_block(&c, 0), c.volume, 0).unwrap();
        slot.incarnation = 1;
        slot.last_ended = u32::from(self.slot_state == SlotState::Free);
        slot.state = self.slot_state;
        slot.host_name = "mail1".into();
        disk.write_raw(c.slot_block(0), &slot.encode(c.stride));

        let mut in_use = self.in_use.clone();
        let mut next = self.next;
        for (d, dom) in &self.domains {
            let owner = LockId::Domain(*d);
            let mut nodes = Nodes { owner, nodes: BTreeMap::new(), next };
            let mut root = Root::default();
            for (k, v) in &dom.items {
                tree::insert(&mut nodes, &mut root, k, v).await.unwrap();
            }
            next = nodes.next;
            for (n, b) in &nodes.nodes {
                in_use.insert(*n);
                put(&disk, *n, (**b).clone());
            }
            let mut h = dom.header;
            (h.root, h.levels, h.version) = (root.block, root.levels, root.version.into());
            if h.nodes == 0 {
                h.nodes = root.nodes;
            }
            let mut b = block(BlockKind::DomainHeader, owner, dom.header_block);
            h.encode(&mut b);
            put(&disk, dom.header_block, b);
        }
        for g in 0..self.sb.groups {
            let id = LockId::Group(g);
            let lock = initial_lock_block(&c, id, LockValue::default());
            disk.write_raw(c.lock_block(id).unwrap(), &lock);
            self.render_group(&disk, g, &in_use);
        }
        for d in 0..BOX + 1 {
            let root = self.domains.get(&d).filter(|_| !self.no_root.contains(&d)).map_or(0, |d| d.header_block);
            let id = LockId::Domain(d);
            let mut lock = LockBlock::unheld(c.volume, id, LockValue { root, next_local: 0, version: 0 });
            if let Some((slot, incarnation)) = self.lock_holder.filter(|_| d == BOX) {
                let held = Some(Mode::Exclusive);
                lock.tenure = 1;
                lock.entries.insert(slot, Entry { incarnation, held, wanted: None, ticket: 0, open: false });
            }
            disk.write_raw(c.lock_block(id).unwrap(), &lock.encode(c.stride));
        }
        disk
    }

    fn render_group(&self, disk: &SimDisk, g: u32, in_use: &BTreeSet<u64>) {
        let l = self.sb.layout();
        let extent = l.group_extent(g);
        let mut map = block(BlockKind::GroupBitmap, LockId::Group(g), l.group_bitmap(g, 0));
        let mut used = 0;
        for b in in_use.range(extent.start..extent.end()) {
            assert!(b - extent.start < BITS_PER_BITMAP);
            set_bit(&mut map[64..], (b - extent.start) as usize, true);
            used += 1;
        }
        if used > 0 {
            put(disk, l.group_bitmap(g, 0), map);
        }
        let mut head = block(BlockKind::GroupHeader, LockId::Group(g), l.group_header(g));
        let numbers = l.group_domains(g);
        let mut free_domains = 0;
        for (i, d) in numbers.enumerate() {
            let on = d <= BOX && !self.hidden_domains.contains(&d);
            set_bit(&mut head[DOMAIN_BITMAP], i, on);
            free_domains += u32::from(!on);
        }
        let h = GroupHeader {
            free_blocks: extent.len - used + self.free_blocks_off * u64::from(g == 0),
            free_domains: free_domains + self.free_domains_off * u32::from(g == 0),
            written_bitmaps: u64::from(used > 0),
            bitmap_versions: self.bitmap_versions,
            blocks: extent.len as u32,
        };
        h.encode(&mut head);
        put(disk, l.group_header(g), head);
    }
}
