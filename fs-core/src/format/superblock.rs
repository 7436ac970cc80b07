//! The superblock: block 0, and copies in block 7 and in the last block of the volume.
//!
//! All of it lies in one sector, so that a change of the volume's size happens at once or not. The copies are written before it: what
//! they say is true whenever it can be read. Of two that differ the one with the higher generation is the newer.
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 0   | 8  | magic `CLUSTRFS` |
//! | 8   | 4  | format version, 3 |
//! | 12  | 4  | zero |
//! | 16  | 8  | compatible features: an older program may ignore unknown bits |
//! | 24  | 8  | incompatible features: an older program must refuse unknown bits |
//! | 32  | 8  | read-only-compatible features: an older program may only read |
//! | 40  | 16 | UUID |
//! | 56  | 64 | label, UTF-8, zero padded |
//! | 120 | 8  | blocks in the volume |
//! | 128 | 4  | logical sector size (512 or 4096), distance of the cluster's records |
//! | 132 | 2  | nodes |
//! | 134 | 2  | bitmap blocks per group |
//! | 136 | 8  | blocks per journal |
//! | 144 | 4  | groups |
//! | 148 | 4  | domains per group |
//! | 152 | 4  | blocks per group |
//! | 156 | 20 | timeouts in ms: heartbeat, lease, queue, minimum hold, doorbell (u32 each) |
//! | 176 | 32 | key of the hints |
//! | 208 | 8  | time of creation, seconds since 1970 |
//! | 216 | 8  | generation: +1 whenever the volume grows |
//! | 224 | 4  | most groups that the volume can grow to |
//! | 228 | 12 | zero |
//! | 240 | 32 | blake3 of bytes 0..240 |

use blockdev::{BlockDevice, IoClass};
use cluster::{MAX_NODES, Timeouts};

use super::bytes::{FormatError, Reader, Writer};
use super::layout::{BLOCK, NEAR_COPY, VolumeLayout};

pub const MAGIC: [u8; 8] = *b"CLUSTRFS";
/// 1 had no versions in pointers to tree nodes and in group headers; in 2 everything's place depended on the volume's size.
pub const VERSION: u32 = 3;
/// Incompatible feature: slot and lock blocks are changed without compare-and-write, by way of bids and cells.
pub const PLAIN_LOCKS: u64 = 1;
/// Incompatible features this program knows.
pub const INCOMPAT_KNOWN: u64 = PLAIN_LOCKS;
/// Read-only-compatible features this program knows.
pub const RO_COMPAT_KNOWN: u64 = 0;
const SUMMED: usize = 240;
/// Before version 3. All that is asked of such a superblock is whether it is one.
const SUMMED_ONCE: usize = 216;
const WHAT: &str = "superblock";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub compat: u64,
    pub incompat: u64,
    pub ro_compat: u64,
    pub uuid: [u8; 16],
    /// At most 64 bytes.
    pub label: String,
    pub blocks: u64,
    pub sector_size: u32,
    pub nodes: u16,
    pub bitmap_blocks: u16,
    pub journal_blocks: u64,
    pub groups: u32,
    pub domains_per_group: u32,
    pub group_blocks: u32,
    pub timeouts: Timeouts,
    pub hint_key: [u8; 32],
    pub created: u64,
    /// Counts how often the volume grew.
    pub generation: u64,
    pub max_groups: u32,
}

/// Why a superblock cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    #[error("no clusterfs volume: make one with mkfs.clusterfs")]
    Absent,
    #[error(
        "made by a newer clusterfs (format version {version}, features {features:#x}): upgrade this host's clusterfs"
    )]
    Newer { version: u32, features: u64 },
    #[error(
        "made by an older clusterfs (format version {version}), which this one cannot read: copy its files to a new volume, with that clusterfs"
    )]
    Older { version: u32 },
    #[error("superblock damaged ({0}): run fsck.clusterfs")]
    Damaged(String),
}

