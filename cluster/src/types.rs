//! The vocabulary of the cluster: slots, incarnations, lock ids, modes, grants.

use std::fmt;

/// Most nodes a volume can have: a lock block has room for this many.
pub const MAX_NODES: usize = 64;

/// A node's place in the volume's tables, 0 to nodes-1.
pub type Slot = u16;
/// Counts the lives of a slot; only grows (I8). 0 = never used.
pub type Incarnation = u32;
/// The sequence number of a lock when it was acquired exclusively (I5).
pub type Tenure = u64;

/// One life of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId {
    pub slot: Slot,
    pub incarnation: Incarnation,
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}.{}", self.slot, self.incarnation)
    }
}

/// What a lock block protects. The order is the global lock order: domains ascending, then groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LockId {
    Domain(u32),
    Group(u32),
}

impl fmt::Display for LockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LockId::Domain(d) => write!(f, "domain {d}"),
            LockId::Group(g) => write!(f, "group {g}"),
        }
    }
}

/// A mode in which a lock is held. `Exclusive` covers `Shared`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    Shared,
    Exclusive,
}

/// The small value a lock block carries for its holder; changed only by an exclusive holder, when it gives the lock up.
/// For a domain: `root` = block number of the domain's header block, `next_local` = the next inode number of a
/// domain that was freed (numbers are never reused, I8), `version` = number of the latest change of its tree when it was last given up
/// after one: a header below that is an older state of it. For a group, when last given up: `root` = free blocks (a hint), `version` =
/// that of its header block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LockValue {
    pub root: u64,
    pub next_local: u64,
    pub version: u64,
}

/// What a node gets with a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    pub mode: Mode,
    /// Tenure of the latest exclusive holder *before* this grant: caches made under this tenure are still valid.
    pub previous_tenure: Tenure,
    /// Tenure of the latest exclusive holder including this grant: equals `previous_tenure` for a shared grant.
    pub tenure: Tenure,
    pub value: LockValue,
    /// Another live node said, when it gave the lock up, that it has files of this domain open: what is unlinked
    /// must be kept as an orphan.
    pub open_elsewhere: bool,
    /// A holder died without giving the lock up (its journal has been replayed): look for leftovers.
    pub after_crash: bool,
}

/// How a node gives a lock up or lowers it.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    /// `None`: give it up. `Some(Shared)`: exclusive to shared.
    pub to: Option<Mode>,
    /// The new value; `None` leaves it (always so for a shared holder).
    pub value: Option<LockValue>,
    /// This node still has files of the domain open.
    pub open: bool,
    /// What crashes left behind, if the grant told of any, has been seen to.
    pub cleaned: bool,
}
