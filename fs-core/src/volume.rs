//! The volume: what a mount is, below FUSE.
#![allow(unused_variables, clippy::unused_async)]

use std::sync::Arc;

use blockdev::StatsSnapshot;
use cluster::NodeId;

use crate::error::{FsError, Result};
use crate::types::*;

/// A result that is valid while the node holds the domains it came from. Keep it until the reply has been given to the
/// kernel: a revocation waits for that, so that nothing stale is cached afterwards.
pub struct Leased<T> {
    pub value: T,
    /// The kernel may cache it without limit; false while a revocation is under way.
    pub cacheable: bool,
}

pub struct Volume {
    _private: (),
}

/// The root directory's inode number.
pub const ROOT_INO: u64 = (1 << 40) | 1;

impl Volume {
    /// Joins the volume: claims a slot, recovers what is dead if need be.
    pub async fn mount(cfg: MountConfig) -> Result<Arc<Self>> {
        Err(FsError::NotSupported)
    }
    /// Writes everything back and leaves.
    pub async fn unmount(&self) -> Result<()> {
        Err(FsError::NotSupported)
    }
    pub fn node(&self) -> NodeId {
        NodeId { slot: 0, incarnation: 0 }
    }
    /// Device counters of this node.
    pub fn device_stats(&self) -> StatsSnapshot {
        StatsSnapshot::default()
    }

    /// `None`: there is no such name (may be cached as such).
    pub async fn lookup(&self, parent: u64, name: &[u8]) -> Result<Leased<Option<Attr>>> {
        Err(FsError::NotSupported)
    }
    pub async fn getattr(&self, ino: u64) -> Result<Leased<Attr>> {
        Err(FsError::NotSupported)
    }
    pub async fn setattr(&self, ino: u64, set: SetAttr) -> Result<Leased<Attr>> {
        Err(FsError::NotSupported)
    }
    pub async fn readlink(&self, ino: u64) -> Result<Leased<Vec<u8>>> {
        Err(FsError::NotSupported)
    }
    /// Regular files, fifos, sockets, device nodes. `open`: also counts one open (release it).
    pub async fn mknod(&self, who: Caller, parent: u64, name: &[u8], new: NewNode, open: bool) -> Result<Leased<Attr>> {
        Err(FsError::NotSupported)
    }
    pub async fn mkdir(&self, who: Caller, parent: u64, name: &[u8], new: NewNode) -> Result<Leased<Attr>> {
        Err(FsError::NotSupported)
    }
    pub async fn symlink(&self, who: Caller, parent: u64, name: &[u8], target: &[u8]) -> Result<Leased<Attr>> {
        Err(FsError::NotSupported)
    }
    /// O_TMPFILE: an open file without a name, in the parent's domain.
    pub async fn tmpfile(&self, who: Caller, parent: u64, new: NewNode) -> Result<Leased<Attr>> {
        Err(FsError::NotSupported)
    }
    pub async fn link(&self, ino: u64, parent: u64, name: &[u8]) -> Result<Leased<Attr>> {
        Err(FsError::NotSupported)
    }
    pub async fn unlink(&self, parent: u64, name: &[u8]) -> Result<Leased<()>> {
        Err(FsError::NotSupported)
    }
    pub async fn rmdir(&self, parent: u64, name: &[u8]) -> Result<Leased<()>> {
        Err(FsError::NotSupported)
    }
    pub async fn rename(&self, from: u64, name: &[u8], to: u64, new_name: &[u8], how: Rename) -> Result<Leased<()>> {
        Err(FsError::NotSupported)
    }
    /// Counts an open file; `truncate` as O_TRUNC.
    pub async fn open(&self, ino: u64, truncate: bool) -> Result<Leased<()>> {
        Err(FsError::NotSupported)
    }
    /// Ends one open.
    pub async fn release(&self, ino: u64) {}
    /// Short only at the end of the file.
    pub async fn read(&self, ino: u64, offset: u64, len: u32) -> Result<Leased<Vec<u8>>> {
        Err(FsError::NotSupported)
    }
    /// Returns the offset at which the data went (differs from `offset` for appends).
    pub async fn write(&self, ino: u64, offset: u64, data: &[u8], how: WriteOptions) -> Result<Leased<u64>> {
        Err(FsError::NotSupported)
    }
    /// Durable on return: file or directory.
    pub async fn fsync(&self, ino: u64, data_only: bool) -> Result<()> {
        Err(FsError::NotSupported)
    }
    /// Everything durable.
    pub async fn sync(&self) -> Result<()> {
        Err(FsError::NotSupported)
    }
    pub async fn fallocate(&self, ino: u64, offset: u64, len: u64, how: Fallocate) -> Result<Leased<()>> {
        Err(FsError::NotSupported)
    }
    pub async fn seek(&self, ino: u64, offset: u64, whence: Whence) -> Result<u64> {
        Err(FsError::NotSupported)
    }
    pub async fn statfs(&self) -> Result<StatFs> {
        Err(FsError::NotSupported)
    }
    /// Up to `max` entries behind cookie `after` (0: from the start). "." and ".." are not among them.
    pub async fn readdir(&self, ino: u64, after: u64, max: usize, plus: bool) -> Result<Leased<Vec<DirEntry>>> {
        Err(FsError::NotSupported)
    }
    /// The parent of a directory (for "..").
    pub async fn parent(&self, ino: u64) -> Result<u64> {
        Err(FsError::NotSupported)
    }
    pub async fn getxattr(&self, ino: u64, name: &[u8]) -> Result<Leased<Vec<u8>>> {
        Err(FsError::NotSupported)
    }
    pub async fn setxattr(&self, ino: u64, name: &[u8], value: &[u8], how: XattrSet) -> Result<Leased<()>> {
        Err(FsError::NotSupported)
    }
    pub async fn listxattr(&self, ino: u64) -> Result<Leased<Vec<Vec<u8>>>> {
        Err(FsError::NotSupported)
    }
    pub async fn removexattr(&self, ino: u64, name: &[u8]) -> Result<Leased<()>> {
        Err(FsError::NotSupported)
    }
}
