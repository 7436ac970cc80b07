//! What goes in and out of a volume.

use std::sync::Arc;

use async_trait::async_trait;
use blockdev::BlockDevice;
use cluster::HintNet;

pub use crate::format::item::{Inode, Time};

/// Who asks: ownership of what is created. Permission checks are done before (by the kernel, `default_permissions`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
}

/// An inode and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    pub ino: u64,
    pub inode: Inode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    Now,
    To(Time),
}

/// Attributes to change; `None` leaves one.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// Permission bits (07777).
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
    /// Clear set-user-ID and set-group-ID as a write by an unprivileged user does.
    pub kill_suid: bool,
}

/// A node to create.
#[derive(Clone, Copy, Debug)]
pub struct NewNode {
    /// Type and permissions as st_mode; type zero means a regular file.
    pub mode: u32,
    /// Applied unless the directory has a default ACL.
    pub umask: u32,
    /// Of a device node.
    pub rdev: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    pub ino: u64,
    /// st_mode >> 12
    pub file_type: u8,
    pub name: Vec<u8>,
    /// Pass it as `after` to go on behind this entry; stable while the entry lives.
    pub cookie: u64,
    /// With `plus`: present where it costs no other domain's lock.
    pub attr: Option<Attr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rename {
    Replace,
    NoReplace,
    Exchange,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct WriteOptions {
    /// O_APPEND: the offset is ignored, data goes to the end as it is now on all nodes.
    pub append: bool,
    pub kill_suid: bool,
    /// What lies beyond the end of the file is dropped: pages of memory maps do not make it grow.
    pub within_size: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    Data,
    Hole,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Fallocate {
    pub keep_size: bool,
    pub punch_hole: bool,
    pub zero_range: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    pub blocks: u64,
    pub free: u64,
    /// Free domain and inode numbers have no bound of their own; this is what df -i shows.
    pub files: u64,
    pub files_free: u64,
    pub block_size: u32,
    pub name_max: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrSet {
    Any,
    Create,
    Replace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Atime {
    Never,
    /// As Linux's default: when older than mtime or ctime, or a day old; only while this node holds the domain exclusively.
    Relative,
}

/// Time of day for time stamps; the simulator's is the paused clock.
pub trait WallClock: Send + Sync + 'static {
    fn now(&self) -> Time;
}

/// The kernel's caches above this volume. Valid without limit while the node holds the domain (section 2.6).
#[async_trait]
pub trait KernelCache: Send + Sync + 'static {
    /// Forget everything known of the domain's inodes (attributes, pages, listings) and every name. Requests are served
    /// meanwhile; it may wait for dirty pages to be written. Replies given from now on have `cacheable == false`.
    async fn forget_domain(&self, domain: u32);
    /// Forget the pages and attributes of these inodes: they were read or written while `forget_domain` ran.
    async fn forget_inodes(&self, inodes: Vec<u64>);
}

/// No kernel above: tests and tools.
pub struct NoKernelCache;

#[async_trait]
impl KernelCache for NoKernelCache {
    async fn forget_domain(&self, _domain: u32) {}
    async fn forget_inodes(&self, _inodes: Vec<u64>) {}
}

/// Everything a volume needs from outside.
pub struct MountConfig {
    pub device: Arc<dyn BlockDevice>,
    pub net: Option<Arc<dyn HintNet>>,
    pub clock: Arc<dyn WallClock>,
    pub kernel: Arc<dyn KernelCache>,
    pub host_name: String,
    /// Seed of nonces (I9).
    pub seed: u64,
    pub read_only: bool,
    pub atime: Atime,
    /// Bytes of clean metadata blocks to keep in memory.
    pub cache_bytes: usize,
    /// Bytes of written file contents to keep before they are written out.
    pub dirty_bytes: usize,
}

impl MountConfig {
    pub const DEFAULT_CACHE_BYTES: usize = 256 << 20;
    pub const DEFAULT_DIRTY_BYTES: usize = 64 << 20;
}
