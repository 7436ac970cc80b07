//! One held group: what is busy in memory, and the group's blocks as installed.

use std::collections::BTreeMap;
use std::sync::Arc;

use cluster::{Grant, LockId, Tenure};
use journal::block::{BlockHeader, BlockKind, set_version, version};
use journal::{BLOCK_SIZE, Block, Change};

use super::bits::Bits;
use crate::error::{FsError, Result};
use crate::format::group::{BITS_PER_BITMAP, DOMAIN_BITMAP, GroupHeader, bit, check_age, set_bit};
use crate::format::layout::{Extent, VolumeLayout};
use crate::hold::Hold;
use crate::store::Store;

/// A group block: its number on the device, the content as installed, and the content before the current installation.
#[derive(Debug)]
struct Image {
    number: u64,
    block: Arc<Block>,
    /// `None`: not on disk yet; the first installation logs it whole.
    on_disk: bool,
    before: Option<Option<Arc<Block>>>,
}

impl Image {
    /// For the first change of an operation it becomes the next version.
    fn edit(&mut self) -> &mut Block {
        let first = self.before.is_none();
        if first {
            self.before = Some(self.on_disk.then(|| self.block.clone()));
            self.on_disk = true;
        }
        let block = Arc::make_mut(&mut self.block);
        if first {
            let next = version(block).wrapping_add(1);
            set_version(block, next);
        }
        block
    }
}

#[derive(Debug)]
pub struct Group {
    number: u32,
    volume: u64,
    hold: Arc<Hold>,
    tenure: Tenure,
    header: GroupHeader,
    header_image: Image,
    bitmaps: BTreeMap<u16, Image>,
    first_bitmap: u64,
    busy: Bits,
    free: u64,
    cursor: u64,
    domains: Bits,
}

impl Group {
    /// Reads a group that was just acquired.
    pub async fn load(
        store: &Store,
        layout: &VolumeLayout,
        number: u32,
        hold: Arc<Hold>,
        grant: &Grant,
    ) -> Result<Self> {
        let owner = LockId::Group(number);
        let header_block = layout.group_header(number);
        let block = store.read(owner, header_block, BlockKind::GroupHeader).await?;
        check_age(version(&block), grant.value.version).map_err(|why| FsError::Block {
            block: header_block,
            owner,
            why,
        })?;
        let header = GroupHeader::decode(&block).map_err(|e| FsError::format(owner, e))?;
        // One that counts more than this node knows of: the volume grew, and another node noticed first.
        let len = layout.group_extent(number).len.max(header.blocks.into());
        if len > layout.group_blocks.into() {
            let why = format!("its header counts {} blocks, no group has so many", header.blocks);
            return Err(FsError::damaged(owner, why));
        }
        let mut busy = Bits::new(len);
        let mut bitmaps = BTreeMap::new();
        for index in 0..layout.bitmap_blocks {
            if header.written_bitmaps & (1 << index) == 0 {
                continue;
            }
            let at = layout.group_bitmap(number, index);
            let map = store.read(owner, at, BlockKind::GroupBitmap).await?;
            let base = u64::from(index) * BITS_PER_BITMAP;
            for i in 0..BITS_PER_BITMAP.min(len.saturating_sub(base)) {
                if bit(&map[64..], i as usize) {
                    busy.set(base + i, true);
                }
            }
            bitmaps.insert(index, Image { number: at, block: map, on_disk: true, before: None });
        }
        header
            .check_versions(bitmaps.values().map(|b| version(&b.block)))
            .map_err(|why| FsError::damaged(owner, why))?;
        let free = busy.count_clear();
        let counted = header.grown_to(len).free_blocks;
        if counted != free {
            let why = format!("its header counts {counted} free blocks, its bitmaps {free}");
            return Err(FsError::damaged(owner, why));
        }
        let range = layout.group_domains(number);
        let mut domains = Bits::new(u64::from(range.end - range.start));
        for i in 0..domains.len() {
            domains.set(i, bit(&block[DOMAIN_BITMAP], i as usize));
        }
        Ok(Self {
            number,
            volume: layout.volume,
            hold,
            tenure: grant.tenure,
            header,
            header_image: Image { number: header_block, block, on_disk: true, before: None },
            bitmaps,
            first_bitmap: layout.group_bitmap(number, 0),
            busy,
            free,
            cursor: 0,
            domains,
        })
    }

    /// As read from a group of which nothing is used but the domains `used`.
    #[cfg(test)]
    pub fn with_domains(layout: &VolumeLayout, number: u32, tenure: Tenure, used: &[u32]) -> Self {
        let (extent, range) = (layout.group_extent(number), layout.group_domains(number));
        let mut domains = Bits::new(u64::from(range.end - range.start));
        used.iter().for_each(|d| domains.set(u64::from(d - range.start), true));
        let header = GroupHeader {
            free_blocks: extent.len,
            free_domains: domains.count_clear() as u32,
            written_bitmaps: 0,
            bitmap_versions: 0,
            blocks: extent.len as u32,
        };
        let block = Arc::new(Block::zeroed(BLOCK_SIZE));
        Self {
            number,
            volume: layout.volume,
            hold: Hold::new(LockId::Group(number)),
            tenure,
            header,
            header_image: Image { number: layout.group_header(number), block, on_disk: true, before: None },
            bitmaps: BTreeMap::new(),
            first_bitmap: layout.group_bitmap(number, 0),
            busy: Bits::new(extent.len),
            free: extent.len,
            cursor: 0,
            domains,
        }
    }