/// The copy of the superblock with the highest generation that can be read, and its block: in block 7, or in the last of the device, which is
/// the volume's unless the device was enlarged since.
pub async fn newest_copy(dev: &dyn BlockDevice) -> Option<(u64, Superblock)> {
    let last = (dev.geometry().size / BLOCK).checked_sub(1)?;
    let mut best: Option<(u64, Superblock)> = None;
    for at in [NEAR_COPY, last] {
        let Ok(read) = dev.read(IoClass::Meta, at * BLOCK, BLOCK as usize).await else { continue };
        let Ok(sb) = Superblock::decode(&read) else { continue };
        // One that is elsewhere, or needs more than there is, is left over from an earlier volume.
        let its_own = sb.layout().superblock_copies().contains(&at) && sb.blocks - 1 <= last;
        if its_own && best.as_ref().is_none_or(|(_, b)| sb.generation > b.generation) {
            best = Some((at, sb));
        }
    }
    best
}

impl Superblock {
    /// First 8 bytes of the UUID: carried by every record and block.
    pub fn volume_id(&self) -> u64 {
        let mut v = [0; 8];
        v.copy_from_slice(&self.uuid[..8]);
        u64::from_le_bytes(v)
    }

    pub fn layout(&self) -> VolumeLayout {
        VolumeLayout::new(self)
    }

    /// Whether slot and lock blocks are changed without compare-and-write.
    pub fn plain_locks(&self) -> bool {
        self.incompat & PLAIN_LOCKS != 0
    }

    /// Into a zeroed block.
    pub fn encode(&self, block: &mut [u8]) {
        let mut label = [0; 64];
        let n = self.label.len().min(64);
        label[..n].copy_from_slice(&self.label.as_bytes()[..n]);
        let t = &self.timeouts;
        Writer::new(block)
            .bytes(&MAGIC)
            .u32(VERSION)
            .u32(0)
            .u64(self.compat)
            .u64(self.incompat)
            .u64(self.ro_compat)
            .bytes(&self.uuid)
            .bytes(&label)
            .u64(self.blocks)
            .u32(self.sector_size)
            .u16(self.nodes)
            .u16(self.bitmap_blocks)
            .u64(self.journal_blocks)
            .u32(self.groups)
            .u32(self.domains_per_group)
            .u32(self.group_blocks)
            .u32(t.heartbeat_ms)
            .u32(t.lease_ms)
            .u32(t.queue_ms)
            .u32(t.min_hold_ms)
            .u32(t.doorbell_ms)
            .bytes(&self.hint_key)
            .u64(self.created)
            .u64(self.generation)
            .u32(self.max_groups);
        let sum = blake3::hash(&block[..SUMMED]);
        block[SUMMED..SUMMED + 32].copy_from_slice(sum.as_bytes());
    }

    pub fn decode(block: &[u8]) -> Result<Self, SuperblockError> {
        if block.len() < SUMMED + 32 || block[..8] != MAGIC {
            return Err(SuperblockError::Absent);
        }
        let once = u32::from_le_bytes([block[8], block[9], block[10], block[11]]) < 3;
        let summed = if once { SUMMED_ONCE } else { SUMMED };
        if blake3::hash(&block[..summed]).as_bytes()[..] != block[summed..summed + 32] {
            return Err(SuperblockError::Damaged("checksum mismatch".into()));
        }
        let damaged = |e: FormatError| SuperblockError::Damaged(e.to_string());
        let mut r = Reader::new(WHAT, &block[8..]);
        let version = r.u32().map_err(damaged)?;
        let sb = Self::fields(&mut r).map_err(damaged)?;
        if version < VERSION {
            return Err(SuperblockError::Older { version });
        }
        if version != VERSION || sb.incompat & !INCOMPAT_KNOWN != 0 {
            return Err(SuperblockError::Newer { version, features: sb.incompat & !INCOMPAT_KNOWN });
        }
        sb.check().map_err(SuperblockError::Damaged)?;
        Ok(sb)
    }

