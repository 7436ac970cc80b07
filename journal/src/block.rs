//! The header that every metadata block starts with: what it is, whose it is, how new it is, and its checksum.
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 0  | 4  | magic `CLFS` |
//! | 4  | 1  | kind (1 domain header, 2 tree node, 3 group header, 4 group bitmap) |
//! | 5  | 1  | owner type (0 domain, 1 group) |
//! | 6  | 2  | zero |
//! | 8  | 8  | volume id: first 8 bytes of the volume's UUID |
//! | 16 | 8  | block number, in blocks of 4096 bytes from the start of the device |
//! | 24 | 4  | owner number (domain or group) |
//! | 28 | 4  | version of a tree node or bitmap block, which what leads to it knows; of a group header: +1 per operation that changes it; zero in a domain header |
//! | 32 | 8  | tenure of the owner's lock under which the block last changed |
//! | 40 | 8  | journal record that last changed it; (tenure, record) only grows while the owner stays the same (I5) |
//! | 48 | 16 | first 16 bytes of the blake3 hash of the whole block with this field zero |
//! | 64 | 4032 | the kind's own content |
//!
//! All integers are little endian.

use blockdev::AlignedBuf;
use cluster::{LockId, Tenure};

/// Size of every metadata block, and unit of allocation, in bytes.
pub const BLOCK_SIZE: usize = 4096;
/// Where a block's own content starts.
pub const HEADER_SIZE: usize = 64;
const MAGIC: [u8; 4] = *b"CLFS";
const VERSION: std::ops::Range<usize> = 28..32;
const SUM: std::ops::Range<usize> = 48..64;

/// A metadata block in memory: always BLOCK_SIZE bytes.
pub type Block = AlignedBuf;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    DomainHeader,
    TreeNode,
    GroupHeader,
    GroupBitmap,
}

impl BlockKind {
    fn code(self) -> u8 {
        match self {
            Self::DomainHeader => 1,
            Self::TreeNode => 2,
            Self::GroupHeader => 3,
            Self::GroupBitmap => 4,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::DomainHeader,
            2 => Self::TreeNode,
            3 => Self::GroupHeader,
            4 => Self::GroupBitmap,
            _ => return None,
        })
    }
}

/// The decoded header, checksum apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    pub kind: BlockKind,
    pub owner: LockId,
    pub volume: u64,
    pub block: u64,
    /// What leads to the block says the same of it, or one of the two is of an older state (see [`check_version`]).
    pub version: u32,
    pub tenure: Tenure,
    pub record: u64,
}

/// Why a block on disk is not what was expected there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    #[error("not a metadata block of clusterfs")]
    Magic,
    #[error("checksum mismatch")]
    Checksum,
    #[error("belongs to another volume")]
    Volume,
    #[error("claims to be block {0}")]
    Place(u64),
    #[error("belongs to {0}")]
    Owner(LockId),
    #[error("is of the wrong kind ({0:?})")]
    Kind(BlockKind),
    #[error("has version {found}, what leads to it says {expected}: a write of one of them was lost")]
    Version { expected: u32, found: u32 },
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    let mut v = [0; 8];
    v.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(v)
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    let mut v = [0; 4];
    v.copy_from_slice(&b[at..at + 4]);
    u32::from_le_bytes(v)
}

/// The version in a block's header.
pub fn version(block: &[u8]) -> u32 {
    u32_at(block, VERSION.start)
}

pub fn set_version(block: &mut [u8], version: u32) {
    block[VERSION].copy_from_slice(&version.to_le_bytes());
}

/// Whether a block is of the state that what leads to it knows.
pub fn check_version(block: &[u8], expected: u32) -> Result<(), BlockError> {
    match version(block) {
        found if found == expected => Ok(()),
        found => Err(BlockError::Version { expected, found }),
    }
}

/// The blake3 checksum a block should carry.
pub fn checksum(block: &[u8]) -> [u8; 16] {
    let mut h = blake3::Hasher::new();
    h.update(&block[..SUM.start]);
    h.update(&[0; 16]);
    h.update(&block[SUM.end..]);
    let mut sum = [0; 16];
    sum.copy_from_slice(&h.finalize().as_bytes()[..16]);
    sum
}

