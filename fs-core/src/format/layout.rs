//! Where everything lies on the device, derived from the superblock alone.
//!
//! In blocks from the start: superblock (1), cluster records (slot blocks, heartbeats, doorbells, bids and cells; rounded up), lock
//! blocks, journals, group table (for each group: header, then its bitmap blocks), then the groups' blocks one after
//! the other (the last may be short), then the superblock's copy in the very last block.

use cluster::{Layout, Slot};
use journal::Region;

use super::superblock::Superblock;

pub const BLOCK: u64 = 4096;

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
    pub domains: u32,
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
    pub group_table_start: u64,
    pub groups_start: u64,
}

fn blocks_for(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}

impl VolumeLayout {
    pub fn new(sb: &Superblock) -> Self {
        let stride = u64::from(sb.sector_size);
        let nodes = u64::from(sb.nodes);
        let cluster_start = 1;
        let plain = if sb.plain_locks() { cluster::plain_records(sb.nodes) } else { 0 };
        let cluster_records = 2 * nodes + nodes * nodes + plain;
        let locks_start = cluster_start + blocks_for(cluster_records * stride);
        let lock_records = u64::from(sb.groups) + u64::from(sb.domains);
        let journals_start = locks_start + blocks_for(lock_records * stride);
        let group_table_start = journals_start + nodes * sb.journal_blocks;
        let groups_start = group_table_start + u64::from(sb.groups) * (1 + u64::from(sb.bitmap_blocks));
        Self {
            volume: sb.volume_id(),
            blocks: sb.blocks,
            nodes: sb.nodes,
            groups: sb.groups,
            domains: sb.domains,
            group_blocks: sb.group_blocks,
            bitmap_blocks: sb.bitmap_blocks,
            journal_blocks: sb.journal_blocks,
            sector_size: sb.sector_size,
            plain_locks: sb.plain_locks(),
            cluster_start,
            locks_start,
            journals_start,
            group_table_start,
            groups_start,
        }
    }

    /// The fewest blocks the volume must have: every area, one usable group start, and the superblock's copy.
    pub fn end_block(&self) -> u64 {
        self.groups_start + u64::from(self.groups - 1) * u64::from(self.group_blocks) + 2
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
            groups: self.groups,
            domains: self.domains,
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

    pub fn group_header(&self, group: u32) -> u64 {
        self.group_table_start + u64::from(group) * (1 + u64::from(self.bitmap_blocks))
    }

    pub fn group_bitmap(&self, group: u32, index: u16) -> u64 {
        self.group_header(group) + 1 + u64::from(index)
    }

    /// The blocks a group manages.
    pub fn group_extent(&self, group: u32) -> Extent {
        let start = self.groups_start + u64::from(group) * u64::from(self.group_blocks);
        let end = (start + u64::from(self.group_blocks)).min(self.blocks - 1);
        Extent::new(start, end.saturating_sub(start))
    }

    /// The group that manages a block; `None` for blocks outside the groups.
    pub fn group_of(&self, block: u64) -> Option<u32> {
        if block < self.groups_start || block >= self.blocks - 1 {
            return None;
        }
        let g = (block - self.groups_start) / u64::from(self.group_blocks);
        u32::try_from(g).ok().filter(|g| *g < self.groups)
    }

    /// Domain numbers a group hands out: [first, end). Fixed domains lie in group 0's share and are marked used by mkfs.
    pub fn group_domains(&self, group: u32) -> std::ops::Range<u32> {
        let per = self.domains_per_group();
        let first = (u64::from(group) * u64::from(per)).min(u64::from(self.domains)) as u32;
        let end = (u64::from(first) + u64::from(per)).min(u64::from(self.domains)) as u32;
        first..end
    }

    pub fn domains_per_group(&self) -> u32 {
        self.domains.div_ceil(self.groups)
    }

    /// The group whose header has the allocation bit of a domain number.
    pub fn group_of_domain(&self, domain: u32) -> u32 {
        domain / self.domains_per_group()
    }

    /// Size of the backup superblock's block number.
    pub fn backup_superblock(&self) -> u64 {
        self.blocks - 1
    }
}
