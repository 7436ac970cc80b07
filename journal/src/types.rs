//! What goes into a journal, and what can go wrong.

use std::sync::Arc;

use blockdev::{AlignedBuf, DevError};
use cluster::{LockId, Tenure};

use crate::block::Block;

/// A metadata block as an operation left it.
#[derive(Clone, Debug)]
pub struct Change {
    /// Block number on the device.
    pub block: u64,
    /// The lock that covers it, held exclusively in `tenure`.
    pub lock: LockId,
    pub tenure: Tenure,
    /// The new content, header encoded (the journal seals tenure, record number and checksum at commit).
    pub new: Arc<Block>,
    /// The content before the operation, as [`crate::Journal::get`] or the device gave it; `None` for a block just allocated,
    /// which is then logged whole.
    pub old: Option<Arc<Block>>,
}

/// File contents to write with the commit.
#[derive(Clone, Debug)]
pub struct DataWrite {
    /// First block on the device.
    pub block: u64,
    /// Whole blocks, consecutive on the device.
    pub bufs: Vec<Arc<AlignedBuf>>,
    /// The blocks were allocated in the same install, so nothing committed refers to them: they may go out together
    /// with the record, which then carries their checksum.
    pub fresh: bool,
}

/// Everything one operation did; installed atomically, durable all or nothing (I11).
#[derive(Clone, Debug, Default)]
pub struct Install {
    pub changes: Vec<Change>,
    /// Metadata blocks freed by the operation: (first block, count). Older changes to them are never replayed (I6).
    pub revokes: Vec<(u64, u64)>,
    pub data: Vec<DataWrite>,
}

/// The number of a record; only grows, also across incarnations (I8).
pub type RecordNo = u64;
/// The number of a transaction: what is installed between two commits. Only compared within one incarnation.
pub type TxNo = u64;

#[derive(Debug, Clone, thiserror::Error)]
pub enum JournalError {
    #[error(transparent)]
    Device(#[from] DevError),
    /// An earlier commit failed: nothing can be made durable any more; the volume must be unmounted.
    #[error("the journal failed earlier: {0}")]
    Failed(String),
    #[error("the volume is being unmounted")]
    Closed,
    #[error("the journal of slot {slot} is damaged at byte {offset}: {reason}")]
    Damaged { slot: u16, offset: u64, reason: String },
    #[error("an operation of {bytes} bytes is too large for the journal, which takes {limit} at once")]
    TooLarge { bytes: u64, limit: u64 },
    #[error("block {block} cannot be replayed: {reason}")]
    Replay { block: u64, reason: String },
}

pub type Result<T> = std::result::Result<T, JournalError>;

/// Where one slot's journal lies.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub slot: u16,
    /// Byte offset and length on the device; multiples of 4096; at least 1 MiB.
    pub offset: u64,
    pub len: u64,
    pub volume: u64,
}