impl BlockHeader {
    /// Writes the header; the checksum is written by [`seal`].
    pub fn encode(&self, block: &mut [u8]) {
        let (owner_type, owner) = match self.owner {
            LockId::Domain(d) => (0, d),
            LockId::Group(g) => (1, g),
        };
        block[..HEADER_SIZE].fill(0);
        block[..4].copy_from_slice(&MAGIC);
        block[4] = self.kind.code();
        block[5] = owner_type;
        block[8..16].copy_from_slice(&self.volume.to_le_bytes());
        block[16..24].copy_from_slice(&self.block.to_le_bytes());
        block[24..28].copy_from_slice(&owner.to_le_bytes());
        block[VERSION].copy_from_slice(&self.version.to_le_bytes());
        block[32..40].copy_from_slice(&self.tenure.to_le_bytes());
        block[40..48].copy_from_slice(&self.record.to_le_bytes());
    }

    /// Reads the header without verifying the checksum.
    pub fn decode(block: &[u8]) -> Result<Self, BlockError> {
        if block.len() != BLOCK_SIZE || block[..4] != MAGIC {
            return Err(BlockError::Magic);
        }
        let kind = BlockKind::from_code(block[4]).ok_or(BlockError::Magic)?;
        let owner = match block[5] {
            0 => LockId::Domain(u32_at(block, 24)),
            1 => LockId::Group(u32_at(block, 24)),
            _ => return Err(BlockError::Magic),
        };
        Ok(Self {
            kind,
            owner,
            volume: u64_at(block, 8),
            block: u64_at(block, 16),
            version: version(block),
            tenure: u64_at(block, 32),
            record: u64_at(block, 40),
        })
    }
}

/// Stamps tenure, record number and checksum into a block whose header was encoded before.
pub fn seal(block: &mut [u8], tenure: Tenure, record: u64) {
    block[32..40].copy_from_slice(&tenure.to_le_bytes());
    block[40..48].copy_from_slice(&record.to_le_bytes());
    let sum = checksum(block);
    block[SUM].copy_from_slice(&sum);
}

/// Verifies a block read from disk: checksum, volume, place and owner. Never believe a block that fails this.
pub fn verify(block: &[u8], volume: u64, number: u64, owner: LockId) -> Result<BlockHeader, BlockError> {
    let h = BlockHeader::decode(block)?;
    if block[SUM] != checksum(block) {
        return Err(BlockError::Checksum);
    }
    if h.volume != volume {
        return Err(BlockError::Volume);
    }
    if h.block != number {
        return Err(BlockError::Place(h.block));
    }
    if h.owner != owner {
        return Err(BlockError::Owner(h.owner));
    }
    Ok(h)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trip_and_damage_is_seen() {
        let mut b = Block::zeroed(BLOCK_SIZE);
        let h = BlockHeader {
            kind: BlockKind::TreeNode,
            owner: LockId::Domain(7),
            volume: 0x1122_3344_5566_7788,
            block: 99,
            version: 0x0304_0506,
            tenure: 0,
            record: 0,
        };
        h.encode(&mut b);
        b[100] = 42;
        seal(&mut b, 5, 6);
        let got = verify(&b, h.volume, 99, h.owner).expect("sealed block verifies");
        assert_eq!((got.tenure, got.record, got.version), (5, 6, 0x0304_0506));
        assert_eq!(b[28..32], [6, 5, 4, 3]);
        assert_eq!(check_version(&b, h.version), Ok(()));
        assert_eq!(check_version(&b, 7), Err(BlockError::Version { expected: 7, found: h.version }));
        assert_eq!(verify(&b, 1, 99, h.owner), Err(BlockError::Volume));
        assert_eq!(verify(&b, h.volume, 98, h.owner), Err(BlockError::Place(99)));
        assert_eq!(verify(&b, h.volume, 99, LockId::Group(7)), Err(BlockError::Owner(LockId::Domain(7))));
        b[4095] ^= 1;
        assert_eq!(verify(&b, h.volume, 99, h.owner), Err(BlockError::Checksum));
    }
}