    fn fields(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        r.u32()?;
        let (compat, incompat, ro_compat) = (r.u64()?, r.u64()?, r.u64()?);
        let uuid = r.array()?;
        let label = r.bytes(64)?;
        let end = label.iter().position(|b| *b == 0).unwrap_or(64);
        let label = String::from_utf8_lossy(&label[..end]).into_owned();
        Ok(Self {
            compat,
            incompat,
            ro_compat,
            uuid,
            label,
            blocks: r.u64()?,
            sector_size: r.u32()?,
            nodes: r.u16()?,
            bitmap_blocks: r.u16()?,
            journal_blocks: r.u64()?,
            groups: r.u32()?,
            domains_per_group: r.u32()?,
            group_blocks: r.u32()?,
            timeouts: Timeouts {
                heartbeat_ms: r.u32()?,
                lease_ms: r.u32()?,
                queue_ms: r.u32()?,
                min_hold_ms: r.u32()?,
                doorbell_ms: r.u32()?,
            },
            hint_key: r.array()?,
            created: r.u64()?,
            generation: r.u64()?,
            max_groups: r.u32()?,
        })
    }

    /// Numbers that make sense together, so that nothing later overflows or allocates without bound.
    fn check(&self) -> Result<(), String> {
        let ok = matches!(self.sector_size, 512 | 4096)
            && (1..=MAX_NODES as u16).contains(&self.nodes)
            && (1..=64).contains(&self.bitmap_blocks)
            && (256..=1 << 20).contains(&self.journal_blocks)
            && self.groups >= 1
            && self.groups <= self.max_groups
            && self.domains_per_group > u32::from(self.nodes) + 1
            && self.domains_per_group <= super::group::MAX_DOMAINS_PER_GROUP
            && u64::from(self.domains_per_group) * u64::from(self.max_groups) <= 1 << 24
            && self.group_blocks >= 64
            && u64::from(self.group_blocks) <= u64::from(self.bitmap_blocks) * super::group::BITS_PER_BITMAP
            && self.blocks < 1 << 52
            && self.timeouts.heartbeat_ms >= 10
            && u64::from(self.timeouts.lease_ms) >= 2 * u64::from(self.timeouts.heartbeat_ms);
        if !ok {
            return Err("its numbers contradict each other".into());
        }
        let l = self.layout();
        if l.end_block() > self.blocks {
            return Err(format!("its areas need {} blocks, the volume has {}", l.end_block(), self.blocks));
        }
        if l.groups_in(self.blocks) != self.groups {
            return Err(format!("{} groups do not fill its {} blocks", self.groups, self.blocks));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock() -> Superblock {
        Superblock {
            compat: 0,
            incompat: 0,
            ro_compat: 0,
            uuid: [1; 16],
            label: String::new(),
            blocks: 1600,
            sector_size: 512,
            nodes: 2,
            bitmap_blocks: 1,
            journal_blocks: 256,
            groups: 1,
            domains_per_group: 100,
            group_blocks: 1000,
            timeouts: Timeouts { heartbeat_ms: 1000, lease_ms: 6000, queue_ms: 1000, min_hold_ms: 1, doorbell_ms: 10 },
            hint_key: [0; 32],
            created: 0,
            generation: 0,
            max_groups: 4,
        }
    }

    #[test]
    fn timeouts_beyond_all_bounds_are_refused() {
        let mut block = [0; 4096];
        let mut sb = superblock();
        (sb.timeouts.heartbeat_ms, sb.timeouts.lease_ms) = (1 << 31, 5);
        sb.encode(&mut block);
        assert!(matches!(Superblock::decode(&block), Err(SuperblockError::Damaged(_))));
    }

    #[test]
    fn other_versions_are_refused_as_such() {
        let with = |version: u32| {
            let mut block = [0; 4096];
            superblock().encode(&mut block);
            block[8..12].copy_from_slice(&version.to_le_bytes());
            let summed = if version < 3 { SUMMED_ONCE } else { SUMMED };
            let sum = blake3::hash(&block[..summed]);
            block[summed..summed + 32].copy_from_slice(sum.as_bytes());
            Superblock::decode(&block)
        };
        assert_eq!(with(3), Ok(superblock()));
        assert_eq!(with(2), Err(SuperblockError::Older { version: 2 }));
        assert_eq!(with(1), Err(SuperblockError::Older { version: 1 }));
        assert_eq!(with(4), Err(SuperblockError::Newer { version: 4, features: 0 }));
    }
}
