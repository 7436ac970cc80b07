//! Where everything lies on the device, derived from the superblock alone.
//!
//! In blocks from the start: superblock, its first copy in block 7, cluster records (slot blocks, heartbeats, doorbells, bids and cells;
//! rounded up), lock blocks of as many groups as the volume may ever have, journals, then the groups one after the other (the last may be
//! short), then the superblock's second copy in the very last block. A group begins with what belongs to it: header, bitmap blocks, the lock
//! blocks of its domains.
//!
//! So where a block, a lock or a domain's bit lies does not depend on how large the volume is: it can grow, and a node that has not
//! noticed yet finds everything that others put into the new part. What depends on the size is only how many groups there are and
//! how long the last one is.

use cluster::{DomainLocks, Layout, Slot};
use journal::Region;

use super::superblock::Superblock;

pub const BLOCK: u64 = 4096;

/// The domain that does not exist. Who holds its lock may change the superblock.
pub const NO_DOMAIN: u32 = 0;
/// The block of the superblock's first copy: far enough from block 0 that what other programs write to the start of a disk (partition tables,
/// labels) spares one of them.
pub const NEAR_COPY: u64 = 7;
/// First block of the cluster's records.
const CLUSTER_START: u64 = NEAR_COPY + 1;
/// A shorter last group is not worth its header.
pub const SHORTEST_GROUP: u64 = 64;

/// Domain numbers with a fixed meaning.
pub const ROOT_DOMAIN: u32 = 1;
/// Slot s has its own domain for deferred frees and the like: number FIRST_SLOT_DOMAIN + s.
pub const FIRST_SLOT_DOMAIN: u32 = 2;

pub fn slot_domain(slot: Slot) -> u32 {
    FIRST_SLOT_DOMAIN + u32::from(slot)
}

/// A contiguous run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    pub start: u64,
    pub len: u64,
}

impl Extent {
    pub fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeLayout {
    pub volume: u64,
    pub blocks: u64,
    pub nodes: u16,
    pub groups: u32,
    /// As many groups as there is room for lock blocks.
    pub max_groups: u32,
    pub domains_per_group: u32,
    pub group_blocks: u32,
    pub bitmap_blocks: u16,
    pub journal_blocks: u64,
    pub sector_size: u32,
    /// Slot and lock blocks are changed without compare-and-write.
    pub plain_locks: bool,
    /// First block of each area.
    pub cluster_start: u64,
    pub locks_start: u64,
    pub journals_start: u64,
    pub groups_start: u64,
}

fn blocks_for(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}

impl VolumeLayout {
    pub fn new(sb: &Superblock) -> Self {
        let stride = u64::from(sb.sector_size);
        let nodes = u64::from(sb.nodes);
        let plain = if sb.plain_locks() { cluster::plain_records(sb.nodes) } else { 0 };
        let cluster_records = 2 * nodes + nodes * nodes + plain;
        let locks_start = CLUSTER_START + blocks_for(cluster_records * stride);
        let journals_start = locks_start + blocks_for(u64::from(sb.max_groups) * stride);
        let groups_start = journals_start + nodes * sb.journal_blocks;
        Self {
            volume: sb.volume_id(),
            blocks: sb.blocks,
            nodes: sb.nodes,
            groups: sb.groups,
            max_groups: sb.max_groups,
            domains_per_group: sb.domains_per_group,
            group_blocks: sb.group_blocks,
            bitmap_blocks: sb.bitmap_blocks,
            journal_blocks: sb.journal_blocks,
            sector_size: sb.sector_size,
            plain_locks: sb.plain_locks(),
            cluster_start: CLUSTER_START,
            locks_start,
            journals_start,
            groups_start,
        }
    }

    /// The fewest blocks the volume must have: every area, one usable group start, and the superblock's copy.
    pub fn end_block(&self) -> u64 {
        self.group_start(self.groups - 1) + self.group_meta() + 2
    }

    /// The most blocks that it can have.
    pub fn max_blocks(&self) -> u64 {
        self.group_start(self.max_groups) + 1
    }

    /// How many groups a volume of so many blocks has.
    pub fn groups_in(&self, blocks: u64) -> u32 {
        let room = (blocks - 1).saturating_sub(self.groups_start);
        let (whole, rest) = (room / self.group_stride(), room % self.group_stride());
        let groups = whole + u64::from(rest >= self.group_meta() + SHORTEST_GROUP);
        u32::try_from(groups).unwrap_or(u32::MAX).min(self.max_groups)
    }

