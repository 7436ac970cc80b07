//! The domain header block: the root of a domain's tree and the domain's counters. It keeps its place for the domain's
//! life; the domain's lock block has its block number (`LockValue::root`).
//!
//! Content, from byte 64 of the block:
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 0  | 8 | block number of the tree's root node (0: empty tree) |
//! | 8  | 8 | inodes that live in the domain |
//! | 16 | 8 | next local inode number |
//! | 24 | 8 | tree nodes |
//! | 32 | 8 | next block of the reserved run for tree nodes |
//! | 40 | 4 | blocks left in it (they are marked in use in the group's bitmap) |
//! | 44 | 4 | levels of the tree (0: empty) |
//! | 48 | 8 | orphans: inodes without a name, still open somewhere |
//! | 56 | 8 | file locks that are written down |
//! | 64 | 8 | version: number of the latest change of the tree; its lower 32 bits are the version of the root node |

use cluster::Tenure;
use journal::block::BlockError;

use super::bytes::{FormatError, Reader, Writer};
use crate::tree::Root;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainHeader {
    pub root: u64,
    pub inodes: u64,
    pub next_local: u64,
    pub nodes: u64,
    pub reserve_next: u64,
    pub reserve_len: u32,
    pub levels: u32,
    pub orphans: u64,
    pub file_locks: u64,
    pub version: u64,
}

impl DomainHeader {
    /// Where the versions of a new domain begin. A domain number is used again, and blocks that were its nodes in an earlier life may
    /// be so once more: numbers of different lives, which have different tenures, are far apart.
    pub fn first_version(tenure: Tenure) -> u64 {
        (tenure as u32).wrapping_mul(0x9e37_79b9).into()
    }

    /// Whether the header is at least of the version that its lock block says.
    pub fn check_age(&self, least: u64) -> Result<(), BlockError> {
        if self.version >= least {
            return Ok(());
        }
        Err(BlockError::Version { expected: least as u32, found: self.version as u32 })
    }

    /// Version of the root node.
    pub fn root_version(&self) -> u32 {
        self.version as u32
    }

    /// The tree as the header says it is.
    pub fn tree(&self) -> Root {
        Root { block: self.root, version: self.root_version(), levels: self.levels, nodes: self.nodes }
    }

    pub fn encode(&self, block: &mut [u8]) {
        Writer::new(&mut block[64..])
            .u64(self.root)
            .u64(self.inodes)
            .u64(self.next_local)
            .u64(self.nodes)
            .u64(self.reserve_next)
            .u32(self.reserve_len)
            .u32(self.levels)
            .u64(self.orphans)
            .u64(self.file_locks)
            .u64(self.version);
    }

    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new("domain header", block.get(64..).unwrap_or(&[]));
        Ok(Self {
            root: r.u64()?,
            inodes: r.u64()?,
            next_local: r.u64()?,
            nodes: r.u64()?,
            reserve_next: r.u64()?,
            reserve_len: r.u32()?,
            levels: r.u32()?,
            orphans: r.u64()?,
            file_locks: r.u64()?,
            version: r.u64()?,
        })
    }
}
