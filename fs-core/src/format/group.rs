//! Allocation groups: a header block and bitmap blocks at the start of each group.
//!
//! Content of a group header, from byte 64 of the block:
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 0  | 8  | free blocks |
//! | 8  | 4  | free domain numbers |
//! | 12 | 4  | versions of the written bitmap blocks, added up modulo 2^32: a change of a bitmap block adds 1 to its version |
//! | 16 | 8  | bit i: bitmap block i has been written; an unwritten one means all free |
//! | 24 | 4  | blocks that the group counts: all that it manages, or fewer if the volume grew since the header last changed; the rest is free |
//! | 28 | 4  | zero |
//! | 32 | 4000 | domain bitmap: bit i = domain number (first of the group + i) is in use |
//!
//! A bitmap block has bit i of its content (from byte 64) set for a block in use; block (index x BITS_PER_BITMAP + i) of the group.

use cluster::LockId;
use journal::Block;
use journal::block::{BLOCK_SIZE, BlockError, BlockHeader, BlockKind, seal};

use super::bytes::{FormatError, Reader, Writer};
use super::layout::VolumeLayout;

/// Bits in the 4032 content bytes of a bitmap block.
pub const BITS_PER_BITMAP: u64 = 4032 * 8;
/// Most domain numbers a group can hand out.
pub const MAX_DOMAINS_PER_GROUP: u32 = 4000 * 8;
/// Where the domain bitmap starts in the block.
pub const DOMAIN_BITMAP: std::ops::Range<usize> = 96..4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupHeader {
    pub free_blocks: u64,
    pub free_domains: u32,
    pub written_bitmaps: u64,
    pub bitmap_versions: u32,
    /// What `free_blocks` and the bitmaps speak of.
    pub blocks: u32,
}

/// Whether the version of a group's header block is at least the one that its lock block says.
pub fn check_age(found: u32, least: u64) -> Result<(), BlockError> {
    let expected = least as u32;
    // They may have begun anew at 0 since.
    if (found.wrapping_sub(expected) as i32) < 0 {
        return Err(BlockError::Version { expected, found });
    }
    Ok(())
}

impl GroupHeader {
    /// As it counts once its group has so many blocks, because the volume grew.
    pub fn grown_to(self, blocks: u64) -> Self {
        let more = blocks.saturating_sub(self.blocks.into());
        Self { free_blocks: self.free_blocks + more, blocks: self.blocks + more as u32, ..self }
    }

    pub fn encode(&self, block: &mut [u8]) {
        Writer::new(&mut block[64..])
            .u64(self.free_blocks)
            .u32(self.free_domains)
            .u32(self.bitmap_versions)
            .u64(self.written_bitmaps)
            .u32(self.blocks);
    }

    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new("group header", block.get(64..).unwrap_or(&[]));
        let free_blocks = r.u64()?;
        let free_domains = r.u32()?;
        let bitmap_versions = r.u32()?;
        Ok(Self { free_blocks, free_domains, written_bitmaps: r.u64()?, bitmap_versions, blocks: r.u32()? })
    }

    /// Whether the written bitmap blocks are of the state that the header knows; `found` are their versions.
    pub fn check_versions(&self, found: impl Iterator<Item = u32>) -> Result<(), String> {
        match found.fold(0, u32::wrapping_add) {
            sum if sum == self.bitmap_versions => Ok(()),
            sum => Err(format!(
                "the versions of its bitmaps add up to {sum}, its header says {}: a write of one of them was lost",
                self.bitmap_versions
            )),
        }
    }
}

/// The header of a group of which nothing is in use, sealed.
pub fn fresh_header(layout: &VolumeLayout, group: u32) -> Block {
    let (place, owner) = (layout.group_header(group), LockId::Group(group));
    let mut b = Block::zeroed(BLOCK_SIZE);
    let kind = BlockKind::GroupHeader;
    BlockHeader { kind, owner, volume: layout.volume, block: place, version: 0, tenure: 0, record: 0 }.encode(&mut b);
    // Numbers that the group does not have count as in use.
    b[DOMAIN_BITMAP].fill(0xff);
    for d in 0..layout.domains_per_group {
        set_bit(&mut b[DOMAIN_BITMAP], d as usize, false);
    }
    let blocks = layout.group_extent(group).len;
    GroupHeader {
        free_blocks: blocks,
        free_domains: layout.domains_per_group,
        written_bitmaps: 0,
        bitmap_versions: 0,
        blocks: blocks as u32,
    }
    .encode(&mut b);
    seal(&mut b, 0, 0);
    b
}

/// Tests bit `i` of a bitmap; beyond the end counts as set.
pub fn bit(map: &[u8], i: usize) -> bool {
    map.get(i / 8).is_none_or(|b| b & (1 << (i % 8)) != 0)
}

/// Sets or clears bit `i`.
pub fn set_bit(map: &mut [u8], i: usize, on: bool) {
    if let Some(b) = map.get_mut(i / 8) {
        if on { *b |= 1 << (i % 8) } else { *b &= !(1 << (i % 8)) }
    }
}
