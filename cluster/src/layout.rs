//! Where the cluster's sectors lie on the device; filled in from the superblock.

use crate::plain::ROWS;
use crate::{LockId, Slot};

/// Byte offsets of the cluster areas. Every record is one logical sector; records are `stride` bytes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Identifies the volume (first 8 bytes of its UUID, little endian): every record carries it.
    pub volume: u64,
    /// Logical sector size in bytes, 512 or 4096.
    pub stride: u64,
    pub nodes: u16,
    /// `nodes` slot blocks (compare-and-write only, I10).
    pub slots: u64,
    /// `nodes` heartbeat sectors (plain writes by the owner).
    pub heartbeats: u64,
    /// `nodes` rows of `nodes` cells: row = receiver, cell = sender (plain writes by the sender).
    pub doorbells: u64,
    /// Lock blocks of as many groups as the volume may ever have (compare-and-write only, I10).
    pub locks: u64,
    pub groups: u32,
    pub domain_locks: DomainLocks,
    /// Volumes that are locked without compare-and-write: `nodes` bids, then [`ROWS`] rows of `nodes` cells (plain writes by
    /// the slot's node, see [`crate::plain`]).
    pub plain: Option<u64>,
}

/// Where the lock blocks of domains lie: a run of them in each group (compare-and-write only, I10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainLocks {
    /// That of domain 0.
    pub first: u64,
    pub per_group: u32,
    /// From one group's to the next's.
    pub distance: u64,
}

/// Records that locking without compare-and-write takes.
pub fn plain_records(nodes: u16) -> u64 {
    u64::from(nodes) * (1 + ROWS)
}

impl Layout {
    pub fn slot_block(&self, slot: Slot) -> u64 {
        self.slots + u64::from(slot) * self.stride
    }

    pub fn heartbeat(&self, slot: Slot) -> u64 {
        self.heartbeats + u64::from(slot) * self.stride
    }

    /// Start of the doorbell row that `receiver` polls.
    pub fn doorbell_row(&self, receiver: Slot) -> u64 {
        self.doorbells + u64::from(receiver) * u64::from(self.nodes) * self.stride
    }

    pub fn doorbell_cell(&self, receiver: Slot, sender: Slot) -> u64 {
        self.doorbell_row(receiver) + u64::from(sender) * self.stride
    }

    /// Byte offset of a lock block; `None` if the volume has no such lock.
    pub fn lock_block(&self, id: LockId) -> Option<u64> {
        match id {
            LockId::Group(g) if g < self.groups => Some(self.locks + u64::from(g) * self.stride),
            LockId::Domain(d) if d < self.domains() => {
                let l = &self.domain_locks;
                let (group, index) = (u64::from(d / l.per_group), u64::from(d % l.per_group));
                Some(l.first + group * l.distance + index * self.stride)
            }
            _ => None,
        }
    }

    /// As many domains as the volume may ever have.
    pub fn domains(&self) -> u32 {
        self.groups.saturating_mul(self.domain_locks.per_group)
    }

    /// The lock whose block a byte belongs to.
    pub fn lock_at(&self, offset: u64) -> Option<LockId> {
        let index = |from: u64| Some(offset.checked_sub(from)? / self.stride);
        if let Some(g) = index(self.locks).filter(|g| *g < u64::from(self.groups)) {
            return u32::try_from(g).ok().map(LockId::Group);
        }
        let l = &self.domain_locks;
        let behind = offset.checked_sub(l.first)?;
        let (group, index) = (behind / l.distance.max(1), behind % l.distance.max(1) / self.stride);
        let group = u32::try_from(group).ok().filter(|g| *g < self.groups)?;
        let index = u32::try_from(index).ok().filter(|i| *i < l.per_group)?;
        Some(LockId::Domain(group * l.per_group + index))
    }
}