    pub fn hold(&self) -> &Arc<Hold> {
        &self.hold
    }

    pub fn tenure(&self) -> Tenure {
        self.tenure
    }

    /// Blocks that can be taken now.
    pub fn free(&self) -> u64 {
        self.free
    }

    /// Freed ones that wait for their record included.
    pub fn free_on_disk(&self) -> u64 {
        self.header.grown_to(self.busy.len()).free_blocks
    }

    /// Blocks that it manages.
    pub fn blocks(&self) -> u64 {
        self.busy.len()
    }

    /// The volume grew, and this group with it. The header follows with the next operation that changes the group.
    pub fn grow(&mut self, len: u64) {
        if len > self.busy.len() {
            self.free += len - self.busy.len();
            self.busy.grow(len);
        }
    }

    /// Of the header: each operation that changes the group counts.
    pub fn version(&self) -> u64 {
        version(&self.header_image.block).into()
    }

    /// Offsets are relative to the group's first block here and below.
    pub fn take(&mut self, want: u64, goal: Option<u64>) -> Option<Extent> {
        let at_goal = goal.filter(|g| !self.busy.get(*g)).map(|g| (g, self.busy.run(g, want)));
        let (start, len) = at_goal.or_else(|| self.busy.find(want, self.cursor))?;
        let e = Extent::new(start, len);
        self.set_busy(e, true);
        self.cursor = e.end();
        Some(e)
    }

    pub fn set_busy(&mut self, e: Extent, busy: bool) {
        for i in e.start..e.end() {
            debug_assert_ne!(self.busy.get(i), busy, "block {i} of group {} changes hands twice", self.number);
            self.busy.set(i, busy);
        }
        if busy { self.free -= e.len } else { self.free += e.len }
    }

    /// Blocks that are free from `from` on, at most `max`.
    pub fn free_run(&self, from: u64, max: u64) -> u64 {
        self.busy.run(from, max)
    }

    pub fn has_free_domain(&self) -> bool {
        self.domains.next_clear(0).is_some()
    }

    #[cfg(test)]
    pub fn is_free_domain(&self, d: u32) -> bool {
        !self.domains.get(d.into())
    }

    pub fn take_domain(&mut self) -> Option<u32> {
        let d = self.domains.next_clear(0)?;
        self.domains.set(d, true);
        Some(d as u32)
    }

    pub fn set_domain_busy(&mut self, d: u32, busy: bool) {
        self.domains.set(d.into(), busy);
    }

    /// Sets or clears the bits of an extent in the bitmap blocks.
    pub fn mark(&mut self, e: Extent, used: bool) {
        for i in e.start..e.end() {
            let index = (i / BITS_PER_BITMAP) as u16;
            let image = self.bitmaps.entry(index).or_insert_with(|| Image {
                number: self.first_bitmap + u64::from(index),
                block: Arc::new(Block::zeroed(BLOCK_SIZE)),
                on_disk: false,
                before: None,
            });
            let first = image.before.is_none();
            let map = image.edit();
            if map[0] == 0 {
                BlockHeader {
                    kind: BlockKind::GroupBitmap,
                    owner: LockId::Group(self.number),
                    volume: self.volume,
                    block: self.first_bitmap + u64::from(index),
                    version: version(map),
                    tenure: 0,
                    record: 0,
                }
                .encode(map);
            }
            if first {
                self.header.bitmap_versions = self.header.bitmap_versions.wrapping_add(1);
            }
            let at = (i % BITS_PER_BITMAP) as usize;
            debug_assert_ne!(bit(&map[64..], at), used, "bit {i} of group {} changes twice", self.number);
            set_bit(&mut map[64..], at, used);
            self.header.written_bitmaps |= 1 << index;
        }
        self.header = self.header.grown_to(self.busy.len());
        if used {
            self.header.free_blocks -= e.len
        } else {
            self.header.free_blocks += e.len
        }
        self.header.encode(self.header_image.edit());
    }

    pub fn mark_domain(&mut self, d: u32, used: bool) {
        let map = self.header_image.edit();
        set_bit(&mut map[DOMAIN_BITMAP], d as usize, used);
        if used {
            self.header.free_domains -= 1
        } else {
            self.header.free_domains += 1
        }
        self.header.encode(map);
    }

    /// The blocks changed since the last call.
    pub fn take_changes(&mut self, lock: LockId) -> Vec<Change> {
        let tenure = self.tenure;
        let images = self.bitmaps.values_mut().chain(std::iter::once(&mut self.header_image));
        images
            .filter_map(|i| {
                let old = i.before.take()?;
                Some(Change { block: i.number, lock, tenure, new: i.block.clone(), old })
            })
            .collect()
    }
}
