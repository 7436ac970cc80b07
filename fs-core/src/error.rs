//! What can go wrong in a volume, and where.

use blockdev::DevError;
use cluster::{ClusterError, LockId};
use journal::JournalError;
use journal::block::BlockError;

use crate::format::FormatError;

#[derive(Debug, Clone, thiserror::Error)]
pub enum FsError {
    #[error("no such file or directory")]
    NotFound,
    #[error("file exists")]
    Exists,
    #[error("not a directory")]
    NotDir,
    #[error("is a directory")]
    IsDir,
    #[error("directory not empty")]
    NotEmpty,
    #[error("no space left on the volume")]
    NoSpace,
    #[error("file name too long")]
    NameTooLong,
    #[error("invalid argument")]
    Invalid,
    #[error("file too large")]
    TooBig,
    #[error("too many links")]
    TooManyLinks,
    #[error("no such attribute")]
    NoAttr,
    #[error("result too large for the buffer")]
    Range,
    #[error("operation not permitted")]
    NotPermitted,
    #[error("permission denied")]
    Access,
    #[error("read-only volume")]
    ReadOnly,
    #[error("operation not supported")]
    NotSupported,
    #[error("no data or hole beyond this offset")]
    NoSuchOffset,
    /// Another owner's lock is in the way.
    #[error("locked by another process")]
    Locked,
    #[error("waiting for the lock would never end")]
    Deadlock,
    /// The caller gave up waiting; nothing was done.
    #[error("interrupted")]
    Interrupted,
    /// The inode is gone.
    #[error("stale inode")]
    Stale,
    /// Not an error of the caller's: a directory is made with another domain number.
    #[error("the domain number is being used")]
    DomainBusy,
    #[error(transparent)]
    Device(#[from] DevError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("block {block} of {owner}: {why}: run fsck.clusterfs")]
    Block { block: u64, owner: LockId, why: BlockError },
    #[error("{owner}: {why}: run fsck.clusterfs")]
    Damaged { owner: LockId, why: String },
    /// Not an error of the caller's: the operation must start over with this domain admitted too.
    #[error("needs domain {0} too")]
    NeedDomain(u32),
    /// Not an error of the caller's: the operation must start over once this node holds the group.
    #[error("needs group {0}")]
    NeedGroup(u32),
    /// Not an error of the caller's: no domain number is at hand.
    #[error("no domain number is free")]
    NoDomain,
    /// Not an error of the caller's: the operation must start over once more free blocks are at hand.
    #[error("needs {0} more free blocks")]
    NeedSpace(u64),
}

pub type Result<T> = std::result::Result<T, FsError>;

impl FsError {
    /// The volume is being unmounted: work in the background just ends.
    pub fn is_leaving(&self) -> bool {
        matches!(self, Self::Cluster(ClusterError::Leaving) | Self::Journal(JournalError::Closed))
    }

    pub fn damaged(owner: LockId, why: impl ToString) -> Self {
        Self::Damaged { owner, why: why.to_string() }
    }

    pub fn format(owner: LockId, e: FormatError) -> Self {
        Self::damaged(owner, e)
    }
}