    /// The same volume with another size.
    pub fn with_blocks(&self, blocks: u64) -> Self {
        Self { blocks, groups: self.groups_in(blocks), ..*self }
    }

    pub fn cluster(&self) -> Layout {
        let stride = u64::from(self.sector_size);
        let slots = self.cluster_start * BLOCK;
        let nodes = u64::from(self.nodes);
        let heartbeats = slots + nodes * stride;
        let doorbells = heartbeats + nodes * stride;
        Layout {
            volume: self.volume,
            stride,
            nodes: self.nodes,
            slots,
            heartbeats,
            doorbells,
            locks: self.locks_start * BLOCK,
            groups: self.max_groups,
            domain_locks: DomainLocks {
                first: (self.groups_start + 1 + u64::from(self.bitmap_blocks)) * BLOCK,
                per_group: self.domains_per_group,
                distance: self.group_stride() * BLOCK,
            },
            plain: self.plain_locks.then_some(doorbells + nodes * nodes * stride),
        }
    }

    pub fn journal(&self, slot: u16) -> Region {
        Region {
            slot,
            offset: (self.journals_start + u64::from(slot) * self.journal_blocks) * BLOCK,
            len: self.journal_blocks * BLOCK,
            volume: self.volume,
        }
    }

    /// Blocks from the start of a group to that of the next.
    pub fn group_stride(&self) -> u64 {
        self.group_meta() + u64::from(self.group_blocks)
    }

    /// Blocks at the start of a group that it does not manage: header, bitmaps, lock blocks of its domains.
    pub fn group_meta(&self) -> u64 {
        1 + u64::from(self.bitmap_blocks) + blocks_for(u64::from(self.domains_per_group) * u64::from(self.sector_size))
    }

    fn group_start(&self, group: u32) -> u64 {
        self.groups_start + u64::from(group) * self.group_stride()
    }

    pub fn group_header(&self, group: u32) -> u64 {
        self.group_start(group)
    }

    pub fn group_bitmap(&self, group: u32, index: u16) -> u64 {
        self.group_header(group) + 1 + u64::from(index)
    }

    /// The blocks a group manages, in a volume of this size.
    pub fn group_extent(&self, group: u32) -> Extent {
        let start = self.group_start(group) + self.group_meta();
        let end = (start + u64::from(self.group_blocks)).min(self.blocks - 1);
        Extent::new(start, end.saturating_sub(start))
    }

    /// The group that manages a block, by its place alone: also one that the volume has only since it grew, unnoticed here. `None` for
    /// blocks that no group manages.
    pub fn group_of(&self, block: u64) -> Option<u32> {
        let at = block.checked_sub(self.groups_start)?;
        if at % self.group_stride() < self.group_meta() {
            return None;
        }
        u32::try_from(at / self.group_stride()).ok().filter(|g| *g < self.max_groups)
    }

    /// ... for programs that have the volume to themselves: only in a volume of this size.
    pub fn group_within(&self, block: u64) -> Option<u32> {
        self.group_of(block).filter(|g| *g < self.groups && block < self.blocks - 1)
    }

    /// Domain numbers a group hands out: [first, end). Fixed domains lie in group 0's share and are marked used by mkfs.
    pub fn group_domains(&self, group: u32) -> std::ops::Range<u32> {
        let first = group.saturating_mul(self.domains_per_group);
        first..first.saturating_add(self.domains_per_group)
    }

    /// The group whose header has the allocation bit of a domain number.
    pub fn group_of_domain(&self, domain: u32) -> u32 {
        domain / self.domains_per_group
    }

    /// Domain numbers that the volume has at this size.
    pub fn domains(&self) -> u32 {
        self.groups.saturating_mul(self.domains_per_group)
    }

    /// Domain numbers that it can have at its largest.
    pub fn max_domains(&self) -> u32 {
        self.max_groups.saturating_mul(self.domains_per_group)
    }

    /// Where the copies of the superblock are: near the start, and in the last block.
    pub fn superblock_copies(&self) -> [u64; 2] {
        [NEAR_COPY, self.blocks - 1]
    }
}
